"""Positions, pages and slots of a paged cache, computed from the lengths where these are."""

from functools import cache

from tilewright.build import Definition, named_recipe, program
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out, scalar, update, where


def positions_program(page_size: int) -> Definition:
    def positions(L=dense("t", "int32"), T=dense("t w", "int32"), B=dense("t", "int32")):
        t = indices("t:t")
        page = where(L[t] >= 0, T[t, L[t] // page_size], -1)
        rows = out[t](where(L[t] >= 0, L[t], 0)), out[t](page), out[t](L[t] % page_size)
        own, longer = out[t](L[t] + 1 - B[t]), where(L[t] >= 0, L[t] + 1, L[t])
        return *rows, own, update(L)[t](longer)  # last: the others read L

    return program(positions)


@named_recipe
def by_request(s: Schedule) -> Schedule:
    return s.bind("t", "cta.x") if s.target.is_cuda else s.parallel("t")


@program
def pages_before(L=dense("t", "int32"), page_size=scalar("int32")):
    t = indices("t:t")
    return out[t]((L[t] - 1) // page_size[()])


# Lengths L (t,), a page size → the pages in front of the last one, −1 where L is 0; int32 (t,).
pages_before_kernel = cache(pages_before.schedule(by_request).build)


@program
def pages(
    L=dense("t", "int32"), T=dense("t w", "int32"), page_size=scalar("int32"),
    first=scalar("int32"),
):  # fmt: skip
    t = indices("t:t")
    return out[t](where(L[t] >= 0, T[t, first[()] + L[t] // page_size[()]], -1))


# Lengths L (t,), page table T (t, w), a page size, the first entry of a row that counts → the page
# of the next token, int32 (t,): T[t, first + L / page_size], −1 where L is negative.
pages_kernel = cache(pages.schedule(by_request).build)


@cache
def positions_kernel(page_size: int, target: str = "cpp") -> Kernel:
    """Lengths L (t,), page table T (t, w) and shared keys B (t,), int32 → of the next token the
    position L, page and slot, the keys L + 1 - B that a request then has of its own, each int32
    (t,), and L + 1 in L. A row of a negative length, which fills a batch up, keeps it; its page is
    -1: what is appended there is not written."""
    return positions_program(page_size).schedule(by_request).build(target)
