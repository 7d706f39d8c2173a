"""A float64 oracle of attention that shares no code with tilewright.attention, and random cases.

    python -m tests.attention.oracle --cases 20000 --seed 7

runs that many cases and prints each that fails, with the number that makes it again
(`--first N --cases 1`); 100 cases take about 15 s, most of it in the C++ compiler. `--device cuda`
runs them on a GPU, whose kernels of 16-bit products round more; `--fits decode hopper` draws, in
turns, batches that these families of kernels take (else most go to the portable one). Masks,
logits and changes of rows are written twice: as hooks of a variant, and as NumPy functions of
positions and heads. Whatever no query sees holds NaN or Inf, in K and in V.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from tests.attention.oracle_hooks import (
    LOGITS,
    MASKS,
    ROWS,
    SIGMOID,
    SINKS,
    Score,
    draw_row_values,
    draw_values,
)

import tilewright as tw

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
CASES_OF_A_KERNEL = 8  # cases that share a compiled kernel; all else differs
FITS = {  # rows of K and of V that a family of a GPU takes
    "decode": [(n, n) for n in (8, 16, 40, 64, 80, 96, 128, 192, 256)],
    "hopper": [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)],
}
DECODE_ROWS = 16  # queries × group of a request, at most, in the decode family


# ---------------------------------------------------------------------------- a case


@dataclass(frozen=True)
class Case:
    """One call. `k` and `v` are (pages, page_size, kv_heads, head_dim) with any strides; `form`
    says how the table is told (`table_of`), `positions` where keys and queries are, `shared` which
    requests share the first rows of the table, level by level."""

    number: str
    mask: str
    logits: str
    sink: str
    sm_scale: float | None
    values: dict[str, Any]
    q: np.ndarray
    qo_indptr: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_len: np.ndarray
    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    workers: int
    form: str
    positions: dict[str, np.ndarray]
    shared: tuple[np.ndarray, ...] = ()
    rows: str = ""
    softmax: bool = True
    narrow: bool = False  # rows that a hook has changed are rounded: of q to its dtype, and of k

    @property
    def heads(self) -> tuple[int, int]:
        return self.q.shape[1], self.k.shape[2]

    @property
    def dims(self) -> tuple[int, int]:
        """Elements of a row of K and of V."""
        return self.q.shape[2], self.v.shape[3]

    def __str__(self) -> str:
        lengths = [len(slots) for slots in slots_of(self)]
        return (
            f"case {self.number}: {self.mask}, {self.logits}, sink {self.sink!r}, "
            f"rows {self.rows!r}, softmax {self.softmax}, "
            f"{self.values}, q {self.q.shape} {self.q.dtype}, "
            f"k {self.k.shape} {self.k.dtype} strides {self.k.strides}, "
            f"qo {np.diff(self.qo_indptr).tolist()}, kv {lengths}, {self.form}, "
            f"{self.positions}, v {self.v.shape}, workers {self.workers}, "
            f"shared {[x.tolist() for x in self.shared]}, nodes {self.kv_len.tolist()}"
        )


def slots_of(case: Case) -> list[list[tuple[int, int]]]:
    """The page and the slot of each key of each request."""
    page_size, nodes, at = case.k.shape[1], [], 0
    for r in range(len(case.kv_len)):
        length, first = int(case.kv_len[r]), int(case.kv_indptr[r])
        pages = case.kv_indices[first : first + -(-length // page_size)].tolist()
        nodes.append([(page, slot) for page in pages for slot in range(page_size)][:length])
    requests = len(case.qo_indptr) - 1
    found: list[list[tuple[int, int]]] = [[] for _ in range(requests)]
    for indptr in (*case.shared, range(requests + 1)):
        for begin, end in itertools.pairwise(indptr):
            for request in range(begin, end):
                found[request] += nodes[at]
            at += 1
    return found


def variant(case: Case) -> Any:
    """One of MASKS, of LOGITS, of SINKS and of ROWS as a variant: hooks of one class, or
    composed."""
    logits = (LOGITS | SIGMOID)[case.logits]
    hooks = {"mask": MASKS[case.mask], "logits": logits, "sink": SINKS[case.sink]}
    members = [{name: h[0]} | h[2] for name, h in hooks.items() if h[0]]
    members += [ROWS[case.rows][0] | ROWS[case.rows][2]] * bool(case.rows)
    members = [*members, *[{"softmax": False}] * (not case.softmax)] or [{}]
    composed = len(members) > 1 and "mask" in members[0] and case.dims[0] % 2 == 0
    if not composed:
        members = [{name: x for part in members for name, x in part.items()}]
    found = []
    for own in members:
        scalars = {n: case.values[n] for n in own.keys() & case.values.keys()}
        scalars = {n: x for n, x in scalars.items() if not isinstance(x, np.ndarray)}
        found.append(tw.variant(type("Case", (), own))(**scalars))
    return functools.reduce(operator.or_, found)


def scores_of(case: Case, slots: list) -> Iterator[tuple[int, int, slice, Score, np.ndarray]]:
    """Request, head, rows of q, positions, and which scores count (qo_len, kv_len)."""
    qo_heads, kv_heads = case.heads
    for r, keys in enumerate(slots):
        rows = slice(int(case.qo_indptr[r]), int(case.qo_indptr[r + 1]))
        qo_len, kv_len = rows.stop - rows.start, len(keys)
        for head in range(qo_heads):
            at = {name: int(x[r]) for name, x in case.positions.items()}
            qo = at.get("qo_base", kv_len - qo_len) + np.arange(qo_len)[:, None]
            kv = at.get("kv_base", 0) + at.get("kv_stride", 1) * np.arange(kv_len)[None]
            kv_head = head // (qo_heads // kv_heads)
            token, key = np.arange(rows.start, rows.stop)[:, None], np.arange(kv_len)[None]
            score = Score(qo, kv, head, kv_head, r, case.values, token, key, kv_len - qo_len)
            seen = np.broadcast_to(MASKS[case.mask][1](score), (qo_len, kv_len))
            yield r, head, rows, score, seen


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray, float]:
    """o and lse in float64, and the size of the largest term of a score: what errors scale with;
    without a softmax times that of a sum of values."""
    slots = slots_of(case)
    shape = (*case.q.shape[:2], case.v.shape[3])
    o, lse, largest, most = np.zeros(shape), np.full(case.q.shape[:2], -np.inf), 1.0, 1.0
    k, v = case.k.astype(np.float64), case.v.astype(np.float64)
    queries = case.q.astype(np.float64)
    scale = 1 / np.sqrt(case.q.shape[2]) if case.sm_scale is None else case.sm_scale
    changed = {n: ROWS[case.rows][1].get(n, lambda x, t: x) for n in ("query", "key", "output")}
    for r, head, rows, score, seen in scores_of(case, slots):
        used = seen.any(0)
        sink = np.broadcast_to(SINKS[case.sink][1](score), (len(seen), 1))
        if not used.any() and not (sink > -np.inf).any():
            o[rows, head] = changed["output"](o[rows, head], score)
            continue
        pages, places = np.array(slots[r], int).reshape(-1, 2)[used].T
        keys, vals = (x[pages, places, score.kv_head] for x in (k, v))
        seen = seen[:, used]
        score = replace(score, kv=score.kv[:, used], key=score.key[:, used])
        q, keys = changed["query"](queries[rows, head], score), changed["key"](keys, score)
        if case.narrow:
            q, keys = (x.astype(case.q.dtype).astype(np.float64) for x in (q, keys))
        logits = (LOGITS | SIGMOID)[case.logits][1](q @ keys.T * scale, score)
        terms = np.abs(q) @ np.abs(keys.T) * abs(scale)
        for x in (terms[seen], np.abs(logits[seen])):
            largest = max(largest, x.max(initial=0))
        if not case.softmax:
            o[rows, head] = np.where(seen, logits, 0) @ vals
            o[rows, head] = changed["output"](o[rows, head], score)
            most = max(most, np.sqrt(seen @ vals**2).max(initial=0))
            continue
        logits = np.where(seen, logits, -np.inf)
        some = seen.any(1) | (sink[:, 0] > -np.inf)
        top = np.maximum(logits[some].max(1, keepdims=True, initial=-np.inf), sink[some])
        weights = np.exp(logits[some] - top)
        total = weights.sum(1, keepdims=True) + np.exp(sink[some] - top)
        at = np.flatnonzero(some) + rows.start
        o[at, head] = weights @ vals / total
        o[rows, head] = changed["output"](o[rows, head], score)
        lse[at, head] = (top + np.log(total))[:, 0]
    return o, lse, largest * most


# ---------------------------------------------------------------------------- drawing cases


def strided(
    rng: np.random.Generator, shape: tuple[int, ...], dims: tuple[int, int], dtype: Any,
    aligned: bool,
) -> list[np.ndarray]:  # fmt: skip
    """K and V (pages, slots, heads, dim) with rows of two sizes, in a random layout, all NaN.
    `aligned`: rows begin at multiples of 16 bytes and strides are positive, if dims allow it."""
    pages, slots, heads = shape
    dim = max(dims)
    if dims[0] != dims[1]:
        k, v = (np.full((*shape, n), np.nan, dtype) for n in dims)
        return [k, k[..., : dims[1]]] if dims[1] < dims[0] and rng.random() < 0.5 else [k, v]
    kind = rng.choice([0, 1, 4, 5]) if aligned else rng.integers(0, 6)
    shape = (*shape, dim)
    if kind == 0:  # heads before slots
        return [np.full((pages, heads, slots, dim), np.nan, dtype).swapaxes(1, 2) for _ in "kv"]
    if kind == 1:  # K and V of a page together
        both = np.full((pages, 2, slots, heads, dim), np.nan, dtype)
        return [both[:, 0], both[:, 1]]
    if kind == 2:  # padded
        wide = np.full((2, pages + 1, slots + 2, heads + 1, dim + 3), np.nan, dtype)
        return [x[1:, 1:-1, :heads, 1 : dim + 1] for x in wide]
    if kind == 3:  # negative strides
        both = np.full((2, pages, slots, heads, dim), np.nan, dtype)
        return [both[0][::-1, :, ::-1], both[1][:, ::-1]]
    if kind == 4:  # side by side
        both = np.full((pages, slots, heads, 2 * dim), np.nan, dtype)
        return [both[..., :dim], both[..., dim:]]
    return [np.full(shape, np.nan, dtype) for _ in "kv"]


def pages_of(
    rng: np.random.Generator, lengths: list[int], page_size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """CSR page lists of requests that may share the pages of a prefix, and the pages there are."""
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + 2
    free, lists = rng.permutation(total).tolist(), []
    for r, count in enumerate(counts):
        shared = lists[-1][: rng.integers(0, count + 1)] if r and rng.random() < 0.3 else []
        lists.append(shared[:count] + [free.pop() for _ in range(count - len(shared[:count]))])
    rubbish = rng.integers(-(2**31), 2**31, rng.integers(0, 4)).tolist()  # behind the last entry
    indices = np.array([p for pages in lists for p in pages] + rubbish, np.int32)
    return np.cumsum([0, *counts]).astype(np.int32), indices, total


FORMS = ("csr", "csr int64", "padded", "padded int64", "rows", "ragged", "dense")


def table_of(case: Case, to: Callable[[np.ndarray], Any] = lambda x: x) -> tw.Table:
    """The table of a case as its form tells it, of arrays converted by `to`; unused entries are
    random."""
    rng = np.random.default_rng(zlib.crc32(case.number.encode()))
    kind = np.int64 if case.form.endswith("int64") else np.int32
    kv_len, indptr = case.kv_len.astype(kind), case.kv_indptr.astype(kind)
    more: dict[str, Any] = {name: to(x) for name, x in case.positions.items()}
    more["shared"] = [to(x) for x in case.shared]
    if case.form.startswith("csr"):
        return tw.Table.csr(to(kv_len), to(indptr), to(case.kv_indices.astype(kind)), **more)
    if case.form == "ragged":
        return tw.Table.ragged(to(indptr), **more)
    if case.form == "dense":
        return tw.Table.dense(to(kv_len), **more)
    requests, counts = len(kv_len), np.diff(case.kv_indptr)
    rows = rng.permutation(requests + 3)[:requests] if case.form == "rows" else np.arange(requests)
    height, width = requests + 3 * (case.form == "rows"), int(counts.max(initial=0)) + 2
    wide = rng.integers(-(2**31), 2**31, (height, width + int(rng.integers(0, 4)))).astype(kind)
    block_table = wide[:, :width]
    for r, row in enumerate(rows):
        block_table[row, : counts[r]] = case.kv_indices[indptr[r] : indptr[r] + counts[r]]
    named = {"rows": to(rows.astype(kind))} if case.form == "rows" else {}
    return tw.Table(to(kv_len), to(block_table), **named, **more)


def draw_levels(rng: np.random.Generator, requests: int, depth: int) -> tuple[np.ndarray, ...]:
    """The indptr of each level of shared keys, the outermost first; some nodes are empty."""
    levels, finer = [], np.arange(requests + 1)
    for _ in range(depth):
        kept = finer[rng.random(len(finer)) < rng.choice([0.2, 0.6, 1.0])]
        twice = kept[: rng.integers(0, 2)]
        finer = np.sort(np.concatenate([[0], np.unique(kept), twice, [requests]]))
        finer = np.delete(finer, 1) if len(finer) > 2 and rng.random() < 0.5 else finer
        levels.append(finer.astype(np.int32))
    return tuple(levels[::-1])


def draw_positions(rng: np.random.Generator, lengths: list[int], kind: str) -> dict[str, Any]:
    """Positions of keys and queries: the usual ones, a base of the queries, or of both."""
    names = {"": (), "qo": ("qo_base",), "kv": ("qo_base", "kv_base", "kv_stride")}[kind]
    n = len(lengths)
    drawn = {
        "qo_base": np.array([rng.integers(-5, m + 9) for m in lengths], np.int32),
        "kv_base": rng.integers(-20, 90, n).astype(np.int32),
        "kv_stride": rng.integers(1, 4, n).astype(np.int32),
    }
    return {name: drawn[name] for name in names}


def draw(seed: int, number: int, fits: str = "") -> Case:
    """Case `number` of a seed; `fits`: a family of kernels for GPUs that should take it."""
    kernel = np.random.default_rng([seed, number // CASES_OF_A_KERNEL])
    rng = np.random.default_rng([seed, number, 1])
    n = number // CASES_OF_A_KERNEL
    mask, logits = list(MASKS)[n % len(MASKS)], list(LOGITS)[(n + n // len(MASKS)) % len(LOGITS)]
    sink = str(kernel.choice(["", "", *SINKS]))
    group, dim = int(kernel.integers(1, 17)), int(kernel.choice([1, 5, 16, 33, 64, 80, 128, 256]))
    dim_vo = int(kernel.choice([dim, dim, dim, 8, 48, 192]))
    q_type, kv_type = (DTYPES[kernel.integers(0, 3)] for _ in "qk")
    if fits:
        q_type = kv_type = DTYPES[1 + kernel.integers(0, 2)]
        dim, dim_vo = FITS[fits][kernel.integers(len(FITS[fits]))]
    requests, kv_heads = int(rng.integers(0, 5)), int(rng.integers(1, 4 if group < 6 else 2))
    page_size = int(rng.choice([1, 2, 7, 16, 64]))
    page_size += fits == "hopper" and page_size == 7  # a power of two
    depth = int(np.random.default_rng([seed, n, 2]).choice([0, 0, 1, 2, 3]))
    depth *= fits != "hopper"
    requests += 3 * (depth > 0)
    shared = draw_levels(rng, requests, depth)
    nodes = requests + sum(len(x) - 1 for x in shared)
    lengths = [int(rng.integers(0, rng.choice([6, 100, 500, 3001]))) for _ in range(nodes)]
    qo_lengths = [int(rng.integers(0, rng.choice([2, 8, 71]))) for _ in range(requests)]
    if rng.random() < 0.2 and fits != "hopper":
        qo_lengths = [1] * requests
    if fits == "decode":
        qo_lengths = [n % (DECODE_ROWS // group + 1) for n in qo_lengths]
    elif fits and requests:
        qo_lengths[0] += DECODE_ROWS // group + 1
    form = FORMS[(n + n // len(FORMS)) % len(FORMS)]
    if form == "ragged":
        page_size = 1
        kv_indptr = np.cumsum([0, *lengths]).astype(np.int32)
        kv_indices, pages = np.arange(sum(lengths), dtype=np.int32), sum(lengths) + 2
    elif form == "dense":
        page_size = max(lengths, default=0) + int(rng.integers(1, 9))
        kv_indices, pages = np.arange(nodes, dtype=np.int32), nodes + 1
        kv_indptr = np.arange(nodes + 1, dtype=np.int32)
    else:
        kv_indptr, kv_indices, pages = pages_of(rng, lengths, page_size)
    k, v = strided(rng, (pages, page_size, kv_heads), (dim, dim_vo), kv_type, bool(fits))
    qo_indptr = np.cumsum([0, *qo_lengths]).astype(np.int32)
    wide = rng.standard_normal((int(qo_indptr[-1]), group * kv_heads + 1, dim))
    q = (wide * rng.choice([1, 1, 8])).astype(q_type)[:, 1:]
    q = q[:, ::-1] if rng.random() < 0.3 else q
    columns = int(rng.choice([0, 1, 40, 3000]))
    values = draw_values(
        rng, MASKS[mask][2] | LOGITS[logits][2] | SINKS[sink][2], (group * kv_heads, kv_heads),
        (requests, int(qo_indptr[-1]), columns),
    )  # fmt: skip
    scale = [None, None, 0.0, -0.2, 1.0][rng.integers(0, 5)]
    scale = None if fits == "hopper" and scale in (0.0, -0.2) else scale
    workers = int(rng.integers(1, 133))
    case = Case(
        f"{seed}:{number}", mask, logits, sink, scale, values, q, qo_indptr,
        k, v, np.array(lengths, np.int32), kv_indptr, kv_indices, workers, form,
        {}, shared,
    )  # fmt: skip
    kinds = ["", "", "", "qo", "qo" if depth else "kv"]
    if fits != "hopper":
        case = with_rows(case, np.random.default_rng([seed, n, 3]), columns, fits)
    own = [len(x) for x in slots_of(case)]
    case = replace(case, positions=draw_positions(rng, own, str(kernel.choice(kinds))))
    fill(rng, case)
    return case


def with_rows(case: Case, kernel: np.random.Generator, columns: int, fits: str) -> Case:
    """A case, for about a half of the kernels with hooks of rows, or without a softmax."""
    own = [name for name in ROWS if name and not (case.shared and name == "scaled")]  # of a request
    if fits:
        own = ["gated"] if case.shared else ["gated", "ends"]
    rows = str(kernel.choice(["", "", "", "", *own]))
    softmax = bool(kernel.random() < 0.75) or bool(fits)
    logits = case.logits if softmax or kernel.random() < 0.5 else "sigmoid"
    sink = case.sink if softmax else ""
    names = ROWS[rows][2] | (SIGMOID[logits][2] if logits in SIGMOID else {})
    kept = MASKS[case.mask][2] | (LOGITS | SIGMOID)[logits][2] | SINKS[sink][2]
    sizes = len(case.qo_indptr) - 1, int(case.qo_indptr[-1]), columns
    rng = np.random.default_rng([zlib.crc32(case.number.encode()), 4])
    values = {n: x for n, x in case.values.items() if n in kept}
    values |= draw_row_values(rng, names, case.heads, sizes)
    return replace(case, rows=rows, softmax=softmax, logits=logits, sink=sink, values=values)


def fill(rng: np.random.Generator, case: Case) -> None:
    """Numbers where some query sees, NaN and Inf everywhere else."""
    seen_by_one = np.zeros(case.k.shape[:3], bool)
    slots = slots_of(case)
    for r, _, _, score, seen in scores_of(case, slots):
        if seen.any():
            pages, places = np.array(slots[r])[seen.any(0)].T
            seen_by_one[pages, places, score.kv_head] = True
    for array in (case.k, case.v):
        array[...] = rng.choice([np.nan, np.inf, -np.inf], array.shape).astype(array.dtype)
        numbers = rng.standard_normal((int(seen_by_one.sum()), array.shape[3]))
        array[seen_by_one] = numbers.astype(array.dtype)


# ---------------------------------------------------------------------------- running them


def attention_of(case: Case) -> tw.Attention:
    """The attention under test, with the case's scalars fixed."""
    return tw.Attention(*case.heads, case.dims[0], variant(case), case.sm_scale, case.dims[1])


