"""The kernel of tensor cores for every GPU: no spills, its own text on simulated warps against the
oracle, and the right values on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention import oracle, simulated
from tests.attention.cases import ALL_VARIANTS, TYPES, arrays_of, csr, paged, queries, spec_of
from tests.attention.cases import values_of as drawn_values
from tests.attention.oracle import Case
from tests.attention.test_cascade import cascade, close, on_gpu
from tests.attention.test_decode_cuda import close as close_rows

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import families, reference
from tilewright.attention import plan as plans
from tilewright.attention.families import portable
from tilewright.attention.plan import ITEM, ITEMS
from tilewright.attention.spec import Spec, alone, compile_cuda, params_struct
from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.toolchain import compilers, nvrtc

needs_compiler = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
SHAPES = [  # group, head_dim, head_dim_vo, dtype, variant
    (4, 128, 128, "bfloat16", "causal"),
    (1, 64, 64, "float16", "softcap_alibi"),
    (12, 256, 256, "bfloat16", "window"),
    (3, 192, 128, "float16", "full"),
    (5, 72, 40, "bfloat16", "strange"),
    (2, 8, 24, "float16", "alibi"),
]
IDS = ["-".join(map(str, s)) for s in SHAPES]


def spec_of_shape(shape: tuple[Any, ...], o: str = "") -> Spec:
    group, dim, dim_vo, kind, name = shape
    return replace(spec_of(group, dim, kind, kind, ALL_VARIANTS[name], o), head_dim_vo=dim_vo)


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_cubin_without_spills(arch, shape):
    """The numbers that Python launches with are those of the kernel, too."""
    spec = spec_of_shape(shape)
    text = alone(portable.body(spec, tiles=True))
    wanted = {"SMEM_BYTES": portable.smem_bytes(spec, tiles=True), "THREADS": portable.THREADS}
    for name, value in (wanted | {"ROWS": portable.tiles_of(spec)[0]}).items():
        text += f'\nstatic_assert(body0::flash::{name} == {value}, "");'
    used = compile_cuda(text, arch).resources["stage0"]
    assert used.spill_bytes == 0 and 0 < used.registers <= 255
    assert portable.smem_bytes(spec, tiles=True) <= 99 << 10  # of a CTA on sm_86 and sm_89


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("tiles", [False, True], ids=["portable", "tiles"])
def test_cubins_of_shared_keys(tiles):
    spec = spec_of(4, 128, "bfloat16", "bfloat16", tw.Causal(), shared=1)
    used = compile_cuda(alone(portable.body(spec, tiles)), "sm_80").resources["stage0"]
    assert used.spill_bytes == 0 and 0 < used.registers <= 255


def test_reasons():
    spec = spec_of_shape(SHAPES[0])
    assert portable.TILES.reason(spec, 1000, None) == ""
    for changed, reason in (
        ({"head_dim": 264}, "head_dim"),
        ({"head_dim_vo": 20}, "head_dim"),
        ({"q": dtypes.float32}, "float16"),
    ):
        assert reason in portable.TILES.reason(replace(spec, **changed), 1, None)


def simulated_result(
    case: Case, seed: int = 3, family: Any = portable.TILES, own: slice | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """o and lse of the kernel, by a plan that is made on the host; by `StepPlans`, in random order,
    if only requests `own` have queries and the next one has no keys."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    kv, traced = tw.KV(table, tw.Pool(case.k, case.v)), attn.variant.traced
    kind = dtypes.ALL[case.q.dtype.name]
    spec = Spec(attn.group, *case.dims, kind, kind, kind, traced, table.form, attn.scale > 0)
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    shape = plans.Shape(family.name, attn.kv_heads, attn.group, traced.mask, known,
                        family.qo_tile(spec), "", 0, None)  # fmt: skip
    lengths = kv.lengths()
    plan = plans.make(case.qo_indptr, lengths, shape, 7, table.tree(lengths))
    items = plan.items
    if own is not None:
        planner = plans.StepPlans(shape, table.requests, 999, 7, 0)
        indptr = case.qo_indptr[own.start : own.stop + 1]
        words, end = planner.work(256, indptr, lengths[own], own.start), table.requests + 1
        items = np.random.default_rng(seed).permutation(words[end:].view(ITEM.numpy))
        assert (words[:end] == plan.qo_indptr).all() and (items["qo_end"] == 0).sum() > 8
    o, lse, numbers, _kept = simulated.arguments(case, attn, kv, plan.tokens, case.q.dtype)
    numbers |= {} if case.softmax else {"lse": 0}
    assert plan.walks == bool(case.shared) and plans.Plan.load(plan.save()) == plan
    work = {"qo_indptr": plan.qo_indptr.ctypes.data, "items": items.ctypes.data}
    work |= {"nodes": plan.nodes.ctypes.data} if case.shared else {}
    block = params_struct(spec, ITEMS).pack(**numbers, **work)
    run = simulated.kernel(alone(portable.body(spec, tiles=family is portable.TILES)))
    simulated.launch(run, block, portable.THREADS, len(items), seed, (o, lse))
    return o.astype(np.float64), lse


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dim_vo", "counts", "lengths", "shared"),
    [
        ((4, 2, 128, ml_dtypes.bfloat16, "causal", "scores", ""), 128, [70, 1, 0], [170, 3, 40],
         []),
        ((7, 1, 80, np.float16, "window", "alibi", "per head"), 72, [5, 40, 2], [300, 40, 0], []),
        ((1, 3, 64, np.float16, "first and last", "softcap", ""), 64, [150, 3], [150, 257], []),
        ((64, 1, 16, np.float16, "causal", "scores", "per head"), 16, [2, 1], [33, 64], []),
        ((2, 1, 256, ml_dtypes.bfloat16, "causal", "scores", ""), 256, [33, 1, 2], [65, 31, 1], []),
        ((4, 2, 128, ml_dtypes.bfloat16, "causal", "scores", ""), 128, [70, 1, 0], [90, 170, 3, 40],
         [[0, 3]]),
        ((2, 1, 64, np.float16, "window", "alibi", "per head"), 64, [40, 5, 2, 90],
         [33, 0, 64, 1, 70, 80, 40, 0, 100], [[0, 3, 4], [0, 1, 3, 4]]),
    ],
)  # fmt: skip
def test_on_simulated_warps(rng, shape, dim_vo, counts, lengths, shared):
    case = cascade(rng, shape, counts, shared, lengths, page_size=int(rng.choice([1, 7, 16])))
    case = replace(case, v=case.v[..., :dim_vo])
    o, lse = simulated_result(case)
    close(case, o, lse)


