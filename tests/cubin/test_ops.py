"""Every CUDA kernel of the operators, compiled without a GPU for each architecture it ships for."""

from __future__ import annotations

from typing import Any

import pytest
from tests.shipped import CUDA, SHIPPED

from tilewright.ops.rope import append_kernel, rope_append_kernel, rope_kernel
from tilewright.ops.rowwise import gated_kernel, scaled_kernel
from tilewright.target import target
from tilewright.toolchain import nvrtc

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")

ARCHS = ("sm_80", "sm_90a", "sm_100a")
NAMES = [name for name, shipped in SHIPPED.items() if CUDA[0] in shipped.targets]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_cubin_without_spills(name: str, arch: str):
    check(SHIPPED[name].definition.build(f"cuda:{arch}"), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_of_the_model_families(arch: str):
    """Element-wise kernels, whose texts are like those of `silu_mul`."""
    of = f"cuda:{arch}"
    for kernel in (gated_kernel(of, True), scaled_kernel(of)):
        check(kernel, arch)
    check(gated_kernel(of, True, "bfloat16", 9216), arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_kernels_of_a_bfloat16_cache(interleaved: bool, arch: str):
    of = f"cuda:{arch}", "bfloat16"
    for given, head_dim in (("float32", 0), ("float32", 72), ("bfloat16", 128)):
        check(rope_kernel(interleaved, *of, given, head_dim), arch)
        check(rope_append_kernel(interleaved, *of, given, head_dim), arch)
        check(append_kernel(*of, given, head_dim), arch)


def check(kernel: Any, arch: str) -> None:
    assert set(kernel.resources) >= {s.entry for s in kernel.manifest.stages}
    for entry, found in kernel.resources.items():
        assert found.spill_bytes == 0, f"{entry}: {found}"
    for stage in kernel.manifest.stages:
        threads = stage.threads[0] * stage.threads[1]
        assert 0 < threads <= 1024
        assert threads * kernel.resources[stage.entry].registers <= 65536
        assert stage.smem_bytes <= target(f"cuda:{arch}").shared_bytes
