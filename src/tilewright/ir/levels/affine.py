"""Coordinates that follow from another coordinate: bands and diagonals, no list is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.errors import FormatError
from tilewright.ir.levels.level import (
    INT32_MAX,
    Built,
    Level,
    Parents,
    Slots,
    Storage,
    Types,
    integer,
)  # fmt: skip
from tilewright.ir.nodes import Expr, binary
from tilewright.ir.rewrite import add, mul


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
        known = {integer("dia", "offset", o, -INT32_MAX) for o in self.offsets}
        object.__setattr__(self, "offsets", tuple(sorted(known)))

    @property
    def slots(self) -> int:
        return len(self.offsets)

    def misfit(self, above: Sequence[Level]) -> str:
        known = self.of != self.dim and any(x.dim == self.of for x in above)
        return "" if known else f"{self} needs a level of dimension {self.of} above it"

    def coord(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(s.above(self.of), s["offsets"][v])

    def guard(self, s: Storage, q: Expr, v: Expr, c: Expr) -> Expr:
        return binary("&", binary(">=", c, 0), binary("<", c, s.size))

    def build(self, q: np.ndarray, c: np.ndarray, p: Parents) -> Built:
        offsets, mine = np.array(self.offsets, np.int64), c - p.above[self.of]
        if not np.isin(mine, offsets).all():
            at = int(np.isin(mine, offsets).argmin())
            raise FormatError(
                "F108", f"entry ({p.above[self.of][at]}, {c[at]}) is on diagonal {mine[at]}, which "
                f"{self} does not store", where="matrix", hint="a wider band, or tw.csr()",
            )  # fmt: skip
        arrays = dict.fromkeys(self.arrays, offsets)
        return arrays, q * self.slots + np.searchsorted(offsets, mine), p.count * self.slots

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
        low = integer("band", "low", self.low, -INT32_MAX)
        high = integer("band", "high", self.high, low)
        object.__setattr__(self, "offsets", range(low, high + 1))
        Level.__post_init__(self)

    coord, locate = Level.coord, Level.locate

    def loop(self, s: Storage, q: Expr) -> tuple[Expr, Expr]:
        end = binary("min", add(s.above(self.of), self.high + 1), s.size)
        return binary("max", self._first(s), 0), end

    def pos(self, s: Storage, q: Expr, v: Expr) -> Expr:
        return add(mul(q, self.slots), binary("-", v, self._first(s)))

    def _first(self, s: Storage) -> Expr:
        return binary("-", s.above(self.of), -self.low)

    def _extra(self) -> str:
        return f" - d{self.of} in {self.low}..{self.high}"
