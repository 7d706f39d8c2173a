"""The meaning: the evaluator against plain NumPy and Python loops; the rules of the language."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiler.cases import (
    DENSE,
    FORMATS,
    MATRICES,
    OTHER,
    SPARSE,
    SQUARE,
    arguments,
    attention,
    farthest,
    filled,
    gather_rows,
    gemm,
    logsumexp,
    matrix,
    numbers,
    rgcn,
    row_max,
    sddmm,
    softmax,
    spmm,
    spmm_t,
    square,
    triangles,
    two_sparse,
)  # fmt: skip
from tests.compiler.pointwise import pointwise

import tilewright as tw
from tilewright import dtypes
from tilewright.reference import evaluate as module
from tilewright.reference.evaluate import evaluate

SEEDS = st.integers(0, 2**32 - 1)


def dense(packed) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of what is stored, explicit zeros too."""
    coords, values = packed.unpack()
    out, mask = np.zeros(packed.shape), np.zeros(packed.shape, bool)
    out[coords], mask[coords] = values, True
    return out, mask


def by_hand(program, args):
    """The results of a program as a person writes them with dense NumPy arrays."""
    name = program.name
    d, mask = dense(args["A"])
    a = {k: numbers(np.asarray(v), "float32") for k, v in args.items() if isinstance(v, np.ndarray)}
    with np.errstate(all="ignore"):
        if name == "spmm":
            return d @ a["X"]
        if name == "spmm_t":
            return d.T @ a["X"]
        if name == "row_max":
            products = np.where(mask[:, :, None], d[:, :, None] * a["X"][None], -np.inf)
            return products.max(axis=1, initial=-np.inf)
        if name == "sddmm":
            return (d * (a["P"] @ a["Q"].T))[mask]
        if name == "sddmm_plain":
            return (a["P"] @ a["Q"].T)[mask]
        if name == "softmax":
            e = np.where(
                mask,
                np.exp(d - np.where(mask, d, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)),
                0,
            )
            return (e / e.sum(axis=1, keepdims=True))[mask]
        if name == "logsumexp":
            return np.log(np.where(mask, np.exp(d), 0).sum(axis=1))
        if name == "rgcn":
            r, _ = dense(args["R"])
            return sum((d * (r == n)) @ a["X"] @ w for n, w in enumerate(a["W"]))
        if name == "both_ways":
            return {"down": d @ a["X"], "up": d.T @ a["Z"]}
    raise AssertionError(name)