LEFT = [  # shape, queries and keys of each request, page size, which requests are those of the step
    ((4, 2, 128, ml_dtypes.bfloat16, "causal", "scores", ""), [0, 70, 1, 40, 0, 0],
     [9, 170, 3, 300, 0, 5], 16, slice(1, 4)),
    ((1, 2, 64, np.float16, "window", "scores", ""), [130, 0], [260, 0], 8, slice(0, 1)),
    ((2, 1, 256, np.float16, "causal", "softcap", ""), [70, 40, 0], [150, 40, 0], 64, slice(0, 2)),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("case", LEFT, ids=lambda c: "-".join(map(str, c[0][:3])))
@pytest.mark.parametrize("family", [portable.TILES, portable.FAMILY], ids=["tiles", "portable"])
def test_items_that_a_step_does_not_need(rng, family, case):
    """They have no query and no key, in any order: nothing is written for them."""
    shape, counts, lengths, page_size, own = case
    drawn = cascade(rng, shape, counts, [], lengths, page_size)
    for seed in range(2):
        close(drawn, *simulated_result(drawn, seed, family, own))


def test_plans_that_walk_shared_keys_are_checked(rng):
    """Each request's own items cover its rows; links and items from outside are not trusted."""
    case = cascade(rng, (1, 2, 16, np.float16, "causal", "scores", ""), [3, 200, 0, 9],
                   [[0, 3, 4]], [900, 20, 5, 70, 1, 30])  # fmt: skip
    table = oracle.table_of(case)
    shape = plans.Shape("tiles", 2, 1, tw.Causal().traced.mask, {}, 128, "", 0, None)
    lengths = np.asarray(case.kv_len, np.int64)
    plan = plans.make(case.qo_indptr, lengths, shape, 7, table.tree(lengths))
    assert plan.walks and plan.items["request"].min() == 2  # two nodes are shared
    assert plan.nodes["outer"].tolist() == [-1, -1, 0, 0, 0, 1]
    assert replace(plan) == plan
    for name, at, to in (("outer", 2, 1), ("outer", 0, 0), ("chunks", 0, 1)):
        nodes = plan.nodes.copy()
        nodes[name][at] = to
        with pytest.raises(ArgumentError, match="A109"):
            replace(plan, nodes=nodes)
    with pytest.raises(ArgumentError, match="A109"):
        replace(plan, items=plan.items[1:])
    kv = tw.KV(table, tw.Pool(case.k, case.v))
    attn = oracle.attention_of(case)
    on_cpu = attn.plan(case.qo_indptr, kv)
    assert not on_cpu.walks
    shape = replace(shape, family="cpu", qo_tile=on_cpu.qo_tile)
    plan = plans.make(case.qo_indptr, lengths, shape, 7, table.tree(lengths))
    with pytest.raises(ArgumentError, match="its work is not for cpu"):  # that divides nodes
        attn.run(case.q, kv, plan)


@needs_compiler
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("rows", [name for name in oracle.ROWS if name])
def test_hooks_of_rows_on_simulated_warps(rng, rows, softmax):
    """Also where keys are shared."""
    kind, dim, shared = (np.float16, 80, []) if softmax else (ml_dtypes.bfloat16, 128, [[0, 3]])
    lengths = [70] * len(shared) + [170, 3, 40]
    case = cascade(rng, (3, 2, dim, kind, "window", "scores", ""), [50, 1, 2], shared, lengths, 7)
    values = oracle.draw_row_values(rng, oracle.ROWS[rows][2], case.heads, (3, 53, 3000))
    case = replace(case, rows=rows, softmax=softmax, narrow=True, values=case.values | values)
    close(case, *simulated_result(case))


@needs_compiler
@pytest.mark.parametrize("shared", [[], [[0, 3]]], ids=["alone", "shared"])
def test_outputs_wait_for_copied_queries(rng, shared):
    """Of requests without keys no tile waits for the copies of their queries, and outputs that a
    variant changes are staged where queries lie."""
    shape, counts = (3, 2, 80, np.float16, "causal", "scores", ""), [50, 1, 2]
    case = cascade(rng, shape, counts, shared, [0] * len(shared) + [0, 3, 0], page_size=7)
    assert not case.q.ctypes.data % 16  # so q is copied without registers
    values = oracle.draw_row_values(rng, oracle.ROWS["gated"][2], case.heads, (3, 53, 3000))
    case = replace(case, rows="gated", narrow=True, values=case.values | values)
    for seed in range(4):
        close(case, *simulated_result(case, seed))


# ---------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", [portable.TILES, portable.FAMILY], ids=["tiles", "portable"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_requests_that_share_keys(monkeypatch, rng, family, depth, dim):
    """Prompts behind shared prefixes, more rows than the decode family takes."""
    from tilewright.runtime.cuda import DeviceArray

    shape = (4, 2, dim, ml_dtypes.bfloat16, "causal", "softcap", "per head")
    requests = 12
    shared = [x.tolist() for x in oracle.draw_levels(rng, requests, depth)]
    nodes = requests + sum(len(x) - 1 for x in shared)
    lengths = [int(rng.integers(0, rng.choice([2, 70, 900]))) for _ in range(nodes)]
    counts = [int(n) for n in rng.integers(0, 90, requests)]
    case = cascade(rng, shape, counts, shared, lengths, page_size=int(rng.choice([1, 7, 16])))
    kv, q, arrays = on_gpu(case)
    attn = oracle.attention_of(case)
    assert attn.resolve(kv, qo_len=90).chosen == "tiles"
    monkeypatch.setattr(families, "FAMILIES", (family,))
    out = DeviceArray.from_numpy(np.full(case.q.shape, np.nan, np.float32))
    bound = attn.bind(q, kv, out, plan=attn.plan(case.qo_indptr, kv), **arrays)
    lse = bound().lse.to_numpy()
    close(case, out.to_numpy(), lse)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "chosen"),
    [(128, ml_dtypes.bfloat16, "hopper"), (72, np.float16, "tiles"), (64, np.float32, "portable")],
)
def test_invariant_plans(rng, dim, dtype, chosen):
    """The same bits alone, among others and for any number of workers."""
    shape = (4, 2, dim, dtype, "causal", "scores", "")
    counts = [1, 40, 1, 3, 300, 2, 1, 17]
    lengths = [9000, 3000, 1, 700, 5000, 30000, 64, 17]
    case = cascade(rng, shape, counts, [], lengths)
    kv, q, _ = on_gpu(case)
    attn, results = oracle.attention_of(case), []
    for workers in (None, 3, 40):
        plan = attn.plan(
            case.qo_indptr, kv, workers=workers, q_dtype=case.q.dtype.name, invariant=True
        )
        if cuda.device(0).arch == "sm_90a":
            assert plan.family == chosen
        results.append(attn.run(q, kv, plan).o.to_numpy().view(np.uint8))
        assert np.array_equal(results[0], results[-1])
    for request, begin in enumerate(case.qo_indptr[:-1]):
        end = case.qo_indptr[request + 1]
        pages = case.kv_indices[case.kv_indptr[request] : case.kv_indptr[request + 1]]
        alone = replace(
            case, q=case.q[begin:end], qo_indptr=np.array([0, end - begin], np.int32),
            kv_len=case.kv_len[request : request + 1], kv_indices=pages,
            kv_indptr=np.array([0, len(pages)], np.int32),
        )  # fmt: skip
        kv, q, _ = on_gpu(alone)
        plan = attn.plan(alone.qo_indptr, kv, q_dtype=case.q.dtype.name, invariant=True)
        found = attn.run(q, kv, plan).o.to_numpy().view(np.uint8)
        assert np.array_equal(found, results[0][begin:end]), request


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("page_size", [1, 16, 7])
def test_against_the_reference(monkeypatch, rng, shape, page_size):
    """Lengths around tiles, with NaN where no key is; repeats give the same bits."""
    from tilewright.runtime.cuda import DeviceArray

    monkeypatch.setattr(families, "FAMILIES", (portable.TILES,))  # others would be preferred
    group, dim, dim_vo, kind, name = shape
    variant, kv_heads = ALL_VARIANTS[name], 2
    attn = tw.Attention(group * kv_heads, kv_heads, dim, variant, head_dim_vo=dim_vo)
    lengths = [0, 1, 31, 32, 33, 64, 65, 500, 1300, 7]
    counts = [2, 1, 31, 40, 1, 64, 0, 300, 129, 20]
    whole = paged(rng, lengths, (page_size, kv_heads, max(dim, dim_vo)), TYPES[kind])
    k, v, kv_len, indptr, names = arrays_of(whole)
    k, v = (np.ascontiguousarray(x[..., :n]) for x, n in ((k, dim), (v, dim_vo)))
    kv = csr(k, v, indptr, names, kv_len)
    q, qo_indptr = queries(rng, counts, group * kv_heads, dim, TYPES[kind])
    values = drawn_values(rng, variant, group * kv_heads, kv_heads)
    bits = (lambda a: a.view(np.uint16)) if kind == "bfloat16" else lambda a: a
    pages = (DeviceArray.from_numpy(bits(x), kind) for x in (k, v))
    there = csr(*pages, *map(DeviceArray.from_numpy, (indptr, names, kv_len)))
    on_card: dict[str, Any] = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    plan = attn.plan(qo_indptr, there)
    wanted = reference.attention(q, kv, qo_indptr, variant, **values)
    bound = attn.bind(DeviceArray.from_numpy(bits(q), kind), there, plan=plan, **on_card)
    assert "flash_tiles.cuh" in bound.source
    close_rows(bound(), wanted)
    first = bound.state.lse.to_numpy()
    for _ in range(10):
        bound()
    assert np.array_equal(first.view(np.uint32), bound.state.lse.to_numpy().view(np.uint32))
