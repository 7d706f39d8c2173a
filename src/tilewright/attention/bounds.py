"""The class of a tile under a mask, empty, full or partial, by interval arithmetic.

One analysis, twice: on NumPy arrays for the planner, as C text for the kernels. An interval is a
pair (lo, hi) of integers, a condition an interval in {0, 1}. What cannot be bounded (floats, loads
from tensors, results that may leave int32) is everything, so that a tile counts as partial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.ir.nodes import BITWISE, COMPARISON, Binary, Cast, Const, Expr, Load, Select, Unary
from tilewright.ir.nodes import Var as VarNode

LOW, HIGH = -(2**31), 2**31 - 1
EMPTY, PARTIAL, FULL = 0, 1, 2

# The operations of kernels/bounds.h, by those of the IR.
_C_BINARY = {
    "+": "add", "-": "sub", "*": "mul", "min": "lower", "max": "upper", "//": "div", "%": "mod",
    "<": "less", "<=": "less_equal", "==": "same",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """Integers lo … hi, elementwise over arrays."""

    lo: Any
    hi: Any

    @classmethod
    def of(cls, lo: Any, hi: Any | None = None) -> Interval:
        low = np.asarray(lo, np.int64)
        return cls(low, low if hi is None else np.asarray(hi, np.int64))

    def fitted(self) -> Interval:
        """Everything where the value may have wrapped around."""
        wraps = (self.lo < LOW) | (self.hi > HIGH)
        return Interval(np.where(wraps, LOW, self.lo), np.where(wraps, HIGH, self.hi))


def tile_class(
    mask: Expr, positions: Mapping[str, Interval], values: Mapping[str, Any]
) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for each tile.

    `positions`: intervals of `at.qo`, `at.kv`, …; `values`: the integer scalars that are known.
    """
    seen = bound(mask, positions, values)
    return np.where(seen.hi == 0, EMPTY, np.where(seen.lo == 1, FULL, PARTIAL))


def _everything(dtype: Any) -> Interval:
    return Interval.of(0, 1) if dtype == dtypes.bool_ else Interval.of(LOW, HIGH)


def bound(e: Any, positions: Mapping[str, Interval], values: Mapping[str, Any]) -> Interval:
    """The interval of an integer or a condition; see `tile_class` for the arguments."""
    if e.dtype.is_float:
        return _everything(e.dtype)
    if isinstance(e, Const):
        return Interval.of(int(e.value))
    if isinstance(e, VarNode):
        return positions.get(e.name, _everything(e.dtype))
    if isinstance(e, Load):
        known = not e.index and e.buffer.name in values
        return Interval.of(int(values[e.buffer.name])) if known else _everything(e.dtype)
    if isinstance(e, Cast):
        a = bound(e.a, positions, values)
        if e.a.dtype.is_float:
            return _everything(e.dtype)
        return _truth(a) if e.dtype == dtypes.bool_ and e.a.dtype != dtypes.bool_ else a
    if isinstance(e, Unary):
        return _unary(e, bound(e.a, positions, values))
    if isinstance(e, Select):
        c = bound(e.cond, positions, values)
        a, b = bound(e.a, positions, values), bound(e.b, positions, values)
        lo = np.where(c.lo == 1, a.lo, np.where(c.hi == 0, b.lo, np.minimum(a.lo, b.lo)))
        hi = np.where(c.lo == 1, a.hi, np.where(c.hi == 0, b.hi, np.maximum(a.hi, b.hi)))
        return Interval(lo, hi)
    if isinstance(e, Binary):
        if e.a.dtype.is_float:
            return _everything(e.dtype)
        return _binary(e, bound(e.a, positions, values), bound(e.b, positions, values))
    return _everything(e.dtype)


def _truth(a: Interval) -> Interval:
    never = (a.lo == 0) & (a.hi == 0)
    return Interval(((a.lo > 0) | (a.hi < 0)).astype(np.int64), (~never).astype(np.int64))


def _unary(e: Unary, a: Interval) -> Interval:
    if e.op == "-":
        return Interval(-a.hi, -a.lo).fitted()
    if e.op == "not":
        return Interval(1 - a.hi, 1 - a.lo)
    if e.op == "abs":
        low = np.where((a.lo <= 0) & (a.hi >= 0), 0, np.minimum(abs(a.lo), abs(a.hi)))
        return Interval(low, np.maximum(abs(a.lo), abs(a.hi))).fitted()
    return _everything(e.dtype)


