"""What levels store: the coordinates of packed arrays, and values at positions that may miss."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.ir import nodes as ir
from tilewright.ir.levels.level import Arrays, Level, Storage
from tilewright.ir.rewrite import FOLD, is_const, walk


def coordinates(
    levels: Sequence[Level], arrays: Sequence[Arrays], counts: Sequence[int], shape: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The coordinates of everything one part stores (one array a dimension), and its positions:
    the loops over its levels, on arrays. Padding is left out; explicit zeros in blocks are not."""
    coords = [np.zeros(1, np.int64) for _ in shape]
    known: Arrays = {"q": np.zeros(1, np.int64)}  # of each point that the loops so far come to
    q, v, coordinate = (ir.Var(name, dtypes.int64) for name in ("q", "v", "c"))
    for level, own, count in zip(levels, arrays, counts, strict=True):
        size = ir.Const(level.extent_of(tuple(shape)), dtypes.int64)
        buffers = {name: ir.Buffer(name, dtypes.int64, ()) for name in own}
        storage = Storage(size, ir.Const(count, dtypes.int64), buffers, _above)
        begin, end = (_value(e, known, own) + 0 * known["q"] for e in level.loop(storage, q))
        length = np.maximum(end - begin, 0)
        point = np.repeat(np.arange(len(length)), length)
        known = {name: x[point] for name, x in known.items()}
        known["v"] = np.arange(len(point)) + (begin - np.cumsum(length) + length)[point]
        known["c"] = _value(level.coord(storage, q, v), known, own)
        if level.padded:
            kept = _value(level.guard(storage, q, v, coordinate), known, own)
            known, point = {name: x[kept] for name, x in known.items()}, point[kept]
        coords = [x[point] for x in coords]
        coords[level.dim] += known["c"] * (level.block if level.block and not level.inner else 1)
        known[_above(level.dim).name] = known["c"]
        known["q"] = _value(level.pos(storage, q, v), known, own)
    stored = np.ones(len(coords[0]), bool)
    for c, n in zip(coords, shape, strict=True):
        stored &= c < n
    return [c[stored] for c in coords], known["q"][stored]


def _above(dim: int) -> ir.Var:
    return ir.Var(f"above{dim}", dtypes.int64)


# The operations of two arrays, of those of the evaluator too.
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **FOLD, "/": operator.truediv, "min": np.minimum, "max": np.maximum, "&": operator.and_,
    "|": operator.or_, "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift,
}  # fmt: skip


def _value(e: Any, known: Arrays, own: Arrays) -> Any:
    """An expression of a level, in int64, on the arrays of its names and on those it stores."""
    if isinstance(e, ir.Const):
        return np.int64(e.value)
    if isinstance(e, ir.Var):
        return known[e.name]
    if isinstance(e, ir.Load):
        return own[e.buffer.name][_value(e.index[0], known, own)].astype(np.int64)
    if isinstance(e, ir.Cast):
        return _value(e.a, known, own)
    assert isinstance(e, ir.Binary), f"a level has {e} in a loop"
    return BINARY[e.op](_value(e.a, known, own), _value(e.b, known, own))


def row_major(coords: Sequence[np.ndarray], is_entry: np.ndarray) -> np.ndarray:
    """The order that sorts stored positions by their coordinates. Of several at one coordinate (the
    blocks of two parts may overlap) the one that holds an entry is kept, not the explicit zeros."""
    order = np.lexsort((~is_entry, *coords[::-1]))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for c in coords:
        new[1:] |= c[order][1:] != c[order][:-1]
    return order[new]


def or_fill(value: ir.Load, fill: float) -> ir.Expr:
    """An element of the values of a tensor, or `fill` where its position, the first index, is -1 (a
    missing coordinate)."""
    if not any(map(may_miss, value.index[:1])):
        return value
    kind = value.dtype.accumulator  # a narrow float is only stored, never chosen between
    missing = ir.cast(ir.Const(fill, dtypes.float64), kind)
    return ir.select(ir.binary(">=", value.index[0], 0), ir.cast(value, kind), missing)


def may_miss(position: Any) -> bool:
    """Whether a position may be -1, because it was searched for or its list lacks it."""
    return any(
        isinstance(x, ir.Search)
        or getattr(x, "optional", False)
        or (isinstance(x, ir.Select) and (is_const(x.a, -1) or is_const(x.b, -1)))
        for x in walk(position)
    )
