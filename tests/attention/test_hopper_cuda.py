"""The Hopper family: what ptxas made of it, reasons for what it refuses, and the right values."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.attention.cases import ALL_VARIANTS, TYPES, paged, queries, spec_of, values_of
from tests.attention.oracle import (
    MASKS,
    SINKS,
    Case,
    draw_positions,
    draw_values,
    fill,
    oracle,
    pages_of,
    variant,
)
from tests.attention.test_flash_cuda import _bits, on_device

from tilewright.attention import reference
from tilewright.attention.batch import Attention
from tilewright.attention.families import hopper
from tilewright.attention.kv import KV
from tilewright.attention.merge import State
from tilewright.attention.plan import ITEM
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, alone
from tilewright.attention.table import Table
from tilewright.codegen import prelude_files
from tilewright.toolchain import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
KERNELS = [  # group, dims, dtype, variant, keys of a box, paged, dtype of o, in chunks
    (4, (128, 128), "bfloat16", "causal", 128, False, "bfloat16", False),
    (4, (128, 128), "bfloat16", "full", 16, True, "float32", True),
    (1, (64, 64), "float16", "causal", 16, True, "float16", False),
    (3, (128, 128), "float16", "window", 1, True, "float32", False),
    (8, (64, 64), "bfloat16", "full", 32, True, "bfloat16", True),
    (4, (96, 96), "bfloat16", "causal", 128, False, "bfloat16", False),
    (1, (192, 128), "float16", "causal", 32, True, "float16", False),
    (4, (256, 256), "bfloat16", "causal", 64, False, "bfloat16", False),
    (4, (128, 128), "bfloat16", "softcap", 128, False, "bfloat16", False),
    (8, (64, 64), "float16", "softcap", 16, True, "float16", False),
    (4, (256, 256), "bfloat16", "alibi", 64, False, "bfloat16", False),
    (4, (128, 128), "bfloat16", "softcap_alibi", 128, False, "bfloat16", False),
]
FEW = [  # of kernels that have narrow items too
    (4, (128, 128), "bfloat16", "causal", 16, True, "bfloat16", False),
    (8, (128, 128), "float16", "softcap_alibi", 128, False, "float32", True),
    (1, (96, 96), "bfloat16", "window", 8, True, "bfloat16", True),
    (4, (128, 128), "bfloat16", "causal", 1, True, "bfloat16", True),
]
IDS = ["-".join(map(str, k)) for k in KERNELS + FEW]


def kernel_of(case) -> tuple[Spec, int, bool]:
    group, (dim, dim_vo), name, kind, box, is_paged, out, chunked = case
    form = {} if is_paged else {"table_entries": "", "kv_len": ""}
    spec = spec_of(group, dim, name, name, ALL_VARIANTS[kind], out, **form)
    return dataclasses.replace(spec, head_dim_vo=dim_vo), box, chunked


def compiled(case, narrow: bool) -> tuple[str, bytes]:
    """The log of NVRTC and ptxas, and the cubin; past the cache, which keeps no log. The numbers
    that Python launches with are checked too."""
    spec, box, chunked = kernel_of(case)
    text = alone(hopper.body(spec, box, chunked, narrow))
    wanted = {"SMEM_BYTES": hopper.smem_bytes(spec, narrow), "THREADS": hopper.threads(spec, box)}
    wanted |= {"BM": hopper.rows_of(spec)}
    for name, value in wanted.items():
        text += f'\nstatic_assert(body0::attention::{name} == {value}, "");'
    text += '\nstatic_assert(alignof(body0::Params) == 64, "");'
    options = (f"--gpu-architecture={hopper.ARCH}", *nvrtc.FLAGS, "--no-cache")
    status, log, image = nvrtc._compile(text, prelude_files.headers(), options)
    assert status == 0, log
    return log, image


@needs_nvrtc
@pytest.mark.parametrize("case, narrow", [(c, c in FEW) for c in KERNELS + FEW], ids=IDS)
def test_what_ptxas_makes_of_it(case, narrow, tmp_path):
    """No spill, no serialised wgmma; in the loop over full tiles more than half of the weights are
    computed while P·V is under way, and all of a soft-cap's tanh, between the wait that leaves one
    group pending and the one of none; the others behind it, where they hide the packing."""
    log, image = compiled(case, narrow)
    assert "C75" not in log, log
    found = nvrtc.parse_resources(log)["stage0"]
    assert found.spill_bytes == 0
    assert found.registers == 65536 // hopper.threads(*kernel_of(case)[:2]) // 8 * 8
    file = tmp_path / "kernel.cubin"
    file.write_bytes(image)
    text = subprocess.run(
        [nvdisasm(), "-c", file], capture_output=True, encoding="utf-8", check=True
    )
    found = re.finditer(
        r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|MUFU\.TANH|HGMMA|F2FP|\bLDL|\bSTL", text.stdout
    )
    ops = [m[0] for m in found]
    assert "LDL" not in ops and "STL" not in ops
    pending = [i for i, op in enumerate(ops) if op.endswith("0x1")]
    assert 2 <= len(pending) <= 3  # in the first one or two steps of an item, and in the loop
    weights = hopper.tiles_of(kernel_of(case)[0]).keys // 2
    loop = ops[pending[-1] + 1 :]
    end = next(i for i, op in enumerate(loop) if op.startswith("WARP"))
    assert loop[:end].count("MUFU.EX2") >= weights // 2 and "HGMMA" not in loop[:end]
    assert loop[:end].count("MUFU.TANH") == weights * ("softcap" in case[3])
    rest = loop[end + 1 :]
    packed = [i for i, op in enumerate(rest) if op == "F2FP"][weights // 2 - 1]
    assert loop[:end].count("MUFU.EX2") + rest[:packed].count("MUFU.EX2") >= weights


def test_the_page_tells_the_shared_memory_of_each_kernel():
    page = (Path(__file__).parents[2] / "docs/attention/hopper.md").read_text(encoding="utf-8")
    for (dim, dim_vo), tiles in hopper.TILES.items():
        spec = spec_of(4, dim, "float16", "float16", ALL_VARIANTS["causal"], "float16")
        size = f"{hopper.smem_bytes(dataclasses.replace(spec, head_dim_vo=dim_vo)):,}"
        name = str(dim) if dim == dim_vo else f"{dim} / {dim_vo}"
        rows = ([cell.strip() for cell in x.split("|")] for x in page.splitlines() if "|" in x)
        (row,) = (x for x in rows if len(x) == 7 and name in x[1].split(", "))
        stages = f"{tiles.q}, {tiles.k}, {tiles.v}"
        assert [tiles.groups, tiles.keys] == [int(x.split()[0]) for x in row[2:4]]
        assert row[4:6] == [stages, size.replace(",", " ")]


@needs_nvrtc
def test_a_traced_kernel_does_the_same():
    """Clocks neither make ptxas spill nor serialise."""
    spec, box, chunked = kernel_of(KERNELS[0])
    text = "#define TW_TRACE 64\n#define TW_TRACE_AT 0\n" + alone(hopper.body(spec, box, chunked))
    options = (f"--gpu-architecture={hopper.ARCH}", *nvrtc.FLAGS)
    status, log, image = nvrtc._compile(text, prelude_files.headers(), options)
    assert status == 0, log
    assert image and "C75" not in log
    assert nvrtc.parse_resources(log)["stage0"].spill_bytes == 0


def nvdisasm() -> str:
    try:
        for f in importlib.metadata.files("nvidia-cuda-nvdisasm") or ():
            if f.name == "nvdisasm":
                return str(f.locate())
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nvdisasm is not installed")
    raise FileNotFoundError("nvdisasm")


def test_reasons():
    causal = ALL_VARIANTS["causal"]
    spec = spec_of(4, 128, "float16", "float16", causal)

    def reason(spec=spec, device="sm_90a", k=None):
        pages = np.zeros((2, 16, 2, 128), np.float16) if k is None else k
        seen = Pool(pages, pages)
        for name in "kv":  # aligned, on a GPU
            x = getattr(seen, name)
            aligned = dataclasses.replace(x, pointer=x.pointer & ~15, device=device)
            object.__setattr__(seen, name, aligned)
        object.__setattr__(seen, "device", device)
        return hopper.refuses(spec, 400, seen, device)

    assert reason() == ""
    assert "sm_80" in reason(device="sm_80")
    for other, words in (
        (dataclasses.replace(spec, ascending=False), "sm_scale"),
        (spec_of(4, 128, "float32", "float16", causal), "float16"),
        (spec_of(4, 80, "float16", "float16", causal), "head_dim"),
        (dataclasses.replace(spec, head_dim_vo=64), "head_dim"),
    ):
        assert words in reason(other)
    assert "16 bytes" in reason(k=np.zeros((2, 16, 2, 132), np.float16)[..., :128])
    assert "power of two" in reason(k=np.zeros((2, 24, 2, 128), np.float16))
    assert "negative" in reason(k=np.zeros((2, 16, 2, 128), np.float16)[:, ::-1])
    far = np.lib.stride_tricks.as_strided(
        np.zeros(8, np.float16), (2, 4, 2, 128), (1 << 32, 512, 256, 2)
    )
    assert "4 GiB" in reason(k=far)
    assert "no pages" in reason(k=np.zeros((0, 16, 2, 128), np.float16))
    assert "plan with the cache" in hopper.refuses(spec, 400, None)
    assert hopper.refuses(spec, 400, None, "sm_90a") == ""


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_the_order_holds_every_item_once(rng, group):
    lengths, tokens, kv_heads = rng.integers(0, 400, 9), 128 // group, 3
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    rows = [
        (r, h, at, min(at + tokens, indptr[r + 1]))
        for r in range(len(lengths))
        for at in range(indptr[r], indptr[r + 1], tokens)
        for h in range(kv_heads)
    ]
    items = np.zeros(len(rows), ITEM.numpy)
    for n, name in enumerate(("request", "kv_head", "qo_begin", "qo_end")):
        items[name] = [row[n] for row in rows]
    items = items[rng.permutation(len(items))]
    by = hopper.order(items, indptr, 1, 8 // group)
    assert sorted(by) == list(range(len(items)))
    assert len(items) > 30
    first = items[by][: len(items) - 8]  # in front of the tail: units together
    unit = [(int(i["request"]), int(i["kv_head"])) for i in first]
    changes = [u for n, u in enumerate(unit) if n == 0 or unit[n - 1] != u]
    assert len(changes) == len(set(changes))
    sizes = [int(lengths[r]) for r, _ in changes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(hopper.order(items[:0], np.zeros(4, np.int32), 5, 2)) == 0


@pytest.mark.parametrize("few", [0, 2, 8])
def test_the_last_items_are_those_of_all_lists_but_the_narrow_one(few):
    """The sort by keys takes four items of each CTA, counting those of short requests that are not
    narrow: enough of these, and the items of a long request and head follow each other."""
    lengths, heads, workers = [640, 640, *[few + 1] * 100, *[few] * 100], 2, 10
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    rows = [
        (r, h, at, min(at + 32, indptr[r + 1]), 0, 1, 0, 0)
        for r in range(len(lengths))
        for at in range(indptr[r], indptr[r + 1], 32)
        for h in range(heads)
    ]
    items = np.array(rows, np.int32).view(ITEM.numpy).reshape(-1)
    ordered = items[hopper.order(items, indptr, workers, few)]
    unit = ordered["request"] * heads + ordered["kv_head"]
    assert np.count_nonzero(np.diff(unit[: 2 * 2 * 640 // 32])) == 3


@pytest.mark.parametrize(("new", "requests"), [(64, 16), (128, 16), (256, 16), (512, 5)])
def test_short_requests_read_a_long_cache_once(new, requests):
    """All items of a request and head are among those that the SMs work on at the same time."""
    kv_heads, tokens, workers = 8, 32, 132
    indptr = np.arange(requests + 1) * new
    rows = [
        (r, h, at, at + tokens)
        for r in range(requests)
        for at in range(indptr[r], indptr[r + 1], tokens)
        for h in range(kv_heads)
    ]
    items = np.array([(*row, 0, 1, 0, 0) for row in rows], np.int32).view(ITEM.numpy).reshape(-1)
    ordered = items[hopper.order(items, indptr, workers, 2)]
    unit = ordered["request"] * kv_heads + ordered["kv_head"]
    first, last = (np.unique(u, return_index=True)[1] for u in (unit, unit[::-1]))
    assert ((len(unit) - 1 - last) - first == new // tokens - 1).all()


# ---------------------------------------------------------------------------- on a GPU


def is_hopper() -> bool:
    from tilewright.runtime import cuda

    return cuda.available() and cuda.device(0).arch == hopper.ARCH


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


CASES = [  # group, kv_heads, head_dim (K, V), dtype, variant, page_size (0: ragged, -1: dense)
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
    (4, 2, 128, "bfloat16", "causal", -1),
    (4, 2, 96, "bfloat16", "causal", 0),
    (2, 2, 96, "float16", "window", 16),
    (4, 1, 256, "bfloat16", "causal", 0),
    (2, 2, 256, "float16", "full", 16),
    (1, 4, (192, 128), "bfloat16", "causal", 0),
    (16, 1, (192, 128), "float16", "causal", 64),
    (8, 1, 128, "bfloat16", "softcap", 2),
    (4, 1, 64, "bfloat16", "softcap", 8),
    (2, 2, (192, 128), "bfloat16", "softcap_alibi", 8),
    (4, 1, 256, "float16", "softcap_alibi", 1),
]
BATCH = [  # queries and keys of each request
    (128, 128), (1, 0), (0, 7), (300, 300), (17, 1000), (129, 129), (64, 1), (5, 127), (1, 1),
    (200, 70), (33, 383), (0, 0), (257, 640), (31, 255), (127, 256),
]  # fmt: skip


def ragged(rng, lengths, kv_heads, head_dim, dtype) -> KV:
    """Keys of one request after the other, NaN behind them."""
    indptr = np.cumsum([0, *lengths]).astype(np.int32)
    arrays = [
        np.full((int(indptr[-1]) + 200, kv_heads, head_dim), np.nan, np.float32) for _ in "kv"
    ]
    for x in arrays:
        x[: indptr[-1]] = rng.standard_normal(x[: indptr[-1]].shape)
    return KV(Table.ragged(indptr), Pool(*(x.astype(dtype) for x in arrays)))


def dense(rng, lengths, kv_heads, head_dim, dtype) -> KV:
    """A page for each request, NaN behind its keys."""
    shape = (len(lengths), max(lengths) + 3, kv_heads, head_dim)
    arrays = [np.full(shape, np.nan, np.float32) for _ in "kv"]
    for x in arrays:
        for r, n in enumerate(lengths):
            x[r, :n] = rng.standard_normal((n, kv_heads, head_dim))
    return KV(Table.dense(np.array(lengths, np.int32)), Pool(*(x.astype(dtype) for x in arrays)))


def to_card(kv: KV) -> KV:
    from tilewright.runtime.cuda import DeviceArray

    if kv.table.kind == "csr":
        return on_device(kv)
    there = [DeviceArray.from_numpy(_bits(a), kv.pool.dtype) for a in kv.pool.arrays]
    if kv.table.kind == "ragged":
        table = Table.ragged(DeviceArray.from_numpy(kv.table.arrays["table_indptr"]))
    else:
        table = Table.dense(DeviceArray.from_numpy(kv.table.arrays["kv_len"]))
    return KV(table, Pool(*there))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_against_the_reference(card, rng, case):
    from tilewright.runtime.cuda import DeviceArray

    group, kv_heads, dims, kind, name, page_size = case
    head_dim, dim_vo = dims if isinstance(dims, tuple) else (dims, dims)
    variant = ALL_VARIANTS[name]
    attn = Attention(group * kv_heads, kv_heads, head_dim, variant, head_dim_vo=dim_vo)
    lengths = [kv for _, kv in BATCH]
    shape = (kv_heads, head_dim)
    if page_size < 0:
        kv = dense(rng, lengths, *shape, TYPES[kind])
    elif page_size:
        kv = paged(rng, lengths, (page_size, *shape), TYPES[kind])
    else:
        kv = ragged(rng, lengths, *shape, TYPES[kind])
    k, v = kv.pool.arrays
    kv = KV(kv.table, Pool(k, np.ascontiguousarray(v[..., :dim_vo])))
    q, indptr = queries(rng, [qo for qo, _ in BATCH], group * kv_heads, head_dim, TYPES[kind])
    values = values_of(rng, attn.variant, group * kv_heads, kv_heads)
    wanted = reference.attention(q, kv, indptr, attn.variant, **values)
    there = to_card(kv)
    on_card: dict[str, Any] = {n: DeviceArray.from_numpy(x) for n, x in values.items()}
    queries_there = DeviceArray.from_numpy(_bits(q), kind)
    out = DeviceArray.from_numpy(np.full((*q.shape[:2], dim_vo), np.nan, np.float32))
    plan = attn.plan(indptr, there)
    bound = attn.bind(queries_there, there, out, plan=plan, **on_card)
    assert "prefill_hopper.cuh" in bound.source
    close(bound().o.to_numpy(), bound.state.lse.to_numpy(), wanted)
    # The same with o in the dtype of q, as the family itself writes it.
    o = DeviceArray.from_numpy(np.full((*q.shape[:2], dim_vo), 0x7FC1, np.uint16), kind)
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
    group, dims = int(rng.integers(1, 9)), list(hopper.TILES)[number // 2 % len(hopper.TILES)]
    sink = list(SINKS)[number // 3 % len(SINKS)]
    dtype = (np.float16, ml_dtypes.bfloat16)[number % 2]
    kv_heads, page_size = int(rng.integers(1, 4)), int(rng.choice([1, 2, 8, 16, 64, 128, 512]))
    lengths = [int(rng.integers(0, rng.choice([6, 200, 900, 5000]))) for _ in range(4)]
    qo_lengths = [int(rng.integers(0, rng.choice([8, 71, 400]))) for _ in range(3)] + [40]
    kv_indptr, kv_indices, pages = pages_of(rng, lengths, page_size)
    k, v = (np.full((pages, page_size, kv_heads, dim), np.nan, dtype) for dim in dims)
    qo_indptr = np.cumsum([0, *qo_lengths]).astype(np.int32)
    q = rng.standard_normal((int(qo_indptr[-1]), group * kv_heads, dims[0])).astype(dtype)
    sizes = (len(lengths), len(q), max(lengths) + 9)
    names = MASKS[mask][2] | SINKS[sink][2]
    values = draw_values(rng, names, (group * kv_heads, kv_heads), sizes)
    positions = draw_positions(rng, lengths, ("", "", "qo", "kv")[number % 4])
    case = Case(
        f"5:{number}", mask, "scores", sink, None, values, q, qo_indptr,
        k, v, np.array(lengths, np.int32), kv_indptr, kv_indices, 7, "csr", positions,
    )  # fmt: skip
    fill(rng, case)
    return case


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(4 * len(MASKS)))
def test_values_that_nobody_sees(card, number):
    from tilewright.runtime.cuda import DeviceArray

    case = prefill_case(number)
    attn = Attention(*case.heads, case.dims[0], variant(case), head_dim_vo=case.dims[1])
    table = (case.kv_len, case.kv_indptr, case.kv_indices)
    table = [DeviceArray.from_numpy(x) for x in table]
    kind = case.q.dtype.name
    k, v = (DeviceArray.from_numpy(_bits(x), kind) for x in (case.k, case.v))
    positions = {n: DeviceArray.from_numpy(x) for n, x in case.positions.items()}
    there = KV(Table.csr(*table, **positions), Pool(k, v))
    arrays: dict[str, Any] = {
        n: DeviceArray.from_numpy(x) for n, x in case.values.items() if isinstance(x, np.ndarray)
    }
    q = DeviceArray.from_numpy(_bits(case.q), kind)
    bound = attn.bind(q, there, plan=attn.plan(case.qo_indptr, there), **arrays)
    if case.q.size and there.pool.pages:
        assert "prefill_hopper.cuh" in bound.source or "decode.cuh" in bound.source
    o, lse, _ = oracle(case)
    for _ in range(2):  # counters are 0 again
        state = bound()
        close(reference.as_float64(state.o), reference.as_float64(state.lse), State(o, lse))


@pytest.mark.gpu
@pytest.mark.parametrize("requests, tokens, keys", [(1, 64, 9000), (3, 16, 5001), (2, 300, 4099)])
def test_chunks_fill_the_card(card, rng, requests, tokens, keys):
    """Few queries on long caches: items are cut along the keys, and merged to the same bits."""
    from tilewright.runtime.cuda import DeviceArray

    attn = Attention(8, 2, 128, ALL_VARIANTS["causal"])
    kv = paged(rng, [keys] * requests, (16, 2, 128), TYPES["bfloat16"])
    q, indptr = queries(rng, [tokens] * requests, 8, 128, TYPES["bfloat16"])
    wanted = reference.attention(q, kv, indptr, attn.variant)
    there = to_card(kv)
    plan = attn.plan(indptr, there)
    assert plan.slots > 0 and plan.items["chunks"].max() > 1 and "hopper" in plan.family
    bound = attn.bind(DeviceArray.from_numpy(_bits(q), "bfloat16"), there, plan=plan)
    first = None
    for _ in range(10):
        state = bound()
        found = reference.as_float64(state.o)
        first = found if first is None else first
        np.testing.assert_array_equal(found, first)
    assert first is not None
    close(first, reference.as_float64(bound.state.lse), wanted)


@pytest.mark.gpu
def test_more_tiles_than_a_segment_has(card, rng):
    """A request whose tiles of keys come in several segments, and one whose first sees nothing."""
    from tilewright.runtime.cuda import DeviceArray

    keys = hopper.TILES[64, 64].segment * hopper.TILES[64, 64].keys * 2 + 77
    attn = Attention(2, 1, 64, ALL_VARIANTS["causal"])
    kv = ragged(rng, [keys, 5], 1, 64, TYPES["bfloat16"])
    q, indptr = queries(rng, [70, 200], 2, 64, TYPES["bfloat16"])
    wanted = reference.attention(q, kv, indptr, attn.variant)
    there = to_card(kv)
    state = attn.run(DeviceArray.from_numpy(_bits(q), "bfloat16"), there, attn.plan(indptr, there))
    close(reference.as_float64(state.o), reference.as_float64(state.lse), wanted)
