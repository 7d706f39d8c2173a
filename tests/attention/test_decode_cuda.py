"""The decode family: no spills, reasons for what it cannot run, and the right values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.attention.cases import (
    ALL_VARIANTS,
    TYPES,
    arrays_of,
    bind,
    csr,
    paged,
    queries,
    values_of,
)
from tests.attention.cases import spec_of as cases_spec
from tests.attention.test_flash_cuda import _bits, on_device

from tilewright.attention import ranges, reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import decode
from tilewright.attention.merge import State
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, alone, compile_cuda
from tilewright.runtime.view import view
from tilewright.toolchain import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
SHAPES = [  # group, kv_heads, head_dim, dtype, variant
    (4, 8, 128, "bfloat16", "causal"),
    (3, 3, 64, "float16", "full"),
    (16, 1, 128, "bfloat16", "softcap_alibi"),
    (1, 5, 80, "float16", "window"),
    (8, 2, 8, "bfloat16", "strange"),
    (5, 4, 72, "float16", "window"),
    (8, 2, 256, "bfloat16", "causal"),
    (16, 1, 256, "float16", "softcap_alibi"),
    (4, 3, 136, "bfloat16", "window"),
    (3, 2, 200, "float16", "strange"),
    (16, 2, 192, "bfloat16", "full"),
]
IDS = ["-".join(map(str, s)) for s in SHAPES]


def spec_of(shape, o="") -> Spec:
    group, _, head_dim, name, variant = shape
    return cases_spec(group, head_dim, name, name, ALL_VARIANTS[variant], o)


# Each shape with the blocks of 8 packed rows that the family takes, and values shorter than keys.
KERNELS = [(shape, shape[2], blocks) for shape in SHAPES for blocks in (1, 2)]
KERNELS += [(SHAPES[-1], 128, blocks) for blocks in (1, 2)]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(("shape", "dim_vo", "blocks"), KERNELS)
def test_cubin_without_spills(arch, shape, dim_vo, blocks):
    """The numbers that Python launches with are those of the kernel, too: assertions make no code,
    and a kernel takes a second to compile."""
    spec = replace(spec_of(shape), head_dim_vo=dim_vo)
    wanted = {
        "SMEM_BYTES": decode.smem_bytes(spec, blocks), "THREADS": decode.THREADS,
        "2 * body0::attention::PARTIAL": decode.partial_floats(dim_vo, blocks, 1)[0],
        "TILE": ranges.TILE, "KEYS": decode.KEYS, "ROWS": 8 * blocks,
    }  # fmt: skip
    text = alone(decode.body(spec, ranges.head_block(shape[1]), blocks))
    for name, value in wanted.items():
        name = name if "attention::" in name else f"body0::attention::{name}"
        text += f'\nstatic_assert({name} == {value}, "");'
    used = compile_cuda(text, arch).resources["stage0"]
    most = 64 if arch == "sm_80" else 0  # some words around the merge of partial states
    assert used.spill_bytes <= most and 0 < used.registers <= 255


def test_reasons():
    causal = ALL_VARIANTS["causal"]
    spec = cases_spec(4, 128, "bfloat16", "bfloat16", causal)
    assert decode.refuses(spec, 16, None) == "" and "20 rows" in decode.refuses(spec, 20, None)
    k = np.zeros(4096, TYPES["bfloat16"])
    k = k[(-k.ctypes.data // 2) % 8 :]  # aligned to 16 bytes
    pages = k[: 2 * 4 * 2 * 128].reshape(2, 4, 2, 128)
    assert decode.refuses(spec, 16, Pool(pages, pages)) == ""
    off = k[1 : 1 + pages.size].reshape(pages.shape)
    wide = k[: 2 * 4 * 2 * 132].reshape(2, 4, 2, 132)[..., :128]
    for unaligned in (Pool(off, pages), Pool(pages, off), Pool(pages, wide)):
        assert "16 bytes" in decode.refuses(spec, 16, unaligned)
    for args, reason in (
        ((4, 128, "float32", "bfloat16"), "float16"),
        ((4, 264, "float16", "float16"), "head_dim"),
        ((4, 100, "float16", "float16"), "head_dim"),
    ):
        assert reason in decode.refuses(cases_spec(*args, causal), 4, None)
    long = cases_spec(4, 256, "float16", "float16", causal)
    assert decode.refuses(long, 16, None) == "" and "20 rows" in decode.refuses(long, 20, None)
    assert "longer" in decode.refuses(replace(long, head_dim=192), 4, None)
    shared = cases_spec(4, 136, "float16", "float16", causal, shared=1)
    assert "shared" in decode.refuses(shared, 4, None)


# ---------------------------------------------------------------------------- on a GPU


def close(state: State, wanted: State) -> None:
    """Rows of 16-bit products: relative error of each row, and the logarithm of the sums."""
    rounding = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[view(state.o).dtype.name]
    o, lse = reference.as_float64(state.o), reference.as_float64(state.lse)
    size = np.linalg.norm(wanted.o, axis=-1)
    assert (np.linalg.norm(o - wanted.o, axis=-1) <= (8e-3 + rounding) * size + 1e-6).all()
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
    on_card: dict[str, Any] = {n: DeviceArray.from_numpy(v) for n, v in values.items()}
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
@pytest.mark.parametrize("shape", [(4, 2, 128, 64, 4), (5, 3, 80, 72, 3), (2, 2, 192, 128, 8)])
@pytest.mark.parametrize("name", ["window", "softcap_alibi"])
def test_many_queries_and_short_values(rng, shape, name):
    """Up to 16 packed rows of a request; values shorter than keys."""
    from tilewright.runtime.cuda import DeviceArray

    group, kv_heads, dim, dim_vo, most = shape
    variant = ALL_VARIANTS[name]
    attn = Attention(group * kv_heads, kv_heads, dim, variant, head_dim_vo=dim_vo)
    kv = paged(rng, [0, 5, 700, 64, 2111], (16, kv_heads, dim), TYPES["float16"])
    k, v, *table = arrays_of(kv)
    kv = csr(k, v[..., :dim_vo], table[1], table[2], table[0])
    q, indptr = queries(rng, [1, most, most - 1, 0, most], group * kv_heads, dim, TYPES["float16"])
    values = values_of(rng, variant, group * kv_heads, kv_heads)
    there = csr(*map(DeviceArray.from_numpy, (k, np.ascontiguousarray(v[..., :dim_vo]), table[1],
                                              table[2], table[0])))  # fmt: skip
    on_card: dict[str, Any] = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    for workers in (1, 7, None):
        plan = attn.plan(indptr, there, workers=workers)
        bound = attn.bind(DeviceArray.from_numpy(q), there, plan=plan, **on_card)
        assert "decode.cuh" in bound.source
        close(bound(), reference.attention(q, kv, indptr, variant, **values))


@pytest.mark.gpu
def test_values_that_nobody_sees(rng):
    """NaN and Inf behind lengths, before a window and in unused pages do not matter."""
    from tilewright.runtime.cuda import DeviceArray

    attn = Attention(8, 2, 64, ALL_VARIANTS["window"])
    kv = paged(rng, [500, 70, 3], (16, 2, 64), TYPES["float16"])
    q, indptr = queries(rng, [1, 1, 1], 8, 64, TYPES["float16"])
    values = values_of(rng, attn.variant, 8, 2)
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    k, v = arrays_of(kv)[:2]
    window = int(dict(attn.variant.fixed).get("window", values.get("window", 0)))
    assert 0 < window < 400
    pages = arrays_of(kv)[4][: (500 - window) // 16]
    k[pages], v[pages] = np.nan, np.inf
    there = on_device(kv)
    on_card: dict[str, Any] = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    plan = attn.plan(indptr, there, workers=5)
    close(attn.run(DeviceArray.from_numpy(q), there, plan, **on_card), wanted)


@pytest.mark.gpu
def test_a_graph_replays_with_a_growing_length(rng):
    from tilewright.runtime.cuda import DeviceArray, Graph

    kv = paged(rng, [900, 900], (300, 3, 64), TYPES["float16"])
    there = on_device(kv)
    q, _ = queries(rng, [1, 1], 9, 64, TYPES["float16"])
    attn = Attention(9, 3, 64)
    bound = bind(attn, DeviceArray.from_numpy(q), there)
    assert "decode.cuh" in bound.source
    graph = Graph([bound.launch])
    for lengths in ([600, 900], [601, 665], [899, 602], [0, 1]):
        arrays_of(kv)[2][:] = lengths
        arrays_of(there)[2].copy_from(arrays_of(kv)[2])
        graph.launch()
        close(bound.state, reference.attention(q, kv, [0, 1, 2], attn.variant))
