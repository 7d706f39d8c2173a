"""A schedule that does not fit one CTA of the target is refused; one that just fits is not."""

from __future__ import annotations

import pytest
from tests.compiler.cases import spmm

from tilewright import compiler
from tilewright.errors import ScheduleError
from tilewright.ops.gemm import gemm_kernel
from tilewright.runtime.manifest import Built
from tilewright.target import CUDA_ARCHS, Target, target
from tilewright.toolchain import nvrtc

# Shared memory that one thread block can have: CUDA C++ Programming Guide, 20 "Compute
# Capabilities", in KB.
KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120a": 99}
ROW = 4 * (32 + 4)  # bytes of a row of the tile: 32 float32, and 16 bytes against bank conflicts


def rendered(rows: int, name: str) -> Built:
    """SpMM with a tile of `rows` rows of X in shared memory."""

    def recipe(s):
        s = s.split("k", 32).split("j", rows).reorder("i", "k_o", "j_o", "k_i", "j_i")
        return s.bind("k_i", "thread.x").bind("i", "cta.x").cache("X", "j_o", "shared")

    definition = spmm.typed(A="float32").schedule(recipe)
    return compiler.rendered(definition.lower(name), target(name))


@pytest.mark.parametrize("arch", ["", *KB])
def test_shared_memory_of_a_cta(arch: str) -> None:
    name = f"cuda:{arch}" if arch else "cuda"
    limit = KB.get(arch, min(KB.values())) * 1024
    most = limit // ROW
    assert rendered(most, name).manifest.stages[0].smem_bytes == most * ROW
    with pytest.raises(ScheduleError, match="shared memory") as caught:
        rendered(most + 1, name)
    # `cache` refuses one array that is too large for any GPU, `build` the sum for its own.
    assert caught.value.code == ("S102" if limit == max(KB.values()) * 1024 else "S103")
    assert str((most + 1) * ROW) in caught.value.message
    assert str(limit) in caught.value.hint


def test_every_architecture_has_a_limit() -> None:
    assert {a: Target("cuda", a).shared_bytes for a in CUDA_ARCHS} == {
        a: kb * 1024 for a, kb in KB.items()
    }


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_what_fits_is_built_for_its_architecture() -> None:
    kernel = gemm_kernel("cuda:sm_90a", "float16")
    assert 0 < kernel.manifest.stages[0].smem_bytes <= 232448
