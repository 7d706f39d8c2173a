"""The levels of CSR, COO, ELL and BSR: all coordinates, or lists of those that are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.errors import FormatError
from tilewright.ir.levels.level import Arrays, Built, Level, Parents, Slots, Storage, Types
from tilewright.ir.nodes import Const, Expr, Search, binary, select
from tilewright.ir.rewrite import add

__all__ = [
    "Compressed", "Dense", "Fixed", "Ragged", "Singleton", "is_list_of_pairs", "lists_rows",
    "locate_pair",
]  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Dense(Level):
    is_dense: ClassVar[bool] = True
    full: ClassVar[bool] = True
    outermost: ClassVar[bool] = True

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        return self.pos(s, q, c)

    def positions(self, parents: int, extent: int) -> int:
        return parents * extent

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        return {}, q * p.extent + c, p.count * p.extent


@dataclass(frozen=True, slots=True, repr=False)
class Ragged(Level):
    """Coordinates 0 … len(q)-1 below each parent, nothing in between left out."""

    arrays: ClassVar[Types] = {"indptr": None}
    exact: ClassVar[bool] = False

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return Const(0, dtypes.int32), binary("-", s["indptr"][add(q, 1)], s["indptr"][q])

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(s["indptr"][q], v)

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        indptr = np.zeros(p.count + 1, np.int64)
        np.maximum.at(indptr, q + 1, c + 1)
        indptr = np.cumsum(indptr)
        return {"indptr": indptr}, indptr[q] + c, int(indptr[-1])


@dataclass(frozen=True, slots=True, repr=False)
class Compressed(Level):
    """Stored coordinates only, ascending. `chunk` n > 0 cuts a coordinate with more than n entries,
    or blocks, into several positions of the same coordinate; -1 gives each entry its own."""

    chunk: int = 0
    arrays: ClassVar[Types] = {"indptr": None, "indices": None}
    keys: ClassVar[str] = "indices"
    outermost: ClassVar[bool] = True
    least: ClassVar[dict[str, int]] = {"chunk": -1}

    @property
    def unique(self) -> bool:  # type: ignore[override]
        return self.chunk == 0

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        if isinstance(q, Const):  # the root: its count is known on the host
            return Const(0, dtypes.int32), s.count
        return s["indptr"][q], s["indptr"][add(q, 1)]

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return v

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        lo, hi = self.loop(s, q)
        return Search(s["indices"], lo, hi, c)

    def parent(self, s: Storage, parents: Expr, v: Expr) -> Expr:
        """The parent of position `v`; the level has `parents` of them."""
        kind = s.count.dtype
        return Search(s["indptr"], Const(0, kind), add(parents, 1), v, True, kind)

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        new = starts(q, c)
        if self.chunk == -1:
            new[:] = True
        elif self.chunk:
            count = np.cumsum(p.units) - 1  # blocks or entries before each entry
            begun = np.repeat(count[new], np.diff(np.append(np.flatnonzero(new), len(q))))
            new |= p.units & ((count - begun) % self.chunk == 0)
        first = np.flatnonzero(new)
        arrays = {"indptr": segments(q[first], p.count), "indices": c[first]}
        return arrays, np.cumsum(new) - 1, len(first)

    def with_roots(self, built: Arrays, q: np.ndarray, roots: np.ndarray) -> Built:
        """What `build` gave for an outermost level, with all of `roots` stored, those without
        entries too."""
        indices = built["indices"]
        empty = np.setdiff1d(roots, indices)
        indices = np.insert(indices, np.searchsorted(indices, empty), empty)
        q = q + np.searchsorted(empty, built["indices"])[q]
        return {"indptr": np.array([0, len(indices)]), "indices": indices}, q, len(indices)

    def _extra(self) -> str:
        return f", chunk={self.chunk}" if self.chunk else ""


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Slots):
    """Exactly `width` slots below each parent; unused slots have coordinate -1."""

    arrays: ClassVar[Types] = {"indices": None}
    keys: ClassVar[str] = "indices"
    padded: ClassVar[bool] = True

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        new = starts(q, c)  # entries of one block share a slot
        mine, coords = q[new], c[new]
        ptr = segments(mine, p.count)
        rank = np.arange(len(mine)) - ptr[mine]
        if len(rank) and int(rank.max()) >= self.width:
            worst = int(mine[rank.argmax()])
            count = f"{int(ptr[worst + 1] - ptr[worst])} {'blocks' if self.block else 'entries'}"
            raise FormatError("F108", f"row {worst} has {count} but the level holds {self.width}")
        position = mine * self.width + rank
        indices = np.full(p.count * self.width, -1, np.int64)
        indices[position] = coords
        return {"indices": indices}, position[np.cumsum(new) - 1], p.count * self.width


@dataclass(frozen=True, slots=True, repr=False)
class Singleton(Level):
    """One coordinate for each parent position: the second array of COO."""

    arrays: ClassVar[Types] = {"indices": None}
    keys: ClassVar[str] = "indices"
    single: ClassVar[bool] = True

    def misfit(self, above: Sequence[Level]) -> str:
        fits = isinstance(above[-1], Compressed) and above[-1].chunk == -1
        return "" if fits else "a singleton level needs compressed(chunk=-1) above it"

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        return q, add(q, 1)

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return q

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        return select(binary("==", s["indices"][q], c), q, -1)

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        indices = np.full(p.count, -1, np.int64)
        indices[q] = c
        if len(q) != p.count or len(np.unique(q)) != p.count:
            rule = "a singleton level needs exactly one entry for each position above it"
            raise FormatError("F108", rule, hint="put compressed(chunk=-1) above it, as coo does")
        return {"indices": indices}, q, p.count


def segments(q: np.ndarray, parents: int) -> np.ndarray:
    """indptr from the (sorted) parent of each position."""
    out = np.zeros(parents + 1, np.int64)
    np.cumsum(np.bincount(q, minlength=parents), out=out[1:])
    return out


def starts(q: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Which of the (sorted) entries are the first of their parent and coordinate."""
    new = np.ones(len(q), bool)
    np.logical_or(q[1:] != q[:-1], c[1:] != c[:-1], out=new[1:])
    return new


def is_list_of_pairs(levels: Sequence[Level]) -> bool:
    """Whether a format lists its entries in order, as coo does: two coordinates for each."""
    two = len(levels) == 2 and isinstance(levels[1], Singleton)
    return two and isinstance(levels[0], Compressed) and levels[0].chunk == -1


def locate_pair(outer: Storage, inner: Storage, a: Expr, b: Expr) -> Expr:
    """The position of the pair (a, b) in an ordered list of pairs, or -1: b between the ends of the
    run of a."""
    kind, keys = outer.count.dtype, outer["indices"]
    zero = Const(0, kind)
    begin = add(Search(keys, zero, outer.count, add(a, -1), True, kind), 1)
    end = add(Search(keys, zero, outer.count, a, True, kind), 1)
    return Search(inner["indices"], begin, end, b, False, kind)


def lists_rows(level: Level) -> bool:
    """Whether a level, the outermost of a part, lists rows or blocks of rows, each once: a composed
    format that covers all rows lists the empty ones too."""
    return isinstance(level, Compressed) and level.dim == 0 and level.unique
