"""Single hooks as variants, to be composed: what FlashInfer and transformers have as options."""

from __future__ import annotations

from typing import Any

from tilewright.attention.tracing import bit_mask, per_head, per_key
from tilewright.attention.variant import Causal, Full, variant
from tilewright.ir.nodes import equal
from tilewright.sparse.trace import scalar, tanh


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
class Kept:
    """The keys that `kept` (requests, keys) int32 holds a 1 for: no padding."""

    kept = per_key("int32")

    def mask(self, at: Any) -> Any:
        return equal(self.kept[at.key], 1)


@variant
class Cap:
    """Scores bent into (−soft_cap, soft_cap) by a tanh."""

    soft_cap = scalar("float32")

    def logits(self, s: Any, at: Any) -> Any:
        return self.soft_cap * tanh(s / self.soft_cap)


@variant
class RowAlibi:
    """A bias slopes · (key − row), both counted from the first of the request, as in FlashInfer:
    the weights are those of ALiBi, the lse differs by a constant of the row."""

    slopes = per_head("float32")

    def logits(self, s: Any, at: Any) -> Any:
        row = at.qo - at.kv_len + at.qo_len
        return s + self.slopes[at.qo_head] * (at.kv - row)


@variant
class Sinks:
    """A logit for each query head that joins the sum of its softmax and has no value."""

    sinks = per_head("float32")

    def sink(self, at: Any) -> Any:
        return self.sinks[at.qo_head]


def composed(masks: list[Any], logits: list[Any]) -> Any:
    """One variant: keys that every mask counts, scores changed by each of `logits` in turn."""
    result = Full() if not masks else masks[0]
    for other in masks[1:]:
        result = result & other
    for other in logits:
        result = result | other
    return result


__all__ = ["Bits", "Cap", "Causal", "Full", "Kept", "RowAlibi", "Sinks", "Window", "composed"]
