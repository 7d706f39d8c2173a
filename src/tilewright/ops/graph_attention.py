"""Attention along the edges of a graph: every row attends to the coordinates that A stores in it.

    s[i, j, h] = scale · A[i, j] · Σ_k Q[i, h, k] K[j, h, k]
    O[i, h, c] = Σ_j softmax_j(s)[i, j, h] V[j, h, c]

One launch; each score and each exponential is computed once, and nothing of the size of A is
stored. On a CPU: a row of scores in scratch memory, exponentials in vectors, features in registers.
On a GPU: the online softmax, a few threads for each row and head, a CTA for long rows.
Reference: FeatGraph (SC 2020); FlashAttention (NeurIPS 2022) for the online form.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tilewright.build import Definition, named_recipe, program
from tilewright.errors import ArgumentError, ProgramError, ScheduleError
from tilewright.ops.recipes import cpu_lanes, fixed_width, register_tiles, vectors
from tilewright.ops.spmm import check_packed, operand_dtype
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import formats, trace
from tilewright.sparse.formats import Composed, Format, Where
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import dense, indices, out, scalar, sparse, temp
from tilewright.target import target as parse_target

TEMPORARIES = ("score", "top", "weight", "total")


@program
def graph_attention_program(
    A=sparse("m n"), Q=dense("m h d"), K=dense("n h d"), V=dense("n h v"), scale=scalar()
):
    i, j, h, k, c = indices("i:m j:n h:h k:d c:v")
    dot = trace.sum_(Q[i, h, k] * K[j, h, k], over=k)
    score = temp.like(A).named("score")[i, j, h](scale * A[i, j] * dot)
    top = temp.named("top")[i, h](trace.max_(score[i, j, h], over=j))
    weight = temp.like(A).named("weight")[i, j, h](trace.exp(score[i, j, h] - top[i, h]))
    total = temp.named("total")[i, h](trace.sum_(weight[i, j, h], over=j))
    mixed = trace.sum_(weight[i, j, h] * V[j, h, c], over=j)
    return out[i, h, c](trace.where(total[i, h] > 0, mixed / total[i, h], 0.0))


# ---------------------------------------------------------------------------- recipes

ROWS_PER_UNIT = 16  # of one unit on the CPU
AHEAD = 8  # entries whose rows of K and V are prefetched
CTA, WARP = 256, 32  # threads
TALL_LANES = 8  # threads of an entry of a long row
IN_FLIGHT = 4  # entries of a row that a group of threads loads at once
TALL, SHORT = "tall", "short"  # rows of a CTA, and of a few threads
LONG = 256  # entries from which a row has a CTA


def cpu_recipe(s: Schedule) -> Schedule:
    """A row and head after the other: scores, their maximum, weights, their sum, features."""
    for t in TEMPORARIES:
        s = s.compute_at(t, "h")
    s = vectors(s, "k")
    for n in range(len(s.nests)):
        for loop in TEMPORARIES[1:] if not s.format_of(n).levels[-1].padded else ():
            s = vectors(s.on(n), f"{loop}.j", loop) if s.has(f"{loop}.j", n) else s
    s = s.everywhere()
    width = dict(s.program.sizes).get("v", 0)
    s = register_tiles(s, "c", "out.j", width, (128, 64, 32, cpu_lanes()))
    if s.format_of(0).name == "csr":
        s = s.prefetch("K", "score.j", AHEAD)
    return s.split("i", ROWS_PER_UNIT, into=("i_unit", "i_row")).parallel("i_unit")


def gpu_recipe(s: Schedule) -> Schedule:
    """A few threads for each row and head, each with vectors of the features; of a long row many
    such groups share the entries."""
    sizes = dict(s.program.sizes)
    d, v = sizes["d"], sizes["v"]
    itemsize = next(t.dtype.itemsize for t in s.program.tensors if t.name == "K")
    lanes = next(n for n in (16 // itemsize, 4, 2, 1) if d % n == 0 and v % n == 0)
    power = 1 << (max(d, v) // lanes - 1).bit_length()
    for t in TEMPORARIES:
        s = s.compute_at(t, "j")
    s = s.order_axes("out", "i", "h", "j", "c").fuse("i", "h", into="row")
    for n in range(len(s.nests)):
        fmt, s = s.format_of(n), s.on(n)
        across = min(power, TALL_LANES if fmt.name == TALL else WARP)  # threads of an entry
        for loop in "k", "c":
            s = s.split(loop, lanes, into=(f"{loop}_q", f"{loop}_v")).vectorize(f"{loop}_v")
            s = s.split(f"{loop}_q", across, into=(f"{loop}_o", f"{loop}_x"))
            s = s.bind(f"{loop}_x", "thread.x").unroll(f"{loop}_o")
        groups = CTA // across
        entries = IN_FLIGHT * (groups if fmt.name == TALL else 1)
        if fmt.name != "bucket(0)":
            s = s.split("j", entries, tail="cut", into=("j_o", "j_r"))
        if fmt.name == TALL:
            s = s.split("j_r", groups, into=("j_u", "j_y"))
            s = s.split("j_t", groups, into=("t_o", "j_y")).bind("j_y", "thread.y")
            s = s.bind("row", "cta.x").unroll("j_u")
            continue
        s = s.unroll("j_r") if fmt.name != "bucket(0)" else s
        s = s.split("row", groups, into=("row_cta", "row_y"))
        s = s.bind("row_cta", "cta.x").bind("row_y", "thread.y")
    return s.everywhere()


@named_recipe
def recipe(s: Schedule, heads: int = 0, d: int = 0, v: int = 0) -> Schedule:
    """The schedule of graph attention; `heads`, `d` and `v`: sizes of Q and V, 0 for any."""
    for dim, size in (("h", heads), ("d", d), ("v", v)):
        s = s.specialize(dim, size) if size else s
    return gpu_recipe(s) if s.target.is_cuda else cpu_recipe(s)


# ---------------------------------------------------------------------------- the operators


def pack_for_graph_attention(matrix: Any, target: str = "cpp", dtype: Any = None) -> Packed:
    """Pack a matrix into the format that `graph_attention` is fastest on, on the device of the
    target: csr on a CPU, rows by length on a GPU.

    `matrix`: as `Format.pack` takes it, and its errors. Raises BuildError[B103] for an unknown
    target."""
    if not parse_target(target).is_cuda:
        return formats.csr().pack(matrix, dtype=dtype)
    return by_row().pack(matrix, dtype=dtype).to("cuda")


def by_row(long: int = LONG) -> Composed:
    """Rows with more than `long` entries, shorter ones, and empty ones."""
    parts: tuple[tuple[Where, Format], ...] = (
        (Where(long + 1), formats.dcsr(TALL)),
        (Where(1, long), formats.dcsr(SHORT)),
        (Where(0, 0), formats.bucket(0)),
    )
    return Composed(f"by_row({long})", parts, disjoint_rows=True, covers_rows=True)


def graph_attention(
    A: Packed, Q: Any, K: Any, V: Any, scale: float | None = None, out: Any = None
) -> Any:
    """O[i, h] = softmax over the stored j of (scale · A[i, j] · Q[i, h] · K[j, h]) times V[j, h].

    A: (m, n) packed; Q: (m, heads, d), K: (n, heads, d), V: (n, heads, v); O: (m, heads, v) of V's
    framework and dtype, 0 in rows without entries. `scale`: None for 1/√d. Kernels are built for
    the format and, on a GPU or for widths of vectors, the sizes at first use and cached. Raises
    ArgumentError: A106 also for a format that keeps rows in pieces."""
    check_packed(A, lambda fmt: fmt.ndim == 2, "pack_for_graph_attention(matrix)")
    (heads, d), (_, v) = _last_two(Q, "Q"), _last_two(V, "V")
    widths = fixed_width(d, A.device), fixed_width(v, A.device)
    sizes = (heads, d, v) if all(widths) else (0, 0, 0)
    types = str(A.dtype), *(operand_dtype(x, n) for x, n in ((Q, "Q"), (K, "K"), (V, "V")))
    index, target = A.structure.index_dtype.name, "cpp" if A.device == "cpu" else "cuda"
    try:
        kernel = graph_attention_kernel(A.format, types, sizes, index, target)
    except (ProgramError, ScheduleError) as e:
        raise ArgumentError(
            "A106", f"A is packed as {A.format}: {e.message}", where="argument A",
            hint="pack_for_graph_attention(matrix)",
        ) from e  # fmt: skip
    return kernel(A, Q, K, V, d**-0.5 if scale is None else scale, out=out)


def _last_two(x: Any, name: str) -> tuple[int, int]:
    """The numbers of heads and features of an operand. Raises ArgumentError[A103]."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or not shape[2]:
        raise ArgumentError(
            "A103", f"{name} has shape {shape}, expected (rows, heads, features)",
            where=f"argument {name}", hint=f"one head: {name}[:, None, :]",
        )  # fmt: skip
    return shape[1], shape[2]


@cache
def graph_attention_kernel(
    fmt: Any, types: tuple[str, ...], sizes: tuple[int, int, int], index: str, target: str
) -> Kernel:
    """The built kernel for a format, the dtypes of A, Q, K and V, heads and widths (0 = any), an
    index type and a target."""
    return graph_attention_definition(fmt, types, sizes, index).build(target)


def graph_attention_definition(
    fmt: Any, types: tuple[str, ...], sizes: tuple[int, int, int], index: str = "int32"
) -> Definition:
    """The program of `graph_attention_kernel` with its schedule."""
    of = dict(zip("AQKV", types, strict=True))
    typed = graph_attention_program.typed(**of, index=index).decompose(A=fmt)
    return typed.schedule(recipe.of(**dict(zip(("heads", "d", "v"), sizes, strict=True))))
