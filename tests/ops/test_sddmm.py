"""SDDMM: formats, widths, dtypes and hostile arguments, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.ops.cases import close, normal
from tests.ops.test_spmm import exact, matrix, of_type

import tilewright as tw
from tilewright import dtypes, ops
from tilewright.errors import ArgumentError, ScheduleError
from tilewright.ir.nodes import If, ReduceThreads
from tilewright.ir.rewrite import walk
from tilewright.ops.sddmm import gpu_recipe, sddmm_program
from tilewright.sparse.pack import Packed

FORMATS = {"csr": tw.csr(), "dcsr": tw.dcsr(), "coo": tw.coo()}
WIDTHS = (1, 7, 16, 33, 40, 128, 200)
UNIT = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-49}


def poisoned(a: Packed, dtype: str = "float32") -> Packed:
    """An output of the structure of `a` in which no value is right."""
    values = tuple(np.full(v.shape, np.nan, dtype) for v in a.values)
    return replace(a, values=values, dtype=dtypes.dtype(dtype))


def wanted(a: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ∘ (P Qᵀ) in float64, and the same of absolute values."""
    return a * (p @ q.T), np.abs(a) * (np.abs(p) @ np.abs(q).T)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", WIDTHS)
def test_formats_and_widths(rng, fmt, d):
    for m, n in ((50, 40), (3, 100), (1, 1)):
        a = matrix(rng, m, n)
        packed, p, q = FORMATS[fmt].pack(a), normal(rng, m, d), normal(rng, n, d)
        out = poisoned(packed)
        assert ops.sddmm(packed, p, q, out=out) is out
        result, size = wanted(a, p.astype(np.float64), q.astype(np.float64))
        close(out.dense(), result, size + 1e-6, UNIT["float32"])
        again = ops.sddmm(packed, p, q)
        assert again.structure is packed.structure
        np.testing.assert_array_equal(again.entry_values(), out.entry_values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(rng, dtype):
    a = matrix(rng, 30, 20)
    for d in (7, 48):
        p, q = (of_type(normal(rng, rows, d), dtype) for rows in (30, 20))
        out = ops.sddmm(tw.csr().pack(a), p, q)
        assert out.dtype.name == dtype
        got = out.dense()
        got = dtypes.bfloat16_values(got) if dtype == "bfloat16" else got
        result, size = wanted(a, exact(p), exact(q))
        close(got, result, size + 1e-6, UNIT[dtype])


def test_empty_matrices(rng):
    for m, n in ((0, 5), (5, 0), (4, 6)):
        for fmt in FORMATS.values():
            out = ops.sddmm(
                fmt.pack(np.zeros((m, n), np.float32)), normal(rng, m, 16), normal(rng, n, 16)
            )
            assert out.nnz == 0 and out.shape == (m, n)


def test_an_empty_sum(rng):
    a = tw.csr().pack(matrix(rng, 6, 5))
    out = ops.sddmm(a, np.empty((6, 0), np.float32), np.empty((5, 0), np.float32))
    assert (out.entry_values() == 0).all()


def test_packing():
    a = np.array([[0, 2.0], [3, 0]], np.float32)
    packed = ops.pack_for_sddmm(a)
    assert packed.format == tw.csr() and packed.dtype.name == "float32"
    np.testing.assert_array_equal(packed.dense(), a)
    assert ops.pack_for_sddmm(a, dtype="float16").dtype.name == "float16"


def test_wrong_arguments(rng):
    a = tw.csr().pack(matrix(rng, 6, 5))
    p, q = normal(rng, 6, 16), normal(rng, 5, 16)
    out = poisoned(a)
    other = tw.csr().pack(matrix(rng, 6, 5))
    for code, args, given in (
        ("A103", (a, p[:5], q), out),
        ("A103", (a, p, q[:, :15].copy()), out),
        ("A103", (a, p, q[0]), out),
        ("A104", (a, np.asfortranarray(p), q), out),
        ("A106", (np.eye(5), p, q), out),
        ("A106", (tw.hyb().pack(np.eye(5)), p, q), out),
        ("A106", (tw.bsr(2).pack(np.eye(6)), p, q), out),
        ("A107", (a, p, q.tolist()), out),
        ("A107", (a, p, np.float32(3)), out),
        ("A102", (a, p > 0, q), out),
        ("A102", (a, p, q > 0), out),
        ("A106", (a, p, q), other),
        ("A102", (a, p, q), poisoned(a, "float64")),
        ("A108", (a, p, q), a),
    ):
        for _ in range(2):  # the second call may take the shorter way
            with pytest.raises(ArgumentError) as caught:
                ops.sddmm(*args, out=given)  # type: ignore[arg-type]
            assert caught.value.code == code, args
    assert np.isnan(out.entry_values()).all()
    ops.sddmm(a, p, q, out=out)
    assert np.isfinite(out.entry_values()).all()
    with pytest.raises(ArgumentError, match="A108"):
        ops.sddmm(a, p, q, out=a)


def test_reads_as_the_mathematics():
    assert "A[i, j] * P[i, k] * Q[j, k] over k" in str(sddmm_program)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", WIDTHS)
def test_the_schedule_of_a_gpu_run_on_the_cpu(rng, fmt, d):
    """Its loops, guards and indices, one thread after the other."""
    made = sddmm_program.decompose(A=FORMATS[fmt])
    kernel = made.schedule(lambda s: gpu_recipe(s.specialize("d", d))).build("cpp")
    for m, n in ((50, 40), (3, 100), (1, 1)):
        a = matrix(rng, m, n)
        packed, p, q = FORMATS[fmt].pack(a), normal(rng, m, d), normal(rng, n, d)
        out = poisoned(packed)
        kernel(packed, p, q, out=out)
        result, size = wanted(a, p.astype(np.float64), q.astype(np.float64))
        close(out.dense(), result, size + 1e-6, UNIT["float32"])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", [7, 33, 128])
def test_threads_that_sum_together_are_never_parted(fmt, d):
    """The guard of the last entries stands around loads and stores, not around the exchange."""
    made = sddmm_program.decompose(A=FORMATS[fmt])
    lowered = made.schedule(lambda s: gpu_recipe(s.specialize("d", d))).lower("cuda:sm_90a")
    body = lowered.stages[0][0].body
    guarded = [x for s in walk(body) if isinstance(s, If) for x in walk(s)]
    assert any(isinstance(x, ReduceThreads) for x in walk(body))
    assert not any(isinstance(x, ReduceThreads) for x in guarded)


def test_a_sum_across_more_threads_than_a_warp_is_refused():
    start = sddmm_program.schedule(lambda s: s.specialize("d", 64).split("k", 64))
    with pytest.raises(ScheduleError) as caught:
        start.scheduled("cuda:sm_90a").bind("k_i", "thread.x")
    assert caught.value.code == "S102" and "64 threads" in caught.value.message


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", WIDTHS)
def test_on_a_gpu(rng, fmt, d):
    from tilewright.runtime.cuda import DeviceArray

    for m, n in ((50, 40), (3, 3000), (1000, 30), (1, 1)):
        a = matrix(rng, m, n)
        packed = FORMATS[fmt].pack(a)
        p, q = normal(rng, m, d), normal(rng, n, d)
        there = packed.to("cuda")
        out = replace(there, values=poisoned(packed).to("cuda").values)
        ops.sddmm(there, DeviceArray.from_numpy(p), DeviceArray.from_numpy(q), out=out)
        result, size = wanted(a, p.astype(np.float64), q.astype(np.float64))
        close(out.dense(), result, size + 1e-6, 2.0**-19)


def test_bfloat16_values_are_bits_whatever_numpy_has_learned(rng):
    pytest.importorskip("ml_dtypes")  # importing it teaches NumPy a bfloat16
    p, q = (of_type(normal(rng, rows, 16), "bfloat16") for rows in (30, 20))
    out = ops.sddmm(tw.csr().pack(matrix(rng, 30, 20)), p, q)
    assert out.values[0].dtype == np.uint16
