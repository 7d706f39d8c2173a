"""What programs mean, against plain NumPy: shadowed indices, outputs that formats leave out, stored
coordinates that are no entries, reductions that several structures share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tilewright as tw
from tilewright.errors import ArgumentError, InternalError, ProgramError
from tilewright.ir.levels import Compressed, Dense, Fixed
from tilewright.lower import nests

TARGETS = ("interp", "cpp")
BLOCKS = tw.Composed(
    "csr + bsr", ((tw.Where(3), tw.csr()), (tw.Where(0, 2), tw.bsr(2))), disjoint_rows=True
)
GAPS = tw.Composed(
    "csr + ragged", ((tw.Where(0, None, 0, 2), tw.csr()), (tw.Where(0, None, 1, 2), tw.ragged()))
)
PIECES = tw.Format("pieces", (Compressed(0, chunk=2), Dense(1)))
ROWS_3D = {  # formats of three dimensions: rows that are not stored at different levels
    "csf": tw.csf(3),
    "dense rows": tw.Format("dense rows", (Dense(0), Dense(1), Compressed(2))),
    "listed rows": tw.Format("listed rows", (Dense(0), Compressed(1), Compressed(2))),
    "listed relations": tw.Format("listed relations", (Compressed(0), Dense(1), Compressed(2))),
    "blocks of rows": tw.Format(
        "blocks of rows",
        (Dense(0), Compressed(1, block=2), Dense(1, block=2, inner=True), Compressed(2)),
    ),
    "columns outside": tw.Format("columns outside", (Dense(0), Compressed(2), Compressed(1))),
}


def run(program, target, *args, shape=None, dtype=np.float32):
    """The result, written over an output that is all NaN."""
    kernel = program.build(target)
    if shape is None:
        return kernel(*args)
    return kernel(*args, out=np.full(shape, np.nan, dtype))


def some(rng, shape, density=0.6):
    """Small whole numbers, never 0, with gaps."""
    values = rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)
    return np.where(rng.random(shape) < density, values, 0).astype(np.float32)


def close(got, wanted):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=2e-5, atol=2e-5, equal_nan=True)


# ------------------------------------------------------------------- indices with a name used twice


@tw.program
def softmax_of_columns(Q=tw.dense("m d"), K=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    e = tw.exp(tw.sum(Q[i, k] * K[j, k], over=k))
    return tw.out[i, j](e / tw.sum(e, over=i))


@tw.program
def softmax_of_rows(Q=tw.dense("m d"), K=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    e = tw.exp(tw.sum(Q[i, k] * K[j, k], over=k))
    return tw.out[i, j](e / tw.sum(e, over=j))


@pytest.mark.parametrize("target", TARGETS)
def test_dense_softmax_in_one_expression(target, rng):
    Q, K = rng.standard_normal((3, 4)).astype("f"), rng.standard_normal((5, 4)).astype("f")
    e = np.exp(Q.astype(np.float64) @ K.T)
    close(run(softmax_of_columns, target, Q, K, shape=(3, 5)), e / e.sum(0))
    close(run(softmax_of_rows, target, Q, K, shape=(3, 5)), e / e.sum(1, keepdims=True))


@tw.program
def edge_softmax(A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    e = tw.exp(A[i, j] * tw.sum(Q[i, k] * K[j, k], over=k))
    return tw.out.like(A)[i, j](e / tw.sum(e, over=j))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.csc(), tw.hyb(), tw.dcsr(), tw.ell(6),
                                 tw.bsr(2)], ids=str)  # fmt: skip
def test_edge_softmax_in_one_expression(fmt, target, rng):
    A = np.ones((4, 6), "f") if str(fmt) == "bsr(2)" else some(rng, (4, 6))
    Q, K = rng.standard_normal((4, 3)).astype("f"), rng.standard_normal((6, 3)).astype("f")
    e = np.where(A != 0, np.exp(A * (Q.astype(np.float64) @ K.T)), 0)
    wanted = np.divide(e, e.sum(1, keepdims=True), where=e != 0, out=np.zeros_like(e))
    close(edge_softmax.decompose(A=fmt).build(target)(fmt.pack(A), Q, K).dense(), wanted)


@tw.program
def weighted_columns(A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d")):
    i, j, k = tw.indices("m n d")
    e = tw.exp(tw.sum(Q[i, k] * K[j, k], over=k))
    return tw.out[i, j](e / tw.sum(A[i, j] * e, over=j))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.csc(), tw.hyb(), tw.dcsr(), tw.bsr(2)],
                         ids=str)  # fmt: skip
def test_a_row_sum_of_what_the_output_has_too(fmt, target, rng):
    A = np.abs(some(rng, (4, 6)))
    Q, K = rng.standard_normal((4, 3)).astype("f"), rng.standard_normal((6, 3)).astype("f")
    e = np.exp(Q.astype(np.float64) @ K.T)
    with np.errstate(divide="ignore"):
        wanted = e / (A * e).sum(1, keepdims=True)
    close(weighted_columns.decompose(A=fmt).build(target)(fmt.pack(A), Q, K), wanted)


@tw.program
def column_norm(A=tw.sparse("m n"), C=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out.like(C)[i, j](C[i, j] / (10.5 + tw.sum(A[i, j] * C[i, j], over=i)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.coo(), tw.csc(), tw.dcsr(), tw.bsr(2)], ids=str)
def test_a_second_sparse_operand_under_a_shadowed_row(fmt, target, rng):
    A, C = some(rng, (3, 5)), some(rng, (3, 5))
    wanted = np.where(C != 0, C / (10.5 + (A * C).sum(0)), 0)
    program = column_norm.decompose(C=fmt)
    close(program.build(target)(tw.csr().pack(A), fmt.pack(C)).dense(), wanted)


@tw.program
def nested(X=tw.dense("n"), Y=tw.dense("e m")):
    q, i, l = tw.indices("q:m i:n l:e")
    return tw.out[q, i](tw.sum(tw.sum(X[i] + Y[l, q], over=l), over=q))


@tw.program
def nested_alike(X=tw.dense("n n"), Y=tw.dense("n")):
    i, j = tw.indices("n n")
    inner = tw.sum(X[i, j] * Y[j], over=j)  # a number for each i, under a sum over another j
    return tw.out[i](tw.sum(inner * X[j, i], over=j))


@pytest.mark.parametrize("target", TARGETS)
def test_nested_reductions_over_the_same_index(target, rng):
    X, Y = rng.standard_normal(2).astype("f"), rng.standard_normal((2, 3)).astype("f")
    total = (X.astype(np.float64)[:, None, None] + Y).sum((1, 2))
    close(run(nested, target, X, Y, shape=(3, 2)), np.broadcast_to(total, (3, 2)))
    X, Y = rng.standard_normal((4, 4)).astype("f"), rng.standard_normal(4).astype("f")
    close(run(nested_alike, target, X, Y, shape=(4,)), (X @ Y.astype(np.float64)) * X.sum(0))


def test_a_reduction_over_an_index_that_only_an_inner_one_uses_is_refused():
    with pytest.raises(ProgramError, match="does not use") as e:

        @tw.program
        def p(X=tw.dense("n")):
            i = tw.indices("n")
            return tw.out[()](tw.sum(tw.sum(X[i], over=i), over=i))

    assert e.value.code == "P104"


@tw.program
def conditional(X=tw.dense("n"), Y=tw.dense("n")):
    i = tw.indices("n")
    return tw.out[i](tw.where(X[i] > 0, tw.sum(Y[i + 1], over=i), 0.0))


@tw.program
def conditional_sparse(A=tw.sparse("m n"), Y=tw.dense("n")):
    i, j = tw.indices("m n")
    total = tw.sum(tw.where(A[i, j] > 0, Y[j + 1], 0.0), over=j)
    return tw.out.like(A)[i, j](tw.where(A[i, j] > 0, total, 0.0))


@pytest.mark.parametrize("target", TARGETS)
def test_a_condition_is_not_captured_by_a_sum(target, rng):
    X, Y = np.array([1, -1, 1], "f"), np.array([1, 2, 3], "f")
    close(run(conditional, target, X, Y, shape=(3,)), [5, 0, 5])
    A, Y = some(rng, (4, 5)), rng.standard_normal(5).astype("f")
    total = ((A > 0) * np.append(Y[1:], 0)).sum(1, keepdims=True)
    got = conditional_sparse.build(target)(tw.csr().pack(A), Y)
    close(got.dense(), (A > 0) * total)


# ------------------------------------------------------------- elements that no stored entry visits


@tw.program
def sum_of_row_sums(A=tw.sparse("m n"), X=tw.dense("m d")):
    i, j, k = tw.indices("m n d")
    return tw.out[i](tw.sum(X[i, k] + tw.sum(A[i, j], over=j), over=k))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.dcsr(), tw.bucket(3), tw.dbsr(1), tw.dbsr(2),
                                 tw.hyb(buckets=(1, 2)), tw.csf(2)], ids=repr)  # fmt: skip
def test_rows_that_are_not_listed(fmt, target, rng):
    A, X = np.zeros((5, 3), "f"), rng.standard_normal((5, 2)).astype("f")
    A[1], A[4, 2] = [1, 2, 3], 4
    wanted = X.sum(1) + 2 * A.sum(1)
    close(run(sum_of_row_sums.decompose(A=fmt), target, fmt.pack(A), X, shape=(5,)), wanted)


@tw.program
def relation_rows(A=tw.sparse("r m n")):
    r, i, j = tw.indices("r m n")
    return tw.out[r, i](tw.sum(A[r, i, j], over=j))


@tw.program
def relation_rows_and_more(A=tw.sparse("r m n"), X=tw.dense("m d")):
    r, i, j, k = tw.indices("r m n d")
    return tw.out[r, i, k](X[i, k] * tw.exp(tw.sum(A[r, i, j], over=j)) + tw.sum(X[i, k], over=k))


@tw.program
def largest_row(A=tw.sparse("r m n")):
    r, i, j = tw.indices("r m n")
    return tw.out[r](tw.max(tw.sum(A[r, i, j], over=j), over=i))


@tw.program
def product_of_rows(A=tw.sparse("r m n")):
    r, i, j = tw.indices("r m n")
    return tw.out[r](tw.prod(2.0 + tw.sum(A[r, i, j], over=j), over=i))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", list(ROWS_3D))
def test_three_dimensions_with_rows_left_out(fmt, target, rng):
    fmt = ROWS_3D[fmt]
    A = -np.abs(some(rng, (3, 5, 4), 0.3))
    A[:, 2] = A[1] = 0
    A[0, 0, 0] = -3
    X = rng.standard_normal((5, 2)).astype("f")
    rows = A.astype(np.float64).sum(2)
    more = X * np.exp(rows)[..., None] + X.sum(1)[:, None]
    packed = fmt.pack(A)

    def check(program, shape, wanted, *args):
        close(run(program.decompose(A=fmt), target, packed, *args, shape=shape), wanted)

    check(relation_rows, (3, 5), rows)
    check(largest_row, (3,), rows.max(1))
    check(product_of_rows, (3,), (2 + rows).prod(1))
    check(relation_rows_and_more, (3, 5, 2), more, X)


@tw.program
def attention(A=tw.sparse("m n"), Q=tw.dense("m d"), K=tw.dense("n d"), V=tw.dense("n v")):
    i, j, k, v = tw.indices("m n d v")
    e = tw.exp(A[i, j] * tw.sum(Q[i, k] * K[j, k], over=k))
    return tw.out[i, v](tw.sum(e * V[j, v], over=j) / (1.0 + tw.sum(e, over=j)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.hyb(), tw.dcsr(), tw.ell(6), tw.bucket(6)], ids=str)
def test_graph_attention_in_one_expression(fmt, target, rng):
    A = some(rng, (5, 6), 0.5)
    A[3] = 0
    Q, K, V = (rng.standard_normal(s).astype("f") for s in ((5, 3), (6, 3), (6, 2)))
    e = np.where(A != 0, np.exp(A * (Q.astype(np.float64) @ K.T)), 0)
    wanted = e @ V / (1 + e.sum(1, keepdims=True))
    close(run(attention.decompose(A=fmt), target, fmt.pack(A), Q, K, V, shape=(5, 2)), wanted)


# -------------------------------------------------------- coordinates that are stored several times


def reductions_of(body):
    """Reductions of `body(value)` over the columns, by operation."""

    def of(op):
        @tw.program
        def p(A=tw.sparse("m n")):
            i, j = tw.indices("m n")
            return tw.out[i](op(body(A[i, j]), over=j))

        return p

    return {"sum": of(tw.sum), "max": of(tw.max), "min": of(tw.min), "prod": of(tw.prod)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [PIECES, GAPS], ids=str)
@pytest.mark.parametrize("op", ["max", "min", "prod", "sum"])
def test_zeros_stored_again_are_no_values(op, fmt, target):
    with pytest.raises(ProgramError, match="more than once") as e:
        reductions_of(lambda a: a + 0.5)[op].decompose(A=fmt).build(target)
    assert e.value.code == "P107" and e.value.hint


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [PIECES, GAPS], ids=str)
def test_zeros_stored_again_do_not_matter_where_they_add_nothing(fmt, target):
    A = np.array([[1, 2, 3, 0], [0, 1, 0, 0], [-1, -1, -1, -1]], "f")
    program = reductions_of(lambda a: 2.0 * a * a)["sum"].decompose(A=fmt)
    close(run(program, target, fmt.pack(A), shape=(3,)), (2 * A * A).sum(1))
    program = reductions_of(tw.exp)["prod"].decompose(A=fmt)  # exp(0) is 1
    close(run(program, target, fmt.pack(A), shape=(3,)), np.exp(A.sum(1)))


# ----------------------------------------------------------------------- the value of missing slots


@tw.program
def shortest(A=tw.sparse("m n", fill=float("inf")), x=tw.dense("n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.min(A[i, j] + x[j], over=j))


@tw.program
def distances(A=tw.sparse("m n", fill=float("inf")), x=tw.dense("n")):
    i, j = tw.indices("m n")
    return tw.out[i, j](A[i, j] + x[j])


BLOCKED = (tw.bsr(2), tw.bsr(3), tw.ragged(), tw.dbsr(2), tw.csr(), tw.ell(5), tw.hyb(), BLOCKS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", BLOCKED, ids=str)
def test_slots_without_an_entry_hold_the_fill(fmt, target, dtype, rng):
    A, x = some(rng, (4, 5), 0.4), rng.integers(-3, 4, 5).astype("f")
    A[2] = 0
    full = np.where(A != 0, A, np.inf)
    packed = fmt.pack(A, fill=float("inf"), dtype=dtype)
    wanted = (full + x).min(1)
    program = shortest.decompose(A=fmt).typed(A=dtype)
    if dtype == "float64":
        program, x = program.typed(A=dtype, x=dtype), x.astype(dtype)
    close(run(program, target, packed, x, shape=(4,), dtype=x.dtype), wanted)
    again = packed.with_values(packed.entry_values(), dtype=dtype)
    close(run(program, target, again, x, shape=(4,), dtype=x.dtype), wanted)
    program = distances.decompose(A=fmt).typed(**dict(program.dtypes))
    close(run(program, target, packed, x, shape=(4, 5), dtype=x.dtype), full + x)
    if dtype != "bfloat16":
        np.testing.assert_array_equal(again.dense(), full)


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_packed_with_another_fill_are_refused(target, rng):
    A, x = some(rng, (4, 5)), np.zeros(5, "f")
    for fmt in (tw.bsr(2), tw.ragged(), BLOCKS):
        kernel = shortest.decompose(A=fmt).build(target)
        good = fmt.pack(A, fill=float("inf"))
        kernel(good, x)
        bad = replace(fmt.pack(A), structure=good.structure)  # of a layout that was called before
        with pytest.raises(ArgumentError, match=r"fill=0.*fill=inf") as e:
            kernel(bad, x)
        assert e.value.code == "A106" and "fill=inf" in e.value.hint
    kernel = shortest.decompose(A=tw.csr()).build(target)  # which has no slots but entries
    close(kernel(tw.csr().pack(A), x), np.where(A != 0, A, np.inf).min(1))


# --------------------------------------------------------- reductions that several structures share


def two(body):
    @tw.program
    def p(A=tw.sparse("m n"), B=tw.sparse("m n")):
        i, j = tw.indices("m n")
        return tw.out[i](tw.sum(body(A[i, j], B[i, j]), over=j))

    return p


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "body",
    [lambda a, b: a + b, lambda a, b: b + a, lambda a, b: (b + 0.5) * a,
     lambda a, b: np.exp(a) * b if isinstance(a, np.ndarray) else tw.exp(a) * b,
     lambda a, b: np.maximum(a, b) if isinstance(a, np.ndarray) else tw.maximum(a, b)],
)  # fmt: skip
def test_the_order_of_operands_never_decides(body, target, rng):
    """A sum is that over all coordinates, whichever operand is written first."""
    A, B = some(rng, (4, 6)), some(rng, (4, 6))
    close(two(body).build(target)(tw.csr().pack(A), tw.csr().pack(B)), body(A, B).sum(1))


@pytest.mark.parametrize(
    "body", [lambda a, b: tw.exp(a) + b, lambda a, b: b + tw.exp(a), lambda a, b: a * b + 1.0]
)
def test_sums_that_several_structures_leave_open_are_refused(body):
    with pytest.raises(ProgramError, match=r"structures of A and B share") as e:
        two(body).lower()
    assert e.value.code == "P107" and "where=tw.stored(A[m, n])" in e.value.hint


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fmt", [tw.csr(), tw.dcsr(), tw.bsr(2), tw.hyb(), tw.coo()], ids=str)
def test_products_of_two_structures(fmt, target, rng):
    A, B = some(rng, (4, 6)), some(rng, (4, 6))
    for body in (lambda a, b: a * b, lambda a, b: a * (b + 0.5), lambda a, b: -a * 2.0 * b):
        kernel = two(body).decompose(A=fmt).build(target)
        close(kernel(fmt.pack(A), tw.csr().pack(B)), body(A, B).sum(1))
    kernel = two(lambda a, b: b * a).decompose(B=fmt).build(target)
    close(kernel(tw.csr().pack(A), fmt.pack(B)), (A * B).sum(1))


def test_values_of_one_structure_are_no_second_structure(rng):
    @tw.program
    def p(A=tw.sparse("m n"), B=tw.sparse("m n", like="A")):
        i, j = tw.indices("m n")
        return tw.out[i](tw.sum(A[i, j] + B[i, j], over=j))

    A = some(rng, (4, 6))
    packed = tw.csr().pack(A)
    values = rng.standard_normal(packed.nnz).astype("f")
    other = packed.with_values(values)
    for target in TARGETS:
        close(p.build(target)(packed, other), (A + other.dense()).sum(1))


def test_a_level_that_pads_is_not_read(rng):
    """Slots of ELL without an entry are no coordinates, whatever they hold."""
    fmt = tw.Format("rows of slots", (Compressed(0), Fixed(1, width=5)))
    A, x = some(rng, (4, 5), 0.4), np.zeros(5, "f")
    for target in TARGETS:
        kernel = shortest.decompose(A=fmt).build(target)
        close(kernel(fmt.pack(A), x), np.where(A != 0, A, np.inf).min(1))


def test_padding_that_holds_a_fill_is_guarded_on_a_gpu():
    """Padding that holds 0 is multiplied as it is; ∞ times the 0 of a missing row would be NaN."""

    def product(fill):
        @tw.program
        def p(A=tw.sparse("m n", fill=fill), X=tw.dense("n d")):
            i, j, k = tw.indices("m n d")
            return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))

        return str(p.decompose(A=tw.ell(2)).lower("cuda:sm_90a"))

    assert "where(n >= 0, A.values" in product(float("inf"))
    assert "where(n >= 0, A.values" not in product(0.0)


@pytest.mark.parametrize("fmt", ["csf", "listed rows", "listed relations", "blocks of rows"])
def test_the_verifier_sees_an_element_that_is_not_stored(fmt, monkeypatch):
    program = relation_rows_and_more.decompose(A=ROWS_3D[fmt])
    program.lower()
    monkeypatch.setattr(nests, "visits_all", lambda tables, spec: True)
    with pytest.raises(InternalError, match="some elements of out are not stored"):
        program.lower()


# ---------------------------------------------------------------------------- mean and argmax


@tw.program
def dense_means(X=tw.dense("m n 3"), N=tw.dense("m n", "int32"), D=tw.dense("m n", "float64")):
    """Of all coordinates of two indices; of integers; of float64; where a condition holds."""
    i, j, k = tw.indices("m n 3")
    return (
        tw.out.named("all")[i](tw.mean(X[i, j, k], over=(j, k))),
        tw.out.named("of_integers")[i](tw.mean(N[i, j], over=j)),
        tw.out.named("wide")[i](tw.mean(D[i, j], over=j)),
        tw.out.named("some")[i](tw.mean(D[i, j], over=j, where=N[i, j] > 0)),
        tw.out.named("largest")[i](tw.argmax(D[i, j], over=j)),
        tw.out.named("largest_of_some")[i](tw.argmax(D[i, j], over=j, where=N[i, j] > 0)),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_means_and_argmax_of_dense_operands(target, rng):
    X, N = rng.standard_normal((7, 9, 3)).astype(np.float32), rng.integers(-3, 4, (7, 9), np.int32)
    D = rng.integers(0, 5, (7, 9)).astype(np.float64) / 3  # many equal values
    N[4], N[2, :3] = -1, 1
    kept = N > 0
    mean, integers, wide, some_mean, largest, of_some = dense_means.build(target)(X, N, D)
    assert (integers.dtype, wide.dtype, largest.dtype) == (np.float32, np.float64, np.int32)
    close(mean, X.mean((1, 2), dtype=np.float64))
    close(integers, N.mean(1))
    np.testing.assert_allclose(wide, D.mean(1), rtol=1e-14)
    np.testing.assert_allclose(
        some_mean,
        [x[k].mean() if k.any() else np.nan for x, k in zip(D, kept, strict=True)],
        rtol=1e-14,
    )
    np.testing.assert_array_equal(largest, D.argmax(1))
    wanted = np.where(kept, D, -1).argmax(1)
    np.testing.assert_array_equal(of_some, np.where(kept.any(1), wanted, np.iinfo(np.int32).max))
    D[2, 5] = np.nan  # some coordinate, of those that are asked for
    *_, largest, of_some = dense_means.build(target)(X, N, D)
    assert 0 <= largest[2] < 9 and kept[2, of_some[2]]


@tw.program
def mean_of_neighbours(A=tw.sparse("m n"), B=tw.sparse("m n"), X=tw.dense("n d")):
    """Rows of X by stored coordinates, whatever their values are; by those of either of two."""
    i, j, k = tw.indices("m n d")
    either = tw.stored(A[i, j]) | tw.stored(B[i, j])
    of_one = tw.out.named("one")[i, k](tw.mean(X[j, k], over=j, where=tw.stored(A[i, j])))
    return of_one, tw.out.named("either")[i, k](tw.mean(X[j, k], over=j, where=either))


@tw.program
def means_where(A=tw.sparse("m n")):
    """Of the stored coordinates, those for which a condition of coordinates holds."""
    i, j = tw.indices("m n")
    square = A[i, j] * A[i, j]
    largest = tw.argmax(A[i, j], over=j, where=j <= i)
    return tw.out.named("mean")[i](tw.mean(square, over=j, where=j <= i)), tw.out[i](largest)


@pytest.mark.parametrize("target", TARGETS)
def test_means_of_stored_coordinates_where_a_condition_holds(target, rng):
    A = some(rng, (9, 7), 0.5)
    kept = (A != 0) & np.tri(9, 7, dtype=bool)
    mean, largest = means_where.build(target)(tw.csr().pack(A))
    for got, at, row, k in zip(mean, largest, A, kept, strict=True):
        if k.any():
            np.testing.assert_allclose(got, (row[k] ** 2).mean(), rtol=1e-6)
            assert at == np.flatnonzero(k)[row[k].argmax()]
        else:
            assert np.isnan(got) and at == np.iinfo(np.int32).max


@pytest.mark.parametrize("target", TARGETS)
def test_a_mean_over_stored_coordinates(target, rng):
    A, B = some(rng, (8, 6), 0.3), some(rng, (8, 6), 0.3)
    A[2], B[2] = 0, 0
    X, pack = rng.standard_normal((6, 4)).astype(np.float32), tw.csr().pack
    one, either = mean_of_neighbours.build(target)(pack(A), pack(B), X)
    for got, mask in ((one, A != 0), (either, (A != 0) | (B != 0))):
        assert np.isnan(got[2]).all()
        number = mask.sum(1, keepdims=True)
        close(
            got[number[:, 0] > 0],
            (mask.astype(np.float64) @ X / np.maximum(number, 1))[number[:, 0] > 0],
        )


@tw.program
def means_beside_sums(A=tw.sparse("m n"), X=tw.dense("d m"), Q=tw.dense("n h")):
    """A mean over rows, weighed by sums of stored entries; one over stored entries, by head."""
    i, j, c, h = tw.indices("m n d h")
    score = tw.temp.like(A).named("score")[i, j, h](A[i, j] * Q[j, h])
    rows = tw.out.named("rows")[c](tw.mean(X[c, i] * tw.sum(A[i, j], over=j), over=i))
    number = tw.sum(1, over=j, where=tw.stored(score[i, j, h]))
    return (
        rows,
        tw.out.named("heads")[i, h](tw.mean(score[i, j, h], over=j)),
        tw.out.named("number").typed("int32")[i, h](number),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_what_inner_sums_and_heads_range_over(target, rng):
    """Sparse operands of an inner sum drive that sum alone; dense dimensions behind a structure are
    no coordinates of it."""
    A, X, Q = (
        some(rng, (7, 5), 0.7),
        *(rng.standard_normal(s).astype(np.float32) for s in ((2, 7), (5, 3))),
    )
    A[:, 0] = 1
    rows, heads, number = means_beside_sums.build(target)(tw.csr().pack(A), X, Q)
    close(rows, (X * A.sum(1, dtype=np.float64)).mean(1))
    stored = (A != 0).sum(1, keepdims=True)
    close(heads, A.astype(np.float64) @ Q / stored)
    np.testing.assert_array_equal(number, np.broadcast_to(stored, (7, 3)))


# ---------------------------------------------------------------------- two reads of one structure


@tw.program
def weighted_sums(A=tw.sparse("m n"), B=tw.sparse("m n")):
    i, j, k = tw.indices("i:m j:n k:n")
    return tw.out[i](2.0 * tw.sum(B[i, k] * tw.sum(A[i, j], over=j), over=k))


@tw.program
def added_products(A=tw.sparse("m n"), B=tw.sparse("m n"), W=tw.dense("n n")):
    i, j, k = tw.indices("i:m j:n k:n")
    return tw.out[i, j](A[i, j] + tw.sum(B[i, k] * W[k, j], over=k))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "fmt", [tw.csr(), tw.hyb(buckets=(1, 2)), tw.hyb(2, (1,)), BLOCKS], ids=str
)
def test_sums_over_another_structure_than_the_one_in_parts(fmt, target, rng):
    A, B, W = some(rng, (5, 6), 0.4), some(rng, (5, 6)), some(rng, (6, 6))
    wanted = 2.0 * B.sum(1) * A.sum(1)
    args = fmt.pack(A), tw.csr().pack(B)
    close(run(weighted_sums.decompose(A=fmt), target, *args, shape=(5,)), wanted)
    close(run(added_products.decompose(A=fmt), target, *args, W, shape=(5, 6)), A + B @ W)


@tw.program
def pairs(A=tw.sparse("m n")):
    i, j, k = tw.indices("i:m j:n k:n")
    return tw.out[i, j, k](A[i, k] + A[i, j])


def test_pairs_of_entries(rng):
    A = some(rng, (4, 5))
    close(run(pairs, "cpp", tw.csr().pack(A), shape=(4, 5, 5)), A[:, None, :] + A[:, :, None])
    with pytest.raises(ProgramError, match="no loop follows") as e:
        pairs.decompose(A=tw.hyb()).lower()
    assert e.value.code == "P107" and e.value.hint


# ------------------------------------------------------------------------------------- conditions


@tw.program
def any_positive(A=tw.sparse("m n")):
    i, j = tw.indices("m n")
    return tw.out[i](tw.any(A[i, j] > 0, over=j).cast("float32"))


@tw.program
def limited(X=tw.dense("m n"), last=tw.dense("m", "int32"), used=tw.dense("m", "uint8")):
    i, j = tw.indices("m n")
    most = tw.sum(tw.where(j <= last[i], X[i, j], 0.0), over=j)
    return tw.out[i](most), tw.out.named("rest")[i](
        tw.sum(tw.where(used[i] > 0, X[i, j], 0.0), over=j)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_conditions_at_the_limits_of_their_numbers(target, rng):
    A = some(rng, (4, 5))
    A[1] = 0
    wanted = (A > 0).any(1)
    close(run(any_positive, target, tw.csr().pack(A), shape=(4,)), wanted)
    X = some(rng, (4, 3))
    last = np.array([1, 2**31 - 1, -(2**31), 0], np.int32)
    used = np.array([0, 1, 255, 0], np.uint8)
    most, rest = limited.build(target)(X, last, used)
    close(most, (X * (np.arange(3) <= last[:, None])).sum(1))
    close(rest, (X * (used > 0)[:, None]).sum(1))
