"""Argmax of rows."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.cases import TOKENS, normal, poisoned

from tilewright.errors import ArgumentError
from tilewright.ops.rowwise import argmax_kernel


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
    assert ((got >= 0) & (got < 35)).all()
    assert list(got[3:]) == [34, 33, 3]


def test_wrong_arguments(rng):
    x = normal(rng, 2, 9)
    for code, call in (
        ("A103", lambda: argmax_kernel()(x[0])),
        ("A102", lambda: argmax_kernel()(x, out=np.zeros(2, np.int64))),
    ):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert caught.value.code == code
