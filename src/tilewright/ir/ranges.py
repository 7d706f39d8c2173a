"""Interval analysis: the smallest and the largest value of an integer expression.

Arithmetic wraps around, so an operation whose result may overflow has the range of its type. Guards
that always hold, and masks that change no bit, are left out by this analysis alone.
"""

from collections.abc import Callable
from typing import NamedTuple

from tilewright.ir.nodes import COMPARISON, Binary, Broadcast, Cast, Const, Expr, Index, Select

Size = Callable[[str | int], Expr]


class Range(NamedTuple):
    """All values from `low` to `high`, both included."""

    low: int
    high: int


def interval(e: Expr, size: Size | None = None) -> Range:
    """The range of an integer expression, of each lane of a vector. `size` returns the extent of a
    dimension, a constant where it is known; without it an index is known to be 0 or more."""
    full = Range(e.dtype.least, e.dtype.most)
    result = _interval(e, size, full)
    return result if full.low <= result.low and result.high <= full.high else full


def _interval(e: Expr, size: Size | None, full: Range) -> Range:
    if isinstance(e, Const):
        return Range(int(e.value), int(e.value))
    if isinstance(e, Index):
        extent = size(e.dim) if size else None
        return Range(0, int(extent.value) - 1 if isinstance(extent, Const) else full.high)
    if isinstance(e, (Cast, Broadcast)):
        return full if e.a.dtype.is_float else interval(e.a, size)
    if isinstance(e, Select):
        a, b = interval(e.a, size), interval(e.b, size)
        return Range(min(a.low, b.low), max(a.high, b.high))
    if isinstance(e, Binary) and e.op not in COMPARISON:
        rule = _RULES.get(e.op)
        return rule(interval(e.a, size), interval(e.b, size), full) if rule else full
    return full


def _product(a: Range, b: Range, full: Range) -> Range:
    corners = [x * y for x in a for y in b]
    return Range(min(corners), max(corners))


def _remainder(a: Range, b: Range, full: Range) -> Range:
    if b.low <= 0:
        return full
    return a if a.low >= 0 and a.high < b.low else Range(0, b.high - 1)


def _both(a: Range, b: Range, full: Range) -> Range:
    highs = [r.high for r in (a, b) if r.low >= 0]
    return Range(0, min(highs)) if highs else full


def _either(a: Range, b: Range, full: Range) -> Range:
    return full if min(a.low, b.low) < 0 else Range(0, (1 << max(a.high, b.high).bit_length()) - 1)


def _shifted(by: Callable[[int, int], int]) -> Callable[[Range, Range, Range], Range]:
    def rule(a: Range, b: Range, full: Range) -> Range:
        if b.low != b.high or not 0 <= b.low < full.high.bit_length():
            return full
        return Range(by(a.low, b.low), by(a.high, b.low))

    return rule


_RULES: dict[str, Callable[[Range, Range, Range], Range]] = {
    "+": lambda a, b, _: Range(a.low + b.low, a.high + b.high),
    "-": lambda a, b, _: Range(a.low - b.high, a.high - b.low),
    "//": lambda a, b, top: Range(a.low // b.low, a.high // b.low) if b.low == b.high > 0 else top,
    "*": _product, "%": _remainder, "&": _both, "|": _either, "^": _either,
    "<<": _shifted(lambda x, n: x << n), ">>": _shifted(lambda x, n: x >> n),
    "min": lambda a, b, _: Range(min(a.low, b.low), min(a.high, b.high)),
    "max": lambda a, b, _: Range(max(a.low, b.low), max(a.high, b.high)),
}  # fmt: skip
