"""Variants composed by & and |: against masks and logits written by hand."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright as tw
from tilewright.attention import reference
from tilewright.attention.variant import traced_of
from tilewright.errors import ArgumentError, ProgramError

QO, KV = np.arange(30)[:, None], np.arange(30)[None]


@tw.variant
class Prefix:
    size = tw.scalar("int32", 4)

    def mask(self, at):
        return at.kv < self.size


@tw.variant
class Doubled:
    scale = tw.scalar("float32", 2.0)

    def logits(self, s, at):
        return s * self.scale


def mask_of(variant):
    """The mask over 30 queries and keys."""
    found = reference.evaluate(traced_of(variant).mask, {"at.qo": QO, "at.kv": KV}, values(variant))
    return np.broadcast_to(found, (30, 30))


def logits_of(variant, s):
    return reference.evaluate(traced_of(variant).logits, {"s": s}, values(variant))


def values(variant):
    return dict(variant.fixed)


def test_masks_are_joined():
    window = (KV <= QO) & (QO - KV < 7)
    composed = tw.Causal() & tw.SlidingWindow(window=7)
    np.testing.assert_array_equal(mask_of(composed), window)
    np.testing.assert_array_equal(mask_of(tw.Full() & composed), window)
    np.testing.assert_array_equal(mask_of(composed & Prefix(size=9)), window & (KV < 9))
    np.testing.assert_array_equal(mask_of(Prefix() & Prefix()), np.broadcast_to(KV < 4, (30, 30)))
    assert str(traced_of(tw.Full() & tw.Full()).mask) == "true"
    # A condition that both have is in the mask once: the kernel is that of the preset alone.
    assert traced_of(composed).mask == traced_of(tw.SlidingWindow(window=7)).mask


def test_logits_are_stacked_in_order():
    s = np.linspace(-90, 90, 7)
    capped = 5.0 * np.tanh(s / 5.0)
    cap, twice = tw.Softcap(soft_cap=5.0), Doubled()
    np.testing.assert_allclose(logits_of(tw.Full() | cap | twice, s), capped * 2)
    np.testing.assert_allclose(logits_of(twice | cap, s), 5.0 * np.tanh(2 * s / 5.0))
    np.testing.assert_allclose(logits_of(twice & cap, s), 5.0 * np.tanh(2 * s / 5.0))
    assert mask_of(tw.Full() | cap).all()  # the mask on the right of | is not taken
    np.testing.assert_array_equal(mask_of(twice & cap), KV <= QO)
    composed = tw.Causal() & tw.SlidingWindow(window=3) | cap
    np.testing.assert_allclose(logits_of(composed, s), capped)
    np.testing.assert_array_equal(mask_of(composed), (KV <= QO) & (QO - KV < 3))


def test_a_composition_is_a_frozen_value():
    def make(window=3):
        return tw.Causal() & tw.SlidingWindow(window=window) | tw.Softcap(soft_cap=30.0)

    assert make() == make() != make(4) and len({make(), make(), make(4)}) == 2
    assert repr(make()) == "Causal() & SlidingWindow(window=3) | Softcap(soft_cap=30.0)"
    either = (tw.Full() | Doubled()) & (Prefix() & tw.Causal())
    assert repr(either) == "(Full() | Doubled(scale=2.0)) & (Prefix(size=4) & Causal())"
    with pytest.raises(AttributeError):
        make().fixed = ()
    assert tw.Attention(4, 2, 16, make()) == tw.Attention(4, 2, 16, make())
    assert [v.name for v in traced_of(make()).values] == ["window", "soft_cap"]


def test_values_of_one_name():
    shared = tw.SlidingWindow(window=5) & tw.SlidingWindow(window=5)
    assert len(traced_of(shared).values) == 1 and dict(shared.fixed) == {"window": 5}
    shared = tw.SlidingWindow() & (tw.SlidingWindow() & Prefix())
    assert [v.name for v in traced_of(shared).values] == ["window", "size"]

    @tw.variant
    class Other:
        window = tw.scalar("float32", 5.0)

        def logits(self, s, at):
            return s * self.window

    @tw.variant
    class Unread:
        size = tw.scalar("int32", 1)

        def mask(self, at):
            return at.kv < self.size

        def logits(self, s, at):
            return s + 1.0

    for a, b in (
        (tw.SlidingWindow(window=5), tw.SlidingWindow(window=6)),
        (tw.SlidingWindow(window=5), tw.SlidingWindow()),
        (tw.SlidingWindow(), tw.SlidingWindow(window=5)),
        (tw.SlidingWindow(window=5), Other()),
    ):
        with pytest.raises(ProgramError, match=r"P101.*window"):
            _ = a & b
    # What only the mask on the right of | reads is not a value of the result.
    assert dict((tw.Full() | Unread(size=7)).fixed) == {}


def test_misuse():
    for a, b in ((tw.Causal(), tw.SlidingWindow), (tw.Causal(), 3), (Prefix(), None)):
        for operator in ("__and__", "__or__"):
            with pytest.raises(ArgumentError) as e:
                getattr(a, operator)(b)
            assert e.value.code == "A107"
    with pytest.raises(ProgramError, match=r"P101.*no hooks but a mask(?s:.*)a & b"):
        _ = tw.Causal() | tw.SlidingWindow(window=4)
    with pytest.raises(ProgramError, match=r"P101.*would lose its masks"):
        _ = tw.Full() | tw.Softcap() & tw.SlidingWindow(window=4)
    with pytest.raises(ArgumentError, match="A107"):
        tw.Attention(4, 2, 16, tw.Causal | tw.Softcap)  # classes: a union of types
    with pytest.raises(ArgumentError, match="A101"):
        attn = tw.Attention(1, 1, 16, tw.Causal() & tw.SlidingWindow())
        kv = tw.KV(
            tw.Table.ragged(np.array([0, 3], np.int32)),
            tw.Pool(*np.zeros((2, 3, 1, 16), np.float32)),
        )
        attn.run(np.zeros((1, 1, 16), np.float32), kv, attn.plan([0, 1], kv))
