"""Linear layers: Y = X Wᵀ, for weights in float32, bfloat16, float16, Q8_0, Q4_0 and Q4_1.

Quantised weights keep the layout of the model file, blocks of 32 along a row. The programs
dequantise them by shifts and scales, in registers.

    Q8_0: w = q · d               34 bytes: d float16, q int8[32]
    Q4_0: w = (q − 8) · d         18 bytes: d float16, q uint4[32], low halves first
    Q4_1: w = q · d + m           20 bytes: d, m float16, q uint4[32], low halves first

On a CPU sixteen rows are interleaved: the lanes of a vector are rows, scales are vectors, a value
of X is broadcast to all lanes, and no sum runs across lanes.
Reference: the block formats of GGUF.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tilewright.build import Definition, named_recipe, program
from tilewright.errors import ModelError
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out
from tilewright.toolchain import compilers

BLOCK = 32


@program
def linear_dense(X=dense("t k"), W=dense("n k", kind="weight")):
    t, n, k = indices("t:t n:n k:k")
    return out[t, n](trace.sum_(X[t, k] * W[n, k].cast("float32"), over=k))


@program
def linear_q8_0(
    X=dense("t k"),
    D=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 32", "int8", kind="weight"),
):
    t, n, b, half, lane = indices("t:t n:n b:b h:2 l:16")
    e = half * 16 + lane
    w = Q[n, b, e].cast("float32") * D[n, b]
    return out[t, n](trace.sum_(X[t, b * 32 + e] * w, over=(b, half, lane)))


@program
def linear_q4_0(
    X=dense("t k"),
    D=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 16", "uint8", kind="weight"),
):
    t, n, b, half, lane = indices("t:t n:n b:b h:2 l:16")
    nibble = (Q[n, b, lane].cast("int32") >> (half * 4)) & 15
    w = (nibble - 8).cast("float32") * D[n, b]
    return out[t, n](trace.sum_(X[t, b * 32 + half * 16 + lane] * w, over=(b, half, lane)))


@program
def linear_q4_1(
    X=dense("t k"),
    D=dense("n b", "float16", kind="weight", strided=True),
    M=dense("n b", "float16", kind="weight", strided=True),
    Q=dense("n b 16", "uint8", kind="weight"),
):
    t, n, b, half, lane = indices("t:t n:n b:b h:2 l:16")
    nibble = (Q[n, b, lane].cast("int32") >> (half * 4)) & 15
    w = nibble.cast("float32") * D[n, b] + M[n, b]
    return out[t, n](trace.sum_(X[t, b * 32 + half * 16 + lane] * w, over=(b, half, lane)))


@program
def linear_q8_0_interleaved(
    X=dense("t k"),
    D=dense("g b 16", "float16", kind="weight"),
    Q=dense("g b 32 16", "int8", kind="weight"),
):
    t, g, b, half, lane, r = indices("t:t g:g b:b h:2 l:16 r:16")
    e = half * 16 + lane
    w = Q[g, b, e, r].cast("float32") * D[g, b, r]
    return out[t, g, r](trace.sum_(X[t, b * 32 + e] * w, over=(b, half, lane)))


@program
def linear_q4_0_interleaved(
    X=dense("t k"),
    D=dense("g b 16", "float16", kind="weight"),
    Q=dense("g b 16 16", "uint8", kind="weight"),
):
    t, g, b, half, lane, r = indices("t:t g:g b:b h:2 l:16 r:16")
    nibble = (Q[g, b, lane, r].cast("int32") >> (half * 4)) & 15
    w = (nibble - 8).cast("float32") * D[g, b, r]
    return out[t, g, r](trace.sum_(X[t, b * 32 + half * 16 + lane] * w, over=(b, half, lane)))


@program
def linear_q4_1_interleaved(
    X=dense("t k"),
    D=dense("g b 16", "float16", kind="weight"),
    M=dense("g b 16", "float16", kind="weight"),
    Q=dense("g b 16 16", "uint8", kind="weight"),
):
    t, g, b, half, lane, r = indices("t:t g:g b:b h:2 l:16 r:16")
    nibble = (Q[g, b, lane, r].cast("int32") >> (half * 4)) & 15
    w = nibble.cast("float32") * D[g, b, r] + M[g, b, r]
    return out[t, g, r](trace.sum_(X[t, b * 32 + half * 16 + lane] * w, over=(b, half, lane)))


PROGRAMS: dict[str, Definition] = {
    "f32": linear_dense,
    "bf16": linear_dense.typed(W="bfloat16"),
    "f16": linear_dense.typed(W="float16"),
    "q8_0": linear_q8_0,
    "q4_0": linear_q4_0,
    "q4_1": linear_q4_1,
}

INTERLEAVED = {
    "q8_0": linear_q8_0_interleaved,
    "q4_0": linear_q4_0_interleaved,
    "q4_1": linear_q4_1_interleaved,
}

ROWS = 4  # rows of W in registers together
TOKENS = 4  # rows of X in registers, when there are many
WIDE_TOKENS = 8  # of an interleaved W, whose sixteen rows are one register
SUMS = 4  # of each half of a block, for independent multiply-adds
TOGETHER = 16  # interleaved rows


def cpu_recipe(s: Schedule, many: bool) -> Schedule:
    """Rows of W in parallel; a few rows and tokens in registers; vectors along k."""
    if s.has("r"):
        return _interleaved_recipe(s, many)
    lanes = compilers.vector_bits() // 32
    s = s.split("n", 16 if many else 8, into=("n_unit", "n_rows"))
    s = s.split("n_rows", ROWS, into=("n_o", "n_i"))
    depth = ("b", "h") if s.has("b") else ("k",)
    s = s.reorder("n_unit", "n_o", "t", *depth, "n_i")
    if many:
        s = s.split("t", TOKENS, tail="cut", into=("t_o", "t_i"))
        s = s.reorder("t_o", *depth, "n_i", "t_i").unroll("t_i")
    if depth == ("k",):
        s = s.split("k", lanes, tail="cut", into=("k_o", "l")).reorder("k_o", "n_i", "t_i", "l")
    else:
        s = s.reorder("h", "n_i", "t_i", "l").unroll("h")
    return s.parallel("n_unit").unroll("n_i").vectorize("l")


def _interleaved_recipe(s: Schedule, many: bool) -> Schedule:
    """Sixteen rows of W are the lanes of a vector. One token is bound by memory: several sums, and
    a prefetch of the next rows' weights. Many tokens share each dequantised weight."""
    s = s.reorder("g", "t", "b", "l", "h", "r").parallel("g").vectorize("r").unroll("h")
    if many:
        s = s.split("t", WIDE_TOKENS, tail="cut", into=("t_o", "t_i"))
        return s.reorder("t_o", "b", "l", "h", "t_i", "r").unroll("t_i")
    s = s.split("l", SUMS, into=("l_o", "l_i")).unroll("l_i").rfactor("l_i").rfactor("h")
    return s.prefetch("Q", "g", 1)


