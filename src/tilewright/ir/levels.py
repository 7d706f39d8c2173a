"""Levels: how one coordinate of a tensor is stored below the positions of the level above.

A format is a list of levels; positions fold through them, from a single root position 0 to one
position for each stored value. A level answers four questions with IR expressions
(`loop`, `coord`, `pos`, `locate`) and builds its arrays from sorted entries (`build`). Everything
else about formats is derived from these: pack, unpack, loops, addresses, searches.

|            | loop over v        | coord            | pos           | locate c        |
|------------|--------------------|------------------|---------------|-----------------|
| Dense      | 0 : n              | v                | q*n + v       | q*n + c         |
| Ragged     | 0 : len(q)         | v                | ptr[q] + v    | ptr[q] + c      |
| Compressed | ptr[q] : ptr[q+1]  | idx[v]           | v             | binary search   |
| Fixed(w)   | 0 : w              | idx[q*w+v], -1=∅ | q*w + v       | scan            |
| Singleton  | one                | idx[q]           | q             | compare         |

A new level (affine, bitmap, N:M) is a new class here and a change nowhere else.
Reference: the level functions of taco (Chou et al., OOPSLA 2018, §3) and SparseTIR (ASPLOS 2023,
§3.1).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.errors import FormatError
from tilewright.ir.nodes import Buffer, Const, Expr, Load, Search, Var, binary, cast, select
from tilewright.ir.rewrite import add, mul

Arrays = dict[str, np.ndarray]
INT32_MAX = 2**31 - 1  # the IR counts blocks, widths and chunks in int32


def integer(of: str, name: str, value: Any, least: int = 0, most: int = INT32_MAX) -> int:
    """The argument `name` of the format or level `of` as an integer. Raises FormatError[F101]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise FormatError(
            "F101", f"{of}: {name} {value!r} is no whole number from {least} to {most}", where=name
        )
    return number


