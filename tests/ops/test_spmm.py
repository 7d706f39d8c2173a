"""SpMM on the CPU: formats, widths that fill tiles and leave tails, dtypes; against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.cases import close, normal, poisoned

import tilewright as tw
from tilewright import ops
from tilewright.errors import ArgumentError, BuildError, FormatError
from tilewright.ir.levels import Compressed, Dense, Fixed
from tilewright.ops.spmm import (
    by_length,
    choose_format,
    gpu_recipe,
    spmm_definition,
    spmm_program,
)  # fmt: skip
from tilewright.sparse.pack import Packed

FORMATS = {
    "csr": tw.csr(),
    "hyb": tw.hyb(buckets=(1, 2, 4)),
    "by_length": by_length((1, 2, 4, 8), giant=16),
}
PIECES = {"coo": tw.coo(), "csc": tw.csc()}  # a row is met again after others

WIDTHS = (1, 7, 16, 33, 128)
UNIT = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-50}


def matrix(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Rows of all lengths, none among them; values away from 0."""
    share = rng.choice([0.0, 0.02, 0.1, 0.5, 1.0], (m, 1))
    signs = rng.choice([-1.0, 1.0], (m, n))
    return np.where(rng.random((m, n)) < share, signs * rng.uniform(0.5, 2, (m, n)), 0).astype(
        np.float32
    )


def bfloat16(x: np.ndarray) -> Any:
    return pytest.importorskip("torch").from_numpy(x).bfloat16()


def exact(x: Any) -> np.ndarray:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double().numpy()


def of_type(x: np.ndarray, dtype: str) -> Any:
    return bfloat16(x) if dtype == "bfloat16" else x.astype(dtype)


def growth(a: np.ndarray) -> np.ndarray:
    """How much more than one rounding a row's sum may be off, (rows, 1).

    Rounding errors of n additions add up as √n, not as n (Higham and Mary, 2019, theorem 3.1).
    """
    return np.maximum(1, np.sqrt(np.count_nonzero(a, axis=1, keepdims=True)) / 2)


def check(a: np.ndarray, packed: Packed, x: Any, unit: float, out: Any = None) -> None:
    y = ops.spmm(packed, x, out=out)
    assert y.dtype == x.dtype and type(y) is type(x) and (out is None or y is out)
    wanted, size = a.astype(np.float64) @ exact(x), np.abs(a) @ np.abs(exact(x))
    close(exact(y), wanted, (size + np.abs(wanted)) * growth(a), unit)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("d", WIDTHS)
def test_formats_and_widths(rng, fmt, d):
    for m, n in ((50, 40), (3, 100)):
        a = matrix(rng, m, n)
        check(a, FORMATS[fmt].pack(a), normal(rng, n, d), UNIT["float32"], poisoned(m, d))


@pytest.mark.parametrize("fmt", PIECES)
@pytest.mark.parametrize("d", (*WIDTHS, 32, 48))
def test_rows_in_pieces(rng, fmt, d):
    for m, n in ((50, 40), (3, 100), (0, 4), (4, 0)):
        a = matrix(rng, m, n)
        check(a, PIECES[fmt].pack(a), normal(rng, n, d), UNIT["float32"], poisoned(m, d))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(rng, fmt, dtype):
    a = matrix(rng, 30, 20)
    for d in (7, 48):
        check(a, FORMATS[fmt].pack(a), of_type(normal(rng, 20, d), dtype), UNIT[dtype])


