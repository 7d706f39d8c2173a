"""The decode family: no spills, reasons for what it cannot run, and the right values."""

from __future__ import annotations

import numpy as np
import pytest
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, values_of
from tests.attention.test_flash_cuda import _bits, on_device

from tilewright import dtypes
from tilewright.attention import decode, flash, ranges, reference
from tilewright.attention.batch import Attention
from tilewright.attention.merge import State
from tilewright.toolchain import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
SHAPES = [  # group, kv_heads, head_dim, dtype, variant
    (4, 8, 128, "bfloat16", "causal"),
    (3, 3, 64, "float16", "full"),
    (16, 1, 128, "bfloat16", "softcap_alibi"),
    (1, 5, 80, "float16", "window"),
    (8, 2, 8, "bfloat16", "strange"),
    (5, 4, 72, "float16", "window"),
]
IDS = ["-".join(map(str, s)) for s in SHAPES]


def spec_of(shape) -> flash.Spec:
    group, _, head_dim, name, variant = shape
    kind = dtypes.ALL[name]
    return flash.Spec(group, head_dim, kind, kind, ALL_VARIANTS[variant].traced)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_cubin_without_spills(arch, shape):
    cubin = decode.compile_cuda(spec_of(shape), ranges.heads_at_once(shape[1]), arch)
    used = cubin.resources["stage0"]
    assert used.spill_bytes == 0 and 0 < used.registers <= 255


@needs_nvrtc
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_constants_are_those_of_the_kernel(shape):
    spec = spec_of(shape)
    wanted = {
        "SMEM_BYTES": decode.smem_bytes(spec), "THREADS": decode.THREADS, "TILE": ranges.TILE,
        "2 * attention::PARTIAL": decode.partial_floats(spec, 1), "KEYS": decode.KEYS,
        "M": decode.ROWS,
    }  # fmt: skip
    text = decode.source(spec, 1)
    for name, value in wanted.items():
        name = name if "attention::" in name else f"attention::{name}"
        text += f'\nstatic_assert({name} == {value}, "");'
    nvrtc.compile_cuda(text, arch="sm_80", headers=flash.cuda_headers())


def test_reasons():
    spec = flash.Spec(4, 128, dtypes.bfloat16, dtypes.bfloat16, ALL_VARIANTS["full"].traced)
    names = ("k", "v", "o", "q", "q_token", "q_head", "k_page", "k_slot", "k_head", "v_page")
    fields: dict[str, int] = dict.fromkeys((*names, "v_slot", "v_head"), 1024)
    assert decode.hosts(spec, np.array([0, 1, 1, 5]), fields) == ""
    assert "20 rows" in decode.hosts(spec, np.array([0, 5]), fields)
    for name in ("k", "v_slot", "o"):
        assert "16 bytes" in decode.hosts(spec, np.array([0, 1]), fields | {name: 1028})
    assert "rows of q" in decode.hosts(spec, np.array([0, 1]), fields | {"q_head": 1025})
    for other, reason in (
        (flash.Spec(4, 128, dtypes.float32, dtypes.bfloat16, spec.traced), "float16"),
        (flash.Spec(4, 136, dtypes.float16, dtypes.float16, spec.traced), "head_dim"),
        (flash.Spec(4, 100, dtypes.float16, dtypes.float16, spec.traced), "head_dim"),
    ):
        assert reason in decode.hosts(other, np.array([0, 1]), fields)


# ---------------------------------------------------------------------------- on a GPU


def close(state: State, wanted: State) -> None:
    """Rows of 16-bit products: relative error of each row, and the logarithm of the sums."""
    o, lse = state.o.to_numpy().astype(np.float64), state.lse.to_numpy()
    size = np.linalg.norm(wanted.o, axis=-1)
    assert (np.linalg.norm(o - wanted.o, axis=-1) <= 8e-3 * size + 1e-6).all()
    np.testing.assert_allclose(lse, wanted.lse, rtol=2e-3, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("page_size", [1, 16, 7])
@pytest.mark.parametrize("workers", [1, 3, None])
def test_against_the_reference(rng, shape, page_size, workers):
    from tilewright.runtime.cuda import DeviceArray

    group, kv_heads, head_dim, kind, name = shape
    variant = ALL_VARIANTS[name]
    attn = Attention(group * kv_heads, kv_heads, head_dim, variant)
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 127, 1000, 0, 2111, 5, 0]
    kv = paged(rng, lengths, (page_size, kv_heads, head_dim), TYPES[kind])
    counts = [1] * len(lengths) if group > 8 else [1, 2, 0, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 0]
    q, indptr = queries(rng, counts, group * kv_heads, head_dim, TYPES[kind])
    values = values_of(rng, variant, group * kv_heads, kv_heads)
    there = on_device(kv)
    on_card = {n: DeviceArray.from_numpy(v) for n, v in values.items()}
    plan = attn.plan(indptr, there, workers=workers)
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    bound = attn.bind(DeviceArray.from_numpy(_bits(q), kind), there, out, plan=plan, **on_card)
    assert "decode.cuh" in bound.source
    wanted = reference.attention(q, kv, indptr, variant, **values)
    close(bound(), wanted)
    first = out.to_numpy()
    for _ in range(20):  # the counters are as they were, and the order of arrival changes no bit
        bound()
    assert np.array_equal(first.view(np.uint32), out.to_numpy().view(np.uint32))


@pytest.mark.gpu
def test_values_that_nobody_sees(rng):
    """NaN and Inf behind lengths, before a window and in unused pages do not matter."""
    from tilewright.runtime.cuda import DeviceArray

    attn = Attention(8, 2, 64, ALL_VARIANTS["window"])
    kv = paged(rng, [500, 70, 3], (16, 2, 64), TYPES["float16"])
    q, indptr = queries(rng, [1, 1, 1], 8, 64, TYPES["float16"])
    values = values_of(rng, attn.variant, 8, 2)
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    k, v = (np.asarray(a) for a in kv.arrays[:2])
    window = int(dict(attn.variant.fixed).get("window", values.get("window", 0)))
    assert 0 < window < 400
    pages = kv.arrays[3][: (500 - window) // 16]
    k[pages], v[pages] = np.nan, np.inf
    there = on_device(kv)
    on_card = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    plan = attn.plan(indptr, there, workers=5)
    close(attn.run(DeviceArray.from_numpy(q), there, plan, **on_card), wanted)


@pytest.mark.gpu
def test_a_graph_replays_with_a_growing_length(rng):
    from tilewright.runtime.cuda import DeviceArray, Graph

    kv = paged(rng, [900, 900], (300, 3, 64), TYPES["float16"])
    there = on_device(kv)
    q, _ = queries(rng, [1, 1], 9, 64, TYPES["float16"])
    attn = Attention(9, 3, 64)
    bound = attn.bind(DeviceArray.from_numpy(q), there)
    assert "decode.cuh" in bound.source
    graph = Graph([bound.launch])
    for last in ([0, 300], [1, 65], [299, 2], [300, 300]):
        kv.arrays[4][:] = last
        there.arrays[4].copy_from(kv.arrays[4])
        graph.launch()
        close(bound.state, reference.attention(q, kv, [0, 1, 2], attn.variant))
