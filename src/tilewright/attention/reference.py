"""The oracle: attention as its definition says, in float64 NumPy, one request at a time."""

from typing import Any

import numpy as np

from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.tracing import NO_SINK, ROW, SAME_ROW
from tilewright.attention.variant import traced_of
from tilewright.ir.nodes import Const, Expr, Load, Var
from tilewright.ir.stmt import children
from tilewright.reference.evaluate import computed, operation
from tilewright.runtime.transfer import as_float64, to_host


@np.errstate(all="ignore")
def evaluate(e: Expr, positions: dict[str, Any], values: dict[str, Any]) -> Any:
    """An expression of a variant over arrays: float64 for floats. Integers are int32, wrap around,
    and give 0 when divided by 0, as in the kernels."""
    if isinstance(e, Const):
        return np.asarray(e.value, computed(e.dtype, exact=True))
    if isinstance(e, Var):
        return np.asarray(positions[e.name], computed(e.dtype, exact=True))
    if isinstance(e, Load):
        kept = np.asarray(values[e.buffer.name]).astype(computed(e.dtype, exact=True))
        index = [evaluate(i, positions, values) for i in e.index]
        if e.buffer == ROW:  # of many rows, of each the elements
            index = [np.arange(len(kept))[:, None], *index]
        return _element(kept[None] if kept.ndim < len(index) else kept, index)
    operands = (evaluate(x, positions, values) for x in children(e))
    return operation(e, exact=True)(*operands)


def _element(kept: np.ndarray, index: list[Any]) -> Any:
    """An element of a value of the variant, 0 outside it."""
    if not index:
        return kept.reshape(())
    inside = np.True_
    for i, n in zip(index, kept.shape, strict=True):
        inside = inside & (i >= 0) & (i < n)
    if not kept.size:
        return np.zeros(inside.shape, kept.dtype)
    return np.where(inside, kept[tuple(np.where(inside, i, 0) for i in index)], kept.dtype.type(0))


@np.errstate(invalid="ignore")  # NaN and Inf in keys that nobody sees
def attention(
    q: Any, kv: KV, qo_indptr: Any, variant: Any, *, sm_scale: float | None = None, **values: Any
) -> State:
    """output(softmax(logits(query(q)·key(k)·sm_scale) where mask)·v) for each query, in float64, on
    the host.

    `q` is (tokens, qo_heads, head_dim); request i has rows qo_indptr[i]:qo_indptr[i + 1], and its
    last query has position kv_len − 1, unless the table of `kv` has `qo_base`. `values` are those
    of `variant`. A query that sees no key has o = output(0), and lse = −inf or its sink. NaN and
    Inf in keys and values reach only queries that see them. Without a softmax lse is None. Slow: it
    computes the full score matrix.
    """
    traced = traced_of(variant)
    values = dict(variant.fixed) | {n: to_host(v) for n, v in values.items()}
    queries = as_float64(q)
    tokens, qo_heads, head_dim = queries.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    o, lse = np.zeros((tokens, qo_heads, kv.pool.head_dim_vo)), np.full((tokens, qo_heads), -np.inf)
    group = qo_heads // kv.pool.kv_heads
    indptr = np.asarray(to_host(qo_indptr)) if not isinstance(qo_indptr, list) else qo_indptr
    names = ("qo_base", "kv_base", "kv_stride")
    base_of = {n: kv.table.host(n) for n in names if n in kv.table.views}
    for request in range(kv.table.requests):
        rows = slice(int(indptr[request]), int(indptr[request + 1]))
        keys, vals = gather(kv, request)
        qo_len, kv_len = rows.stop - rows.start, len(keys)
        first, base, stride = (
            int(base_of[n][request]) if n in base_of else default
            for n, default in (("qo_base", kv_len - qo_len), ("kv_base", 0), ("kv_stride", 1))
        )
        stride = max(stride, 1)  # as kernels clamp it
        for head in range(qo_heads if qo_len else 0):
            positions = {
                "at.qo": first + np.arange(qo_len)[:, None], "at.qo_len": qo_len,
                "at.kv": base + stride * np.arange(kv_len)[None, :], "at.kv_len": kv_len,
                "at.qo_head": head, "at.kv_head": head // group, "at.request": request,
                "at.q_token": np.arange(rows.start, rows.stop)[:, None],
                "at.key": np.arange(kv_len)[None, :],
            }  # fmt: skip
            by_key = positions | {n: positions[n].T for n in ("at.kv", "at.key")}
            left = _changed(traced.query, queries[rows, head], positions, values)
            right = _changed(traced.key, keys[:, head // group], by_key, values)
            positions["s"] = left @ right.T * scale
            seen = np.broadcast_to(evaluate(traced.mask, positions, values), positions["s"].shape)
            scores = np.where(seen, evaluate(traced.logits, positions, values), -np.inf)
            top, sink = scores.max(1, keepdims=True, initial=-np.inf), -np.inf
            if traced.sink != NO_SINK:
                sink = np.broadcast_to(evaluate(traced.sink, positions, values), top.shape)
                top = np.maximum(top, sink)
            shift = np.where(top == -np.inf, 0.0, top)
            weights = np.exp(scores - shift)
            total = weights.sum(1) + np.exp(sink - shift)[:, 0]
            some = total > 0
            if traced.softmax is False:
                weights, total = np.where(seen, scores, 0.0), np.ones(qo_len)
            sums = _weighted(weights, vals[:, head // group], seen)
            means = sums / np.where(some, total, 1)[:, None]
            o[rows, head] = _changed(traced.output, means, positions, values)
            lse[rows, head] = np.where(some, top[:, 0] + np.log(np.where(some, total, 1)), -np.inf)
    return State(o, None if traced.softmax is False else lse)


def _changed(
    hook: Expr, rows: np.ndarray, positions: dict[str, Any], values: dict[str, Any]
) -> np.ndarray:
    """Rows (n, elements) as a hook of rows changes them; `positions` of rows are (n, 1)."""
    if hook == SAME_ROW:
        return rows
    positions = positions | {"at.dim": np.arange(rows.shape[1])[None]}
    return np.broadcast_to(evaluate(hook, positions, values | {ROW.name: rows}), rows.shape)


def _weighted(weights: np.ndarray, vals: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """weights @ vals, but 0 · NaN = 0 where a key is not seen."""
    finite = np.isfinite(vals).all(1)
    sums = weights[:, finite] @ vals[finite]
    for key in np.flatnonzero(~finite):
        sums[seen[:, key]] += weights[seen[:, key], key, None] * vals[key]
    return sums


def gather(kv: KV, request: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one request, (kv_len, kv_heads, head_dim) float64 each, copied.

    What is read of the arrays is clamped as the kernels clamp it: a page that does not exist is
    page 0."""
    lengths = kv.lengths()
    tree = kv.table.tree(lengths)
    path = np.flatnonzero((tree["begin"] <= request) & (request < tree["end"]))
    node = np.repeat(path, lengths[path])
    key = np.concatenate([np.arange(n) for n in lengths[path]])
    pages = kv.table.pages(node, key // kv.pool.page_size)
    pages = np.where((pages >= 0) & (pages < kv.pool.pages), pages, 0)
    parts = (kv.pool.index(part, pages, key % kv.pool.page_size) for part in (0, 1))
    keys, values = (as_float64(array, at) for array, at in parts)
    return keys, values
