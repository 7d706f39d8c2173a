"""The meaning of the language: programs on coordinates, evaluated with NumPy.

This is what every kernel is compared with, and what runs where no C++ compiler is found.
An iteration space is a product of *groups*: a dense axis is a group, and so are all the stored
coordinates of a sparse tensor together. The value of an expression is an array with one dimension
for each group, of length 1 where it does not vary; sums of products become matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, InternalError
from tilewright.ir.names import given
from tilewright.ir.nodes import (
    Access,
    Assign,
    Binary,
    Cast,
    Const,
    Expr,
    Index,
    Program,
    Reduce,
    Select,
    Tensor,
    Unary,
    Var,
    children,
    identity_of,
)
from tilewright.ir.rewrite import conditioned, indices_of
from tilewright.runtime.spaces import (
    BINARY,
    UFUNCS,
    UNARY,
    Group,
    Space,
    Stored,
    contract,
    decode,
    encode,
    flattened,
    pieces,
    range_of,
    shape_of,
    single,
    slice_of,
)  # fmt: skip

CHUNK = 1 << 22  # elements of the largest array that is made at once


def evaluate(
    program: Program,
    arrays: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
    *,
    exact: bool = True,
) -> dict[str, np.ndarray]:
    """The outputs of a program at the coordinate level, by name.

    `arrays` holds the inputs: dense arrays; for sparse tensors anything with `shape` and
    `unpack() -> (coords, values)`, or a dense array whose non-zeros are stored; numbers for
    scalars. A sparse output comes as its values, (nnz,), in the order of `unpack`. `exact` computes
    floats in float64; otherwise each value has the program's own dtype. Parameters that the program
    updates are copied first. Outside of an array a read gives 0 and a store does nothing.
    """
    memory = Memory(program, dict(sizes or {}))
    written = {s.out.tensor.name for s in program.body}
    for t in program.tensors:
        if t.name in arrays:
            memory.take(t, arrays[t.name], copy=t.name in written, exact=exact)
    for t in program.tensors:
        if t.role in ("output", "temp") and t.name not in memory.data:
            memory.allocate(t, np.dtype(np.float64) if exact and t.dtype.is_float else None)
    run(program, memory, exact=exact)
    return {t.name: memory.data[t.name] for t in program.outputs}


class Memory:
    """The arrays of one evaluation: `data` by tensor (the values, if sparse), sizes, structures."""

    def __init__(self, program: Program, sizes: dict[str, int]) -> None:
        self.sizes = dict(program.sizes) | sizes
        self.data: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}

    def take(self, t: Tensor, x: Any, *, copy: bool, exact: bool) -> None:
        """One argument, and the sizes it tells."""
        if t.is_sparse:
            shape = tuple(x.shape)
            coords, values = self._entries(t, x)
            self.stored.setdefault(t.structure, Stored(shape, coords))
        else:
            values = np.asarray(x)
            shape = values.shape
        for dim, n in zip(t.dims, shape, strict=True):
            if isinstance(dim, str) and self.sizes.setdefault(dim, n) != n:
                raise ArgumentError("A103", f"{t.name} has {n} where {dim} is {self.sizes[dim]}")
        if copy:
            values = decode(values, t.dtype, exact=True) if exact else values.copy()
        self.data[t.name] = values

    def _entries(self, t: Tensor, x: Any) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        if hasattr(x, "unpack"):
            coords, values = x.unpack()
            return tuple(c.astype(np.int64) for c in coords), np.asarray(values)
        dense = np.asarray(x)
        known = self.stored.get(t.structure)
        coords = known.coords if known else np.nonzero(dense)
        return coords, dense[coords]

    def allocate(self, t: Tensor, dtype: np.dtype | None = None) -> None:
        """An output or a temporary, all NaN where it can be."""
        if t.is_sparse:
            shape: tuple[int, ...] = (len(self.stored[t.structure].coords[0]),)
        else:
            shape = tuple(self.size(d) for d in t.dims)
        kind = dtype or t.dtype.numpy
        self.data[t.name] = np.full(shape, np.nan if kind.kind == "f" else 0, kind)

    def size(self, dim: str | int) -> int:
        return dim if isinstance(dim, int) else self.sizes[dim]


def run(program: Program, memory: Memory, *, exact: bool) -> None:
    """Every statement of a program, in order, into the arrays of `memory`."""
    evaluator = _Evaluator(program, memory, exact)
    with np.errstate(all="ignore"):
        for statement in program.body:
            if statement.out.tensor.role != "inline":
                evaluator.assign(statement)


# ---------------------------------------------------------------------------- evaluation


class _Evaluator:
    def __init__(self, program: Program, memory: Memory, exact: bool) -> None:
        self.memory, self.exact = memory, exact
        self.inline = {
            s.out.tensor.name: s.value for s in program.body if s.out.tensor.role == "inline"
        }

    # -- statements ------------------------------------------------------------------------------

    def assign(self, s: Assign) -> None:
        """Everything is computed before anything is stored: the value may read what it updates."""
        t, memory = s.out.tensor, self.memory
        if t.is_sparse:
            names = tuple(c.name for c in s.out.coords if isinstance(c, Index))
            space = (self.entries(t.structure, names),)
        else:
            found = [x for c in s.out.coords for x in indices_of(c)]
            unique = {x.name: x for x in found}.values()
            space = tuple(Group.dense(x.name, memory.size(x.dim)) for x in unique)
        done, meaning = [], conditioned(s.value)
        for at, piece in pieces(space, CHUNK):
            value = np.broadcast_to(self.expr(meaning, piece, None), shape_of(piece))
            done.append((at, piece, encode(value, t.dtype, memory.data[t.name].dtype)))
        for at, piece, value in done:
            if t.is_sparse or (not s.op and all(isinstance(c, Index) for c in s.out.coords)):
                memory.data[t.name][at] = value
            else:  # what lies outside is not stored
                where, inside = self.coordinates(s.out, piece, None)
                inside, value, *where = np.broadcast_arrays(inside, value, *where)
                to = tuple(w[inside] for w in where)
                if s.op:  # coordinates may repeat
                    UFUNCS[s.op].at(memory.data[t.name], to, value[inside])
                else:
                    memory.data[t.name][to] = value[inside]

    def entries(self, structure: str, names: tuple[str, ...]) -> Group:
        """All stored coordinates of a structure as one group."""
        coords = self.memory.stored[structure].coords
        count = len(coords[0])
        index = dict(zip(names, coords, strict=True))
        return Group(count, index, entries=(structure, names, np.arange(count)))

    # -- expressions -----------------------------------------------------------------------------

    def expr(self, e: Any, space: Space, mask: np.ndarray | None) -> np.ndarray:
        """The value over the space. Where `mask` is false it is not needed, and may be anything."""
        if isinstance(e, Const):
            return np.full((1,) * len(space), e.value, self.kind(e.dtype))
        if isinstance(e, Index):
            return self.index(e.name, space)
        if isinstance(e, Var):
            size = given(e.name)
            assert size is not None, "the only variables of a program are sizes"
            return np.full((1,) * len(space), self.memory.sizes[size.owner])
        if isinstance(e, Access):
            return self.access(e, space, mask)
        if isinstance(e, Reduce):
            return self.reduction(e, space)
        if isinstance(e, Binary):
            return BINARY[e.op](self.expr(e.a, space, mask), self.expr(e.b, space, mask))
        if isinstance(e, Unary):
            return UNARY[e.op](self.expr(e.a, space, mask))
        if isinstance(e, Cast):
            return self.cast(self.expr(e.a, space, mask), e.dtype)
        if isinstance(e, Select):
            cond = self.expr(e.cond, space, mask).astype(bool)
            yes, no = (cond, ~cond) if mask is None else (mask & cond, mask & ~cond)
            return np.where(cond, self.expr(e.a, space, yes), self.expr(e.b, space, no))
        raise InternalError("I101", f"{type(e).__name__} has no place on coordinates")

    def kind(self, dtype: DType) -> np.dtype:
        """The NumPy type in which values of a dtype are computed."""
        if dtype.is_float:
            return np.dtype(np.float64 if self.exact else _COMPUTED.get(dtype.name, dtype.name))
        return dtype.numpy

    def cast(self, x: np.ndarray, to: DType) -> np.ndarray:
        if to.name == "bfloat16" and not self.exact:
            bits = dtypes.bfloat16_bits(x.astype(np.float32)).reshape(x.shape)
            return dtypes.bfloat16_values(bits)
        return x.astype(self.kind(to), copy=False)

    def index(self, name: str, space: Space) -> np.ndarray:
        for d, g in enumerate(space):
            if name in g.index:
                return g.index[name].reshape(single(len(space), d, g.length))
        raise InternalError("I101", f"index {name} is not bound")

    def access(self, e: Access, space: Space, mask: np.ndarray | None) -> np.ndarray:
        t = e.tensor
        if t.name in self.inline:
            return self.expr(self.inline[t.name], space, mask)
        raw = self.memory.data[t.name]
        if not t.is_sparse:
            return decode(self.read(e, raw, space, mask), t.dtype, exact=self.exact)
        names = tuple(c.name if isinstance(c, Index) else "" for c in e.coords)
        for d, g in enumerate(space):
            if g.entries is not None and g.entries[:2] == (t.structure, names):
                values = decode(raw[g.entries[2]], t.dtype, exact=self.exact)
                return values.reshape(single(len(space), d, g.length))
        return self.search(e, decode(raw, t.dtype, exact=self.exact), space)

    def search(self, e: Access, values: np.ndarray, space: Space) -> np.ndarray:
        """A sparse tensor at any coordinates: its fill where nothing is stored."""
        stored = self.memory.stored[e.tensor.structure]
        dims = range(len(stored.shape))
        coords = [self.expr(c, space, None) for c in e.coords]
        fill = np.array(e.tensor.fill, values.dtype)
        shape = np.broadcast_shapes(*(c.shape for c in coords))
        if not len(values):
            return np.full(shape, fill)
        keys = stored.keys(dims, stored.coords)
        wanted = np.broadcast_to(stored.keys(dims, coords), shape)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = keys[at] == wanted
        for c, n in zip(coords, stored.shape, strict=True):
            hit = hit & (c >= 0) & (c < n)
        return np.where(hit, values[at], fill)

    # -- dense reads -----------------------------------------------------------------------------

    def coordinates(
        self, e: Access, space: Space, mask: np.ndarray | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The coordinates of an access, those outside moved to the edge, and which were inside."""
        found, inside = [], np.ones((1,) * len(space), bool)
        for dim, c in zip(e.tensor.dims, e.coords, strict=True):
            at, n = self.expr(c, space, mask), self.memory.size(dim)
            inside = inside & (at >= 0) & (at < n)
            found.append(np.clip(at, 0, max(n - 1, 0)).astype(np.int64, copy=False))
        return found, inside

    def read(self, e: Access, raw: np.ndarray, space: Space, mask: Any) -> np.ndarray:
        """The raw values of a dense tensor, 0 outside of it. Whole ranges are sliced, other
        coordinates gathered."""
        if not e.coords:
            return raw.reshape((1,) * len(space))
        sliced: dict[int, int] = {}  # dimension of the tensor -> group
        for d, c in enumerate(e.coords):
            g = range_of(c, space)
            if g is not None and g not in sliced.values():
                sliced[d] = g
        part = raw[
            tuple(
                slice_of(space[sliced[d]]) if d in sliced else slice(None) for d in range(raw.ndim)
            )
        ]
        gathered = [d for d in range(raw.ndim) if d not in sliced]
        if any(raw.shape[d] == 0 for d in gathered):  # all of it is outside
            return np.zeros((1,) * len(space), raw.dtype)
        part = part.transpose(*gathered, *sliced)
        inside = np.True_
        rest = [g for g in range(len(space)) if g not in sliced.values()]
        if gathered:
            where, inside = self.coordinates(_only(e, gathered), space, mask)
            drop = tuple(sliced.values())
            if any(
                w.shape[g] != 1 for w in where for g in drop
            ):  # a computed coordinate varies too
                where, inside = self.coordinates(e, space, mask)
                return _inside(inside, raw[tuple(np.broadcast_arrays(*where))])
            shape = np.broadcast_shapes(*(w.shape for w in where))
            part = part[tuple(np.broadcast_to(w, shape).squeeze(drop) for w in where)]
        else:
            part = part.reshape((1,) * len(rest) + part.shape)
        order = np.argsort([*rest, *sliced.values()])
        return _inside(inside, part.transpose(order))

    # -- reductions ------------------------------------------------------------------------------

    def reduction(self, e: Reduce, space: Space) -> np.ndarray:
        """Computed once for each value of the indices it depends on, then spread over the space."""
        own = {a.name for a in e.axes}
        free = _free_indices(e.body, self.inline) - own
        groups: list[Group] = []
        spread: list[np.ndarray | None] = []
        shape = []
        for g in space:
            used = [n for n in g.index if n in free]
            shape.append(g.length if used else 1)
            if not used:
                continue
            if len(used) == len(g.index):
                groups.append(g)
                spread.append(None)
                continue
            points = np.stack([g.index[n] for n in used])
            distinct, inverse = np.unique(points, axis=1, return_inverse=True)
            groups.append(Group(distinct.shape[1], dict(zip(used, distinct, strict=True))))
            spread.append(inverse.reshape(-1))
        value = self.reduced(e, tuple(groups))
        for d, inverse in enumerate(spread):
            if inverse is not None:
                value = np.take(value, inverse, axis=d)
        return value.reshape(shape)

    def driver(self, e: Reduce) -> tuple[str, tuple[str, ...]] | None:
        """The structure a reduction follows, and its index names: that of the first sparse operand
        that has one of its axes."""
        own = {a.name for a in e.axes}
        for x in _operands(e.body):
            if x.tensor.is_sparse:
                names = tuple(c.name if isinstance(c, Index) else "" for c in x.coords)
                if "" not in names and len(set(names)) == len(names) and own & set(names):
                    return x.tensor.structure, names
        return None

    def reduced(self, e: Reduce, space: Space) -> np.ndarray:
        """The reduction at every point of a space: an array of the space's shape."""
        driver = self.driver(e)
        names = driver[1] if driver else ()
        dense = tuple(
            Group.dense(a.name, self.memory.size(a.dim))
            for a in e.axes
            if isinstance(a, Index) and a.name not in names
        )
        if driver is None:
            return self.fold(e, (*space, *dense), len(space))
        bound = {n for n in names if n not in {a.name for a in e.axes}}
        joined = [d for d, g in enumerate(space) if bound & g.index.keys()]
        others = [d for d in range(len(space)) if d not in joined]
        points = flattened(tuple(space[d] for d in joined))
        owner, group = self.join(points, driver, bound)
        rest = tuple(space[d] for d in others)
        shape = (points.length, *shape_of(rest))
        ufunc = UFUNCS[e.op]
        total = np.full(shape, identity_of(e.op, e.dtype).value, self.kind(e.dtype))
        step = max(1, CHUNK // max(prod(shape_of(rest)), 1))
        for a in range(0, group.length, step):
            b = min(a + step, group.length)
            value = self.fold(e, (group.cut(a, b), *rest, *dense), 1 + len(rest))
            mine = owner[a:b]
            first = np.flatnonzero(np.append(True, mine[1:] != mine[:-1]))
            at = mine[first]
            total[at] = ufunc(total[at], ufunc.reduceat(value, first, axis=0))
        total = total.reshape((*(space[d].length for d in joined), *shape_of(rest)))
        return total.transpose(np.argsort([*joined, *others]))

    def join(
        self, points: Group, driver: tuple[str, tuple[str, ...]], bound: set[str]
    ) -> tuple[np.ndarray, Group]:
        """The stored entries below each point: the point of each, and the group they form."""
        structure, names = driver
        stored = self.memory.stored[structure]
        dims = [d for d, n in enumerate(names) if n in bound]
        count = len(stored.coords[0])
        keys = np.broadcast_to(stored.keys(dims, (stored.coords[d] for d in dims)), count)
        order = np.argsort(keys, kind="stable")
        wanted = np.broadcast_to(
            stored.keys(dims, (points.index[names[d]] for d in dims)), points.length
        )
        low = np.searchsorted(keys[order], wanted, "left")
        length = np.searchsorted(keys[order], wanted, "right") - low
        owner = np.repeat(np.arange(points.length), length)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
        entry = order[rank + np.repeat(low, length)]
        index = {n: c[owner] for n, c in points.index.items()}
        index |= {n: stored.coords[d][entry] for d, n in enumerate(names)}
        return owner, Group(len(owner), index, entries=(structure, names, entry))

    def fold(self, e: Reduce, space: Space, keep: int) -> np.ndarray:
        """`e.op` over all groups from number `keep` on, in pieces that fit into memory."""
        if any(g.length == 0 for g in space):
            shape = shape_of(space[:keep])
            return np.full(shape, identity_of(e.op, e.dtype).value, self.kind(e.dtype))
        factors = _factors(e.body) if e.op == "sum" and e.dtype.is_float else [e.body]
        apart = len(factors) > 1
        needed = max(self.points(f, space) for f in factors) if apart else prod(shape_of(space))
        if needed > CHUNK:
            d = int(np.argmax(shape_of(space)))
            half = space[d].length // 2
            if half:
                both = [
                    self.fold(e, (*space[:d], space[d].cut(a, b), *space[d + 1 :]), keep)
                    for a, b in ((0, half), (half, space[d].length))
                ]
                return np.concatenate(both, axis=d) if d < keep else UFUNCS[e.op](*both)
        if apart:
            values = [self.cast(self.expr(f, space, None), e.dtype) for f in factors]
            return contract(values, shape_of(space), keep)
        value = np.broadcast_to(self.expr(e.body, space, None), shape_of(space))
        axes = tuple(range(keep, len(space)))
        return UFUNCS[e.op].reduce(value, axis=axes, dtype=self.kind(e.dtype)) if axes else value

    def points(self, e: Expr, space: Space) -> int:
        """At how many points of the space an expression has different values."""
        free = _free_indices(e, self.inline)
        return prod(g.length for g in space if free & g.index.keys())


_COMPUTED = {"bfloat16": "float32"}  # values of a dtype that NumPy has not


def _inside(inside: Any, values: np.ndarray) -> np.ndarray:
    return values if inside.all() else np.where(inside, values, values.dtype.type(0))


def _only(e: Access, dims: list[int]) -> Access:
    tensor = replace(e.tensor, dims=tuple(e.tensor.dims[d] for d in dims))
    return Access(tensor, tuple(e.coords[d] for d in dims), e.dtype)


def _operands(e: Any) -> Iterator[Access]:
    """Accesses in reading order, those of inner reductions left out."""
    if isinstance(e, Reduce):
        return
    if isinstance(e, Access):
        yield e
    for child in children(e):
        yield from _operands(child)


def _free_indices(e: Any, inline: Mapping[str, Expr]) -> set[str]:
    """Names of the indices that `e` reads and does not bind."""
    if isinstance(e, Index):
        return {e.name}
    found: set[str] = set()
    if isinstance(e, Access) and e.tensor.name in inline:
        return _free_indices(inline[e.tensor.name], inline)
    if isinstance(e, Reduce):
        return _free_indices(e.body, inline) - {a.name for a in e.axes}
    for child in children(e):
        found |= _free_indices(child, inline)
    return found


def _factors(e: Expr) -> list[Expr]:
    """What a product is made of; casts to a wider float change nothing."""
    if isinstance(e, Binary) and e.op == "*" and e.dtype.is_float:
        return [*_factors(e.a), *_factors(e.b)]
    if isinstance(e, Cast) and e.a.dtype.is_float and e.dtype.bits >= e.a.dtype.bits:
        inner = _factors(e.a)
        return inner if len(inner) > 1 else [e]
    return [e]
