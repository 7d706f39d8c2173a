"""Packing and unpacking: every format holds every matrix it takes, and gives it back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.compiler.cases import FORMATS, MATRICES, matrix, spmm

import tilewright as tw
from tilewright.errors import FormatError
from tilewright.ir.levels import Compressed, Dense, Fixed

DIMS = st.integers(0, 9)
SEEDS = st.integers(0, 2**32 - 1)


def fitting(name: str, dense: np.ndarray):
    """The format, wide enough for the matrix."""
    longest = int((dense != 0).sum(axis=1).max(initial=0))
    return tw.ell(longest) if name == "ell" else FORMATS[name]


def unpacks_to(packed, dense):
    """Its entries and its dense form are the matrix; their coordinates."""
    coords, values = packed.unpack()
    again = np.zeros_like(dense)
    again[coords] = values
    np.testing.assert_array_equal(again, dense)
    np.testing.assert_array_equal(packed.dense(), dense)
    return coords


@given(st.sampled_from(list(FORMATS)), st.sampled_from(MATRICES), DIMS, DIMS, SEEDS)
def test_round_trip(name, kind, m, n, seed):
    rng = np.random.default_rng(seed)
    dense = matrix(kind, m, n, rng)
    fmt = fitting(name, dense)
    packed = fmt.pack(dense)
    coords = unpacks_to(packed, dense)
    assert packed.nnz == np.count_nonzero(dense) and packed.shape == dense.shape
    keys = coords[0] * max(n, 1) + coords[1]
    assert (np.diff(keys) > 0).all(), "unpack gives each coordinate once, in row-major order"
    assert 0 <= packed.padding <= 1


@given(st.sampled_from(list(FORMATS)), st.sampled_from(MATRICES), DIMS, DIMS, SEEDS)
def test_new_values_keep_the_structure(name, kind, m, n, seed):
    """In the order the entries were given, shuffled or not."""
    rng = np.random.default_rng(seed)
    dense = matrix(kind, m, n, rng)
    rows, cols = np.nonzero(dense)
    order = rng.permutation(len(rows))
    rows, cols = rows[order], cols[order]
    packed = fitting(name, dense).pack(((rows, cols), dense[rows, cols], dense.shape))
    np.testing.assert_array_equal(packed.dense(), dense)
    np.testing.assert_array_equal(packed.entry_values(), dense[rows, cols])
    new = rng.normal(size=len(rows))
    other = packed.repack_values(new, dtype="float64")
    assert other.structure is packed.structure and other.dtype.name == "float64"
    wanted = np.zeros(dense.shape)
    wanted[rows, cols] = new
    np.testing.assert_array_equal(other.dense(), wanted)
    np.testing.assert_array_equal(packed.dense(), dense)


TILE = Dense(0, block=2, inner=True), Dense(1, block=2, inner=True)
BLOCKED = {
    "rows": tw.Format("b4", (Dense(0, block=2), Fixed(1, block=2, width=4), *TILE)),
    "listed rows": tw.Format("cb4", (Compressed(0, block=2), Fixed(1, block=2, width=4), *TILE)),
    "columns": tw.Format("c4", (Dense(0), Fixed(1, block=2, width=4), TILE[1])),
    "entries": tw.Format(
        "s4", (Dense(0), Fixed(1, block=2, width=4), Compressed(1, block=2, inner=True))
    ),
}


@given(
    st.sampled_from(list(BLOCKED)),
    st.sampled_from(MATRICES),
    DIMS,
    st.integers(0, 8),
    SEEDS,
    st.sampled_from(["cpp", "interp"]),
)
def test_a_slot_of_a_fixed_level_holds_a_block(name, kind, m, n, seed, target):
    """Entries of one block share a slot, under every level and around every level."""
    rng = np.random.default_rng(seed)
    dense, fmt = matrix(kind, m, n, rng), BLOCKED[name]
    packed = fmt.pack(dense)
    unpacks_to(packed, dense)
    x = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
    y = spmm.decompose(A=fmt).build(target)(packed, x)
    np.testing.assert_allclose(y, dense @ x, rtol=1e-5, atol=1e-5)


def test_a_fixed_level_too_narrow_for_its_blocks():
    fmt = tw.Format("b1", (Dense(0, block=2), Fixed(1, block=2, width=1), *TILE))
    with pytest.raises(FormatError, match="row 0 has 2 blocks but the level holds 1"):
        fmt.pack(np.eye(2, 4) + np.eye(2, 4, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
def test_values_are_converted(dtype, rng):
    dense = matrix("random", 6, 7, rng)
    packed = tw.hyb(buckets=(1, 2, 4)).pack(dense, dtype=dtype)
    assert packed.dtype.name == dtype and packed.values[0].dtype == packed.dtype.numpy
    back = packed.unpack()[1]
    back = (back.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else back
    exact = dense[dense != 0]
    wanted = exact.astype(np.int32) if dtype == "int32" else exact
    np.testing.assert_allclose(
        back, wanted, rtol={"bfloat16": 2**-8, "float16": 2**-11}.get(dtype, 0)
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_all_ways_in_are_the_same(rng):
    sparse = pytest.importorskip("scipy.sparse")
    torch = pytest.importorskip("torch")
    dense = matrix("random", 8, 5, rng)
    m = sparse.csr_matrix(dense)
    shuffled = m.tocoo()
    order = rng.permutation(m.nnz)
    coo = ((shuffled.row[order], shuffled.col[order]), shuffled.data[order], dense.shape)
    ways = [
        dense, m, m.tocsc(), m.tocoo(), sparse.csr_array(dense), coo,
        (m.indptr, m.indices, m.data, m.shape), torch.from_numpy(dense).to_sparse_csr(),
    ]  # fmt: skip
    for fmt in FORMATS.values():
        for way in ways:
            np.testing.assert_array_equal(fmt.pack(way).dense(), dense)
    np.testing.assert_array_equal(
        tw.csr().pack((m.indptr, m.indices, None, m.shape)).dense(), dense != 0
    )
    np.testing.assert_array_equal(tw.csr().pack(m, values=2 * m.data).dense(), 2 * dense)


@pytest.mark.parametrize("columns", [[2, 0, 2, 2], [0, 2, 2, 2]])
def test_unsorted_rows_and_duplicates_of_scipy_are_left_as_they_were(columns):
    sparse = pytest.importorskip("scipy.sparse")
    arrays = (np.array([1.0, 2, 3, 4]), np.array(columns), np.array([0, 2, 4]))
    m = sparse.csr_matrix(arrays, shape=(2, 3))
    before = m.indices.copy(), m.data.copy()
    packed = tw.csr().pack(m)
    np.testing.assert_array_equal(packed.dense(), m.toarray())
    np.testing.assert_array_equal(m.indices, before[0])
    np.testing.assert_array_equal(m.data, before[1])


def test_formats_are_values():
    assert tw.csr() == tw.csr() and hash(tw.bsr(4)) == hash(tw.bsr(4)) and tw.bsr(4) != tw.bsr(8)
    assert tw.hyb() == tw.hyb() and tw.hyb() != tw.hyb(2) and str(tw.csr()) == "csr"
    for fmt in FORMATS.values():
        assert repr(fmt) and fmt.ndim == 2 and len(fmt.formats) >= 1
    text = str(tw.hyb().pack(np.eye(3, dtype=np.float32)))
    assert "3 entries" in text and "cpu" in text