def arrays_of(case: Case) -> dict[str, Any]:
    return {n: x for n, x in case.values.items() if isinstance(x, np.ndarray)}


def compare(
    case: Case, o: np.ndarray, lse: Any, relative: float = 6e-7, kind: str = "float32"
) -> None:
    """Raises AssertionError where a result is off by more than rounding explains: of o to `kind`,
    its dtype, and, where Q, K, V and o are bfloat16, of each softmax weight to bfloat16 (a mean of
    values with weights that are off by 2⁻⁹ each is off by at most 2⁻⁹ of the largest value)."""
    wanted, wanted_lse, largest = oracle(case)
    tolerance = relative * (4 + largest)
    rounding = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[kind]
    relative, absolute = tolerance + rounding, tolerance + rounding / 1000
    if kind == "float16":  # what is larger than a float16 is infinite (sums without a softmax)
        o, wanted = (np.clip(x, -65504, 65504) for x in (o, wanted))
    if kind == case.k.dtype.name == "bfloat16":
        values = np.abs(case.v.astype(np.float64))
        absolute += 2**-9 * values[np.isfinite(values)].max(initial=0)
    np.testing.assert_allclose(o, wanted, rtol=relative, atol=absolute, err_msg=str(case))
    if case.softmax:
        np.testing.assert_allclose(lse, wanted_lse, tolerance, tolerance, err_msg=str(case))
    else:
        assert lse is None


