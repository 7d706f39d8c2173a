"""The families of every GPU from sm_80 on, which divide no keys: plain.

Templates: kernels/flash_tiles.cuh, tensor cores for 16-bit types, and kernels/flash_portable.cuh,
CUDA cores in float32 for any dtype and any head_dim."""

import functools

from tilewright import dtypes
from tilewright.attention.families.family import Call, Family, Prepared, check_alignment, refusal
from tilewright.attention.plan import ITEM, ITEMS, Plan
from tilewright.attention.pool import Pool
from tilewright.attention.spec import Spec, cuda_text, flash_constants, params_struct
from tilewright.attention.tracing import SCORE
from tilewright.ir.body import Body

THREADS = 128
CTAS = 2  # of an SM
ROWS = 8  # ROWS of flash_portable.cuh


def tiles_of(spec: Spec) -> tuple[int, int]:
    """Packed rows of an item of tensor cores, and keys of a tile: what the registers hold."""
    return 128 if spec.head_dim_vo <= 128 else 64, 64 if spec.head_dim <= 64 else 32


def _refuses(spec: Spec, rows: int, pool: Pool | None, arch: str = "") -> str:
    """Why the kernel of tensor cores cannot run a call, or "": without a softmax weights may be
    beyond float16; for a hook eight rows of outputs fit into the shared memory of a warp."""
    fits = smem_bytes(spec, True) // 64 * 4 >= 8 * (-(-spec.head_dim_vo // 16) * 16)
    hosted = ["output"] * fits + ["softmax"] * (spec.kv == dtypes.bfloat16)
    return refusal(spec, rows, pool, arch, "query", "key", *hosted)


@functools.lru_cache(256)
def body(spec: Spec, tiles: bool = False) -> Body:
    """One kernel, by `tiles` that of tensor cores. Its units are items."""
    (rows, keys), direct = tiles_of(spec), int(spec.traced.logits == SCORE)
    numbers = {"BLOCKS": rows // 64, "KEYS": keys, "DIRECT": direct} if tiles else {}
    files = ("gpu.cuh", *(["mma.cuh"] if tiles else []), "async.cuh")
    file = "flash_tiles.cuh" if tiles else "flash_portable.cuh"
    text = cuda_text(spec, flash_constants(spec, numbers), ITEM, params_struct(spec, ITEMS), file)
    return Body(
        text, "flash::run", THREADS, THREADS * CTAS, smem_bytes(spec, tiles), files,
        *params_struct(spec, ITEMS).buffers, order=("wait", "start", "run"), ctas=CTAS,
    )  # fmt: skip


def smem_bytes(spec: Spec, tiles: bool = False) -> int:
    """Dynamic shared memory of a CTA: SMEM_BYTES of the kernel."""
    dims = spec.head_dim, spec.head_dim_vo
    if tiles:
        (rows, keys), (k, v) = tiles_of(spec), (-(-n // 16) * 32 + 16 for n in dims)
        return rows * k + keys * (k + v)
    k, v = (-(-n // 32) * 32 for n in dims)
    return 4 * (ROWS * k + THREADS // 32 * ROWS * (v + 2))


def _prepare(call: Call) -> Prepared:
    spec, plan, ordinal, values = call.spec, call.plan, call.ordinal, call.values
    assert isinstance(plan, Plan)  # a workspace is of the decode family
    indptr, items, nodes = plan.on_device(ordinal)
    tiles, strides = plan.family == TILES.name, [values[n] for n in ("k_page", "k_slot", "k_head")]
    addresses = [values["k"], *(s * call.pool.dtype.itemsize for s in strides)]
    if tiles:
        check_alignment(values, 2)
    b, macros = body(spec, tiles), ("TW_UNALIGNED",) * any(a % 16 for a in addresses)
    work = {"qo_indptr": indptr.pointer, "items": items.pointer}
    work |= {"nodes": nodes.pointer} if spec.table.shared else {}
    block = params_struct(spec, ITEMS).pack(**values, **work)
    return Prepared.on_gpu(b, ordinal, len(plan.items), block, (indptr, items, nodes), *macros)


FAMILY = Family(
    "portable", "cuda", lambda spec: ROWS, "", None, lambda *_: "", _prepare, shares=True
)
TILES = Family(
    "tiles", "cuda", lambda spec: tiles_of(spec)[0], "", None, _refuses, _prepare, shares=True
)
