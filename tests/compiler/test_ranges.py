"""Ranges of whole numbers hold whatever the numbers are, also where arithmetic wraps around."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright import dtypes
from tilewright.ir.nodes import Binary, Cast, Const, Expr, Index, Select, binary, cast, select
from tilewright.ir.ranges import interval
from tilewright.ir.rewrite import simplify

KINDS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
OPS = ("+", "-", "*", "//", "%", "&", "|", "^", "<<", ">>", "min", "max")
EXTENTS = {"m": 1, "n": 7, "k": 127}


def size(dim: str | int) -> Expr:
    return Const(EXTENTS[str(dim)], dtypes.int32)


@st.composite
def expressions(draw: Any, depth: int = 4) -> Expr:
    """Casts, choices and arithmetic on indices of all widths and on constants."""
    kind = dtypes.dtype(draw(st.sampled_from(KINDS)))
    shape = draw(st.integers(0, 5)) if depth else draw(st.integers(0, 1))
    if shape == 0:
        dim = draw(st.sampled_from(sorted(EXTENTS)))
        return Index(dim, kind, dim)
    if shape == 1:
        return Const(draw(st.integers(max(kind.least, -300), min(kind.most, 300))), kind)
    a = draw(expressions(depth - 1))
    if shape == 2:
        return cast(a, kind)
    b = draw(expressions(depth - 1))
    if dtypes.promote(a.dtype, b.dtype).is_float:  # uint64 with a signed integer
        b = cast(b, a.dtype)
    if shape == 3:
        return select(binary("<", a, b), a, b)
    op = draw(st.sampled_from(OPS))
    if op in ("<<", ">>"):
        b = Const(draw(st.integers(0, a.dtype.bits - 1)), a.dtype)
    elif op in ("//", "%"):
        b = Const(draw(st.integers(1, 100)), b.dtype)
    return binary(op, a, b)


def value(e: Expr, at: dict[str, int]) -> int:
    """What the machine computes: each step wraps around in its type."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Index):
        return at[str(e.dim)]
    if isinstance(e, Cast):
        return wrapped(value(e.a, at), e)
    if isinstance(e, Select):
        return value(e.a if value(e.cond, at) else e.b, at)
    assert isinstance(e, Binary)
    a, b = value(e.a, at), value(e.b, at)
    done = {
        "+": a + b, "-": a - b, "*": a * b, "&": a & b, "|": a | b, "^": a ^ b, "<": int(a < b),
        "//": a // b if b else 0, "%": a % b if b else 0,
        "<<": a << min(max(b, 0), 64), ">>": a >> max(b, 0), "min": min(a, b), "max": max(a, b),
    }  # fmt: skip
    return wrapped(done[e.op], e)


def wrapped(x: int, e: Expr) -> int:
    return int(np.array(x & (2**64 - 1), np.uint64).astype(e.dtype.numpy))


@settings(max_examples=250, deadline=None)
@given(expressions(), st.data())
def test_every_value_lies_in_its_range(e: Expr, data: Any) -> None:
    at = {dim: data.draw(st.integers(0, n - 1)) for dim, n in EXTENTS.items()}
    found = value(e, at)
    for low, high in (interval(e, size), interval(e)):
        assert low <= found <= high
    assert value(simplify(e), at) == found


def test_what_is_known() -> None:
    i, byte = Index("k", dtypes.int32, "k"), Index("k", dtypes.uint8, "k")
    assert interval(i, size) == (0, 126)
    assert interval(i) == (0, 2**31 - 1)
    assert interval(i * 2 - 1, size) == (-1, 251)
    assert interval(i // 3, size) == (0, 42)
    assert interval(i % 5, size) == (0, 4)
    assert interval(i + 1) == (-(2**31), 2**31 - 1), "may wrap around"
    assert interval(cast(byte, dtypes.int32) >> 4) == (0, 15)


def test_masks_that_do_nothing_are_left_out() -> None:
    byte = Index("k", dtypes.uint8, "k")
    high, low = byte >> 4, byte & 15
    assert simplify(high & 15) == high
    assert simplify(cast(byte, dtypes.int32) & 255) == cast(byte, dtypes.int32)
    assert simplify(low) == low
    signed = Index("k", dtypes.int32, "k") - 1
    assert simplify(signed & 15) == signed & 15
