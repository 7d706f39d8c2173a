"""Linear layers: Y = X Wᵀ, for weights in float32, bfloat16, float16, Q8_0, Q4_0 and Q4_1. One
kernel also computes X Wᵀ + B (a bias), R + X Wᵀ (a residual) or SiLU(X Wᵀ) · (X W2ᵀ) (a gate); the
product and the gate may take the RMSNorm of X in place of X.

Quantised weights keep the layout of the model file, blocks of 32 along a row. The programs
dequantise them by shifts and scales, in registers.

    Q8_0: w = q · d               34 bytes: d float16, q int8[32]
    Q4_0: w = (q − 8) · d         18 bytes: d float16, q uint4[32], low halves first
    Q4_1: w = q · d + m           20 bytes: d, m float16, q uint4[32], low halves first

On a CPU sixteen rows are interleaved: the lanes of a vector are rows, scales are vectors, a value
of X is broadcast to all lanes, and no sum runs across lanes.
Reference: the block formats of GGUF.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from tilewright.build import Definition, kernels, named_recipe, program_of
from tilewright.errors import ModelError
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out
from tilewright.toolchain import compilers

BLOCK = 32
After = Literal["", "bias", "residual", "gate", "norm", "norm_gate"]
Rows = tuple[Any, ...]  # the indices of a row of W


class Layout(NamedTuple):
    """How a kind of weight is stored. `arrays`: its parameters; `rows`, `depth`: the indices of a
    row, and those of a sum over its columns; `weight(arrays, rows, *depth)`: (column, value)."""

    arrays: dict[str, Any]
    rows: str
    depth: str
    weight: Callable[..., tuple[Any, Any]]


def _dense(a: dict[str, Any], rows: Rows, k: Any) -> tuple[Any, Any]:
    return k, a["W"][*rows, k].cast("float32")


def _blocks(a: dict[str, Any], rows: Rows, b: Any, half: Any, lane: Any) -> tuple[Any, Any]:
    """The column and the dequantised weight at (b, half, lane) of a row in blocks of 32: int8 in
    order, or uint4 with the low halves first. If `rows` is (g, r), the arrays `a` have r last."""
    n, *r = rows
    column = b * 32 + half * 16 + lane
    if a["Q"].dtype.name == "int8":
        e = half * 16 + lane
        q, column = a["Q"][n, b, e, *r].cast("float32"), b * 32 + e
    else:
        nibble = (a["Q"][n, b, lane, *r].cast("int32") >> (half * 4)) & 15
        q = (nibble if "M" in a else nibble - 8).cast("float32")
    w = q * a["D"][n, b, *r]
    return column, w + a["M"][n, b, *r] if "M" in a else w


def _quantised(dtype: str, scales: str, interleaved: bool) -> Layout:
    """Blocks with these arrays of scales."""
    size = 32 if dtype == "int8" else 16
    dims, r = ("g b", " 16") if interleaved else ("n b", "")
    arrays = {
        name: dense(dims + r, "float16", kind="weight", strided=not interleaved) for name in scales
    }
    arrays["Q"] = dense(f"{dims} {size}{r}", dtype, kind="weight")
    return Layout(arrays, "g:g r:16" if interleaved else "n:n", "b:b h:2 l:16", _blocks)


_BLOCKS = ("q8_0", "int8", "D"), ("q4_0", "uint8", "D"), ("q4_1", "uint8", "DM")
LAYOUTS = {
    "dense": Layout({"W": dense("n k", kind="weight")}, "n:n", "k:k", _dense),
    **{
        f"{kind}{suffix}": _quantised(dtype, scales, bool(suffix))
        for kind, dtype, scales in _BLOCKS
        for suffix in ("", "_interleaved")
    },
}  # fmt: skip


STORED = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # of the layout "dense"
KINDS = (*STORED, *(kind for kind, _, _ in _BLOCKS))


@cache
def linear_program(kind: str, interleaved: bool = False, after: After = "") -> Definition:
    """The program of a layer for a kind of weight. `after` is done to its result: `"bias"` and
    `"residual"` add B and R, `"gate"` multiplies SiLU of it by the product with a second weight,
    whose arrays come last. `"norm"` takes N and eps in front of these, and the RMSNorm of X in
    place of X: the sum of its squares is taken beside the product, and scales the result."""
    layout = "dense" if kind in STORED else kind + ("_interleaved" if interleaved else "")
    arrays, rows, depth, weight = LAYOUTS[layout]
    parameters = {"X": dense("t k"), **arrays}
    dims = " ".join(x.partition(":")[2] for x in rows.split())
    norm, gate = after.startswith("norm"), after.endswith("gate")
    if norm:
        parameters |= {"N": dense("k", kind="weight"), "eps": trace.scalar()}
    if after == "bias":
        parameters["B"] = dense(dims, kind="weight")
    if after == "residual":
        parameters["R"] = dense(f"t {dims}")
    if gate:
        parameters |= {f"{name}2": array for name, array in arrays.items()}

    def linear(**a: Any) -> Any:
        t, *at = indices(f"t:t {rows} {depth}")
        coordinates, over = tuple(at[: len(rows.split())]), tuple(at[len(rows.split()) :])

        def product(suffix: str = "") -> Any:
            column, w = weight({name: a[name + suffix] for name in arrays}, coordinates, *over)
            x = a["X"][t, column] * a["N"][column] if norm else a["X"][t, column]
            total = trace.sum_(x * w, over=over)
            return total * scale if norm else total

        if norm:
            column, _ = weight({name: a[name] for name in arrays}, coordinates, *over)
            squares = trace.sum_(a["X"][t, column] * a["X"][t, column], over=over)
            scale = trace.rsqrt(squares / trace.size("k").cast("float32") + a["eps"][()])
        y = product()
        if after == "bias":
            y = y + a["B"][*coordinates]
        elif after == "residual":
            y = a["R"][t, *coordinates] + y
        elif gate:
            y = y * trace.sigmoid(y) * product("2")
        return out[t, *coordinates](y)

    definition = program_of("_".join(filter(None, ("linear", layout, after))), parameters, linear)
    return definition.typed(**{w: STORED[kind] for w in ("W", "W2") if w in parameters})


ROWS = 4  # rows of W in registers together
TOKENS = 4  # rows of X in registers, when there are many
WIDE_TOKENS = 8  # of an interleaved W, whose sixteen rows are one register
SUMS = 2  # of each half of a block, for independent multiply-adds; beside a gate 1 a product
TOGETHER = 16  # interleaved rows


def cpu_recipe(s: Schedule, many: bool) -> Schedule:
    """Rows of W in parallel; a few rows and tokens in registers; vectors along k."""
    if s.has("r"):
        return _interleaved_recipe(s, many)
    lanes = compilers.cpu_lanes()
    rows = ROWS // 2 if many and _is_gate(s) else ROWS  # as many registers for two products
    s = s.split("n", 16 if many else 8, into=("n_unit", "n_rows"))
    s = s.split("n_rows", rows, into=("n_o", "n_i"))
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
    """Sixteen rows of W are the lanes of a vector. A few tokens: four, then two, share each
    dequantised weight, each with several sums, in the order of one token alone; the next rows'
    weights are prefetched. Many tokens: eight share it, then four, then two, with one sum each."""
    s = s.reorder("g", "t", "b", "l", "h", "r").parallel("g").vectorize("r").unroll("h")
    depth = ("b", "l") if many else ("b", "l_o", "l_i")
    if not many:
        s = s.split("l", SUMS // 2 if _is_gate(s) else SUMS, into=("l_o", "l_i"))
    t = "t"
    for tokens in (WIDE_TOKENS, 4, 2) if many else (TOKENS, 2):
        s = s.split(t, tokens, tail="cut", into=(f"{t}_o", f"{t}_i"))
        s = s.reorder(f"{t}_o", *depth, "h", f"{t}_i", "r").unroll(f"{t}_i")
        t += "_t"
    if many:
        return s
    s = s.unroll("l_i").rfactor("l_i").rfactor("h").prefetch("Q", "g", 1)
    return s.prefetch("Q2", "g", 1) if _is_gate(s) else s


def _is_gate(s: Schedule) -> bool:
    return any(t.name in ("W2", "Q2") for t in s.program.tensors)


GPU_ROWS = 8  # rows of W of one CTA
GPU_UNROLL = 8  # iterations whose loads are issued together; with a gate one: registers
GPU_LANES = 4  # neighbouring numbers of a row that a thread reads at once


def gpu_recipe(s: Schedule, n: int, k: int) -> Schedule:
    """Threads in y take rows of W; the 32 threads in x share the sum of a row, four numbers each:
    of eight blocks, or of 128 columns."""
    rows = next(r for r in (GPU_ROWS, 4, 2, 1) if n % r == 0)
    s = s.split("n", rows, into=("n_cta", "n_y")).bind("t", "cta.y")
    s = s.bind("n_cta", "cta.x").bind("n_y", "thread.y")
    if s.has("b"):
        s = s.split("b", 8, into=("k_o", "b_x")).split("l", GPU_LANES, into=("l_x", "k_v"))
        s = s.reorder("k_o", "b_x", "l_x", "h", "k_v").fuse("b_x", "l_x", into="k_x").unroll("h")
    elif k % GPU_LANES == 0:
        s = s.split("k", GPU_LANES, into=("k_4", "k_v")).split("k_4", 32, into=("k_o", "k_x"))
    else:
        s = s.split("k", 32, into=("k_o", "k_x"))
    s = s.bind("k_x", "thread.x").unroll("k_o", 1 if _is_gate(s) else GPU_UNROLL)
    return s.vectorize("k_v") if s.has("k_v") else s


def linear_definition(
    kind: str, many: bool, n: int, k: int, interleaved: bool = False, after: After = ""
) -> Definition:
    """The program with its schedule for a kind of weight of n × k. `many`: more than a few rows of
    X. Raises ModelError[M104].

    Its kernels, called with `(X, *arrays, out=None)`, return (t, n) for the arrays of
    `weight_views`, and (t, n / 16, 16), the same memory, for those of `interleave`. Sizes are
    constants, so that a kernel needs no guards; the layers of a model have few shapes.

    `after`: `"bias"` takes one more array, of the shape of a row of the output, `"residual"` one of
    the shape of the output, and adds it; `"gate"` takes the arrays of a second weight last and
    returns SiLU of the first product times the second."""
    if kind not in KINDS:
        rule, hint = f"no linear layer for weights of kind {kind}", f"kinds: {', '.join(KINDS)}"
        raise ModelError("M104", rule, hint=hint)
    return linear_program(kind, interleaved, after).schedule(recipe.of(many=many, n=n, k=k))


linear_kernel = kernels(linear_definition)


@named_recipe
def recipe(s: Schedule, many: bool, n: int, k: int) -> Schedule:
    """The schedule of a linear layer of n × k."""
    dims = {d for t in s.program.tensors for d in t.dims}
    s = s.specialize("g", n // TOGETHER) if "g" in dims else s.specialize("n", n)
    s = s.specialize("k", k).merge_sums("out")
    s = s.specialize("b", k // BLOCK) if "b" in dims else s
    return gpu_recipe(s, n, k) if s.target.is_cuda else cpu_recipe(s, many)


def weight_views(kind: str, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays of a weight: views of its data in the file.

    `data`: (n, k) of float32 or bits, or uint8 (n, bytes of a row) of blocks."""
    sizes = {"q8_0": (2, 34), "q4_0": (2, 18), "q4_1": (4, 20)}  # bytes of scales, of a block
    if kind not in sizes:
        return (data,)
    scales, size = sizes[kind]
    blocks = data.reshape(data.shape[0], -1, size)
    floats, numbers = blocks[:, :, :scales].view(np.float16), blocks[:, :, scales:]
    arrays = [floats[..., i] for i in range(scales // 2)]
    return (*arrays, numbers.view(np.int8) if kind == "q8_0" else numbers)


def can_interleave(kind: str, rows: int) -> bool:
    """Whether a weight can be interleaved: quantised, and rows a multiple of 16."""
    return f"{kind}_interleaved" in LAYOUTS and rows % TOGETHER == 0


def interleave(kind: str, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays of a weight with sixteen rows interleaved: scales (n / 16, blocks, 16), numbers
    (n / 16, blocks, numbers, 16). Copies; `data` as in `weight_views`."""
    arrays = []
    for x in weight_views(kind, data):
        grouped = x.reshape(x.shape[0] // TOGETHER, TOGETHER, *x.shape[1:])
        arrays.append(np.ascontiguousarray(np.moveaxis(grouped, 1, -1)))
    return tuple(arrays)
