"""SpMM: Y = A X, sparse times dense.

On a CPU: CSR, rows in parallel, the features of a row in vector registers. On a GPU: rows by
length, so that all threads of a warp have rows of one length; a long row has a CTA, a giant one
several. No two CTAs share an element, and sums have a fixed order. Atomics, without a fixed order,
are used on a GPU for formats that store rows in pieces (coo, csc), and on both targets for formats
whose parts share rows (hyb with several column parts); `pack_for_spmm` chooses none of these.
Reference: SparseTIR (ASPLOS 2023, §4.2), its SpMM on hyb(c, k).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from tilewright import dtypes
from tilewright.build import Definition, kernels, named_recipe, program
from tilewright.errors import ArgumentError, ProgramError, ScheduleError
from tilewright.ir.nodes import Access, Index
from tilewright.ir.rewrite import indices_of, walk
from tilewright.ops.schedules import fixed_width, register_tiles
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import entries, formats, trace
from tilewright.sparse.formats import Composed, Format, Where
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import dense, indices, out, sparse
from tilewright.target import target as parse_target
from tilewright.toolchain import compilers


@program
def spmm_program(A=sparse("m n"), X=dense("n d")):
    i, j, k = indices("i:m j:n k:d")
    return out[i, k](trace.sum_(A[i, j] * X[j, k], over=j))


# ---------------------------------------------------------------------------- recipes

ROWS_PER_UNIT = 16  # rows of one unit on the CPU: a few microseconds of work
CPU_TILE = 128  # features kept in registers: 8 accumulators of 16 lanes
L2_BYTES = 40 << 20  # of X; above it a sweep takes fewer features (an H100 has 50 MB)
REUSED = 32  # entries of a column from which on a row of X is worth to be found there
MANY = 200_000  # entries; in smaller matrices no thread takes several rows
ANY_TILE = 64  # for any width: as fast as 128 and 32, and a third less time to compile
AHEAD_CPU = 16  # entries whose rows of X are prefetched: two or three rows of a citation graph
AHEAD_TILED = 8  # if a row has several tiles: after its end comes the same row again
CTA = 256  # threads
AHEAD = 8  # gathers in flight in each thread, to hide the latency of memory
SWEEP = 512  # entries of a tall row that a CTA takes at once; a quarter for other rows
TALL, GIANT = "tall", "giant"  # rows of one CTA; rows of several CTAs, by features


class _Names(NamedTuple):
    """The names in a program of those of out[i, k] = sum(A[i, j] * X[j, k], over=j)."""

    i: str
    j: str
    k: str
    d: str | int
    out: str
    X: str

    def width(self, s: Schedule) -> int:
        """The number of features; 0 if it is known at run time only."""
        return self.d if isinstance(self.d, int) else dict(s.program.sizes).get(self.d, 0)


def _names(s: Schedule) -> _Names:
    """Derives them from the dimensions of the operands. Raises ScheduleError[S102]."""
    reads = [x for a in s.program.body for x in walk(a.value) if isinstance(x, Access)]
    for A in (x for x in reads if x.tensor.is_sparse and len(x.coords) == 2):
        for to in (a.out for a in s.program.body if a.out.tensor.role == "output"):
            features = [c for c in indices_of(to) if c not in A.coords]
            X = next((x for x in reads if x != A and set(features) & set(x.coords)), None)
            if len(to.coords) == 2 and len(features) == 1 and X is not None:
                i, j, k = (c.name for c in (*A.coords, *features) if isinstance(c, Index))
                return _Names(i, j, k, features[0].dim, to.tensor.name, X.tensor.name)
    rule = f"{s.program.name} is no product of a sparse and a dense matrix"
    hint = "the recipe schedules out[i, k](sum(A[i, j] * X[j, k], over=j)), whatever its names"
    raise ScheduleError("S102", rule, hint=hint)


def cpu_recipe(s: Schedule, gathers_far: bool = True) -> Schedule:
    """Features in registers, in tiles from the widest to the narrowest; rows in parallel.

    `gathers_far`: X is larger than the nearest caches, so its rows are prefetched."""
    at = _names(s)
    s = s.atomic(at.out) if s.shares_rows else s
    lanes = compilers.cpu_lanes()
    fixed = at.width(s)
    if s.in_place and not s.shares_rows:
        return _cpu_pieces(s, at, lanes)
    s = register_tiles(s, at.k, at.j, fixed, (CPU_TILE, 32, lanes) if fixed else (ANY_TILE, lanes))
    for n in range(len(s.nests)):
        if s.has(at.j, n) and getattr(s.format_of(n).levels[-1], "width", 0) > 1:
            # Unrolled further it compiles a third longer and runs no faster.
            s = s.on(n).unroll(at.j, 1)
    s = s.everywhere()
    unit, row = f"{at.i}_unit", f"{at.i}_row"
    s = s.split(s.stored(at.i), ROWS_PER_UNIT, into=(unit, row)).parallel(unit)
    stored = (f.name for t in s.program.tensors if t.is_sparse for f in t.format.formats)
    if not gathers_far or not {"csr", "dcsr"}.issuperset(stored):
        return s
    return s.prefetch(at.X, at.j, AHEAD_CPU if fixed and fixed <= CPU_TILE else AHEAD_TILED)


def _cpu_pieces(s: Schedule, at: _Names, lanes: int) -> Schedule:
    """Rows stored in pieces: features outermost, so that no two threads share an element and sums
    keep their order. One thread for narrow widths and those known at run time only."""
    s, fixed = s.order_axes(at.out, at.k), at.width(s)
    tile = next((t for t in (32, lanes) if fixed and fixed % t == 0), 0)
    entries = [x for x in (at.j, at.i) if s.has(x)]  # the loops over them
    unit, u, v = f"{at.k}_unit", f"{at.k}_u", f"{at.k}_v"
    if not tile:
        return s.split(at.k, lanes, tail="cut", into=(u, v)).reorder(*entries, v).vectorize(v)
    s = s.split(at.k, tile, tail="exact", into=(unit, f"{at.k}_in")).parallel(unit)
    s = s.split(f"{at.k}_in", lanes, tail="exact", into=(u, v))
    return s.reorder(*entries, u, v).unroll(u).vectorize(v)


def gpu_recipe(s: Schedule, tile: int = 128, many: bool = False) -> Schedule:
    """Each nest by its format: rows of one length in parallel, a CTA for a long row.

    `tile`: features that one sweep over A takes; a smaller one keeps a slice of X in the L2.
    `many`: there are rows enough for threads that take several short ones."""
    at = _names(s)
    s = s.atomic(at.out) if s.in_place else s
    d = at.width(s)
    lanes = next(v for v in (4, 2, 1) if d % v == 0) if d else 1
    even = d > 0 and (_power(d // lanes) >= 8 or d // lanes == _power(d // lanes))
    for n in range(len(s.nests)):
        fmt = s.format_of(n)
        # Threads that share a row have a barrier, which some would skip in a tail of features.
        shared = even and s.has(at.j, n) and fmt.name in (TALL, GIANT, "dcsr")
        across = 2 if shared and fmt.name == GIANT else tile // lanes if lanes > 1 else 32
        across = min(_power(d // lanes), across) if even else across  # threads of one row
        axes = (at.j, at.i) if (s.has(at.j, n) and fmt.levels[0].dim == 1) else (at.i, at.j)
        s = _gpu_features(s.on(n), at.k, lanes, across, axes)
        if shared:
            sweep = SWEEP if fmt.name in (TALL, GIANT) else SWEEP // 4
            s = _gpu_shared_rows(s, axes, CTA // across, sweep)
        else:
            width = getattr(fmt.levels[-1], "width", 0)
            is_short = many and width <= AHEAD and (width > 0 or not s.has(at.j, n))
            rows = CTA // across, AHEAD // max(width, 1) if is_short else 1
            s = _gpu_own_rows(s, n, rows, width, axes)
    return s.everywhere()


def _power(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def _gpu_features(s: Schedule, k: str, lanes: int, across: int, axes: tuple[str, str]) -> Schedule:
    """k → tiles of across × lanes: threads in x, a vector each. CTAs in y take tiles, so that
    concurrent CTAs gather from one slice of X."""
    chunk, tile, x, v = f"{k}_c", f"{k}_tile", f"{k}_x", f"{k}_v"
    s = s.split(k, lanes, into=(chunk, v)).split(chunk, across, into=(tile, x))
    outer, inner = axes
    s = s.reorder(tile, outer, x, *((inner,) if s.has(inner) else ()), v)
    return s.bind(tile, "cta.y").bind(x, "thread.x").vectorize(v)


def _gpu_own_rows(
    s: Schedule, n: int, rows: tuple[int, int], width: int, axes: tuple[str, str]
) -> Schedule:
    """Threads in y take rows (or columns, if those are stored), `AHEAD` entries in flight. `rows`:
    how many threads there are in y, and how many rows each takes."""
    outer, inner = axes
    cta, y, o, u = f"{outer}_cta", f"{outer}_y", f"{inner}_o", f"{inner}_u"
    s = s.split(outer, rows[0] * rows[1], into=(cta, y)).bind(cta, "cta.x")
    if rows[1] > 1:
        s = s.split(y, rows[0], into=(f"{outer}_r", f"{outer}_t")).unroll(f"{outer}_r", rows[1])
        y = f"{outer}_t"
    s = s.bind(y, "thread.y")
    if not s.has(inner, n):
        return s
    if width:
        return s.unroll(inner, min(width, AHEAD)) if width > 1 else s
    return s.split(inner, AHEAD // 2, into=(o, u)).unroll(u)


def _gpu_shared_rows(s: Schedule, axes: tuple[str, str], rows: int, sweep: int) -> Schedule:
    """A row for each CTA: threads in y share its entries, `sweep` at a time, at most `AHEAD` in
    flight in each."""
    i, j = axes
    s = s.split(j, rows * max(1, min(AHEAD, sweep // rows)), into=(f"{j}_o", f"{j}_r"))
    s = s.split(f"{j}_r", rows, into=(f"{j}_u", f"{j}_y"))
    return s.bind(i, "cta.x").bind(f"{j}_y", "thread.y").unroll(f"{j}_u")


@named_recipe
def recipe(
    s: Schedule, width: int = 0, gathers_far: bool | None = None, many: bool = False
) -> Schedule:
    """The schedule of SpMM. `width`: of X, 0 for any; `gathers_far`: whether X exceeds the L2
    cache and is read often, None if that is not known; `many`: whether there are many rows."""
    s = s.specialize("d", width) if width else s
    if s.target.is_cuda:
        return gpu_recipe(s, 64 if gathers_far else 128, many)
    return cpu_recipe(s, gathers_far is not False)


# ---------------------------------------------------------------------------- arguments


def check_packed(A: Any, takes: Callable[[Any], bool], hint: str) -> None:
    """Checks that A is packed, in a format that an operator takes. Raises ArgumentError[A106]."""
    if isinstance(A, Packed) and takes(A.format):
        return
    kind = f"packed as {A.format}" if isinstance(A, Packed) else f"a {type(A).__name__}"
    raise ArgumentError("A106", f"A is {kind}", where="argument A", hint=hint)


def operand_dtype(X: Any, name: str) -> str:
    """The dtype of a dense operand of multiplications and additions; float32 if it is no array,
    which the call refuses. Raises ArgumentError[A102]."""
    dtype = str(getattr(X, "dtype", "float32")).rpartition(".")[2]
    if dtype == "bool" or dtype not in dtypes.ALL:
        hint = "float16, bfloat16, float32, float64 or an integer type"
        raise ArgumentError("A102", f"{name} is {dtype}", where=f"argument {name}", hint=hint)
    return dtype


def last_size(X: Any) -> int:
    """The size of the last dimension of an operand; 0 without one, which the call refuses."""
    shape = getattr(X, "shape", ())
    return int(shape[-1]) if isinstance(shape, tuple) and shape else 0


# ---------------------------------------------------------------------------- the operator


def by_length(widths: tuple[int, ...], giant: int = 1024) -> Composed:
    """A format that groups rows by length: padded buckets of these widths, a CTA for each longer
    row, several CTAs, a few features each, for a row of more than `giant` entries. Every row is in
    one part, so sums need no atomics."""
    buckets = [(Where(low + 1, w), formats.bucket(w)) for low, w in pairwise((0, *widths))]
    giant = max(giant, widths[-1])
    parts: list[tuple[Where, Format]] = [(Where(giant + 1), formats.dcsr(GIANT))]
    if giant > widths[-1]:
        parts.append((Where(widths[-1] + 1, giant), formats.dcsr(TALL)))
    parts += [*reversed(buckets), (Where(0, 0), formats.bucket(0))]
    name = f"by_length({', '.join(map(str, widths))})"
    return Composed(name, tuple(parts), disjoint_rows=True, covers_rows=True)


WIDE = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # finer: less padding


def powers(top: int) -> tuple[int, ...]:
    """1, 2, 4, … top."""
    return tuple(2**b for b in range(top.bit_length()))


def choose_format(nnz: int, target: str) -> Format | Composed:
    """CSR on a CPU; on a GPU rows by length.

    One group of threads takes a row of a bucket: cheap if other rows hide its latency, else the
    critical path. So the more entries, the wider the widest bucket. A giant row is one that would
    take longer than all others."""
    if not target.startswith("cuda"):
        return formats.csr()
    if nnz < 8_000_000:
        return by_length(powers(32 if nnz < MANY else 128))
    return by_length(WIDE, giant=nnz // 2000)


def pack_for_spmm(matrix: Any, target: str = "cpp", dtype: Any = None) -> Packed:
    """Pack a matrix into the format that `spmm` is fastest on, on the device of the target.

    `matrix`: as `Format.pack` takes it, and its errors. Raises BuildError[B103] for an unknown
    target."""
    kind = parse_target(target).kind
    coordinates = entries.read(matrix)
    packed = choose_format(coordinates.nnz, kind).pack(coordinates, dtype=dtype)
    return packed.to("cuda") if kind == "cuda" else packed


def spmm(A: Packed, X: Any, out: Any = None) -> Any:
    """Y = A X. A: (m, n) packed; X: (n, d) array; Y: (m, d) of X's framework and dtype.

    Kernels are built for the format and the width at first use and cached. Raises ArgumentError:
    A106 also for a format that the target has no schedule for.
    """
    check_packed(A, lambda fmt: fmt.ndim == 2, "pack a matrix, as with pack_for_spmm(matrix)")
    return _chosen(A, X, last_size(X))(A, X, out=out)


def _chosen(A: Packed, X: Any, width: int) -> Kernel:
    on_cuda = A.device != "cpu"
    x_bytes = A.shape[1] * width * 4
    far = x_bytes > (L2_BYTES if on_cuda else compilers.l2_bytes() // 2)
    far &= not on_cuda or A.nnz >= REUSED * A.shape[1]
    x_dtype = operand_dtype(X, "X")
    try:
        return spmm_kernel(
            "cuda" if on_cuda else "cpp", A.format, str(A.dtype), x_dtype,
            fixed_width(width, A.device), A.structure.index_dtype.name, far, A.nnz >= MANY,
        )  # fmt: skip
    except (ScheduleError, ProgramError) as e:
        rule = f"A is packed as {A.format}, X is {x_dtype}: {e.message}"
        hint = "use a format that does not split rows, as pack_for_spmm chooses"
        raise ArgumentError("A106", rule, where="argument A", hint=hint) from e


def spmm_definition(
    fmt: Any, a: str, x: str, width: int, index: str = "int32", gathers_far: bool = False,
    many: bool = False,
) -> Definition:  # fmt: skip
    """The program with its schedule, for a format, dtypes, a width (0 = any) and an index type;
    `gathers_far` and `many` as of `recipe`."""
    typed = spmm_program.typed(A=a, X=dtypes.dtype(x), index=index).decompose(A=fmt)
    return typed.schedule(recipe.of(width=width, gathers_far=gathers_far, many=many))


spmm_kernel = kernels(spmm_definition)
