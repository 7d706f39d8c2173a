"""Pipelines: copies to shared memory that are under way during the work on earlier ones. Meaning
after every pass and in C++, a report for each wait, group and barrier that is taken out, layouts of
shared memory without bank conflicts, and the tile operations."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.compiler import test_cta
from tests.compiler.bsr_spmm import bsr_spmm_definition
from tests.compiler.cases import after_every_pass, arguments, called, numbers, spmm
from tests.compiler.cta import element
from tests.compiler.test_mma import half, product

import tilewright as tw
from tilewright import dtypes
from tilewright.codegen.prelude_files import prelude
from tilewright.errors import InternalError, ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.affine import is_multiple, parted, terms
from tilewright.ir.atoms import ATOMS
from tilewright.ir.names import ADDRESS, STRIDE, is_generated
from tilewright.ir.rewrite import free_vars, map_bodies, rebuild, transform, walk
from tilewright.lower import AFTER_SCHEDULE, run_passes
from tilewright.lower.pipelines import carry_addresses, pipeline_loops
from tilewright.ops.gemm import TILES, Tile, gemm_definition, gemm_program, gpu_recipe
from tilewright.target import target
from tilewright.toolchain import compilers, cxx, nvrtc

needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


def tiny(n: int, k: int, tile: Tile) -> Any:
    def recipe(s: Any) -> Any:
        return gpu_recipe(s.specialize("n", n).specialize("k", k), tile)

    return recipe


@tw.program
def biased(A=tw.dense("m k"), B=tw.dense("k n"), D=tw.dense("n")):
    i, j, k = tw.indices("i:m j:n k:k")
    y = tw.sum(A[i, k] * B[k, j], over=k) + D[j].cast("float32")
    return tw.out.typed("float32")[i, j](tw.maximum(y, 0.0))


# ---------------------------------------------------------------------------- meaning

# stages, wide, m, n, k: no iteration, fewer than buffers, many; sizes that end inside a tile
CASES = [
    (2, 8, 17, 8, 16, "float16"), (3, 16, 3, 16, 40, "bfloat16"), (4, 16, 1, 8, 8, "bfloat16"),
    (3, 16, 0, 8, 8, "float16"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gemm_after_every_pass(case, rng):
    stages, wide, m, n, k, dtype = case
    args = {"A": half(rng, (m, k), dtype), "B": half(rng, (k, n), dtype)}
    definition = gemm_program.typed(A=dtype, B=dtype)
    recipe = tiny(n, k, Tile(16, 16, 16, 16, wide, 16, stages, 1))
    seen = after_every_pass(definition, args, recipe, "cuda")
    assert seen.index("pipeline_loops") < seen.index("materialize_tiles")
    if m:
        assert "pair_fragments" in seen or n % 16
    definition = definition.schedule(recipe)
    if compilers.has_compiler():
        got = called(definition.build(), definition, args)["out"]
        np.testing.assert_allclose(got, product(args["A"], args["B"], dtype), rtol=1e-4, atol=1e-5)


def test_an_epilogue_of_a_pipeline(rng):
    args = {"A": half(rng, (5, 32), "float16"), "B": half(rng, (32, 16), "float16"),
            "D": half(rng, (1, 16), "float16")[0]}  # fmt: skip
    definition = biased.typed(A="float16", B="float16", D="float16")
    recipe = tiny(16, 32, Tile(16, 16, 16, 8, 8, 16, 3))
    assert "pair_fragments" in after_every_pass(definition, args, recipe, "cuda")
    definition = definition.schedule(recipe)
    assert "tw::store<float, 2>" in definition.build("cuda:sm_80").source


def gathered(s: Any) -> Any:
    """Rows of X at the columns of eight entries of A, gathered ahead."""
    s = s.specialize("d", 64).split("k", 32).split("j", 8)
    s = s.reorder("i", "k_o", "j_o", "k_i", "j_i")
    s = s.bind("k_i", "thread.x").bind("i", "cta.x").cache("X", "j_o", "shared")
    return s.pipeline("j_o", 3)


@pytest.mark.parametrize("kind", ["random", "one row", "empty"])
def test_gathered_rows(kind, rng):
    definition = spmm.decompose(A=tw.csr())
    args = arguments(definition, rng, kind, m=3, n=40, d=64)
    assert "pipeline_loops" in after_every_pass(definition, args, gathered, "cuda")
    program = definition.schedule(gathered).lower("cuda:sm_80")
    copies = [x for n in program.stages[0] for x in walk(n.body) if isinstance(x, ir.CopyAsync)]
    assert copies and all(c.value.dtype.lanes == 4 for c in copies)
    if nvrtc.available():
        assert (
            "tw::copy_async<float, 4>(" in definition.schedule(gathered).build("cuda:sm_80").source
        )


# ---------------------------------------------------------------------------- races

SHIPPED = {
    "large": (gemm_definition("float16", 136, 200, "large"), "float16", (140, 136, 200)),
    "small": (gemm_definition("bfloat16", 72, 264, "small"), "bfloat16", (70, 72, 264)),
    "few": (gemm_definition("float16", 40, 1288, "few"), "float16", (5, 40, 1288)),
    "bsr": (bsr_spmm_definition(tw.bsr(16), "float16", 64), "float16", (40, 64, 200)),
    "gathered": (spmm.decompose(A=tw.csr()).schedule(gathered), "float32", (9, 64, 99)),
}  # fmt: skip


@cache
def machine_case(name: str) -> tuple[ir.Program, Any, Any]:
    definition, dtype, (m, n, k) = SHIPPED[name]
    rng = np.random.default_rng(5)
    other = "B" if name in TILES else "X"
    args: Any = {"A": half(rng, (m, k), dtype), other: half(rng, (k, n), dtype)}
    if other == "X":
        dense = rng.integers(1, 9, (m, k)) * (rng.random((m, k)) < 0.5)
        fmt = definition.scheduled("cpp").format_of(0)
        args = {"A": fmt.pack(dense.astype(np.float64), dtype=dtype), "X": args["X"]}
        wanted = dense @ numbers(args["X"], dtype)
    else:
        wanted = product(args["A"], args["B"], dtype)
    program = run_passes(definition.scheduled("cuda").lowered.program, AFTER_SCHEDULE, "cuda")
    return program, args, wanted


def report(name: str, program: ir.Program) -> str:
    _, args, wanted = machine_case(name)
    definition = SHIPPED[name][0]
    args = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in args.items()}
    got = np.full(wanted.shape, np.nan, np.float32)
    buffers, variables, parts = test_cta.memory_of(program, args | {"out": got})
    try:
        test_cta.cta.execute(program, buffers, variables, parts)
    except (InternalError, test_cta.cta.Refused) as error:
        return str(error)
    close = np.allclose(got, wanted, rtol=1e-3, atol=1e-3)
    return "" if close else f"wrong values of {definition.name}: {got} for {wanted}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_wait_group_and_barrier_is_needed(name):
    program, _, _ = machine_case(name)
    assert report(name, program) == ""
    mutants = 0
    for kind in (ir.Sync, ir.Commit, ir.Wait):
        nodes = [x for s in program.stages for n in s for x in walk(n.body) if isinstance(x, kind)]
        for n in range(len(nodes)):
            mutant = test_cta.without(program, lambda s, kind=kind: isinstance(s, kind), n)
            assert mutant != program
            assert "race" in report(name, mutant), f"{kind.__name__} {n}"
            mutants += 1
    assert mutants >= 4


def later(s: Any) -> Any:
    """Waits leave one more group under way."""
    return ir.Wait(s.pending + 1) if isinstance(s, ir.Wait) else s


def swapped(s: Any) -> Any:
    """Copies start before the barrier: others still read what they write."""
    if isinstance(s, ir.Seq) and any(isinstance(x, ir.Wait) for x in s.body):
        at = next(n for n, x in enumerate(s.body) if isinstance(x, ir.Sync))
        end = next(n for n, x in enumerate(s.body) if n > at and isinstance(x, ir.Commit))
        copies = [x for x in s.body[at : end + 1] if isinstance(x, (ir.If, ir.Commit))]
        rest = [x for x in s.body[at : end + 1] if x not in copies]
        return ir.Seq((*s.body[:at], *copies, *rest, *s.body[end + 1 :]))
    return s


def loaded_early(s: Any) -> Any:
    """Operands of the next iteration are loaded before the barrier: others still copy them."""
    if isinstance(s, ir.Seq) and isinstance(s.body[0], ir.LoadTile):
        at = next(n for n, x in enumerate(s.body) if isinstance(x, ir.Wait))
        loads = [x for x in s.body[at:] if isinstance(x, ir.LoadTile)]
        rest = [x for x in s.body[at:] if x not in loads]
        return ir.Seq((*s.body[:at], *loads, *rest))
    return s


def loaded_late(s: Any) -> Any:
    """Operands of the last step are loaded behind the barrier and the copies that follow it."""
    if isinstance(s, ir.Seq) and isinstance(s.body[0], ir.LoadTile):
        end = next(n for n, x in enumerate(s.body) if isinstance(x, ir.Commit))
        at = max(n for n, x in enumerate(s.body[:end]) if isinstance(x, ir.Mma))
        last = [x for x in s.body[:at] if isinstance(x, ir.LoadTile)][-1]
        body = [x for x in s.body if x is not last]
        return ir.Seq((*body[:end], last, *body[end:]))
    return s


def fewer(s: Any) -> Any:
    """One buffer fewer than iterations under way."""
    if isinstance(s, ir.Binary) and s.op == "%" and s.b == ir.as_expr(3):
        return ir.binary("%", s.a, 2)
    return s


@pytest.mark.parametrize("change", [later, swapped, fewer, loaded_early, loaded_late])
def test_other_faults_of_a_pipeline_are_reported(change):
    for name in ("small",) if change in (loaded_early, loaded_late) else ("small", "bsr"):
        program, _, _ = machine_case(name)
        mutant = map_bodies(program, lambda body: transform(body, change))
        assert mutant != program and "race" in report(name, mutant), name


def test_a_pipeline_inside_a_loop_ends_with_a_barrier():
    """Without it the first copies of the next round would meet reads of the last one."""
    program = gemm_definition("float16", 64, 256, "small").scheduled("cuda").lowered.program

    def around(s: Any) -> Any:
        if isinstance(s, ir.For) and s.kind == "pipeline":
            return ir.For(ir.Var("again"), ir.as_expr(0), ir.as_expr(2), s)
        return rebuild(s, around) if isinstance(s, (ir.Seq, ir.For, ir.If)) else s

    for changed, barriers in ((program, 1), (map_bodies(program, around), 2)):
        nests = (n for stage in pipeline_loops(changed).stages for n in stage)
        assert sum(isinstance(x, ir.Sync) for n in nests for x in walk(n.body)) == barriers


def test_operands_are_loaded_a_step_ahead():
    """The products of the step before stand behind the loads of an operand: no product waits for
    the load in front of it."""
    program, _, _ = machine_case("large")
    (loop,) = (x for n in program.stages[0] for x in walk(n.body, ir.For) if x.unroll_hint)
    kinds = [type(x).__name__ for x in loop.body.body]
    steps = "".join({"LoadTile": "l", "Mma": "m", "Sync": "s"}.get(k, "") for k in kinds)
    step = "l" * 8 + "m" * 16
    assert steps == 3 * step + "s" + step
    held = {x.tile.held: n for n, x in enumerate(loop.body.body) if isinstance(x, ir.LoadTile)}
    for n, x in enumerate(loop.body.body):
        for t in (x.a, x.b) if isinstance(x, ir.Mma) else ():
            at = held[t.held]
            between = kinds[at:n] if at < n else kinds[at:] + kinds[:n]
            assert between.count("Mma") >= 12


def test_the_last_iteration_loads_nothing_that_was_not_copied():
    """Its operands again, where there are fewer iterations than buffers."""
    definition = gemm_definition("float16", 64, 64, "small")
    program = run_passes(definition.scheduled("cuda").lowered.program, AFTER_SCHEDULE, "cuda")

    def beyond(s: Any) -> Any:
        return s.a if isinstance(s, ir.Binary) and s.op == "min" else s

    rng = np.random.default_rng(5)
    args = {x: half(rng, (64, 64), "float16") for x in "AB"}
    for changed, says in (
        (program, ""),
        (map_bodies(program, lambda b: transform(b, beyond)), "written"),
    ):
        buffers, variables, parts = test_cta.memory_of(
            changed, args | {"out": np.full((64, 64), np.nan, np.float32)}
        )
        try:
            test_cta.cta.execute(changed, buffers, variables, parts)
        except test_cta.cta.Refused as error:
            assert says and f"is read before it is {says}" in str(error)
        else:
            assert not says


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 16, 16, 16, 3), Tile(16, 16, 16, 8, 8, 32, 1)])
def test_loops_of_one_step_or_without_a_pipeline_stay(tile):
    definition = gemm_program.typed(A="float16", B="float16").schedule(tiny(32, 64, tile))
    program = run_passes(definition.scheduled("cuda").lowered.program, AFTER_SCHEDULE, "cuda")
    bodies = [n.body for n in program.stages[0]]
    assert not any(isinstance(x, ir.LoadTile) for b in bodies for x in walk(b))


@pytest.mark.parametrize("arch, stages", [("sm_86", 2), ("sm_80", 3), ("sm_90a", 4)])
def test_gemm_has_as_many_buffers_as_fit(arch, stages):
    s = gemm_definition("float16", 128, 512, "large").scheduled(f"cuda:{arch}")
    loops = [x for n in s.nests for x in walk(n.body, ir.For) if x.kind == "pipeline"]
    assert [x.stages for x in loops] == [stages]


# ---------------------------------------------------------------------------- addresses


def copies_and_addresses(name: str) -> tuple[list[ir.CopyAsync], list[ir.Store]]:
    """The copies of the loop of a pipeline, and what each iteration adds to addresses."""
    program, _, _ = machine_case(name)
    loops = [x for n in program.stages[-1] for x in walk(n.body, ir.For)]
    loop = next(x for x in loops if x.unroll_hint == 1 and any(True for _ in walk(x, ir.Wait)))
    steps = [x for x in walk(loop.body, ir.Store) if is_generated(x.buffer.name, ADDRESS)]
    return list(walk(loop.body, ir.CopyAsync)), steps


@pytest.mark.parametrize("name", ["large", "small", "few"])
def test_an_address_serves_all_copies_of_an_operand(name):
    copies, steps = copies_and_addresses(name)
    assert len(copies) > len(steps) == 2 and all(x.op == "sum" for x in steps)
    for x in copies:
        load, at = x.source
        carried, rest = parted(at, lambda t: isinstance(t, ir.Load))
        assert isinstance(carried, ir.Load) and carried.buffer in {s.buffer for s in steps}
        assert carried.buffer.name.startswith(f"{load.buffer.name}.")
        assert all(is_generated(v, STRIDE) for v in free_vars(rest))  # a constant away


def test_what_an_iteration_looks_up_is_no_address_that_a_loop_carries():
    copies, steps = copies_and_addresses("gathered")
    assert copies and not [x for x in steps if x.buffer.name.startswith("X.")]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("is_one_node", [False, True])
def test_a_condition_keeps_the_offset_that_a_copy_gives_up(lanes, is_one_node):
    """Whether or not both are one node of the program."""
    k, n, i32 = ir.Var("k"), ir.Var("n"), dtypes.int32
    a, s = (ir.Buffer(name, dtypes.float32, (n,)) for name in ("A", "S"))
    at, again = (ir.binary("+", ir.binary("*", k, 64), ir.Var("thread")) for _ in range(2))
    condition = ir.binary("<", at if is_one_node else again, n)
    read: Any = at if lanes == 1 else ir.Ramp(ir.binary("*", at, 4), i32.vector(4))
    load = ir.Load(a, (read,), dtypes.float32.vector(lanes))
    copy = ir.CopyAsync(s, (ir.as_expr(0),), ir.Select(condition, load, load, load.dtype))
    loop = ir.For(k, ir.as_expr(0), ir.as_expr(8), ir.seq(copy, ir.Commit()))
    program = dataclasses.replace(machine_case("small")[0], stages=((ir.Nest("one", loop),),))
    [carried] = walk(carry_addresses(program).stages[0][0].body, ir.CopyAsync)
    assert carried.value.cond == condition and isinstance(carried.source[1], ir.Load)
    assert carried.value.b == load and carried.source[0].dtype == load.dtype


@pytest.mark.parametrize("name", ["small", "few"])  # with more than one copy ahead
def test_every_address_takes_its_start_and_its_steps(name):
    program, _, _ = machine_case(name)
    stores = [x for n in program.stages[-1] for x in walk(n.body, ir.Store)]
    added = [x for x in stores if is_generated(x.buffer.name, ADDRESS)]
    assert len(added) == 8  # to two addresses, for the copies before the loop and in the loop
    for one in added:
        mutant = map_bodies(
            program, lambda b, s=one: transform(b, lambda x: ir.seq() if x is s else x)
        )
        assert "wrong values" in report(name, mutant), one


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "recipe, says",
    [
        (lambda s: s.pipeline("k", 3), "copies 0 operands"),
        (lambda s: gpu_recipe(s, Tile(64, 64, 32, 32, 8, 64, 2)), "2 bytes at a time"),
        (lambda s: tiny(64, 64, TILES["small"])(s).pipeline("k_o", 2), "is pipeline"),
        (lambda s: tiny(64, 64, TILES["small"])(s).split("k_o", 2), "is marked pipeline"),
        (lambda s: s.pipeline("k", 1), "stages is 1"),
    ],
)  # fmt: skip
def test_refused(recipe, says):
    with pytest.raises(ScheduleError, match=says) as caught:
        gemm_program.typed(A="float16", B="float16").schedule(recipe).scheduled("cuda:sm_80")
    assert caught.value.code == "S102" and caught.value.hint


def test_no_copies_are_added_to_a_pipeline():
    definition = spmm.decompose(A=tw.csr()).schedule(lambda s: gathered(s).cache("A", "j_o"))
    with pytest.raises(ScheduleError, match="is a pipeline"):
        definition.scheduled("cuda")


def test_more_shared_memory_than_the_target_has():
    recipe = tiny(64, 768, Tile(128, 128, 64, 64, 16, 384, 1))
    definition = gemm_program.typed(A="float16", B="float16").schedule(recipe)
    if nvrtc.available():
        assert definition.build("cuda:sm_90a").manifest.stages[0].smem_bytes == 198656
    with pytest.raises(ScheduleError, match="198656 bytes of shared memory"):
        definition.build("cuda:sm_80")


# ---------------------------------------------------------------------------- layouts and atoms


@needs_cxx
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("row_bytes", [32, 64, 128, 256, 512])
def test_swizzled_rows_have_no_bank_conflicts(row_bytes, size):
    """Each offset once; eight lines of 16 bytes in a column, and eight chunks of a row, lie in all
    32 banks."""
    text = re.search(
        r"template <int Row, int Size>\nstruct swizzled \{.*?\n\};", prelude("mma.cuh"), re.S
    )
    assert text
    row, rows, chunk = row_bytes // size, 16, 16 // size
    export = 'extern "C" __attribute__((visibility("default"))) int'
    source = (f"#define TW_INLINE inline\n{text[0]}\nusing L = swizzled<{row}, {size}>;\n"
              f"{export} at(int x) {{ return L::at(x); }}\n"
              f"{export} line(int r, int c) {{ return L::exchanged(r, c); }}\n")  # fmt: skip
    f = cxx.load_cpp(source, name="layout")
    at = np.array([f.at(x) for x in range(rows * row)])
    assert sorted(at) == list(range(rows * row))
    for c in range(0, row, chunk):
        for r in range(rows):
            assert f.at(r * row + c) == r * row + f.line(r, c)
        for first in (0, 8):  # ldmatrix: eight rows at once
            chunks = at[np.arange(first, first + 8) * row + c] * size // 16
            assert len(set(chunks % 8)) == 8
    stores = at[: 8 * chunk : chunk] * size // 16  # eight neighbouring threads
    assert len(set(stores % 8)) == 8


def test_atoms_hold_each_element_once():
    for m, n, _ in ATOMS:
        held = [element(e, lane) for e in range(m * n // 32) for lane in range(32)]
        assert sorted(held) == [(r, c) for r in range(m) for c in range(n)]


@tw.program
def gemm_f32(A=tw.dense("m k"), B=tw.dense("k n")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.sum(A[i, k] * B[k, j], over=k))


@tw.program
def gemm_nt(A=tw.dense("m k"), B=tw.dense("n k")):
    i, j, k = tw.indices("i:m j:n k:k")
    return tw.out[i, j](tw.sum(A[i, k] * B[j, k], over=k))


def tf32(staged: bool, swapped: bool = False) -> Any:
    def recipe(s: Any) -> Any:
        s = s.specialize("n", 8).specialize("k", 24)
        rows, cols = (8, 16) if swapped else (16, 8)
        s = s.split("i", rows, into=("i_o", "i_v")).split("j", cols, into=("j_o", "j_v"))
        s = s.split("k", 16, into=("k_o", "k_r")).split("k_r", 8, into=("k_u", "k_v"))
        tile = ("j_v", "i_v", "k_v") if swapped else ("i_v", "j_v", "k_v")
        s = s.reorder("i_o", "j_o", "k_o", "k_u", *tile).mma(*tile)
        s = s.bind("i_o", "cta.x").bind("j_o", "cta.y")
        if staged:
            s = s.cache("A", "k_o", "shared").cache("B", "k_o", "shared").pipeline("k_o", 2)
        return s

    return recipe


@pytest.mark.parametrize(
    "program, staged, swapped",
    [(gemm_f32, True, False), (gemm_nt, True, True), (gemm_nt, False, False)],
)
def test_tf32(program, staged, swapped, rng):
    """Operands are rounded to 10 bits of mantissa, here already: the product is that of float32."""
    m, n, k = 9, 8, 24
    a, b = (rng.integers(-512, 512, s).astype(np.float32) for s in ((m, k), (k, n)))
    args = {"A": a, "B": b if program is gemm_f32 else np.ascontiguousarray(b.T)}
    recipe = tf32(staged, swapped)
    assert "materialize_tiles" in after_every_pass(program, args, recipe, "cuda")
    definition = program.schedule(recipe)
    if compilers.has_compiler():
        np.testing.assert_array_equal(called(definition.build(), definition, args)["out"], a @ b)
    if nvrtc.available():
        kernel = definition.build("cuda:sm_80")
        assert "tw::mma<tw::tf32_bits>" in kernel.source


def test_tf32_rounds_its_operands(rng):
    a, b = (rng.uniform(1, 2, s).astype(np.float32) for s in ((16, 8), (8, 8)))
    args = {"A": np.pad(a, ((0, 0), (0, 16))), "B": np.pad(b, ((0, 16), (0, 0)))}
    definition = gemm_f32.schedule(tf32(False))
    rounded = [np.floor(x.astype(np.float64) * 1024 + 0.5) / 1024 for x in (a, b)]  # ties go up
    if compilers.has_compiler():
        got = called(definition.build(), definition, args)["out"]
        np.testing.assert_allclose(got, rounded[0] @ rounded[1], rtol=1e-6)
        assert np.abs(got - a.astype(np.float64) @ b).max() > 1e-5


def test_terms_and_multiples():
    x, y = ir.Var("x"), ir.Var("y")
    sum_ = (x * 4 + (y * 2 + 3) * 16) * 8
    assert ir.as_expr(384) in terms(sum_) and len(terms(sum_)) == 3
    assert is_multiple(sum_, 32) and not is_multiple(sum_, 64)
    assert is_multiple(x * 16 * 72, 576) and not is_multiple(x * 16 * 72, 1024)


@needs_nvrtc
@pytest.mark.parametrize("tile", TILES)
def test_kernels_fit_their_architectures(tile):
    """No spills; more than 48 KB of shared memory, where the target has it."""
    for arch in ("sm_80", "sm_90a"):
        kernel = gemm_definition("float16", 4096, 4096, tile).build(f"cuda:{arch}")
        (stage,) = kernel.manifest.stages
        assert stage.smem_bytes <= target(f"cuda:{arch}").shared_bytes
        found = kernel.resources[stage.entry]
        assert found.spill_bytes == 0 and found.registers * stage.threads[0] <= 65536
        assert "tw::copy_async<uint16_t, 8>(" in kernel.source  # and no element by element copies
        assert "tw::shared_window" not in kernel.source and "tw::tile(" not in kernel.source
