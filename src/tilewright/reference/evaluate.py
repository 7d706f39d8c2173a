"""The definition of the language: programs on coordinates, evaluated by NumPy broadcasting.

The tests compare every kernel with this evaluator. It also runs programs where no C++ compiler is
installed.

A `Scope` is a box of points with the coordinates of each index in scope, as arrays that broadcast
over the box. The value of an expression is such an array too: it has the rank of the box, and
length 1 along each dimension in which it does not vary. A reduction adds its axes to the box,
evaluates its body there and reduces those dimensions. A name refers to its innermost scope.

Rules:
* An index takes every coordinate of its dimension. A reduction over an axis of one sparse operand
  (whose coordinates are distinct plain indices) ranges over the *stored* coordinates of that
  operand, over all coordinates where several operands have its axes; its other axes take every
  coordinate. A coordinate that two parts of a format store counts once; padding does not count.
* A sparse tensor reads its `fill` where nothing is stored; a dense array reads 0 outside of its
  shape, and a store there does nothing. Every element of an output is written.
* Every result is defined: integers wrap, `//` and `%` by 0 give 0, and a shift beyond the width
  gives 0, or all bits the sign. float16 and bfloat16 are rounded where the program casts to them;
  arithmetic and sums are float32, of float64 float64. `exact` rounds nothing, all in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, InternalError
from tilewright.ir import core as ir
from tilewright.ir.levels.stored import BINARY
from tilewright.ir.names import parse_name

LIMIT_BYTES = 64 << 20  # of one array of intermediate values, where cutting the output can keep it


def evaluate(
    program: ir.Program, arrays: Mapping[str, Any], sizes: Mapping[str, int] | None = None, *,
    exact: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The outputs of a program at the coordinate level, by name.

    `arrays` holds the inputs: dense arrays; for sparse tensors anything with `shape` and
    `unpack() -> (coords, values)` in row-major order, or a dense array whose non-zeros are stored;
    numbers for scalars. A sparse output is its values (nnz,), in the order of `unpack`. Arguments
    that the program updates are copied first. Raises ArgumentError[A103] for sizes that differ.
    """
    known, data, stored = dict(program.sizes) | dict(sizes or {}), {}, {}
    for t in program.tensors:
        if t.name in arrays:
            x = arrays[t.name]
            values = _sparse_argument(t, x, stored) if t.is_sparse else np.asarray(x)
            for dim, n in zip(t.dims, np.shape(x), strict=True):
                if isinstance(dim, str) and known.setdefault(dim, n) != n:
                    raise ArgumentError("A103", f"{t.name} has {n} where {dim} is {known[dim]}")
            if exact and t.dtype.is_float:
                values = decode(values, t.dtype).astype(np.float64)
            data[t.name] = values.copy() if t.role == "output" else values
    run(program, data, stored, known, exact=exact)
    return {t.name: data[t.name] for t in program.outputs}


def run(
    program: ir.Program, data: dict[str, np.ndarray], stored: Mapping[str, "Stored"],
    sizes: Mapping[str, int], *, exact: bool = False,
) -> None:  # fmt: skip
    """Run every statement in order, in place. `data` holds the array of each tensor (of a sparse
    one the values of its stored coordinates); missing outputs and temporaries are allocated."""
    evaluator = _Evaluator(data, stored, sizes, program.index.numpy, exact)
    with np.errstate(all="ignore"):
        for statement in program.body:
            evaluator.assign(statement)


def _sparse_argument(t: ir.Tensor, x: Any, stored: dict[str, "Stored"]) -> np.ndarray:
    """The values of a sparse argument; its coordinates go to `stored`, under its structure."""
    if hasattr(x, "unpack"):
        coords, values = x.unpack()
    else:
        known = stored.get(t.structure)
        coords = known.coords if known else np.nonzero(x)
        values = np.asarray(x)[coords]
    if t.structure not in stored:
        stored[t.structure] = Stored(tuple(x.shape), tuple(c.astype(np.int64) for c in coords))
    return np.asarray(values)


