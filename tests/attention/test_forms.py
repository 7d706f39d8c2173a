"""Forms of hooks that the Hopper kernels compute beside their products."""

from __future__ import annotations

import pytest

import tilewright as tw
from tilewright.attention import forms


def logits_of(function):
    cls = type("V", (), {"cap": tw.scalar("float32", 20.0), "slopes": tw.per_head("float32")})
    cls.logits = function
    return forms.logits(tw.variant(cls)().traced.logits)


@pytest.mark.parametrize(
    ("function", "inner", "outer"),
    [
        (lambda self, s, at: self.cap * tw.tanh(s / self.cap), "1 / cap", "cap"),
        (lambda self, s, at: tw.tanh(s * 2.0) * self.cap, "2", "cap"),
        (lambda self, s, at: tw.tanh(s) / (self.cap * 3.0), "1", "1 / (cap * 3)"),
    ],
)
def test_a_tanh_between_two_factors(function, inner, outer):
    numbers, methods = logits_of(function)
    assert numbers["DIRECT"] == numbers["BENDS"] == 1
    assert str(methods["float inner()"]).replace("[]", "") == inner
    assert str(methods["float outer()"]).replace("[]", "") == outer


@pytest.mark.parametrize(
    "function",
    [
        lambda self, s, at: s * self.cap,
        lambda self, s, at: self.cap / tw.tanh(s),
        lambda self, s, at: self.cap * tw.tanh(self.cap / s),
        lambda self, s, at: self.slopes[at.qo_head] * tw.tanh(s),
        lambda self, s, at: tw.tanh(s) * tw.tanh(s),
        lambda self, s, at: self.cap * tw.tanh(s * at.kv),
        lambda self, s, at: self.cap * tw.tanh(s) + s,
    ],
)
def test_other_logits_are_computed_as_they_stand(function):
    assert logits_of(function)[0] == {"DIRECT": 0, "BENDS": 0}


def test_the_score_itself():
    assert forms.logits(tw.Causal().traced.logits)[0] == {"DIRECT": 1, "BENDS": 0}