GPU_ROWS = 16  # rows of W of one CTA


def gpu_recipe(s: Schedule, n: int) -> Schedule:
    """Threads in y take rows of W; threads in x share the sum of a row."""
    rows = next(r for r in (GPU_ROWS, 8, 4, 2, 1) if n % r == 0)
    s = s.split("n", rows, into=("n_cta", "n_y")).bind("t", "cta.y")
    s = s.bind("n_cta", "cta.x").bind("n_y", "thread.y")
    if s.has("b"):
        return s.bind("l", "thread.x").unroll("h").unroll("b", 4)
    return s.split("k", 32, into=("k_o", "k_x")).bind("k_x", "thread.x").unroll("k_o", 4)


def check_kind(kind: str, name: str = "") -> None:
    """Raises ModelError[M104] for a kind of weight that there is no linear layer for."""
    if kind not in PROGRAMS:
        rule, hint = f"no linear layer for weights of kind {kind}", f"kinds: {', '.join(PROGRAMS)}"
        raise ModelError("M104", rule, where=name, hint=hint)


@cache
def linear_kernel(
    kind: str, many: bool, n: int, k: int, target: str = "cpp", interleaved: bool = False
) -> Kernel:
    """The built kernel for a kind of weight of n × k. `many`: more than a few rows of X.

    `kernel(X, *arrays, out=None)` returns (t, n) for the arrays of `weight_views`, and (t, n / 16,
    16), the same memory, for those of `interleave`. Sizes are constants, so that the kernel needs
    no guards; the layers of a model have few shapes."""
    return linear_definition(kind, many, n, k, interleaved).build(target)


def linear_definition(
    kind: str, many: bool, n: int, k: int, interleaved: bool = False
) -> Definition:
    """The program of `linear_kernel` with its schedule. Raises ModelError[M104]."""
    check_kind(kind)
    definition = INTERLEAVED[kind] if interleaved else PROGRAMS[kind]
    return definition.schedule(recipe.of(many=many, n=n, k=k))


@named_recipe
def recipe(s: Schedule, many: bool, n: int, k: int) -> Schedule:
    """The schedule of a linear layer of n × k."""
    dims = {d for t in s.program.tensors for d in t.dims}
    s = s.specialize("g", n // TOGETHER) if "g" in dims else s.specialize("n", n)
    s = s.specialize("k", k)
    s = s.specialize("b", k // BLOCK) if "b" in dims else s
    return gpu_recipe(s, n) if s.target.is_cuda else cpu_recipe(s, many)


def weight_views(kind: str, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays of a weight: views of its data in the file.

    `data`: (n, k) of float32 or bits, or uint8 (n, bytes of a row) of blocks."""
    if kind == "q8_0":
        blocks = data.reshape(data.shape[0], -1, 34)
        return blocks[:, :, :2].view(np.float16)[..., 0], blocks[:, :, 2:].view(np.int8)
    if kind == "q4_0":
        blocks = data.reshape(data.shape[0], -1, 18)
        return blocks[:, :, :2].view(np.float16)[..., 0], blocks[:, :, 2:]
    if kind == "q4_1":
        blocks = data.reshape(data.shape[0], -1, 20)
        scales = blocks[:, :, :4].view(np.float16)
        return scales[..., 0], scales[..., 1], blocks[:, :, 4:]
    return (data,)


def can_interleave(kind: str, rows: int) -> bool:
    """Whether a weight can be interleaved: quantised, and rows a multiple of 16."""
    return kind in INTERLEAVED and rows % TOGETHER == 0


def interleave(kind: str, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays of a weight with sixteen rows interleaved: scales (n / 16, blocks, 16), numbers
    (n / 16, blocks, numbers, 16). Copies; `data` as in `weight_views`."""
    arrays = []
    for x in weight_views(kind, data):
        grouped = x.reshape(x.shape[0] // TOGETHER, TOGETHER, *x.shape[1:])
        arrays.append(np.ascontiguousarray(np.moveaxis(grouped, 1, -1)))
    return tuple(arrays)