@dataclass(frozen=True, slots=True)
class Storage:
    """The IR side of one level of one tensor: its arrays as buffers, and its size.

    `size` is the extent of the coordinate; `count` the number of positions (known on the host).
    """

    size: Expr
    count: Expr
    indptr: Buffer | None = None
    indices: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """`dim` is the dimension of the tensor it stores: all of it, or, with `block` b, the quotient
    by b (`inner` False) or the remainder (`inner` True). Raises FormatError[F101]."""

    dim: int
    block: int = 0
    inner: bool = False

    arrays: ClassVar[tuple[str, ...]] = ()
    pads: ClassVar[bool] = False  # coord may be -1: nothing is stored there
    is_dense: ClassVar[bool] = False
    full: ClassVar[bool] = False  # every coordinate of its dimension is visited below a parent
    unique: ClassVar[bool] = True  # one position per coordinate below a parent
    is_list: ClassVar[bool] = False  # its coordinates ascend in `indices`: lists can be merged
    least: ClassVar[dict[str, int]] = {"dim": 0, "block": 0}  # of each whole number it is given

    def __post_init__(self) -> None:
        of = type(self).__name__.lower()
        for name, least in self.least.items():
            object.__setattr__(self, name, integer(of, name, getattr(self, name), least))
        if not isinstance(self.inner, bool) or (self.inner and not self.block):
            raise FormatError(
                "F101", f"{of}: inner {self.inner!r} with block {self.block}", where="inner",
                hint="True for the remainder by a block, else False",
            )  # fmt: skip

    def extent_of(self, shape: tuple[int, ...]) -> int:
        """How many values the coordinate of this level can take, for a tensor of `shape`."""
        if self.inner:
            return self.block
        n = shape[self.dim]
        return -(-n // self.block) if self.block else n

    def coordinate_of(self, coords: np.ndarray) -> np.ndarray:
        """The coordinate of this level from the coordinates of its dimension."""
        if not self.block:
            return coords
        return coords % self.block if self.inner else coords // self.block

    # IR
    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        raise NotImplementedError

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        raise NotImplementedError

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        raise NotImplementedError

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        """The position of coordinate c below q, or -1."""
        raise NotImplementedError

    # data
    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        """From the parent position and the coordinate of each entry (sorted): the arrays of the
        level, the position of each entry, and the number of positions."""
        raise NotImplementedError

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        """The parent and the coordinate of each position; coordinate -1 marks padding."""
        raise NotImplementedError

    def __str__(self) -> str:
        dim = f"d{self.dim}" + (
            f"%{self.block}" if self.inner else f"/{self.block}" if self.block else ""
        )
        return f"{type(self).__name__.lower()}({dim}{self._extra()})"

    __repr__ = __str__

    def _extra(self) -> str:
        return ""


def _segments(q: np.ndarray, parents: int) -> np.ndarray:
    """indptr from the (sorted) parent of each position."""
    out = np.zeros(parents + 1, np.int64)
    np.cumsum(np.bincount(q, minlength=parents), out=out[1:])
    return out


def _starts(q: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Which of the (sorted) entries are the first of their parent and coordinate."""
    new = np.ones(len(q), bool)
    np.logical_or(q[1:] != q[:-1], c[1:] != c[:-1], out=new[1:])
    return new


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Level):
    is_dense: ClassVar[bool] = True
    full: ClassVar[bool] = True

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return Const(0, dtypes.int32), s.size

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return v

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, s.size), v)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        return add(mul(q, s.size), c)

    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        return {}, q * extent + c, parents * extent

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(np.arange(parents), extent), np.tile(np.arange(extent), parents)


@dataclass(frozen=True, slots=True, repr=False)
class Ragged(Level):
    """Coordinates 0 … len(q)-1 below each parent, nothing in between left out."""

    arrays: ClassVar[tuple[str, ...]] = ("indptr",)

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        assert s.indptr
        return Const(0, dtypes.int32), binary("-", s.indptr[add(q, 1)], s.indptr[q])

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return v

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        assert s.indptr
        return add(s.indptr[q], v)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        assert s.indptr
        inside = binary("<", c, binary("-", s.indptr[add(q, 1)], s.indptr[q]))
        return select(inside, add(s.indptr[q], c), -1)

    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        length = np.zeros(parents, np.int64)
        np.maximum.at(length, q, c + 1)
        indptr = np.zeros(parents + 1, np.int64)
        np.cumsum(length, out=indptr[1:])
        return {"indptr": indptr}, indptr[q] + c, int(indptr[-1])

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        indptr = arrays["indptr"].astype(np.int64)
        q = np.repeat(np.arange(parents), np.diff(indptr))
        return q, np.arange(indptr[-1]) - indptr[q]


@dataclass(frozen=True, slots=True, repr=False)
class Compressed(Level):
    """Stored coordinates only, ascending. `chunk` n > 0 cuts a coordinate with more than n entries
    into several positions of the same coordinate; -1 gives each entry a position of its own."""

    chunk: int = 0
    arrays: ClassVar[tuple[str, ...]] = ("indptr", "indices")
    least: ClassVar[dict[str, int]] = {**Level.least, "chunk": -1}

    @property
    def unique(self) -> bool:  # type: ignore[override]
        return self.chunk == 0

    @property
    def is_list(self) -> bool:  # type: ignore[override]
        return self.unique and not self.block

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        if isinstance(q, Const):  # the root: its count is known on the host
            return Const(0, dtypes.int32), s.count
        assert s.indptr
        return s.indptr[q], s.indptr[add(q, 1)]

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        assert s.indices
        return s.indices[v]

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return v

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        assert s.indices
        lo, hi = self.loop(s, q)
        return Search(s.indices, lo, hi, c)

    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        new = _starts(q, c)
        if self.chunk == -1:
            new[:] = True
        elif self.chunk:
            starts = np.flatnonzero(new)
            rank = np.arange(len(q)) - np.repeat(starts, np.diff(np.append(starts, len(q))))
            new |= rank % self.chunk == 0
        first = np.flatnonzero(new)
        return (
            {"indptr": _segments(q[first], parents), "indices": c[first]},
            np.cumsum(new) - 1,
            len(first),
        )

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        indptr = arrays["indptr"].astype(np.int64)
        return np.repeat(np.arange(parents), np.diff(indptr)), arrays["indices"]

    def _extra(self) -> str:
        return f", chunk={self.chunk}" if self.chunk else ""


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Level):
    """Exactly `width` slots below each parent; unused slots have coordinate -1."""

    width: int = 0
    arrays: ClassVar[tuple[str, ...]] = ("indices",)
    least: ClassVar[dict[str, int]] = {**Level.least, "width": 0}
    pads: ClassVar[bool] = True

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return Const(0, dtypes.int32), Const(self.width, dtypes.int32)

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        assert s.indices
        return s.indices[self.pos(s, q, v)]

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, self.width), v)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        assert s.indices
        position: Expr = Const(-1, dtypes.int32)
        for slot in range(self.width):
            p = add(mul(q, self.width), slot)
            position = select(binary("==", s.indices[p], c), p, position)
        return position

    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        new = _starts(q, c)  # entries of one block share a slot
        mine, coords = q[new], c[new]
        ptr = _segments(mine, parents)
        rank = np.arange(len(mine)) - ptr[mine]
        if len(rank) and int(rank.max()) >= self.width:
            worst = int(mine[rank.argmax()])
            unit = "blocks" if self.block else "entries"
            raise FormatError(
                "F108",
                f"row {worst} has {int(ptr[worst + 1] - ptr[worst])} {unit} but the level holds "
                f"{self.width}", hint="use a wider ELL, or hyb, which chooses a width for each row",
            )  # fmt: skip
        position = mine * self.width + rank
        indices = np.full(parents * self.width, -1, np.int64)
        indices[position] = coords
        return {"indices": indices}, position[np.cumsum(new) - 1], parents * self.width

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(np.arange(parents), self.width), arrays["indices"]

    def _extra(self) -> str:
        return f", {self.width}"


@dataclass(frozen=True, slots=True, repr=False)
class Singleton(Level):
    """One coordinate for each parent position: the second array of COO."""

    arrays: ClassVar[tuple[str, ...]] = ("indices",)

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return q, add(q, 1)

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        assert s.indices
        return s.indices[q]

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return q

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        assert s.indices
        return select(binary("==", s.indices[q], c), q, -1)

    def build(
        self, q: np.ndarray, c: np.ndarray, parents: int, extent: int
    ) -> tuple[Arrays, np.ndarray, int]:
        indices = np.full(parents, -1, np.int64)
        indices[q] = c
        if len(q) != parents or len(np.unique(q)) != parents:
            raise FormatError(
                "F108", "a singleton level needs exactly one entry for each position above it",
                hint="put compressed(chunk=-1) above it, as coo does",
            )  # fmt: skip
        return {"indices": indices}, q, parents

    def expand(self, arrays: Arrays, parents: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(parents), arrays["indices"]


def is_list_of_pairs(levels: Sequence[Level]) -> bool:
    """Whether a format lists its entries in order, as coo does: two coordinates for each."""
    two = len(levels) == 2 and isinstance(levels[1], Singleton)
    return two and isinstance(levels[0], Compressed) and levels[0].chunk == -1


def locate_pair(outer: Storage, inner: Storage, a: Expr, b: Expr) -> Expr:
    """The position of the pair (a, b) in an ordered list of pairs, or -1: b between the ends of the
    run of a."""
    assert outer.indices and inner.indices
    zero, keys = Const(0, outer.count.dtype), outer.indices
    kind = outer.count.dtype
    begin = add(Search(keys, zero, outer.count, add(a, -1), True, kind), 1)
    end = add(Search(keys, zero, outer.count, a, True, kind), 1)
    return Search(inner.indices, begin, end, b, False, kind)


def lists_rows(level: Level) -> bool:
    """Whether a level, the outermost of a part, lists single rows, each once: a composed format
    that covers all rows lists the empty ones too."""
    listed = isinstance(level, Compressed) and level.dim == 0 and not level.block
    return listed and level.unique


def coordinates(
    levels: Sequence[Level], arrays: Sequence[Arrays], counts: Sequence[int], shape: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """The coordinates of everything one part stores (one array a dimension), and its positions.
    Padding is left out; explicit zeros inside dense levels are not."""
    parents, chain = 1, []
    for level, own, count in zip(levels, arrays, counts, strict=True):
        chain.append((level, *level.expand(own, parents, level.extent_of(tuple(shape)))))
        parents = count
    position = np.arange(parents)
    stored = np.ones(parents, bool)
    coords = [np.zeros(parents, np.int64) for _ in shape]
    for level, q, c in reversed(chain):
        here = c[position].astype(np.int64)
        stored &= here >= 0
        coords[level.dim] += here * (level.block if level.block and not level.inner else 1)
        position = q[position]
    for c, n in zip(coords, shape, strict=True):
        stored &= c < n
    return [c[stored] for c in coords], np.flatnonzero(stored)


def row_major(coords: Sequence[np.ndarray], is_entry: np.ndarray) -> np.ndarray:
    """The order that sorts stored positions by their coordinates. Of several at one coordinate (the
    blocks of two parts may overlap) the one that holds an entry is kept, not the explicit zeros."""
    order = np.lexsort((~is_entry, *coords[::-1]))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for c in coords:
        new[1:] |= c[order][1:] != c[order][:-1]
    return order[new]


def load_value(values: Buffer, position: Expr, fill: float, inner: tuple[Expr, ...] = ()) -> Expr:
    """`values[position, inner]`, or `fill` where the position is -1 (a missing coordinate)."""
    value = Load(values, (position, *inner), values.dtype)
    if isinstance(position, (Var, Const)) or not may_miss(position):
        return value
    kind = values.dtype.accumulator  # a narrow float is only stored, never chosen between
    return select(
        binary(">=", position, 0), cast(value, kind), cast(Const(fill, dtypes.float64), kind)
    )


def may_miss(position: Any) -> bool:
    """Whether a position may be -1, because it was searched for or its list lacks it."""
    from tilewright.ir.rewrite import walk

    return any(
        isinstance(x, Search) or getattr(x, "value", None) == -1 or getattr(x, "optional", False)
        for x in walk(position)
    )
