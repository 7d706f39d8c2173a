"""The CUDA attention kernels of the presets, compiled without a GPU for each architecture."""

from __future__ import annotations

import pytest
from tests.cubin.test_ops import ARCHS
from tests.shipped import ATTENTION

from tilewright.attention.families import portable
from tilewright.attention.spec import alone, compile_cuda
from tilewright.toolchain import nvrtc

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ATTENTION)
def test_cubin_without_spills(name: str, arch: str):
    cubin = compile_cuda(alone(portable.body(ATTENTION[name])), arch)
    found = cubin.resources["stage0"]
    assert found.spill_bytes == 0 and 0 < found.registers <= 255
