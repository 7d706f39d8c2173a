"""NumPy twins of the bounds and extents of the kernels (kernels/bounds.h, kernels/variant.h).

`attention/bounds.py` and `attention/extents.py` say which operations a mask needs; these compute
them for many tiles at once, and share no code with the C++ that tests compare with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.nodes import Load, Var

LOW, HIGH = -(2**31), 2**31 - 1


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


class Bounds:
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

    def position(self, e: Var, everything: Interval) -> Interval:
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


class Numbers(Bounds):
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
