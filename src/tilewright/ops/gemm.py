"""GEMM: C = A B, float16 or bfloat16 in, float32 out, on tile operations.

On a GPU a CTA computes a tile of C; its warps share tiles of A and B in shared memory, which are
copied while earlier ones are multiplied. CTAs that run at the same time compute neighbouring tiles,
so that they read the same rows and columns from the L2 cache. On a CPU fragments are loaded from
memory. References: CUTLASS (multistage main loop, threadblock swizzle).
"""

import math
from typing import Any, Literal, NamedTuple

from tilewright import dtypes
from tilewright.build import Definition, kernels, named_recipe, program
from tilewright.errors import ArgumentError
from tilewright.ir.atoms import HALVES
from tilewright.runtime.view import view
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out

ROWS, COLS, DEPTH = 16, 8, 16  # one tile operation of a CPU
WARP_ROWS, WARP_COLS = 32, 32  # elements of C in registers of a CPU
LOAD = 8  # elements that a thread copies at once: 16 bytes


class Tile(NamedTuple):
    """A tile of C: of a CTA, of each of its warps, of a tile operation. `step`: elements of the sum
    between two barriers; `stages`: buffers of A and B, where they fit; 1: copies wait.
    `neighbours`: rows of tiles that CTAs take before the next column of tiles. `cost`: measured
    time of an element of C, where there are `least` CTAs; 0: of few rows, which choose the tile."""

    rows: int
    cols: int
    warp_rows: int
    warp_cols: int
    wide: int
    step: int
    stages: int
    neighbours: int = 8
    cost: float = 0.0
    least: int = 0


TileName = Literal["large", "square", "small", "low", "few"]
TILES: dict[TileName, Tile] = {
    "large": Tile(256, 128, 64, 64, 16, 64, 4, cost=1.0, least=120),
    "square": Tile(128, 128, 64, 64, 16, 32, 4, cost=1.03, least=264),
    "small": Tile(64, 64, 32, 32, 16, 64, 3, cost=1.45),
    "low": Tile(32, 64, 32, 16, 16, 128, 4, 4),  # many bytes under way: B is what is read
    "few": Tile(16, 32, 16, 8, 8, 128, 8, 1),
}
ANY = Tile(64, 64, 32, 32, 8, 64, 1)  # sizes that are no multiples of 16 bytes
FEW, LOW = 16, 128  # rows of C
SMS = 132  # of an H100


@program
def gemm_program(A=dense("m k"), B=dense("k n")):
    i, j, k = indices("i:m j:n k:k")
    return out.typed("float32")[i, j](trace.sum_(A[i, k] * B[k, j], over=k))


