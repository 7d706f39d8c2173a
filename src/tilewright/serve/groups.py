"""Which answers of a step read the prefix that they share together: a function of their pages."""

from collections.abc import Sequence
from typing import NamedTuple

JOIN_BYTES = 16 << 20
"""Bytes of K and V of a layer that an H200 reads while it joins a row in two parts: 1.4 to 2.6 µs,
5.6 TB/s (*Shared keys* of docs/design/decode-attention.md). 64 × (8192 + 256) save 33 MB a row and
pay; 16 × (2048 + 256) save 8 MB and do not."""


class Groups(NamedTuple):
    """`order`: the answer of each row. `nodes`: first row, the one behind the last, common pages of
    each group, then of rows that share nothing; none where each row reads alone. `rows`: that share
    what they read; `saved`: pages of a layer not read again."""

    order: Sequence[int]
    nodes: tuple[tuple[int, int, int], ...] = ()
    rows: int = 0
    saved: int = 0


def group(pages: Sequence[list[int]], full: Sequence[int], page_bytes: int) -> Groups:
    """Groups of answers whose lists of `pages` begin alike, with as many pages as pay.

    Of the pages of answer i the first `full[i]` are full; no others are shared. `page_bytes`: of K
    and V of a page in one layer. A group has to save more than it costs to join its rows, and all
    groups more than it costs to join the rows of the step, since a cascade joins each."""
    join, alike = JOIN_BYTES / page_bytes, dict[tuple[int, ...], list[int]]()
    for i, own in enumerate(pages):
        alike.setdefault(tuple(own[: int(join) + 1]) if full[i] > join else (-1 - i,), []).append(i)
    order, nodes, saved = list[int](), list[tuple[int, int, int]](), 0
    for rows in alike.values():
        common, first = min([full[i] for i in rows]), pages[rows[0]]
        for own in [pages[i] for i in rows]:
            if own[:common] != first[:common]:
                common = next(k for k in range(common) if own[k] != first[k])
        if (more := (len(rows) - 1) * common) > len(rows) * join:
            nodes.append((len(order), len(order) + len(rows), common))
            order, saved = order + rows, saved + more
    if saved <= len(pages) * join:
        return Groups(range(len(pages)))
    shared, rest = len(order), sorted({*range(len(pages))} - {*order})
    nodes += [(shared, len(pages), 0)] if rest else []
    return Groups(order + rest, tuple(nodes), shared, saved)