def keys_of(shape: Sequence[int], coords: Sequence[Any]) -> np.ndarray:
    """Coordinates as single numbers, in row-major order."""
    key = np.zeros((), np.int64)
    for n, c in zip(shape, coords, strict=True):
        key = key * n + c
    return key


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The stored coordinates of a sparse structure, one int64 array a dimension: distinct, in
    row-major order."""

    shape: tuple[int, ...]
    coords: tuple[np.ndarray, ...]
    keys: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", keys_of(self.shape, self.coords))

    @property
    def count(self) -> int:
        return len(self.coords[0])

    def find(self, coords: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(index of the entry at each coordinate, whether it exists). At least one is stored."""
        inside = np.ones((), bool)
        for c, n in zip(coords, self.shape, strict=True):
            inside = inside & (c >= 0) & (c < n)
        wanted = keys_of(self.shape, [np.where(inside, c, 0).astype(np.int64) for c in coords])
        at = np.searchsorted(self.keys[:-1], wanted)  # the last one if no other
        return at, inside & (self.keys[at] == wanted)

    def below(self, bound: Mapping[int, np.ndarray], points: int) -> tuple[np.ndarray, np.ndarray]:
        """(point, entry) of all pairs in which an entry has the coordinates of a point. `bound`:
        these coordinates, (points,) by dimension; every entry where it is empty. Points ascend,
        then entries."""
        shape = [self.shape[d] for d in bound]
        keys = np.broadcast_to(keys_of(shape, [self.coords[d] for d in bound]), self.count)
        order = np.argsort(keys, kind="stable")
        wanted = np.broadcast_to(keys_of(shape, list(bound.values())), points)
        low, high = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
        point = np.repeat(np.arange(len(wanted)), high - low)
        rank = np.arange(len(point)) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
        return point, order[np.repeat(low, high - low) + rank]


Box = list[dict[str, np.ndarray]]
"""For each dimension of a box the indices that run along it, with their coordinates."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The rank of a box of points, and the coordinates of each index: arrays of that rank."""

    rank: int
    index: dict[str, np.ndarray]


def scope_of(box: Box, part: tuple[slice, ...]) -> Scope:
    index = {n: along(c[part[d]], d, len(box)) for d, g in enumerate(box) for n, c in g.items()}
    return Scope(len(box), index)


def along(values: np.ndarray, d: int, rank: int) -> np.ndarray:
    """Reshapes a 1-D array to the given rank: its values along dimension d, size 1 elsewhere."""
    return values.reshape((1,) * d + (-1,) + (1,) * (rank - d - 1))


