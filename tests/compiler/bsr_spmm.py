"""SpMM with dense blocks, Y = A X for A in BSR, on tile operations of 16 × 8 × 16: a program with a
schedule of its own for the tests of tile operations. Users have lesson 10, examples/10_blocks.py.

float16 or bfloat16 in, float32 out. A block of A is contiguous in memory, and it multiplies
consecutive rows of X. On a GPU the warps of a CTA share a row of blocks, 32 or 64 features each,
and copy each block and its rows of X to shared memory, some blocks ahead.
Reference: SparseTIR (ASPLOS 2023), its block-sparse kernels on tensor cores.
"""

from collections.abc import Callable
from typing import Any

from tilewright.build import Definition, kernels, program
from tilewright.ops.gemm import COLS, DEPTH, LOAD, ROWS
from tilewright.ops.schedules import fixed_width
from tilewright.ops.spmm import last_size
from tilewright.schedule import Schedule
from tilewright.sparse import formats, trace
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import dense, indices, out, sparse

WARP_COLS = 32  # features that a warp keeps in its registers
WIDE_COLS, MANY, LOW = 64, 1024, 32  # on a GPU, of `MANY` and for blocks of up to `LOW` rows
WARP_ROWS = {"cpp": 32, "cuda": 64}  # of a block; taller blocks take several passes
WARPS = 4  # of a CTA, at most
STAGES = 3  # blocks in shared memory


@program
def bsr_spmm_program(A=sparse("m n"), X=dense("n d")):
    i, j, k = indices("i:m j:n k:d")
    return out.typed("float32")[i, k](trace.sum_(A[i, j] * X[j, k], over=j))


def block_of(fmt: Any) -> int:
    """The block size of a BSR format if it is a multiple of the tile, else 0."""
    block = fmt.levels[0].block if isinstance(fmt, formats.Format) else 0
    return block if block and block % ROWS == 0 and fmt == formats.bsr(block) else 0


def recipe(width: int = 0) -> Callable[[Schedule], Schedule]:
    """The schedule of SpMM on bsr(16), bsr(32), …; `width`: of X, 0 for any."""
    return lambda s: _scheduled(s, width)


def _scheduled(s: Schedule, width: int) -> Schedule:
    s = s.specialize("d", width) if width else s
    block = block_of(s.format_of(0))
    d = dict(s.program.sizes).get("d")
    is_wide = s.target.is_cuda and block <= LOW and d and d >= MANY and d % LOAD == 0
    cols = WIDE_COLS if is_wide else WARP_COLS
    warps = min(WARPS, -(-d // WARP_COLS)) if d else WARPS
    across = cols * warps if s.target.is_cuda else cols
    s = s.split("i_i", ROWS, into=("i_u", "i_v")).split("j_i", DEPTH, into=("j_u", "j_v"))
    s = s.split("k", across, into=("k_o", "k_r")).split("k_r", cols, into=("k_y", "k_w"))
    s = s.split("k_w", COLS, into=("k_u", "k_v"))
    few = block <= WARP_ROWS["cuda" if s.target.is_cuda else "cpp"]
    inside, around = (("i_u",), ()) if few else ((), ("i_u",))
    s = s.reorder("i_o", "k_o", *around, "j_o", "k_y", "j_u", *inside, "k_u", "i_v", "k_v", "j_v")
    s = (s.unroll("i_u") if few else s).unroll("k_u").mma("i_v", "k_v", "j_v")
    if not s.target.is_cuda:
        return s.parallel("i_o").parallel("k_o")
    s = s.bind("i_o", "cta.x").bind("k_o", "cta.y").bind("k_y", "thread.y")
    s = s.cache("A", "j_o", "shared")
    if d and d % LOAD == 0:
        return s.cache("X", "j_o", "shared").pipeline("j_o", STAGES)
    return s.cache("X", "j_o", "shared") if d else s  # a vector of X is inside a row


def bsr_spmm_definition(fmt: Any, dtype: str, width: int = 0, index: str = "int32") -> Definition:
    """The program with its schedule, for a format and a dtype; `width` 0: any d."""
    typed = bsr_spmm_program.typed(A=dtype, X=dtype, index=index)
    return typed.decompose(A=fmt).schedule(recipe(width))


bsr_spmm_kernel = kernels(bsr_spmm_definition)


def bsr_spmm(A: Packed, X: Any, out: Any = None) -> Any:
    """Y = A X, float32, of A packed as bsr(16), bsr(32) …, and X of the same 16-bit dtype."""
    width = fixed_width(last_size(X), A.device)
    target = "cuda" if A.device.startswith("cuda") else "cpp"
    index = A.structure.index_dtype.name
    return bsr_spmm_kernel(target, A.format, A.dtype.name, width, index)(A, X, out=out)
