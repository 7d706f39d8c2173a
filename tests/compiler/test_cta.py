"""Every CUDA kernel that ships, on the CTA interpreter: right values, no race; and a report for
every barrier and every guard of threads that is taken out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.compiler import cta
from tests.compiler.cases import (
    TOLERANCE,
    Arrays,
    flat,
    memory_of,
    numbers,
    poisoned_output,
    stored,
    widened,
)
from tests.shipped import CUDA, SHIPPED

from tilewright.codegen import cuda
from tilewright.codegen.params import collect_params
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import free_vars, map_bodies, rebuild, walk
from tilewright.lower import AFTER_SCHEDULE, run_passes
from tilewright.reference.evaluate import evaluate

KERNELS = [name for name, shipped in SHIPPED.items() if CUDA[0] in shipped.targets]
SIZES = {"m": 11, "n": 70, "d": 24, "k": 80, "t": 3, "b": 3, "v": 300, "s": 7, "p": 4, "h": 2,
         "w": 4, "g": 4, "f": 3}  # fmt: skip
ROWS = (0, 1, 2, 3, 4, 5, 7, 9, 17, 33, 52)  # entries of each: 133, a little more than 4 · 32
LONG = (0, 1, 2, 3, 5, 9, 17, 33, 40, 70, 1030)  # for formats with a part for giant rows
BELOW = {"ids": "n", "P": "s", "page": "g", "slot": "f"}  # dimensions that arrays of indices index


def scheduled(name: str) -> ir.Program:
    return SHIPPED[name].definition.scheduled("cuda").lowered.program


def pattern(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Which entries of a matrix are stored: rows (CSC: columns) of the lengths above."""
    if "csc" in name:
        return pattern("", shape[::-1], rng).T
    lengths = np.array(LONG if "by_length" in name else ROWS)[:, None]
    if "dbsr" in name:
        lengths = np.concatenate([np.zeros((shape[0] - len(ROWS), 1), int), lengths])
    if "ell" in name:
        lengths = np.minimum(lengths, 8)
    return rng.permuted(np.arange(shape[1]) < lengths, axis=1)


def arguments(name: str, program: ir.Program, rng: np.random.Generator) -> Arrays:
    """Small random arguments: sizes that no tile divides, rows for every bucket of a format."""
    definition, sizes, out = SHIPPED[name].definition, {**SIZES, **dict(program.sizes)}, {}
    if "by_length" in name:
        sizes["n"] = max(LONG)
    if "dbsr" in name:
        sizes["m"] += 16  # a row of blocks that is empty
    if name == "example 10 spmm sr_bcrs":
        sizes["n"] *= 2  # lists of more than 2 · 32 columns: the copy in the loop runs
    if name.startswith("gemm"):
        sizes["m"] = 30  # rows of each tile operation of a warp
    if "csc" in name:
        sizes["m"], sizes["n"] = sizes["n"], sizes["m"]
    for t in definition.program.tensors:
        shape = tuple(n if isinstance(n, int) else sizes[n] for n in t.dims)
        if t.is_sparse and t.role == "input":
            dense = np.where(pattern(name, shape, rng), rng.uniform(0.5, 1, shape), 0)
            out[t.name] = t.format.pack(dense, dtype=t.dtype.name)
            if program.index.name == "int64":
                out[t.name] = widened(out[t.name])
        elif t.name in BELOW and t.dtype.name == "int32":
            out[t.name] = rng.permutation(sizes[BELOW[t.name]])[: shape[0]].astype(np.int32)
        elif t.dtype.is_int and (t.role == "input" or name == "positions"):
            out[t.name] = rng.integers(t.dtype.least, t.dtype.most + 1, shape, t.dtype.numpy)
        elif t.role == "input" or name.startswith("append"):
            out[t.name] = stored(rng.uniform(0.25, 1, shape), t.dtype)
    return out


def wrong(name: str, program: ir.Program, args: Arrays, wanted: Arrays, machine: Any = None) -> str:
    """What the interpreter reports, or the output whose values are not those of the evaluator."""
    definition = SHIPPED[name].definition
    given = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in args.items()}
    for t in program.tensors:
        if t.role in ("output", "temp") and t.name not in given:
            given[t.name] = poisoned_output(t, args, definition)
    buffers, variables, parts = memory_of(program, given)
    try:
        cta.execute(program, buffers, variables, parts, machine)
    except (InternalError, cta.Refused) as error:
        return str(error)
    for t in definition.program.outputs:
        got = flat(t, given[t.name] if t.is_sparse else buffers[t.name])
        expected = numbers(wanted[t.name], "float64")
        tolerance = TOLERANCE[t.dtype.name] * np.abs(expected).max()
        if not (np.abs(got - expected) <= tolerance).all():
            return f"wrong values of {t.name}: {got} for {expected}"
    return ""


