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
from tests.attention.test_cascade import cascade, close
from tests.attention.test_decode_cuda import close as close_rows

import tilewright as tw
from tilewright import dtypes
from tilewright.attention import families, reference
from tilewright.attention import plan as plans
from tilewright.attention.families import portable
from tilewright.attention.plan import ITEMS
from tilewright.attention.spec import Spec, alone, compile_cuda, params_struct
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


def test_reasons():
    spec = spec_of_shape(SHAPES[0])
    assert portable.TILES.reason(spec, 1000, None) == ""
    for changed, reason in (
        ({"head_dim": 264}, "head_dim"),
        ({"head_dim_vo": 20}, "head_dim"),
        ({"q": dtypes.float32}, "float16"),
    ):
        assert reason in portable.TILES.reason(replace(spec, **changed), 1, None)


def simulated_result(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """o and lse of the kernel, by a plan that is made on the host."""
    attn, table = oracle.attention_of(case), oracle.table_of(case)
    kv, traced = tw.KV(table, tw.Pool(case.k, case.v)), attn.variant.traced
    kind = dtypes.ALL[case.q.dtype.name]
    spec = Spec(attn.group, *case.dims, kind, kind, kind, traced, table.form, attn.scale > 0)
    known = {n: x for n, x in attn.variant.fixed if np.isscalar(x)}
    family = portable.TILES
    shape = plans.Shape(family.name, attn.kv_heads, attn.group, traced.mask, known,
                        family.qo_tile(spec), "", 0, None)  # fmt: skip
    lengths = kv.lengths()
    plan = plans.make(case.qo_indptr, lengths, shape, 7, table.tree(lengths))
    o, lse, numbers, _kept = simulated.arguments(case, attn, kv, plan.tokens, case.q.dtype)
    work = {"qo_indptr": plan.qo_indptr.ctypes.data, "items": plan.items.ctypes.data}
    block = params_struct(spec, ITEMS).pack(**numbers, **work)
    run = simulated.kernel(alone(portable.body(spec, tiles=True)))
    simulated.launch(run, block, portable.THREADS, len(plan.items), 3)
    return o.astype(np.float64), lse


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dim_vo", "counts", "lengths"),
    [
        ((4, 2, 128, ml_dtypes.bfloat16, "causal", "scores", ""), 128, [70, 1, 0], [170, 3, 40]),
        ((7, 1, 80, np.float16, "window", "alibi", "per head"), 72, [5, 40, 2], [300, 40, 0]),
        ((1, 3, 64, np.float16, "first and last", "softcap", ""), 64, [150, 3], [150, 257]),
        ((64, 1, 16, np.float16, "causal", "scores", "per head"), 16, [2, 1], [33, 64]),
        ((2, 1, 256, ml_dtypes.bfloat16, "causal", "scores", ""), 256, [33, 1, 2], [65, 31, 1]),
    ],
)
def test_on_simulated_warps(rng, shape, dim_vo, counts, lengths):
    case = cascade(rng, shape, counts, [], lengths, page_size=int(rng.choice([1, 7, 16])))
    case = replace(case, v=case.v[..., :dim_vo])
    o, lse = simulated_result(case)
    close(case, o, lse)


# ---------------------------------------------------------------------------- on a GPU


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
