"""Argmax, and samples whose frequencies follow softmax."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.cases import TOKENS, normal, poisoned

from tilewright.errors import ArgumentError
from tilewright.ops.sampling import argmax_kernel, gumbel, sample_kernel


@pytest.mark.parametrize("v", [1, 2, 15, 16, 33, 1000])
def test_argmax(rng, v):
    for t in TOKENS:
        x, out = normal(rng, t, v), poisoned(t, dtype=np.int32)
        argmax_kernel()(x, out=out)
        np.testing.assert_array_equal(out, x.argmax(1))


def test_the_smallest_index_of_equal_ones(rng):
    x = rng.integers(0, 3, (50, 77)).astype(np.float32)
    np.testing.assert_array_equal(argmax_kernel()(x), x.argmax(1))
    assert argmax_kernel()(np.zeros((1, 40), np.float32))[0] == 0
    assert argmax_kernel()(np.full((1, 40), -np.inf, np.float32))[0] == 0


@pytest.mark.parametrize("target", ["cpp", "interp"])
def test_rows_that_are_not_finite_give_a_token(rng, target):
    """Never 2³¹ − 1: the next step looks the token up in the embedding."""
    x = normal(rng, 6, 35)
    x[0] = np.nan
    x[1, 20] = np.nan
    x[2, 0] = np.nan
    x[3, 34] = np.inf
    x[4] = -np.inf
    x[4, 33] = 1
    x[5, 3:9] = np.inf
    with np.errstate(invalid="ignore"):
        got = argmax_kernel(target)(x)
        zeros = np.zeros_like(x)
        sampled = sample_kernel(target)(x, zeros, 1.0)
    for tokens in (got, sampled):
        assert ((tokens >= 0) & (tokens < 35)).all()
        assert list(tokens[3:]) == [34, 33, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_softmax(temperature):
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.0, -np.inf, 0.5], np.float32)
    draws = 20_000
    x = np.tile(logits, (draws, 1))
    noise = gumbel(np.random.default_rng(7), x.shape)
    tokens = sample_kernel()(x, noise, 1 / temperature)
    weights = np.exp(logits.astype(np.float64) / temperature)
    wanted = draws * weights / weights.sum()
    seen = np.bincount(tokens, minlength=7)
    assert seen[5] == 0
    possible = wanted > 0
    chi_square = (((seen - wanted) ** 2)[possible] / wanted[possible]).sum()
    assert chi_square < 20.5  # the 0.1 % point of chi-square with 5 degrees of freedom
    np.testing.assert_array_equal(tokens, sample_kernel()(x, noise, 1 / temperature))


def test_cold_samples_are_the_largest(rng):
    x = normal(rng, 40, 33)
    noise = gumbel(rng, x.shape)
    np.testing.assert_array_equal(sample_kernel()(x, noise, 1e6), x.argmax(1))


def test_noise():
    a, b = (gumbel(np.random.default_rng(3), (200, 100)) for _ in range(2))
    assert a.dtype == np.float32 and np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)
    assert abs(a.mean() - np.euler_gamma) < 0.05 and abs(a.var() - np.pi**2 / 6) < 0.1


def test_wrong_arguments(rng):
    x = normal(rng, 2, 9)
    for code, call in (
        ("A103", lambda: argmax_kernel()(x[0])),
        ("A102", lambda: argmax_kernel()(x, out=np.zeros(2, np.int64))),
        ("A103", lambda: sample_kernel()(x, x[:1].copy(), 1.0)),
        ("A107", lambda: sample_kernel()(x, x.copy(), None)),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert caught.value.code == code