@dataclass(frozen=True, slots=True)
class _Evaluator:
    data: dict[str, np.ndarray]
    stored: Mapping[str, Stored]
    sizes: Mapping[str, int]
    index: np.dtype  # of coordinates
    exact: bool

    def size(self, dim: str | int) -> int:
        return dim if isinstance(dim, int) else self.sizes[dim]

    def kind(self, dtype: DType) -> np.dtype:
        return computed(dtype, self.exact)

    # -- statements ------------------------------------------------------------------------------

    def assign(self, s: ir.Assign) -> None:
        """All values are computed before the first is stored: they may read what is updated."""
        t, box = s.out.tensor, self.box_of(s.out)
        if t.name not in self.data:
            self.data[t.name] = self.allocated(t)
        array = self.data[t.name]
        if isinstance(s.value, ir.Reduce) and s.value.op == "append":
            return self.append(s, s.value, box)
        full = tuple(slice(0, len(next(iter(along.values())))) for along in box)
        values = np.empty([x.stop for x in full], array.dtype)
        for part in pieces(full, LIMIT_BYTES // 8 // max(self.points_below(s.value), 1)):
            values[part] = encode(self.expr(s.value, scope_of(box, part)), t.dtype, array.dtype)
        if t.is_sparse or (not s.op and tuple(s.out.coords) == tuple(ir.indices_of(s.out))):
            array[...] = values
        else:
            at, inside = self.coordinates(s.out, scope_of(box, full))
            *at, inside, _ = np.broadcast_arrays(*at, inside, values)
            to = tuple(c[inside] for c in at)
            if s.op:  # coordinates may repeat
                UFUNCS[s.op].at(array, to, values[inside])
            else:
                array[to] = values[inside]

    def append(self, s: ir.Assign, e: ir.Reduce, box: Box) -> None:
        """Appends the value of each point of the box at which the condition holds."""
        assert isinstance(e.body, ir.Select)
        array, ends = self.data[s.out.tensor.name], [len(next(iter(d.values()))) for d in box]
        own = {a.name: np.arange(self.size(a.dim), dtype=self.index) for a in axes_of(e)}
        row = slice(0, self.size(axes_of(e)[0].dim))
        most = LIMIT_BYTES // 8 // max(self.points_below(e.body) * row.stop, 1)
        for part in pieces(tuple(slice(0, n) for n in ends), most):
            inside = scope_of([*box, own], (*part, row))
            shape = (*(x.stop - x.start for x in part), row.stop)
            kept = np.broadcast_to(self.expr(e.body.cond, inside), shape)
            values = np.broadcast_to(self.expr(e.body.a, inside), shape)[kept]
            start = np.broadcast_to(self.expr(s.out.coords[0], inside), shape)[kept]
            at = start + (np.cumsum(kept, axis=-1) - 1)[kept]
            valid = (at >= 0) & (at < len(array))
            array[at[valid]] = encode(values, s.out.dtype, array.dtype)[valid]

    def box_of(self, out: ir.Access) -> Box:
        """The box of an output: a dimension for each index; one for all stored coordinates."""
        inner, box = ir.indices_of(out), []
        if out.tensor.is_sparse:
            coords = self.stored[out.tensor.structure].coords
            pairs = zip(out.stored_coords, coords, strict=True)
            box = [{i.name: c.astype(self.index) for i, c in pairs if isinstance(i, ir.Index)}]
            inner = inner[len(coords) :]
        return box + [{i.name: np.arange(self.size(i.dim), dtype=self.index)} for i in inner]

    def allocated(self, t: ir.Tensor) -> np.ndarray:
        """An output or a temporary, NaN where it can be."""
        count = [self.size(d) for d in t.dims]
        if t.is_sparse:
            count[: len(t.dims) - t.inner] = [self.stored[t.structure].count]
        kind = np.dtype(np.float64) if self.exact and t.dtype.is_float else t.dtype.numpy
        return np.full(tuple(count), np.nan if kind.kind == "f" else 0, kind)

    def points_below(self, e: Any) -> int:
        """How many points the reductions of an expression add to each of the box, about."""
        most = max(map(self.points_below, ir.children(e)), default=1)
        if not isinstance(e, ir.Reduce):
            return most
        structure, names = self.driver(e) or ("", ())
        own = {a.name for a in e.axes}
        if structure:
            stored = self.stored[structure]
            outer = prod(n for n, name in zip(stored.shape, names, strict=True) if name not in own)
            most *= -(-stored.count // max(outer, 1))
        return most * prod(self.size(a.dim) for a in axes_of(e) if a.name not in names)

    def expr(self, e: Any, scope: Scope) -> np.ndarray:
        """The value of an expression at every point of the box of a scope."""
        if isinstance(e, ir.Const):
            return np.full((1,) * scope.rank, e.value, self.kind(e.dtype))
        if isinstance(e, ir.Index):
            return scope.index[e.name]
        if isinstance(e, ir.Var):  # a size: no program has other variables
            size = parse_name(e.name)
            assert size is not None, f"{e.name} is not bound"
            return np.full((1,) * scope.rank, self.sizes[size.owner], self.kind(e.dtype))
        if isinstance(e, ir.Access):
            return self.access(e, scope)
        if isinstance(e, ir.Stored):
            return self.exists(e.access, scope)
        if isinstance(e, ir.Reduce):
            return self.reduction(e, scope)
        return operation(e, self.exact)(*(self.expr(x, scope) for x in ir.children(e)))

    def exists(self, e: ir.Access, scope: Scope) -> np.ndarray:
        """Where an entry of a sparse tensor is stored."""
        if not self.stored[e.tensor.structure].count:
            return np.zeros((1,) * scope.rank, bool)
        return self.stored[e.tensor.structure].find([self.expr(c, scope) for c in e.stored_coords])[
            1
        ]

    def access(self, e: ir.Access, scope: Scope) -> np.ndarray:
        t, values = e.tensor, self.data[e.tensor.name]
        if not values.size:
            return np.full((1,) * scope.rank, t.fill if t.is_sparse else 0, self.kind(t.dtype))
        if t.is_sparse:
            coords = [self.expr(c, scope) for c in e.coords]
            own = len(e.stored_coords)
            entry, exists = self.stored[t.structure].find(coords[:own])
            numbers = self.number(values[(entry, *coords[own:])], t)
            return np.where(exists, numbers, self.kind(t.dtype).type(t.fill))
        at, inside = self.coordinates(e, scope)
        numbers = self.number(values[tuple(at)].reshape(inside.shape), t)
        return numbers if inside.all() else np.where(inside, numbers, numbers.dtype.type(0))

    def coordinates(self, e: ir.Access, scope: Scope) -> tuple[list[np.ndarray], np.ndarray]:
        """The coordinates of an access, those outside moved to the edge, and which are inside."""
        at, inside = [], np.ones((1,) * scope.rank, bool)
        for dim, c in zip(e.tensor.dims, e.coords, strict=True):
            value, n = self.expr(c, scope), self.size(dim)
            inside = inside & (value >= 0) & (value < n)
            at.append(np.clip(value.astype(np.int64), 0, max(n - 1, 0)))
        return at, inside

    def number(self, raw: np.ndarray, t: ir.Tensor) -> np.ndarray:
        return decode(raw, t.dtype).astype(self.kind(t.dtype), copy=False)

    def driver(self, e: ir.Reduce) -> tuple[str, tuple[str, ...]] | None:
        """The structure whose stored coordinates a reduction ranges over, and the names of its
        indices: that of the one sparse operand that has one of the axes."""
        found = ir.driving(e.body, frozenset(a.name for a in e.axes))
        return next(iter(found)) if len(found) == 1 else None

    def reduction(self, e: ir.Reduce, scope: Scope) -> np.ndarray:
        """A reduction at every point of the box of a scope, or over the stored coordinates that
        agree with the point in the indices bound outside."""
        driver = self.driver(e)
        if driver is None:
            return self.folded(e, scope, axes_of(e))
        (structure, names), own = driver, {a.name for a in e.axes}
        outer = {n: c for n, c in scope.index.items() if n in ir.free_vars(e.body) - own}
        shape = np.broadcast_shapes((1,) * scope.rank, *(c.shape for c in outer.values()))
        outer = {n: np.broadcast_to(c, shape).reshape(-1) for n, c in outer.items()}
        bound = {d: outer[name] for d, name in enumerate(names) if name not in own}
        stored = self.stored[structure]
        point, entry = stored.below(bound, prod(shape))
        index = {name: c[point] for name, c in outer.items()}
        index |= {n: c[entry].astype(self.index) for n, c in zip(names, stored.coords, strict=True)}
        rest = [a for a in axes_of(e) if a.name not in names]
        value = np.broadcast_to(self.folded(e, Scope(1, index), rest), point.shape)
        total = np.full(prod(shape), ir.identity_of(e.op, e.dtype).value, value.dtype)
        first = np.flatnonzero(np.diff(point, prepend=-1))  # of the entries of each point
        if len(first):
            total[point[first]] = UFUNCS[e.op].reduceat(value, first, dtype=value.dtype)
        return total.reshape(shape)

    def folded(self, e: ir.Reduce, scope: Scope, axes: Sequence[ir.Index]) -> np.ndarray:
        """`e.op` over all coordinates of `axes`."""
        if not axes:
            return self.expr(e.body, scope)
        rank, lengths = scope.rank, tuple(self.size(a.dim) for a in axes)
        total = rank + len(axes)
        index = {n: c.reshape(c.shape + (1,) * len(axes)) for n, c in scope.index.items()}
        for d, (a, n) in enumerate(zip(axes, lengths, strict=True), rank):
            index[a.name] = along(np.arange(n, dtype=self.index), d, total)
        value = self.expr(e.body, Scope(total, index))
        value = np.broadcast_to(value, value.shape[:rank] + lengths)
        start = ir.identity_of(e.op, e.dtype).value
        over = tuple(range(rank, total))
        return UFUNCS[e.op].reduce(value, axis=over, dtype=value.dtype, initial=start)


def axes_of(e: ir.Reduce) -> list[ir.Index]:
    """The axes of a reduction; on coordinates they are indices."""
    return [a for a in e.axes if isinstance(a, ir.Index)]


def pieces(box: tuple[slice, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """The box in parts of at most `most` points, cut along its longest dimension."""
    lengths = [x.stop - x.start for x in box]
    if prod(lengths) <= max(most, 1):
        yield box
        return
    d = lengths.index(max(lengths))
    half = box[d].start + lengths[d] // 2
    for part in (slice(box[d].start, half), slice(half, box[d].stop)):
        yield from pieces((*box[:d], part, *box[d + 1 :]), most)


# ---- operations on values

UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": np.negative, "not": np.logical_not, "exp": np.exp, "exp2": np.exp2, "log": np.log,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh, "sin": np.sin,
    "cos": np.cos, "abs": np.abs, "floor": np.floor,
}  # fmt: skip


def operation(e: Any, exact: bool = False) -> Callable[..., Any]:
    """The function of the values of an expression's operands that gives its value."""
    if isinstance(e, ir.Binary):
        return BINARY[e.op]
    if isinstance(e, ir.Unary):
        return UNARY[e.op]
    if isinstance(e, ir.Select):
        return np.where
    if isinstance(e, ir.Cast):
        return lambda x: cast(x, e.dtype, exact)
    raise InternalError("I101", f"{type(e).__name__} has no operation on values")


def computed(dtype: dtypes.DType, exact: bool = False) -> np.dtype:
    """The NumPy type in which values of a dtype are computed; `exact`: all floats in float64."""
    if dtype.is_float and (exact or dtype.name == "bfloat16"):
        return np.dtype(np.float64 if exact else np.float32)
    return dtype.numpy


def cast(x: Any, to: dtypes.DType, exact: bool = False) -> Any:
    """Values as another dtype has them."""
    if to.is_int and x.dtype.kind == "f":
        return to_integer(x, to)
    if to.name == "bfloat16" and not exact:
        return decode(encode(x, to, to.numpy), to)
    if to.name == "float16" and not exact:
        x = x.astype(np.float32)
    return x.astype(computed(to, exact), copy=False)


def to_integer(x: Any, to: dtypes.DType) -> Any:
    """Floats as integers: the fraction is cut off, what is out of range becomes the nearest
    integer of the type, NaN becomes 0."""
    truncated = np.trunc(x, dtype=np.float64)
    least, most = np.array(to.least, to.numpy), np.array(to.most, to.numpy)
    low, high = truncated <= float(to.least), truncated >= float(to.most + 1)
    inside = np.where(low | high | np.isnan(truncated), 0, truncated).astype(to.numpy)
    return np.where(low, least, np.where(high, most, inside))[()]


def decode(raw: Any, dtype: dtypes.DType) -> Any:
    """Values as an array holds them, as numbers: bits of bfloat16 become float32."""
    if dtype.name != "bfloat16":
        return raw
    return dtypes.bfloat16_values(raw) if raw.dtype == np.uint16 else raw.astype(np.float32)


def encode(values: Any, dtype: dtypes.DType, to: np.dtype) -> Any:
    """Numbers as an array in the storage type of `to`, rounded to nearest even."""
    if dtype.name == "bfloat16" and to == np.uint16:
        return dtypes.bfloat16_bits(values.astype(np.float32)).reshape(values.shape)
    return values.astype(to, copy=False)
