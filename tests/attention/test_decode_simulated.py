"""The decode kernel's own text on simulated warps, against the oracle, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention.oracle import Case
from tests.attention.test_cascade import cascade, close, drawn

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import plan as plans
from tilewright.attention import planner, ranges
from tilewright.attention.families import decode
from tilewright.attention.spec import Spec, alone, partial_params
from tilewright.attention.table import NODE, TableForm
from tilewright.ir.body import Body
from tilewright.toolchain import compilers

pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
BLOCK = 5  # queries of an item of shared keys
CAUSAL, WINDOW = tw.Causal(), tw.SlidingWindow(window=300)
SHAPES = [  # group, kv_heads, head_dim, dtype, mask, logits, sink
    (4, 8, 128, ml_dtypes.bfloat16, "causal", "scores", ""),
    (7, 2, 80, np.float16, "window", "scores", "per head"),
]


@dataclass(frozen=True)
class Prepared:
    """A call of the kernel: its plan and parameters, the body of its launch with the CTAs of that,
    and of the launch in front, if the plan has one; o and lse, poisoned."""

    plan: tw.Plan
    block: Any
    body: Body
    ctas: int
    front: tuple[Body, int] | None
    o: np.ndarray
    lse: np.ndarray
    states: np.ndarray  # that the launch in front leaves, a row each
    partials: np.ndarray
    counters: np.ndarray
    kept: Any

    def launch(self, body: Body, ctas: int, seed: int) -> None:
        begin = len(self.partials) - len(self.states) * self.states.strides[0] // 4
        before = [self.partials[begin:]] if self.front and body is not self.front[0] else []
        writes = self.o, self.lse, self.partials, self.counters
        simulated.launch(simulated.kernel(alone(body)), self.block, body.threads, ctas, seed,
                         writes, before)  # fmt: skip


def prepared(case: Case, workers: int) -> Prepared:
    """A plan of the family of GPUs, made on the host. Shared keys are read by a launch in front,
    where the plan has that."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    kv = tw.KV(table, tw.Pool(case.k, case.v))
    traced = attn.variant.traced
    dtype = dtypes.ALL[case.q.dtype.name]
    dtypes_of = dtype, dtype, dtypes.ALL["float32"]
    spec = Spec(attn.group, *case.dims, *dtypes_of, traced, table.form)
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    shape = plans.Shape("decode", attn.kv_heads, attn.group, traced.mask, known,
                        decode.FAMILY.qo_tile(spec), "", decode.ctas_per_sm(attn.head_dim),
                        block=BLOCK)  # fmt: skip
    lengths = kv.lengths()
    plan = plans.make(case.qo_indptr, lengths, shape, workers, table.tree(lengths))
    o, lse, numbers, arrays = simulated.arguments(case, attn, kv, plan.tokens)
    together, blocks = ranges.head_block(attn.kv_heads), decode.blocks_of(plan.longest * attn.group)
    ctas, last = (len(plan.cuts) - 1) * together, plan.nodes[-1:]
    items, rows = int(last["item"].sum()), int(last["row"].sum())
    floats, states = decode.partial_floats(attn.head_dim, blocks, ctas, rows * attn.qo_heads)
    partials = np.full(floats + states, np.nan, np.float32)
    counters = np.zeros(ctas + 1, np.int32)
    work: dict[str, Any] = {"qo_indptr": plan.qo_indptr.ctypes.data, "cuts": plan.cuts.ctypes.data}
    work |= partial_params(partials.ctypes.data, floats, counters.ctypes.data, ctas)
    work |= {"nodes": plan.nodes.ctypes.data} if table.form.shared else {}
    front = min(items, workers)
    block = decode.params_struct(spec).pack(**numbers, **work, front_ctas=front)
    in_front = (decode.body(spec, together, 2, decode.FRONT, BLOCK), front) if items else None
    body = decode.body(spec, together, blocks, decode.BEHIND if items else decode.ALONE)
    left = partials[floats:].reshape(-1, attn.head_dim + 8)[:, : attn.head_dim + 2]
    kept = arrays, kv, table
    return Prepared(plan, block, body, ctas, in_front, o, lse, left, partials, counters, kept)


def result(case: Case, workers: int, seed: int) -> tuple[np.ndarray, np.ndarray, tw.Plan]:
    """o and lse of the kernel, and the plan."""
    call = prepared(case, workers)
    if call.front:
        call.launch(*call.front, seed)
        assert not np.isnan(call.states).any()
    call.launch(call.body, call.ctas, seed)
    assert not call.counters.any()
    return call.o, call.lse, call.plan


