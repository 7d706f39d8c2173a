"""`Attention.resolve` for GPUs that are not there: which family runs, and the reasons of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright.attention.families import hopper
from tilewright.target import CUDA_ARCHS

FAMILIES = ["decode", "hopper", "tiles", "portable"]


def cache(dtype: str = "float16", page: int = 16, head_dim: int = 128) -> tw.KV:
    pages = np.zeros((40, 2, page, 8, head_dim), dtype)
    table = np.arange(40, dtype=np.int32).reshape(1, 40)
    return tw.KV(tw.Table(np.array([100], np.int32), table), tw.Pool(pages))


def resolved(
    kv: tw.KV, qo_len: int = 512, target: str = "cuda:sm_90a", **options: Any
) -> tuple[str, dict[str, str]]:
    """The family that runs, and the reasons of all."""
    head_dim = kv.pool.k.shape[3]
    found = tw.Attention(32, 8, head_dim, **options).resolve(kv, qo_len=qo_len, target=target)
    return found.chosen, dict(found.families)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_prompts_run_on_hopper_gpus_by_hopper_and_elsewhere_by_tiles(arch):
    chosen, reasons = resolved(cache(), target=f"cuda:{arch}")
    assert list(reasons) == FAMILIES
    assert chosen == ("hopper" if arch == hopper.ARCH else "tiles")
    assert reasons["hopper"] == ("" if arch == hopper.ARCH else f"the GPU is {arch}, not sm_90a")
    assert "2048 rows" in reasons["decode"] and not reasons["tiles"] and not reasons["portable"]


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_single_tokens_run_by_decode_and_float32_by_the_portable_family(arch):
    assert resolved(cache(), 1, f"cuda:{arch}")[0] == "decode"
    for rows in 1, 512:
        chosen, reasons = resolved(cache("float32"), rows, f"cuda:{arch}")
        assert chosen == "portable"
        assert all("float16" in reasons[name] for name in FAMILIES[:3])


@pytest.mark.parametrize(
    ("kv", "options", "reason"),
    [
        (cache(page=12), {}, "page_size 12 is no power of two"),
        (cache(head_dim=80), {}, "head_dim and head_dim_vo are none of"),
        (cache(), {"sm_scale": -1.0}, "sm_scale is not positive"),
    ],
    ids=("page", "head_dim", "sm_scale"),
)
def test_what_hopper_cannot_run_goes_to_tiles(kv, options, reason):
    chosen, reasons = resolved(kv, **options)
    assert chosen == "tiles" and reasons["hopper"].startswith(reason)


def test_a_cpu_is_a_machine_too():
    here, cpp = (tw.Attention(32, 8, 128).resolve(cache(), target=t) for t in (None, "cpp"))
    assert here == cpp and str(cpp) == "cpu  runs"
    with pytest.raises(tw.TilewrightError, match="B103"):
        tw.Attention(32, 8, 128).resolve(cache(), target="sm_90a")
