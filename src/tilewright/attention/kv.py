"""A KV cache: the page table of a batch over the pool of one layer."""

from dataclasses import dataclass

import numpy as np

from tilewright.attention.checks import check_range
from tilewright.attention.pool import Pool
from tilewright.attention.table import MAX_KEYS, Table
from tilewright.errors import ArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """Keys and values: `table` names the pages of `pool` that a request has. Its key t is slot
    t % page_size of its page t // page_size.

    Raises ArgumentError (A103, A105, A107); on a CPU A109 for a page that the pool does not have,
    for a length beyond a request's pages, and for a position beyond int32. Kernels clamp pages and
    lengths, on CPUs as on GPUs, and take a kv_stride below 1 as 1: what the arrays hold later, when
    they change in memory, may give wrong results, but nothing outside of the pool is read.
    """

    table: Table
    pool: Pool

    def __post_init__(self) -> None:
        table, pool = self.table, self.pool
        for name, value, kind in (("table", table, Table), ("pool", pool, Pool)):
            if not isinstance(value, kind):
                text = f"{type(value).__name__} is no {kind.__name__}"
                raise ArgumentError("A107", text, where=name)
        if table.device != pool.device:
            text = f"the table is on {table.device}, the pool on {pool.device}"
            raise ArgumentError("A105", text, where="table")
        if table.kind == "ragged" and pool.page_size != 1:
            text = f"a ragged table over pages of {pool.page_size}"
            hint = "rows without pages: k and v of shape (tokens, kv_heads, head_dim)"
            raise ArgumentError("A103", text, where="pool", hint=hint)
        if table.kind == "dense" and pool.pages < table.nodes:
            text = f"{table.nodes} requests, k has {pool.pages} of them"
            raise ArgumentError("A103", text, where="pool")
        if table.heads not in (0, pool.kv_heads):
            text = f"the table has pages for {table.heads} KV heads, the pool {pool.kv_heads} heads"
            raise ArgumentError("A103", text, where="block_table")
        if table.device == "cpu":
            self._check_contents()

    def _check_contents(self) -> None:
        table, pool = self.table, self.pool
        lengths, capacity = table.lengths(), self.capacity()
        if (lengths > capacity).any():
            r = int(np.argmax(lengths > capacity))
            text = f"request {r} has {lengths[r]} keys, its pages hold {capacity[r]}"
            hint = f"pages of {pool.page_size} keys; a request has at most {MAX_KEYS}"
            raise ArgumentError("A109", text, where="kv_len", hint=hint)
        if "kv_stride" in table.views:
            last = table.host("kv_base") + table.host("kv_stride") * (lengths - 1)
            check_range("kv_base, at the last key,", last[lengths > 0], -(2**31), 2**31 - 1)
        if table.kind == "ragged":
            ends = table.ranges()[0] + lengths
            check_range("kv_indptr, at the last row of a request,", ends, 0, pool.pages)
        elif table.kind != "dense":
            used = -(-lengths // pool.page_size)
            request = np.repeat(np.arange(table.nodes), used)
            entry = np.arange(len(request)) - np.repeat(np.cumsum(used) - used, used)
            name = "kv_indices" if table.kind == "csr" else "block_table"
            check_range(name, table.pages(request, entry), 0, pool.pages - 1)

    def lengths(self) -> np.ndarray:
        """Keys of each node (nodes,), int64, as the arrays now say, clamped as kernels clamp
        them (`pages_of` in table.h); copies from a device."""
        return np.minimum(self.table.lengths(), self.capacity())

    def capacity(self) -> np.ndarray:
        """Keys that the pages of each node can hold (nodes,), int64."""
        count = self.table.ranges()[1] * (self.pool.pages > 0)
        return np.minimum(count * self.pool.page_size, MAX_KEYS)

    def __repr__(self) -> str:
        return f"KV({self.table!r}, {self.pool!r})"
