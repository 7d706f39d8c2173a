"""Every CUDA kernel of the operators, compiled without a GPU for each architecture it ships for."""

from __future__ import annotations

from typing import Any

import pytest
from tests.shipped import CUDA, SHIPPED

from tilewright.ops.rowwise import gelu_mul_kernel, rmsnorm_add_kernel, scaled_kernel
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
@pytest.mark.parametrize("build", [gelu_mul_kernel, scaled_kernel, rmsnorm_add_kernel])
def test_kernels_of_the_model_families(build: Any, arch: str):
    """Element-wise kernels, whose texts are like those of `silu_mul` and `rmsnorm`."""
    check(build(f"cuda:{arch}"), arch)


def check(kernel: Any, arch: str) -> None:
    assert set(kernel.resources) >= {s.entry for s in kernel.manifest.stages}
    for entry, found in kernel.resources.items():
        assert found.spill_bytes == 0, f"{entry}: {found}"
    for stage in kernel.manifest.stages:
        threads = stage.threads[0] * stage.threads[1]
        assert 0 < threads <= 1024
        assert threads * kernel.resources[stage.entry].registers <= 65536
        assert stage.smem_bytes <= target(f"cuda:{arch}").shared_bytes
