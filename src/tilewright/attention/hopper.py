"""The Hopper family: prefill by wgmma and TMA on sm_90a (kernels/hopper.cuh).

`hosts` says whether it can run a call, with the reason when it cannot; `bind` makes the launch from
plain addresses, strides and lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention import flash, render
from tilewright.attention.flash import Spec
from tilewright.attention.kv import MAX_KEYS
from tilewright.dtypes import DType
from tilewright.ir.nodes import Var
from tilewright.runtime.layout import Struct
from tilewright.toolchain import nvrtc

ARCH = "sm_90a"
THREADS, ROWS, KEYS = 384, 128, 128  # of a CTA; packed rows of an item, keys of a tile
K_STAGES, V_STAGES = 2, 2  # tiles in shared memory
MAX_TILES = 512  # of a segment: what the scheduler sorts at once
HEAD_DIMS = (64, 128)
_TAIL = 4  # items of a CTA that are drawn in the order of their keys

WORK = Struct("Work", [("request", "int32"), ("head", "int32"), ("token", "int32")])
"""An item: a request, a KV head, and the row of q of its first query."""


def hosts(spec: Spec, arch: str, fields: dict[str, Any]) -> str:
    """Why the kernel cannot run a call, or "" where it can. `fields`: addresses, strides in
    elements, sizes and sm_scale of the call, as `decode.params_struct` names them."""
    if arch != ARCH:
        return f"the GPU is {arch}, not {ARCH}"
    if spec.q != spec.kv or spec.kv not in (dtypes.float16, dtypes.bfloat16):
        return "q, k and v are not all float16 or all bfloat16"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is none of {HEAD_DIMS}"
    if not fields["sm_scale"] > 0:
        return "sm_scale is not positive"
    page_size = fields["page_size"]
    if fields["kv_indices"] and page_size & (page_size - 1):
        return f"page_size {page_size} is no power of two"
    used = ("k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head", "q_token", "q_head")
    if any(fields[n] % 16 for n in ("q", "k", "v", "o")) or any(fields[n] % 8 for n in used):
        return "rows of q, k, v or o are not aligned to 16 bytes"
    if any(fields[n] < 0 for n in used):
        return "q, k or v has a negative stride"
    if not fields["pages"]:
        return "the cache has no pages"
    return ""


# ---------------------------------------------------------------------------- the work of a batch


def work(qo_indptr: np.ndarray, kv_heads: int, group: int, ctas: int) -> np.ndarray:
    """The items of a batch, an array of `WORK`, in the order in which `ctas` CTAs draw them.

    Requests with many queries come first. Within one, the items of a KV head follow each other, so
    that CTAs read the same keys at the same time; the last queries first: under a causal mask they
    see the most keys. The last few items of each CTA are sorted by that number over requests and
    heads, so that none of them ends long after the others.
    """
    indptr = np.asarray(qo_indptr, np.int64)
    lengths, tokens = np.diff(indptr), ROWS // group
    order = np.argsort(-lengths, kind="stable")
    tiles = np.repeat(-(-lengths[order] // tokens), kv_heads)  # of each (request, KV head)
    unit = np.repeat(np.arange(len(tiles)), tiles)
    number = np.cumsum(tiles)[unit] - 1 - np.arange(len(unit))
    tail = max(0, len(unit) - _TAIL * ctas)
    tail = int(np.searchsorted(unit, unit[tail])) if tail else 0  # whole units
    by_keys = tail + np.argsort(-number[tail:], kind="stable")
    unit[tail:], number[tail:] = unit[by_keys], number[by_keys]
    items = np.zeros(len(unit), WORK.numpy)
    items["request"], items["head"] = order[unit // kv_heads], unit % kv_heads
    items["token"] = indptr[items["request"]] + number * tokens
    return items


# ---------------------------------------------------------------------------- the kernel


def smem_bytes(spec: Spec) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of hopper.cuh."""
    stages, slots = K_STAGES + V_STAGES, 2 * (10 + MAX_TILES) * 4
    tiles, barriers = 2 + stages, 2 * stages + 9
    return tiles * ROWS * spec.head_dim * 2 + slots + barriers * 8 + 1024


@functools.lru_cache(256)
def params_struct(spec: Spec, out: DType) -> Struct:
    """The parameters of the kernel, a multiple of 64 bytes."""
    fields: list[tuple[str, ...]] = [
        ("q_map", "uint64[16]"), ("k_map", "uint64[16]"), ("v_map", "uint64[16]"),
        ("o", "ptr", "uint16_t*" if out.itemsize == 2 else "float*"), ("lse", "ptr", "float*"),
        ("qo_indptr", "ptr", "const int32_t*"), ("kv_indptr", "ptr", "const int32_t*"),
        ("kv_indices", "ptr", "const int32_t*"), ("last_page_len", "ptr", "const int32_t*"),
        ("work", "ptr", "const Work*"), ("counter", "ptr", "int32_t*"),
        ("cycles", "ptr", "int64_t*"), ("pages", "int64"), ("listed", "int64"),
        ("page_size", "int32"), ("page_shift", "int32"), ("items", "int32"),
        ("qo_heads", "int32"), ("sm_scale", "float32"),
        *render.param_fields(spec.traced),
    ]  # fmt: skip
    rest = -Struct("Params", fields).size % 64
    return Struct("Params", [*fields, ("padding", f"uint64[{rest // 8}]")] if rest else fields)


