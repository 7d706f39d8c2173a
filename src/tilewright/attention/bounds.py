"""The class of a tile under a mask, empty, full or partial, by interval arithmetic.

One analysis, `bound`, of two kinds of operations: `Numbers` compute over NumPy arrays for the
planner, `Text` writes C for the kernels, whose functions (kernels/bounds.h) have the same names. An
interval is a pair (lo, hi) of integers, a condition an interval in {0, 1}. What cannot be bounded
(floats, loads from tensors, results that may leave int32) is everything, so that a tile counts as
partial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.ir.nodes import BITWISE, Binary, Cast, Const, Load, Select, Unary
from tilewright.ir.nodes import Var as VarNode

LOW, HIGH = -(2**31), 2**31 - 1

# The operations `bound_…` of Numbers and of kernels/bounds.h, by those of the IR.
_UNARY = {"-": "neg", "not": "not", "abs": "abs"}
_BINARY = {
    "+": "add", "-": "sub", "*": "mul", "min": "lower", "max": "upper", "//": "div", "%": "mod",
    "<": "less", "<=": "less_equal", "==": "same", "&": "and", "|": "or", "^": "xor",
}  # fmt: skip
_MIRRORED = {">": "<", ">=": "<="}


def bound(e: Any, ops: Any) -> Any:
    """The interval of an integer or a condition, by `ops` (Numbers or Text)."""
    everything = ops.bound_bool() if e.dtype == dtypes.bool_ else ops.bound_int()
    if e.dtype.is_float or (isinstance(e, (Cast, Binary)) and e.a.dtype.is_float):
        return everything
    if isinstance(e, Const):
        return ops.constant(int(e.value))
    if isinstance(e, VarNode):
        return ops.position(e, everything)
    if isinstance(e, Load):
        return ops.value(e, everything)
    if isinstance(e, Cast):
        narrows = e.dtype == dtypes.bool_ and e.a.dtype != dtypes.bool_
        return ops.bound_truth(bound(e.a, ops)) if narrows else bound(e.a, ops)
    if isinstance(e, Unary) and e.op in _UNARY:
        return getattr(ops, f"bound_{_UNARY[e.op]}")(bound(e.a, ops))
    if isinstance(e, Select):
        return ops.bound_select(*(bound(x, ops) for x in (e.cond, e.a, e.b)))
    if isinstance(e, Binary) and (e.op not in BITWISE or e.dtype == dtypes.bool_):
        a, b = bound(e.a, ops), bound(e.b, ops)
        if e.op == "!=":
            return ops.bound_not(ops.bound_same(a, b))
        if e.op in _MIRRORED:
            a, b = b, a
        return getattr(ops, f"bound_{_BINARY[_MIRRORED.get(e.op, e.op)]}")(a, b)
    return everything


# ---------------------------------------------------------------------------- over arrays


@dataclass(frozen=True, slots=True)
class Interval:
    """Integers lo … hi, elementwise over arrays."""

    lo: Any
    hi: Any

    @classmethod
    def of(cls, lo: Any, hi: Any | None = None) -> Interval:
        low = np.asarray(lo, np.int64)
        return cls(low, low if hi is None else np.asarray(hi, np.int64))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.lo + other.lo, self.hi + other.hi)

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def fitted(self) -> Interval:
        """Everything where the value may have wrapped around."""
        wraps = (self.lo < LOW) | (self.hi > HIGH)
        return Interval(np.where(wraps, LOW, self.lo), np.where(wraps, HIGH, self.hi))


def _condition(sure: Any, possible: Any) -> Interval:
    return Interval(sure.astype(np.int64), possible.astype(np.int64))


class Numbers:
    """Computes intervals. `positions`: those of `at.qo`, `at.kv`, … over arrays of tiles; `values`:
    the integer scalars that are known."""

    def __init__(self, positions: Mapping[str, Interval], values: Mapping[str, Any]) -> None:
        self.positions, self.values = positions, values

    def bound_int(self) -> Interval:
        return Interval.of(LOW, HIGH)

    def bound_bool(self) -> Interval:
        return Interval.of(0, 1)

    def constant(self, value: int) -> Interval:
        return Interval.of(value)

    def position(self, e: VarNode, everything: Interval) -> Interval:
        return self.positions.get(e.name, everything)

    def value(self, e: Load, everything: Interval) -> Interval:
        known = not e.index and e.buffer.name in self.values
        return Interval.of(int(self.values[e.buffer.name])) if known else everything

    def bound_truth(self, a: Interval) -> Interval:
        return _condition((a.lo > 0) | (a.hi < 0), (a.lo != 0) | (a.hi != 0))

    def bound_neg(self, a: Interval) -> Interval:
        return (-a).fitted()

    def bound_not(self, a: Interval) -> Interval:
        return Interval(1 - a.hi, 1 - a.lo)

    def bound_abs(self, a: Interval) -> Interval:
        low = np.where((a.lo <= 0) & (a.hi >= 0), 0, np.minimum(abs(a.lo), abs(a.hi)))
        return Interval(low, np.maximum(abs(a.lo), abs(a.hi))).fitted()

    def bound_select(self, c: Interval, a: Interval, b: Interval) -> Interval:
        lo = np.where(c.lo == 1, a.lo, np.where(c.hi == 0, b.lo, np.minimum(a.lo, b.lo)))
        hi = np.where(c.lo == 1, a.hi, np.where(c.hi == 0, b.hi, np.maximum(a.hi, b.hi)))
        return Interval(lo, hi)

    def bound_add(self, a: Interval, b: Interval) -> Interval:
        return (a + b).fitted()

    def bound_sub(self, a: Interval, b: Interval) -> Interval:
        return (a - b).fitted()

    def bound_mul(self, a: Interval, b: Interval) -> Interval:
        low, high = np.minimum(a.lo * b.lo, a.lo * b.hi), np.maximum(a.lo * b.lo, a.lo * b.hi)
        for p in (a.hi * b.lo, a.hi * b.hi):
            low, high = np.minimum(low, p), np.maximum(high, p)
        return Interval(low, high).fitted()

    def bound_lower(self, a: Interval, b: Interval) -> Interval:
        return Interval(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi))

    def bound_upper(self, a: Interval, b: Interval) -> Interval:
        return Interval(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi))

    def bound_div(self, a: Interval, b: Interval) -> Interval:
        """By one positive number."""
        usable = (b.lo == b.hi) & (b.lo > 0)
        by = np.where(usable, b.lo, 1)
        return Interval(np.where(usable, a.lo // by, LOW), np.where(usable, a.hi // by, HIGH))

    def bound_mod(self, a: Interval, b: Interval) -> Interval:
        """By one positive number."""
        usable = (b.lo == b.hi) & (b.lo > 0)
        by = np.where(usable, b.lo, 1)
        one = usable & (a.lo // by == a.hi // by)  # no multiple of `by` lies inside
        return Interval(
            np.where(one, a.lo % by, np.where(usable, 0, LOW)),
            np.where(one, a.hi % by, np.where(usable, by - 1, HIGH)),
        )

    def bound_less(self, a: Interval, b: Interval) -> Interval:
        return _condition(a.hi < b.lo, a.lo < b.hi)

    def bound_less_equal(self, a: Interval, b: Interval) -> Interval:
        return _condition(a.hi <= b.lo, a.lo <= b.hi)

    def bound_same(self, a: Interval, b: Interval) -> Interval:
        sure = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
        return _condition(sure, (a.lo <= b.hi) & (b.lo <= a.hi))

    def bound_and(self, a: Interval, b: Interval) -> Interval:
        return Interval(a.lo & b.lo, a.hi & b.hi)

    def bound_or(self, a: Interval, b: Interval) -> Interval:
        return Interval(a.lo | b.lo, a.hi | b.hi)

    def bound_xor(self, a: Interval, b: Interval) -> Interval:
        fixed = (a.lo == a.hi) & (b.lo == b.hi)
        return Interval(np.where(fixed, a.lo ^ b.lo, 0), np.where(fixed, a.lo ^ b.lo, 1))


# ---------------------------------------------------------------------------- as C text


class Text:
    """Writes C expressions of type `tw::Bound` over the positions of `tw::Tile`. Scalars are the
    members `v_NAME` of the variant's struct."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: f"tw::{name}({', '.join(arguments)})"

    def constant(self, value: int) -> str:
        return f"tw::bound({value}ll)"

    def position(self, e: VarNode, everything: str) -> str:
        name = e.name.removeprefix("at.")
        return everything if name == "q_token" else f"tile.{name}"

    def value(self, e: Load, everything: str) -> str:
        """Scalars and values of the tile's request, which is one, are known; others are not."""
        name = f"v_{e.buffer.name}"
        if not e.index:
            return f"tw::bound({name})"
        first, *rest = e.index
        if isinstance(first, VarNode) and first.name == "at.request" and not rest:
            return f"tw::bound({name}.at(static_cast<int32_t>(tile.request.lo), 0))"
        return everything
