"""GEMM: C = A B, float16 or bfloat16 in, float32 out, on tile operations of 16 × 8 × 16.

On a GPU a warp computes 32 × 32 elements of C, and the four warps of a CTA 64 × 64; they copy tiles
of A and B to shared memory. On a CPU fragments are loaded from memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tilewright import dtypes
from tilewright.build import Definition, named_recipe, program
from tilewright.errors import ArgumentError
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.view import view
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out

ROWS, COLS, DEPTH = 16, 8, 16  # one tile operation
WARP_ROWS, WARP_COLS = 32, 32  # elements of C that a warp keeps in its registers
WARPS = 2  # of a CTA, down and across
STEP = 64  # of the sum, between two barriers of a CTA
LOAD = 8  # elements that a thread copies at once: 16 bytes
HALVES = ("float16", "bfloat16")


@program
def gemm_program(A=dense("m k"), B=dense("k n")):
    i, j, k = indices("i:m j:n k:k")
    return out.typed("float32")[i, j](trace.sum_(A[i, k] * B[k, j], over=k))


@named_recipe
def recipe(s: Schedule, n: int = 0, k: int = 0, products: int = 1) -> Schedule:
    """The schedule of GEMM and of functions of products A B. `n`, `k`: sizes, 0 for any;
    `products`: how many have accumulators."""
    s = s.specialize("n", n) if n else s
    s = s.specialize("k", k) if k else s
    return gpu_recipe(s, WARP_COLS // products) if s.target.is_cuda else cpu_recipe(s)


def cpu_recipe(s: Schedule) -> Schedule:
    """A square of C in registers."""
    s = s.split("i", WARP_ROWS, into=("i_o", "i_w")).split("j", WARP_COLS, into=("j_o", "j_w"))
    s = _tiles(s.split("k", DEPTH, into=("k_o", "k_v")))
    s = s.reorder("i_o", "j_o", "k_o", "i_u", "j_u", "i_v", "j_v", "k_v")
    return s.mma("i_v", "j_v", "k_v").parallel("i_o").parallel("j_o")


def gpu_recipe(s: Schedule, warp_cols: int = WARP_COLS) -> Schedule:
    """A square of C for each CTA and for each of its warps; operands in shared memory."""
    s = s.split("i", WARP_ROWS * WARPS, into=("i_o", "i_r"))
    s = s.split("i_r", WARP_ROWS, into=("i_y", "i_w"))
    s = s.split("j", warp_cols * WARPS, into=("j_o", "j_r"))
    s = s.split("j_r", warp_cols, into=("j_y", "j_w"))
    s = _tiles(s.split("k", STEP, into=("k_o", "k_r")).split("k_r", DEPTH, into=("k_u", "k_v")))
    s = s.reorder("i_o", "j_o", "k_o", "i_y", "j_y", "k_u", "i_u", "j_u", "i_v", "j_v", "k_v")
    s = s.unroll("k_u").mma("i_v", "j_v", "k_v").fuse("i_y", "j_y", into="warp")
    s = s.bind("i_o", "cta.x").bind("j_o", "cta.y").bind("warp", "thread.y")
    return s.cache("A", "k_o", "shared").cache("B", "k_o", "shared")


def _tiles(s: Schedule) -> Schedule:
    """The square of a warp in tile operations."""
    s = s.split("i_w", ROWS, into=("i_u", "i_v")).split("j_w", COLS, into=("j_u", "j_v"))
    return s.unroll("i_u").unroll("j_u")


@cache
def gemm_kernel(dtype: str, n: int = 0, k: int = 0, target: str = "cpp") -> Kernel:
    """The built kernel for operands of a dtype. `kernel(A, B, out=None)`: any m; any `n` and `k`
    where they are 0."""
    return gemm_definition(dtype, n, k).build(target)


def gemm_definition(dtype: str, n: int = 0, k: int = 0) -> Definition:
    """The program of `gemm_kernel` with its schedule."""
    return gemm_program.typed(A=dtype, B=dtype).schedule(recipe.of(n=n, k=k))


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
        return gemm_kernel(kind)(A, B, out=out)
    k, n = (int(x) for x in view(B).shape) if len(view(B).shape) == 2 else (0, 0)
    known = (n, k) if n % LOAD == 0 and k % LOAD == 0 else (0, 0)
    return gemm_kernel(kind, *known, "cuda")(A, B, out=out)