@settings(max_examples=120)
@given(
    st.sampled_from(SPARSE),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(MATRICES),
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from((8, 56, 1 << 25)),
    SEEDS,
)
def test_against_dense_arrays(program, fmt, kind, m, n, chunk, seed):
    """Whatever the format, the matrix, and the pieces in which it is computed."""
    program = program.decompose(A=FORMATS[fmt])
    args = arguments(program, np.random.default_rng(seed), kind, m=m, n=n)
    wanted = by_hand(program, args)
    before = module.LIMIT_BYTES
    module.LIMIT_BYTES = chunk
    try:
        got = evaluate(program.program, args)
        single = evaluate(program.program, args, exact=False)
    finally:
        module.LIMIT_BYTES = before
    for name, value in (wanted if isinstance(wanted, dict) else {"out": wanted}).items():
        assert got[name].dtype == np.float64 and single[name].dtype == np.float32
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(single[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["csr", "coo", "ell", "ragged", "bsr", "dbsr", "hyb 3 split"])
@pytest.mark.parametrize("program", (*SPARSE, *SQUARE, *OTHER, filled), ids=lambda p: p.name)
def test_against_loops(program, fmt, rng):
    """Every point by itself, in Python."""
    program = program.decompose(A=FORMATS[fmt])
    check_pointwise(program, arguments(program, rng, m=4, n=4, d=2))


@pytest.mark.parametrize("program", DENSE, ids=lambda p: p.name)
def test_dense_programs_against_loops(program, rng):
    check_pointwise(program, arguments(program, rng, m=4, n=3, k=5))


def check_pointwise(program, args):
    wanted, got = pointwise(program.program, args), evaluate(program.program, args)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_dense_arguments_stand_for_sparse_ones(rng):
    d = matrix("random", 5, 6, rng)
    x = rng.normal(size=(6, 3))
    np.testing.assert_allclose(evaluate(spmm.program, {"A": d, "X": x})["out"], d @ x)
    r = rng.integers(0, 3, d.shape)
    args = arguments(rgcn, rng, m=5, n=6)
    got = evaluate(rgcn.program, {**args, "A": d, "R": r})["out"]
    wanted = sum((d * (r == n)) @ args["X"] @ w for n, w in enumerate(args["W"].astype(float)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_empty_reductions_give_the_identity():
    empty = tw.csr().pack(np.zeros((3, 4), np.float32))
    x = np.ones((4, 2), np.float32)
    assert (evaluate(spmm.program, {"A": empty, "X": x})["out"] == 0).all()
    assert (evaluate(row_max.program, {"A": empty, "X": x})["out"] == -np.inf).all()
    assert evaluate(softmax.program, {"A": empty})["out"].shape == (0,)


def test_what_is_not_stored_is_not_read(rng):
    args = arguments(spmm, rng, "diagonal", m=3, n=6)
    args["X"][3:] = np.nan
    assert np.isfinite(evaluate(spmm.program, args)["out"]).all()


def test_missing_coordinates_read_the_fill(rng):
    args = arguments(filled, rng, "sparse")
    d, mask = dense(args["A"])
    wanted = np.where(mask, d * args["X"], -1.0)
    np.testing.assert_allclose(evaluate(filled.program, args)["out"], wanted, rtol=1e-6)


def test_the_coordinates_that_where_names_are_followed(rng):
    """A max over k of B[j, k] * A[i, k] where B is stored follows B, and reads 0 where A stores
    nothing."""
    args = arguments(farthest, rng, "random", n=6)
    (a, _), (b, stored) = dense(args["A"]), dense(args["B"])
    rows, cols = args["A"].unpack()[0]
    wanted = [
        max((b[j, k] * a[i, k] for k in np.flatnonzero(stored[j])), default=-np.inf)
        for i, j in zip(rows, cols, strict=True)
    ]
    np.testing.assert_allclose(evaluate(farthest.program, args)["out"], wanted, rtol=1e-6)


def test_two_sparse_operands(rng):
    args = arguments(two_sparse, rng, "random")
    (a, mask), (b, _) = dense(args["A"]), dense(args["B"])
    wanted = np.where(mask, a * (b + 0.5), 0).sum(axis=1)
    np.testing.assert_allclose(evaluate(two_sparse.program, args)["out"], wanted, rtol=1e-6)
    args = arguments(triangles, rng, "random", n=6)
    (a, mask), (b, _) = dense(args["A"]), dense(args["B"])
    np.testing.assert_allclose(
        evaluate(triangles.program, args)["out"], (a * (a @ b.T))[mask], rtol=1e-6
    )


def test_one_dimension_under_two_indices(rng):
    args = arguments(square, rng, n=5)
    (d, _), x = dense(args["A"]), args["X"].astype(float)
    wanted = x + d @ x - d.sum(axis=1, keepdims=True) * x
    np.testing.assert_allclose(evaluate(square.program, args)["out"], wanted, rtol=1e-6, atol=1e-7)


def test_temporaries_and_later_statements(rng):
    args = arguments(attention, rng)
    _, mask = dense(args["A"])
    q, k, v = (args[n].astype(float) for n in "QKV")
    s = np.where(mask, q @ k.T, -np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - s.max(axis=1, keepdims=True))
        wanted = np.nan_to_num(e / e.sum(axis=1, keepdims=True)) @ v
    np.testing.assert_allclose(
        evaluate(attention.program, args)["out"], wanted, rtol=1e-6, atol=1e-9
    )


def test_the_arm_not_taken_is_not_read(rng):
    table, at = rng.normal(size=(4, 3)), np.array([2, -1, 0, -7])
    got = evaluate(gather_rows.program, {"T": table, "at": at})["out"]
    np.testing.assert_array_equal(got, np.where(at[:, None] >= 0, table[at * (at >= 0)], 0))
    far = evaluate(gather_rows.program, {"T": table, "at": np.array([4, 2**31 - 1])})["out"]
    assert not far.any()  # nor is anything read outside


def test_narrow_floats_are_rounded_where_the_program_says(rng):
    program = gemm.typed(A="bfloat16", B="bfloat16")
    args = arguments(program, rng)
    exact = evaluate(program.program, args)["out"]
    bits = evaluate(program.program, args, exact=False)["out"]
    assert bits.dtype == np.uint16
    np.testing.assert_allclose(numbers(bits, "bfloat16"), exact, rtol=2**-8, atol=1e-6)
    plain = numbers(args["A"], "bfloat16") @ numbers(args["B"], "bfloat16")
    np.testing.assert_allclose(exact, plain, rtol=1e-12)


def test_whole_number_arithmetic():
    @tw.program
    def unpacked(W=tw.dense("n", dtype="uint8")):
        i, h = tw.indices("i:n h:2")
        return tw.out.typed("int32")[i, h]((W[i] >> (h * 4).cast("uint8")) & 15)

    w = np.array([0x5A, 0xF0], np.uint8)
    assert evaluate(unpacked.program, {"W": w})["out"].tolist() == [[10, 5], [0, 15]]


@tw.program
def integers(a=tw.dense("n", "int32"), b=tw.dense("n", "int32")):
    i = tw.indices("n")
    results = (
        a[i] + b[i], a[i] - b[i], a[i] * b[i], a[i] // b[i], a[i] % b[i],
        a[i] << b[i], a[i] >> b[i], tw.maximum(a[i], b[i]), -a[i], tw.abs(a[i]),
    )  # fmt: skip
    return tuple(tw.out.named(f"y{n}")[i](x) for n, x in enumerate(results))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_integers_wrap_and_every_result_is_defined(dtype, rng):
    """Against Python's integers, which never wrap; `//` and `%` by 0 are 0, wide shifts shift all
    out."""
    kind = dtypes.dtype(dtype)
    some = [
        0,
        1,
        2,
        3,
        7,
        8,
        31,
        32,
        63,
        64,
        100,
        -1,
        -2,
        -7,
        kind.least,
        kind.least + 1,
        kind.most,
    ]
    a, b = (np.array([kind.wrapped(x) for x in col], kind.numpy).ravel() for col in
            zip(*((x, y) for x in some for y in some), strict=True))  # fmt: skip
    got = evaluate(integers.typed(a=dtype, b=dtype).program, {"a": a, "b": b})

    def shifted(x, y):
        return x >> (y if 0 <= y < kind.bits else kind.bits)

    by_hand = (
        lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y,
        lambda x, y: x // y if y else 0, lambda x, y: x % y if y else 0,
        lambda x, y: x << y if 0 <= y < kind.bits else 0, shifted,
        max, lambda x, y: -x, lambda x, y: abs(x),
    )  # fmt: skip
    for n, act in enumerate(by_hand):
        wanted = [kind.wrapped(act(int(x), int(y))) for x, y in zip(a, b, strict=True)]
        assert got[f"y{n}"].dtype == kind.numpy and got[f"y{n}"].tolist() == wanted, f"y{n}"


@pytest.mark.parametrize("to", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("exact", [True, False])
def test_floats_out_of_range_become_the_nearest_integer(to, exact):
    @tw.program
    def converted(x=tw.dense("n", "float64")):
        i = tw.indices("n")
        return tw.out[i](x[i].cast(to))

    kind = dtypes.dtype(to)
    x = np.array([2.9, -2.9, -0.5, 1e30, -1e30, 2.0**31, 2.0**63, 300.7, np.inf, -np.inf, np.nan])
    wanted = [0 if v != v else kind.most if v > 1e300 else kind.least if v < -1e300
              else min(max(int(v), kind.least), kind.most) for v in x.tolist()]  # fmt: skip
    got = evaluate(converted.program, {"x": x}, exact=exact)["out"]
    assert got.dtype == kind.numpy and got.tolist() == wanted


def test_coordinates_wrap_in_their_type():
    @tw.program
    def far(x=tw.dense("n"), w=tw.dense("n", "int64")):
        i = tw.indices("n")
        return tw.out[i]((i + 2147483647).cast("int64") + w[i])

    x, w = np.zeros(3, np.float32), np.zeros(3, np.int64)
    wrapped = [2147483647, -2147483648, -2147483647]
    assert evaluate(far.program, {"x": x, "w": w})["out"].tolist() == wrapped
    wide = [2147483647, 2147483648, 2147483649]
    assert evaluate(far.typed(index="int64").program, {"x": x, "w": w})["out"].tolist() == wide


# ---------------------------------------------------------------------------- scopes


def test_names_mean_what_the_innermost_reduction_binds(rng):
    """Reductions over indices of the output, with reductions and conditions around them."""

    @tw.program
    def scopes(Q=tw.dense("m d"), K=tw.dense("n d"), X=tw.dense("m"), A=tw.sparse("m n")):
        i, j, k = tw.indices("m n d")
        e = tw.exp(tw.sum(Q[i, k] * K[j, k], over=k))
        columns = tw.out.named("columns")[i, j](e / tw.sum(e, over=i))
        inner = tw.sum(X[i] + K[j, k], over=k)
        shadowed = tw.out.named("shadowed")[i, j](tw.sum(inner, over=j))
        captured = tw.out.named("captured")[i](tw.where(X[i] > 0, tw.sum(X[i + 1], over=i), 0.0))
        norms = tw.out.like(A).named("norms")[i, j](A[i, j] / tw.sum(A[i, j] * A[i, j], over=i))
        return columns, shadowed, captured, norms

    Q, K, X = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), np.array([1.0, -1, 2, -3])
    A = matrix("random", 4, 5, rng)
    args = {"Q": Q, "K": K, "X": X, "A": tw.csr().pack(A)}
    got = evaluate(scopes.program, args)
    E = np.exp(Q @ K.T)
    np.testing.assert_allclose(got["columns"], E / E.sum(0), rtol=1e-12)
    rows = 15 * X[:, None] + K.sum() + np.zeros((4, 5))
    np.testing.assert_allclose(got["shadowed"], rows, rtol=1e-12)
    np.testing.assert_allclose(got["captured"], np.where(X > 0, X[1:].sum(), 0), rtol=1e-12)
    with np.errstate(invalid="ignore"):
        norms = (A / (A.astype(float) ** 2).sum(0))[A != 0]
    np.testing.assert_allclose(got["norms"], norms, rtol=1e-6)
    check_pointwise(scopes, args)


def test_a_coordinate_of_a_format_of_parts_counts_once():
    from tilewright.ir.levels import Compressed, Dense

    pieces = tw.Format("pieces", (Compressed(0, chunk=2), Dense(1)))
    M = np.array([[1, 2, 3, 0], [0, 1, 0, 0]], np.float32)
    both = FORMATS["csr + bsr"].pack(M)
    # Parts beside blocks take whole blocks: no coordinate is stored twice.
    assert sum(p.size for p in both.structure.parts) == len(both.unpack()[1])
    E = np.exp(M.astype(float))
    stored = dense(both)[1]
    sums = evaluate(logsumexp.decompose(A=both.format).program, {"A": both})["out"]
    np.testing.assert_allclose(sums, np.log(np.where(stored, E, 0).sum(1)), rtol=1e-12)
    negative = pieces.pack(-np.ones((1, 4), np.float32))
    x = np.ones((4, 1))
    largest = evaluate(row_max.decompose(A=pieces).program, {"A": negative, "X": x})["out"]
    assert largest.tolist() == [[-1]]


@pytest.mark.parametrize("fmt", ["csr", "dcsr", "coo", "bsr", "dbsr"])
def test_every_element_of_an_output_is_written(fmt, rng):
    """Rows that a format does not list are rows: a sum over their entries is empty."""

    @tw.program
    def rows(A=tw.sparse("m n"), X=tw.dense("m d")):
        i, j, k = tw.indices("m n d")
        outer = tw.out.named("outer")[i](tw.sum(X[i, k] + tw.sum(A[i, j], over=j), over=k))
        return outer, tw.out.named("most")[()](tw.max(tw.sum(A[i, j], over=j), over=i))

    M = np.zeros((5, 4), np.float32)
    M[2, 1] = -1
    X = rng.normal(size=(5, 3))
    program = rows.decompose(A=FORMATS[fmt])
    got = evaluate(program.program, {"A": FORMATS[fmt].pack(M), "X": X})
    np.testing.assert_allclose(got["outer"], X.sum(1) + 3 * M.sum(1), rtol=1e-12)
    assert got["most"] == 0  # of the rows without entries


def test_updates_leave_the_arguments_alone(rng):
    @tw.program
    def shift(x=tw.dense("n"), y=tw.dense("n")):
        i = tw.indices("n")
        return tw.update(x)[(i + 1) % tw.size("n")](y[i] * 2.0)

    x, y = rng.normal(size=5), rng.normal(size=5)
    before = x.copy()
    np.testing.assert_allclose(evaluate(shift.program, {"x": x, "y": y})["x"], np.roll(2 * y, 1))
    np.testing.assert_array_equal(x, before)


def test_sizes_must_agree(rng):
    with pytest.raises(tw.TilewrightError, match="A103"):
        evaluate(spmm.program, {"A": np.eye(3), "X": np.ones((4, 2))})


def test_a_large_product_stays_small_in_memory(rng):
    """1000 × 1000 × 1000 points are never made at once."""
    import tracemalloc

    a, b = rng.normal(size=(1000, 1000)), rng.normal(size=(1000, 1000))
    tracemalloc.start()
    got = evaluate(gemm.program, {"A": a, "B": b})["out"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(got, a @ b, rtol=1e-9, atol=1e-9)
    assert peak < 200e6
    args = arguments(sddmm, rng, "random", m=300, n=300, d=64)
    d, mask = dense(args["A"])
    wanted = (d * (args["P"].astype(float) @ args["Q"].T))[mask]
    np.testing.assert_allclose(evaluate(sddmm.program, args)["out"], wanted, rtol=1e-9, atol=1e-9)
    many = arguments(spmm_t, rng, "random", m=300, n=200, d=64)
    np.testing.assert_allclose(
        evaluate(spmm_t.program, many)["out"],
        dense(many["A"])[0].T @ many["X"],
        rtol=1e-9,
        atol=1e-9,
    )


def test_all_axes_of_an_operand_reduced_beside_another_index(rng):
    """Each point of the output ranges over every stored coordinate, none of which it binds."""

    @tw.program
    def total(A=tw.sparse("m n"), X=tw.dense("m d")):
        i, j, k = tw.indices("i:m j:n k:d")
        return tw.out[k](tw.max(A[i, j] * X[i, k], over=(i, j)))

    dense = rng.standard_normal((4, 5)) * (rng.random((4, 5)) < 0.5)
    x = rng.standard_normal((4, 3))
    products = np.where(dense[..., None] != 0, dense[..., None] * x[:, None], -np.inf)
    got = evaluate(total.program, {"A": dense, "X": x})["out"]
    np.testing.assert_allclose(got, products.max((0, 1)))