def test_values_in_half_precision(rng):
    a = matrix(rng, 30, 20).astype(np.float16)
    check(
        a.astype(np.float64),
        tw.csr().pack(a),
        normal(rng, 20, 33).astype(np.float16),
        UNIT["float16"],
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_coordinates_in_int64(rng, fmt):
    a = matrix(rng, 30, 20)
    packed = FORMATS[fmt].pack(a, index="int64")
    assert packed.structure.index_dtype.name == "int64"
    check(a, packed, normal(rng, 20, 33), UNIT["float32"], poisoned(30, 33))
    kernel = spmm_program.typed(index="int64").decompose(A=FORMATS[fmt]).build()
    x = normal(rng, 20, 5)
    np.testing.assert_allclose(kernel(packed, x), a @ x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="int64"):
        spmm_program.decompose(A=FORMATS[fmt]).build()(packed, x)


@pytest.mark.parametrize("d", WIDTHS)
def test_blocked_formats(rng, d):
    tile = Dense(0, block=2, inner=True), Dense(1, block=2, inner=True)
    ell = tw.Format("blocked ell", (Dense(0, block=2), Fixed(1, block=2, width=10), *tile))
    for fmt in (ell, tw.bsr(2), tw.dbsr(3)):
        a = matrix(rng, 25, 19)
        check(a, fmt.pack(a), normal(rng, 19, d), UNIT["float32"], poisoned(25, d))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (4, 6)])
def test_empty_matrices(rng, shape):
    for fmt in FORMATS.values():
        a = np.zeros(shape, np.float32)
        y = poisoned(shape[0], 16)
        ops.spmm(fmt.pack(a), normal(rng, shape[1], 16), out=y)
        assert (y == 0).all()


def test_columns_of_none(rng):
    assert ops.spmm(tw.csr().pack(matrix(rng, 4, 5)), np.empty((5, 0), np.float32)).shape == (4, 0)


def test_another_matrix_and_other_values_take_the_same_kernel(rng):
    from tilewright.toolchain import disk_cache

    first, second = matrix(rng, 40, 30), matrix(rng, 25, 35)
    x = normal(rng, 30, 32)
    packed = ops.pack_for_spmm(first)
    ops.spmm(packed, x)
    compiled = disk_cache.stats.compiled
    check(second, ops.pack_for_spmm(second), normal(rng, 35, 32), UNIT["float32"])
    changed = packed.with_values(3 * packed.entry_values())
    check(3 * first, changed, x, UNIT["float32"])
    assert disk_cache.stats.compiled == compiled


def test_the_same_result_every_time(rng):
    a = FORMATS["by_length"].pack(matrix(rng, 200, 100))
    x = normal(rng, 100, 128)
    first = ops.spmm(a, x)
    for _ in range(5):
        np.testing.assert_array_equal(ops.spmm(a, x), first)


def test_formats_chosen_for_a_gpu_hold_every_matrix(rng):
    for m, n in ((50, 40), (3, 100), (0, 4)):
        a = matrix(rng, m, n)
        fmt = choose_format(int(np.count_nonzero(a)), "cuda")
        np.testing.assert_array_equal(fmt.pack(a).dense(), a)
    assert choose_format(10, "cpp") == tw.csr()


def test_wrong_arguments(rng):
    a, x = tw.csr().pack(matrix(rng, 6, 5)), normal(rng, 5, 16)
    y = poisoned(6, 16)
    for code, args in (
        ("A103", (a, normal(rng, 6, 16))),
        ("A103", (a, x[0])),
        ("A104", (a, np.asfortranarray(normal(rng, 5, 16)))),
        ("A107", (a, [[1.0] * 16] * 5)),
        ("A107", (a, np.float32(3))),
        ("A107", (a, None)),
        ("A102", (a, x > 0)),
        ("A102", (a, x.astype(complex))),
        ("A106", (a.dense(), x)),
        ("A106", (None, x)),
        ("A106", (tw.Format("v", (Compressed(0),)).pack(np.ones(5)), x)),
    ):
        with pytest.raises(ArgumentError) as caught:
            ops.spmm(*args, out=y)  # type: ignore[arg-type]
        assert caught.value.code == code and caught.value.where.startswith("argument"), args
    for code, out in (
        ("A103", poisoned(6, 17)),
        ("A102", poisoned(6, 16, dtype=np.float64)),
        ("A107", "y"),
    ):
        with pytest.raises(ArgumentError) as caught:
            ops.spmm(a, x, out=out)
        assert caught.value.code == code
    assert np.isnan(y).all()


