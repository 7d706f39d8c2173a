"""Random batches for the tests of attention: KV caches with poison wherever nothing may be read."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from tests.attention.twin import Bounds, Interval

import tilewright.attention.variant as variants
from tilewright import dtypes
from tilewright.attention import bounds
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec
from tilewright.attention.table import Table, TableForm
from tilewright.ir.nodes import binary, equal
from tilewright.runtime.view import view
from tilewright.sparse.trace import maximum, scalar, tanh, where

TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@variants.variant
class SoftcapAlibi:
    soft_cap = scalar("float32", 30.0)
    slopes = variants.per_head("float32")

    def logits(self, s, at):
        capped = self.soft_cap * tanh(s / self.soft_cap)
        return capped + self.slopes[at.qo_head] * (at.kv - at.qo)

    def mask(self, at):
        return at.kv <= at.qo


@variants.variant
class Strange:
    """What the built-in ones do not use: floor division, remainders, KV heads, requests."""

    stride = scalar("int32", 7)
    sinks = variants.per_head("int32")

    def logits(self, s, at):
        near = (at.kv - at.qo) // 3 % 5
        return where(equal(at.request % 2, 0), maximum(s, -1.0), s * 0.5) + near * 0.1

    def mask(self, at):
        first = at.kv < self.sinks[at.kv_head]
        return (first | binary("!=", (at.qo - at.kv) % self.stride, 3)) & (at.kv <= at.qo + 2)


def spec_of(
    group: int, head_dim: int, q: str, kv: str, variant: Any, o: str = "", **form: Any
) -> Spec:
    """The spec of a kernel; `form`: of its table (default: CSR of int32)."""
    q_type, kv_type, o_type = (dtypes.ALL[n] for n in (q, kv, o or q))
    named: dict[str, Any] = {"table_indptr": "int32"} | form
    table = TableForm(**named)
    return Spec(group, head_dim, head_dim, q_type, kv_type, o_type, variant.traced, table)


def csr(k: Any, v: Any, kv_indptr: Any, kv_indices: Any, kv_len: Any) -> KV:
    """A cache of pages (pages, page_size, kv_heads, head_dim) with a CSR table."""
    return KV(Table.csr(kv_len, kv_indptr, kv_indices), Pool(k, v))


def bind(attn: Any, q: Any, kv: KV, **more: Any) -> Any:
    """A bound run of one query for each request, cut for the most keys that its pages can hold."""
    rows, kind = np.arange(kv.table.requests + 1), view(q).dtype
    plan = attn.plan(rows, kv, q_dtype=kind, lengths=kv.capacity())
    return attn.bind(q, kv, plan=plan, **more)


def lengths_of(k: np.ndarray, kv_indptr: np.ndarray, last: Any) -> np.ndarray:
    """Keys of requests from those of their last pages."""
    counts = np.diff(kv_indptr)
    return np.where(counts > 0, (counts - 1) * k.shape[1] + last, 0).astype(np.int32)


def arrays_of(kv: KV) -> tuple[Any, ...]:
    """k, v, kv_len, kv_indptr, kv_indices of a cache from `csr`."""
    names = ("kv_len", "table_indptr", "table_entries")
    return (*kv.pool.arrays, *(kv.table.arrays[n] for n in names))


def paged(
    rng: np.random.Generator,
    lengths: list[int],
    shape: tuple[int, int, int],
    dtype: Any = np.float32,
) -> KV:
    """A cache of (page_size, kv_heads, head_dim), pages in disorder, NaN where no key is."""
    page_size, kv_heads, head_dim = shape
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + 2
    k = np.full((total, page_size, kv_heads, head_dim), np.nan, np.float32)
    v = k.copy()
    names = rng.permutation(total)[: sum(counts)].astype(np.int32)
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    for r, n in enumerate(lengths):
        for i in range(n):
            page = names[indptr[r] + i // page_size]
            k[page, i % page_size] = rng.standard_normal((kv_heads, head_dim))
            v[page, i % page_size] = rng.standard_normal((kv_heads, head_dim))
    return csr(k.astype(dtype), v.astype(dtype), indptr, names, np.array(lengths, np.int32))


def queries(
    rng: np.random.Generator, lengths: list[int], heads: int, head_dim: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """q (tokens, heads, head_dim) and qo_indptr."""
    indptr = np.cumsum([0, *lengths]).astype(np.int32)
    return rng.standard_normal((int(indptr[-1]), heads, head_dim)).astype(dtype), indptr


def values_of(
    rng: np.random.Generator, variant: Any, qo_heads: int, kv_heads: int
) -> dict[str, Any]:
    """Random per-head values for a variant."""
    found = {}
    for v in variant.traced.values:
        if v.by:
            n = qo_heads if v.by == "qo_head" else kv_heads
            drawn = rng.integers(0, 9, n) if v.dtype.is_int else rng.uniform(0, 0.3, n)
            found[v.name] = drawn.astype(v.dtype.numpy)
    return found


ALL_VARIANTS = {
    "causal": variants.Causal(),
    "full": variants.Full(),
    "softcap": variants.Softcap(soft_cap=5.0),
    "window": variants.SlidingWindow(window=19),
    "alibi": variants.Alibi(),
    "softcap_alibi": SoftcapAlibi(soft_cap=8.0),
    "strange": Strange(stride=5),
}


EMPTY, PARTIAL, FULL = 0, 1, 2  # the classes of tiles of kernels/bounds.h


def tile_class(mask: Any, positions: dict[str, Interval], values: dict[str, int]) -> int:
    """The class of a tile by the bounds of its mask over NumPy arrays."""
    seen = bounds.bound(mask, Bounds(positions, values))
    return EMPTY if seen.hi == 0 else FULL if seen.lo == 1 else PARTIAL
