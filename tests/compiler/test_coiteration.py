"""Several sparse operands in one reduction, conditions on what is stored, and lists: every value is
computed again over all coordinates with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.compiler.cases import after_every_pass, pack

import tilewright as tw
from tilewright.errors import ProgramError, ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import walk
from tilewright.toolchain import nvrtc

TARGETS = ("interp", "cpp")
LISTS = {
    "csr": tw.csr(),
    "dcsr": tw.dcsr(),
    "rows of relations": tw.Format("nested", tw.csf(2).levels),
}
FOLD = {
    "sum": (tw.sum, np.add, 0.0),
    "max": (tw.max, np.maximum, -np.inf),
    "min": (tw.min, np.minimum, np.inf),
}
INF = float("inf")


def some(rng: np.random.Generator, shape: tuple[int, int], share: float = 0.4) -> np.ndarray:
    """Random values, no zeros among those stored; the second row is empty."""
    a = np.where(rng.random(shape) < share, rng.choice([-1, 1], shape) + rng.random(shape), 0)
    a[1:2] = 0
    return a.astype(np.float32)


def reduced(body, op: str = "sum", where=None, fill: float = 0.0):
    """op over j of body(A[i, j], B[i, j])."""

    @tw.program
    def p(A=tw.sparse("m n", fill=fill), B=tw.sparse("m n", fill=fill)):
        i, j = tw.indices("m n")
        cond = None if where is None else where(A[i, j], B[i, j])
        return tw.out[i](FOLD[op][0](body(A[i, j], B[i, j]), over=j, where=cond))

    return p


def over_all(body, op, a, b, cond=None) -> np.ndarray:
    """The reduction over all columns (where a condition holds), in float64."""
    ufunc, identity = FOLD[op][1:]
    values = body(a.astype(np.float64), b.astype(np.float64))
    values = values if cond is None else np.where(cond, values, identity)
    return ufunc.reduce(values, axis=1, initial=identity)


def merges(definition) -> list[tuple[str, int]]:
    """The merge loops of a program: their operations, and how many lists each has."""
    body = [n.body for stage in definition.lower().stages for n in stage]
    return [(x.op, len(x.runs)) for b in body for x in walk(b) if isinstance(x, ir.Merge)]


UNIONS = {
    "a + b": lambda a, b: a + b,
    "b + a": lambda a, b: b + a,
    "2 a - b": lambda a, b: 2.0 * a - b,
    "max(a, b)": lambda a, b: np.maximum(a, b) if isinstance(a, np.ndarray) else tw.maximum(a, b),
}
PRODUCTS = {
    "a b": lambda a, b: a * b,
    "b a": lambda a, b: b * a,
    "-a 2 b": lambda a, b: -a * 2.0 * b,
}
FIRST = {"a (b + 0.5)": lambda a, b: a * (b + 0.5), "(b + 0.5) a": lambda a, b: (b + 0.5) * a}


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [("csr", "csr"), ("dcsr", "csr"), ("csr", "dcsr"), ("rows of relations", "dcsr")],
)
@pytest.mark.parametrize("name", [*UNIONS, *PRODUCTS])
def test_lists_are_merged(name, of_a, of_b, rng):
    body = (UNIONS | PRODUCTS)[name]
    program = reduced(body).decompose(A=LISTS[of_a], B=LISTS[of_b])
    assert merges(program) == [("union" if name in UNIONS else "intersection", 2)]
    for target in TARGETS:
        kernel = program.build(target)
        for shape in ((5, 9), (1, 1), (4, 0), (0, 3)):
            a, b = some(rng, shape), some(rng, shape)
            out = np.full(shape[0], np.nan, np.float32)
            kernel(pack(LISTS[of_a], a), pack(LISTS[of_b], b), out=out)
            np.testing.assert_allclose(out, over_all(body, "sum", a, b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [*UNIONS, *PRODUCTS, *FIRST])
def test_every_pass_keeps_the_meaning(name, rng):
    for fmt in LISTS.values():
        program = reduced((UNIONS | PRODUCTS | FIRST)[name]).decompose(A=fmt, B=tw.csr())
        args = {"A": pack(fmt, some(rng, (4, 7))), "B": pack(tw.csr(), some(rng, (4, 7)))}
        assert "materialize_reductions" in after_every_pass(program, args)


@pytest.mark.parametrize("op", ["min", "max"])
def test_fills_that_change_nothing_make_a_union(op, rng):
    fill = INF if op == "min" else -INF
    a, b = some(rng, (5, 9)), some(rng, (5, 9))
    full = [np.where(x != 0, x, fill).astype(np.float32) for x in (a, b)]

    def body(x, y):
        smaller = (
            (np.minimum, np.maximum) if isinstance(x, np.ndarray) else (tw.minimum, tw.maximum)
        )
        return smaller[op == "max"](x, y)

    program = reduced(body, op, fill=fill)
    assert merges(program) == [("union", 2)]
    args = [pack(tw.csr(), x, fill=fill) for x in (a, b)]
    for target in TARGETS:
        np.testing.assert_allclose(program.build(target)(*args), over_all(body, op, *full))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.bsr(2), tw.hyb(), tw.ell(9)], ids=str)
@pytest.mark.parametrize("name", FIRST)
def test_one_structure_drives_wherever_it_is_written(name, fmt, target, rng):
    a, b = some(rng, (5, 9)), some(rng, (5, 9))
    kernel = reduced(FIRST[name]).decompose(A=fmt).build(target)
    got = kernel(fmt.pack(a), tw.csr().pack(b))
    np.testing.assert_allclose(got, over_all(FIRST[name], "sum", a, b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_decide_nothing_are_refused(op, name):
    """max(A B) over the entries of A and over those of B differ: neither is guessed."""
    with pytest.raises(ProgramError, match=r"structures of A and B share an axis") as e:
        reduced(PRODUCTS[name], op).lower()
    assert e.value.code == "P107" and "where=tw.stored(A[m, n])" in e.value.hint


CONDITIONS = {
    "a": (lambda a, b: tw.stored(a), lambda a, b: a != 0),
    "b": (lambda a, b: tw.stored(b), lambda a, b: b != 0),
    "a | b": (lambda a, b: tw.stored(a) | tw.stored(b), lambda a, b: (a != 0) | (b != 0)),
    "b & a": (lambda a, b: tw.stored(b) & tw.stored(a), lambda a, b: (a != 0) & (b != 0)),
}


@pytest.mark.parametrize("op", ["max", "min", "sum"])
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("where", CONDITIONS)
def test_where_names_the_coordinates(where, name, op, rng):
    a, b = some(rng, (5, 9)), some(rng, (5, 9))
    program = reduced(PRODUCTS[name], op, CONDITIONS[where][0])
    wanted = over_all(PRODUCTS[name], op, a, b, CONDITIONS[where][1](a, b))
    args = {"A": pack(tw.csr(), a), "B": pack(tw.csr(), b)}
    after_every_pass(program, args)
    for target in TARGETS:
        got = program.build(target)(**args)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@tw.program
def neighbours(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    largest = tw.out.named("largest")[i, k](tw.max(X[j, k], over=j, where=tw.stored(A[i, j])))
    degree = tw.out.named("degree")[i](tw.sum(1, over=j, where=tw.stored(A[i, j])))
    return largest, degree


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.csc(), tw.coo(), tw.dcsr(), tw.hyb()], ids=str)
def test_neighbours_without_weights(fmt, target, rng):
    """A count, and a maximum whose body does not mention A."""
    a, x = some(rng, (6, 8)), rng.standard_normal((8, 3)).astype(np.float32)
    largest, degree = neighbours.decompose(A=fmt).build(target)(fmt.pack(a), x)
    stored = a != 0
    wanted = np.where(stored[:, :, None], x, -np.inf).max(1)
    np.testing.assert_array_equal(largest, wanted)
    np.testing.assert_array_equal(degree, stored.sum(1))


def test_explicit_zeros_are_stored(rng):
    a = (np.array([0, 2, 2, 3]), np.array([0, 3, 1]), np.array([0, 2, 0], "f"), (3, 4))
    for target in TARGETS:
        degree = neighbours.build(target)(tw.csr().pack(a), np.zeros((4, 1), "f"))[1]
        np.testing.assert_array_equal(degree, [2, 0, 1])


def test_no_search_is_left():
    for body in (*UNIONS.values(), *PRODUCTS.values()):
        assert "find(" not in str(reduced(body).lower())


@pytest.mark.parametrize("fmt", [tw.csc(), tw.coo(), tw.bsr(2), tw.ell(4), tw.hyb()], ids=str)
def test_a_union_of_what_is_no_list_is_refused(fmt):
    with pytest.raises(ProgramError, match=r"cannot be (merged|searched)") as e:
        reduced(UNIONS["a + b"]).decompose(A=fmt).lower()
    assert e.value.code == "P107" and e.value.hint


def test_a_merge_loop_has_no_verbs():
    for verb in (lambda s: s.split("n", 4), lambda s: s.parallel("n"), lambda s: s.unroll("n", 2)):
        with pytest.raises(ScheduleError, match="merges lists") as e:
            reduced(UNIONS["a + b"]).schedule(verb).lower()
        assert e.value.code == "S102" and e.value.hint
    rows = reduced(UNIONS["a + b"]).schedule(
        lambda s: s.split("m", 2, into=("u", "v")).parallel("u")
    )
    a = np.eye(5, dtype=np.float32)
    np.testing.assert_array_equal(
        rows.build("cpp")(tw.csr().pack(a), tw.csr().pack(a)), 2 * a.sum(1)
    )


# ------------------------------------------------------------------------------------------- lists


def lists(where):
    """Columns and A + B where a condition holds."""

    @tw.program
    def p(
        A=tw.sparse("m n"), B=tw.sparse("m n"), start=tw.dense("m", "int64"),
        columns=tw.dense("c", "int32"), values=tw.dense("c"),
    ):  # fmt: skip
        i, j = tw.indices("m n")
        cond = where(A[i, j], B[i, j])
        tw.update(columns).append[start[i]](j, over=j, where=cond)
        return tw.update(values).append[start[i]](A[i, j] + B[i, j], over=j, where=cond)

    return p


@pytest.mark.parametrize("fmt", LISTS)
@pytest.mark.parametrize("where", CONDITIONS)
def test_lists_are_filled_row_by_row(where, fmt, rng):
    a, b = some(rng, (5, 9)), some(rng, (5, 9))
    rows, cols = np.nonzero(CONDITIONS[where][1](a, b))
    start = np.searchsorted(rows, np.arange(5)) + 2  # the first two elements belong to nobody
    program = lists(CONDITIONS[where][0]).decompose(A=LISTS[fmt], B=tw.csr())
    args = {"A": pack(LISTS[fmt], a), "B": pack(tw.csr(), b), "start": start.astype(np.int64)}

    def outputs():
        return {
            "columns": np.full(len(rows) + 3, -7, "i"),
            "values": np.full(len(rows) + 3, -7, "f"),
        }

    after_every_pass(program, args | outputs())
    for target in TARGETS:
        to = outputs()
        program.build(target)(**args, **to)
        np.testing.assert_array_equal(to["columns"], [-7, -7, *cols, -7])
        np.testing.assert_array_equal(to["values"], [-7, -7, *(a + b)[rows, cols], -7])


@pytest.mark.parametrize("target", TARGETS)
def test_a_list_stays_inside_its_array(target, rng):
    a = np.ones((3, 4), np.float32)
    start = np.array([-2, 3, 1 << 40])
    columns, values = np.full(6, -7, np.int32), np.full(6, -7, np.float32)
    kernel = lists(CONDITIONS["a"][0]).build(target)
    kernel(tw.csr().pack(a), tw.csr().pack(a), start, columns, values)
    np.testing.assert_array_equal(columns, [2, 3, -7, 0, 1, 2])
    np.testing.assert_array_equal(values, [2, 2, -7, 2, 2, 2])


BAD_LISTS = {
    "of what is known at run time": lambda a, b: tw.stored(a) & (b > 0),
    "of what is not stored": lambda a, b: ~tw.stored(a),
    "of two conditions": lambda a, b: (tw.stored(a) & (a > 0)) | tw.stored(b),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_lists_need_conditions_on_what_is_stored(name):
    with pytest.raises(ProgramError) as e:
        lists(BAD_LISTS[name]).lower()
    assert e.value.code == "P107" and e.value.hint


def test_words_are_checked_when_traced():
    def append(to):
        return tw.update(to).append

    def traced(statement):
        @tw.program
        def p(A=tw.sparse("m n"), X=tw.dense("m n"), y=tw.dense("m")):
            i, j = tw.indices("m n")
            return statement(A, X, y, i, j)

    for code, statement in (
        ("P103", lambda A, X, y, i, j: tw.out[i](tw.sum(1, over=j, where=tw.stored(X[i, j])))),
        ("P103", lambda A, X, y, i, j: tw.out[i](tw.sum(1, over=j, where=tw.stored(A)))),
        ("P106", lambda A, X, y, i, j: tw.out[i](tw.sum(1, over=j, where=A[i, j]))),
        ("P106", lambda A, X, y, i, j: tw.out[i](tw.any(A[i, j], over=j).cast("int32"))),
        ("P104", lambda A, X, y, i, j: append(X)[i, 0](1.0, over=j, where=tw.stored(A[i, j]))),
        ("P104", lambda A, X, y, i, j: append(y)[i](1.0, over=(i, j), where=tw.stored(A[i, j]))),
    ):  # fmt: skip
        with pytest.raises(ProgramError) as e:
            traced(statement)
        assert e.value.code == code and e.value.hint, statement


# --------------------------------------------------------------------------------- row workspaces


def product(value, where=None):
    """Columns and values of a product of A and B."""

    @tw.program
    def p(
        A=tw.sparse("m k"), B=tw.sparse("k n"), start=tw.dense("m", "int64"),
        columns=tw.dense("c", "int32"), values=tw.dense("c"),
    ):  # fmt: skip
        i, k, j = tw.indices("m k n")
        meets = tw.any(tw.stored(A[i, k]) & tw.stored(B[k, j]), over=k)
        tw.update(columns).append[start[i]](j, over=j, where=meets)
        return tw.update(values).append[start[i]](value(A, B, i, j, k), over=j, where=meets)

    return p


@tw.program
def meeting(A=tw.sparse("m k"), B=tw.sparse("k n")):
    i, k, j = tw.indices("m k n")
    meets = tw.any(tw.stored(B[k, j]) & tw.stored(A[i, k]), over=k)
    count = tw.out.named("count")[i](tw.sum(1, over=j, where=meets))
    most = tw.out.named("most")[i](tw.max(tw.sum(A[i, k] * B[k, j], over=k), over=j, where=meets))
    return count, most


@pytest.mark.parametrize("fmt", LISTS)
def test_rows_of_products_are_gathered(fmt, rng):
    a, b = some(rng, (4, 6)), some(rng, (6, 7))
    c, met = a.astype(np.float64) @ b, (a != 0).astype(int) @ (b != 0) > 0
    args: dict[str, Any] = {"A": pack(LISTS[fmt], a), "B": pack(LISTS[fmt], b)}
    program = meeting.decompose(A=LISTS[fmt], B=LISTS[fmt])
    after_every_pass(program, args)
    for target in TARGETS:
        count, most = program.build(target)(**args)
        np.testing.assert_array_equal(count, met.sum(1))
        np.testing.assert_allclose(most, np.where(met, c, -np.inf).max(1), rtol=2e-5)
    rows, cols = np.nonzero(met)
    args["start"] = np.searchsorted(rows, np.arange(4)).astype(np.int64)
    program = product(lambda A, B, i, j, k: 2.0 * tw.sum(B[k, j] * A[i, k], over=k) + 1.0)
    program = program.decompose(A=LISTS[fmt], B=LISTS[fmt])
    n = len(rows)
    after_every_pass(program, args | {"columns": np.zeros(n, "i"), "values": np.zeros(n, "f")})
    for target in TARGETS:
        columns, values = np.full(n, -7, "i"), np.full(n, np.nan, "f")
        program.build(target)(**args, columns=columns, values=values)
        np.testing.assert_array_equal(columns, cols)
        np.testing.assert_allclose(values, 2 * c[rows, cols] + 1, rtol=2e-5, atol=2e-5)


@tw.program
def masked(A=tw.sparse("m k"), B=tw.sparse("k n"), M=tw.sparse("m n")):
    i, k, j = tw.indices("m k n")
    meets = tw.any(tw.stored(A[i, k]) & tw.stored(B[k, j]), over=k) & tw.stored(M[i, j])
    value = M[i, j] * tw.sum(A[i, k] * B[k, j], over=k)
    return tw.out[i](tw.sum(value, over=j, where=meets))


@pytest.mark.parametrize("fmt", LISTS)
def test_rows_of_products_are_masked(fmt, rng):
    a, b, m = some(rng, (4, 6)), some(rng, (6, 7)), some(rng, (4, 7))
    args = {"A": pack(tw.csr(), a), "B": pack(tw.csr(), b), "M": pack(LISTS[fmt], m)}
    program = masked.decompose(M=LISTS[fmt])
    after_every_pass(program, args)
    for target in TARGETS:
        got = program.build(target)(**args)
        wanted = (m * (a.astype(np.float64) @ b)).sum(1)
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@tw.program
def dense_product(P=tw.sparse("m k"), M=tw.sparse("k n")):
    i, k, j = tw.indices("m k n")
    return tw.out[i, j](tw.sum(M[k, j] * P[i, k], over=k))


@pytest.mark.parametrize("of_m", [*LISTS.values(), tw.csc(), tw.coo(), tw.bsr(2)], ids=str)
@pytest.mark.parametrize("of_p", [tw.csr(), tw.dcsr(), tw.csc()], ids=str)
def test_dense_products_follow_both_operands(of_p, of_m, rng):
    """In lists the columns of a row of M are walked below k: no search, no loop over columns."""
    a, b = some(rng, (5, 6)), some(rng, (6, 7))
    program = dense_product.decompose(P=of_p, M=of_m)
    args = {"P": pack(of_p, a), "M": pack(of_m, b)}
    after_every_pass(program, args)
    for target in TARGETS:
        out = np.full((5, 7), np.nan, np.float32)
        program.build(target)(**args, out=out)
        np.testing.assert_allclose(out, a.astype(np.float64) @ b, rtol=2e-5, atol=2e-5)
    if of_p == tw.csr() and of_m in LISTS.values():
        assert merges(program) == [("union", 1)]
        rows = program.schedule(lambda s: s.parallel("m")).build("cpp")
        np.testing.assert_allclose(rows(**args), a.astype(np.float64) @ b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "value",
    [
        lambda A, B, i, j, k: tw.sum(A[i, k] * (B[k, j] + 1.0), over=k),
        lambda A, B, i, j, k: tw.max(A[i, k] * B[k, j], over=k),
        lambda A, B, i, j, k: tw.sum(A[i, k] * B[k, j], over=k) * tw.sum(A[i, k], over=k),
    ],
)
def test_a_row_holds_one_sum(value):
    with pytest.raises(ProgramError, match="a row of a product holds one sum") as e:
        product(value).lower()
    assert e.value.code == "P107" and e.value.hint


@pytest.mark.parametrize("fmt", [tw.csc(), tw.coo(), tw.bsr(2), tw.ell(4)], ids=str)
def test_products_of_what_is_no_list_are_refused(fmt):
    with pytest.raises(ProgramError, match="cannot be merged") as e:
        meeting.decompose(B=fmt).lower()
    assert e.value.code == "P107"


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_of_a_product_stays_inside_its_array(target, rng):
    """What is stored at computed coordinates, of which some are far outside."""

    @tw.program
    def counts(A=tw.sparse("m k"), B=tw.sparse("k n"), at=tw.dense("m", "int32"), Y=tw.dense("r")):
        i, k, j = tw.indices("i:m k:k j:n")
        meets = tw.any(tw.stored(A[i, k]) & tw.stored(B[k, j]), over=k)
        return tw.update(Y)[at[i]](tw.sum(1.0, over=j, where=meets))

    a, b = some(rng, (6, 5)), some(rng, (5, 7))
    whole = np.full(40, np.nan, np.float32)
    at = np.array([0, 15, 4, -3, 2, -(2**31)], np.int32)
    counts.build(target)(tw.csr().pack(a), tw.csr().pack(b), at, whole[20:24])
    number = ((a != 0).astype(int) @ (b != 0)).astype(bool).sum(1)
    assert whole[20] == number[0] and whole[22] == number[4]
    assert np.isnan(np.delete(whole, (20, 22))).all()


def test_a_product_is_not_added_to_what_is_there():
    @tw.program
    def added(A=tw.sparse("m k"), B=tw.sparse("k n"), Y=tw.dense("m")):
        i, k, j = tw.indices("i:m k:k j:n")
        meets = tw.any(tw.stored(A[i, k]) & tw.stored(B[k, j]), over=k)
        return tw.update(Y).add[i](tw.sum(1.0, over=j, where=meets))

    with pytest.raises(ProgramError) as e:
        added.lower()
    assert e.value.code == "P107" and e.value.hint


def test_a_gpu_has_no_row_workspace():
    with pytest.raises(ScheduleError, match="memory of a CPU") as e:
        meeting.build("cuda:sm_90a")
    assert e.value.code == "S103" and e.value.hint


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_merges_compile_for_a_gpu(arch):
    rows = [reduced(body) for body in (UNIONS["a + b"], PRODUCTS["a b"])]
    for program in (*rows, lists(CONDITIONS["a | b"][0])):
        scheduled = program.schedule(
            lambda s: s.split("m", 32, into=("u", "v")).bind("u", "cta.x").bind("v", "thread.x")
        )
        kernel = scheduled.build(f"cuda:{arch}")
        assert "while (" in kernel.source