def check(case: Case) -> None:
    """Run a case on the CPU into poisoned memory; every fifth one by the reference too."""
    attn, arrays = attention_of(case), arrays_of(case)
    k, v = (x[:, 0] if case.form == "ragged" else x for x in (case.k, case.v))
    kv = tw.KV(table_of(case), tw.Pool(k, v))
    out = np.full((*case.q.shape[:2], case.v.shape[3]), np.nan, np.float32)
    q_dtype = case.q.dtype.name
    plan = attn.plan(case.qo_indptr, kv, q_dtype=q_dtype, workers=case.workers)
    state = attn.run(case.q, kv, plan, out=out, **arrays)
    compare(case, out, state.lse)
    if case.q.dtype.name == "bfloat16":
        narrow = attn.run(case.q, kv, plan, **arrays)
        compare(case, narrow.o.astype(np.float64), narrow.lse, kind="bfloat16")
    if (np.diff(case.qo_indptr) == 1).all():  # the same, as a step that is bound once
        most = kv.lengths() if kv.table.form.shared else kv.capacity()
        plan = attn.plan(case.qo_indptr, kv, q_dtype=q_dtype, lengths=most)
        bound = attn.bind(case.q, kv, plan=plan, **arrays)()
        assert bound.o.dtype == case.q.dtype
        compare(case, bound.o.astype(np.float64), bound.lse, kind=case.q.dtype.name)
    if int(case.number.split(":")[1]) % 5 == 0:
        from tilewright.attention import reference

        found = reference.attention(
            case.q, kv, case.qo_indptr, attn.variant, sm_scale=case.sm_scale, **arrays
        )
        compare(case, found.o, found.lse, 1e-13)