@cache
def case(name: str) -> tuple[ir.Program, Arrays, Arrays]:
    """A lowered kernel, its arguments, and the outputs of the evaluator."""
    program = run_passes(scheduled(name), AFTER_SCHEDULE, "cuda")
    args = arguments(name, program, np.random.default_rng(7))
    return program, args, evaluate(SHIPPED[name].definition.program, args)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_right_and_have_no_race_after_every_pass(name):
    """From the pass on that binds threads."""
    last, args, wanted = case(name)
    seen: list[ir.Program] = []

    def watch(after: str, program: ir.Program) -> None:
        if seen or after == "bind_threads":
            if program not in seen[-1:]:
                assert wrong(name, program, args, wanted) == "", after
            seen.append(program)

    run_passes(scheduled(name), AFTER_SCHEDULE, "cuda", watch)
    assert seen[-1] == last


# ---------------------------------------------------------------------------- mutants

THREADS = {"thread_x", "thread_y"}


def is_guard(x: Any) -> bool:
    return isinstance(x, ir.If) and bool(free_vars(x.cond) & THREADS)


def without(program: ir.Program, kind: Any, number: int) -> ir.Program:
    """The program without the barrier, or with the body of the guard alone, of that number."""
    left = [number]

    def visit(s: Any) -> Any:
        if kind(s):
            left[0] -= 1
            if left[0] == -1:
                return s.body if isinstance(s, ir.If) else ir.seq()
        return rebuild(s, visit) if isinstance(s, (ir.Seq, ir.For, ir.If)) else s

    return map_bodies(program, visit)


def without_barrier(node: int, number: int) -> Any:
    """A machine that leaves out one of the two barriers of a reduction over rows."""
    dropped = node, number

    class Machine(cta.Launch):
        def barrier(self, where: Any, number: int = 0) -> None:
            if (id(where), number) != dropped:
                super().barrier(where, number)

    return Machine


def mutants(program: ir.Program) -> Iterator[tuple[str, ir.Program, Any]]:
    nodes = [x for stage in program.stages for nest in stage for x in walk(nest.body)]
    for kind in (ir.Sync, ir.Commit, ir.Wait):
        for n, _ in enumerate(x for x in nodes if isinstance(x, kind)):
            mutant = without(program, lambda s, kind=kind: isinstance(s, kind), n)
            yield f"barrier {kind.__name__} {n}", mutant, None
    for n, s in enumerate(x for x in nodes if is_guard(x)):
        yield f"guard {n}: {s.cond}", without(program, is_guard, n), None
    rows = (x for x in nodes if isinstance(x, ir.ReduceThreads) and x.axis == "thread.y")
    for n, x in enumerate(rows):
        for k in range(2):
            yield f"rows {n} barrier {k}", program, without_barrier(id(x), k)


LAST = "the barrier after the last reduction over rows of a CTA: no later access to its scratch"
FIRST = "the first of four unrolled steps of a loop always exists"
ROWS_0, ROWS_1 = {"rows 0 barrier 1": LAST}, {"rows 1 barrier 1": LAST}
NO_WAIT = "two iterations and four buffers: no wait is for a group that the loop starts"
AGAIN = "the first of two buffers: what is written behind it is written again before it is read"
# Mutants that are the same program, by kernel.
EQUIVALENT: dict[str, dict[str, str]] = {
    "spmm csc f32 64": {"guard 2: i_p.1 < A.indptr1[j_cta * 16 + thread_y + 1]": FIRST},
    "spmm hyb f32 64": ROWS_0,
    "spmm hyb 2 f32 64": ROWS_0,
    "spmm hyb f64 32": ROWS_0,
    # one reduction in each of two bodies
    "spmm by_length f32 128": ROWS_0 | ROWS_1,
    "spmm by_length f16 128": ROWS_0 | ROWS_1,
    "spmm by_length f32 512 far": ROWS_0 | ROWS_1,
    "spmm by_length f32 1": ROWS_0 | ROWS_1,
    "rmsnorm_add": ROWS_0,
    "gemm bf16 512x256": {"barrier Commit 2": NO_WAIT},
    "example 10 sddmm bsr": {"guard 0: (thread_y * 32 + thread_x) % 64 < 32": AGAIN},
    # two reductions in one body
    "argmax": ROWS_1,
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_mutant_is_reported(name):
    program, args, wanted = case(name)
    silent = set()
    for label, mutant, machine in mutants(program):
        assert machine or mutant != program, label
        report = wrong(name, mutant, args, wanted, machine)
        if not report:
            silent.add(label)
        elif "barrier" in label:  # found by the order of accesses, not by luck
            assert "race" in report, (label, report)
    assert silent == EQUIVALENT.get(name, {}).keys()


def test_how_many_mutants_there_are():
    labels = [label for name in KERNELS for label, *_ in mutants(case(name)[0])]
    counts = Counter(label.split()[0] for label in labels)
    assert counts["barrier"] >= 8 and counts["rows"] >= 28 and counts["guard"] >= 180, counts


@pytest.mark.parametrize("name", KERNELS)
def test_the_barriers_of_the_text_are_those_of_the_ir(name):
    program = case(name)[0]
    text = cuda.render(program, "", collect_params(program))[0].text
    nodes = [x for stage in program.stages for nest in stage for x in walk(nest.body)]
    assert text.count("tw::bar_sync(") == sum(isinstance(x, ir.Sync) for x in nodes)
    rows = [x for x in nodes if isinstance(x, ir.ReduceThreads) and x.axis == "thread.y"]
    assert text.count("tw::across_rows<") == len(rows)
