"""The family of every GPU from sm_80 on: CUDA cores in float32, any dtype, any head_dim.

Template: kernels/flash_portable.cuh."""

import functools

from tilewright.attention.families.family import Call, Family, Prepared
from tilewright.attention.plan import ITEM, ITEMS, Plan
from tilewright.attention.spec import Spec, cuda_text, flash_constants, loaded, params_struct
from tilewright.runtime import cuda

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
    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    assert isinstance(plan, Plan)  # a workspace is of the decode family
    indptr, items, _ = plan.on_device(ordinal)
    strides = [values[n] for n in ("k_page", "k_slot", "k_head")]
    addresses = [values["k"], *(s * call.pool.dtype.itemsize for s in strides)]
    text = source(spec, all(a % 16 == 0 for a in addresses))
    block = params_struct(spec, ITEMS).pack(**values, qo_indptr=indptr.pointer, items=items.pointer)
    grid, cta = (len(plan.items), 1, 1), (THREADS, 1, 1)
    launch = loaded(text, ordinal).prepare(grid, cta, smem_bytes(spec), block, overlaps=True)
    keep = (indptr, items, block)
    return Prepared(launch, lambda: launch.run(cuda.current_stream(ordinal)), text, keep)


FAMILY = Family("portable", "cuda", lambda spec: ROWS, "", 0, lambda spec, n, pool: "", _prepare)