def source(spec: Spec, box: int, paged: bool, out: DType) -> str:
    """The CUDA C++ of one kernel; `box`: keys of a TMA box."""
    numbers = {
        "D": spec.head_dim, "G": spec.group, "BOX": box, "PAGED": int(paged),
        "K_STAGES": K_STAGES, "V_STAGES": V_STAGES, "MAX_TILES": MAX_TILES, "MAX_KEYS": MAX_KEYS,
        "TRIVIAL_LOGITS": int(isinstance(spec.traced.logits, Var)),
    }  # fmt: skip
    return "\n".join(
        (
            "// generated by Tilewright",
            *(f'#include "{name}"' for name in ("gpu.cuh", "mma.cuh", "hopper.cuh")),
            "#define TW_METHOD __device__ __forceinline__",
            "struct At { int32_t qo, kv, qo_head, kv_head, request; };",
            "namespace attention {",
            *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
            f"using Kind = tw::{spec.kv.name}_bits;",
            f"using Out = {'uint16_t' if out.itemsize == 2 else 'float'};",
            "}  // namespace attention",
            '#include "bounds.h"',
            '#include "pages.h"',
            WORK.c_decl,
            params_struct(spec, out).c_decl,
            render.cuda_variant(spec.traced),
            '#include "prefill_hopper.cuh"',
        )
    )


def compile_cuda(
    spec: Spec, box: int, paged: bool, out: DType, flags: Sequence[str] = ()
) -> nvrtc.Cubin:
    """The cubin of one kernel. Raises BuildError."""
    text = source(spec, box, paged, out)
    headers = flash.cuda_headers()
    return nvrtc.compile_cuda(text, arch=ARCH, name="attention", headers=headers, flags=flags)


@functools.lru_cache(256)
def kernel(
    spec: Spec, box: int, paged: bool, out: DType, ordinal: int, flags: tuple[str, ...] = ()
) -> Any:
    """The loaded function on one GPU. Raises BuildError[B101, B102, B104]."""
    from tilewright.runtime import cuda

    cubin = compile_cuda(spec, box, paged, out, flags)
    return cuda.load_cubin(cubin.image, ordinal).function("stage0")


def source_of(spec: Spec, fields: dict[str, Any], out: DType) -> str:
    """The source of the kernel that runs a call."""
    return source(spec, box_keys(fields), bool(fields["kv_indices"]), out)


def maps(spec: Spec, fields: dict[str, Any], tokens: int, kv_heads: int) -> dict[str, list[int]]:
    """The tensor maps of q, k and v as the parameters hold them."""
    from tilewright.runtime.tensor_map import tensor_map

    group, dim = spec.group, spec.head_dim
    paged = bool(fields["kv_indices"])
    if not tokens:  # nothing is launched, and there are no maps of empty arrays
        return dict.fromkeys(("q_map", "k_map", "v_map"), [0] * 16)
    found = {}
    strides = (fields["q_head"], fields["q_token"])
    shape, box = (dim, group * kv_heads, tokens), (64, group, ROWS // group)
    found["q_map"] = tensor_map(fields["q"], spec.q, shape, strides, box)
    for name in "kv":
        page, slot, head = (fields[f"{name}_{n}"] for n in ("page", "slot", "head"))
        rows, pages = (fields["page_size"], fields["pages"]) if paged else (fields["pages"], 1)
        shape, box = (dim, rows, kv_heads, pages), (64, box_keys(fields), 1, 1)
        strides = (slot, head, page if paged else 8)
        found[f"{name}_map"] = tensor_map(fields[name], spec.kv, shape, strides, box)
    return found


def box_keys(fields: dict[str, Any]) -> int:
    """Keys of a TMA box: a page, or a tile where pages are larger or keys lie in a row."""
    return min(fields["page_size"], KEYS) if fields["kv_indices"] else KEYS


def bind(
    spec: Spec,
    fields: dict[str, Any],
    qo_indptr: np.ndarray,
    out: DType,
    ordinal: int,
    flags: tuple[str, ...] = (),
) -> tuple[Any, list[Any]]:
    """The launch of a call that `hosts` accepts, and what must live as long. `fields` as in `hosts`
    and the values of the variant; `qo_indptr` on the host; K and V have at least one page."""
    from tilewright.runtime import cuda

    kv_heads = fields["qo_heads"] // spec.group
    items = work(qo_indptr, kv_heads, spec.group, cuda.device(ordinal).sms)
    on_device = cuda.DeviceArray.from_numpy(items.view(np.int32), ordinal=ordinal)
    indptr = cuda.DeviceArray.from_numpy(np.asarray(qo_indptr, np.int32), ordinal=ordinal)
    counter = cuda.DeviceArray((1,), "int32", ordinal)
    counter.zero()
    paged, struct = bool(fields["kv_indices"]), params_struct(spec, out)
    names = {f.name for f in struct.fields} - {"cycles"}
    block = struct.pack(
        **{n: x for n, x in fields.items() if n in names}, qo_indptr=indptr.pointer,
        **maps(spec, fields, int(qo_indptr[-1]), kv_heads), work=on_device.pointer,
        counter=counter.pointer, items=len(items), cycles=fields.get("cycles", 0),
        page_shift=fields["page_size"].bit_length() - 1,
        **({"padding": [0] * struct.fields[-1].count} if "padding" in names else {}),
    )  # fmt: skip
    function = kernel(spec, box_keys(fields), paged, out, ordinal, flags)
    grid = (min(len(items), cuda.device(ordinal).sms), 1, 1)
    launch = function.prepare(grid, (THREADS, 1, 1), smem_bytes(spec), block)
    return launch, [on_device, indptr, counter, block]