@pytest.mark.parametrize("pack", [ops.pack_for_spmm, ops.pack_for_sddmm])
def test_packing_for_an_operator(rng, pack):
    for nothing in (None, "x", (1, 2), 5):
        with pytest.raises(FormatError, match="F102"):
            pack(nothing)
    for target in ("tpu", 5, "cuda:sm_1"):
        with pytest.raises(BuildError, match="B103"):
            pack(np.eye(2), target=target)
    a = matrix(rng, 6, 5)
    coo = np.nonzero(a)
    for given in (a, (coo, a[coo], a.shape), bfloat16(a)):
        packed = pack(given, target="cpu")
        assert packed.nnz == len(coo[0]) and packed.format == tw.csr()


@pytest.mark.parametrize(
    ("fmt", "many"), [*((fmt, False) for fmt in FORMATS | PIECES), ("by_length", True)]
)
@pytest.mark.parametrize("d", WIDTHS)
def test_the_schedule_of_a_gpu_run_on_the_cpu(rng, fmt, many, d):
    """Its loops, guards and indices, one thread after the other."""
    made = spmm_program.decompose(A=(FORMATS | PIECES)[fmt])
    kernel = made.schedule(lambda s: gpu_recipe(s.specialize("d", d), many=many)).build("cpp")
    for m, n in ((50, 40), (3, 100)):
        a, x, y = matrix(rng, m, n), normal(rng, n, d), poisoned(m, d)
        kernel((FORMATS | PIECES)[fmt].pack(a), x, out=y)
        wanted, size = a.astype(np.float64) @ x, np.abs(a).astype(np.float64) @ np.abs(x)
        close(y, wanted, size * growth(a) + 1e-6, UNIT["float32"])


@pytest.mark.gpu
@pytest.mark.parametrize("d", WIDTHS)
def test_on_a_gpu(rng, d):
    from tilewright.runtime.cuda import DeviceArray

    for m, n in ((50, 40), (3, 3000), (2000, 30)):
        a = matrix(rng, m, n)
        x, y = normal(rng, n, d), DeviceArray.from_numpy(poisoned(m, d))
        ops.spmm(ops.pack_for_spmm(a, "cuda"), DeviceArray.from_numpy(x), out=y)
        wanted, size = a.astype(np.float64) @ x, np.abs(a).astype(np.float64) @ np.abs(x)
        close(y.to_numpy(), wanted, size + 1, 2.0**-19)


@pytest.mark.gpu
@pytest.mark.parametrize("d", WIDTHS)
def test_threads_with_several_rows_on_a_gpu(rng, d):
    from tilewright.runtime.cuda import DeviceArray

    fmt = FORMATS["by_length"]
    kernel = spmm_definition(fmt, "float32", "float32", d, many=True).build("cuda")
    for m, n in ((50, 40), (3, 3000), (2000, 30)):
        a = matrix(rng, m, n)
        x, y = normal(rng, n, d), DeviceArray.from_numpy(poisoned(m, d))
        kernel(fmt.pack(a).to("cuda"), DeviceArray.from_numpy(x), out=y)
        wanted, size = a.astype(np.float64) @ x, np.abs(a).astype(np.float64) @ np.abs(x)
        close(y.to_numpy(), wanted, size + 1, 2.0**-19)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", PIECES)
@pytest.mark.parametrize("d", WIDTHS)
def test_rows_in_pieces_on_a_gpu(rng, fmt, d):
    from tilewright.runtime.cuda import DeviceArray

    for m, n in ((50, 40), (3, 3000), (0, 4)):
        a = matrix(rng, m, n)
        x, y = normal(rng, n, d), DeviceArray.from_numpy(poisoned(m, d))
        ops.spmm(PIECES[fmt].pack(a).to("cuda"), DeviceArray.from_numpy(x), out=y)
        wanted, size = a.astype(np.float64) @ x, np.abs(a).astype(np.float64) @ np.abs(x)
        close(y.to_numpy(), wanted, size + 1, 2.0**-19)
