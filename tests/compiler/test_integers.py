"""Integers of every width: promotion as NumPy's, and reductions that multiply in the accumulator.

The expected values are NumPy's: `result_type` for elements, int64 products for sums."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright import ops

NARROW = ("int8", "uint8", "int16", "uint16")
INTEGERS = (*NARROW, "int32", "uint32", "int64", "uint64")
PAIRS = list(itertools.combinations_with_replacement(INTEGERS, 2))
FORMATS = {"csr": tw.csr(), "ell": tw.ell(9), "bsr": tw.bsr(2), "hyb": tw.hyb(buckets=(1, 2, 4))}


def edges(dtype: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Random values of a type, its smallest and its largest among them."""
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    values[:3] = info.min, info.max, 1
    return rng.permutation(values)


def elementwise(a: str, b: str) -> Any:
    @tw.program
    def program(x=tw.dense("n", dtype=a), y=tw.dense("n", dtype=b)):
        i = tw.indices("n")
        return (
            tw.out.named("product")[i](x[i] * y[i]),
            tw.out.named("larger")[i](tw.maximum(x[i], y[i])),
            tw.out.named("smaller")[i](tw.minimum(x[i], y[i])),
            tw.out.named("less")[i](tw.where(x[i] < y[i], 1, 0)),
            tw.out.named("chosen")[i](tw.where(x[i] < y[i], x[i], y[i])),
        )

    return program


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize(("a", "b"), [p for p in PAIRS if "int64" not in p[0] + p[1]])
def test_elements_of_two_integer_types(a, b, target, rng):
    x, y = edges(a, rng, 40), edges(b, rng, 40)
    product, larger, smaller, less, chosen = elementwise(a, b).build(target)(x, y)
    with np.errstate(over="ignore"):
        for got, wanted in (
            (product, x * y),
            (larger, np.maximum(x, y)),
            (smaller, np.minimum(x, y)),
            (chosen, np.minimum(x, y)),
        ):
            assert got.dtype == wanted.dtype == np.result_type(a, b)
            np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(less, x < y)


def test_bits_of_two_types_that_no_integer_holds():
    with pytest.raises(tw.errors.ProgramError) as caught:

        @tw.program
        def program(x=tw.dense("n", dtype="int64"), y=tw.dense("n", dtype="uint64")):
            i = tw.indices("n")
            return tw.out[i](x[i] & y[i])

    assert caught.value.code == "P106"


# ---------------------------------------------------------------------------- reductions

SMALL = list(itertools.product(("int8", "uint8", "int16"), ("int8", "uint8")))


def sparse(dtype: str, rng: np.random.Generator) -> np.ndarray:
    values = edges(dtype, rng, 8 * 9).reshape(8, 9)
    return np.where(rng.random((8, 9)) < 0.6, values, 0).astype(dtype)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("a", "x"), SMALL)
def test_spmm_of_small_integers(a, x, fmt, rng):
    for d in (3, 16):
        A, X = sparse(a, rng), edges(x, rng, 9 * d).reshape(9, d)
        y = ops.spmm(FORMATS[fmt].pack(A), X)
        assert y.dtype == np.int32
        np.testing.assert_array_equal(y, A.astype(np.int64) @ X.astype(np.int64))


@pytest.mark.parametrize(("a", "x"), SMALL)
def test_sddmm_of_small_integers(a, x, rng):
    A, P, Q = sparse(a, rng) % 4, edges(x, rng, 8 * 5).reshape(8, 5), edges(x, rng, 45)
    Q = Q.reshape(9, 5)
    packed = tw.csr().pack(A)
    wanted = A.astype(np.int64) * (P.astype(np.int64) @ Q.astype(np.int64).T)
    np.testing.assert_array_equal(ops.sddmm(packed, P, Q).dense(), wanted)


@pytest.mark.parametrize("target", ["cpp", "interp"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_arithmetic_below_a_reduction_is_done_in_the_accumulator(dtype, target, rng):
    """Products, sums, differences, negations, branches and the operands of max and min."""

    @tw.program
    def program(x=tw.dense("m n", dtype=dtype), y=tw.dense("m n", dtype="int8")):
        i, j = tw.indices("m n")
        a, b = x[i, j], y[i, j]
        return (
            tw.out.named("squares")[i](tw.sum((a + b) * (a - b), over=j)),
            tw.out.named("negated")[i](tw.sum(-(b * b), over=j)),
            tw.out.named("branches")[i](tw.sum(tw.where(a < b, a * b, b + b), over=j)),
            tw.out.named("largest")[i](tw.max(a * b, over=j)),
            tw.out.named("least")[i](tw.min(tw.minimum(a * b, b * b * b), over=j)),
            tw.out.named("cut")[i](tw.sum((a * b).cast("int16").cast("int8"), over=j)),
        )

    x, y = edges(dtype, rng, 60).reshape(6, 10), edges("int8", rng, 60).reshape(6, 10)
    x[np.abs(x.astype(np.int64)) > 4000] = 11  # so that int32 holds every sum below
    a, b = x.astype(np.int64), y.astype(np.int64)
    got = program.build(target)(x, y)
    wanted = (
        ((a + b) * (a - b)).sum(1), -(b * b).sum(1), np.where(a < b, a * b, b + b).sum(1),
        (a * b).max(1), np.minimum(a * b, b**3).min(1), (a * b).astype(np.int8).sum(1, np.int64),
    )  # fmt: skip
    for one, exact in zip(got, wanted, strict=True):
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, exact)
