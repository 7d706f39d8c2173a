"""The Hopper family: prefill by wgmma and TMA on sm_90a.

Template: kernels/prefill_hopper.cuh. Items have up to 128 packed rows; persistent CTAs draw them in
the order of the plan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention import render
from tilewright.attention.families.family import Call, Family, Prepared
from tilewright.attention.plan import ITEM, Plan
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, cuda_headers
from tilewright.attention.spec import params_struct as common_params
from tilewright.attention.table import MAX_KEYS
from tilewright.errors import ArgumentError
from tilewright.ir.nodes import Var
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import allocate, view
from tilewright.toolchain import nvrtc

ARCH = "sm_90a"
THREADS, ROWS, KEYS = 384, 128, 128  # of a CTA; packed rows of an item, keys of a tile
K_STAGES, V_STAGES = 2, 2  # tiles in shared memory
MAX_TILES = 512  # of a segment: what the scheduler sorts at once
HEAD_DIMS = (64, 128)
MAX_GROUP = 64
IN_PAGES, IN_ROWS, IN_ONE = 0, 1, 2  # where the keys of a request lie
_TAIL = 4  # items of a CTA that are drawn in the order of their keys


def refuses(spec: Spec, rows: int, pool: Pool | None) -> str:
    """Why the kernel cannot run a call, or "" where it can."""
    del rows
    if spec.q != spec.kv or spec.kv not in (dtypes.float16, dtypes.bfloat16):
        return "q, k and v are not all float16 or all bfloat16"
    if spec.head_dim not in HEAD_DIMS or spec.head_dim_vo != spec.head_dim:
        return f"head_dim is none of {HEAD_DIMS}, the same for K and V"
    if spec.group > MAX_GROUP:
        return f"{spec.group} query heads share a KV head, more than {MAX_GROUP}"
    if not spec.ascending:
        return "sm_scale is not positive"
    if spec.traced.sink is not None:
        return "the variant has a sink"
    if spec.table.kv_base:
        return "keys have positions of their own"
    if pool is None:
        return "the strides and the GPU are not known: plan with the cache, not with its table"
    arch = _arch(pool.device)
    if arch != ARCH:
        return f"the GPU is {arch}, not {ARCH}"
    if spec.table.table_entries and pool.page_size & (pool.page_size - 1):
        return f"page_size {pool.page_size} is no power of two"
    strides = (*pool.k.strides[:3], *pool.v.strides[:3])
    if any(a % 16 for a in (pool.k.pointer, pool.v.pointer, *(2 * n for n in strides))):
        return "rows of k or v are not aligned to 16 bytes"
    if min(strides) < 0:
        return "k or v has a negative stride"
    return "" if pool.pages else "the cache has no pages"


def _arch(device: str) -> str:
    from tilewright.runtime import cuda

    return cuda.device_arch(int(device.partition(":")[2] or 0))


def order(items: np.ndarray, qo_indptr: np.ndarray, workers: int) -> np.ndarray:
    """The order in which CTAs draw the items of a batch, as indices.

    Requests with many queries come first. Within one, the items of a KV head follow each other, so
    that CTAs read the same keys at the same time; the last queries first: under a causal mask they
    see the most keys. The last few items of each CTA are sorted by that number over requests and
    heads, so that none of them ends long after the others.
    """
    indptr = np.asarray(qo_indptr, np.int64)
    rank = np.empty(len(indptr) - 1, np.int64)
    rank[np.argsort(-np.diff(indptr), kind="stable")] = np.arange(len(rank))
    request, head = items["request"].astype(np.int64), items["kv_head"].astype(np.int64)
    begin = items["qo_begin"] - indptr[request]
    by = np.lexsort((-begin, head, rank[request]))
    unit = (rank[request] * (int(head.max(initial=0)) + 1) + head)[by]
    tail = max(0, len(by) - _TAIL * workers)
    tail = int(np.searchsorted(unit, unit[tail])) if tail else 0  # whole units
    by[tail:] = by[tail:][np.argsort(-begin[by[tail:]], kind="stable")]
    return by


# ---------------------------------------------------------------------------- the kernel


def smem_bytes(spec: Spec) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of prefill_hopper.cuh."""
    stages, slots = K_STAGES + V_STAGES, 2 * (12 + MAX_TILES) * 4
    tiles, barriers = 2 + stages, 2 * stages + 9
    return tiles * ROWS * spec.head_dim * 2 + slots + barriers * 8 + 1024


@functools.lru_cache(256)
def params_struct(spec: Spec) -> Struct:
    """The parameters of the kernel: the tensor maps first, a multiple of 64 bytes in all."""
    maps = tuple((f"{name}_map", "uint64[16]") for name in "qkv")
    work: tuple[tuple[str, ...], ...] = (
        ("items", "ptr", "const Item*"), ("counter", "ptr", "int32_t*"),
        ("cycles", "ptr", "int64_t*"), ("item_count", "int32"), ("page_shift", "int32"),
    )  # fmt: skip
    rest = -common_params(spec, work, maps).size % 64
    padding = (("padding", f"uint64[{rest // 8}]"),) if rest else ()
    return common_params(spec, work, (*maps, *padding))


def keys_lie(spec: Spec) -> int:
    """How the loaders find the keys of a request."""
    if spec.table.table_entries:
        return IN_PAGES
    return IN_ROWS if spec.table.table_indptr else IN_ONE