def check(case: Case, workers: int) -> tw.Plan:
    """Right in every order of the CTAs, and the same bits."""
    first, lse, plan = result(case, workers, 0)
    close(case, first, lse, str(plan))
    again = result(case, workers, 1)[0]
    assert np.array_equal(first.view(np.uint32), again.view(np.uint32))
    return plan


@pytest.mark.parametrize("rows", ["gated", "ends"])
@pytest.mark.parametrize("number", range(4))
def test_hooks_of_rows(rng, rows, number):
    """Outputs of whole units, of parts that CTAs merge, of requests without keys; two blocks of
    rows, also where a stage does not hold the outputs of both."""
    shape, counts, lengths, workers = (
        (SHAPES[0], [3, 0, 1], [130, 5, 400], 3),
        (SHAPES[0], [1, 1, 1], [900, 0, 70], 40),
        ((2, 3, 256, ml_dtypes.bfloat16, "causal", "scores", ""), [7, 1], [300, 64], 11),
        ((12, 1, 72, np.float16, "window", "softcap", "per head"), [1, 1], [700, 33], 7),
    )[number]
    case = cascade(rng, shape, counts, [], lengths)
    sizes = len(counts), len(case.q), 3000
    values = oracle.draw_row_values(rng, oracle.ROWS[rows][2], case.heads, sizes)
    check(replace(case, rows=rows, narrow=True, values=case.values | values), workers)


def test_hooks_of_outputs_where_keys_are_shared(rng, monkeypatch):
    """By what a launch in front leaves, too."""
    monkeypatch.setattr(ranges, "APART_COST", 0)
    case = cascade(rng, SHAPES[1], [1] * 9, [[0, 9]], [4300, *[30] * 9])
    values = oracle.draw_row_values(rng, oracle.ROWS["gated"][2], case.heads, (9, 9, 3000))
    plan = check(replace(case, rows="gated", values=case.values | values), 132)
    assert plan.nodes["chunks"].max() > 0


def test_flat(rng):
    check(cascade(rng, SHAPES[0], [3, 0, 1], [], [130, 5, 400]), 40)


@pytest.mark.parametrize(
    ("shape", "dim_vo", "counts"),
    [
        ((2, 1, 256, np.float16, "window", "scores", "per head"), 256, [1, 0, 4, 1]),
        ((5, 2, 200, ml_dtypes.bfloat16, "causal", "softcap", ""), 192, [2, 1, 0, 3]),
        ((8, 1, 192, np.float16, "causal", "scores", ""), 128, [1, 1, 1, 0]),
        ((4, 1, 128, ml_dtypes.bfloat16, "first and last", "alibi", ""), 72, [4, 1, 3, 2]),
        ((3, 2, 40, np.float16, "window", "scores", "per head"), 24, [5, 2, 0, 3]),
    ],
)
@pytest.mark.parametrize("workers", [1, 20])
def test_long_rows_and_many(rng, shape, dim_vo, counts, workers):
    """Keys and values of one stage; q in shared memory; values shorter than keys."""
    case = cascade(rng, shape, counts, [], [330, 0, 70, 129], page_size=int(rng.choice([1, 7, 16])))
    check(replace(case, v=case.v[..., :dim_vo]), workers)


@pytest.mark.parametrize("cost", [-(1 << 30), 1, 1 << 30])
def test_shared_keys(rng, monkeypatch, cost):
    """All read by a launch in front, as the plan chooses, and walked by their requests."""
    monkeypatch.setattr(ranges, "APART_COST", cost)
    check(drawn(rng, SHAPES[1], 2 if cost == 1 else 1), int(rng.choice([5, 40])))


def test_many_chunks(rng, monkeypatch):
    """The states of a row are read in several rounds."""
    monkeypatch.setattr(ranges, "APART_COST", 0)
    plan = check(cascade(rng, SHAPES[1], [1] * 9, [[0, 9]], [4300, *[30] * 9]), 132)
    assert plan.nodes["chunks"].max() > 8


