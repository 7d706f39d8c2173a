"""Extents of a mask: at most three ranges of keys outside which no row of a tile sees a key.

The mask is taken as a disjunction of at most three conjunctions (of more: everything). A comparison
that is linear in the key, `c · at.kv + row ≤ row`, also with one side below `//`, bounds the range
of its conjunction; a condition of the row alone empties it or does not; any other leaves it as it
is. Integers wrap around, so a comparison counts only where none of its parts can.

One analysis, twice: on NumPy arrays for the planner, as C text for the kernels, whose functions are
those of `Numbers` (kernels/variant.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention import bounds
from tilewright.attention.bounds import HIGH, LOW, Interval, bound
from tilewright.ir.nodes import COMPARISON, Binary, Const, Expr, Select, Unary, Var, binary, unary
from tilewright.ir.rewrite import walk

MAX_RANGES = 3
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_LINES = {"+": "line_add", "-": "line_sub", "*": "line_mul", "//": "line_div"}

Case = tuple[Expr, ...]
"""Conditions that all hold."""


def cases(e: Any, wanted: bool = True) -> list[Case]:
    """Conjunctions of which one holds where the mask does, or where it does not."""
    if isinstance(e, Const):
        return [()] if bool(e.value) == wanted else []
    if isinstance(e, Unary) and e.op == "not":
        return cases(e.a, not wanted)
    if isinstance(e, Select):
        then, other = binary("&", e.cond, e.a), binary("&", unary("not", e.cond), e.b)
        return cases(binary("|", then, other), wanted)
    if isinstance(e, Binary) and e.op in ("&", "|"):
        a, b = cases(e.a, wanted), cases(e.b, wanted)
        both = [x + y for x in a for y in b] if (e.op == "&") == wanted else [*a, *b]
        return both if len(both) <= MAX_RANGES else [()]
    if isinstance(e, Binary) and e.op in COMPARISON and e.a.dtype == dtypes.int32:
        return [(e if wanted else binary(_NEGATED[e.op], e.a, e.b),)]
    return [(e if wanted else unary("not", e),)]


def ranges(mask: Expr, ops: Any) -> list[Any]:
    """The range of keys of each case, as `ops` (Numbers or Text) writes it; at least one."""
    ranges = []
    for case in cases(mask):
        keys = ops.key
        for condition in case:
            if not _reads_key(condition):
                keys = ops.keys_both(keys, ops.keys_if(bound(condition, ops), ops.key))
            elif isinstance(condition, Binary) and condition.op in ("<", "<=", ">", ">=", "=="):
                keys = ops.keys_both(keys, _compared(condition, ops))
        ranges.append(keys)
    return ranges or [ops.keys_none()]


def _reads_key(e: Expr) -> bool:
    return any(isinstance(x, Var) and x.name in ("at.kv", "at.key") for x in walk(e))


def _compared(e: Binary, ops: Any) -> Any:
    a, b = _line(e.a, ops), _line(e.b, ops)
    if e.op in (">", ">="):
        a, b = b, a
    if e.op == "==":
        return ops.keys_both(ops.keys_up_to(a, b, ops.key), ops.keys_up_to(b, a, ops.key))
    return (ops.keys_up_to if "=" in e.op else ops.keys_below)(a, b, ops.key)


def _line(e: Any, ops: Any) -> Any:
    """An integer as a linear function of the key."""
    if not _reads_key(e):
        return ops.line(bound(e, ops))
    if isinstance(e, Var):
        return ops.line_key() if e.name == "at.key" else ops.kv
    if isinstance(e, Binary) and e.op in _LINES:
        return getattr(ops, _LINES[e.op])(_line(e.a, ops), _line(e.b, ops), ops.key)
    if isinstance(e, Unary) and e.op == "-":
        return ops.line_sub(ops.line(ops.constant(0)), _line(e.a, ops), ops.key)
    return ops.line_unknown()


class Text(bounds.Text):
    """Writes ranges as C expressions over `tile` and the lines `kv` and `key`: the positions and
    the numbers of keys."""

    key, kv = "tile.key", "kv"

    def line_key(self) -> str:
        return "key"


@dataclass(frozen=True, slots=True)
class Line:
    """⌊(slope · key + rest) / by⌋; where not `known` it may be any number."""

    slope: Any
    rest: Interval
    by: Any
    known: Any

    @property
    def is_whole(self) -> Any:
        return self.known & (self.by == 1)


class Numbers(bounds.Numbers):
    """Computes ranges of keys as NumPy arrays with one element per tile. `key` is the range of all
    keys of each request; the position of a key is its index."""

    def __init__(
        self, key: Interval, positions: Mapping[str, Interval], values: Mapping[str, Any]
    ) -> None:
        super().__init__(positions, values)
        self.key, self.kv = key, self.line_key()

    def line(self, rest: Interval) -> Line:
        return Line(0, rest, 1, True)

    def line_key(self) -> Line:
        return Line(1, Interval.of(0), 1, True)

    def line_unknown(self) -> Line:
        return Line(0, Interval.of(0), 1, False)

    def line_fit(self, slope: Any, rest: Interval, known: Any, key: Interval) -> Line:
        """A line if it stays in int32 over all keys."""
        ends = slope * key.lo, slope * key.hi
        known = known & (slope >= LOW) & (slope <= HIGH)
        known = known & (np.minimum(*ends) + rest.lo >= LOW) & (np.maximum(*ends) + rest.hi <= HIGH)
        rest = Interval(np.where(known, rest.lo, 0), np.where(known, rest.hi, 0))
        return Line(np.where(known, slope, 0), rest, 1, known)

    def line_add(self, a: Line, b: Line, key: Interval) -> Line:
        return self.line_fit(a.slope + b.slope, a.rest + b.rest, a.is_whole & b.is_whole, key)

    def line_sub(self, a: Line, b: Line, key: Interval) -> Line:
        return self.line_fit(a.slope - b.slope, a.rest - b.rest, a.is_whole & b.is_whole, key)

    def line_mul(self, a: Line, b: Line, key: Interval) -> Line:
        swap = b.slope != 0
        slope, times = np.where(swap, b.slope, a.slope), np.where(swap, a.rest.lo, b.rest.lo)
        low = np.where(swap, b.rest.lo, a.rest.lo) * times
        high = np.where(swap, b.rest.hi, a.rest.hi) * times
        constant = np.where(swap, (a.slope == 0) & (a.rest.lo == a.rest.hi), b.rest.lo == b.rest.hi)
        rest = Interval(np.minimum(low, high), np.maximum(low, high))
        return self.line_fit(slope * times, rest, a.is_whole & b.is_whole & constant, key)

    def line_div(self, a: Line, b: Line, key: Interval) -> Line:
        usable = (b.slope == 0) & (b.rest.lo == b.rest.hi) & (b.rest.lo > 0) & (a.by == 1)
        by = np.where(usable, b.rest.lo, 1)
        return Line(a.slope, a.rest, by, a.known & b.is_whole & usable)

    def keys_none(self) -> Interval:
        return Interval.of(0, -1)

    def keys_both(self, a: Interval, b: Interval) -> Interval:
        return Interval(np.maximum(a.lo, b.lo), np.minimum(a.hi, b.hi))

    def keys_if(self, condition: Interval, key: Interval) -> Interval:
        possible = condition.hi != 0
        return Interval(np.where(possible, key.lo, 0), np.where(possible, key.hi, -1))

    def keys_below(self, a: Line, b: Line, key: Interval) -> Interval:
        """Keys where a < b is possible."""
        one = np.where(a.by == 1, 1, 0)
        left = Line(a.slope, a.rest + Interval(one, one), a.by, a.known)
        rest = b.rest - Interval(1 - one, 1 - one)
        return self.keys_up_to(left, Line(b.slope, rest, b.by, b.known), key)

    def keys_up_to(self, a: Line, b: Line, key: Interval) -> Interval:
        """The keys in `key` for which a ≤ b may hold, as one range; all of `key` if not known."""
        known = a.known & b.known & ((a.by == 1) | ((b.by == 1) & (b.slope == 0)))
        known = known & ((b.by == 1) | (a.slope == 0))
        slope = a.slope - b.slope
        room = b.rest.hi * a.by + a.by - 1 - a.rest.lo * b.by
        by = np.where(slope == 0, 1, np.abs(slope))
        none = known & (slope == 0) & (room < 0)
        low = np.where(known & (slope < 0), -(room // by), np.where(none, 0, key.lo))
        high = np.where(known & (slope > 0), room // by, np.where(none, -1, key.hi))
        return Interval(low, high)


def visible_tiles(intervals: list[Interval], key: Interval, tile: int) -> np.ndarray:
    """How many tiles of `tile` keys the ranges touch, each once."""
    low = np.stack([np.maximum(r.lo, key.lo) + 0 * key.hi for r in intervals])
    high = np.stack([np.minimum(r.hi, key.hi) + 0 * key.lo for r in intervals])
    begin = np.where(low <= high, low // tile, 0)
    end = np.where(low <= high, high // tile + 1, 0)
    order = np.argsort(begin, 0, kind="stable")
    begin, end = np.take_along_axis(begin, order, 0), np.take_along_axis(end, order, 0)
    reached = np.maximum.accumulate(end, 0)
    before = np.concatenate([np.zeros_like(reached[:1]), reached[:-1]])
    return np.maximum(end - np.maximum(begin, before), 0).sum(0)
