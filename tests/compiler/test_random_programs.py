"""Random programs, formats, schedules and targets against a plain evaluator of their own, which
knows nothing of the package: shadowed indices, nested reductions, two structures, rows and
relations that formats leave out.

500 programs run by default; `--random-programs 10000` runs that many, as the nightly run does, and
`--random-seed` N others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tests.compiler import cta
from tests.compiler.cases import FORMATS, STRUCTURED, executed, filled_padding, fitted

import tilewright as tw
from tilewright.errors import ProgramError, ScheduleError
from tilewright.ir.levels import Band, Bitmap, Compressed, Dense, Fixed, NofM, Paged
from tilewright.lower import AFTER_SCHEDULE, run_passes
from tilewright.reference.evaluate import evaluate
from tilewright.schedule.tree import computes

SIZES = {"r": 2, "i": 3, "j": 4, "k": 2}
DIMS = {"r": "r", "i": "m", "j": "n", "k": "d"}
READ = {"B": "ij", "X": "ik", "Y": "j", "Z": "i"}  # the indices of each array; those of A differ

FORMATS_2D = FORMATS | STRUCTURED | {
    "lists": tw.Composed(
        "lists", ((tw.Where(0, 1), tw.dcsr("short")), (tw.Where(2), tw.bucket(4))),
        disjoint_rows=True,
    ),
    "blocks of all rows": tw.Composed(
        "blocks of all rows", ((tw.Where(0, 2), tw.dbsr(2)), (tw.Where(3), tw.csr())),
        disjoint_rows=True, covers_rows=True,
    ),
    "pieces": tw.Format("pieces", (Compressed(0, chunk=2), Dense(1))),
    "bits of columns": tw.Format("bits of columns", (Bitmap(1), Bitmap(0, counted=True))),
}  # fmt: skip
FORMATS_3D = {
    "csf": tw.csf(3),
    "listed rows": tw.Format("listed rows", (Dense(0), Compressed(1), Compressed(2))),
    "listed relations": tw.Format("listed relations", (Compressed(0), Dense(1), Compressed(2))),
    "dense columns": tw.Format("dense columns", (Compressed(0), Compressed(1), Dense(2))),
    "slots": tw.Format("slots", (Dense(0), Compressed(1), Fixed(2, width=4))),
    "blocks of rows": tw.Format(
        "blocks of rows",
        (Dense(0), Compressed(1, block=2), Dense(1, block=2, inner=True), Compressed(2)),
    ),
    "by columns": tw.Format("by columns", (Dense(2), Compressed(0), Compressed(1))),
    "bands": tw.Format("bands", (Dense(0), Dense(1), Band(2, of=1, low=-1, high=2))),
    "bands of lists": tw.Format("bands of lists", (Compressed(0), Compressed(1), Band(2, of=0))),
    "bits": tw.Format("bits", (Compressed(0), Bitmap(1, counted=True), Bitmap(2))),
    "pages of rows": tw.paged(2, 3),
    "pages below": tw.Format("pages below", (Compressed(0), Dense(1), Paged(2, page=3))),
    "1 of 2": tw.Format(
        "1 of 2",
        (Dense(0), Compressed(1), Dense(2, block=2), NofM(2, block=2, inner=True, width=1)),
    ),
}

# ------------------------------------------------------------------------------------------ terms

Term = tuple[Any, ...]
REDUCTIONS = {"sum": (tw.sum, sum), "max": (tw.max, max), "min": (tw.min, min)}
BINARY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def term(rng: np.random.Generator, depth: int) -> Term:
    """A random expression: an array, a number, or an operation on terms."""
    kind = rng.choice(["array", "array", "binary", "binary", "where", "reduce", "reduce"])
    if depth == 0 or kind == "array":
        name = rng.choice(["A", "A", "B", "X", "Y", "Z", "number"])
        return ("number", float(rng.integers(1, 4))) if name == "number" else ("array", str(name))
    if kind == "binary":
        op = str(rng.choice(["+", "-", "*", "*", "*"]))
        return (op, term(rng, depth - 1), term(rng, depth - 1))
    if kind == "where":
        return ("where", *(term(rng, depth - 1) for _ in range(3)))
    body = term(rng, depth - 1)
    axes = sorted(free(body, "rij"))
    if not axes:
        return body
    chosen = rng.choice(axes, rng.integers(1, min(2, len(axes)) + 1), replace=False)
    return ("reduce", str(rng.choice(["sum", "sum", "max", "min"])), "".join(chosen), body)


def free(t: Term, of_a: str) -> set[str]:
    """The indices that a term leaves open. `of_a`: those at which A is read."""
    if t[0] == "number":
        return set()
    if t[0] == "array":
        return set(of_a if t[1] == "A" else READ[t[1]])
    if t[0] == "reduce":
        return free(t[3], of_a) - set(t[2])
    return set().union(*(free(x, of_a) for x in t[1:]))


def written(t: Term, arrays: dict[str, Any], at: dict[str, Any], of_a: str) -> Any:
    """A term in the language."""
    if t[0] == "number":
        return tw.size("m") * 0.0 + t[1]
    if t[0] == "array":
        read = of_a if t[1] == "A" else READ[t[1]]
        return arrays[t[1]][tuple(at[x] for x in read)]
    if t[0] == "reduce":
        body = written(t[3], arrays, at, of_a)
        made = REDUCTIONS[t[1]][0](body, over=tuple(at[x] for x in t[2]))
        return made if t[1] == "sum" else tw.maximum(tw.minimum(made, 9.0), -9.0)
    a, b, *c = (written(x, arrays, at, of_a) for x in t[1:])
    if t[0] == "where":
        return tw.where(b + a > 0.5, b, c[0])
    return BINARY[t[0]](a, b)


# ------------------------------------------------------------------------------------- their value


def structures(t: Term, axes: str, of_a: str) -> set[str]:
    """The sparse arrays that have one of the axes of a reduction: a single one drives it, and it
    ranges over what that stores; with several it ranges over all coordinates."""
    if t[0] == "array":
        read = of_a if t[1] == "A" else READ[t[1]]
        return {t[1]} & {"A", "B"} if set(read) & set(axes) else set()
    if t[0] in ("number", "reduce"):
        return set()
    return set().union(*(structures(x, axes, of_a) for x in t[1:]))


def value(t: Term, arrays: Any, stored: Any, at: dict[str, int], of_a: str) -> float:
    """The value of a term where its open indices are `at`."""
    if t[0] == "number":
        return t[1]
    if t[0] == "array":
        read = of_a if t[1] == "A" else READ[t[1]]
        return float(arrays[t[1]][tuple(at[x] for x in read)])
    if t[0] == "reduce":
        sparse = structures(t[3], t[2], of_a)
        driver = sparse.pop() if len(sparse) == 1 else ""
        read = of_a if driver == "A" else "ij"
        found = []
        for point in itertools.product(*(range(SIZES[x]) for x in t[2])):
            here = at | dict(zip(t[2], point, strict=True))
            if not driver or stored[driver][tuple(here[x] for x in read)]:
                found.append(value(t[3], arrays, stored, here, of_a))
        if t[1] == "sum":
            return float(sum(found))
        nothing = -np.inf if t[1] == "max" else np.inf
        return max(min(REDUCTIONS[t[1]][1]([*found, nothing]), 9.0), -9.0)
    a, b, *c = (value(x, arrays, stored, at, of_a) for x in t[1:])
    return (b if a + b > 0.5 else c[0]) if t[0] == "where" else BINARY[t[0]](a, b)


def stored_by(fmt: Any, dense: np.ndarray) -> np.ndarray:
    """The coordinates that a format stores for a matrix: entries, and what blocks hold beside."""
    if isinstance(fmt, tw.Composed):
        masks, block = [], max(level.block for _, part in fmt.parts for level in part.levels) or 1
        for where, part in fmt.parts:
            width = -(-dense.shape[1] // where.col_parts)
            width += -width % block
            inside = (np.arange(dense.shape[1]) // width == where.col_part) & (dense != 0)
            length = inside.sum(1)
            for i in range(0, len(length), block):  # rows of a block go together
                length[i : i + block] = length[i : i + block].max()
            longest = np.inf if where.longest is None else where.longest
            rows = (length >= where.shortest) & (length <= longest)
            masks.append(stored_by(part, np.where(inside & rows[:, None], dense, 0)))
        return np.logical_or.reduce(masks)
    mask = np.ones(dense.shape, bool)
    for c in np.ndindex(dense.shape):
        below = [tuple(e) for e in np.argwhere(dense)]
        for level in fmt.levels:
            mask[c] &= has(level, c, below)
            below = [e for e in below if part_of(level, e) == part_of(level, c)]
    return mask


def part_of(level: Any, c: Any) -> int:
    n = c[level.dim]
    return n if not level.block else n % level.block if level.inner else n // level.block


def has(level: Any, c: Any, below: list[Any]) -> bool:
    """Whether a level stores its part of coordinate c, with these entries below the same parent."""
    kind, own, at = type(level).__name__, {part_of(level, e) for e in below}, part_of(level, c)
    if kind == "Dense":
        return True
    if kind in ("Ragged", "Paged"):  # up to the last entry
        return at <= max(own, default=-1)
    if kind in ("Band", "Diagonals"):  # all of it
        return c[level.dim] - c[level.of] in level.offsets
    if kind == "NofM":  # the entries, and the first of the others
        rest = [x for x in range(level.block) if x not in own]
        return at in own | set(rest[: level.width - len(own)])
    return at in own


# ---------------------------------------------------------------------------------------- programs


def drawn(rng: np.random.Generator, of_a: str) -> tuple[Any, Term, str, bool]:
    """A program, its term, the indices of its output, and whether it is stored like A."""
    while True:
        t = term(rng, 4)
        if of_a == "ij":
            t = without_relations(t)
        names = str(t)
        if names.count("reduce") >= 1 and "'A'" in names:
            break
    t = with_epilogue(rng, t, of_a)
    out = "".join(sorted(free(t, of_a)))
    like = bool(set(out) <= set(of_a) and rng.random() < 0.3)
    out = of_a if like else out

    @tw.program
    def p(
        A=tw.sparse(" ".join(DIMS[x] for x in of_a)),
        B=tw.sparse("m n"),
        X=tw.dense("m d"),
        Y=tw.dense("n"),
        Z=tw.dense("m"),
    ):
        have = "rijk" if of_a == "rij" else "ijk"
        at = dict(zip(have, tw.indices(" ".join(f"{x}:{DIMS[x]}" if x != "r" else "q:r"
                                                for x in have)), strict=True))  # fmt: skip
        body = written(t, {"A": A, "B": B, "X": X, "Y": Y, "Z": Z}, at, of_a)
        output = tw.out.like(A) if like else tw.out
        return output[tuple(at[x] for x in out)](body)

    return p, t, out, like


def with_epilogue(rng: np.random.Generator, t: Term, of_a: str) -> Term:
    """A reduction inside of an operation on an array, or on another reduction over its axes."""
    if t[0] != "reduce" or rng.random() < 0.25:
        return t
    others: list[Term] = [("reduce", op, *t[2:]) for op in ("sum", "max")]
    others += [("array", x) for x in ("A", *READ) if free(("array", x), of_a) <= free(t, of_a)]
    other = others[rng.integers(len(others))]
    return ("where", t, other, t) if rng.random() < 0.3 else ("*+-"[rng.integers(3)], t, other)


def without_relations(t: Term) -> Term:
    """The term for a matrix A: no reduction over relations."""
    if t[0] in ("array", "number"):
        return t
    if t[0] != "reduce":
        return (t[0], *(without_relations(x) for x in t[1:]))
    axes, body = t[2].replace("r", ""), without_relations(t[3])
    return ("reduce", t[1], axes, body) if axes else body


# --------------------------------------------------------------------------------------- schedules

STEPS = 3  # verbs of a schedule, at most


def with_verbs(s: Any, rng: np.random.Generator) -> Any:
    """A schedule with verbs on loops that are there, those that are not refused."""
    for _ in range(rng.integers(STEPS + 1)):
        verb = str(rng.choice(["split", "split", "reorder", "unroll", "vectorize", "parallel"]))
        a, b = (str(x) for x in rng.choice(s.loops, 2))
        args, options = (a,), {}
        if verb == "split":
            args, options["tail"] = (a, int(rng.integers(1, 4))), str(rng.choice(["guard", "cut"]))
        elif verb == "reorder":
            args = a, b
        elif verb == "parallel" and s.target.is_cuda:
            verb, args = "bind", (a, str(rng.choice(["cta.x", "thread.x", "thread.y"])))
        try:
            s = getattr(s, verb)(*args, **options)
        except ScheduleError as refused:
            assert refused.hint
    return s


def ran_on_loops(program: Any, s: Any, args: Any) -> Any:
    """The result of the loops of a schedule, interpreted; None where it does not lower."""
    machine = (cta.execute,) if s.target.is_cuda else ()
    if machine:
        args = args | {n: filled_padding(args[n]) for n in "AB"}
    try:
        lowered = run_passes(s.lowered.program, AFTER_SCHEDULE, s.target.kind)
    except ScheduleError as refused:  # some choices show only together
        assert refused.code in ("S102", "S103") and refused.hint
        return None
    return executed(program, lowered, args, *machine)["out"]


# ------------------------------------------------------------------------------------------- tests


def runs(rng: np.random.Generator, of_a: str, fmt: Any, ran: int) -> dict[str, int]:
    """Draws a program and runs it as it is, with a schedule and, now and then, compiled and on the
    threads of a GPU. What was done, by name; nothing for a program that is refused."""
    program, t, out, like = drawn(rng, of_a)
    program = program.decompose(A=fmt)
    target = "cuda" if ran % 6 == 0 else "cpp"
    try:
        s = program.scheduled(target).lowered
    except ProgramError as refused:
        assert refused.code == "P107" and refused.hint
        return {}
    fused = any(c.reductions for x in s.program.stages for n in x for c in computes(n.body))
    s = with_verbs(s, rng)
    shape = tuple(SIZES[x] for x in of_a)
    values = {
        n: rng.integers(1, 3, s) * rng.choice([-1.0, 1.0], s)
        for n, s in (("A", shape), ("B", (3, 4)), ("X", (3, 2)), ("Y", (4,)), ("Z", (3,)))
    }
    for n in "AB":
        values[n] *= rng.random(values[n].shape) < 0.5
    values["A"] = fitted(fmt, values["A"])
    stored = {"A": stored_by(fmt, values["A"]), "B": values["B"] != 0}
    wanted = np.array([
        value(t, values, stored, dict(zip(out, c, strict=True)), of_a)
        for c in np.ndindex(*(SIZES[x] for x in out))
    ]).reshape([SIZES[x] for x in out])  # fmt: skip
    args = {n: v.astype(np.float32) for n, v in values.items()}
    args["A"], args["B"] = fmt.pack(args["A"]), tw.csr().pack(args["B"])
    made = ran_on_loops(program, s, args)
    results = [] if made is None else [made]
    results.append(evaluate(program.program, args)["out"])
    for kind in ("interp", "cpp") if ran % 12 == 1 else ():
        got = program.build(kind)(**args)
        results.append(got.unpack()[1] if like else got)
    if like:  # explicit zeros beside the entries keep no meaning of their own
        at, wanted = stored["A"], wanted[values["A"] != 0]
        results = [x[values["A"][at] != 0] for x in results]
    for got in results:
        np.testing.assert_allclose(got, wanted, 1e-4, 1e-4, err_msg=f"{program}\n{s.history}")
    scheduled = made is not None and len(s.history) > 0
    return {"ran": 1, "fused": fused, "scheduled": scheduled}


CELLS = [("ij", n) for n in FORMATS_2D] + [("rij", n) for n in FORMATS_3D]


@pytest.mark.parametrize(("of_a", "name"), CELLS)
def test_random_programs_mean_what_they_say(of_a, name, request):
    programs = -(-request.config.getoption("random_programs") // len(CELLS))
    fmt, tally = (FORMATS_2D | FORMATS_3D)[name], Counter()
    first = seed = request.config.getoption("random_seed")
    while tally["ran"] < programs:
        rng = np.random.default_rng([seed, *name.encode()])
        seed += 1
        try:
            tally.update(runs(rng, of_a, fmt, tally["ran"]))
        except Exception as wrong:
            raise AssertionError(f"seed {seed - 1} of {name}") from wrong
        assert seed - first <= 100 * programs, "nearly all programs are refused"
    assert tally["scheduled"] > 0 or programs < 9, tally
    if name == "csr":
        assert tally["fused"] > 0
