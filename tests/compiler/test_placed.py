"""Temporaries that `compute_at` places in a loop of their reader: meaning after every pass, what is
computed how often, the online softmax, barriers, and refusals."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compiler import cases, cta

import tilewright as tw
from tilewright import knobs
from tilewright.errors import ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import map_bodies, rebuild, walk
from tilewright.lower import AFTER_SCHEDULE, run_passes

LESSON = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "examples" / "06_graph_attention.py"),
    run_name="lesson",
)
attend, NAMES = LESSON["attend"], LESSON["TEMPORARIES"]


@tw.program
def spread(A=tw.sparse("m n"), X=tw.dense("n f"), W=tw.dense("f o")):
    """A dense row as a temporary: the features of a node before they are multiplied."""
    i, j, f, o = tw.indices("i:m j:n f:f o:o")
    mixed = tw.temp.named("mixed")[i, f](tw.sum(A[i, j] * X[j, f], over=j))
    return tw.out[i, o](tw.sum(tw.maximum(mixed[i, f], 0.0) * W[f, o], over=f))


def at(loop: str, scope: str = "row") -> Any:
    def schedule(s: Any) -> Any:
        for name in NAMES:
            s = s.compute_at(name, loop, scope)
        if loop == "j":
            return s.specialize("v", 4).order_axes("out", "i", "h", "j", "c")
        return s.order_axes("out", "i", "h", "c")

    return schedule


def attention(args: dict[str, Any]) -> np.ndarray:
    """In float64, row by row."""
    coords, values = args["A"].unpack()
    q, k, v = (args[n].astype(np.float64) for n in "QKV")
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for i in range(len(q)):
        mine = np.flatnonzero(coords[0] == i)
        j, a = coords[1][mine], values[mine].astype(np.float64)
        if len(j):
            s = args["scale"] * a[:, None] * np.einsum("hk,jhk->jh", q[i], k[j])
            w = np.exp(s - s.max(0))
            out[i] = np.einsum("jh,jhc->hc", w / w.sum(0), v[j])
    return out


SIZES: Any = {"m": 3, "n": 4, "d": 2, "v": 4, "h": 2}
FORMATS = ("csr", "dcsr", "ell", "ragged", "bsr", "hyb")


@pytest.mark.parametrize(
    ("fmt", "loop"),
    [*(("csr", loop) for loop in "ihj"), ("dcsr", "h"), ("ell", "j"), ("ragged", "i"),
     ("bsr", "h"), ("bsr", "j"), ("hyb", "h"), ("hyb", "j")],
)  # fmt: skip
def test_the_meaning_stays_after_every_pass(rng, fmt, loop):
    definition = attend.decompose(A=cases.FORMATS[fmt])
    for kind in ("random", "empty", "one row")[: 3 if loop == "j" else 1]:
        args = cases.arguments(definition, rng, kind, **SIZES)
        with knobs.scope(verify=True):
            cases.after_every_pass(definition, args, at(loop))


@pytest.mark.parametrize("loop", ["h", "j"])
@pytest.mark.parametrize("fmt", ["csr", "hyb", "bsr"])
def test_a_kernel_agrees_with_numpy(rng, fmt, loop):
    definition = attend.decompose(A=cases.FORMATS[fmt]).schedule(at(loop))
    args = cases.arguments(definition, rng, **SIZES)
    args["A"] = cases.filled_padding(args["A"])
    kernel = definition.build()
    out = np.full((3, 2, 4), np.nan, np.float32)
    kernel(**args, out=out)
    np.testing.assert_allclose(out, attention(args), rtol=2e-5, atol=2e-6)
    assert len(kernel.manifest.stages) == 1
    assert [t.name for t in kernel.manifest.tensors if t.role == "temp"] == []


@pytest.mark.parametrize("loop", ["i", "h", "j"])
def test_nothing_is_computed_twice(loop):
    """One launch; each product Q·K and each exponential once, in the lowered program."""
    lowered = attend.schedule(at(loop)).lower()
    nodes = [x for stage in lowered.stages for nest in stage for x in walk(nest.body)]
    assert len(lowered.stages) == 1
    assert sum(isinstance(x, ir.Unary) and x.op == "exp" for x in nodes) == 1
    reads = Counter(x.buffer.name for x in nodes if isinstance(x, ir.Load))
    assert (reads["Q"], reads["K"], reads["V"]) == (1, 1, 1)
    apart = attend.lower()
    assert len(apart.stages) == 5


def test_a_dense_row_is_a_temporary(rng):
    args = cases.arguments(spread, rng, m=4, n=5, f=3, o=2)
    schedule = lambda s: s.compute_at("mixed", "i")  # noqa: E731
    with knobs.scope(verify=True):
        cases.after_every_pass(spread, args, schedule)
    kernel = spread.schedule(schedule).build()
    dense = args["A"].dense().astype(np.float64)
    expected = np.maximum(dense @ args["X"], 0) @ args["W"]
    np.testing.assert_allclose(kernel(*args.values()), expected, rtol=1e-5, atol=1e-6)
    assert len(kernel.manifest.stages) == 1


@tw.program
def scaled(X=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    t = tw.temp.named("t")[i, j](X[i, j] * 3.0)
    return tw.out[i, j](t[i, j] + 1.0)


@tw.program
def shares(X=tw.dense("m n")):
    """A column sum inside of a temporary of a row."""
    i, j = tw.indices("i:m j:n")
    t = tw.temp.named("t")[i, j](X[i, j] / (1.0 + tw.sum(X[i, j] * X[i, j], over=i)))
    return tw.out[i](tw.sum(t[i, j] * X[i, j], over=j))


@tw.program
def gathered(A=tw.sparse("m n"), X=tw.dense("m d")):
    """The rows of a temporary are read again for each column of A."""
    i, j, k = tw.indices("i:m j:n k:d")
    t = tw.temp.named("t")[i, k](X[i, k] * X[i, k])
    return tw.out[j](2.0 * tw.sum(A[i, j] * t[i, k], over=(i, k)))


@tw.program
def of_entries(A=tw.sparse("m n"), X=tw.dense("m n")):
    """An entry of a temporary has its place in memory only where A stores one."""
    i, j = tw.indices("i:m j:n")
    t = tw.temp.like(A).named("t")[i, j](A[i, j] + 3.0)
    return tw.out[i, j](t[i, j] + X[i, j])


@tw.program
def normed(X=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    u = tw.temp.named("t")[i](tw.sum(X[i, j] * X[i, j], over=j))
    return tw.out[i, j](X[i, j] / (1.0 + u[i]))


def test_a_merged_sum_has_loops_of_its_own(rng):
    args = cases.arguments(normed, rng, m=4, n=5)
    schedule = lambda s: s.merge_sums("out").compute_at("t", "i")  # noqa: E731
    with knobs.scope(verify=True):
        cases.after_every_pass(normed, args, schedule)


@pytest.mark.parametrize(("definition", "loop", "scope"), [
    (scaled, "i", "row"), (scaled, "j", "global"), (shares, "i", "row"), (shares, "j", "global"),
    (gathered, "i", "row"), (gathered, "i", "global"), (of_entries, "j", "global"),
])  # fmt: skip
def test_what_a_temporary_is_computed_from_stays(rng, definition, loop, scope):
    args = cases.arguments(definition, rng, m=4, n=5, d=2)
    with knobs.scope(verify=True):
        cases.after_every_pass(definition, args, lambda s: s.compute_at("t", loop, scope))


# ---- the online form ---------------------------------------------------------------------------


@tw.program
def logsumexp(X=tw.dense("m n")):
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(X[i, j], over=j))
    return tw.out[i](top[i] + tw.log(tw.sum(tw.exp(X[i, j] - top[i]), over=j)))


INF = float("inf")


@pytest.mark.parametrize(
    "row",
    [[1.0], [-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [-INF, -INF, 2.0, 1.0], [-INF], [3e38, -3e38], []],
    ids=str,
)
def test_the_online_form_neither_overflows_nor_stumbles_over_infinity(row):
    x = np.array([row, row], np.float32).reshape(2, -1)
    kernel = logsumexp.schedule(lambda s: s.compute_at("top", "j")).build()
    with np.errstate(all="ignore"):
        top = x.astype(np.float64).max(1, initial=-INF, keepdims=True)
        total = np.exp(x - np.where(np.isfinite(top), top, 0)).sum(1)
        expected = top[:, 0] + np.log(total)
    np.testing.assert_allclose(kernel(x), np.where(total > 0, expected, -INF), rtol=1e-6)


@tw.program
def nested(A=tw.sparse("m n"), W=tw.dense("n k"), V=tw.dense("n")):
    """A sum inside of each term."""
    i, j, k = tw.indices("i:m j:n k:k")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    weight = tw.exp(A[i, j] - top[i])
    inner = tw.temp.like(A).named("inner")[i, j](tw.sum(weight * W[j, k], over=k) * 2.0)
    return tw.out[i](tw.sum(inner[i, j] * V[j], over=j))


def test_a_term_may_be_a_sum(rng):
    args = cases.arguments(nested, rng, m=4, n=6, k=3)
    schedule = lambda s: s.compute_at("top", "j").compute_at("inner", "j")  # noqa: E731
    with knobs.scope(verify=True):
        cases.after_every_pass(nested, args, schedule)


def threads(s: Any) -> Any:
    s = s.compute_at("top", "j").split("j", 8, into=("j_o", "j_y"))
    return s.bind("j_y", "thread.y").bind("i", "cta.x")


def test_the_states_of_threads_are_joined(rng):
    """Each thread has a maximum of its own; sums are rescaled to that of all."""
    x = rng.standard_normal((3, 29)).astype(np.float32) * 30
    with knobs.scope(verify=True):
        cases.after_every_pass(logsumexp, {"X": x}, threads, "cuda:sm_90a")


def test_a_cut_tail_continues_the_state(rng):
    schedule = lambda s: s.compute_at("top", "j").split("j", 4, tail="cut")  # noqa: E731
    x = rng.standard_normal((3, 11)).astype(np.float32) * 30
    with knobs.scope(verify=True):
        cases.after_every_pass(logsumexp, {"X": x}, schedule)


def test_a_state_has_no_lanes():
    for kind in ("rfactor", "vectorize"):
        schedule = lambda s, kind=kind: getattr(  # noqa: E731
            s.compute_at("top", "j").split("j", 4, tail="cut"), kind
        )("j_i")
        with pytest.raises(ScheduleError) as error:
            logsumexp.schedule(schedule).build()
        assert error.value.code == "S102"


# ---- on a GPU ----------------------------------------------------------------------------------


def row_of_a_cta(s: Any) -> Any:
    """Weights in an array, written by the threads of x and read by others."""
    s = at("h", "global")(s).specialize("v", 4)
    for name in ("score", "top", "weight", "total"):
        s = s.split(f"{name}.j", 32, into=(f"{name}_o", f"{name}_x")).bind(f"{name}_x", "thread.x")
    return s.split("c", 32, into=("c_o", "c_x")).bind("c_x", "thread.x").bind("i", "cta.x")


def test_a_barrier_separates_an_array_from_its_readers(rng):
    args = cases.arguments(attend, rng, **SIZES)
    with knobs.scope(verify=True):
        cases.after_every_pass(attend, args, row_of_a_cta, "cuda:sm_90a")
    program = run_passes(
        row_of_a_cta(attend.scheduled("cuda:sm_90a")).lowered.program, AFTER_SCHEDULE, "cuda"
    )

    def without_barriers(s: Any) -> Any:
        if isinstance(s, ir.Sync):
            return ir.seq()
        return rebuild(s, without_barriers) if isinstance(s, (ir.Seq, ir.For, ir.If)) else s

    cases.executed(attend, program, args, cta.execute)
    with pytest.raises(cta.Refused, match="race"):
        cases.executed(attend, map_bodies(program, without_barriers), args, cta.execute)


# ---- names of loops ----------------------------------------------------------------------------


def test_a_loop_is_named_by_its_statement():
    s = at("h")(attend.scheduled())
    for name in NAMES[1:]:
        assert s.has(f"{name}.j") and not s.has(f"{name}.k")
    assert s.has("score.k") and not s.has("top.c") and s.has("out.j")
    s = s.split("weight.j", 4, into=("w_o", "w_i"))
    assert not s.has("weight.j") and s.has("total.j")
    assert attend.scheduled().split("score.k", 2).loops.count("k_o") == 1


# ---- refusals ----------------------------------------------------------------------------------


@tw.program
def read_twice(A=tw.sparse("m n"), X=tw.dense("m")):
    i, j = tw.indices("i:m j:n")
    t = tw.temp.named("t")[i](tw.sum(A[i, j], over=j))
    return tw.out[i](t[i] + X[i]), tw.out.named("second")[i](t[i] * X[i])


@tw.program
def early(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    return tw.out[i](tw.sum(A[i, j] * top[i], over=j))


@tw.program
def squared(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    weight = tw.exp(A[i, j] - top[i])
    return tw.out[i](tw.sum(weight * weight, over=j))


@tw.program
def kept(A=tw.sparse("m n")):
    i, j = tw.indices("i:m j:n")
    top = tw.temp.named("top")[i](tw.max(A[i, j], over=j))
    return tw.out.like(A)[i, j](tw.exp(A[i, j] - top[i]))


@tw.program
def searched(A=tw.sparse("n n")):
    i, j, k = tw.indices("i:n j:n k:n")
    s = tw.temp.like(A).named("s")[i, j](A[i, j] + 1.0)
    return tw.out[i](tw.sum(A[i, j] * s[i, k], over=(j, k)))


@tw.program
def of_another_column(X=tw.dense("m n")):
    i, j, k = tw.indices("i:m j:n k:n")
    t = tw.temp.named("t")[i, j](X[i, j] * 3.0)
    return tw.out[i, j](tw.sum(t[i, k] * X[i, j], over=k))


@pytest.mark.parametrize(
    ("definition", "schedule", "names"),
    [
        (of_another_column, lambda s: s.compute_at("t", "j"), ("loop j reads t[i, k]",)),
        (spread, lambda s: s.compute_at("mixed", "j"), ("mixed", "has no loop j")),
        (normed, lambda s: s.compute_at("t", "j"), ("out reads it before it is complete",)),
        (kept, lambda s: s.compute_at("top", "j", "global"), ("before it is complete",)),
        (attend, lambda s: s.compute_at("scores", "i"), ("scores", "score, top, weight, total")),
        (attend, lambda s: s.compute_at("score", "h"), ("score", "top and weight read it")),
        (read_twice, lambda s: s.compute_at("t", "i"), ("out and second read it",)),
        (early, lambda s: s.compute_at("top", "j"), ("top", "before it is complete")),
        (squared, lambda s: s.compute_at("top", "j"), ("no sum of products",)),
        (kept, lambda s: s.compute_at("top", "j"), ("out is no sum of products",)),
        (searched, lambda s: s.compute_at("s", "i"), ("s[i, k]", "no loop follows it")),
        (
            attend,
            lambda s: at("h")(s).order_axes("out", "c", "i", "h"),
            ("loop c is around loop h",),
        ),
        (attend, lambda s: at("h")(s).compute_at("score", "j"), ("score", "reads it first")),
        (attend.decompose(A=tw.coo()), at("h"), ("coo keeps rows in pieces",)),
        (attend.decompose(A=tw.hyb(2, (1, 2))), at("h"), ("keeps rows in pieces",)),
        (
            kept.decompose(A=cases.FORMATS["csr + bsr"]),
            lambda s: s.compute_at("top", "i"),
            ("max of A[i, j] over j", "keeps rows in pieces"),
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_statement(definition, schedule, names):
    with pytest.raises(tw.TilewrightError) as error:
        _ = schedule(definition.scheduled()).lowered
    assert error.value.code in ("S101", "S102", "P107") and error.value.hint
    for name in names:
        assert name in f"{error.value} {error.value.hint}"


# ---- a structure times dense dimensions --------------------------------------------------------


@tw.program
def scores(A=tw.sparse("m n"), Q=tw.dense("m h d"), K=tw.dense("n h d")):
    i, j, h, k = tw.indices("i:m j:n h:h k:d")
    return tw.out.like(A)[i, j, h](A[i, j] * tw.sum(Q[i, h, k] * K[j, h, k], over=k))


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_output_has_an_array_for_each_entry(rng, fmt):
    definition = scores.decompose(A=cases.FORMATS[fmt])
    args = cases.arguments(definition, rng, **SIZES)
    cases.after_every_pass(definition, args)
    args["A"] = cases.filled_padding(args["A"])
    coords, values = args["A"].unpack()
    expected = values[:, None] * np.einsum(
        "ehk,ehk->eh", args["Q"][coords[0]], args["K"][coords[1]]
    )
    for target in ("cpp", "interp"):
        got = definition.build(target)(*args.values())
        assert got.inner == (2,) and got.values[0].shape[1:] == (2,)
        np.testing.assert_allclose(got.unpack()[1], expected, rtol=1e-5, atol=1e-6)
        assert got.dense().shape == (3, 4, 2)
    if fmt == "csr":
        np.testing.assert_allclose(got.entry_values(), expected, rtol=1e-5, atol=1e-6)


def test_an_array_for_each_entry_is_no_matrix(rng):
    args = cases.arguments(scores, rng, **SIZES)
    kernel, result = scores.build(), scores.build()(*args.values())
    for bad in ({**args, "A": result},):
        with pytest.raises(tw.TilewrightError) as error:
            kernel(**bad)
        assert error.value.code == "A103" and "argument A" in str(error.value)
    with pytest.raises(tw.TilewrightError) as error:
        kernel(**args, out=args["A"])
    assert error.value.code == "A103"
    kernel(**args, out=result)
    with pytest.raises(tw.TilewrightError) as error:

        @tw.program
        def computed(A=tw.sparse("m n"), X=tw.dense("h")):
            i, j, h = tw.indices("i:m j:n h:h")
            s = tw.temp.like(A).named("s")[i, j, h](A[i, j] * X[h])
            return tw.out[i, h](tw.sum(s[i, j, h // 2], over=j))

    assert error.value.code == "P103"
    with pytest.raises(tw.TilewrightError) as error:

        @tw.program
        def other(A=tw.sparse("m n"), X=tw.dense("h")):
            i, j, h = tw.indices("i:m j:n h:h")
            return tw.out.like(A)[h, i, j](A[i, j] * X[h])

    assert error.value.code == "P103" and "like(A)[i, j, head]" in error.value.hint
