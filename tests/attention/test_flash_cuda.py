"""The portable CUDA kernel: it compiles everywhere, and gives the reference's values."""

from __future__ import annotations

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
    spec_of,
    values_of,
)

from tilewright.attention import families, reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import portable
from tilewright.attention.kv import KV
from tilewright.attention.spec import alone, compile_cuda
from tilewright.codegen import prelude_files
from tilewright.toolchain import nvrtc

ARCHS = ("sm_80", "sm_90a", "sm_100a")
SHAPES = [  # group, head_dim, q, kv, variant
    (3, 64, "float32", "float32", "causal"),
    (8, 128, "bfloat16", "bfloat16", "softcap_alibi"),
    (4, 80, "float16", "float16", "window"),
    (1, 256, "float32", "bfloat16", "full"),
    (12, 96, "float16", "float32", "strange"),
]


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_cubin_without_spills(arch, shape):
    group, head_dim, q, kv, name = shape
    spec = spec_of(group, head_dim, q, kv, ALL_VARIANTS[name])
    cubin = compile_cuda(alone(portable.body(spec)), arch)
    assert cubin.image[:4] == b"\x7fELF"
    assert cubin.resources["stage0"].spill_bytes == 0
    assert 0 < cubin.resources["stage0"].registers <= 255


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_shared_memory_is_what_the_kernel_says():
    spec = spec_of(2, 80, "float32", "float32", ALL_VARIANTS["full"])
    check = f'static_assert(body0::flash::SMEM_BYTES == {portable.smem_bytes(spec)}, "");'
    check += f'static_assert(body0::flash::THREADS == {portable.THREADS}, "");'
    check += f'static_assert(body0::flash::ROWS == {portable.ROWS}, "");'
    source = alone(portable.body(spec)) + "\n" + check
    nvrtc.compile_cuda(source, arch="sm_80", headers=prelude_files.headers())


# ---------------------------------------------------------------------------- on a GPU


def on_device(kv: KV) -> KV:
    """The same cache in GPU memory."""
    from tilewright.runtime.cuda import DeviceArray

    k, v = (DeviceArray.from_numpy(_bits(a), kv.pool.dtype) for a in arrays_of(kv)[:2])
    kv_len, kv_indptr, kv_indices = (DeviceArray.from_numpy(a) for a in arrays_of(kv)[2:])
    return csr(k, v, kv_indptr, kv_indices, kv_len)


def _bits(a: np.ndarray) -> np.ndarray:
    return a.view(np.uint16) if a.dtype.name == "bfloat16" else a


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("page_size", [1, 16, 7])
def test_against_the_reference(monkeypatch, rng, shape, page_size):
    from tilewright.runtime.cuda import DeviceArray

    monkeypatch.setattr(families, "FAMILIES", (portable.FAMILY,))  # others would be preferred

    group, head_dim, q_type, kv_type, name = shape
    variant = ALL_VARIANTS[name]
    attn = Attention(2 * group, 2, head_dim, variant)
    kv = paged(rng, [70, 1, 5, 40, 300, 0, 0], (page_size, 2, head_dim), TYPES[kv_type])
    q, indptr = queries(rng, [3, 1, 0, 40, 1, 1, 2], 2 * group, head_dim, TYPES[q_type])
    values = values_of(rng, variant, 2 * group, 2)
    there = on_device(kv)
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    state = attn.run(
        DeviceArray.from_numpy(_bits(q), q_type),
        there,
        attn.plan(indptr, there, q_dtype=q_type),
        out=out,
        **{n: DeviceArray.from_numpy(v) for n, v in values.items()},
    )
    wanted = reference.attention(q, kv, indptr, variant, **values)
    np.testing.assert_allclose(state.o.to_numpy(), wanted.o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.lse.to_numpy(), wanted.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_replays_with_a_growing_length(rng):
    from tilewright.runtime.cuda import DeviceArray, Graph

    kv = paged(rng, [300], (300, 3, 64))
    there = on_device(kv)
    q, _ = queries(rng, [1], 9, 64)
    attn = Attention(9, 3, 64)
    bound = bind(attn, DeviceArray.from_numpy(q), there)
    graph = Graph([bound.launch])
    for length in (0, 1, 65, 300):
        arrays_of(kv)[2][0] = length
        arrays_of(there)[2].copy_from(arrays_of(kv)[2])
        graph.launch()
        wanted = reference.attention(q, kv, [0, 1], attn.variant)
        np.testing.assert_allclose(bound.state.o.to_numpy(), wanted.o, rtol=1e-5, atol=1e-5)
