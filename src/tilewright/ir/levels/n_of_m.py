"""N of each M coordinates are stored, with packed indices: 2:4 sparsity."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.errors import FormatError
from tilewright.ir.levels.level import Built, Level, Parents, Slots, Storage, Types, integer
from tilewright.ir.nodes import Expr, binary, cast
from tilewright.ir.rewrite import mul


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
            hint = "prune the matrix first, or store it as tw.csr()"
            raise FormatError("F108", rule, where="matrix", hint=hint)
        missing = self.width - stored.sum(1, keepdims=True)
        stored |= ~stored & (np.cumsum(~stored, 1) <= missing)
        position, each = q * self.width + np.cumsum(stored, 1)[q, c] - 1, 8 // self.bits
        index = np.zeros((-(-p.count * self.width // each), each), np.uint8)
        index.reshape(-1)[: p.count * self.width] = np.nonzero(stored)[1]
        shifts = self.bits * np.arange(each, dtype=np.uint8)
        metadata = np.bitwise_or.reduce(index << shifts, axis=1, dtype=np.uint8)
        return {"metadata": metadata}, position, p.count * self.width
