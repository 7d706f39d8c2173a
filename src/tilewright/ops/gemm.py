"""GEMM: C = A B, float16 or bfloat16 in, float32 out, on tile operations of 16 × 8 × 16.

Fragments are loaded straight from memory. On a GPU a warp owns 32 × 32 elements of C, and the warps
of a CTA stand side by side, so that they share the rows of A in the cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tilewright import dtypes
from tilewright.build import program
from tilewright.errors import ArgumentError
from tilewright.runtime.kernel import Kernel
from tilewright.runtime.view import view
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out

ROWS, COLS, DEPTH = 16, 8, 16  # one tile operation
WARP_ROWS, WARP_COLS = 32, 32  # elements of C that a warp keeps in its registers
WARPS = 4  # of a CTA
HALVES = ("float16", "bfloat16")


@program
def gemm_program(A=dense("m k"), B=dense("k n")):
    i, j, k = indices("m n k")
    return out.typed("float32")[i, j](trace.sum_(A[i, k] * B[k, j], over=k))


def recipe(s: Schedule) -> Schedule:
    """The schedule of GEMM for the target it is built for."""
    s = s.split("i", WARP_ROWS, into=("i_o", "i_r")).split("i_r", ROWS, into=("i_u", "i_v"))
    across = WARP_COLS * WARPS if s.target.is_cuda else WARP_COLS
    s = s.split("j", across, into=("j_o", "j_r")).split("j_r", WARP_COLS, into=("j_y", "j_w"))
    s = s.split("j_w", COLS, into=("j_u", "j_v")).split("k", DEPTH, into=("k_o", "k_v"))
    s = s.reorder("i_o", "j_o", "j_y", "k_o", "i_u", "j_u", "i_v", "j_v", "k_v")
    s = s.unroll("i_u").unroll("j_u").mma("i_v", "j_v", "k_v")
    if s.target.is_cuda:
        return s.bind("i_o", "cta.x").bind("j_o", "cta.y").bind("j_y", "thread.y")
    return s.parallel("i_o").parallel("j_o")


@cache
def gemm_kernel(dtype: str, target: str = "cpp") -> Kernel:
    """The built kernel for operands of a dtype. `kernel(A, B, out=None)`: any sizes."""
    return gemm_program.typed(A=dtype, B=dtype).schedule(recipe).build(target)


def gemm(A: Any, B: Any, out: Any = None, *, dtype: Any = None) -> Any:
    """C = A B. A: (m, k), B: (k, n), both float16 or both bfloat16; C: (m, n) float32.

    `dtype` says what uint16 arrays hold, for frameworks without bfloat16. Raises ArgumentError.
    """
    a = view(A)
    kind = (dtypes.dtype(dtype) if dtype is not None else a.dtype).name
    if kind not in HALVES:
        raise ArgumentError(
            "A102", f"A is {kind}, GEMM multiplies {' or '.join(HALVES)}", where="argument A",
            hint='for bfloat16 held in uint16 pass dtype="bfloat16"',
        )  # fmt: skip
    return gemm_kernel(kind, "cuda" if a.device.startswith("cuda") else "cpp")(A, B, out=out)
