"""Schedules: no legal sequence of verbs changes what is computed; illegal ones change nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiler.cases import (
    FORMATS,
    after_every_pass,
    arguments,
    called,
    close,
    gemm,
    rgcn,
    rmsnorm,
    row_max,
    sddmm,
    softmax,
    spmm,
    spmm_t,
)
from tests.compiler.legality import accepted
from tests.compiler.replay import replay

import tilewright as tw
from tilewright.errors import ScheduleError
from tilewright.reference.evaluate import evaluate
from tilewright.toolchain import compilers, nvrtc

PROGRAMS = (spmm, spmm_t, row_max, sddmm, softmax, rgcn, gemm, rmsnorm)
FEW = ("csr", "coo", "csc", "dcsr", "ell", "bsr", "hyb", "hyb 3 split")


VERBS = ("split", "reorder", "reverse", "vectorize", "unroll", "rfactor", "fuse", "parallel",
         "cache", "privatize")  # fmt: skip
# Of 250 schedules of one to seven verbs, at least: accepted calls of a verb, of all others, and
# schedules that lowered. A third of the fewest of a dozen runs; verbs that refuse everything, and
# schedules that never lower, would pass every other check here.
FLOOR = {"split": 30, "reorder": 12, "parallel": 6, "cache": 7, "others": 8, "lowered": 64}


def tried(s, tally, verb, *args, **options):
    """The schedule after a verb; itself, untouched, where the verb is refused."""
    text, history = str(s.program), s.history
    try:
        new = getattr(s, verb)(*args, **options)
    except ScheduleError as e:
        assert e.code in ("S101", "S102", "S103") and e.message and e.hint, str(e)
        assert str(s.program) == text and s.history == history
        return s
    assert len(new.history) == len(history) + 1
    tally[verb if verb in FLOOR else "others"] += 1
    return new


def random_schedule(s, draw, steps, tally):
    """Some verbs on loops that are there, in any order."""
    for _ in range(steps):
        names = s.loops
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        verb = draw(st.sampled_from((*VERBS, "split", "reorder", "cache")))
        args, options = (a,), {}
        if verb == "split":
            args = a, draw(st.sampled_from((1, 2, 3, 4)))
            options = {"tail": draw(st.sampled_from(("guard", "cut", "exact")))}
        elif verb == "cache":
            operand = draw(st.sampled_from([t.name for t in s.program.tensors]))
            args = operand, a, draw(st.sampled_from(("register", "shared")))
        elif verb == "privatize":
            args = "out", a, draw(st.integers(2, 3))
        elif verb in ("reorder", "fuse"):
            args = a, b
        s = tried(s, tally, verb, *args, **options)
    return s


CELLS = [*((p, f) for p, f in accepted(PROGRAMS[:-2]) if f in FEW), (gemm, ""), (rmsnorm, "")]


@st.composite
def scheduled(draw, tally):
    program, fmt = draw(st.sampled_from(CELLS))
    program = program.decompose(A=FORMATS[fmt]) if fmt else program
    start = program.scheduled()
    made = random_schedule(start, draw, draw(st.integers(1, 7)), tally)
    seed = draw(st.integers(0, 2**32 - 1))
    assert str(made.undo(len(made.history)).program) == str(start.program)
    return program, made.history, seed


def test_random_schedules_keep_the_meaning():
    tally = Counter()

    @settings(max_examples=250)
    @given(
        scheduled(tally),
        st.sampled_from(("random", "sparse", "dense")),
        st.integers(0, 6),
        st.integers(0, 6),
        st.integers(1, 5),
    )
    def keep_the_meaning(case, kind, m, n, d):
        program, steps, seed = case
        args = arguments(program, np.random.default_rng(seed), kind, m=m, n=n, d=d, k=d)
        again = replay(program.scheduled(), steps)
        assert again.history == steps
        try:
            after_every_pass(program, args, lambda s: replay(s, steps))
        except ScheduleError as e:  # some choices show only together: an accumulator without a size
            assert e.code == "S102" and e.hint, str(e)
            return
        tally["lowered"] += 1

    keep_the_meaning()
    assert all(tally[what] >= least for what, least in FLOOR.items()), tally


@pytest.mark.parametrize("fmt", ["csr", "dcsr", "bsr", "hyb", "ell"])
def test_one_schedule_fits_formats_by_the_roles_of_axes(rng, fmt):
    def rows_and_entries(s: tw.Schedule) -> tw.Schedule:
        s = s.split(s.rows, 2, into=("unit", "row")).parallel("unit")
        return s.unroll(s.stored("j"), 2)

    program = spmm.decompose(A=FORMATS[fmt])
    args = arguments(program, rng, "random", m=7, n=6, d=5, k=5)
    after_every_pass(program, args, rows_and_entries)
    with pytest.raises(ScheduleError, match="no loop walks the axis q") as error:
        program.scheduled().stored("q")
    assert error.value.code == "S101" and "loops: " in str(error.value)


def test_copies_of_a_name_that_nothing_reads(rng):
    """Rows without entries leave only the name of their coordinate behind."""
    program = spmm_t.decompose(A=FORMATS["hyb"])
    after_every_pass(
        program,
        arguments(program, rng, "random", m=5, n=4, d=3, k=3),
        lambda s: s.split("i_p", 2, tail="cut").unroll("i_p_i"),
    )


CPU = [
    (
        spmm,
        "csr",
        lambda s: (
            s.split("k", 4, tail="cut")
            .reorder("j", "k_i")
            .vectorize("k_i")
            .split("i", 3)
            .parallel("i_o")
        ),
    ),
    (spmm, "csr", lambda s: s.split("k", 8).reorder("j", "k_i").unroll("k_i").parallel("i")),
    (spmm, "csr", lambda s: s.split("j", 4, tail="cut").rfactor("j_i").unroll("j_i").parallel("i")),
    (spmm, "ell", lambda s: s.split("j", 4, tail="exact").rfactor("j_i").parallel("i")),
    (
        spmm,
        "hyb",
        lambda s: s.split("k", 4, tail="cut").reorder("j", "k_i").vectorize("k_i").parallel("i"),
    ),
    (
        spmm,
        "coo",
        lambda s: s.atomic("out").parallel("i").split("k", 4, tail="cut").vectorize("k_i"),
    ),
    (spmm_t, "csr", lambda s: s.atomic("out").parallel("i")),
    (sddmm, "csr", lambda s: s.split("k", 4, tail="cut").vectorize("k_i").parallel("i")),
    (
        gemm,
        None,
        lambda s: s.split("j", 4, tail="cut").reorder("k", "j_i").vectorize("j_i").parallel("i"),
    ),
    (
        gemm,
        None,
        lambda s: s.split("k", 4, tail="cut").vectorize("k_i").fuse("i", "j").parallel("ij"),
    ),
    (rmsnorm, None, lambda s: s.parallel("i").split("k2", 4, tail="cut").vectorize("k2_i")),
]


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("program", "fmt", "recipe"), CPU)
def test_scheduled_kernels(program, fmt, recipe, rng):
    definition = program.decompose(A=FORMATS[fmt]) if fmt else program
    kernel = definition.schedule(recipe).build()
    for m, n, d in ((5, 6, 3), (9, 8, 17), (1, 1, 4), (0, 3, 8), (3, 0, 1)):
        args = arguments(definition, rng, "random", m=m, n=n, d=d, k=d)
        wanted = evaluate(definition.program, args)
        for t in definition.program.outputs:
            close(called(kernel, definition, args)[t.name], wanted[t.name], "float32")
    after_every_pass(definition, arguments(definition, rng, d=9, k=9), recipe)


@pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
def test_fused_axes_and_fixed_sizes(rng):
    def recipe(s):
        return s.fuse_axes("A").specialize("d", 8).atomic("out").split("ij", 4).parallel("ij_o")

    definition = spmm
    kernel = definition.schedule(recipe).build()
    args = arguments(definition, rng, "random", m=7, n=6, d=8)
    wanted = evaluate(definition.program, args)["out"]
    close(called(kernel, definition, args)["out"], wanted, "float32")
    after_every_pass(definition, args, recipe)
    with pytest.raises(tw.TilewrightError, match="A103"):
        kernel(**arguments(definition, rng, d=9))


@pytest.mark.parametrize("fmt", ["csr", "csc", "bsr", "ell", "coo"])
@pytest.mark.parametrize("order", ["ikj", "kij", "jik", "kji"])
def test_order_of_axes(fmt, order, rng):
    program = spmm.decompose(A=FORMATS[fmt])
    try:
        after_every_pass(program, arguments(program, rng), lambda s: s.order_axes("out", *order))
    except ScheduleError as e:  # a loop without a constant extent ends up inside the sum
        assert e.code == "S102" and order[-1] != "j" and e.hint


def test_order_of_axes_of_a_sparse_output(rng):
    program = sddmm
    args = arguments(program, rng)
    for order in ("kij", "ikj", "jik"):
        after_every_pass(program, args, lambda s, o=order: s.order_axes("out", *o))


@tw.program
def normed_product(X=tw.dense("m k"), W=tw.dense("n k")):
    i, j, k = tw.indices("m n k")
    squares = tw.sum(X[i, k] * X[i, k], over=k)
    return tw.out[i, j](tw.sum(X[i, k] * W[j, k], over=k) * tw.rsqrt(squares + 0.5))


def test_sums_of_a_statement_in_one_loop(rng):
    """One that many elements share beside one of each element, on scalars, vectors and threads."""

    def threads(s):
        s = s.merge_sums("out").split("n", 4).bind("m", "cta.y").bind("n_o", "cta.x")
        return s.bind("n_i", "thread.y").split("k", 8).bind("k_i", "thread.x")

    args = arguments(normed_product, rng, m=3, n=10, k=21)
    after_every_pass(normed_product, args, lambda s: s.merge_sums("out"))
    after_every_pass(normed_product, args, threads, "cuda")
    merged = normed_product.scheduled().merge_sums("out")
    assert len(merged.loops) == 3 and len(normed_product.scheduled().loops) == 4
    with pytest.raises(ScheduleError, match="S101"):
        normed_product.scheduled().merge_sums("squares")


def test_gpu_schedules_run_on_the_interpreter(rng):
    """Loops bound to threads run one after the other."""

    def recipe(s):
        s = s.bind("i", "cta.x").split("k", 4).bind("k_i", "thread.x")
        return s.reorder("k_i", "j") if "j_p" in s.loops else s

    after_every_pass(spmm, arguments(spmm, rng, d=9), recipe, "cuda")

    def over_threads(s):
        return s.split("k", 4).bind("k_i", "thread.x").parallel("i")

    after_every_pass(gemm, arguments(gemm, rng, k=9), over_threads, "cuda")


def test_a_schedule_prints_and_goes_back():
    start = spmm.scheduled()
    made = start.split("k", 4).vectorize("k_i").split("i", 8).parallel("i_o")
    assert [str(h) for h in made.history] == [
        ".split('k', 4, tail='guard')", ".bind('k_i', 'vector')",
        ".split('i', 8, tail='guard')", ".bind('i_o', 'parallel')",
    ]  # fmt: skip
    assert "# vector" in str(made) and "i_o" in made.loops
    assert str(made.undo().program) == str(
        start.split("k", 4).vectorize("k_i").split("i", 8).program
    )
    assert str(made.undo(4).program) == str(start.program) and start.history == ()
    with pytest.raises(ScheduleError, match="undo"):
        start.undo()
    assert str(replay(start, made.history).program) == str(made.program)


def test_verbs_on_some_nests(rng):
    program = spmm.decompose(A=FORMATS["hyb"])
    s = program.scheduled()

    def recipe(s):
        for n in range(len(s.nests)):
            s = s.on(n).split("k", 2 + n)
        return s.everywhere().parallel("i")

    made = recipe(s)
    assert made.history[0].nests == (0,) and ".on(0,)" in str(made.history[0])
    assert [s.format_of(n).name for n in range(3)] == ["dcsr", "bucket(4)", "bucket(2)"]
    after_every_pass(program, arguments(program, rng), recipe)


REFUSED = [
    ("S101", lambda s: s.split("zz", 4), "zz"),
    ("S101", lambda s: s.on(7), "7"),
    ("S101", lambda s: s.order_axes("nope", "i"), "nope"),
    ("S101", lambda s: s.order_axes("out", "z"), "z"),
    ("S101", lambda s: s.fuse_axes("X"), "X"),
    ("S101", lambda s: s.specialize("q", 4), "q"),
    ("S102", lambda s: s.specialize("d", 0), "d"),
    ("S102", lambda s: s.split("k", 0), "k"),
    ("S102", lambda s: s.split("k", 4, tail="none"), "none"),
    ("S102", lambda s: s.split("k", 4, tail="exact"), "4"),
    ("S102", lambda s: s.vectorize("k"), "k"),
    ("S102", lambda s: s.unroll("k"), "k"),
    ("S102", lambda s: s.split("k", 512).unroll("k_i"), "k_i"),
    ("S102", lambda s: s.rfactor("k"), "k"),
    ("S102", lambda s: s.rfactor("j"), "j"),
    ("S102", lambda s: s.parallel("j"), "j"),
    ("S102", lambda s: s.reorder("j", "i"), "j"),
    ("S102", lambda s: s.fuse("i", "j"), "j"),
    ("S102", lambda s: s.fuse("k", "j"), "j"),
    ("S102", lambda s: s.bind("j", "thread.x"), "j"),
    ("S102", lambda s: s.split("j", 3).bind("j_i", "thread.x"), "j_i"),
    ("S102", lambda s: s.mma("i", "k", "j"), "i"),
    ("S102", lambda s: s.split("k", 4).order_axes("out", "k"), "order_axes"),
    ("S101", lambda s: s.atomic("out"), "out"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "verb", "name"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_say_why_and_change_nothing(code, verb, name):
    s = spmm.scheduled()
    before = str(s)
    with pytest.raises(ScheduleError) as caught:
        verb(s)
    assert caught.value.code == code and name in caught.value.message, str(caught.value)
    assert str(s) == before and s.history == ()


LATE = [
    (lambda s: s.reorder("k", "i").parallel("i").split("k", 4), "parallel"),
    (lambda s: s.split("k", 4).vectorize("k_i"), "vector"),
    (lambda s: s.reorder("j", "k"), "k"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "name"), LATE, ids=range(len(LATE)))
def test_what_only_shows_together_is_refused_when_lowered(recipe, name):
    with pytest.raises(ScheduleError) as caught:
        spmm.schedule(recipe).lower()
    assert caught.value.code == "S102" and name in str(caught.value) and caught.value.hint


def test_prefetch_changes_no_result_and_reads_nothing(rng):
    """Rows are asked for beyond the end of a row, never beyond the end of the matrix."""
    spmm = tw.program(_spmm)
    dense = np.where(rng.random((40, 30)) < 0.2, rng.standard_normal((40, 30)), 0).astype(
        np.float32
    )
    x = rng.standard_normal((30, 32)).astype(np.float32)
    for ahead in (1, 16, 1000):
        d = spmm.schedule(lambda s, n=ahead: s.prefetch("X", "j", n))
        assert "prefetch X[" in str(d.scheduled())
        out = np.full((40, 32), np.nan, np.float32)
        d.build()(tw.csr().pack(dense), x, out=out)
        assert np.allclose(out, dense @ x, atol=1e-4)
        empty = d.build()(tw.csr().pack(np.zeros((40, 30), np.float32)), x)
        assert (empty == 0).all()


def test_prefetch_is_refused_where_it_has_no_meaning():
    start = tw.program(_spmm).scheduled()
    for args, code in (
        (("X", "i", 4), "S101"),  # the place in X comes from memory: no row to name yet
        (("X", "j", 0), "S102"),
        (("Z", "j", 4), "S101"),
        (("X", "nowhere", 4), "S101"),
    ):
        with pytest.raises(ScheduleError) as e:
            start.prefetch(*args)
        assert e.value.code == code and e.value.hint


def test_prefetch_along_a_plain_loop(rng):
    """What later rows of W read is asked for once, inside W: the last rows ask for the last."""
    gemv = tw.program(_gemv)

    def ahead(s):
        s = s.split("i", 4, into=("unit", "row")).reorder("unit", "j", "row").split("j", 16)
        s = s.reorder("unit", "j_o", "row", "j_i").unroll("row").vectorize("j_i")
        return s.parallel("unit").prefetch("W", "unit", 3)

    W, x = rng.standard_normal((37, 64), np.float32), rng.standard_normal(64, np.float32)
    made = gemv.schedule(lambda s: ahead(s.specialize("n", 64)))
    text = str(made.lower())
    assert text.count("prefetch") == 4 and "min(unit + 3" in text.replace("(unit) + 3", "unit + 3")
    out = np.full(37, np.nan, np.float32)
    made.build()(W, x, out=out)
    assert np.allclose(out, W @ x, atol=1e-4)
    twice = gemv.schedule(lambda s: s.split("j", 2).unroll("j_i").prefetch("W", "i", 1))
    assert str(twice.lower()).count("prefetch") == 2  # W[i + 1, j], W[i + 1, j + 1]
    same = gemv.schedule(lambda s: s.split("j", 2).unroll("j_i").prefetch("x", "j_o", 1))
    assert str(same.lower()).count("prefetch") == 2


def _gemv(W=tw.dense("m n"), x=tw.dense("n")):
    i, j = tw.indices("i:m j:n")
    return tw.out[i](tw.sum(W[i, j] * x[j], over=j))


def _spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))


@tw.program
def neighbours(X=tw.dense("m n"), W=tw.dense("m d")):
    i, j = tw.indices("i:m j:d")
    return tw.out[i, j](X[i, j + 1] + W[i, j])


def in_vectors(s):
    """Both sizes are known: no lane reads beyond a row, and none is asked whether it does."""
    return s.specialize("n", 36).specialize("d", 32).split("j", 4).vectorize("j_i").parallel("i")


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_vectors_that_begin_anywhere_are_not_loaded_as_words():
    """X[i, j + 1] lies at no multiple of 16 bytes: a load of a word there is a fault on a GPU."""
    source = neighbours.schedule(in_vectors).build("cuda:sm_80").source
    assert "load_input<float, 4, true>(X" in source and "load_input<float, 4>(W" in source


@pytest.mark.gpu
def test_vectors_that_begin_anywhere_on_a_gpu(rng):
    from tilewright.runtime.cuda import DeviceArray

    args = arguments(neighbours, rng, m=5, n=36, d=32)
    kernel = neighbours.schedule(in_vectors).build("cuda")
    out = kernel(*(DeviceArray.from_numpy(args[name]) for name in "XW"))
    close(out.to_numpy(), args["X"][:, 1:33] + args["W"], "float32")