def planned(
    form: TableForm,
    shape: plans.Shape,
    keys: np.ndarray,
    rows: np.ndarray,
    shared: Any,
    workers: int,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Cuts, nodes and the status word of the planner of GPUs."""
    run = simulated.kernel(alone(planner.body(form, 4, BLOCK), "plan_cuts"), "plan_cuts")
    blocks = shape.kv_heads // ranges.head_block(shape.kv_heads)
    limit, requests = 2 * workers * blocks // shape.kv_heads, len(rows) - 1
    cuts, nodes = np.zeros(limit + 1, ranges.CUT.numpy), np.full(len(keys), -7, NODE.numpy)
    copied, status = np.zeros(requests + 1, np.int32), np.zeros(1, np.int32)
    levels = {f"shared_{n}": x.ctypes.data for n, x in enumerate(shared)} or {"shared_0": 0}
    levels |= {f"count_{n}": len(x) - 1 for n, x in enumerate(shared)} or {"count_0": 0}
    block = planner.params_struct(form).pack(
        kv_len=keys.ctypes.data, table_indptr=0, qo_from=rows.ctypes.data, **levels,
        qo_indptr=copied.ctypes.data, cuts=cuts.ctypes.data, nodes=nodes.ctypes.data,
        status=status.ctypes.data, limit=limit, most_tiles=shape.most_tiles, requests=requests,
        node_count=len(keys), head_blocks=blocks, max_tokens=int(rows[-1]),
        kv_heads=shape.kv_heads, front=ranges.of_front(BLOCK, 4, workers),
    )  # fmt: skip
    simulated.launch(run, block, planner.THREADS, 1, seed, (copied, cuts, nodes, status))
    return cuts, nodes, int(status[0])


def shape_of_planner(variant: Any, kv_heads: int = 8) -> plans.Shape:
    known = {n: x for n, x in variant.fixed if np.isscalar(x)}
    mask = variant.traced.mask
    return plans.Shape("decode", kv_heads, 4, mask, known, 4, "", 2, block=BLOCK)


@pytest.mark.parametrize(
    ("depth", "variant"), [(0, CAUSAL), (1, CAUSAL), (3, CAUSAL), (1, WINDOW), (3, WINDOW)], ids=str
)
@pytest.mark.parametrize("cost", [-(1 << 30), 3, 1 << 30])
def test_the_planner_of_gpus_agrees(rng, monkeypatch, depth, cost, variant):
    """With the one of the host, exactly: cuts and nodes; of units that cost alike, too; where a
    window hides most of shared keys; of more requests than threads."""
    monkeypatch.setattr(ranges, "APART_COST", cost)
    planner.body.cache_clear()
    form = TableForm("int32", table_entries="", shared=depth)
    for requests, most, workers, kv_heads in (
        (1, 900, 20, 8), (16, 1, 132, 8), (4, 1, 132, 12), (33, 3000, 40, 8),
        (70, 200, 132, 12), (1500, 300, 132, 8),
    ):  # fmt: skip
        shared = oracle.draw_levels(rng, requests, depth)
        count = requests + sum(len(x) - 1 for x in shared)
        keys = (rng.integers(0, most, count) if most > 1 else np.full(count, 1024)).astype(np.int32)
        tree = tw.Table.dense(keys, shared=shared).tree(keys.astype(np.int64))
        indptr = np.cumsum([0, *rng.integers(0, 4, requests)]).astype(np.int32)
        shape = shape_of_planner(variant, kv_heads)
        plan = plans.make(indptr, keys.astype(np.int64), shape, workers, tree)
        cuts, nodes, status = planned(form, shape, keys, indptr, shared, workers)
        assert not status
        np.testing.assert_array_equal(cuts[: len(plan.cuts)], plan.cuts)
        if depth:
            read = plan.nodes["begin"] < plan.nodes["end"]
            np.testing.assert_array_equal(nodes[read], plan.nodes[read])
    planner.body.cache_clear()


@pytest.mark.parametrize(
    "levels",
    [
        [[0, 5, 9], [0, 4, 9]], [[0, 9], [0, 9, 8]], [[0, 8], [0, 8]], [[1, 9], [0, 9]],
        [[0, 7, 2, 9], [0, 9]], [[0, -3, 9], [0, 9]], [[0, 9], [0, 12, 9]], [[], [0, 9]],
    ],
    ids=str,
)  # fmt: skip
def test_the_planner_of_gpus_plans_nothing_of_wrong_levels(levels):
    """Levels that do not divide each other, or the requests: no unit, no item, and the status."""
    form, shape = TableForm("int32", table_entries="", shared=2), shape_of_planner(CAUSAL)
    shared = [np.array(x or [0], np.int32) for x in levels]
    count = 9 + sum(len(x) - 1 for x in shared)
    keys, rows = np.full(count, 1000, np.int32), np.arange(10, dtype=np.int32)
    cuts, nodes, status = planned(form, shape, keys, rows, shared, 20)
    assert status == 2
    assert (cuts["node"] == count).all() and not cuts["tile"].any()
    assert not nodes["item"][-9:].any() and not nodes["row"][-9:].any()


if __name__ == "__main__":  # more of them: python -m tests.attention.test_decode_simulated
    for seed in itertools.count():
        numbers = np.random.default_rng(seed)
        shape, depth = SHAPES[seed % 2], int(numbers.integers(1, 4))
        ranges.APART_COST = int(numbers.choice([-(1 << 30), 0, 3, 20]))
        plan = check(drawn(numbers, shape, depth), int(numbers.choice([1, 5, 40])))
        print(seed, plan, flush=True)
