"""Lesson 6: attention along the edges of a graph, with heads, for CPUs and GPUs.

    python examples/06_graph_attention.py

    s[i, j, h] = scale · A[i, j] · Σ_k Q[i, h, k] K[j, h, k]
    O[i, h, c] = Σ_j softmax_j(s)[i, j, h] V[j, h, c]

The operator of lesson 3 as one would ship it. One launch; each score and each exponential is
computed once, and nothing of the size of A is stored. On a CPU: a row of scores in scratch memory,
exponentials in vectors, features in registers. On a GPU: the online softmax, a few threads for each
row and head, a CTA for long rows.
Reference: FeatGraph (SC 2020); FlashAttention (NeurIPS 2022) for the online form.
"""

from functools import cache, partial

import numpy as np

import tilewright as tw
from tilewright.errors import ArgumentError, ProgramError, ScheduleError
from tilewright.ops.schedules import fixed_width, register_tiles, vectors
from tilewright.ops.spmm import check_packed, operand_dtype
from tilewright.sparse.formats import Composed, Where
from tilewright.toolchain.compilers import cpu_lanes

TEMPORARIES = ("score", "top", "weight", "total")


@tw.program
def attend(
    A=tw.sparse("m n"), Q=tw.dense("m h d"), K=tw.dense("n h d"), V=tw.dense("n h v"),
    scale=tw.scalar(),
):  # fmt: skip
    i, j, h, k, c = tw.indices("i:m j:n h:h k:d c:v")
    dot = tw.sum(Q[i, h, k] * K[j, h, k], over=k)
    score = tw.temp.like(A).named("score")[i, j, h](scale * A[i, j] * dot)
    top = tw.temp.named("top")[i, h](tw.max(score[i, j, h], over=j))
    weight = tw.temp.like(A).named("weight")[i, j, h](tw.exp(score[i, j, h] - top[i, h]))
    total = tw.temp.named("total")[i, h](tw.sum(weight[i, j, h], over=j))
    mixed = tw.sum(weight[i, j, h] * V[j, h, c], over=j)
    return tw.out[i, h, c](tw.where(total[i, h] > 0, mixed / total[i, h], 0.0))


ROWS_PER_UNIT = 16  # of one unit on the CPU
AHEAD = 8  # entries whose rows of K and V are prefetched
CTA, WARP = 256, 32  # threads
TALL_LANES = 8  # threads of an entry of a long row
IN_FLIGHT = 4  # entries of a row that a group of threads loads at once
TALL, SHORT = "tall", "short"  # rows of a CTA, and of a few threads
LONG = 256  # entries from which a row has a CTA


def cpu_recipe(s):
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


def features(s):
    """The lanes of a vector of features, and a power of two of them that all features fit in."""
    sizes = dict(s.program.sizes)
    d, v = sizes["d"], sizes["v"]
    itemsize = next(t.dtype.itemsize for t in s.program.tensors if t.name == "K")
    lanes = next(n for n in (16 // itemsize, 4, 2, 1) if d % n == 0 and v % n == 0)
    return lanes, 1 << (max(d, v) // lanes - 1).bit_length()


def bind_features(s, lanes, across):
    """Vectors of features, on `across` threads."""
    for loop in "k", "c":
        s = s.split(loop, lanes, into=(f"{loop}_q", f"{loop}_v")).vectorize(f"{loop}_v")
        s = s.split(f"{loop}_q", across, into=(f"{loop}_o", f"{loop}_x"))
        s = s.bind(f"{loop}_x", "thread.x").unroll(f"{loop}_o")
    return s


def gpu_recipe(s):
    """A few threads for each row and head, each with vectors of the features; of a long row many
    such groups share the entries."""
    lanes, power = features(s)
    for t in TEMPORARIES:
        s = s.compute_at(t, "j")
    s = s.order_axes("out", "i", "h", "j", "c").fuse("i", "h", into="row")
    for n in range(len(s.nests)):
        fmt, s = s.format_of(n), s.on(n)
        across = min(power, TALL_LANES if fmt.name == TALL else WARP)  # threads of an entry
        s, groups = bind_features(s, lanes, across), CTA // across
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


def recipe(s, heads=0, d=0, v=0, on_gpu=gpu_recipe):
    """The schedule of graph attention; `heads`, `d` and `v`: sizes of Q and V, 0 for any."""
    for dim, size in (("h", heads), ("d", d), ("v", v)):
        s = s.specialize(dim, size) if size else s
    return on_gpu(s) if s.target.is_cuda else cpu_recipe(s)


def pack_for_graph_attention(matrix, target="cpp", dtype=None):
    """Pack a matrix into the format that `graph_attention` is fastest on, on the device of the
    target: csr on a CPU, rows by length on a GPU.

    `matrix`: as `Format.pack` takes it, and its errors. Raises BuildError[B103] for an unknown
    target."""
    if not tw.target(target).is_cuda:
        return tw.csr().pack(matrix, dtype=dtype)
    return by_row().pack(matrix, dtype=dtype).to("cuda")


def by_row(long=LONG):
    """Rows with more than `long` entries, shorter ones, and empty ones."""
    parts = (
        (Where(long + 1), tw.dcsr(TALL)),
        (Where(1, long), tw.dcsr(SHORT)),
        (Where(0, 0), tw.bucket(0)),
    )
    return Composed(f"by_row({long})", parts, disjoint_rows=True, covers_rows=True)


def graph_attention(A, Q, K, V, scale=None, out=None):
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


def _last_two(x, name):
    """The numbers of heads and features of an operand. Raises ArgumentError[A103]."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or not shape[2]:
        raise ArgumentError(
            "A103", f"{name} has shape {shape}, expected (rows, heads, features)",
            where=f"argument {name}", hint=f"one head: {name}[:, None, :]",
        )  # fmt: skip
    return shape[1], shape[2]


@cache
def graph_attention_kernel(fmt, types, sizes, index, target):
    """The built kernel for a format, the dtypes of A, Q, K and V, heads and widths (0 = any), an
    index type and a target."""
    return graph_attention_definition(fmt, types, sizes, index).build(target)


def graph_attention_definition(fmt, types, sizes, index="int32", on_gpu=gpu_recipe):
    """The program of `graph_attention_kernel` with its schedule, on a GPU that of `on_gpu`."""
    of = dict(zip("AQKV", types, strict=True))
    typed = attend.typed(**of, index=index).decompose(A=fmt)
    fixed = dict(zip(("heads", "d", "v"), sizes, strict=True))
    return typed.schedule(partial(recipe, **fixed, on_gpu=on_gpu))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    nodes, heads, d = 1500, 2, 32
    mask = (rng.random((nodes, nodes)) < 0.01) | np.eye(nodes, dtype=bool)
    adjacency = (mask * (0.5 + rng.random((nodes, nodes)))).astype(np.float32)
    Q, K, V = (rng.standard_normal((nodes, heads, d), np.float32) for _ in range(3))

    scores = adjacency[:, :, None] * np.einsum("ihk,jhk->ijh", Q, K) * d**-0.5
    scores = np.where(mask[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = np.einsum("ijh,jhc->ihc", weights / weights.sum(1, keepdims=True), V)

    O = graph_attention(pack_for_graph_attention(adjacency), Q, K, V)
    print(f"farthest from NumPy: {np.abs(O - expected).max():.1e}")
