"""The families of every GPU from sm_80 on, which divide no keys: plain.

Templates: kernels/flash_tiles.cuh, tensor cores for 16-bit types, and kernels/flash_portable.cuh,
CUDA cores in float32 for any dtype and any head_dim."""

import functools

from tilewright.attention.families.family import (
    Call,
    Family,
    Prepared,
    against_tiles,
    check_alignment,
)
from tilewright.attention.plan import ITEM, ITEMS, Plan
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, cuda_text, flash_constants, loaded, params_struct
from tilewright.attention.tracing import SCORE

THREADS = 128
ROWS = 8  # ROWS of flash_portable.cuh


@functools.lru_cache(256)
def source(spec: Spec, aligned: bool = True) -> str:
    """The CUDA C++ of one kernel; `aligned` allows loads of 16 bytes."""
    numbers = flash_constants(spec, {"MAX_TOKENS": FAMILY.qo_tile(spec)})
    params, files = params_struct(spec, ITEMS), ("gpu.cuh", "async.cuh")
    text = cuda_text(spec, files, numbers, ITEM, params, "flash_portable.cuh")
    return text if aligned else "#define TW_UNALIGNED\n" + text


def smem_bytes(spec: Spec) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of flash_portable.cuh."""
    k, v = (-(-n // 32) * 32 for n in (spec.head_dim, spec.head_dim_vo))
    return 4 * (ROWS * k + THREADS // 32 * ROWS * (v + 2))


def _prepare(call: Call) -> Prepared:
    strides = [call.values[n] for n in ("k_page", "k_slot", "k_head")]
    addresses = [call.values["k"], *(s * call.pool.dtype.itemsize for s in strides)]
    text = source(call.spec, all(a % 16 == 0 for a in addresses))
    return _prepared(call, text, smem_bytes(call.spec))


def _prepared(call: Call, text: str, smem: int) -> Prepared:
    from tilewright.runtime import cuda

    spec, plan, ordinal = call.spec, call.plan, call.ordinal
    assert isinstance(plan, Plan)  # a workspace is of the decode family
    indptr, items, _ = plan.on_device(ordinal)
    work = {"qo_indptr": indptr.pointer, "items": items.pointer}
    block = params_struct(spec, ITEMS).pack(**call.values, **work)
    grid, cta = (len(plan.items), 1, 1), (THREADS, 1, 1)
    launch = loaded(text, ordinal).prepare(grid, cta, smem, block, overlaps=True)
    keep = (indptr, items, block)
    return Prepared(launch, lambda: launch.run(cuda.current_stream(ordinal)), text, keep)


# ---------------------------------------------------------------------------- tensor cores


def tiles_of(spec: Spec) -> tuple[int, int]:
    """Packed rows of an item, and keys of a tile: of outputs and scores that fit the registers."""
    return 128 if spec.head_dim_vo <= 128 else 64, 64 if spec.head_dim <= 64 else 32


@functools.lru_cache(256)
def tiles_source(spec: Spec) -> str:
    """The CUDA C++ of a kernel of tensor cores."""
    rows, keys = tiles_of(spec)
    numbers = {"MAX_TOKENS": TILES.qo_tile(spec), "BLOCKS": rows // 64, "KEYS": keys}
    numbers["DIRECT"] = int(spec.traced.logits == SCORE)
    params, files = params_struct(spec, ITEMS), ("gpu.cuh", "mma.cuh", "async.cuh")
    text = flash_constants(spec, numbers)
    return cuda_text(spec, files, text, ITEM, params, "flash_tiles.cuh")


def tiles_smem(spec: Spec) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of flash_tiles.cuh."""
    k, v = (-(-n // 16) * 32 + 16 for n in (spec.head_dim, spec.head_dim_vo))
    rows, keys = tiles_of(spec)
    return rows * k + keys * (k + v)


def _refuses(spec: Spec, _rows: int, pool: Pool | None) -> str:
    if spec.head_dim % 8 or spec.head_dim_vo % 8 or max(spec.head_dim, spec.head_dim_vo) > 256:
        return "head_dim is no multiple of 8 up to 256"
    return against_tiles(spec, pool)


def _prepare_tiles(call: Call) -> Prepared:
    check_alignment(call.values, 2)
    return _prepared(call, tiles_source(call.spec), tiles_smem(call.spec))


FAMILY = Family("portable", "cuda", lambda spec: ROWS, "", 0, lambda spec, n, pool: "", _prepare)
TILES = Family("tiles", "cuda", lambda spec: tiles_of(spec)[0], "", 0, _refuses, _prepare_tiles)
