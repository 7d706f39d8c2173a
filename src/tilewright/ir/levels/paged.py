"""Coordinates in pages of a pool, which a page table names: a KV cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright import dtypes
from tilewright.ir.levels.level import Built, Level, Parents, Storage, Types
from tilewright.ir.nodes import Const, Expr, binary
from tilewright.ir.rewrite import add, mul


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
    least: ClassVar[dict[str, int]] = {**Level.least, "page": 1}
    flags: ClassVar[tuple[str, ...]] = ("inner", "shared")

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
