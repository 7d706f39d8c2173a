"""Selection: pages against an oracle in float64, attention over them with NaN in all others."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
from tests.attention.cases import TYPES
from tests.attention.test_decode_cuda import close
from tests.compiler import cta
from tests.compiler.cases import executed
from tests.shipped import lesson

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import reference, select, spec
from tilewright.attention.merge import State
from tilewright.errors import ArgumentError, ProgramError
from tilewright.target import target
from tilewright.toolchain import compilers, nvrtc

programs = lesson("08_select.py")


@tw.variant
class KeysTurned:
    def key(self, k, at):
        return tw.where(at.kv > 3, -k[at.dim], k[at.dim])


@tw.select
def quest_apart(
    q=tw.dense("r h g d"), low=tw.sparse("r p h d"), high=tw.sparse("r p h d", like="low")
):
    """The scores of Quest from two arrays, without products that tiles could compute."""
    r, h, p, g, d = tw.indices("r h p g d")
    x = q[r, h, g, d]
    most = tw.sum(tw.maximum(x * low[r, p, h, d], x * high[r, p, h, d]), over=d)
    return tw.out.typed("float32")[r, h, p](tw.max(most, over=g))


programs.quest_apart = quest_apart
HEADS, GROUP, DIM, PAGE = 2, 2, 16, 16  # as in test_table.py: one kernel for both
LENGTHS = (16 * 9 - 3, 0, 16, 17, 1, 16 * 12, 5 * 16)
WIDTH = 13
pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


class Batch:
    """Requests with summaries of their pages, whole numbers so that scores are exact and some are
    equal, and NaN in whatever no program may read."""

    def __init__(self, rng: np.random.Generator, lengths=LENGTHS, page: int = PAGE) -> None:
        self.page, self.lengths = page, np.array(lengths, np.int32)
        self.counts = -(-self.lengths // page)
        total = len(lengths) * WIDTH + 3
        self.table = np.full((len(lengths), WIDTH), 2**31 - 1, np.int32)
        names = rng.permutation(total)
        for r, count in enumerate(self.counts):
            self.table[r, :count], names = names[:count], names[count:]
        whole = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)  # noqa: E731
        n = len(lengths)
        self.q = rng.standard_normal((n, HEADS * GROUP, DIM)).astype(np.float32)
        self.keys, self.values = rng.standard_normal((2, total, page, HEADS, DIM)).astype(
            np.float32
        )
        summary = whole(4, total, HEADS, DIM)
        summary[:, self._without_score()] = np.nan
        self.grouped = whole(n, HEADS, GROUP, DIM)
        self.low, self.high = np.minimum(*summary[:2]), np.maximum(*summary[:2])
        self.mean = summary[2] + summary[3] / 32  # exact in bfloat16, and hardly any are equal
        self.small, self.w = whole(n, 3, 8), np.abs(whole(n, 3))
        self.index = whole(total, page, 8)
        self.index[self._without_score()] = np.nan

    def _without_score(self) -> np.ndarray:
        """Pages without a request, or the last one of a request."""
        rivals = [row[: max(c - 1, 0)] for row, c in zip(self.table, self.counts, strict=True)]
        rivals.append(np.zeros(0, np.int32))
        total = len(self.table) * WIDTH + 3
        return np.setdiff1d(np.arange(total), np.concatenate(rivals))

    def arguments(self, name: str) -> dict[str, Any]:
        if name == "quest":
            return {"q": self.grouped, "ends": np.stack((self.high, self.low), 2)}
        if name == "quest_apart":
            return {"q": self.grouped, "low": self.low, "high": self.high}
        if name == "indexer":
            return {"q": self.small, "w": self.w, "k": self.index}
        return {"q": self.grouped, "mean": self.mean}

    def scores(self, name: str, r: int, head: int) -> np.ndarray:
        """The scores of the pages in front of the last one, in float64."""
        rows = self.table[r, : max(self.counts[r] - 1, 0)]
        q, mean = self.grouped[r, head].astype(float), self.mean[rows, head].astype(float)
        if name.startswith("quest"):
            ends = (q[None] * x[rows, head][:, None] for x in (self.low, self.high))
            return np.maximum(*ends).sum(-1).max(-1)
        if name == "block_mean":
            return (mean @ q.T).sum(-1)
        if name == "block_weight":
            e = np.exp(mean @ q.T - (mean @ q.T).max(0, initial=-1e9))
            return (e / e.sum(0)).sum(-1)
        product = np.maximum(self.index[rows].astype(float) @ self.small[r].T, 0)
        return (product @ self.w[r]).max(1)

    def wanted(self, name: str, pages: int) -> list[list[np.ndarray]]:
        """The pages of each request and KV head in their order, numbers in the table's row."""
        chosen = []
        for r, count in enumerate(self.counts):
            chosen.append([])
            for head in range(HEADS):
                best = np.argsort(-self.scores(name, r, head), kind="stable")[: pages - 1]
                last = [count - 1] if count else []
                chosen[-1].append(np.array([*np.sort(best), *last], int))
        return chosen

    def poison(self, chosen: list[list[np.ndarray]]) -> None:
        """NaN in keys and values that the selection leaves out."""
        for array in (self.keys, self.values):
            kept = np.full_like(array, np.nan)
            for r, heads in enumerate(chosen):
                for head, own in enumerate(heads):
                    rows = self.table[r, own]
                    kept[rows, :, head] = array[rows, :, head]
                    if len(own):
                        behind = (self.lengths[r] - 1) % self.page + 1
                        kept[rows[-1], behind:, head] = np.nan
            array[:] = kept

    def attention(self, chosen: list[list[np.ndarray]]) -> State:
        """Attention of each query over the keys of its head's pages, in float64."""
        o, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for r, heads in enumerate(chosen):
            for head in range(HEADS * GROUP if len(heads[0]) else 0):
                own = heads[head // GROUP]
                n = (len(own) - 1) * self.page + (self.lengths[r] - 1) % self.page + 1
                k, v = (
                    x[self.table[r, own], :, head // GROUP].reshape(-1, DIM)[:n].astype(float)
                    for x in (self.keys, self.values)
                )
                s = k @ self.q[r, head] * DIM**-0.5
                lse[r, head] = s.max() + np.log(np.exp(s - s.max()).sum())
                o[r, head] = np.exp(s - lse[r, head]) @ v
        return State(o, lse)


def check_pages(table: Any, batch: Batch, chosen: list[list[np.ndarray]]) -> None:
    entries = table.host("table_entries").reshape(len(chosen), -1, table.width)
    for r, heads in enumerate(chosen):
        for head in range(entries.shape[1]):
            own = batch.table[r, heads[head]]
            np.testing.assert_array_equal(entries[r, head, : len(own)], own)
        kept = max((len(heads[0]) - 1) * batch.page, 0) if len(heads[0]) else 0
        left = (batch.lengths[r] - 1) % batch.page + 1 if len(heads[0]) else 0
        assert table.host("kv_len")[r] == kept + left


NAMES = ["quest", "quest_apart", "block_mean", "block_weight", "indexer"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pages", [1, 2, 5, WIDTH])
def test_pages_and_attention(rng, name, pages):
    batch, scores = Batch(rng), getattr(programs, name)
    chosen = batch.wanted(name, pages)
    table = tw.Table(batch.lengths, np.where(batch.table == 2**31 - 1, 0, batch.table))
    kv = tw.KV(table, tw.Pool(batch.keys, batch.values))
    attn = tw.Attention(HEADS * GROUP, HEADS, DIM)
    dense = attn.run(batch.q, kv, attn.plan(np.arange(len(LENGTHS) + 1), kv))
    selection = scores(attn, kv, pages=pages)
    few = selection.run(**batch.arguments(name))
    check_pages(few, batch, chosen)
    batch.poison(chosen)
    over = tw.KV(few, tw.Pool(batch.keys, batch.values))
    state = attn.run(batch.q, over, attn.plan(np.arange(len(LENGTHS) + 1), over))
    wanted = batch.attention(chosen)
    np.testing.assert_allclose(state.o, wanted.o, 1e-4, 1e-5)
    np.testing.assert_allclose(state.lse, wanted.lse, 1e-5, 1e-5)
    if pages == WIDTH:
        np.testing.assert_array_equal(state.o, dense.o)


def test_lengths_and_pages_change_in_memory(rng):
    """One selection for all steps; pages of one key are tokens (as in DeepSeek-V3.2)."""
    lengths = np.array([9, 3, 0], np.int32)
    batch = Batch(rng, lengths, page=1)
    table = tw.Table(batch.lengths, np.where(batch.table == 2**31 - 1, 0, batch.table))
    kv = tw.KV(table, tw.Pool(batch.keys, batch.values))
    attn = tw.Attention(HEADS * GROUP, HEADS, DIM)
    selection = programs.indexer(attn, kv, pages=4)
    check_pages(selection.run(**batch.arguments("indexer")), batch, batch.wanted("indexer", 4))
    other = Batch(rng, [12, 0, 5], page=1)
    batch.lengths[:] = other.lengths
    table.arrays["table_entries"][:] = np.where(other.table == 2**31 - 1, 0, other.table)
    check_pages(selection.run(**other.arguments("indexer")), other, other.wanted("indexer", 4))


@pytest.mark.parametrize("name", NAMES)
def test_a_program_takes_few_lines(name):
    assert len(inspect.getsource(getattr(programs, name).args[0].function).splitlines()) <= 20


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_requests(rng, name):
    batch = Batch(rng, ())
    kv = tw.KV(tw.Table(batch.lengths, batch.table), tw.Pool(batch.keys, batch.values))
    selection = getattr(programs, name)(tw.Attention(HEADS * GROUP, HEADS, DIM), kv, pages=2)
    assert selection.run(**batch.arguments(name)).lengths().shape == (0,)


def test_nan_counts_as_the_least_score(rng):
    batch = Batch(rng, (16 * 6,))
    batch.mean[batch.table[0, [1, 3]]] = np.nan
    pool = tw.Pool(batch.keys, batch.keys)
    kv = tw.KV(tw.Table(batch.lengths, batch.table * (batch.table < 99)), pool)
    selection = programs.block_mean(tw.Attention(HEADS * GROUP, HEADS, DIM), kv, pages=4)
    entries = selection.run(**batch.arguments("block_mean")).host("table_entries")
    assert not np.isin(entries, batch.table[0, [1, 3]]).any()
    np.testing.assert_array_equal(entries[0, :, -1], batch.table[0, 5])


def by_head(rng, kind: str = "float32", layout: str = "NHD", dim: int = DIM) -> Any:
    """A cache whose heads have pages of their own, NaN where no key is, in a wider table with rows
    in disorder; and the keys and values of each request and head."""
    lengths = np.array([PAGE * 2 + 3, 0, 1, PAGE * 4], np.int32)
    shape = (40, PAGE, HEADS, dim) if layout == "NHD" else (40, HEADS, PAGE, dim)
    k, v = np.full((2, *shape), np.nan, np.float32)
    wide, rows = np.full((9, HEADS + 1, 7), -1, np.int32), rng.permutation(9)[:4].astype(np.int32)
    own = []
    names = rng.permutation(40)
    for r, n in enumerate(lengths):
        for head in range(HEADS):
            count = -(-n // PAGE)
            pages, names = names[:count], np.roll(names, -count)
            wide[rows[r], head, :count] = pages
            at = pages[np.arange(n) // PAGE], np.arange(n) % PAGE, head
            at = at if layout == "NHD" else (at[0], head, at[1])
            values = rng.standard_normal((2, n, dim)).astype(TYPES[kind]).astype(np.float32)
            k[at], v[at] = values
            own.append(values)
    return lengths, wide[:, :HEADS, :5], rows, (k, v), own


def attended(q: np.ndarray, own: Any, lengths: np.ndarray, queries: int) -> State:
    """Causal attention of the last `queries` positions of each request, in float64."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for r, head in np.ndindex(len(lengths), HEADS * GROUP):
        k, v = own[r * HEADS + head // GROUP].astype(float)
        for i in range(queries):
            seen = lengths[r] - queries + i + 1
            if seen > 0:
                s = k[:seen] @ q[r * queries + i, head] * q.shape[2] ** -0.5
                lse[r * queries + i, head] = s.max() + np.log(np.exp(s - s.max()).sum())
                o[r * queries + i, head] = np.exp(s - lse[r * queries + i, head]) @ v[:seen]
    return State(o, lse)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_tables_by_head(rng, layout):
    """The reference, which the kernels are compared with elsewhere, and what a cache checks."""
    lengths, wide, rows, pool, own = by_head(rng, layout=layout)
    kv = tw.KV(tw.Table(lengths, wide, rows=rows), tw.Pool(*pool, layout=layout))
    q = rng.standard_normal((8, HEADS * GROUP, DIM))
    state = reference.attention(q, kv, np.arange(0, 9, 2), tw.Causal())
    wanted = attended(q, own, lengths, 2)
    np.testing.assert_allclose(state.o, wanted.o, 1e-9, 1e-12)
    wide[rows[0], 1, 0] = 40
    with pytest.raises(ArgumentError, match="A109"):
        tw.KV(tw.Table(lengths, wide, rows=rows), tw.Pool(*pool, layout=layout))


def test_refusals(rng):
    batch = Batch(rng)
    pool = tw.Pool(batch.keys, batch.values)
    kv = tw.KV(tw.Table(batch.lengths, batch.table * (batch.table < 99)), pool)
    attn, quest = tw.Attention(HEADS * GROUP, HEADS, DIM), programs.quest
    by_head = np.zeros((len(LENGTHS), HEADS + 1, WIDTH), np.int32)
    right = quest(attn, kv, pages=2)
    named = batch.arguments("quest")
    rows, first = batch.table * (batch.table < 99), np.zeros(len(LENGTHS), np.int32)
    wide, one = np.append(rows, rows, 1), np.array([0, 2], np.int32)

    def cache(*args, **named):
        return tw.KV(tw.Table(*args, **named), pool)

    window = tw.Attention(HEADS * GROUP, HEADS, DIM, tw.SlidingWindow(window=64))
    alibi = tw.Attention(HEADS * GROUP, HEADS, DIM, tw.Alibi())
    turned = tw.Attention(HEADS * GROUP, HEADS, DIM, KeysTurned())
    refused = [
        ("A103", lambda: quest(attn, kv, pages=0)),
        ("A107", lambda: quest(None, kv, pages=2)),
        ("A103", lambda: quest(tw.Attention(HEADS, HEADS, DIM + 8), kv, pages=2)),
        ("A107", lambda: quest(attn, kv.table, pages=2)),
        ("A107", lambda: quest(attn, cache(batch.lengths.astype(np.int64), rows), pages=2)),
        ("A107", lambda: quest(attn, cache(batch.lengths, wide[:, :WIDTH]), pages=2)),
        ("A107", lambda: quest(attn, cache(batch.lengths, rows, qo_base=first), pages=2)),
        ("A107", lambda: quest(attn, cache(batch.lengths[:3], rows[:3], shared=[one]), pages=2)),
        ("A103", lambda: quest(attn, cache(0 * batch.lengths, rows[:, :0].copy()), pages=2)),
        ("A107", lambda: quest(window, kv, pages=2)),
        ("A107", lambda: quest(alibi, kv, pages=2)),
        ("A107", lambda: quest(turned, kv, pages=2)),
        ("A103", lambda: tw.KV(tw.Table(batch.lengths, by_head), pool)),
        ("A107", lambda: tw.Table(batch.lengths, by_head).tensor(batch.keys)),
        ("A101", lambda: right.run(ends=named["ends"])),
        ("A103", lambda: right.run(**named | {"ends": named["ends"][1:]})),
    ]
    for code, call in refused:
        with pytest.raises(ArgumentError, match=code):
            call()
    with pytest.raises(ProgramError, match="P101"):

        @tw.select
        def no_scores(q=tw.dense("r d")):
            r, d = tw.indices("r d")
            return tw.out[r](tw.sum(q[r, d], over=d))

    with pytest.raises(ProgramError, match="P101"):

        @tw.select
        def no_pages(q=tw.dense("r p")):
            r, p = tw.indices("r p")
            return tw.out.typed("float32")[r, p](q[r, p])


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_cubins_without_spills(arch):
    text = spec.alone(select.body(), "choose_pages")
    used = spec.compile_cuda(text, arch, name="select").resources["choose_pages"]
    assert used.spill_bytes == 0 and used.registers <= 64
    if arch == "sm_90a":
        shapes = {"q": (64, 8, 4, 128), "ends": (64, 9, 8, 2, 128)}
        types = tuple((n, dtypes.bfloat16, shape) for n, shape in shapes.items())
        kernel = select._scores(programs.quest.args[0], types, f"cuda:{arch}")
        assert all(used.spill_bytes == 0 for used in kernel.resources.values())


@pytest.mark.parametrize("count", [3, 9])
def test_tiles_of_pages_on_a_cta(rng, count):
    """What a GPU runs for 16-bit numbers: blocks of pages copied ahead, scores stored by row."""
    batch = Batch(rng)
    grouped = rng.integers(-2, 3, (len(LENGTHS), HEADS, count, DIM)).astype(np.float32)
    ends = np.stack((batch.high, batch.low), 2)
    bits = {n: dtypes.bfloat16_bits(x).reshape(x.shape) for n, x in (("q", grouped), ("e", ends))}
    indptr = np.arange(len(LENGTHS) + 1, dtype=np.int32) * WIDTH
    rivals = np.maximum(batch.counts - 1, 0).astype(np.int32)
    pages = tw.Table.csr(rivals, indptr, batch.table.reshape(-1))
    typed = programs.quest.args[0].typed(q="bfloat16", ends="bfloat16")
    sizes = {"h": HEADS, "g": count, "e": 2, "d": DIM}.items()

    def recipe(s: Any) -> Any:
        return typed.recipe(functools.reduce(lambda s, x: s.specialize(*x), sizes, s))

    scores = typed.decompose(ends=tw.Table.format(1, 5)).schedule(recipe)
    args = {"q": bits["q"], "ends": pages.tensor(bits["e"][:, None], longest=WIDTH)}
    got = executed(scores, scores.lower(target("cuda")), args, cta.execute)["out"]
    for r, n in enumerate(rivals):
        own = ends[batch.table[r, :n]].astype(float)  # pages, heads, ends, d
        x = grouped[r].transpose(1, 0, 2)[:, None].astype(float)
        wanted = np.maximum(x * own[:, :, 0], x * own[:, :, 1]).sum(-1).max(0)
        np.testing.assert_array_equal(got[r, :, :n], wanted.T)


# ---------------------------------------------------------------------------- on a GPU


def on_gpu(array: np.ndarray, kind: str = "") -> Any:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(np.array(array)).cuda()
    return tensor.to(getattr(torch, kind)) if kind and tensor.is_floating_point() else tensor


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pages", [1, 5, WIDTH])
def test_on_a_gpu(rng, kind, name, pages):
    batch, scores = Batch(rng), getattr(programs, name)
    chosen, requests = batch.wanted(name, pages), len(LENGTHS)
    for array in (batch.q, batch.keys, batch.values):
        array[:] = array.astype(TYPES[kind]).astype(np.float32)
    batch.poison(chosen)
    pool = tw.Pool(*(on_gpu(x, kind) for x in (batch.keys, batch.values)))
    kv = tw.KV(tw.Table(on_gpu(batch.lengths), on_gpu(batch.table)), pool)
    attn = tw.Attention(HEADS * GROUP, HEADS, DIM)
    selection = scores(attn, kv, pages=pages)
    named = {n: on_gpu(x, kind) for n, x in batch.arguments(name).items()}
    few = selection.run(**named)
    check_pages(few, batch, chosen)
    over, q = tw.KV(few, pool), on_gpu(batch.q, kind)
    for plan in (attn.plan(np.arange(requests + 1), over), None):
        if plan is None and kind == "float32":
            continue
        if plan is None:
            plan = attn.reserve(requests)
            plan.plan(few)
        state = attn.run(q, over, plan)
        close(state, batch.attention(chosen))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["decode", "hopper", "portable"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_tables_by_head_on_a_gpu(rng, family, layout):
    kind, queries = (
        ("float32" if family == "portable" else "bfloat16"),
        3 + 20 * (family != "decode"),
    )
    dim = 64 if family == "hopper" else DIM
    lengths, wide, rows, pool, own = by_head(rng, kind, layout, dim)
    table = tw.Table(on_gpu(lengths), on_gpu(wide), rows=on_gpu(rows))
    kv = tw.KV(table, tw.Pool(*(on_gpu(x, kind) for x in pool), layout=layout))
    q = rng.standard_normal((4 * queries, HEADS * GROUP, dim)).astype(TYPES[kind])
    attn = tw.Attention(HEADS * GROUP, HEADS, dim)
    plan = attn.plan(np.arange(5) * queries, kv)
    assert plan.family == family
    state = attn.run(on_gpu(q.astype(np.float32), kind), kv, plan)
    close(state, attended(q.astype(float), own, lengths, queries))


@pytest.mark.gpu
def test_a_graph_chooses_again_at_each_replay(rng):
    torch = pytest.importorskip("torch")
    batches = [Batch(rng), Batch(rng, LENGTHS[::-1]), Batch(rng, (0, 1, 2, 16 * 13, 99, 98, 0))]
    batch, pages = batches[0], 5
    kv_len, rows = on_gpu(batch.lengths), on_gpu(batch.table)
    named = {n: on_gpu(x, "bfloat16") for n, x in batch.arguments("quest").items()}
    q, k, v = (on_gpu(x, "bfloat16") for x in (batch.q, batch.keys, batch.values))
    attn, pool = tw.Attention(HEADS * GROUP, HEADS, DIM), tw.Pool(k, v)
    selection = programs.quest(attn, tw.KV(tw.Table(kv_len, rows), pool), pages=pages)
    over = tw.KV(selection.table, pool)
    room = attn.reserve(len(LENGTHS), kv=over)

    def step() -> Any:
        selection.run(**named)
        room.plan(selection.table)
        return attn.run(q, over, room)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = step()
    for now in (*batches, batches[0]):
        chosen = now.wanted("quest", pages)
        for array in (now.q, now.keys, now.values):
            array[:] = array.astype(TYPES["bfloat16"]).astype(np.float32)
        now.poison(chosen)
        for to, array in ((kv_len, now.lengths), (rows, now.table), (q, now.q), (k, now.keys)):
            to.copy_(torch.from_numpy(array))
        v.copy_(torch.from_numpy(now.values))
        for n, array in now.arguments("quest").items():
            named[n].copy_(torch.from_numpy(array))
        graph.replay()
        torch.cuda.synchronize()
        check_pages(selection.table, now, chosen)
        close(state, now.attention(chosen))
