"""The meaning itself: the evaluator against plain NumPy, and the rules the language promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiler.cases import (
    FORMATS,
    MATRICES,
    SPARSE,
    arguments,
    attention,
    farthest,
    filled,
    gather_rows,
    gemm,
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

import tilewright as tw
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


def test_the_first_operand_with_the_axis_is_followed(rng):
    """A max over k of B[j, k] * A[i, k] follows B, and reads 0 where A stores nothing."""
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
