"""What FlashInfer's options mean: one variant of attention, and packed masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from tilewright.attention.batch import Attention
from tilewright.attention.merge import State
from tilewright.errors import ArgumentError
from tilewright.ext.variants import Bits, Cap, Causal, RowAlibi, Sinks, Window, composed

LOG2_E = 1 / math.log(2)
"""FlashInfer's lse is a logarithm to base 2, a state's is natural."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Heads and the options that decide scores. `bits` (rows of q, words of 32): a custom mask,
    which takes the part of `causal`."""

    qo_heads: int
    kv_heads: int
    head_dim: int
    head_dim_vo: int
    causal: bool
    window_left: int
    soft_cap: float
    alibi: bool
    sm_scale: float | None
    bits: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, heads: tuple[int, int, int, int], g: SimpleNamespace, bits: Any = None) -> Problem:
        """From the options of a call. Raises ArgumentError[A101]."""
        mode, cap = g.pos_encoding_mode, g.logits_soft_cap or 0.0
        if mode not in ("NONE", "ALIBI"):
            raise ArgumentError(
                "A101", f"pos_encoding_mode={mode!r} is not supported", where="pos_encoding_mode",
                hint="NONE or ALIBI; rotate q and k before they are cached",
            )  # fmt: skip
        if mode == "ALIBI" and cap > 0:
            raise ArgumentError("A101", "ALIBI with logits_soft_cap", where="logits_soft_cap")
        causal, window = getattr(g, "causal", False), g.window_left
        return cls(*heads, causal, window, cap, mode == "ALIBI", g.sm_scale, bits)

    def attention(
        self, device: Any, options: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Attention, dict[str, Any]]:
        """The attention and the tensors of its variant; `options`: sinks, q_scale, k_scale."""
        sinks, factor = options.get("sinks"), scale(options, "q_scale") * scale(options, "k_scale")
        masks: list[Any] = [] if self.bits is None else [Bits()]
        masks += [Causal()] if self.causal and self.bits is None else []
        masks += [Window(window_left=self.window_left)] if self.window_left >= 0 else []
        logits: list[Any] = [Cap(soft_cap=self.soft_cap)] if self.soft_cap > 0 else []
        logits += [RowAlibi()] if self.alibi else []
        logits += [Sinks()] if sinks is not None else []
        values = {"bits": self.bits, "sinks": sinks}
        if self.alibi:
            values["slopes"] = alibi_slopes(self.qo_heads, device)
        sm_scale = self.head_dim**-0.5 if self.sm_scale is None else self.sm_scale
        attn = Attention(
            self.qo_heads, self.kv_heads, self.head_dim, composed(masks, logits),
            sm_scale * factor, self.head_dim_vo,
        )  # fmt: skip
        return attn, {name: value for name, value in values.items() if value is not None}


@functools.lru_cache(64)  # no copy to a GPU while a graph is captured
def alibi_slopes(heads: int, device: Any) -> torch.Tensor:
    """ALiBi's slopes (heads,) float32: 2^(−8i/n) for the n = 2^⌊log2 heads⌋ first heads, then each
    second one of the slopes of 2n heads (Press et al. 2022, and its code for other counts)."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def packed_bits(g: SimpleNamespace, qo: torch.Tensor, kv: torch.Tensor) -> torch.Tensor | None:
    """The words (rows of q, words) of int32 of a custom mask, None where there is none.

    A mask is flat, request by request, rows by keys; packed, bit i % 8 of byte i // 8, each request
    from a new byte on. `qo`, `kv`: rows and keys of each request. Raises ArgumentError.
    """
    name = "custom_mask" if g.packed_custom_mask is None else "packed_custom_mask"
    mask, sizes = getattr(g, name), qo.long() * kv.long()
    if mask is None:
        return None
    kind = torch.bool if name == "custom_mask" else torch.uint8
    sizes = sizes if name == "custom_mask" else (sizes + 7) // 8
    if mask.dtype != kind or mask.numel() != int(sizes.sum()):
        text = f"{name} is {mask.numel()} elements of {mask.dtype}"
        hint = f"{int(sizes.sum())} of {kind}: rows of q by keys, one request after the other"
        raise ArgumentError("A103", text, where=name, hint=hint)
    flat, longest = mask.reshape(-1).cpu(), int(kv.max()) if len(kv) else 0
    if kind == torch.uint8:
        flat = (flat[:, None] >> torch.arange(8) & 1).bool().reshape(-1)
        sizes = sizes * 8
    rows = torch.zeros(int(qo.sum()), -(-longest // 32) * 32, dtype=torch.bool)
    first = row = 0
    for size, m, n in zip(sizes.tolist(), qo.tolist(), kv.tolist(), strict=True):
        rows[row : row + m, :n] = flat[first : first + m * n].reshape(m, n)
        first, row = first + size, row + m
    return words(rows).to(mask.device)


def words(rows: torch.Tensor) -> torch.Tensor:
    """Conditions (rows, multiple of 32) as int32 words, the first in the lowest bit."""
    bits = rows.reshape(len(rows), rows.shape[1] // 32, 32).long() << torch.arange(
        32, device=rows.device
    )
    return bits.sum(-1).to(torch.int32)


def results(state: State, options: Mapping[str, Any]) -> Any:
    """o, or o and lse to base 2, as a call asks for."""
    if (factor := scale(options, "v_scale")) != 1.0:
        state.o.mul_(factor)
    if not options.get("return_lse"):
        return state.o
    lse, target = state.lse.mul_(LOG2_E), options.get("lse")
    return state.o, lse if target is None else target.copy_(lse)


def scale(options: Mapping[str, Any], name: str) -> float:
    """A calibration scale as a number. Raises ArgumentError[A102] for a tensor."""
    value = options.get(name)
    if value is not None and not isinstance(value, (int, float)):
        text = f"{name} is a {type(value).__name__}"
        raise ArgumentError("A102", text, where=name, hint="a float")
    return 1.0 if value is None else float(value)