def on_gpu(x: np.ndarray) -> Any:
    """A torch tensor on the GPU with the strides of `x` (negative ones reversed)."""
    import torch

    kind = getattr(torch, x.dtype.name) if x.dtype.name != "uint32" else torch.int32
    bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[x.itemsize]
    flat = torch.from_numpy(np.array(x, order="C").view(bits)).view(kind)
    strides = [abs(n) // x.itemsize for n in x.strides]
    return torch.empty_strided(x.shape, strides, dtype=kind, device="cuda").copy_(flat)


def check_on_gpu(case: Case) -> str:
    """Run a case on a GPU and compare; returns the family that ran."""
    attn = attention_of(case)
    k, v = (x[:, 0] if case.form == "ragged" else x for x in (case.k, case.v))
    kv = tw.KV(table_of(case, on_gpu), tw.Pool(on_gpu(k), on_gpu(v)))
    q_dtype = case.q.dtype.name
    plan = attn.plan(case.qo_indptr, kv, q_dtype=q_dtype, workers=case.workers)
    arrays = {name: on_gpu(x) for name, x in arrays_of(case).items()}
    state = attn.run(on_gpu(case.q), kv, plan, **arrays)
    o = state.o.double().cpu().numpy()
    lse: Any = None if state.lse is None else state.lse.double().cpu().numpy()
    family = plan.family + " with narrow items" * (plan.narrow > 0)
    if family == "portable":
        compare(case, o, lse, relative=4e-6, kind=case.q.dtype.name)
        return family
    wanted, wanted_lse, largest = oracle(replace(case, narrow=True))
    values = np.abs(case.v.astype(np.float64))  # weights are rounded to the type of V
    most = values[np.isfinite(values)].max(initial=0) * (3 if case.rows else 1)  # hooks add three
    rounding = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[case.q.dtype.name]
    if not case.softmax:  # the error of sums of values is that of a row
        size, off = (np.linalg.norm(x, axis=-1) for x in (wanted, o - wanted))
        assert (off <= 1e-2 * size + 4e-6 * largest).all() and lse is None, case
        return family
    np.testing.assert_allclose(
        o, wanted, rtol=rounding, atol=most * (2**-8 + 4e-6 * largest), err_msg=str(case)
    )
    np.testing.assert_allclose(
        lse, wanted_lse, rtol=4e-6 * (4 + largest), atol=4e-3, err_msg=str(case)
    )
    return family


def main() -> int:
    """Run cases as the command line says; the number of failures decides the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fits", nargs="*", choices=FITS, default=[])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case after that")
    args = parser.parse_args()
    failed, families, number = 0, Counter[str](), args.first
    end = time.monotonic() + args.seconds
    while families.total() < args.cases and time.monotonic() < end:
        fits = args.fits or [""]
        case = draw(args.seed, number, fits[number // CASES_OF_A_KERNEL % len(fits)])
        number += 1
        try:
            if args.device == "cpu":
                check(case)
            families["cpu" if args.device == "cpu" else check_on_gpu(case)] += 1
        except Exception as error:
            failed += 1
            families["failed"] += 1
            print(f"{case}\n  {type(error).__name__}: {str(error).strip()[:600]}", flush=True)
    print(f"cases {args.first} to {number - 1}, {failed} failed; {dict(families)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
