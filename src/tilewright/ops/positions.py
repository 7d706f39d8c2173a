"""The rows of a decode step, computed where the lengths are: position, page and slot of each
request's last token, and the lengths of the next step."""

from __future__ import annotations

from functools import cache

from tilewright.build import Definition, named_recipe, program
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out, update, where


def positions_program(page_size: int) -> Definition:
    """The program of `positions_kernel`."""

    def positions(L=dense("t", "int32"), T=dense("t w", "int32")):
        t = indices("t:t")
        last = L[t] - 1
        page = where(L[t] > 0, T[t, last // page_size], -1)
        return out[t](last), out[t](page), out[t](last % page_size)

    return program(positions)


@program
def lengthen(L=dense("t", "int32")):
    t = indices("t:t")
    return update(L)[t](where(L[t] > 0, L[t] + 1, 0))


@named_recipe
def by_request(s: Schedule) -> Schedule:
    return s.bind("t", "cta.x") if s.target.is_cuda else s.parallel("t")


@cache
def positions_kernel(page_size: int, target: str = "cpp") -> Kernel:
    """Lengths L (t,) and page table T (t, w), int32 → position L − 1, its page and its slot, each
    int32 (t,). The page of a row of length 0 is -1: what is appended there is not written."""
    return positions_program(page_size).schedule(by_request).build(target)


# Adds 1 to lengths (t,), int32, in place, where they are not 0.
lengthen_kernel = cache(lengthen.schedule(by_request).build)
