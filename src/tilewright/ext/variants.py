"""Single hooks as variants, to be composed: what other systems have as options."""

import functools
from typing import Any

from tilewright.attention.tracing import bit_mask, per_head
from tilewright.attention.variant import Causal, Full, Softcap, variant
from tilewright.sparse.trace import scalar


@variant
class Window:
    """The keys from `window_left` positions before the query on, causal or not."""

    window_left = scalar("int32")

    def mask(self, at: Any) -> Any:
        return at.qo - at.kv <= self.window_left


@variant
class Bits:
    """The keys whose bits are set in `bits` (rows of q, words)."""

    bits = bit_mask()

    def mask(self, at: Any) -> Any:
        return self.bits[at.key]


@variant
class RowAlibi:
    """ALiBi with FlashInfer's positions: queries count from 0. Only the lse is another one."""

    slopes = per_head("float32")

    def logits(self, s: Any, at: Any) -> Any:
        return s + self.slopes[at.qo_head] * (at.kv - (at.qo - at.kv_len + at.qo_len))


@variant
class Sinks:
    """A logit for each query head that joins the sum of its softmax and has no value."""

    sinks = per_head("float32")

    def sink(self, at: Any) -> Any:
        return self.sinks[at.qo_head]


@functools.lru_cache(256)
def composed(causal: bool, window_left: int, soft_cap: float, tensors: frozenset[str]) -> Any:
    """The variant with these options. `window_left` < 0: no window; `soft_cap` 0: no cap;
    `tensors`: which of `bits`, `slopes`, `sinks` it takes."""
    result = Causal() if causal else Full()
    result = result & Window(window_left=window_left) if window_left >= 0 else result
    result = result & Bits() if "bits" in tensors else result
    result = result | Softcap(soft_cap=soft_cap) if soft_cap else result
    result = result | RowAlibi() if "slopes" in tensors else result
    return result | Sinks() if "sinks" in tensors else result


def words(rows: Any) -> Any:
    """Packs a bool tensor (rows, n) into int32 words (rows, ⌈n/32⌉), the lowest bit first."""
    packed = rows[:, ::32].int()
    for bit in range(1, 32):
        part = rows[:, bit::32]
        packed[:, : part.shape[1]] |= part.int() << bit
    return packed