@named_recipe
def recipe(
    s: Schedule, n: int = 0, k: int = 0, products: int = 1, tile: TileName = "small"
) -> Schedule:
    """The schedule of GEMM and of functions of products A B. `n`, `k`: sizes, 0 for any;
    `products`: how many have accumulators; `tile`: of a GPU, one of TILES."""
    s = s.specialize("n", n) if n else s
    s = s.specialize("k", k) if k else s
    if not s.target.is_cuda:
        return cpu_recipe(s)
    t = TILES[tile] if (n and k and n % LOAD == 0 and k % LOAD == 0) else ANY
    stages = min(t.stages, s.target.shared_bytes // (2 * t.step * (t.rows + t.cols)))
    cols, warp_cols = t.cols // products, t.warp_cols // products
    return gpu_recipe(s, t._replace(cols=cols, warp_cols=warp_cols, stages=stages))


def cpu_recipe(s: Schedule) -> Schedule:
    """A square of C in registers."""
    s = s.split("i", WARP_ROWS, into=("i_o", "i_w")).split("j", WARP_COLS, into=("j_o", "j_w"))
    s = _operations(s.split("k", DEPTH, into=("k_o", "k_v")), COLS)
    s = s.reorder("i_o", "j_o", "k_o", "i_u", "j_u", "i_v", "j_v", "k_v")
    return s.mma("i_v", "j_v", "k_v").parallel("i_o").parallel("j_o")


def gpu_recipe(s: Schedule, t: Tile) -> Schedule:
    """A tile of C for each CTA and for each of its warps; operands in shared memory."""
    s = s.split("i", t.rows, into=("i_o", "i_r")).split("i_r", t.warp_rows, into=("i_y", "i_w"))
    s = s.split("j", t.cols, into=("j_o", "j_r")).split("j_r", t.warp_cols, into=("j_y", "j_w"))
    s = s.split("k", t.step, into=("k_o", "k_r")).split("k_r", DEPTH, into=("k_u", "k_v"))
    s = _operations(s, t.wide).split("i_o", t.neighbours, into=("i_g", "i_n"))
    s = s.reorder(
        "i_g", "j_o", "i_n", "k_o", "i_y", "j_y", "k_u", "j_u", "i_u", "i_v", "j_v", "k_v"
    )
    s = s.unroll("k_u").mma("i_v", "j_v", "k_v").fuse("i_y", "j_y", into="warp")
    s = s.bind("i_g", "cta.x").bind("j_o", "cta.y").bind("i_n", "cta.x").bind("warp", "thread.y")
    s = s.cache("A", "k_o", "shared").cache("B", "k_o", "shared")
    return s.pipeline("k_o", t.stages) if t.stages > 1 else s


def _operations(s: Schedule, wide: int) -> Schedule:
    """The tile of a warp in tile operations."""
    s = s.split("i_w", ROWS, into=("i_u", "i_v")).split("j_w", wide, into=("j_u", "j_v"))
    return s.unroll("i_u").unroll("j_u")


def gemm_definition(dtype: str, n: int = 0, k: int = 0, tile: TileName = "small") -> Definition:
    """The program with its schedule, for operands of a dtype: any m; any `n` and `k` where they are
    0."""
    return gemm_program.typed(A=dtype, B=dtype).schedule(recipe.of(n=n, k=k, tile=tile))


gemm_kernel = kernels(gemm_definition)


def tile_of(m: int, n: int) -> TileName:
    """The tile for m × n elements of C on a GPU: of many rows the one that takes least time, where
    SMs compute equal numbers of tiles."""
    if m <= LOW:
        return "few" if m <= FEW else "low"

    def time(t: Tile) -> float:
        ctas = -(-m // t.rows) * -(-n // t.cols)
        return -(-ctas // SMS) * t.rows * t.cols * t.cost if ctas >= t.least else math.inf

    return min((x for x, t in TILES.items() if t.cost), key=lambda x: time(TILES[x]))


def gemm(A: Any, B: Any, out: Any = None, *, dtype: Any = None) -> Any:
    """C = A B. A: (m, k), B: (k, n), both float16 or both bfloat16; C: (m, n) float32.

    `dtype`: that of uint16 arrays, for frameworks without bfloat16. Raises ArgumentError.
    """
    a = view(A)
    kind = (dtypes.dtype(dtype) if dtype is not None else a.dtype).name
    if kind not in HALVES:
        rule = f"A is {kind}, GEMM multiplies {' or '.join(HALVES)}"
        hint = 'for bfloat16 held in uint16 pass dtype="bfloat16"'
        raise ArgumentError("A102", rule, where="argument A", hint=hint)
    if not a.device.startswith("cuda"):
        return gemm_kernel("cpp", kind)(A, B, out=out)
    if len(a.shape) != 2 or len(view(B).shape) != 2:
        return gemm_kernel("cuda", kind)(A, B, out=out)  # which refuses it
    m, (k, n) = int(a.shape[0]), (int(x) for x in view(B).shape)
    known = (n, k) if n % LOAD == 0 and k % LOAD == 0 else (0, 0)
    return gemm_kernel("cuda", kind, *known, tile_of(m, n))(A, B, out=out)
