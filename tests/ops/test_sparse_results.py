"""add, multiply and spgemm: patterns of their own, against NumPy and SciPy in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tests.ops.cases import close

import tilewright as tw
from tilewright import dtypes, ops
from tilewright.errors import ArgumentError, FormatError
from tilewright.sparse.pack import Packed

sp = pytest.importorskip("scipy.sparse")

ELEMENTWISE = {
    "add": (ops.add, np.add, np.logical_or),
    "multiply": (ops.multiply, np.multiply, np.logical_and),
}
UNIT = {"float64": 2.0**-51, "float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SHAPES = [(1, 1), (7, 5), (40, 300), (300, 4), (0, 3), (3, 0), (600, 20)]


def pattern(rng: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    """Random; a third of the rows are empty, and one is full."""
    mask = rng.random(shape) < share
    mask[rng.random(shape[0]) < 0.3] = False
    if shape[0] > 2:
        mask[shape[0] // 2] = True
    return mask


def packed(rng: np.random.Generator, mask: np.ndarray, dtype: str, fmt: Any = None) -> Packed:
    """Random values at `mask`, some of them explicit zeros."""
    coords = np.nonzero(mask)
    kind = dtypes.dtype(dtype)
    count = len(coords[0])
    if kind.is_int:
        values = rng.integers(-5, 6, count) if kind.least else rng.integers(0, 6, count)
    else:
        values = rng.standard_normal(count) * (rng.random(count) < 0.9)
    values = values.astype(np.float32 if dtype == "bfloat16" else kind.numpy)
    return (fmt or tw.csr()).pack((coords, values, mask.shape), dtype=dtype)


def exact(a: Packed) -> np.ndarray:
    dense = a.dense()
    return (dtypes.bfloat16_values(dense) if a.dtype.name == "bfloat16" else dense).astype(float)


def check(c: Packed, mask: np.ndarray, wanted: np.ndarray, size: Any) -> None:
    """C is a well-formed CSR tensor with the entries of `mask`, and has the values wanted."""
    arrays = c.structure.parts[0].arrays[1]
    indptr, indices = arrays["indptr"], arrays["indices"]
    rows, cols = np.nonzero(mask)
    assert c.shape == mask.shape and c.nnz == len(rows) and c.format == tw.csr()
    np.testing.assert_array_equal(indptr, np.searchsorted(rows, np.arange(mask.shape[0] + 1)))
    np.testing.assert_array_equal(indices, cols)
    if c.dtype.is_int:
        np.testing.assert_array_equal(exact(c), wanted)
    else:
        close(exact(c), wanted, size + 1e-12, UNIT[c.dtype.name])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_patterns(name, share, rng):
    op, numbers, either = ELEMENTWISE[name]
    for shape in SHAPES:
        masks = [pattern(rng, shape, share) for _ in range(2)]
        for fmt in (tw.csr(), tw.dcsr()):
            A, B = packed(rng, masks[0], "float32"), packed(rng, masks[1], "float32", fmt)
            a, b = exact(A), exact(B)
            check(op(A, B), either(*masks), numbers(a, b), np.abs(a) + np.abs(b))
            check(op(B, A), either(*masks), numbers(a, b), np.abs(a) + np.abs(b))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4])
def test_products(share, rng):
    for m, k, n in (
        (1, 1, 1),
        (7, 5, 9),
        (40, 30, 300),
        (300, 4, 20),
        (0, 3, 4),
        (3, 0, 4),
        (3, 4, 0),
    ):
        left, right = pattern(rng, (m, k), share), pattern(rng, (k, n), share)
        met = left.astype(np.int64) @ right.astype(np.int64) > 0
        for fmt in (tw.csr(), tw.dcsr()):
            A, B = packed(rng, left, "float32", fmt), packed(rng, right, "float32")
            a, b = exact(A), exact(B)
            check(ops.spgemm(A, B), met, a @ b, k * (np.abs(a) @ np.abs(b)))


@pytest.mark.parametrize("fmt", [tw.csr(), tw.dcsr()], ids=str)
@pytest.mark.parametrize("columns", [30, (1 << 18) + 30])
def test_masked_products(columns, fmt, rng):
    """Entries of the product that the mask has; the values of the mask do not matter."""
    left, right, mask = (pattern(rng, s, 0.2) for s in ((40, 20), (20, 30), (40, 30)))
    A, B = packed(rng, left, "float64"), packed(rng, right, "float32", fmt)
    a, b = exact(A), exact(B)
    if columns > 30:  # the same beside many empty columns: rows are gathered in a hash table
        B = fmt.pack((np.nonzero(right), b[right].astype("f"), (20, columns)))
    M = fmt.pack((np.nonzero(mask), np.zeros(mask.sum(), bool), (40, columns)))
    c = ops.spgemm(A, B, mask=M)
    wanted = mask & (left.astype(int) @ right > 0)
    coords, values = c.unpack()
    assert c.shape == (40, columns) and c.dtype.name == "float64"
    np.testing.assert_array_equal(coords, np.nonzero(wanted))
    np.testing.assert_allclose(values, (a @ b)[wanted], rtol=1e-12, atol=1e-12)


PAIRS = [
    ("float64", "float64"), ("float32", "float64"), ("float16", "float16"),
    ("bfloat16", "bfloat16"), ("float16", "float32"), ("int32", "int32"), ("int8", "int8"),
    ("uint8", "int8"), ("int64", "int16"), ("int32", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("of_a", "of_b"), PAIRS)
def test_dtypes(of_a, of_b, rng):
    """The dtype is the wider one; sums of products are in its accumulator, then wrap around."""
    masks = [pattern(rng, (12, 12), 0.3) for _ in range(2)]
    A, B = packed(rng, masks[0], of_a), packed(rng, masks[1], of_b)
    a, b = exact(A), exact(B)
    dtype = dtypes.promote(A.dtype, B.dtype)

    def stored(x):
        return x.astype(np.int64).astype(dtype.numpy) if dtype.is_int else x

    for op, numbers, either in ELEMENTWISE.values():
        c = op(A, B)
        assert c.dtype == dtype
        check(c, either(*masks), stored(numbers(a, b)), np.abs(a) + np.abs(b) + np.abs(a * b))
    met = masks[0].astype(int) @ masks[1] > 0
    check(ops.spgemm(A, B), met, stored(a @ b), 12 * (np.abs(a) @ np.abs(b)))


def test_wide_coordinates(rng):
    masks = [pattern(rng, (20, 20), 0.2) for _ in range(2)]
    A, B = (tw.csr().pack(np.where(m, 2.0, 0), index="int64") for m in masks)
    check(ops.add(A, B), masks[0] | masks[1], exact(A) + exact(B), np.ones((20, 20)))
    check(ops.spgemm(A, B), (masks[0].astype(int) @ masks[1]) > 0, exact(A) @ exact(B), 20.0)


@pytest.mark.parametrize("columns", [1 << 18, (1 << 18) + 1, 1 << 28])
def test_many_columns(columns, rng):
    """Rows of all lengths, on both sides of the limit between the two kinds of row workspace. SciPy
    multiplies with the used columns alone: its workspace is as long as a row."""
    k, lengths = 60, [0, 1, 2, 5, 30, 33, 70, 500, 9000]
    rows, cols = [], []
    for row in range(k):
        n = lengths[row % len(lengths)]
        rows += [row] * n
        cols += list(rng.choice(columns, n, replace=False))
    used, narrow = np.unique(cols, return_inverse=True)
    numbers = rng.standard_normal(len(rows))
    b = sp.csr_matrix((numbers, (rows, cols)), shape=(k, columns))
    few = sp.csr_matrix((numbers, (rows, narrow)), shape=(k, len(used)))
    a = sp.random(25, k, 0.2, format="csr", random_state=3)
    for op, other in ((ops.spgemm, a @ few), (ops.add, None), (ops.multiply, None)):
        if other is None:
            c = op(tw.csr().pack(b), tw.csr().pack(b[::-1].tocsr()))
            other = few + few[::-1] if op is ops.add else few.multiply(few[::-1])
        else:
            c = op(tw.csr().pack(a), tw.csr().pack(b))
        other = sp.csr_matrix(other)
        other.sort_indices()
        coords, values = c.unpack()
        kept = values != 0
        wanted = other.tocoo()
        np.testing.assert_array_equal(coords[0][kept], wanted.row)
        np.testing.assert_array_equal(coords[1][kept], used[wanted.col])
        np.testing.assert_allclose(values[kept], wanted.data, rtol=1e-9, atol=1e-12)
        for row in range(c.shape[0]):  # ascending, none twice
            assert (np.diff(coords[1][coords[0] == row]) > 0).all()


MEMORY = """
import re, numpy as np, tilewright as tw
from tilewright import ops
def csr(seed, shape):
    m, n = shape
    first = np.random.default_rng(seed).integers(0, n, (m, 1))
    cols = np.sort((first + np.arange(5) * (n // 7)) % n, axis=1).ravel()
    return tw.csr().pack((np.arange(m + 1) * 5, cols, np.ones(5 * m, "f"), shape))
def run(n):
    A, B = csr(1, (50, 40)), csr(2, (40, n))
    return ops.spgemm(A, B).nnz + ops.add(B, csr(3, (40, n))).nnz + ops.multiply(B, B).nnz
def peak():  # of what is allocated, touched or not
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search("VmPeak:[^0-9]*([0-9]+)", file.read())[1])
run(1000)
before = peak()
assert run(1 << 28) > 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_in_proportion_to_the_entries():
    """2²⁸ columns and a few hundred entries: an array of the columns would be a gigabyte."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, encoding="utf-8", check=True
    )
    assert int(done.stdout) < 32 << 10  # KiB


@pytest.mark.parametrize("name", ["cora", "citeseer", "pubmed", "ca-CondMat"])
def test_graphs(name, data_dir, rng):
    path = data_dir / "graphs" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = np.load(path)
    values = rng.standard_normal(len(data["indices"]))
    a = sp.csr_matrix((values, data["indices"], data["indptr"]), shape=tuple(data["shape"]))
    A = tw.csr().pack(a)
    for got, wanted in (
        (ops.spgemm(A, A), a @ a),
        (ops.add(A, tw.csr().pack(a.T.tocsr())), a + a.T),
        (ops.multiply(A, tw.csr().pack(a.T.tocsr())), a.multiply(a.T)),
    ):
        coords, numbers = got.unpack()
        difference = sp.csr_matrix((numbers, coords), shape=got.shape) - wanted
        assert abs(difference).max() < 1e-10
        assert got.nnz >= sp.csr_matrix(wanted).nnz


def test_results_are_operands(rng):
    """(A + B) · A, then new values: what an operator returns is packed as any tensor."""
    masks = [pattern(rng, (15, 15), 0.2) for _ in range(2)]
    A, B = packed(rng, masks[0], "float64"), packed(rng, masks[1], "float64")
    c = ops.spgemm(ops.add(A, B), A)
    np.testing.assert_allclose(c.dense(), (exact(A) + exact(B)) @ exact(A), atol=1e-12)
    again = c.with_values(np.arange(c.nnz, dtype=np.float64))
    np.testing.assert_array_equal(again.entry_values(), np.arange(c.nnz))
    x = rng.standard_normal((15, 3))
    np.testing.assert_allclose(ops.spmm(c, x), c.dense() @ x, atol=1e-10)


def dense_identity() -> Any:
    return np.eye(3)


def test_bad_operands_are_refused(rng):
    A = tw.csr().pack(np.eye(3, dtype=np.float32))
    wide = tw.csr().pack(np.eye(3, dtype=np.float32), index="int64")
    bad: tuple[tuple[str, str, tuple[Any, Any]], ...] = (
        ("A103", "B", (A, tw.csr().pack(np.ones((4, 4), "f")))),
        ("A106", "B", (A, dense_identity())),
        ("A106", "A", (tw.csc().pack(np.eye(3)), A)),
        ("A106", "A", (tw.csr().pack(np.eye(3), fill=1.0), A)),
        ("A102", "B", (A, wide)),
        ("A102", "A", (tw.csr().pack(np.eye(3, dtype=bool)), A)),
    )
    for code, at, operands in bad:
        for op in (ops.add, ops.multiply, ops.spgemm):
            with pytest.raises(ArgumentError) as e:
                op(*operands)
            assert e.value.code == code and f"argument {at}" in e.value.where and e.value.hint
    masks: tuple[tuple[str, Any], ...] = (
        ("A103", tw.csr().pack(np.ones((4, 4)))), ("A106", dense_identity()), ("A102", wide)
    )  # fmt: skip
    for code, mask in masks:
        with pytest.raises(ArgumentError) as e:
            ops.spgemm(A, A, mask=mask)
        assert e.value.code == code and "argument mask" in e.value.where and e.value.hint
    with pytest.raises(FormatError) as e:  # the lists of an operand have no coordinate twice
        tw.csr().pack((np.array([0, 2]), np.array([1, 1]), None, (1, 3)))
    assert e.value.code == "F105"
