"""SpMM: Y = A X, sparse times dense.

On a CPU: CSR, rows in parallel, the features of a row in vector registers. On a GPU: hyb, so that all
threads of a warp walk rows of one length, where the graph is large enough to pay for it; long rows
share a CTA. No atomics: every row has one owner, and sums have a fixed order.
Reference: SparseTIR (ASPLOS 2023, §4.2), its SpMM on hyb(c, k).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.build import Definition, program
from tilewright.runtime import toolchain
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import formats, trace
from tilewright.sparse.formats import Composed, Format
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import dense, indices, out, sparse


@program
def spmm_program(A=sparse("m n"), X=dense("n d")):  # noqa: ANN001, ANN201
    i, j, k = indices("m n d")
    return out[i, k](trace.sum_(A[i, j] * X[j, k], over=j))


# ---------------------------------------------------------------------------- recipes

ROWS_PER_UNIT = 16  # rows of one unit on the CPU: a few microseconds of work
CPU_TILE = 128  # features kept in registers: 8 accumulators of 16 lanes
TALL_ROWS = 16  # threads in y that share a long row
BUCKETS = (1, 2, 4, 8, 16, 32)


def cpu_recipe(s: Schedule) -> Schedule:
    """Features in registers, widest tiles first, the rest in narrower ones; rows in parallel."""
    lanes = toolchain.vector_bits() // 32
    fixed = dict(s.program.sizes).get("d")
    rest = "k"
    for width in (CPU_TILE, 32, lanes, 1):
        if width == 1 or width < lanes or (fixed is not None and fixed < width):
            continue
        tile, inside = f"k{width}", f"k{width}_i"
        whole = fixed is not None and fixed % width == 0
        s = s.split(rest, width, tail="exact" if whole else "cut", into=(tile, inside))
        s = s.split(inside, lanes, into=(f"{tile}_u", f"{tile}_v"))
        s = s.reorder("j", f"{tile}_u", f"{tile}_v").unroll(f"{tile}_u").vectorize(f"{tile}_v")
        if whole:
            break
        rest = f"{rest}_t"
    return _rows(s, ROWS_PER_UNIT)


def _rows(s: Schedule, n: int) -> Schedule:
    return s.split("i", n, into=("i_unit", "i_row")).parallel("i_unit")


def gpu_recipe(s: Schedule) -> Schedule:
    """Each nest by its format: rows of one length side by side, long rows by a whole CTA."""
    d = dict(s.program.sizes).get("d")
    if d is None:
        raise AssertionError("the GPU recipe is made for one width: specialize d")
    lanes = next(v for v in (4, 2, 1) if d % v == 0)
    across = min(_power(d // lanes), 32)  # threads of one row
    for n, nest in enumerate(s.nests):
        if not _sums(s, n):
            s = _gpu_fill(s.on(n), lanes, across)
            continue
        fmt = s.format_of(n)
        width = getattr(fmt.levels[-1], "width", None)
        s = _gpu_features(s.on(n), d, lanes, across)
        s = _gpu_bucket(s, width, across) if width is not None else _gpu_rows(s, fmt, across)
    return s.everywhere()


def _sums(s: Schedule, n: int) -> bool:
    return s.has("j", n)


def _power(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def _gpu_features(s: Schedule, d: int, lanes: int, across: int) -> Schedule:
    """k → tiles of across × lanes: threads in x, a vector each."""
    s = s.split("k", lanes, into=("k_c", "k_v")).split("k_c", across, into=("k_tile", "k_x"))
    return s.reorder("k_tile", "i", "k_x", "j", "k_v").bind("k_tile", "cta.y").vectorize("k_v")


def _gpu_bucket(s: Schedule, width: int, across: int) -> Schedule:
    """Rows of one width: threads in y, several rows each where rows are short."""
    each = max(1, min(4, 8 // max(width, 1)))
    s = s.split("i", 256 // across * each, into=("i_cta", "i_r")).split("i_r", each, into=("i_y", "i_u"))
    s = s.reorder("k_tile", "i_cta", "i_y", "k_x", "j", "i_u", "k_v")
    s = s.bind("i_cta", "cta.x").bind("i_y", "thread.y").bind("k_x", "thread.x").unroll("i_u")
    return s.unroll("j", min(width, 8)) if width > 1 else s


def _gpu_rows(s: Schedule, fmt: Format, across: int) -> Schedule:
    rows = 256 // across
    if fmt.levels[0].is_dense:  # csr: a row each
        s = s.split("i", rows, into=("i_cta", "i_y")).bind("i_cta", "cta.x").bind("i_y", "thread.y")
        return s.bind("k_x", "thread.x").unroll("j", 4)
    s = s.split("j", rows, into=("j_o", "j_y")).reorder("k_x", "j_o", "j_y", "k_v")  # long rows: a CTA each
    s = s.bind("i", "cta.x").bind("k_x", "thread.x").bind("j_y", "thread.y")
    return s.unroll("j_o", 4)


def _gpu_fill(s: Schedule, lanes: int, across: int) -> Schedule:
    s = s.split("k", lanes, into=("k_c", "k_v")).split("k_c", across, into=("k_tile", "k_x"))
    s = s.split("i", 256 // across, into=("i_cta", "i_y")).reorder("k_tile", "i_cta", "i_y", "k_x", "k_v")
    s = s.bind("k_tile", "cta.y").bind("i_cta", "cta.x").bind("i_y", "thread.y").bind("k_x", "thread.x")
    return s.vectorize("k_v")


def recipe(s: Schedule) -> Schedule:
    """The schedule of SpMM for the target it is built for."""
    return gpu_recipe(s) if s.target.is_cuda else cpu_recipe(s)


# ---------------------------------------------------------------------------- the operator


def choose_format(rows: int, nnz: int, target: str) -> Format | Composed:
    """hyb on a GPU once there is work for all of it, CSR otherwise."""
    if not target.startswith("cuda") or nnz < 50_000:
        return formats.csr()
    mean = nnz / max(rows, 1)
    top = int(np.clip(2 ** np.ceil(np.log2(max(mean, 1))), 8, 64))
    return formats.hyb(1, tuple(2**b for b in range(int(np.log2(top)) + 1)))


def pack_for_spmm(matrix: Any, width: int = 128, target: str = "cpp", dtype: Any = None) -> Packed:
    """Pack a matrix into the format that `spmm` is fastest on, on the device of the target.

    `matrix`: as `Format.pack` takes it. `width`: features of X."""
    rows, nnz = _extent(matrix)
    packed = choose_format(rows, nnz, target).pack(matrix, dtype=dtype)
    return packed.to("cuda") if target.startswith("cuda") else packed


def _extent(matrix: Any) -> tuple[int, int]:
    if isinstance(matrix, tuple):
        return int(matrix[-1][0]), len(matrix[1]) if len(matrix) == 4 else len(matrix[0][0])
    nnz = matrix.nnz if hasattr(matrix, "nnz") else np.count_nonzero(matrix)
    return int(matrix.shape[0]), int(nnz)


def spmm(A: Packed, X: Any, out: Any = None) -> Any:
    """Y = A X. A: (m, n) packed; X: (n, d) array; Y: (m, d) of X's framework and dtype.

    Kernels are built for the format and the width at first use and cached. Raises ArgumentError.
    """
    width = getattr(X, "shape", (0, 0))[-1]
    kernel = spmm_kernel(A.format, str(A.dtype), _name(X), _fixed(width, A.device), A.structure.index_dtype.name, A.device)
    return kernel(A, X, out=out)


def _fixed(width: int, device: str) -> int:
    """The width a kernel is made for; 0 for one that takes any."""
    if device != "cpu":
        return width
    return width if width % 16 == 0 and width <= 1024 else 0


def _name(x: Any) -> str:
    return str(getattr(x, "dtype", "float32")).rpartition(".")[2]


@cache
def spmm_kernel(fmt: Any, a: str, x: str, width: int, index: str, device: str) -> Kernel:
    """The built kernel for a format, dtypes, a width (0 = any), an index type and a device."""
    made: Definition = spmm_program.typed(A=a, X=dtypes.dtype(x), index=index).decompose(A=fmt)

    def scheduled(s: Schedule) -> Schedule:
        return recipe(s.specialize("d", width) if width else s)

    return made.schedule(scheduled).build("cuda" if device.startswith("cuda") else "cpp")

