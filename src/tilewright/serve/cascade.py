"""Cascades: answers with a common prefix read it once a step, by a table whose keys they share.

`group` says which answers do, a function of their pages. Rows of groups of answers, of the full
pages of their prefixes, lie in front of those of the answers in the page table, of which a cascade
takes the part behind the prefix: an answer has the same row, position and length in both forms of a
step.
"""

from collections.abc import Sequence
from operator import is_not
from typing import Any, NamedTuple

import numpy as np

from tilewright.attention.kv import KV
from tilewright.attention.plan import Plan
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.workspace import Workspace
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.models.llama import Llama
from tilewright.serve.scheduler import Chunk

LAUNCH_BYTES, JOIN_BYTES = 30 << 20, 3 << 18
"""Bytes of K and V of a layer that a step must save to pay for the launch over shared keys, and
those that a group must save a row: fitted to twelve batches on an H200 (*Shared keys* of
docs/design/decode-attention.md), of which it shares those that gain more than 5 %."""


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
    and V of a page in one layer. A group has to save more than its rows cost, and all groups more
    than the rows of the step and the launch, since a cascade joins each row. Groups have one level:
    of prefixes of several lengths, each twice the one before, those count that save most."""
    join, best = JOIN_BYTES / page_bytes, Groups(range(len(pages)))
    first, least = int(join) + 1, LAUNCH_BYTES / page_bytes + len(pages) * join
    while first <= max(full, default=0):
        found = _alike(pages, full, first, join)
        if found.saved > max(best.saved, least):
            best = found
        first *= 2
    return best


def _alike(pages: Sequence[list[int]], full: Sequence[int], first: int, join: float) -> Groups:
    """The groups of answers whose `first` pages are the same."""
    alike = dict[tuple[int, ...], list[int]]()
    for i, own in enumerate(pages):
        alike.setdefault(tuple(own[:first]) if full[i] >= first else (-1 - i,), []).append(i)
    order, nodes, saved = list[int](), list[tuple[int, int, int]](), 0
    for rows in alike.values():
        common, some = min([full[i] for i in rows]), pages[rows[0]]
        for own in [pages[i] for i in rows]:
            if own[:common] != some[:common]:
                common = next(k for k in range(common) if own[k] != some[k])
        if (more := (len(rows) - 1) * common) > len(rows) * join:
            nodes.append((len(order), len(order) + len(rows), common))
            order, saved = order + rows, saved + more
    shared, rest = len(order), sorted({*range(len(pages))} - {*order})
    nodes += [(shared, len(pages), 0)] if rest else []
    return Groups(order + rest, tuple(nodes), shared, saved)


class Cascade:
    """The page table of answers, `block_table` of a `shape`, and their groups.

    `base`, `own`: keys of a row in front of its own, and its own, int32. `is_on`: it `may`, there
    is a kernel of a GPU, and no layer has a window; a CPU, as in tests, records a step anew where
    groups change, since its plan holds them. `steps`: recorded ones by rows, and those that sample.
    `totals`: rows that shared reads, and the pages of a layer that were not read again."""

    def __init__(self, model: Llama, pools: list[Pool], shape: Any, may: bool) -> None:
        self.memory, self.pools, self.nodes = model.memory, pools, shape[0] // 2 + 1
        height, part = self.nodes + shape[0], self.memory.rows
        sizes = (height, *shape[1:]), height, self.nodes + 1, height, height + 1
        self.arrays = [self.memory.put(np.zeros(size, np.int32)) for size in sizes]
        rows = (part(self.arrays[i], self.nodes, height) for i in (0, 1, 3))
        self.block_table, self.base, self.own = rows
        self.attention = model.layers[0].attention
        reasons = dict(self.attention.resolve(self._views(0)[0]).families)
        self.is_on = may and not any(model.config.windowed) and reasons.get("decode") == ""
        self.steps: tuple[dict[int, Any], ...] = ({}, {})
        self.room, self.totals = None, np.zeros(2, np.int64)
        self.page_bytes = 2 * pools[0].k.strides[0] * pools[0].dtype.itemsize
        self.groups, self.held = Groups(()), list[list[int]]()

    def of(self, answers: Sequence[Chunk], rows: int) -> Groups:
        """The groups of the answers of a step of so many rows, made anew where these change."""
        held = [c.request.pages for c in answers]  # another list once a request is admitted again
        if len(held) != len(self.held) or any(map(is_not, held, self.held)):
            full = [c.start // PAGE_SIZE if self.is_on else 0 for c in answers]
            self.held, self.groups = held, group(held, full, self.page_bytes)
            if self.groups.nodes:
                self._write([answers[i] for i in self.groups.order], rows)
        return self.groups

    def _write(self, answers: list[Chunk], rows: int) -> None:
        """The groups of answers, in the order of their rows, to memory of the target. Rows that
        fill a step up share nothing."""
        nodes, (height, width) = self.nodes, self.arrays[0].shape
        pages, level = np.zeros((nodes, width)), np.full(nodes + 1, rows)
        base, lengths = (np.zeros(height, np.int64) for _ in range(2))
        for n, (begin, end, common) in enumerate(self.groups.nodes):
            level[n : n + 2] = begin, end if common else rows
            pages[n, :common] = answers[begin].request.pages[:common]
            lengths[n] = base[nodes + begin : nodes + end] = common * PAGE_SIZE
        rows_of = slice(nodes, nodes + len(answers))
        lengths[rows_of] = [c.start for c in answers] - base[rows_of]
        indptr = np.arange(height + 1) * width + np.append(base // PAGE_SIZE, 0)
        arrays = self.memory.rows(self.arrays[0], 0, nodes), *self.arrays[1:]
        for array, values in zip(arrays, (pages, base, level, lengths, indptr), strict=True):
            self.memory.write(array, values)
        if not self.memory.on_cuda:
            self.steps = {}, {}

    def _views(self, rows: int) -> list[KV]:
        pages, _, level, lengths, indptr = self.arrays
        end, part = self.nodes + rows, self.memory.rows
        parts = part(lengths, 0, end), part(indptr, 0, end + 1), pages.reshape(-1)
        table = Table.csr(*parts, shared=[level])
        return [KV(table, pool) for pool in self.pools]

    def bind(self, rows: int) -> tuple[list[KV], Plan | Workspace, list[Any]]:
        """Of a cascaded step of so many rows: the KV of each layer, the plan, and on a GPU the
        launch in the step that plans, from the groups where they are."""
        views = self._views(rows)
        if not self.memory.on_cuda:
            return views, self.attention.plan(np.arange(rows + 1), views[0]), []
        self.room = self.room or self.attention.reserve(self.own.shape[0], shared=1)
        return views, self.room, [self.room.bind(views[0].table)]