def box_keys(spec: Spec, page_size: int) -> int:
    """Keys of a TMA box: a page, or a tile where pages are larger or keys lie in a row."""
    return min(page_size, KEYS) if keys_lie(spec) == IN_PAGES else KEYS


def source(spec: Spec, box: int) -> str:
    """The CUDA C++ of one kernel; `box`: keys of a TMA box."""
    numbers = {
        "D": spec.head_dim, "G": spec.group, "BOX": box, "IN_PAGES": IN_PAGES, "IN_ROWS": IN_ROWS,
        "KEYS_LIE": keys_lie(spec), "K_STAGES": K_STAGES, "V_STAGES": V_STAGES,
        "MAX_TILES": MAX_TILES, "MAX_KEYS": MAX_KEYS,
        "TRIVIAL_LOGITS": int(isinstance(spec.traced.logits, Var)),
    }  # fmt: skip
    return "\n".join(
        (
            "// generated by Tilewright",
            *(f'#include "{name}"' for name in ("gpu.cuh", "mma.cuh", "hopper.cuh")),
            "#define TW_METHOD __device__ __forceinline__",
            render.CUDA_AT,
            "namespace attention {",
            *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
            f"using Kind = tw::{spec.kv.name}_bits;",
            f"using Out = {'uint16_t' if spec.o.itemsize == 2 else 'float'};",
            "}  // namespace attention",
            spec.table.c_text(),
            '#include "bounds.h"',
            '#include "table.h"',
            '#include "variant.h"',
            ITEM.c_decl,
            params_struct(spec).c_decl,
            render.cuda_variant(spec.traced),
            '#include "prefill_hopper.cuh"',
        )
    )


def compile_cuda(spec: Spec, box: int, flags: Sequence[str] = ()) -> nvrtc.Cubin:
    """The cubin of one kernel. Raises BuildError."""
    text, headers = source(spec, box), cuda_headers()
    return nvrtc.compile_cuda(text, arch=ARCH, name="attention", headers=headers, flags=flags)


@functools.lru_cache(256)
def kernel(spec: Spec, box: int, ordinal: int) -> Any:
    """The loaded function on one GPU. Raises BuildError[B101, B102, B104]."""
    from tilewright.runtime import cuda

    return cuda.Module(compile_cuda(spec, box).image, ordinal).function("stage0")


def maps(spec: Spec, values: dict[str, Any], tokens: int) -> dict[str, list[int]]:
    """The tensor maps of q, k and v as the parameters hold them."""
    from tilewright.runtime.tensor_map import tensor_map

    if not tokens:  # nothing is launched, and there are no maps of empty arrays
        return dict.fromkeys(("q_map", "k_map", "v_map"), [0] * 16)
    group, dim, kv_heads = spec.group, spec.head_dim, values["kv_heads"]
    shape, box = (dim, values["qo_heads"], tokens), (64, group, ROWS // group)
    words = {
        "q_map": tensor_map(values["q"], spec.q, shape, (values["q_head"], values["q_token"]), box)
    }
    for name in "kv":
        page, slot, head = (values[f"{name}_{n}"] for n in ("page", "slot", "head"))
        rows, pages = values["page_size"], values["pages"]
        if keys_lie(spec) == IN_ROWS:
            rows, pages, slot, page = pages, 1, page, 8
        shape = (dim, rows, kv_heads, pages)
        box = (64, box_keys(spec, values["page_size"]), 1, 1)
        words[f"{name}_map"] = tensor_map(values[name], spec.kv, shape, (slot, head, page), box)
    return words


def _prepare(call: Call) -> Prepared:
    from tilewright.runtime import cuda

    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    assert isinstance(plan, Plan)  # a workspace is of the decode family
    _check_alignment(values)
    indptr, items = plan.on_device(ordinal)
    counter = allocate(call.like, (1,), dtypes.int32)
    cuda.clear(view(counter))
    box, struct = box_keys(spec, values["page_size"]), params_struct(spec)
    padding = {f.name: [0] * f.count for f in struct.fields if f.name == "padding"}
    block = struct.pack(
        **values, **maps(spec, values, plan.tokens), **padding, qo_indptr=indptr.pointer,
        items=items.pointer, item_count=len(plan.items), counter=view(counter).pointer,
        page_shift=values["page_size"].bit_length() - 1, cycles=0, partials=0, counters=0,
    )  # fmt: skip
    grid = (min(len(plan.items), cuda.device(ordinal).sms), 1, 1)
    launch = kernel(spec, box, ordinal).prepare(grid, (THREADS, 1, 1), smem_bytes(spec), block)

    def run() -> None:
        launch.run(cuda.current_stream(ordinal))

    return Prepared(launch, run, source(spec, box), (indptr, items, counter, block))


def _check_alignment(values: dict[str, Any]) -> None:
    q = (values["q"], 2 * values["q_token"], 2 * values["q_head"])
    for name, addresses in (("q", q), ("out", (values["o"],))):
        if any(a % 16 for a in addresses) or min(addresses) < 0:
            raise ArgumentError(
                "A104",
                f"rows of {name} are not aligned to 16 bytes, or a stride is negative",
                where=name,
                hint=f"a contiguous copy of {name}",
            )


FAMILY = Family("hopper", "cuda", lambda spec: ROWS, False, 0, refuses, _prepare, order)
