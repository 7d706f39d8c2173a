"""Attention of Hugging Face transformers: `hf.register()`, then attn_implementation="tilewright".

For inference. Masks that are no plain causal ones (padding, packed sequences, prefixes, chunks) are
read as bits. Continuous batching of transformers 5 admits no implementations but its own.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.errors import ArgumentError
from tilewright.ext import needed, torch_ops
from tilewright.ext.variants import composed, words

torch: Any = needed("torch", "torch")
Tensor = Any
_REFUSED = ("position_bias", "output_attentions", "cache", "block_table")


def register(name: str = "tilewright") -> None:
    """Make `name` an attn_implementation of transformers. Raises MissingExtra[E101]."""
    transformers = needed("transformers", "hf")
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, mask)


def mask(**options: Any) -> Tensor | None:
    """None where causality and the module's own window say all, else a mask (batch, 1, q, kv)."""
    from transformers.masking_utils import sdpa_mask

    q, kv, q_offset, kv_offset = (
        options[n] for n in ("q_length", "kv_length", "q_offset", "kv_offset")
    )
    padding, local = options.get("attention_mask"), options.get("local_size")
    window = getattr(options.get("config"), "sliding_window", None)
    end = kv_offset + kv
    plain = (
        options.get("allow_is_causal_skip", True)
        and not isinstance(q_offset, torch.Tensor)
        and q_offset + q == end  # no room behind the last key, as in static caches
        and (local is None or kv <= local or window == local)
        and (padding is None or (padding.shape[1] >= end and bool(padding[:, kv_offset:end].all())))
    )
    return None if plain else sdpa_mask(**options | {"allow_is_causal_skip": False})


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """o (batch, q, heads, head_dim) of `query` (batch, heads, q, head_dim), `key` and `value`
    (batch, kv_heads, kv, …), which are read where they are. `options`: softcap, sliding_window,
    s_aux (sinks), is_causal. Raises ArgumentError: A101 for training and what is not supported."""
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        hint = "with torch.no_grad(): …; train with another attn_implementation"
        raise ArgumentError("A101", "attention of tilewright has no derivatives", hint=hint)
    for name in _REFUSED:
        if options.get(name) is not None and options[name] is not False:
            raise ArgumentError("A101", f"{name} is not supported", where=name, hint="eager")
    batch, heads, rows, dim = query.shape
    tensors = {} if attention_mask is None else {"bits": _bits(attention_mask, key.shape[2])}
    if options.get("s_aux") is not None:
        tensors["sinks"] = options["s_aux"].detach().float()
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and attention_mask is None
    window = options.get("sliding_window") if causal else None
    variant = composed(causal, (window or 0) - 1, options.get("softcap") or 0.0, tensors)
    attn = tw.Attention(heads, key.shape[1], dim, variant, scaling, value.shape[3])
    lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=query.device)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * rows
    q = query.transpose(1, 2).reshape(batch * rows, heads, dim)
    pages = key.transpose(1, 2), value.transpose(1, 2)  # a page for each sequence
    o, _ = torch_ops.operator(attn)(q, *pages, (lengths,), indptr, **tensors)
    return o.reshape(batch, rows, heads, value.shape[3]), None


def _bits(seen: Tensor, kv: int) -> Tensor:
    """The words of a mask (batch, 1, q, kv), bool or 0 and the lowest number. Kept with the mask:
    every layer has the same."""
    known = getattr(seen, "_tilewright_words", None)
    if known is not None:
        return known
    if seen.ndim != 4 or seen.shape[1] != 1 or seen.shape[3] < kv:
        text, where = f"attention_mask has shape {tuple(seen.shape)}", "attention_mask"
        raise ArgumentError("A103", text, where=where, hint=f"(batch, 1, q, {kv})")
    kept = seen if seen.dtype == torch.bool else seen == 0
    if seen.dtype != torch.bool and bool((~kept & (seen > torch.finfo(seen.dtype).min / 2)).any()):
        raise ArgumentError("A102", "attention_mask adds biases", where="attention_mask")
    seen._tilewright_words = words(kept[:, 0, :, :kv].reshape(-1, kv))
    return seen._tilewright_words
