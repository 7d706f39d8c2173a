"""What a user may write, and what is told to them where they may not: names, returns, outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import both_ways, spmm

import tilewright as tw
from tilewright.errors import ArgumentError, ProgramError, ScheduleError
from tilewright.runtime.step import Step
from tilewright.toolchain import compilers

TARGETS = [
    "interp",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")
    ),
]
needs_cxx = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def matrix(rng, m=9, n=9, density=0.4):
    return np.where(rng.random((m, n)) < density, rng.standard_normal((m, n)), 0).astype(np.float32)


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("formats", [("csr", "csr"), ("hyb", "split"), ("split", "hyb")])
def test_one_name_may_begin_another(rng, target, formats):
    """`A` and `A_t`, each with a structure of its own, composed or not."""
    known = {"csr": tw.csr(), "hyb": tw.hyb(buckets=(1, 2)), "split": tw.hyb(2, buckets=(4,))}
    first, second = (known[f] for f in formats)

    @tw.program
    def two(A=tw.sparse("m n"), A_t=tw.sparse("m n"), x=tw.dense("n")):
        i, j = tw.indices("m n")
        a = tw.out.named("a")[i](tw.sum(A[i, j] * x[j], over=j))
        b = tw.out.named("b")[i](tw.sum(A_t[i, j] * x[j], over=j))
        return b, a

    kernel = two.decompose(A=first, A_t=second).build(target)
    x = rng.standard_normal(9).astype(np.float32)
    for _ in range(3):
        M, N = matrix(rng), matrix(rng, density=0.1)
        b, a = kernel(first.pack(M), second.pack(N), x)
        np.testing.assert_allclose(a, M @ x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(b, N @ x, rtol=1e-5, atol=1e-5)


WORDS = ("p", "r", "unit", "int", "float", "self", "x_stride0", "size_n", "tx", "template", "row")


def written(text: str) -> tw.Definition:
    """The program that a text defines as `one`: a parameter may be called by any word there."""
    space: dict[str, Any] = {"tw": tw}
    exec(text, space)
    return tw.program(space["one"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("word", WORDS)
def test_words_of_generated_code_are_names_too(rng, target, word):
    one = written(
        f'def one(x=tw.dense("n"), {word}=tw.dense("n"), count=tw.scalar()):\n'
        f'  A_count1 = tw.indices("A_count1:n")\n'
        f"  return tw.out[A_count1](x[A_count1] * {word}[A_count1] + count)\n"
    )
    kernel = one.build(target)
    x, y = rng.standard_normal((2, 7)).astype(np.float32)
    np.testing.assert_allclose(kernel(x, y, 2.0), x * y + 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("word", ["out_acc1", "out_acc", "acc1", "A_values", "A_indices1"])
def test_registers_and_arrays_of_generated_code_meet_no_parameter(rng, target, word):
    one = written(
        f'def one(A=tw.sparse("m n"), {word}=tw.dense("n")):\n'
        f'  i, j = tw.indices("i:m j:n")\n'
        f"  return tw.out[i](tw.sum(A[i, j] * {word}[j], over=j))\n"
    )
    made = one.schedule(lambda s: s.parallel("i"))
    M, x = matrix(rng), rng.standard_normal(9).astype(np.float32)
    result = made.build(target)(tw.csr().pack(M), x)
    np.testing.assert_allclose(result, M @ x, rtol=1e-5, atol=1e-5)


NO_NAMES = ("", "m__size", "out__acc1", "A__values", "X", "i.o", "1a", "ä")


@pytest.mark.parametrize("name", NO_NAMES)
def test_loops_have_names_that_mean_nothing_else(name):
    s = spmm.scheduled()
    for into in ((name, "b"), ("b", name)):
        with pytest.raises(ScheduleError, match="S102"):
            s.split("k", 2, into=into)


@pytest.mark.parametrize("target", TARGETS)
def test_a_number_that_nothing_reads_is_checked_by_every_call(rng, target):
    @tw.program
    def scaled(X=tw.dense("m"), alpha=tw.scalar("int32")):
        i = tw.indices("m")
        return tw.out[i](X[i] + (i * 0) * alpha)

    kernel = scaled.build(target)
    x = rng.standard_normal(5).astype(np.float32)
    np.testing.assert_array_equal(kernel(x, 3), x)
    for wrong in ("x", [1], 2**40, 1.5, None):
        with pytest.raises(ArgumentError, match="A107"):
            kernel(x, wrong)
    np.testing.assert_array_equal(kernel(x, 4), x)


@pytest.mark.parametrize(
    ("code", "define"),
    [
        ("P101", lambda: tw.program(_double_underscore)),
        ("P102", lambda: tw.program(_index_like_a_parameter)),
        ("P102", lambda: tw.program(_unknown_size)),
        ("P106", lambda: tw.program(_float_coordinate)),
        ("P101", lambda: tw.program(_python_condition)),
        ("P101", lambda: tw.program(_decided_condition)),
        ("P103", lambda: tw.program(_moves_what_it_updates)),
        ("P106", lambda: tw.program(_too_large)),
        ("P101", lambda: tw.program(_returns_an_input)),
        ("P101", lambda: tw.program(_returns_too_little)),
        ("P101", lambda: tw.program(_returns_twice)),
        ("P107", lambda: spmm.decompose(X=tw.csr())),
        ("P106", lambda: spmm.typed(index="float32")),
        ("P101", lambda: spmm.schedule(5)),  # type: ignore[arg-type]
        ("S102", lambda: spmm.schedule(lambda s: None).build("interp")),  # type: ignore[arg-type,return-value]
    ],
)
def test_what_cannot_be_meant_is_refused(code, define):
    with pytest.raises((ProgramError, ScheduleError)) as caught:
        define()
    assert caught.value.code == code


def _double_underscore(x__y=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](x__y[i])


def _index_like_a_parameter(x=tw.dense("n")):
    i = tw.indices("x:n")
    return tw.out[i](x[i])


def _unknown_size(x=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](x[i] * tw.size("zz"))


def _float_coordinate(x=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](x[x[i]])


def _python_condition(A=tw.dense("n n")):
    i, j = tw.indices("n n")
    return tw.out[i, j](tw.where(i == j, 1.0, A[i, j]))


def _decided_condition(A=tw.dense("n n")):
    i, j = tw.indices("n n")
    return tw.out[i, j](A[i, j] * (i == j))


def _moves_what_it_updates(x=tw.dense("n")):
    i = tw.indices("n")
    return tw.update(x)[tw.size("n") - 1 - i](x[i])


def _too_large(x=tw.dense("n", "uint8")):
    i = tw.indices("n")
    return tw.out[i](x[i] + 300)


def _returns_an_input(x=tw.dense("n")):
    i = tw.indices("n")
    tw.out[i](x[i])
    return x


def _returns_too_little(x=tw.dense("n")):
    i = tw.indices("n")
    tw.out.named("a")[i](x[i])
    return tw.out.named("b")[i](x[i] * 2.0)


def _returns_twice(x=tw.dense("n")):
    i = tw.indices("n")
    a = tw.out[i](x[i])
    return a, a


VERBS = [
    lambda s: s.split("k", 4, into=("k_o", "j")),
    lambda s: s.split("k", 4, into=("k_o", "j_p")),
    lambda s: s.split("k", 4, into=("q", "q")),
    lambda s: s.split("k", 4, into=("a b", "c")),
    lambda s: s.split("k", 4, into=("X", "k_i")),
    lambda s: s.split("k", "4"),
    lambda s: s.fuse("i", "k", into="j"),
    lambda s: s.fuse("i", "k", into="j_p"),
    lambda s: s.reorder("i", "i", "k"),
    lambda s: s.reorder("j", "j_p"),
    lambda s: s.bind("i", "bogus"),
    lambda s: s.bind("i", "threads"),
    lambda s: s.split("k", 3).vectorize("k_i"),
    lambda s: s.specialize("d", 12).specialize("d", 10),
    lambda s: s.specialize("d", "12"),
    lambda s: s.order_axes("out", "k", "k"),
    lambda s: s.on(0).privatize("out", "j", 4),
    lambda s: s.stored(3),
]


@pytest.mark.parametrize("verb", VERBS, ids=range(len(VERBS)))
def test_verbs_refuse_what_would_change_the_meaning(verb):
    start = spmm.scheduled()
    with pytest.raises(ScheduleError) as caught:
        verb(start)
    assert caught.value.code == "S102" and caught.value.hint


VERB_NAMES = """split fuse reorder bind unroll rfactor atomic mma prefetch cache privatize
order_axes fuse_axes merge_sums specialize"""


def test_every_verb_documents_itself():
    for name in VERB_NAMES.split():
        text = getattr(tw.Schedule, name).__doc__
        assert "before:" in text and "after:" in text and "Raises ScheduleError" in text, name


# ---------------------------------------------------------------------------- meaning


@pytest.mark.parametrize("target", TARGETS)
def test_results_without_dimensions(rng, target):
    @tw.program
    def total(x=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[()](tw.sum(x[i], over=i))

    @tw.program
    def share(x=tw.dense("n"), A=tw.dense("n n")):
        i, j, k = tw.indices("n n n")
        rows = tw.sum(A[i, j] * x[j], over=j)
        return tw.out[i](rows - tw.sum(x[k], over=k) * x[i])

    @tw.program
    def same_index(x=tw.dense("n")):
        i = tw.indices("n")
        return tw.out[i](tw.sum(x[i], over=i))

    x, A = rng.standard_normal(9).astype(np.float32), matrix(rng)
    rounding = 1e-6 * np.abs(x).sum()  # of the magnitudes: the sum may cancel
    np.testing.assert_allclose(total.build(target)(x), x.sum(), atol=rounding)
    np.testing.assert_allclose(share.build(target)(x, A), A @ x - x.sum() * x, atol=1e-5)
    np.testing.assert_allclose(same_index.build(target)(x), np.full(9, x.sum()), atol=rounding)


@tw.program
def rows_and_columns(A=tw.sparse("n n")):
    i, j = tw.indices("n n")
    return tw.out[i, j](tw.sum(A[i, j], over=i) + tw.sum(A[i, j], over=j))


@tw.program
def own_row_and_column(A=tw.sparse("n n")):
    i, j, k = tw.indices("n n n")
    return tw.out[i](tw.sum(A[i, j], over=j) + tw.sum(A[k, i], over=k))


@tw.program
def columns_by_rows(A=tw.sparse("n n")):
    i, j, k = tw.indices("n n n")
    return tw.out[i, j](tw.sum(A[k, j], over=k) * (1.0 + tw.sum(A[i, k], over=k)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.csc(), tw.dcsr(), tw.dbsr(2)], ids=str)
def test_sums_of_rows_that_are_not_stored(rng, fmt, target):
    """Where a row is empty its columns are not; an index may be in the output and, as another one,
    under a sum."""
    M = matrix(rng)
    M[3] = M[7] = 0
    rows, columns = M.sum(1), M.sum(0)
    for program, wanted in (
        (rows_and_columns, rows[:, None] + columns),
        (own_row_and_column, rows + columns),
        (columns_by_rows, columns * (1 + rows[:, None])),
    ):
        got = program.decompose(A=fmt).build(target)(fmt.pack(M))
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("lanes", [1, 4])
@needs_cxx
def test_whole_numbers_divide_as_numpy_divides(lanes):
    """Rounded down, in vectors too; by 0 it is 0; nothing ends the process."""
    x = np.array([-7, 7, -8, 8, 0, 1, -1, -(2**31)], np.int32)
    y = np.array([2, -2, 3, 0, 0, -1, 5, -1], np.int32)

    @tw.program
    def divided(x=tw.dense("n", "int32"), y=tw.dense("n", "int32")):
        i = tw.indices("i:n")
        by = [x[i] // d for d in (2, 3, -2, 4)] + [x[i] % d for d in (2, 3, -2, 4)]
        by += [x[i] // y[i], x[i] % y[i]]
        return tuple(tw.out.named(f"o{n}")[i](e) for n, e in enumerate(by))

    def wide(s):
        return s.split("i", lanes, tail="cut").vectorize("i_i") if lanes > 1 else s

    with np.errstate(all="ignore"):
        wanted = [x // d for d in (2, 3, -2, 4)] + [x % d for d in (2, 3, -2, 4)]
        wanted += [x // y, x % y]
    for got, right in zip(divided.schedule(wide).build("cpp")(x, y), wanted, strict=True):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("target", TARGETS)
def test_small_integers_are_summed_in_32_bits(target):
    @tw.program
    def total(x=tw.dense("m n", "int8")):
        i, j = tw.indices("m n")
        return tw.out[i](tw.sum(x[i, j], over=j))

    got = total.build(target)(np.full((2, 5), 100, np.int8))
    assert got.dtype == np.int32 and got.tolist() == [500, 500]


@needs_cxx
def test_parts_that_share_rows_do_not_race(rng):
    """Without atomics they run one after the other; with them the verbs may make units of rows."""
    halves = tw.Composed(
        "halves", ((tw.Where(0, None, 0, 2), tw.csr()), (tw.Where(0, None, 1, 2), tw.csr()))
    )
    M, X = matrix(rng, 800, 600, 0.05), rng.standard_normal((600, 32)).astype(np.float32)
    shared = spmm.decompose(A=halves)
    with pytest.raises(ScheduleError, match="S102"):
        shared.schedule(lambda s: s.parallel("i")).build("cpp")
    with pytest.raises(ScheduleError, match="S102"):
        shared.build("cuda:sm_90a")
    plain, atomic = shared.build("cpp"), None
    atomic = shared.schedule(lambda s: s.atomic("out").parallel("i")).build("cpp")
    packed, wanted = halves.pack(M), M @ X
    first = plain(packed, X)
    for _ in range(20):
        np.testing.assert_array_equal(plain(packed, X), first)
        np.testing.assert_allclose(atomic(packed, X), wanted, atol=1e-4)
    np.testing.assert_allclose(first, wanted, atol=1e-4)
    for fmt in (tw.hyb(2, buckets=(2, 8)), tw.hyb(buckets=(2, 8), long_rows="split")):
        made = spmm.decompose(A=fmt).schedule(tw.recipes.spmm).build("cpp")
        np.testing.assert_allclose(made(fmt.pack(M), X), wanted, atol=1e-4)


# ---------------------------------------------------------------------------- outputs and numbers


@needs_cxx
def test_what_is_written_meets_nothing_else(rng):
    """In the first call of a layout and in later ones."""
    A = tw.csr().pack(matrix(rng, 8, 8, 0.8))
    X = rng.standard_normal((8, 4)).astype(np.float32)
    kernel, two = spmm.build("cpp"), both_ways.build("cpp")
    good = np.empty((8, 4), np.float32)
    wide = np.zeros((1, 4), np.float32)
    stairs = np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), (8, 4), (8, 4))
    B = A.with_values(A.entry_values())
    values = B.values[0]
    for _ in range(2):
        kernel(A, X, out=good)
        for code, out in (
            ("A104", np.broadcast_to(wide, (8, 4))),
            ("A104", stairs),
            ("A108", X),
            ("A108", values[:32].reshape(8, 4)),
        ):
            before = values.copy()
            with pytest.raises(ArgumentError) as caught:
                kernel(B, X, out=out)
            assert caught.value.code == code
            np.testing.assert_array_equal(values, before)
    Z, both = rng.standard_normal((8, 4)).astype(np.float32), np.empty((8, 4), np.float32)
    two(A, X, Z, out=(good, both))
    with pytest.raises(ArgumentError, match="A108"):
        two(A, X, Z, out=(both, both))


@needs_cxx
def test_an_update_meets_no_input(rng):
    @tw.program
    def add_rows(K=tw.dense("m d"), X=tw.dense("t d"), at=tw.dense("t", "int32")):
        t, k = tw.indices("t d")
        return tw.update(K)[at[t], k](X[t, k] * 2.0)

    kernel, K = add_rows.build("cpp"), rng.standard_normal((9, 4)).astype(np.float32)
    at = np.array([4, 5], np.int32)
    for _ in range(2):
        kernel(K, K[:2].copy(), at)
        before = K.copy()
        with pytest.raises(ArgumentError, match="A108"):
            kernel(K, K[:2], at)
        np.testing.assert_array_equal(K, before)


TOO_LARGE = {"float16": 65520.0, "bfloat16": 1e39, "float32": 3.5e38, "float64": 10**400}


@needs_cxx
@pytest.mark.parametrize("dtype", ["int32", "int8", *TOO_LARGE])
def test_numbers_fit_or_are_refused(rng, dtype):
    @tw.program
    def scaled(x=tw.dense("n"), s=tw.scalar(dtype)):
        i = tw.indices("n")
        return tw.out[i](x[i] * s)

    kernel, x = scaled.build("cpp"), rng.standard_normal(5).astype(np.float32)
    bad = ["2", None, 10**400, [1, 2]]
    wide = dtype in TOO_LARGE
    bad += [TOO_LARGE[dtype]] if wide else [2**40, 2.7, float("inf"), float("nan")]
    for _ in range(2):
        for number in (np.inf, -np.inf, np.nan) if wide else ():
            np.testing.assert_array_equal(kernel(x, number), x * np.float32(number))
        np.testing.assert_allclose(kernel(x, 3), 3 * x, rtol=1e-6)
        np.testing.assert_allclose(kernel(x, np.int16(-2)), -2 * x, rtol=1e-6)
        for number in bad:
            with pytest.raises(ArgumentError, match="A107"):
                kernel(x, number)


def test_a_step_records_bound_calls_and_nothing_else(rng):
    x = rng.standard_normal((4, 4)).astype(np.float32)
    kernel = spmm.build()
    bound = kernel.bind(tw.csr().pack(matrix(rng, 4, 4)), x)
    assert Step(b for b in [bound, bound]).count == 2
    wrongs: list[Any] = [[5], [kernel], [None], 5, [(1, 2)]]
    for wrong in wrongs:
        with pytest.raises(ArgumentError, match="A107"):
            Step(wrong)


@tw.program
def by_fibres(A=tw.sparse("a b c"), X=tw.dense("c d")):
    i, j, k, c = tw.indices("a b d c")
    return tw.out[i, j, k](tw.sum(A[i, j, c] * X[c, k], over=c))


@tw.program
def one_dimension(v=tw.sparse("n"), w=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[()](tw.sum(v[i] * w[i], over=i))


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_of_one_and_of_three_dimensions(rng, target):
    T = np.where(rng.random((4, 5, 6)) < 0.3, rng.standard_normal((4, 5, 6)), 0)
    T = T.astype(np.float32)
    T[2] = 0
    X = rng.standard_normal((6, 3)).astype(np.float32)
    v, w = matrix(rng, 1, 9)[0], rng.standard_normal(9).astype(np.float32)
    got = by_fibres.build(target)(tw.csf(3).pack(T), X)
    np.testing.assert_allclose(got, T @ X, atol=1e-5)
    got = one_dimension.build(target)(tw.csf(1).pack(v), w)
    np.testing.assert_allclose(got, v @ w, atol=1e-5)
    for wrong in (0, "3", 1.5):
        with pytest.raises(tw.TilewrightError, match="F101"):
            tw.csf(wrong)  # type: ignore[arg-type]
