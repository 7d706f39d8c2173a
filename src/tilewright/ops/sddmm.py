"""SDDMM: O[i, j] = A[i, j] · Σ_k P[i, k] Q[j, k], at the stored entries of A only.

On a CPU: rows of A in parallel, a row of P in the cache, k in vectors with several sums. On a GPU:
entries in parallel, for equal work in every thread; a few threads share an entry, and each has
several loads in flight. The row of an entry is stored (COO) or searched for (CSR). No atomics; sums
have a fixed order.
Reference: SparseTIR (ASPLOS 2023, §4.2), its SDDMM; FeatGraph (SC 2020), entries as units.
"""

from typing import Any

from tilewright import dtypes
from tilewright.build import Definition, kernels, named_recipe, program
from tilewright.ops import schedules
from tilewright.ops.spmm import check_packed, last_size, operand_dtype
from tilewright.schedule import Schedule
from tilewright.sparse import formats, trace
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import dense, indices, out, sparse
from tilewright.target import target as parse_target
from tilewright.toolchain import compilers


@program
def sddmm_program(A=sparse("m n"), P=dense("m d"), Q=dense("n d")):
    i, j, k = indices("i:m j:n k:d")
    return out.like(A)[i, j](trace.sum_(A[i, j] * P[i, k] * Q[j, k], over=k))


ROWS_PER_UNIT, ENTRIES_PER_UNIT = 16, 256  # of one unit on the CPU
SUMS = 4  # vector accumulators: enough to hide the latency of an addition
FORMATS = ("csr", "dcsr", "coo")


def cpu_recipe(s: Schedule) -> Schedule:
    """k in `SUMS` vectors, in one vector, in scalars; rows (entries of COO) in parallel."""
    lanes = compilers.cpu_lanes()
    rest = "k"
    for width in (SUMS * lanes, lanes):
        tile = f"k{width}"
        s = s.split(rest, width, tail="cut", into=(tile, f"{tile}_i"))
        s = s.split(f"{tile}_i", lanes, into=(f"{tile}_u", f"{tile}_v"))
        s = s.rfactor(f"{tile}_u").unroll(f"{tile}_u").vectorize(f"{tile}_v")
        if dict(s.program.sizes).get("d", 1) % width == 0:
            break
        rest = f"{rest}_t"
    size = ENTRIES_PER_UNIT if s.format_of(0).name == "coo" else ROWS_PER_UNIT
    return s.split("i", size, into=("i_unit", "i_in")).parallel("i_unit")


def gpu_recipe(s: Schedule) -> Schedule:
    """CTAs and threads in y take entries, threads in x vectors of k; sums by shuffles."""
    entries = "i"
    if s.format_of(0).name != "coo":
        s, entries = s.fuse_axes("A"), "ij"
    itemsize = next(t.dtype.itemsize for t in s.program.tensors if t.name == "Q")
    s = schedules.dot_products(s, entries, "k", dict(s.program.sizes)["d"], itemsize)
    return s.reorder("e_cta", "e_y", "k_x", "e_u", "k_o", "k_v")


@named_recipe
def recipe(s: Schedule, width: int = 0) -> Schedule:
    """The schedule of SDDMM; `width`: of P and Q, 0 for any."""
    s = s.specialize("d", width) if width else s
    return gpu_recipe(s) if s.target.is_cuda else cpu_recipe(s)


def pack_for_sddmm(matrix: Any, target: str = "cpp", dtype: Any = None) -> Packed:
    """Pack a matrix into the format that `sddmm` is fastest on, on the device of the target.

    `matrix`: as `Format.pack` takes it, and its errors. Raises BuildError[B103] for an unknown
    target."""
    on_gpu = parse_target(target).is_cuda
    packed = (formats.coo() if on_gpu else formats.csr()).pack(matrix, dtype=dtype)
    return packed.to("cuda") if on_gpu else packed


def sddmm(A: Packed, P: Any, Q: Any, out: Any = None) -> Packed:
    """O = A ∘ (P Qᵀ), with the structure of A. A: (m, n) packed as csr, dcsr or coo; P: (m, d), Q:
    (n, d) arrays; O: Packed, of Q's dtype. `out`: a Packed of A's structure to write to.

    Kernels are built for the format and the width at first use and cached. Raises ArgumentError.
    """
    check_packed(
        A, lambda fmt: isinstance(fmt, formats.Format) and fmt.name in FORMATS,
        f"pack it as one of: {', '.join(FORMATS)}",
    )  # fmt: skip
    width = schedules.fixed_width(last_size(Q), A.device)
    types = str(A.dtype), operand_dtype(P, "P"), operand_dtype(Q, "Q")
    target = "cpp" if A.device == "cpu" else "cuda"
    kernel = sddmm_kernel(target, A.format, types, width, A.structure.index_dtype.name)
    return kernel(A, P, Q, out=out)


def sddmm_definition(
    fmt: Any, types: tuple[str, str, str], width: int, index: str = "int32"
) -> Definition:
    """The program with its schedule, for a format, the dtypes of A, P and Q, a width (0 = any) and
    an index type."""
    a, p, q = types
    typed = sddmm_program.typed(A=a, P=dtypes.dtype(p), Q=dtypes.dtype(q), index=index)
    return typed.decompose(A=fmt).schedule(recipe.of(width=width))


sddmm_kernel = kernels(sddmm_definition)
