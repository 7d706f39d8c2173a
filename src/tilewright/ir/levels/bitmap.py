"""A bit for each coordinate: whether something is stored there."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.ir.levels.level import Built, Level, Parents, Storage, Types
from tilewright.ir.nodes import Const, Expr, binary, cast, select
from tilewright.ir.rewrite import add, ceil_div, mul

WORD = 8  # coordinates of a word


@dataclass(frozen=True, slots=True, repr=False)
class Bitmap(Level):
    """Bit c % 8 of `bits[q, c // 8]` is set where c is stored. All coordinates have positions, or,
    `counted`, those stored: `before` counts them up to each word. Raises FormatError[F101]."""

    counted: bool = False
    padded: ClassVar[bool] = True
    outermost: ClassVar[bool] = True
    flags: ClassVar[tuple[str, ...]] = ("inner", "counted")

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
