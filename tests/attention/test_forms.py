"""Forms of hooks that the Hopper kernels compute beside their products."""

from __future__ import annotations

import pytest
from tests.attention.cases import spec_of

import tilewright as tw
from tilewright.attention.families import hopper


def logits_of(function):
    values = {"cap": tw.scalar("float32", 20.0), "slopes": tw.per_head("float32")}
    cls = type("V", (), values | {"logits": function})
    return forms(tw.variant(cls)())


def forms(variant, **form):
    return hopper.forms(spec_of(4, 128, "float16", "float16", variant, **form))


POSITIONS = {"kv_base": "kv_base", "kv_stride": "kv_stride"}


def test_a_tanh_between_two_scalars():
    numbers, methods = logits_of(lambda self, s, at: (self.cap + 1) * tw.tanh(s / self.cap))
    assert numbers["DIRECT"] == numbers["BENDS"] == 1
    assert str(methods["float inner()"]) == "cap[]"
    assert str(methods["float outer()"]) == "cap[] + 1"


@pytest.mark.parametrize(
    "function",
    [
        lambda self, s, at: s * self.cap,
        lambda self, s, at: self.cap / tw.tanh(s),
        lambda self, s, at: self.cap * tw.tanh(self.cap / s),
        lambda self, s, at: self.slopes[at.qo_head] * tw.tanh(s / 2.0),
        lambda self, s, at: tw.tanh(s) * tw.tanh(s),
        lambda self, s, at: self.cap * tw.tanh(s / at.kv),
        lambda self, s, at: self.cap * tw.tanh(s / 2.0) + s,
        lambda self, s, at: s + self.slopes[at.qo_head] * (at.kv + at.qo),
        lambda self, s, at: s + self.cap * at.kv * (at.kv - at.qo),
        lambda self, s, at: s + self.cap * (at.kv - at.key),
        lambda self, s, at: s * 2 + self.cap * (at.kv - at.qo),
    ],
)
def test_other_logits_are_computed_as_they_stand(function):
    assert logits_of(function)[0]["DIRECT"] == 0


@pytest.mark.parametrize(
    ("function", "slope", "distance", "bends"),
    [
        (lambda s, at, m: s + m.slopes[at.qo_head] * (at.kv - at.qo), "{}", "at.kv - at.qo", 0),
        (
            lambda s, at, m: m.cap * tw.tanh(s / 2.0) + m.slopes[at.qo_head] * (at.kv - 3),
            "{}",
            "at.kv - 3",
            1,
        ),
    ],
)
def test_a_slope_times_a_distance(function, slope, distance, bends):
    numbers, methods = logits_of(lambda self, s, at: function(s, at, self))
    assert (numbers["DIRECT"], numbers["BENDS"], numbers["LEANS"]) == (1, bends, 1)
    assert str(methods["float slope(const At& at)"]) == slope.format("slopes[at.qo_head]")
    assert str(methods["int distance(const At& at)"]) == distance


def test_a_distance_of_keys_that_lie_elsewhere_is_no_line():
    assert forms(tw.Alibi(), **POSITIONS)[0]["DIRECT"] == 0


def test_the_score_itself():
    """Of a causal mask, under which rows of many requests may share keys, and of a window."""
    numbers, _ = forms(tw.Causal())
    assert [name for name, x in numbers.items() if x] == ["DIRECT", "PLAIN"]
    numbers, _ = forms(tw.SlidingWindow(window=9))
    assert [name for name, x in numbers.items() if x] == ["DIRECT", "TRAILS"]


@pytest.mark.parametrize(
    ("variant", "limit", "width"),
    [
        (tw.Causal(), "at.qo", None),
        (tw.SlidingWindow(window=9), "at.qo", "window"),
        (tw.Full(), str(2**31 - 1), None),
        (tw.Causal() | tw.Softcap(), "at.qo", None),
    ],
)
def test_the_last_and_the_first_key_of_a_row(variant, limit, width):
    numbers, methods = forms(variant)
    assert numbers["TRAILS"] == (width is not None)
    assert width is None or str(methods["int width(const At& at)"]) == f"{width}[]"
    assert width is None or str(methods["int newest(const At& at)"]) == "at.qo"
    assert str(methods["int limit(const At& at)"]) == limit
    assert str(methods["bool rest(const At& at)"]) == "true"
    elsewhere, methods = forms(variant, **POSITIONS)
    assert elsewhere["TRAILS"] == 0
    assert str(methods["int limit(const At& at)"]) == str(2**31 - 1)


def test_one_of_two_first_keys():
    """The second of two windows stays a condition."""

    @tw.variant
    class Two(tw.SlidingWindow):
        other = tw.scalar("int32")

        def mask(self, at):
            return super().mask(at) & (at.qo - at.key < self.other)

    _, methods = forms(Two(window=9, other=7))
    assert str(methods["int width(const At& at)"]) == "window[]"
    assert str(methods["bool rest(const At& at)"]) == "at.qo - at.key < other[]"


def test_the_least_of_two_limits():
    @tw.variant
    class Prefix(tw.Causal):
        ends = tw.per_request()

        def mask(self, at):
            return super().mask(at) & (at.key <= self.ends[at.request]) & (at.key < at.qo_len)

    numbers, methods = forms(Prefix())
    assert (numbers["RESTS"], numbers["READS"]) == (1, 1)
    assert str(methods["int limit(const At& at)"]) == "min(at.qo, ends[at.request])"
    assert str(methods["bool rest(const At& at)"]) == "at.key < at.qo_len"
