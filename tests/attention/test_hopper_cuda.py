"""The Hopper family: what ptxas made of it, reasons for what it refuses, and the right values."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, values_of
from tests.attention.oracle import MASKS, Case, draw_values, fill, oracle, pages_of, variant
from tests.attention.test_flash_cuda import _bits, on_device

from tilewright import dtypes
from tilewright.attention import flash, hopper, reference
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.errors import ArgumentError
from tilewright.runtime.view import view
from tilewright.toolchain import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
KERNELS = [  # group, head_dim, dtype, variant, keys of a box, paged, dtype of o
    (4, 128, "bfloat16", "causal", 128, False, "bfloat16"),
    (4, 128, "bfloat16", "full", 128, False, "float32"),
    (1, 64, "float16", "causal", 16, True, "float16"),
    (3, 128, "float16", "window", 1, True, "float32"),
    (8, 64, "bfloat16", "full", 128, True, "bfloat16"),
]
IDS = ["-".join(map(str, k)) for k in KERNELS]


def kernel_of(case) -> tuple[flash.Spec, int, bool, Any]:
    group, head_dim, name, kind, box, is_paged, out = case
    kv = dtypes.ALL[name]
    spec = flash.Spec(group, head_dim, kv, kv, ALL_VARIANTS[kind].traced)
    return spec, box, is_paged, dtypes.ALL[out]


def compiled(case) -> tuple[str, bytes]:
    """The log of NVRTC and ptxas, and the cubin; past the cache, which keeps no log."""
    text = hopper.source(*kernel_of(case))
    options = (f"--gpu-architecture={hopper.ARCH}", *nvrtc.FLAGS, "--no-cache")
    status, log, image = nvrtc._compile(text, flash.cuda_headers(), options)
    assert status == 0, log
    return log, image


@needs_nvrtc
@pytest.mark.parametrize("case", KERNELS, ids=IDS)
def test_wgmma_is_neither_spilled_nor_serialised(case):
    log, _ = compiled(case)
    assert "C75" not in log, log
    found = nvrtc.parse_resources(log)["stage0"]
    assert found.spill_bytes == 0 and found.registers == 168  # what setmaxnreg starts from


@needs_nvrtc
@pytest.mark.parametrize("case", KERNELS, ids=IDS)
def test_exponentials_of_full_tiles_hide_a_product(case, tmp_path):
    """In the loop over full tiles all weights are computed while P·V is under way: between the wait
    that leaves one group pending and the one that leaves none."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled(case)[1])
    text = subprocess.run(
        [nvdisasm(), "-c", file], capture_output=True, encoding="utf-8", check=True
    )
    ops = [
        m[0]
        for m in re.finditer(
            r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|HGMMA|\bLDL|\bSTL", text.stdout
        )
    ]
    pending = [i for i, op in enumerate(ops) if op.endswith("0x1")]
    assert len(pending) == 1 and "LDL" not in ops and "STL" not in ops
    between = ops[pending[0] + 1 :]
    between = between[: next(i for i, op in enumerate(between) if op.startswith("WARP"))]
    assert between == ["MUFU.EX2"] * (hopper.KEYS // 2 + 2)  # a tile's, and two rescale factors


def nvdisasm() -> str:
    try:
        for f in importlib.metadata.files("nvidia-cuda-nvdisasm") or ():
            if f.name == "nvdisasm":
                return str(f.locate())
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvdisasm is not installed")
    raise FileNotFoundError("nvdisasm")


@needs_nvrtc
@pytest.mark.parametrize("case", KERNELS, ids=IDS)
def test_constants_are_those_of_the_kernel(case):
    spec = kernel_of(case)[0]
    wanted = {
        "SMEM_BYTES": hopper.smem_bytes(spec), "THREADS": hopper.THREADS,
        "BM": hopper.ROWS, "BN": hopper.KEYS,
    }  # fmt: skip
    text = hopper.source(*kernel_of(case))
    for name, value in wanted.items():
        text += f'\nstatic_assert(attention::{name} == {value}, "");'
    text += '\nstatic_assert(sizeof(Aligned) == sizeof(Params), "");'
    nvrtc.compile_cuda(text, arch=hopper.ARCH, headers=flash.cuda_headers())


def test_reasons():
    spec = flash.Spec(4, 128, dtypes.bfloat16, dtypes.bfloat16, ALL_VARIANTS["full"].traced)
    names = ("k", "v", "o", "q", "q_token", "q_head", "k_page", "k_slot", "k_head", "v_page")
    fields: dict[str, Any] = dict.fromkeys((*names, "v_slot", "v_head", "kv_indices"), 1024)
    fields |= {"sm_scale": 0.1, "page_size": 16, "pages": 3}
    assert hopper.hosts(spec, "sm_90a", fields) == ""
    assert hopper.hosts(spec, "sm_90a", fields | {"kv_indices": 0, "page_size": 1}) == ""
    assert "sm_80" in hopper.hosts(spec, "sm_80", fields)
    for change, reason in (
        ({"sm_scale": 0.0}, "sm_scale"),
        ({"sm_scale": -0.1}, "sm_scale"),
        ({"sm_scale": float("nan")}, "sm_scale"),
        ({"page_size": 24}, "power of two"),
        ({"k": 1032}, "16 bytes"),
        ({"q_head": 1028}, "16 bytes"),
        ({"v_head": -1024}, "negative"),
        ({"pages": 0}, "no pages"),
    ):
        assert reason in hopper.hosts(spec, "sm_90a", fields | change)
    for other, reason in (
        (flash.Spec(4, 128, dtypes.float32, dtypes.bfloat16, spec.traced), "float16"),
        (flash.Spec(4, 96, dtypes.float16, dtypes.float16, spec.traced), "head_dim"),
    ):
        assert reason in hopper.hosts(other, "sm_90a", fields)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_work_covers_every_query_once(rng, group):
    lengths = rng.integers(0, 400, 9)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    items, tokens, kv_heads = hopper.work(indptr, 3, group, 5), hopper.ROWS // group, 3
    covered = np.zeros((int(indptr[-1]), kv_heads), int)
    for request, head, token in items.tolist():
        assert (token - indptr[request]) % tokens == 0
        covered[token : min(token + tokens, indptr[request + 1]), head] += 1
    assert (covered == 1).all()
    assert len(hopper.work(np.zeros(4, np.int32), 3, group, 5)) == 0


def test_o_of_16_bits_is_refused_where_the_kernel_writes_float32(rng):
    attn = Attention(2, 1, 64)
    kv = paged(rng, [9], (4, 1, 64), TYPES["float16"])
    q, indptr = queries(rng, [3], 2, 64, TYPES["float16"])
    with pytest.raises(ArgumentError, match="writes float32") as caught:
        attn.run(q, kv, attn.plan(indptr, kv), out=np.empty(q.shape, np.float16))
    assert caught.value.code == "A102"
    with pytest.raises(ArgumentError, match="not float32 or float16"):
        attn.run(q, kv, attn.plan(indptr, kv), out=np.empty(q.shape, np.float64))


# ---------------------------------------------------------------------------- on a GPU


def is_hopper() -> bool:
    from tilewright.runtime import cuda

    return cuda.available() and cuda.device_arch(0) == hopper.ARCH


@pytest.fixture
def card():
    if not is_hopper():
        pytest.skip(f"the GPU is not {hopper.ARCH}")


def close(o: np.ndarray, lse: np.ndarray, wanted: State) -> None:
    """Relative error of each row of 16-bit products, and the logarithm of the sums."""
    size = np.linalg.norm(wanted.o, axis=-1)
    error = np.linalg.norm(o.astype(np.float64) - wanted.o, axis=-1)
    assert (error <= 1e-2 * size + 1e-5).all(), (error / (size + 1e-9)).max()
    np.testing.assert_allclose(lse, wanted.lse, rtol=2e-3, atol=4e-3)


CASES = [  # group, kv_heads, head_dim, dtype, variant, page_size (0: ragged)
    (4, 2, 128, "bfloat16", "causal", 0),
    (4, 2, 128, "bfloat16", "full", 0),
    (1, 3, 64, "float16", "causal", 0),
    (8, 1, 64, "bfloat16", "full", 16),
    (3, 2, 128, "float16", "causal", 1),
    (5, 1, 128, "bfloat16", "causal", 16),
    (7, 1, 64, "float16", "window", 64),
    (2, 2, 128, "bfloat16", "window", 256),
    (6, 1, 128, "float16", "causal", 8),
    (4, 2, 128, "bfloat16", "softcap_alibi", 16),
    (2, 2, 64, "float16", "strange", 2),
    (64, 1, 64, "float16", "causal", 4),
]
BATCH = [  # queries and keys of each request
    (128, 128), (1, 0), (0, 7), (300, 300), (17, 1000), (129, 129), (64, 1), (5, 127), (1, 1),
    (200, 70), (33, 383), (0, 0), (257, 640), (31, 255), (127, 256),
]  # fmt: skip


def ragged(rng, lengths, kv_heads, head_dim, dtype) -> KV:
    """Keys of one request after the other, NaN in front of them and behind them."""
    indptr = np.cumsum([3, *lengths]).astype(np.int32)
    arrays = [
        np.full((int(indptr[-1]) + 200, kv_heads, head_dim), np.nan, np.float32) for _ in "kv"
    ]
    for x in arrays:
        x[3 : indptr[-1]] = rng.standard_normal(x[3 : indptr[-1]].shape)
    kv = KV.ragged(arrays[0].astype(dtype), arrays[1].astype(dtype), indptr - 3)
    return KV(kv.k, kv.v, view(indptr), None, None, (*kv.arrays[:2], indptr))


def to_card(kv: KV) -> KV:
    from tilewright.runtime.cuda import DeviceArray

    if kv.indices is not None:
        return on_device(kv)
    there = [DeviceArray.from_numpy(_bits(a), kv.dtype) for a in kv.arrays[:2]]
    return KV.ragged(there[0], there[1], DeviceArray.from_numpy(kv.arrays[2]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_against_the_reference(card, rng, case):
    from tilewright.runtime.cuda import DeviceArray

    group, kv_heads, head_dim, kind, name, page_size = case
    attn = Attention(group * kv_heads, kv_heads, head_dim, ALL_VARIANTS[name])
    lengths = [kv for _, kv in BATCH]
    shape = (kv_heads, head_dim)
    if page_size:
        kv = paged(rng, lengths, (page_size, *shape), TYPES[kind])
    else:
        kv = ragged(rng, lengths, *shape, TYPES[kind])
    q, indptr = queries(rng, [qo for qo, _ in BATCH], group * kv_heads, head_dim, TYPES[kind])
    values = values_of(rng, attn.variant, group * kv_heads, kv_heads)
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    there = to_card(kv)
    on_card = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    queries_there = DeviceArray.from_numpy(_bits(q), kind)
    out = DeviceArray.from_numpy(np.full(q.shape, np.nan, np.float32))
    plan = attn.plan(indptr, there)
    bound = attn.bind(queries_there, there, out, plan=plan, **on_card)
    assert "prefill_hopper.cuh" in bound.source
    close(bound().o.to_numpy(), bound.state.lse.to_numpy(), wanted)
    # The same with o in the dtype of q, as the family itself writes it.
    o = DeviceArray.from_numpy(np.full(q.shape, 0x7FC1, np.uint16), kind)
    bound = attn.bind(queries_there, there, o, plan=plan, **on_card)
    first = None
    for _ in range(10):  # the counter is 0 again after each, and the order of draws changes no bit
        found = bound().o.to_numpy()
        first = found if first is None else first
        assert np.array_equal(first.view(np.uint16), found.view(np.uint16))
    assert first is not None
    read = first.view(ml_dtypes.bfloat16) if kind == "bfloat16" else first.view(np.float16)
    close(read.astype(np.float32), bound.state.lse.to_numpy(), wanted)


def prefill_case(number: int) -> Case:
    """A random prefill whose keys and values are NaN or Inf wherever no query of a request sees."""
    rng = np.random.default_rng([5, number])
    mask = list(MASKS)[number % len(MASKS)]
    group, dim = int(rng.integers(1, 9)), int(rng.choice([64, 128]))
    dtype = (np.float16, ml_dtypes.bfloat16)[number % 2]
    kv_heads, page_size = int(rng.integers(1, 4)), int(rng.choice([1, 2, 8, 16, 64, 128, 512]))
    lengths = [int(rng.integers(0, rng.choice([6, 200, 900]))) for _ in range(4)]
    qo_lengths = [int(rng.integers(0, rng.choice([8, 71, 400]))) for _ in range(3)] + [40]
    kv_indptr, kv_indices, last, pages = pages_of(rng, lengths, page_size)
    k, v = (np.full((pages, page_size, kv_heads, dim), np.nan, dtype) for _ in "kv")
    qo_indptr = np.cumsum([0, *qo_lengths]).astype(np.int32)
    q = rng.standard_normal((int(qo_indptr[-1]), group * kv_heads, dim)).astype(dtype)
    values = draw_values(rng, MASKS[mask][2], (group * kv_heads, kv_heads))
    case = Case(
        f"5:{number}", mask, "scores", None, values, q, qo_indptr,
        k, v, kv_indptr, kv_indices, last, 7,
    )  # fmt: skip
    fill(rng, case)
    return case


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3 * len(MASKS)))
def test_values_that_nobody_sees(card, number):
    from tilewright.runtime.cuda import DeviceArray

    case = prefill_case(number)
    cls = variant(case.mask, "scores")
    scalars = {n: x for n, x in case.values.items() if not isinstance(x, np.ndarray)}
    attn = Attention(*case.heads, case.q.shape[2], cls(**scalars))
    there = on_device(KV.paged(case.k, case.v, case.kv_indptr, case.kv_indices, case.last_page_len))
    arrays = {
        n: DeviceArray.from_numpy(x) for n, x in case.values.items() if isinstance(x, np.ndarray)
    }
    q = DeviceArray.from_numpy(_bits(case.q), there.dtype)
    bound = attn.bind(q, there, plan=attn.plan(case.qo_indptr, there), **arrays)
    if case.q.size and there.k.size:
        assert "prefill_hopper.cuh" in bound.source or "decode.cuh" in bound.source
    o, lse, _ = oracle(case)
    close(bound().o.to_numpy(), bound.state.lse.to_numpy(), State(o, lse))


@pytest.mark.gpu
def test_more_tiles_than_a_segment_has(card, rng):
    """A request whose tiles of keys come in several segments, and one whose first sees nothing."""
    from tilewright.runtime.cuda import DeviceArray

    keys = hopper.MAX_TILES * hopper.KEYS * 2 + 77
    attn = Attention(2, 1, 64, ALL_VARIANTS["causal"])
    kv = ragged(rng, [keys, 5], 1, 64, TYPES["bfloat16"])
    q, indptr = queries(rng, [70, 200], 2, 64, TYPES["bfloat16"])
    wanted = reference.attention(q, kv, indptr, attn.variant)
    there = to_card(kv)
    state = attn.run(DeviceArray.from_numpy(_bits(q), "bfloat16"), there, attn.plan(indptr, there))
    close(state.o.to_numpy(), state.lse.to_numpy(), wanted)
