"""Simplification keeps values, and takes away what a mask or a shift cannot change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright import dtypes
from tilewright.ir.nodes import Binary, Buffer, Cast, Const, Expr, Load, Var, binary, cast
from tilewright.ir.rewrite import simplify, substitute, walk

X = Var("x", dtypes.uint8)
WIDE = cast(X, dtypes.int32)


UFUNCS = {
    "&": np.bitwise_and, ">>": np.right_shift, "<<": np.left_shift, "+": np.add,
    "*": np.multiply, "//": np.floor_divide, "%": np.mod,
}  # fmt: skip


def value(e: Expr, x: int) -> int:
    """What an integer expression of x is, by NumPy."""
    if isinstance(e, Var):
        return int(e.dtype.numpy.type(x))
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Cast):
        return int(np.array(value(e.a, x)).astype(e.dtype.numpy))
    assert isinstance(e, Binary)
    a, b = (np.array(value(y, x), e.dtype.numpy) for y in (e.a, e.b))
    return int(UFUNCS[e.op](a, b))


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ((WIDE >> 4) & 15, WIDE >> 4),
        (WIDE & 255, WIDE),
        (WIDE & 0x1FF, WIDE),
        ((WIDE >> 0) & 15, WIDE & 15),
        (((WIDE >> 3) & 31) << 0, WIDE >> 3),
    ],
    ids=str,
)
def test_what_changes_nothing_goes(given_, wanted):
    assert simplify(given_) == wanted


@pytest.mark.parametrize(
    "kept",
    [WIDE & 15, WIDE & 0xF0, (WIDE >> 3) & 15, Var("n") & 255, (Var("n") >> 28) & 15],
    ids=str,
)
def test_what_changes_something_stays(kept):
    assert simplify(kept) == kept


STEPS = st.lists(st.tuples(st.sampled_from(("&", ">>", "<<")), st.integers(0, 255)), max_size=5)


@given(x=st.integers(-(2**31), 2**31 - 1), steps=STEPS, narrow=st.booleans())
def test_bits_keep_their_value(x, steps, narrow):
    e: Expr = WIDE if narrow else Var("x")
    x = x & 255 if narrow else x
    for op, n in steps:
        e = binary(op, e, n if op == "&" else n % 20)
    small = simplify(e)
    assert value(small, x) == value(e, x)
    assert sum(1 for _ in walk(small)) <= sum(1 for _ in walk(e))


I, J = Var("i"), Var("x")


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ((I * 32 + J) // 8, I * 4 + J // 8),
        ((I * 32 + J) % 8, J % 8),
        ((I * 32 + J % 32) // 64, I // 2),
        ((I * 32 + J % 32) % 64, I % 2 * 32 + J % 32),
        ((I * 32 + J % 32) // 32, I),
        ((I * 128 + J % 128) // 4 // 16 % 4, I % 2 * 2 + J % 128 // 4 // 16),
    ],
    ids=str,
)
def test_digits_of_a_sum_are_those_of_its_parts(given_, wanted):
    assert simplify(given_) == wanted


@pytest.mark.parametrize(
    "kept",
    [(I * 32 + J) // 64, (I * 32 + J) % 64, (I * 32 + J % 33) // 64, (I * 12 + J % 12) // 8],
    ids=str,
)
def test_digits_of_a_sum_whose_parts_overlap_stay(kept):
    assert simplify(kept) == kept


DIGITS = st.lists(st.tuples(st.booleans(), st.integers(1, 48)), max_size=3)
SIZE = st.integers(1, 40)


@given(i=st.integers(-50, 50), x=st.integers(-300, 300), size=SIZE, low=SIZE, steps=DIGITS)
def test_digits_keep_their_value(i, x, size, low, steps):
    e = I * size + J % low
    for is_quotient, n in steps:
        e = e // n if is_quotient else e % n
    number = i * size + x % low
    for is_quotient, n in steps:
        number = number // n if is_quotient else number % n
    assert value(substitute(simplify(e), {"i": Const(i, dtypes.int32)}), x) == number


def test_elements_of_arrays_may_wrap_around():
    """Their sums have no digits to take apart: X * 1664525 + 1013904223 is not below 2^31."""
    x = Load(Buffer("X", dtypes.int32, (Const(4, dtypes.int32),)), (I,), dtypes.int32)
    for e in ((x * 1664525 + 1013904223) % 25, (x * 32 + J % 32) // 8):
        assert simplify(e) == e
