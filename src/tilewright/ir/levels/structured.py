"""Levels of structured matrices: bands, diagonals, bitmaps, N:M sparsity, pages of a pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.errors import FormatError
from tilewright.ir.levels.level import Built, Level, Parents, Slots, Storage, Types, integer
from tilewright.ir.nodes import Const, Expr, binary, cast, select
from tilewright.ir.rewrite import add, ceil_div, mul

FARTHEST = 1 << 30  # diagonal: a coordinate plus an offset is an int32
WORD = 8  # coordinates of a word of a bitmap


@dataclass(frozen=True, slots=True, repr=False)
class Diagonals(Slots):
    """The coordinates below one of dimension `of` are that one plus each of the `offsets`.

    Raises FormatError[F101]."""

    of: int = 0
    offsets: Sequence[int] = ()
    arrays: ClassVar[Types] = {"offsets": None}
    exact: ClassVar[bool] = False
    padded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Level.__post_init__(self)
        known = sorted({integer("dia", "offset", o, -FARTHEST) for o in self.offsets})
        object.__setattr__(self, "offsets", tuple(known))
        object.__setattr__(self, "width", len(known))

    def misfit(self, above: Sequence[Level]) -> str:
        known = self.of != self.dim and any(x.dim == self.of for x in above)
        return "" if known else f"{self} needs a level of dimension {self.of} above it"

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(s.above(self.of), s["offsets"][v])

    def guard(self, s: Storage, q: Expr, v: Expr, c: Expr) -> Expr:
        return binary("&", binary(">=", c, 0), binary("<", c, s.size))

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        offsets, mine = np.array(self.offsets, np.int64), c - p.above[self.of]
        if (wrong := ~np.isin(mine, offsets)).any():
            rule = f"an entry is on diagonal {mine[wrong][0]}, which {self} does not store"
            raise FormatError("F108", rule, where="matrix", hint="a wider band, or tw.csr()")
        arrays, n = dict.fromkeys(self.arrays, offsets), len(offsets)
        return arrays, q * n + np.searchsorted(offsets, mine), p.count * n

    def _extra(self) -> str:
        return f" - d{self.of} in {', '.join(map(str, self.offsets))}"


@dataclass(frozen=True, slots=True, repr=False)
class Band(Diagonals):
    """All diagonals from `low` to `high`, included: loops are over the coordinates of the matrix.

    Raises FormatError[F101]."""

    low: int = 0
    high: int = 0
    arrays: ClassVar[Types] = {}
    padded: ClassVar[bool] = False
    least: ClassVar[dict[str, int]] = {"low": -FARTHEST, "high": -FARTHEST}

    def __post_init__(self) -> None:
        Level.__post_init__(self)
        high = integer("band", "high", self.high, self.low, FARTHEST)
        object.__setattr__(self, "offsets", range(self.low, high + 1))

    coord, locate = Level.coord, Level.locate

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        end = binary("min", add(s.above(self.of), self.high + 1), s.size)
        return binary("max", self._first(s), 0), end

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, len(self.offsets)), binary("-", v, self._first(s)))

    def _first(self, s: Storage) -> Expr:
        return binary("-", s.above(self.of), -self.low)

    def _extra(self) -> str:
        return f" - d{self.of} in {self.low}..{self.high}"


@dataclass(frozen=True, slots=True, repr=False)
class Bitmap(Level):
    """Bit c % 8 of `bits[q, c // 8]` is set where c is stored. All coordinates have positions, or,
    `counted`, those stored: `before` counts them up to each word. Raises FormatError[F101]."""

    counted: bool = False
    padded: ClassVar[bool] = True
    outermost: ClassVar[bool] = True

    @property
    def arrays(self) -> Types:  # type: ignore[override]
        return {"bits": dtypes.uint8, **({"before": None} if self.counted else {})}

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        if not self.counted:
            return Level.pos(self, s, q, v)
        word = self._word(s, q, v)
        below = binary("-", binary("<<", Const(1, dtypes.uint8), binary("%", v, WORD)), 1)
        return add(s["before"][word], _ones(binary("&", s["bits"][word], below), v.dtype))

    def guard(self, s: Storage, q: Expr, v: Expr, c: Expr) -> Expr:
        bit = binary(">>", s["bits"][self._word(s, q, v)], binary("%", v, WORD))
        return binary("!=", binary("&", bit, 1), 0)

    def locate(self, s: Storage, q: Expr, c: Expr) -> Expr:
        return select(self.guard(s, q, c, c), self.pos(s, q, c), -1)

    def _word(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, ceil_div(s.size, WORD)), binary("//", v, WORD))

    def positions(self, parents: int, extent: int) -> int:
        return parents * extent

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        stored = np.zeros((p.count, -(-p.extent // WORD) * WORD), bool)
        stored[q, c] = True
        bits = np.packbits(stored, axis=1, bitorder="little").reshape(-1)
        if not self.counted:
            return {"bits": bits}, q * p.extent + c, p.count * p.extent
        rank = np.cumsum(stored.reshape(-1)).reshape(stored.shape)  # counts itself too
        before = (rank - stored).reshape(-1)[::WORD]
        return {"bits": bits, "before": before}, rank[q, c] - 1, int(stored.sum())

    def _extra(self) -> str:
        return ", counted" if self.counted else ""


def _ones(word: Expr, kind: dtypes.DType) -> Expr:
    """How many bits of at most 14 are set. Each bit is kept in one of four copies of the word, as a
    digit of a number in base 16; modulo 15 that is the sum of its digits.

    Reference: S. E. Anderson, Bit Twiddling Hacks (counting bits with 64-bit instructions)."""
    wide = binary("*", cast(word, dtypes.uint64), Const(0x200040008001, dtypes.uint64))
    digits = binary("&", wide, Const(0x111111111111111, dtypes.uint64))
    return cast(binary("%", digits, Const(15, dtypes.uint64)), kind)


@dataclass(frozen=True, slots=True, repr=False)
class NofM(Slots):
    """The remainder by `block` m: `width` ascending coordinates below each parent, as indices of 1,
    2, 4 or 8 bits in `metadata`. A group with fewer entries stores explicit zeros at its first free
    coordinates, as sparse tensor cores want it. Raises FormatError[F101]."""

    arrays: ClassVar[Types] = {"metadata": dtypes.uint8}
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Level.__post_init__(self)
        integer("n_m", "m", self.block if self.inner else 0, 1, 256)
        integer("n_m", "n", self.width, 1, self.block)

    @property
    def bits(self) -> int:
        """Of an index."""
        return next(b for b in (1, 2, 4, 8) if self.block <= 1 << b)

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        p, each = self.pos(s, q, v), 8 // self.bits
        byte = cast(s["metadata"][binary("//", p, each)], p.dtype)
        shift = mul(binary("%", p, each), self.bits)
        return binary("&", binary(">>", byte, shift), (1 << self.bits) - 1)

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        stored = np.zeros((p.count, self.block), bool)
        stored[q, c] = True
        most = int(stored.sum(1).max(initial=0))
        if most > self.width:
            rule = f"{most} of {self.block} coordinates have entries, it holds {self.width}"
            raise FormatError("F108", rule, where="matrix", hint="prune it first, or tw.csr()")
        missing = self.width - stored.sum(1, keepdims=True)
        stored |= ~stored & (np.cumsum(~stored, 1) <= missing)
        position, each = q * self.width + np.cumsum(stored, 1)[q, c] - 1, 8 // self.bits
        index = np.zeros((-(-p.count * self.width // each), each), np.uint8)
        index.reshape(-1)[: p.count * self.width] = np.nonzero(stored)[1]
        shifts = self.bits * np.arange(each, dtype=np.uint8)
        metadata = np.bitwise_or.reduce(index << shifts, axis=1, dtype=np.uint8)
        return {"metadata": metadata}, position, p.count * self.width


@dataclass(frozen=True, slots=True, repr=False)
class Paged(Level):
    """Coordinates 0 … length[q]-1 below parent q: c is slot c % page of page
    `pages[indptr[q] + c // page]`. If it is `shared`, parents may have pages in common.

    Lengths beyond the pages of a parent, and pages that do not exist, are clamped: the arrays may
    change in memory between the runs of a kernel. Raises FormatError[F101]."""

    page: int = 1
    shared: bool = False  # type: ignore[misc]
    arrays: ClassVar[Types] = {"indptr": None, "pages": None, "length": None}
    exact: ClassVar[bool] = False
    least: ClassVar[dict[str, int]] = {"page": 1}

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        room = mul(binary("-", s["indptr"][add(q, 1)], s["indptr"][q]), self.page)
        return Const(0, dtypes.int32), binary("min", binary("min", s["length"][q], room), s.size)

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        page = s["pages"][add(s["indptr"][q], binary("//", v, self.page))]
        last = binary("-", binary("//", s.count, self.page), 1)
        page = binary("max", binary("min", page, last), 0)
        return add(mul(page, self.page), binary("%", v, self.page))

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        length = np.zeros(p.count, np.int64)
        np.maximum.at(length, q, c + 1)
        indptr = np.append(0, np.cumsum(-(-length // self.page)))
        arrays = {"indptr": indptr, "pages": np.arange(indptr[-1]), "length": length}
        return arrays, indptr[q] * self.page + c, int(indptr[-1]) * self.page

    def _extra(self) -> str:
        return f", page={self.page}{', shared' if self.shared else ''}"
