"""Every CUDA kernel of the operators, compiled without a GPU for each architecture it ships for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import tilewright as tw
from tilewright.ops import activation, embedding, linear, rmsnorm, rope, sampling
from tilewright.ops.sddmm import sddmm_kernel
from tilewright.ops.spmm import by_length, powers, spmm_kernel
from tilewright.runtime import nvrtc
from tilewright.runtime.kernel import Kernel

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")

ARCHS = ("sm_80", "sm_90a", "sm_100a")
KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
LENGTHS = by_length(powers(32))


def _linear(kind: str, n: int, k: int) -> Callable[[str], Kernel]:
    return lambda t: linear.linear_kernel(kind, False, n, k, t)


def _spmm(
    fmt: tw.Composed | tw.Format, dtype: str, d: int, gathers_far: bool = False
) -> Callable[[str], Kernel]:
    return lambda t: spmm_kernel(fmt, dtype, dtype, d, "int32", t, gathers_far)


def _sddmm(fmt: tw.Format, dtype: str, d: int, index: str = "int32") -> Callable[[str], Kernel]:
    return lambda t: sddmm_kernel(fmt, (dtype, dtype, dtype), d, index, t)


KERNELS: dict[str, Callable[[str], Kernel]] = {
    **{f"linear {kind} 576x1536": _linear(kind, 576, 1536) for kind in KINDS},
    "linear f32 172x64": _linear("f32", 172, 64),
    "linear f32 odd": _linear("f32", 13, 37),
    "linear q4_1 odd": _linear("q4_1", 13, 96),
    **{
        f"embedding {kind}": lambda t, kind=kind: embedding.embedding_kernel(kind, t)
        for kind in KINDS
    },
    "rmsnorm": rmsnorm.rmsnorm_kernel,
    "silu_mul": activation.silu_mul_kernel,
    "add": activation.add_kernel,
    "rope pairs": lambda t: rope.rope_kernel(True, t),
    "rope halves": lambda t: rope.rope_kernel(False, t),
    "append pairs": lambda t: rope.rope_append_kernel(True, t),
    "append halves": lambda t: rope.rope_append_kernel(False, t),
    "append": rope.append_kernel,
    "argmax": sampling.argmax_kernel,
    "sample": sampling.sample_kernel,
    **{f"spmm by_length f32 {d}": _spmm(LENGTHS, "float32", d) for d in (1, 7, 33, 128)},
    "spmm by_length f32 512, X beyond the L2": _spmm(LENGTHS, "float32", 512, True),
    "spmm by_length f16 128": _spmm(LENGTHS, "float16", 128),
    "spmm csr bf16 32": _spmm(tw.csr(), "bfloat16", 32),
    "spmm hyb f64 32": _spmm(tw.hyb(), "float64", 32),
    **{f"sddmm coo f32 {d}": _sddmm(tw.coo(), "float32", d) for d in (1, 7, 32, 33, 128, 512)},
    "sddmm csr f32 128": _sddmm(tw.csr(), "float32", 128),
    "sddmm dcsr bf16 40": _sddmm(tw.dcsr(), "bfloat16", 40),
    "sddmm coo f16 512": _sddmm(tw.coo(), "float16", 512),
    "sddmm coo f16 33": _sddmm(tw.coo(), "float16", 33),
    "sddmm coo f64 64, int64": _sddmm(tw.coo(), "float64", 64, "int64"),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_cubin_without_spills(name: str, arch: str):
    kernel = KERNELS[name](f"cuda:{arch}")
    assert set(kernel.resources) >= {s.entry for s in kernel.manifest.stages}
    for entry, found in kernel.resources.items():
        assert found.spill_bytes == 0, f"{entry}: {found}"
    for stage in kernel.manifest.stages:
        threads = stage.threads[0] * stage.threads[1]
        assert 0 < threads <= 1024
        assert threads * kernel.resources[stage.entry].registers <= 65536
        assert stage.smem_bytes <= 48 * 1024  # what a kernel has without asking for more