def _binary(e: Binary, a: Interval, b: Interval) -> Interval:
    op = e.op
    if op in COMPARISON:
        return _compare(op, a, b)
    if op in BITWISE:
        if e.dtype != dtypes.bool_:
            return _everything(e.dtype)
        if op == "&":
            return Interval(a.lo & b.lo, a.hi & b.hi)
        if op == "|":
            return Interval(a.lo | b.lo, a.hi | b.hi)
        fixed = (a.lo == a.hi) & (b.lo == b.hi)
        return Interval(np.where(fixed, a.lo ^ b.lo, 0), np.where(fixed, a.lo ^ b.lo, 1))
    if op == "+":
        return Interval(a.lo + b.lo, a.hi + b.hi).fitted()
    if op == "-":
        return Interval(a.lo - b.hi, a.hi - b.lo).fitted()
    if op == "*":
        products = [a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi]
        low, high = products[0], products[0]
        for p in products[1:]:
            low, high = np.minimum(low, p), np.maximum(high, p)
        return Interval(low, high).fitted()
    if op == "min":
        return Interval(np.minimum(a.lo, b.lo), np.minimum(a.hi, b.hi))
    if op == "max":
        return Interval(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi))
    return _divide(op, a, b)


def _divide(op: str, a: Interval, b: Interval) -> Interval:
    """// and % by one positive number."""
    usable = (b.lo == b.hi) & (b.lo > 0)
    by = np.where(usable, b.lo, 1)
    low, high = a.lo // by, a.hi // by
    if op == "//":
        return Interval(np.where(usable, low, LOW), np.where(usable, high, HIGH))
    one = usable & (low == high)  # no multiple of `by` lies inside
    return Interval(
        np.where(one, a.lo % by, np.where(usable, 0, LOW)),
        np.where(one, a.hi % by, np.where(usable, by - 1, HIGH)),
    )


def _compare(op: str, a: Interval, b: Interval) -> Interval:
    if op in (">", ">="):
        return _compare({">": "<", ">=": "<="}[op], b, a)
    if op == "<":
        sure, possible = a.hi < b.lo, a.lo < b.hi
    elif op == "<=":
        sure, possible = a.hi <= b.lo, a.lo <= b.hi
    else:
        sure = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
        possible = (a.lo <= b.hi) & (b.lo <= a.hi)
        if op == "!=":
            sure, possible = ~possible, ~sure
    return Interval(sure.astype(np.int64), possible.astype(np.int64))


# ---------------------------------------------------------------------------- as C text


def bound_text(e: Any) -> str:
    """The same analysis as a C expression of type `tw::Bound` over the positions of `tw::Tile`.

    Scalars are the members `v_NAME` of the variant's struct."""
    everything = "tw::bound_bool()" if e.dtype == dtypes.bool_ else "tw::bound_int()"
    if e.dtype.is_float:
        return everything
    if isinstance(e, Const):
        return f"tw::bound({int(e.value)}ll)"
    if isinstance(e, VarNode):
        name = e.name.removeprefix("at.")
        return everything if name == "q_token" else f"tile.{name}"
    if isinstance(e, Load):
        return _load_text(e, everything)
    if isinstance(e, Cast):
        if e.a.dtype.is_float:
            return everything
        narrows = e.dtype == dtypes.bool_ and e.a.dtype != dtypes.bool_
        return f"tw::bound_truth({bound_text(e.a)})" if narrows else bound_text(e.a)
    if isinstance(e, Unary) and e.op in ("-", "not", "abs"):
        verb = {"-": "neg", "not": "not", "abs": "abs"}[e.op]
        return f"tw::bound_{verb}({bound_text(e.a)})"
    if isinstance(e, Select):
        arms = f"{bound_text(e.a)}, {bound_text(e.b)}"
        return f"tw::bound_select({bound_text(e.cond)}, {arms})"
    if isinstance(e, Binary):
        return _binary_text(e, everything)
    return everything


def _load_text(e: Load, everything: str) -> str:
    """Scalars and values of the tile's request, which is one, are known; others are not."""
    if not e.index:
        return f"tw::bound(v_{e.buffer.name})"
    by_request = isinstance(e.index[0], VarNode) and e.index[0].name == "at.request"
    if by_request and len(e.index) == 1:
        return f"tw::bound(v_{e.buffer.name}.at(static_cast<int32_t>(tile.request.lo), 0))"
    return everything


def _binary_text(e: Binary, everything: str) -> str:
    if e.a.dtype.is_float or (e.op in BITWISE and e.dtype != dtypes.bool_):
        return everything
    a, b = bound_text(e.a), bound_text(e.b)
    if e.op in (">", ">="):
        return f"tw::bound_{_C_BINARY[{'>': '<', '>=': '<='}[e.op]]}({b}, {a})"
    if e.op == "!=":
        return f"tw::bound_not(tw::bound_same({a}, {b}))"
    if e.op in BITWISE:
        return f"tw::bound_{ {'&': 'and', '|': 'or', '^': 'xor'}[e.op] }({a}, {b})".replace(" ", "")
    return f"tw::bound_{_C_BINARY[e.op]}({a}, {b})"
