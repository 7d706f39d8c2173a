"""Functions of reductions: scheduled as the reduction alone, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.compiler.bsr_spmm import recipe as bsr_recipe
from tests.compiler.cases import (
    FORMATS,
    after_every_pass,
    arguments,
    called,
    close,
    executed,
    matrix,
    numbers,
    pack,
    stored,
)
from tests.compiler.replay import replay

import tilewright as tw
from tilewright.errors import ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import statements, walk
from tilewright.lower import AFTER_SCHEDULE, run_passes
from tilewright.ops.gemm import Tile, gpu_recipe
from tilewright.ops.gemm import recipe as gemm_recipe
from tilewright.ops.linear import linear_kernel
from tilewright.ops.spmm import recipe as spmm_recipe
from tilewright.toolchain import nvrtc

ARCHS = ("sm_80", "sm_90a", "sm_100a")


def silu(x: Any) -> Any:
    return x / (1.0 + (tw.exp(-x) if isinstance(x, ir.Expr) else np.exp(-x)))


@tw.program
def relu(A=tw.dense("m k"), B=tw.dense("k n"), bias=tw.dense("n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.maximum(tw.sum(A[i, k] * B[k, j], over=k) + bias[j], 0.0))


@tw.program
def residual(A=tw.dense("m k"), B=tw.dense("k n"), R=tw.dense("m n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](silu(tw.sum(A[i, k] * B[k, j], over=k) + R[i, j]) + R[i, j])


@tw.program
def gated(A=tw.dense("m k"), B=tw.dense("k n"), C=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    gate, up = tw.sum(A[i, k] * B[k, j], over=k), tw.sum(A[i, k] * C[k, j], over=k)
    return tw.out[i, j](silu(gate) * up)


@tw.program
def scaled(A=tw.dense("m k"), Q=tw.dense("k n", "int8"), S=tw.dense("n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.sum(A[i, k] * (Q[k, j] - 1).cast("float32"), over=k) * S[j])


@tw.program
def narrow(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out.typed("float16")[i, j](tw.sum(A[i, k] * B[k, j], over=k) * 0.5)


@tw.program
def spread(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    x = A[i, k] * B[k, j]
    most = tw.maximum(tw.max(x, over=k), 0.0)
    return tw.out[i, j](most + tw.where(most > 0.1, tw.sum(x, over=k), tw.sum(x * x, over=k)))


@tw.program
def whole(A=tw.dense("m k", "int32"), B=tw.dense("k n", "int32")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.sum(A[i, k] * B[k, j], over=k) * 3 - 7)


def _spread(a: Any, b: Any) -> Any:
    x = a[:, :, None] * b[None]
    most = np.maximum(x.max(1, initial=0), 0)
    return most + np.where(most > 0.1, x.sum(1), (x * x).sum(1))


class Case(NamedTuple):
    program: Any
    value: Callable[..., Any]


CASES = {
    "relu": Case(relu, lambda a, b, bias: np.maximum(a @ b + bias, 0)),
    "residual": Case(residual, lambda a, b, r: silu(a @ b + r) + r),
    "gated": Case(gated, lambda a, b, c: silu(a @ b) * (a @ c)),
    "scaled": Case(scaled, lambda a, q, s: a @ (q - 1) * s),
    "narrow": Case(narrow, lambda a, b: a @ b * 0.5),
    "spread": Case(spread, _spread),
    "whole": Case(whole, lambda a, b: a @ b * 3 - 7),
    "float64": Case(relu.typed(A="float64", B="float64", bias="float64"),
                    lambda a, b, bias: np.maximum(a @ b + bias, 0)),
}  # fmt: skip


def wanted(case: Case, args: dict[str, Any]) -> np.ndarray:
    """The output by NumPy, in float64."""
    return case.value(*(numbers(args[t.name], t.dtype) for t in case.program.program.inputs))


def check(case: Case, args: dict[str, Any], got: np.ndarray) -> None:
    (out,) = case.program.program.outputs
    close(got, wanted(case, args), out.dtype.name)


def leaves(program: ir.Program) -> list[ir.Compute]:
    return [x for stage in program.stages for n in stage for x in statements(n.body)
            if isinstance(x, ir.Compute)]  # fmt: skip


# ------------------------------------------------------------------------------------- schedules


def drawn(s: Any, rng: np.random.Generator, sizes: dict[str, int]) -> Any:
    """A random schedule: splits, orders, units, parts of sums, unrolled loops and vectors. Verbs
    that are refused, at once or by a pass, are left out."""
    for dim, size in sizes.items():
        s = s.specialize(dim, size) if size and rng.random() < 0.9 else s
    for loop in rng.permutation(["i", "j", "k"]):
        if rng.random() < 0.8:
            tail = str(rng.choice(["guard"] * 4 + ["cut"]))
            s = s.split(str(loop), int(rng.choice([2, 4])), tail=tail)
    loops = [str(x) for x in rng.permutation([x for x in s.loops if not x.endswith("_t")])]
    outer = sorted(loops, key=lambda x: x.endswith("_i"))  # an order that accumulators allow
    tries = [("reorder", loops), ("reorder", outer), ("parallel", outer[:1])]
    tries += [("vectorize", [x]) for x in reversed(outer) if rng.random() < 0.4]
    tries += [(str(rng.choice(["unroll", "rfactor"])), [x]) for x in loops]
    for verb, args in tries:
        try:
            later = getattr(s, verb)(*args)
            run_passes(later.lowered.program, AFTER_SCHEDULE, "cpp")
        except ScheduleError as refused:
            assert refused.code == "S102" and refused.hint
        else:
            s = later
    return s


@pytest.mark.parametrize("name", CASES)
def test_random_schedules_mean_the_same(name):
    case = CASES[name]
    verbs: list[str] = []
    for seed in range(12):
        rng = np.random.default_rng([seed, list(CASES).index(name)])
        sizes: dict[str, Any] = {
            d: int(rng.choice([4, 8, int(rng.integers(1, 10))])) for d in "mnk"
        }
        sizes["k"] *= seed % 6 != 5  # an empty sum
        args = arguments(case.program, rng, **sizes)
        s = drawn(case.program.scheduled("cpp"), rng, sizes)
        verbs += [step.args[1] if step.verb == "bind" else step.verb for step in s.history]
        assert all(c.reductions and not c.op for c in leaves(s.lowered.program))
        last = run_passes(s.lowered.program, AFTER_SCHEDULE, "cpp")
        for program in (s.lowered.program, last):
            check(case, args, executed(case.program, program, args)["out"])
        if seed % 4 == 0:
            definition = case.program.schedule(lambda start, steps=s.history: replay(start, steps))
            check(case, args, called(definition.build(), definition, args)["out"])
    for verb in ("split", "reorder", "unroll", "rfactor", "vector", "parallel"):
        assert verbs.count(verb) >= 3, (verb, verbs)


def registers(s: Any) -> Any:
    """Four rows and a vector of columns in registers, the sum in two parts."""
    s = s.specialize("k", 6).specialize("n", 16)
    s = s.split("i", 4).split("j", 8, into=("j_o", "j_v")).split("k", 2)
    s = s.reorder("i_o", "j_o", "k_o", "k_i", "i_i", "j_v").rfactor("k_i")
    return s.unroll("i_i").vectorize("j_v").parallel("i_o")


@pytest.mark.parametrize("recipe", [None, registers], ids=["as written", "registers"])
@pytest.mark.parametrize("name", CASES)
def test_every_pass_keeps_the_value(name, recipe, rng):
    case = CASES[name]
    args = arguments(case.program, rng, m=7, n=16, k=6)
    after_every_pass(case.program, args, recipe)
    definition = case.program.schedule(recipe) if recipe else case.program
    check(case, args, called(definition.build(), definition, args)["out"])


# ------------------------------------------------------------------------------------- counting


def innermost(program: ir.Program) -> list[Any]:
    """Statements of the lowered program with the number of loops around them."""
    found: list[Any] = []

    def visit(s: Any, depth: int) -> None:
        if isinstance(s, ir.Seq):
            for b in s.body:
                visit(b, depth)
        elif isinstance(s, (ir.For, ir.If)):
            visit(s.body, depth + isinstance(s, ir.For))
        else:
            found.append((depth, s))

    for stage in program.stages:
        for nest in stage:
            visit(nest.body, len(nest.grid))
    return found


def times(program: ir.Program, what: Callable[[Any], bool]) -> list[int]:
    """The loops around each expression of the lowered program for which `what` holds."""
    return [depth for depth, s in innermost(program) for x in walk(s) if what(x)]


def reads(buffer: str) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, ir.Load) and x.buffer.name == buffer


def is_exp(x: Any) -> bool:
    return isinstance(x, ir.Unary) and x.op == "exp"


def test_nothing_is_computed_twice():
    program = residual.lower()
    assert times(program, is_exp) == [2]  # once for each element, outside of the sum
    assert times(program, reads("R")) == [2]
    assert times(program, reads("A")) == times(program, reads("B")) == [3]
    program = gated.lower()  # both sums in one loop
    assert times(program, is_exp) == [2]
    assert times(program, reads("A")) == times(program, reads("B")) == [3]
    assert times(program, reads("C")) == [3]
    assert sum(isinstance(s, ir.Store) and s.buffer.scope == "global" for _, s in
               innermost(program)) == 1  # fmt: skip
    program = spread.lower()
    assert times(program, reads("A")) == times(program, reads("B")) == [3]


@tw.program
def sampled(A=tw.sparse("m n"), P=tw.dense("m d"), Q=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, j](tw.sum(P[i, k] * Q[j, k], over=k) * A[i, j])


def test_a_search_of_the_epilogue_is_not_in_the_loop_of_the_sum(rng):
    program = sampled.decompose(A=tw.csr())
    lowered = program.lower()
    assert times(lowered, lambda x: isinstance(x, ir.Search)) == [2]
    args = arguments(program, rng)
    got = executed(program, lowered, args)["out"]
    a = args["A"].dense().astype(np.float64)
    close(got, numbers(args["P"], "float32") @ numbers(args["Q"], "float32").T * a, "float32")


# ------------------------------------------------------------------------------------- sparse


@tw.program
def layer(A=tw.sparse("m n"), X=tw.dense("n d"), bias=tw.dense("d"), R=tw.dense("m d")):
    i, j, k = tw.indices("i:m j:n k:d")
    x = tw.sum(A[i, j] * X[j, k], over=j) + bias[k]
    return tw.out[i, k](silu(x) + R[i, k])


WHOLE_ROWS = {
    **{n: FORMATS[n] for n in ("csr", "dcsr", "ell", "ragged", "bsr", "bsr3", "dbsr", "sr_bcrs")},
    "hyb": tw.hyb(buckets=(1, 2, 4), long_rows="csr"),
}


@pytest.mark.parametrize("kind", ["random", "empty", "one row"])
@pytest.mark.parametrize("fmt", WHOLE_ROWS)
def test_a_layer_of_a_graph_network_takes_the_schedule_of_spmm(fmt, kind, rng):
    program = layer.decompose(A=WHOLE_ROWS[fmt])
    args = arguments(program, rng, kind, m=6, n=6, d=32)
    a = args["A"].dense().astype(np.float64)
    x, bias, r = (numbers(args[n], "float32") for n in ("X", "bias", "R"))
    value = silu(a @ x + bias) + r
    for target in ("cpp",) if "b" in fmt.replace("hyb", "") else ("cpp", "cuda:sm_80"):  # blocks
        after_every_pass(program, args, spmm_recipe, target, only_last=kind != "random")
    definition = program.schedule(spmm_recipe)
    close(called(definition.build(), definition, args)["out"], value, "float32")


IN_PIECES = {n: FORMATS[n] for n in FORMATS if n not in WHOLE_ROWS}


@pytest.mark.parametrize("kind", ["random", "empty", "one row"])
@pytest.mark.parametrize("fmt", IN_PIECES)
def test_rows_in_pieces_are_summed_first(fmt, kind, rng):
    """Where elements are visited several times the sums have stages of their own."""
    program = layer.decompose(A=IN_PIECES[fmt])
    args = arguments(program, rng, kind, m=6, n=6, d=3)
    a = args["A"].dense().astype(np.float64)
    x, bias, r = (numbers(args[n], "float32") for n in ("X", "bias", "R"))
    value = silu(a @ x + bias) + r
    after_every_pass(program, args)
    close(called(program.build(), program, args)["out"], value, "float32")
    (output,) = {c.out.buffer.name for c in leaves(program.scheduled().lowered.program)
                 if c.op} - {"out"}  # fmt: skip
    assert output == "out.0"


# ------------------------------------------------------------------------------------- tiles

HALVES = ("float16", "bfloat16")
SIZES = [(16, 8, 16), (17, 9, 33), (1, 1, 1), (33, 18, 16), (15, 7, 2), (3, 5, 0)]


@tw.program
def squashed(A=tw.dense("m k"), B=tw.dense("k n"), bias=tw.dense("n"), R=tw.dense("m n")):
    i, j, k = tw.indices("i:m j:n k:k")
    x = tw.sum(A[i, k] * B[k, j], over=k) + bias[j]
    return tw.out.typed("bfloat16")[i, j](silu(x) + R[i, j])


TILES = {
    "relu": CASES["relu"],
    "residual": CASES["residual"],
    "gated": CASES["gated"],
    "narrow": CASES["narrow"],
    "squashed": Case(squashed, lambda a, b, bias, r: silu(a @ b + bias) + r),
}


def halves(case: Case, dtype: str) -> Case:
    matrices = {t.name: dtype for t in case.program.program.inputs if t.name in "ABC"}
    return case._replace(program=case.program.typed(**matrices))


def on_tiles(s: Any) -> Any:
    """The recipe of a GPU with the smallest tiles that two warps share: matrices of few elements
    have several, and interpreters run all elements of a tile, also those outside."""
    return gpu_recipe(s, Tile(16, 16, 16, 8, 8, 16, 1))


def is_fragment(s: Any) -> bool:
    return isinstance(s, ir.For) and s.kind == "fragment"


@pytest.mark.parametrize(
    ("size", "dtype"), [(size, HALVES[n % 2]) for n, size in enumerate(SIZES)], ids=str
)
@pytest.mark.parametrize("name", TILES)
def test_a_product_with_an_epilogue_on_tiles(name, size, dtype, rng):
    """After every pass for the size that leaves a remainder of each dimension."""
    case = halves(TILES[name], dtype)
    args = arguments(case.program, rng, **dict(zip("mnk", size, strict=True)))
    for target, recipe in (("cpp", gemm_recipe), ("cuda:sm_80", on_tiles)):
        seen = after_every_pass(case.program, args, recipe, target, only_last=size != SIZES[1])
        assert "materialize_tiles" in seen
    definition = case.program.schedule(gemm_recipe)
    program = definition.lower()
    assert any(is_fragment(x) for x in walk(program.stages[0][0].body))
    check(case, args, called(definition.build(), definition, args)["out"])


def test_tiles_do_not_read_or_write_beside_their_arrays(rng):
    case = halves(TILES["squashed"], "float16")
    args = arguments(case.program, rng, m=19, n=13, k=21)
    around = {n: np.full((x.shape[0] + 2, x.shape[1] + 5), np.nan, x.dtype)
              for n, x in args.items() if x.ndim == 2 and x.dtype != np.uint16}  # fmt: skip
    inside = {n: x[1:-1, 2:-3] for n, x in around.items()}
    for n, x in inside.items():
        x[:] = args[n]
    out = np.full((21, 20), 0x7FC0, np.uint16)
    case.program.schedule(gemm_recipe).build()(**(args | inside), out=out[1:-1, 2:15])
    check(case, args, numbers(out[1:-1, 2:15], "bfloat16"))
    out[1:-1, 2:15] = 0x7FC0
    assert (out == 0x7FC0).all()


@pytest.mark.parametrize("kind", ["random", "one row", "empty"])
@pytest.mark.parametrize("block", [16, 32])
def test_block_sparse_products_with_an_epilogue_on_tiles(block, kind, rng):
    program = layer.typed(A="float16", X="float16").decompose(A=tw.bsr(block))
    m, n, d = 40, 50, 11
    recipe = bsr_recipe(0 if kind == "random" else d)
    a = pack(tw.bsr(block), matrix(kind, m, n, rng), "float16")
    args = {
        "A": a,
        "X": stored(rng.uniform(-1, 1, (n, d)), "float16"),
        "bias": rng.uniform(-1, 1, d).astype(np.float32),
        "R": rng.uniform(-1, 1, (m, d)).astype(np.float32),
    }
    dense = np.zeros((m, n))
    coords, entries = a.unpack()
    dense[tuple(np.asarray(c) for c in coords)] = numbers(np.asarray(entries), "float16")
    value = silu(dense @ numbers(args["X"], "float16") + args["bias"]) + args["R"]
    for target in ("cpp", "cuda:sm_80"):
        seen = after_every_pass(program, args, recipe, target, only_last=kind != "random")
        assert "materialize_tiles" in seen
    definition = program.schedule(recipe)
    close(called(definition.build(), definition, args)["out"], value, "float32")


# ------------------------------------------------------------------------------------- scratch


def test_an_operand_of_the_epilogue_is_cached_outside_of_the_sum(rng):
    case = CASES["relu"]
    args = arguments(case.program, rng, m=5, n=16, k=6)

    def recipe(s: Any) -> Any:
        s = s.specialize("n", 16).split("j", 8, into=("j_o", "j_v")).reorder("j_o", "i", "k", "j_v")
        return s.vectorize("j_v").cache("bias", "j_o")

    after_every_pass(case.program, args, recipe)
    s = recipe(case.program.scheduled())
    assert times(run_passes(s.lowered.program, AFTER_SCHEDULE), reads("bias")) == [1]
    with pytest.raises(ScheduleError, match=r"S102.*reads no bias") as refused:
        case.program.scheduled().specialize("n", 16).reorder("i", "k", "j").cache("bias", "k")
    assert "epilogue" in refused.value.hint


def test_an_operand_that_the_sum_and_the_epilogue_read(rng):
    """Scratch of the sum is gone where the epilogue is computed: it reads the array."""

    @tw.program
    def shifted(A=tw.dense("m k"), B=tw.dense("k n"), S=tw.dense("n")):
        i, j, k = tw.indices("i:m j:n k:k")
        return tw.out[i, j](tw.sum(A[i, k] * (B[k, j] + S[j]), over=k) - S[j])

    case = Case(shifted, lambda a, b, s: a @ (b + s) - s)
    args = arguments(shifted, rng, m=4, n=8, k=5)

    def recipe(s: Any) -> Any:
        s = s.specialize("n", 8).split("k", 2, tail="guard").reorder("i", "k_o", "j", "k_i")
        return s.cache("S", "k_o")

    after_every_pass(shifted, args, recipe)
    definition = shifted.schedule(recipe)
    check(case, args, called(definition.build(), definition, args)["out"])


# ------------------------------------------------------------------------------------- CUDA


def threads(s: Any) -> Any:
    """A sum over the lanes of a warp, and over warps."""
    s = s.specialize("k", 128).specialize("n", 8)
    s = s.split("k", 32, into=("k_y", "k_x")).bind("i", "cta.x").bind("j", "cta.y")
    return s.bind("k_y", "thread.y").bind("k_x", "thread.x")


@pytest.mark.parametrize("name", CASES)
def test_sums_over_threads_have_an_epilogue(name, rng):
    case = CASES[name]
    args = arguments(case.program, rng, m=3, n=8, k=128)
    (seen, *_) = [after_every_pass(case.program, args, threads, "cuda:sm_80")]
    assert "materialize_reductions" in seen
    lowered = case.program.schedule(threads).lower("cuda:sm_80")
    assert times(lowered, lambda x: isinstance(x, ir.ReduceThreads))


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [*CASES, *(f"tiles {n}" for n in TILES)])
def test_cubins(name, arch):
    if name.startswith("tiles"):
        program = halves(TILES[name[6:]], "float16").program
        definition = program.schedule(gemm_recipe.of(products=1 + (name == "tiles gated")))
    else:
        definition = CASES[name].program.schedule(threads)
    kernel = definition.build(f"cuda:{arch}")
    for used in kernel.resources.values():
        assert used.spill_bytes == 0
        assert used.registers <= 168
    assert ("tw::fragment_row" in kernel.source) == name.startswith("tiles")


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("after", ["bias", "residual", "gate", "norm_gate"])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_1"])
def test_cubins_of_linear_layers(kind, after):
    kernel = linear_kernel("cuda:sm_80", kind, False, 576, 1536, after=after)
    assert all(used.spill_bytes == 0 for used in kernel.resources.values())
    sums = 1 + after.endswith("gate") + after.startswith("norm")
    assert kernel.source.count("tw::across_lanes") == sums


# ------------------------------------------------------------------------------------- refusals


@tw.program
def normed(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    size = tw.max(A[i, k] * A[i, k], over=k)
    return tw.out[i, j](tw.sum(A[i, k] * B[k, j], over=k) / (1.0 + size))


REFUSED = {
    "a cut tail": (
        lambda s: s.split("k", 4, tail="cut").reorder("k_o", "i"), "loop k_t that computes out",
        'tail="guard"',
    ),
    "a reduction of a row": (
        lambda s: s.reorder("j", "i"), "loop k that computes out.1", "tw.temp",
    ),
    "fuse": (lambda s: s.fuse("i", "j"), "loop k that computes out.1", "tw.temp"),
    "a copy": (
        lambda s: s.specialize("k", 8).specialize("n", 4).cache("B", "i").reorder("i", "j"),
        "the copy to B_register", "after the verbs",
    ),
    "a prefetch": (
        lambda s: s.prefetch("B", "j", 1).mma("i", "j", "k"), "the prefetch of B",
        "after the verbs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_verb_names_what_is_in_the_way(name):
    verb, what, instead = REFUSED[name]
    program = normed if name in ("a reduction of a row", "fuse") else gated
    with pytest.raises(ScheduleError, match=f"S102.*{what}") as refused:
        verb(program.scheduled())
    assert instead in refused.value.hint
