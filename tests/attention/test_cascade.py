"""Requests that share keys: tables, plans and kernels against the oracle."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bench.decode import cases
from tests.attention import oracle
from tests.attention.cases import spec_of
from tests.attention.oracle import Case
from tests.attention.test_flash_cuda import _bits
from tests.runtime.test_pool_process import _build

import tilewright as tw
from tilewright import knobs
from tilewright.attention import plan as plans
from tilewright.attention import planner, ranges
from tilewright.attention import report as reports
from tilewright.attention.families import cpu, decode, hopper
from tilewright.attention.plan import ITEMS
from tilewright.attention.spec import (
    PARTIALS,
    alone,
    compile_cuda,
    param_values,
    params_struct,
    template,
)
from tilewright.attention.table import NODE
from tilewright.errors import ArgumentError
from tilewright.runtime.view import view
from tilewright.toolchain import compilers, nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
SHAPES = [  # group, kv_heads, head_dim, dtype, mask, logits, sink
    (4, 8, 128, ml_dtypes.bfloat16, "causal", "scores", ""),
    (1, 3, 64, np.float16, "causal", "scores", ""),
    (16, 1, 128, ml_dtypes.bfloat16, "causal", "softcap", ""),
    (7, 2, 80, np.float16, "window", "scores", "per head"),
    (5, 12, 72, ml_dtypes.bfloat16, "first and last", "alibi", ""),
    (2, 2, 16, np.float16, "causal", "biases", ""),
]
IDS = ["-".join(str(getattr(x, "__name__", x)) for x in s) for s in SHAPES]


def cascade(
    rng: np.random.Generator, shape: tuple[Any, ...], counts: list[int], shared: list[list[int]],
    lengths: list[int], page_size: int = 16, form: str = "csr",
) -> Case:  # fmt: skip
    """A case with `counts` queries of each request and so many keys of each node."""
    group, kv_heads, dim, dtype, mask, logits, sink = shape
    kv_indptr, kv_indices, pages = oracle.pages_of(rng, lengths, page_size)
    k, v = (np.full((pages, page_size, kv_heads, dim), np.nan, dtype) for _ in "kv")
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    q = rng.standard_normal((int(indptr[-1]), group * kv_heads, dim)).astype(dtype)
    parts = (oracle.MASKS[mask], oracle.LOGITS[logits], oracle.SINKS[sink])
    kinds = parts[0][2] | parts[1][2] | parts[2][2]
    sizes = (len(counts), int(indptr[-1]), 3000)
    values = oracle.draw_values(rng, kinds, (group * kv_heads, kv_heads), sizes)
    levels = tuple(np.array(x, np.int32) for x in shared)
    case = Case(
        "0:0", mask, logits, sink, None, values, q, indptr, k, v, np.array(lengths, np.int32),
        kv_indptr, kv_indices, 7, form, {}, levels,
    )  # fmt: skip
    oracle.fill(rng, case)
    return case


def drawn(rng: np.random.Generator, shape: tuple[Any, ...], depth: int, **more: Any) -> Case:
    """A case of random levels and lengths, some of them 0."""
    requests = int(rng.integers(1, 40))
    shared = [x.tolist() for x in oracle.draw_levels(rng, requests, depth)]
    nodes = requests + sum(len(x) - 1 for x in shared)
    lengths = [int(rng.integers(0, rng.choice([2, 70, 900]))) for _ in range(nodes)]
    most = max(1, 16 // shape[0])
    counts = [int(rng.integers(0, most + 1)) for _ in range(requests)]
    if rng.random() < 0.5:
        counts = [1] * requests
    return cascade(rng, shape, counts, shared, lengths, **more)


# ---------------------------------------------------------------------------- without a GPU


def test_nodes_of_a_table():
    lengths = np.array([50, 7, 30, 0, 9, 1, 2, 3, 4], np.int32)
    table = tw.Table.dense(
        lengths, shared=[np.array([0, 4], np.int32), np.array([0, 1, 1, 3, 4], np.int32)]
    )
    assert (table.nodes, table.requests, table.form.shared) == (9, 4, 2)
    tree = table.tree(lengths)
    assert tree["base"][-4:].tolist() == [57, 50, 50, 59]
    assert tree["level"].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    paths = [np.flatnonzero((tree["begin"] <= r) & (r < tree["end"])).tolist() for r in range(4)]
    assert paths == [[0, 1, 5], [0, 3, 6], [0, 3, 7], [0, 4, 8]]
    fields = ", ".join(f.name for f in NODE.fields)
    assert f"struct Node {{\n  int32_t {fields};\n" in template("table.h")


def levels(*indptrs: list[int]) -> list[np.ndarray]:
    return [np.array(x, np.int32) for x in indptrs]


def test_misuse_of_shared_keys():
    def table(n: int, shared: Any, **more: Any) -> tw.Table:
        return tw.Table.dense(np.ones(n, np.int32), shared=shared, **more)

    for n, shared in (
        (4, levels([0, 4])), (4, levels([1, 3])), (4, levels([0, 2, 1, 3])), (1, levels([0, 1, 2])),
        (7, levels([0, 2, 4], [0, 1, 3, 4])), (6, levels([0, 4], [0, 5])),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"A103|A109"):
            table(n, shared)
    three = np.ones(3, np.int32)
    with pytest.raises(ArgumentError, match="no shared keys"):
        table(4, levels([0, 3]), qo_base=three, kv_base=three, kv_stride=three)
    with pytest.raises(ArgumentError, match="A102"):
        table(4, [np.array([0, 3])])
    with pytest.raises(ArgumentError, match="A103"):
        table(4, levels([0, 3]), qo_base=np.ones(4, np.int32))
    half = np.full(4, 2**30, np.int32)
    with pytest.raises(ArgumentError, match="over all levels"):
        tw.Table.dense(half, shared=levels([0, 2], [0, 2])).tree(half.astype(np.int64))


def test_plans_of_shared_keys_are_checked(rng):
    case = cascade(rng, SHAPES[1], [1, 2, 0, 3], [[0, 3, 4]], [900, 0, 5, 70, 1, 0])
    attn, kv = oracle.attention_of(case), tw.KV(oracle.table_of(case), tw.Pool(case.k, case.v))
    plan = attn.plan(case.qo_indptr, kv)
    assert tw.Plan.load(plan.save()) == plan
    for name, at, change in (("begin", 1, 1), ("end", 0, 1), ("level", 5, -1), ("base", 0, -5)):
        nodes = plan.nodes.copy()
        nodes[name][at] += change
        with pytest.raises(ArgumentError, match="A109"):
            replace(plan, nodes=nodes)
    flat = tw.KV(tw.Table.dense(np.array([3, 4, 5, 6], np.int32)), kv.pool)
    with pytest.raises(ArgumentError, match="shared levels"):
        attn.run(case.q, flat, plan)
    with pytest.raises(ArgumentError, match="the plan is for"):
        attn.run(case.q, kv, attn.plan(case.qo_indptr, flat))
    levels, kv_len = kv.table.arrays["shared_0"], kv.table.arrays["kv_len"]
    for array, at, number in ((levels, 1, 2), (kv_len, 0, kv_len[0] - 1)):
        before, array[at] = array[at], number
        with pytest.raises(ArgumentError, match=r"A103.*other shared keys"):
            attn.run(case.q, kv, plan)
        array[at] = before
    kv_len[-4] -= 1  # keys of a request's own
    attn.run(case.q, kv, plan, **oracle.arrays_of(case))


def test_reports():
    attn = tw.Attention(8, 2, 64)
    k = np.zeros((2, 5000, 2, 64), np.float32)
    kv = tw.KV(tw.Table.dense(np.array([64, 4000], np.int32)), tw.Pool(k, k))
    plan = attn.plan([0, 1, 2], kv)
    report = plan.report()
    assert report.nbytes == 4064 * 2 * 2 * 64 * 4 and report.family == "cpu"
    assert report.padding == pytest.approx(1 - 4064 / 4096) and report.microseconds is None
    assert "imbalance" in str(report) and report.imbalance >= 1
    with pytest.raises(ArgumentError, match="A103"):
        tw.Plan.load(plan.save()).report()


def test_predicted_times_grow_with_the_work():
    shape = plans.Shape("decode", 8, 4, tw.Causal().traced.mask, {}, 4, "", 2)
    times = []
    for length in (100, 1000, 10_000, 100_000):
        keys = np.full(16, length)
        made = plans.make(np.arange(17, dtype=np.int32), keys, shape, 132)
        batch = reports.Batch(keys, 512, (("decode", ""), ("hopper", "no")), "NVIDIA H200")
        found = reports.report(replace(made, batch=batch))
        times.append(found.microseconds)
        assert found.refused == (("hopper", "no"),)
    assert times == sorted(times) and times[3] > 1.05 * 16 * 100_000 * 4096 / 4.8e6


def test_predicted_times_are_those_measured():
    """Of the rows of `bench decode`, to which no cost was fitted."""
    file = Path(__file__).parents[2] / "bench/results/h200/decode.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    measured = {(r["heads"], r["input"]): r["value"] for r in rows if r["metric"] == "us"}
    errors = []
    for case in cases():
        group, keys = case.qo_heads // case.kv_heads, case.lengths
        shape = plans.Shape("decode", case.kv_heads, group, tw.Causal().traced.mask, {}, 16, "", 2)
        made = plans.make(np.arange(len(keys) + 1, dtype=np.int32), keys, shape, 132)
        made = replace(made, batch=reports.Batch(keys, 512, (), "NVIDIA H200"))
        time = measured[f"{case.qo_heads}/{case.kv_heads}", case.name]
        errors.append(abs(reports.report(made).microseconds / time - 1))
    assert len(errors) == 26 and np.quantile(errors, 0.9) <= 0.1 and max(errors) < 0.15


needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


@needs_cxx
def test_the_order_of_items_changes_no_bit(rng):
    """Of chunks and levels that different threads finish: any order, any number of threads."""
    shape = (2, 2, 16, np.float32, "causal", "scores", "")
    case = cascade(rng, shape, [1, 3, 1, 1, 2, 1], [[0, 4, 6], [0, 2, 4, 6]],
                   [3000, 70, 900, 0, 5, 700, 1, 65, 0, 3, 130])  # fmt: skip
    attn, kv = oracle.attention_of(case), tw.KV(oracle.table_of(case), tw.Pool(case.k, case.v))
    plan = attn.plan(case.qo_indptr, kv, workers=8)
    assert plan.items["chunks"].max() > 2
    first = attn.run(case.q, kv, plan)
    wanted, wanted_lse, _ = oracle.oracle(case)
    np.testing.assert_allclose(first.o, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(first.lse, wanted_lse, rtol=2e-5, atol=2e-5)
    for threads in (1, 2, 3, 8) * 3:
        other = replace(plan, items=plan.items[rng.permutation(len(plan.items))])
        with knobs.scope(threads=threads):
            found = attn.run(case.q, kv, other)
        assert found.o.tobytes() == first.o.tobytes()
        assert found.lse.tobytes() == first.lse.tobytes()


TRIAL = '#include <stdio.h>\nint main() { puts("right"); }\n'
THREADS = """
#include <pthread.h>
static int next_item, wrong;
static void* work(void*) {
  for (int n; (n = __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED)) < ITEMS;)
    stage0(&p, n, n + 1);
  return nullptr;
}
int main() {
  for (int n = 0; n < KEYS; ++n) k[n] = v[n] = (n * 7919 % 1009) / 500.0f - 1;
  for (int n = 0; n < QUERIES; ++n) q[n] = (n * 104729 % 997) / 500.0f - 1;
  set(p);
  for (int round = 0; round < 12; ++round) {
    pthread_t threads[4];
    next_item = 0;
    for (pthread_t& t : threads) pthread_create(&t, nullptr, work, nullptr);
    for (pthread_t t : threads) pthread_join(t, nullptr);
    for (int n = 0; n < QUERIES; ++n) wrong += round && o[n] != first[n];
    for (int n = 0; n < QUERIES; ++n) first[n] = o[n];
  }
  puts(wrong ? "wrong" : "right");
}
"""


@pytest.mark.parametrize("requests", [0, 2])
def test_shared_keys_that_no_query_reads(rng, requests):
    attn, q = tw.Attention(4, 2, 8), np.zeros((0, 4, 8), np.float32)
    pages = rng.standard_normal((1 + requests, 5, 2, 8)).astype(np.float32)
    lengths = np.array([5] + [3] * requests, np.int32)
    table = tw.Table.dense(lengths, shared=levels([0, requests]))
    kv = tw.KV(table, tw.Pool(pages, pages))
    plan = attn.plan([0] * (requests + 1), kv)
    assert tw.Plan.load(plan.save()) == plan
    assert attn.run(q, kv, plan).o.shape == q.shape


@needs_cxx
def test_thread_sanitizer_finds_nothing(tmp_path):
    """The CPU kernel over chunks and levels, its items taken by four threads."""
    if _build(tmp_path, TRIAL, "-fsanitize=thread") != "right\n":
        pytest.skip("the thread sanitizer does not work on this machine")
    lengths, shared = np.array([1400, 70, 0, 3, 65], np.int32), levels([0, 4])
    attn, kv_heads, dim = tw.Attention(4, 2, 8), 2, 8
    pages = np.zeros((5, 1400, kv_heads, dim), np.float32)
    kv = tw.KV(tw.Table.dense(lengths, shared=shared), tw.Pool(pages, pages))
    plan, q = attn.plan([0, 1, 2, 3, 4], kv), np.zeros((4, 4, dim), np.float32)
    assert plan.items["chunks"].max() > 1
    spec = spec_of(
        2, dim, "float32", "float32", attn.variant, table_indptr="", table_entries="", shared=1
    )
    views = view(q), view(np.zeros(q.shape[:2], np.float32))
    numbers = param_values(view(q), kv.pool, kv.table, views, attn.scale)
    fields = {f.name: f for f in params_struct(spec, (*ITEMS, *PARTIALS)).fields}
    numbers = {n: x for n, x in numbers.items() if fields[n].type != "ptr"}
    row = plan.qo_tile * attn.group * 80
    floats = plan.slots * row + 16 * 80 * 2
    arrays = {"kv_len": lengths, "qo_indptr": plan.qo_indptr, "nodes": plan.nodes.view(np.int32),
              "items": plan.items.view(np.int32)}  # fmt: skip
    sizes = {"q": q.size, "o": q.size, "first": q.size, "lse": 16, "k": pages.size,
             "v": pages.size, "partials": floats}  # fmt: skip
    lines = [f"static float {n}[{size}];" for n, size in sizes.items()]
    lines += [f"static int32_t {n}[] = {{{', '.join(map(str, x))}}};" for n, x in arrays.items()]
    counts = plan.counters + 4 * kv_heads
    lines += [
        f"constexpr int ITEMS = {len(plan.items)}, KEYS = {pages.size}, QUERIES = {q.size};",
        f"static int32_t counters[{counts}];", "static Params p;", "static void set(Params& p) {",
        *(f"  p.{n} = {x};" for n, x in numbers.items()),
        *(f"  p.{n} = {n};" for n in ("q", "k", "v", "o", "lse", "partials", "counters")),
        *(f"  p.{n} = {n};" for n in ("kv_len", "qo_indptr", "nodes")),
        "  p.items = reinterpret_cast<const Item*>(items);",
        f"  p.states = partials + {plan.slots * row}; p.arrivals = counters + {plan.counters};",
        "  p.state_rows = 16;", "}",
    ]  # fmt: skip
    text = "\n".join(("#include <stdio.h>", cpu.source(spec, 256), *lines, THREADS))
    assert _build(tmp_path, text, "-fsanitize=thread", "-mavx2", "-mfma", "-mf16c") == "right\n"


@needs_nvrtc
@pytest.mark.parametrize("kind", [decode.ALONE, decode.BEHIND, decode.FRONT])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_cubins_of_shared_keys(arch, kind):
    """The numbers that Python launches with are those of the kernel, too."""
    spec = spec_of(4, 128, "bfloat16", "bfloat16", tw.Causal(), shared=1)
    blocks = 2 if kind == decode.FRONT else 1
    text = alone(decode.body(spec, 8, blocks, kind, 32))
    numbers = decode.smem_bytes(spec, blocks, kind), decode.partial_floats(128, 1, 0, 1)[1]
    for name, value in zip(("SMEM_BYTES", "STATE"), numbers, strict=True):
        text += f'\nstatic_assert(body0::attention::{name} == {value}, "");'
    used = compile_cuda(text, arch).resources["stage0"]
    assert used.spill_bytes <= 64 * (arch == "sm_80") and 0 < used.registers <= 255


def test_which_kernel_is_in_front():
    """That of the Hopper family, but where the mask or logits tell the requests of a tile apart, or
    all queries are one item of the decode family."""
    for variant in (tw.SlidingWindow(), tw.Causal() | tw.Alibi()):
        spec = spec_of(4, 128, "bfloat16", "bfloat16", variant, shared=1)
        assert "tell apart" in hopper.refuses(spec, 0, None, "sm_90a")
        assert decode.shared_block(spec, None, "sm_90a", 5) == 4
    spec = spec_of(4, 80, "bfloat16", "bfloat16", tw.Causal(), shared=1)
    assert decode.shared_block(spec, None, "sm_90a", 5) == 4
    spec = spec_of(4, 128, "bfloat16", "bfloat16", tw.Causal(), shared=1)
    assert decode.shared_block(spec, None, "sm_80", 5) == 4
    assert decode.shared_block(spec, None, "sm_90a", 4) == 4


@needs_nvrtc
@pytest.mark.parametrize(
    ("page_size", "variant"),
    [(1, tw.Causal()), (16, tw.Causal()), (16, tw.Full()), (16, tw.Causal() | tw.Softcap())],
)
def test_cubins_of_the_hopper_kernel_in_front(page_size, variant):
    spec = spec_of(4, 128, "bfloat16", "bfloat16", variant, shared=1)
    assert decode.shared_block(spec, None, "sm_90a", 5) == 32
    used = compile_cuda(alone(hopper.body(spec, page_size, True)), "sm_90a").resources["stage0"]
    assert used.spill_bytes == 0 and 0 < used.registers <= 168


# ---------------------------------------------------------------------------- on a GPU


def on_gpu(case: Case) -> tuple[tw.KV, Any, dict[str, Any]]:
    """The cache, q and the tensors of a case in GPU memory."""
    from tilewright.runtime.cuda import DeviceArray

    def there(x: np.ndarray) -> Any:
        return DeviceArray.from_numpy(_bits(x), "bfloat16" if x.dtype.name == "bfloat16" else None)

    host = oracle.table_of(case)
    indices = case.kv_indices[: case.kv_indptr[-1]]
    more = {n: there(x) for n, x in case.positions.items()}
    more["shared"] = [there(x) for x in case.shared]
    table = tw.Table.csr(there(case.kv_len), there(case.kv_indptr), there(indices), **more)
    assert table.nodes == host.nodes
    arrays = {n: there(x) for n, x in oracle.arrays_of(case).items()}
    return tw.KV(table, tw.Pool(there(case.k), there(case.v))), there(case.q), arrays


def close(case: Case, o: np.ndarray, lse: np.ndarray, text: str = "") -> None:
    """Rows of 16-bit products: the relative error of each row, and the logarithm of the sums."""
    wanted, wanted_lse, _ = oracle.oracle(case)
    size, off = (np.linalg.norm(x, axis=-1) for x in (wanted, o - wanted))
    bad = ~(off <= 8e-3 * size + 1e-6)
    assert not bad.any(), f"{text} {np.argwhere(bad)[:5].tolist()} of {bad.shape}: {case}"
    if case.softmax:
        np.testing.assert_allclose(lse, wanted_lse, rtol=2e-3, atol=4e-3, err_msg=f"{text} {case}")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 5, None])
def test_against_the_oracle(rng, monkeypatch, shape, depth, workers):
    """With all shared keys read by a launch in front, as the plan chooses, and walked by requests;
    by the Hopper family where it can, and by the decode family everywhere."""
    from tilewright.runtime.cuda import DeviceArray

    for cost in (-(1 << 30), 1, 1 << 30):
        monkeypatch.setattr(ranges, "APART_COST", cost)
        case = drawn(rng, shape, depth, page_size=int(rng.choice([1, 7, 16])))
        kv, q, arrays = on_gpu(case)
        attn = oracle.attention_of(case)
        plan = attn.plan(case.qo_indptr, kv, workers=workers)
        out = DeviceArray.from_numpy(np.full(case.q.shape, np.nan, np.float32))
        bound = attn.bind(q, kv, out, plan=plan, **arrays)
        assert "decode.cuh" in bound.source
        lse = bound().lse.to_numpy()
        first = out.to_numpy()
        close(case, first, lse, str(plan))
        for _ in range(5):  # counters are as they were; the order of arrival changes no bit
            bound()
        assert np.array_equal(first.view(np.uint32), out.to_numpy().view(np.uint32))


@pytest.mark.gpu
def test_plans_of_the_device_agree_exactly(rng, monkeypatch):
    from tilewright.runtime.cuda import DeviceArray

    shapes = SHAPES[0], SHAPES[3]  # causal, and a window
    for cost, depth, shape in itertools.product((-(1 << 30), 1, 20), (1, 2, 3), shapes):
        monkeypatch.setattr(ranges, "APART_COST", cost)
        planner.body.cache_clear()
        case = drawn(rng, shape, depth)
        kv, _, _ = on_gpu(case)
        attn = oracle.attention_of(case)
        requests = max(len(case.qo_indptr) - 1, -(-kv.table.nodes // (depth + 1)))
        tokens = max(1, int(case.qo_indptr[-1]))  # they decide whose the launch in front is
        room = attn.reserve(requests, max_tokens=tokens, shared=depth, kv=kv)
        room.plan(kv.table, DeviceArray.from_numpy(case.qo_indptr))
        plan = attn.plan(case.qo_indptr, kv)
        cuts = room._cuts.to_numpy().view(ranges.CUT.numpy)
        np.testing.assert_array_equal(cuts[: len(plan.cuts)], plan.cuts)
        nodes = room._nodes.to_numpy().view(NODE.numpy)[: kv.table.nodes]
        for name in ("begin", "end", "level"):
            np.testing.assert_array_equal(nodes[name], plan.nodes[name])
        read = plan.nodes["begin"] < plan.nodes["end"]
        for name in ("base", "outer", "joined", "chunks", "item", "row"):
            np.testing.assert_array_equal(nodes[name][read], plan.nodes[name][read])
    planner.body.cache_clear()


@pytest.mark.gpu
def test_a_graph_replays_with_other_suffixes(rng):
    torch = pytest.importorskip("torch")
    case = cascade(rng, SHAPES[0], [1] * 24, [[0, 20, 24]], [700, 65, *[300] * 24])
    kv, _, _ = on_gpu(case)
    attn = oracle.attention_of(case)
    kv_len = torch.from_numpy(case.kv_len).cuda()
    levels = torch.from_numpy(case.shared[0]).cuda()
    indptr, indices = (torch.from_numpy(x).cuda() for x in (case.kv_indptr, case.kv_indices))
    kv = tw.KV(tw.Table.csr(kv_len, indptr, indices, shared=[levels]), kv.pool)
    queries = torch.from_numpy(_bits(case.q).view(np.int16)).cuda().view(torch.bfloat16)
    room = attn.reserve(24, shared=1, kv=kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        room.plan(kv.table)
        state = attn.run(queries, kv, room)
    for lengths, split in (([700, 65, *[300] * 24], 20), ([700, 1, *range(24)], 5), ([0] * 26, 24)):
        case = replace(
            case, kv_len=np.array(lengths, np.int32), shared=(np.array([0, split, 24], np.int32),)
        )
        kv_len.copy_(torch.tensor(lengths, dtype=torch.int32))
        levels.copy_(torch.from_numpy(case.shared[0]))
        graph.replay()
        torch.cuda.synchronize()
        room.check()
        close(case, state.o.float().cpu().numpy(), state.lse.cpu().numpy())
    levels.copy_(torch.tensor([0, 25, 24], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(ArgumentError, match="shared levels of an earlier plan"):
        room.check()
