"""Coordinates that follow from another coordinate: bands and diagonals, no list is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.errors import FormatError
from tilewright.ir.levels.level import Built, Level, Parents, Slots, Storage, Types, integer
from tilewright.ir.nodes import Expr, binary
from tilewright.ir.rewrite import add, mul

FARTHEST = 1 << 30  # diagonal: a coordinate plus an offset is an int32


@dataclass(frozen=True, slots=True, repr=False)
class Diagonals(Slots):
    """The coordinates below one of dimension `of` are that one plus each of the `offsets`.

    Raises FormatError[F101]."""

    of: int = 0
    offsets: Sequence[int] = ()
    arrays: ClassVar[Types] = {"offsets": None}
    exact: ClassVar[bool] = False
    padded: ClassVar[bool] = True
    least: ClassVar[dict[str, int]] = {**Level.least, "of": 0}

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

    def __post_init__(self) -> None:
        low = integer("band", "low", self.low, -FARTHEST)
        high = integer("band", "high", self.high, low, FARTHEST)
        object.__setattr__(self, "offsets", range(low, high + 1))
        Level.__post_init__(self)

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
