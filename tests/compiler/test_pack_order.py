"""Packing keeps the order of the caller's values, counts positions, and takes memory by entries."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from tests.compiler.cases import FORMATS, matrix

import tilewright as tw
from tilewright.errors import ArgumentError, FormatError
from tilewright.sparse import pack as packing

sparse = pytest.importorskip("scipy.sparse")
LAYOUTS = ("coo", "csr", "csc", "bsr", "dok", "lil", "dia")


def shuffled(layout: str, dense: np.ndarray, rng: np.random.Generator):
    """The matrix in a layout of SciPy, its entries in no order where the layout allows it."""
    if layout in ("lil", "dia"):
        return sparse.coo_array(dense).asformat(layout)
    rows, cols = np.nonzero(dense)
    order = rng.permutation(len(rows))
    rows, cols = rows[order], cols[order]
    if layout == "dok":
        made = sparse.dok_array(dense.shape, dtype=dense.dtype)
        for i, j in zip(rows, cols, strict=True):
            made[int(i), int(j)] = dense[i, j]
        return made
    made = sparse.coo_array((dense[rows, cols], (rows, cols)), shape=dense.shape)
    if layout == "coo":
        return made
    made = made.tobsr((2, 3)) if layout == "bsr" else made.asformat(layout)
    for at in range(len(made.indptr) - 1):  # the conversion has sorted them
        own = slice(made.indptr[at], made.indptr[at + 1])
        inside = rng.permutation(made.indptr[at + 1] - made.indptr[at])
        made.indices[own], made.data[own] = made.indices[own][inside], made.data[own][inside]
    made.has_sorted_indices = False
    return made


def values_of(m) -> np.ndarray:
    """The values of a SciPy matrix in the order in which it holds them."""
    if m.format == "dok":
        return np.array(list(m.values()))
    if m.format == "lil":
        return np.concatenate([np.array(row, m.dtype) for row in m.data])
    if m.format == "dia":
        return m.data[m.data != 0]
    return m.data.ravel()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_values_come_in_the_order_of_the_matrix(layout, fmt, rng):
    dense = matrix("random", 8, 6, rng)
    m = shuffled(layout, dense, rng)
    before = values_of(m).copy()
    packed = FORMATS[fmt].pack(m)
    np.testing.assert_array_equal(packed.dense(), dense)
    np.testing.assert_array_equal(packed.entry_values(), before)
    np.testing.assert_array_equal(packed.with_values(2 * before).dense(), 2 * dense)
    np.testing.assert_array_equal(FORMATS[fmt].pack(m, values=3 * before).dense(), 3 * dense)
    np.testing.assert_array_equal(values_of(m), before)  # the caller's arrays stay as they were


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "bool", "complex64"])
def test_equal_coordinates_are_added_up_whatever_the_flag_says(layout, dtype, rng):
    """`has_canonical_format` is a note that the owner of a matrix may forget to change."""
    rows, cols = rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    values = rng.integers(-5, 5, 40).astype(dtype)
    m = sparse.coo_array((values, (rows, cols)), shape=(3, 4))
    wanted = np.zeros((3, 4), dtype)
    np.add.at(wanted, (rows, cols), values)
    if layout != "coo":
        major, minor = (rows, cols) if layout == "csr" else (cols, rows)
        order = np.argsort(major, kind="stable")
        n = 3 if layout == "csr" else 4
        indptr = np.searchsorted(major[order], np.arange(n + 1))
        kind = sparse.csr_array if layout == "csr" else sparse.csc_array
        m = kind((values[order], minor[order], indptr), shape=(3, 4))
    m.has_canonical_format = True
    if dtype == "complex64":
        with pytest.raises(ArgumentError) as caught:
            tw.csr().pack(m)
        assert caught.value.code == "A102"
        return
    packed = tw.csr().pack(m)
    np.testing.assert_array_equal(packed.dense(), wanted)
    assert packed.nnz == len(set(zip(rows.tolist(), cols.tolist(), strict=True)))
    keys = np.unique(rows * 4 + cols)
    again = packed.with_values(np.arange(1.0, len(keys) + 1))  # row-major
    np.testing.assert_array_equal(again.dense().ravel()[keys], np.arange(1, len(keys) + 1))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_coordinates_of_torch(dtype):
    torch = pytest.importorskip("torch")
    t = torch.sparse_coo_tensor(
        [[1, 0, 1], [0, 2, 0]], torch.tensor([1.5, 2.0, 4.0], dtype=getattr(torch, dtype)), (2, 3)
    )
    t = t._coalesced_(True)  # which it is not
    packed = tw.csr().pack(t, dtype="float32")
    assert packed.dense().tolist() == [[0, 0, 2], [5.5, 0, 0]]


def test_equal_coordinates_of_a_tuple_are_refused():
    with pytest.raises(FormatError) as caught:
        tw.csr().pack((([0, 0], [1, 1]), [1.0, 2.0], (2, 2)))
    assert caught.value.code == "F105" and "(0, 1)" in caught.value.message


# ---------------------------------------------------------------------------- the index type


LIMIT = 2**31 - packing.ROUNDED_UP


@pytest.mark.parametrize("index", [None, "int32", "int64"])
def test_positions_choose_the_index_type(index):
    """530 000 blocks of 64 × 64: 530 000 entries, 2.2 · 10⁹ positions. Refused or counted in int64
    before any value is stored."""
    at = np.arange(530_000) * 64
    m = sparse.coo_array((np.ones(len(at), np.float32), (at, at)), shape=(at[-1] + 1, at[-1] + 1))
    stored: list[int] = []

    def no_values(part, values, dtype, fill):
        stored.append(part.size)
        return np.zeros(0, np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_scatter", no_values)
        if index == "int32":
            with pytest.raises(FormatError) as caught:
                tw.bsr(64).pack(m, index=index)
            assert caught.value.code == "F108" and str(530_000 * 64 * 64) in caught.value.message
            assert "int64" in caught.value.hint and not stored
            return
        packed = tw.bsr(64).pack(m, index=index)
    assert stored == [530_000 * 64 * 64] and packed.structure.index_dtype.name == "int64"
    assert {a.dtype.name for a in packed.structure.parts[0].arrays[1].values()} == {"int64"}


@pytest.mark.parametrize(
    ("positions", "wanted"), [(LIMIT - 1, "int32"), (LIMIT, "int64"), (2**33, "int64")]
)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_is_counted(positions, wanted, level, monkeypatch):
    """Whichever level has so many positions: rows, slots of an ELL, elements of blocks."""
    honest = packing._pack_part

    def large(*args):
        part = honest(*args)
        counts = [*part.counts]
        counts[level] = positions
        return packing.Part(part.format, part.arrays, tuple(counts), part.entries, part.slots)

    monkeypatch.setattr(packing, "_pack_part", large)
    monkeypatch.setattr(packing, "_scatter", lambda *_: np.zeros(0))
    formats = {0: [tw.csr(), tw.ell(2)], 1: [tw.ell(2), tw.csf(2), tw.hyb()], 2: [tw.bsr(2)]}
    for fmt in formats[level]:
        assert fmt.pack(np.eye(2)).structure.index_dtype.name == wanted


# ---------------------------------------------------------------------------- memory

TALL = 2**28


def tall(layout: str):
    """Three entries in as many rows as the layout can have without storing them."""
    rows, cols = np.array([5, TALL - 9, TALL - 1]), np.array([0, 3, 1])
    made = sparse.coo_array((np.array([1.0, 2.0, 3.0]), (rows, cols)), shape=(TALL, 4))
    if layout == "dia":  # a diagonal that begins far down
        return sparse.dia_array((np.array([[1.0, 0.0, 2.0, 3.0]]), [-(TALL - 4)]), shape=(TALL, 4))
    if layout == "bsr":
        blocks = np.zeros((3, 2**12, 4))
        blocks[:, 7, 2] = 1, 2, 3
        indptr = np.searchsorted([1, 9, 2**16 - 1], np.arange(2**16 + 1))
        return sparse.bsr_array((blocks, [0, 0, 0], indptr), shape=(TALL, 4))
    if layout == "lil":  # one Python list a row
        return sparse.coo_array(
            (made.data, (rows % 2**16, cols)), shape=(2**16, 4)
        ).tolil()  # fmt: skip
    return made.asformat(layout)


@pytest.mark.parametrize("fmt", [tw.coo(), tw.dcsr(), tw.csf(2)], ids=str)
@pytest.mark.parametrize("layout", ["coo", "dia", "lil", "dok", "bsr", "csc"])
def test_memory_in_proportion_to_the_entries(layout, fmt):
    m = tall(layout)
    stored = {"bsr": 2**16 + 3 * 2**12 * 4, "lil": 2**16, "dia": 4}.get(layout, 3)
    tracemalloc.start()
    try:
        packed = fmt.pack(m)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000 + 200 * stored, f"{peak} bytes for {stored} stored numbers"
    coords, values = packed.unpack()
    where = values != 0
    assert values[where].tolist() == [1, 2, 3]
    exact = {
        "dia": ([TALL - 4, TALL - 2, TALL - 1], [0, 2, 3]),
        "bsr": ([2**12 + 7, 9 * 2**12 + 7, TALL - 2**12 + 7], [2, 2, 2]),
        "lil": ([5, 2**16 - 9, 2**16 - 1], [0, 3, 1]),
    }.get(layout, ([5, TALL - 9, TALL - 1], [0, 3, 1]))
    assert tuple(c[where].tolist() for c in coords) == exact


def test_a_csr_of_many_empty_rows():
    """Its own index pointers are all that is as long as its rows."""
    rows = 2**20
    indptr = np.searchsorted([5, 77, rows - 1], np.arange(rows + 1))
    m = sparse.csr_array((np.array([1.0, 2, 3]), np.array([1, 0, 2]), indptr), shape=(rows, 3))
    tracemalloc.start()
    try:
        packed = tw.coo().pack(m)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * rows, peak
    assert [c.tolist() for c in packed.unpack()[0]] == [[5, 77, rows - 1], [1, 0, 2]]


# ---------------------------------------------------------------------------- lazy views


def test_lazy_views_of_torch_are_packed_as_they_read():
    torch = pytest.importorskip("torch")
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    negated = torch._neg_view(x)
    imaginary = torch.complex(x, x).conj().imag
    for given in (negated, imaginary, [torch._neg_view(row) for row in x]):
        np.testing.assert_array_equal(tw.csr().pack(given).dense(), -x.numpy())
    packed = tw.csr().pack(x.numpy())
    assert packed.with_values(torch._neg_view(torch.ones(3))).entry_values().tolist() == [-1] * 3
    with warnings.catch_warnings(action="ignore"):  # torch calls nested tensors a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        for bad in (nested, jagged):
            with pytest.raises((ArgumentError, FormatError)) as caught:
                tw.csr().pack(bad)
            assert "to_padded_tensor" in caught.value.hint
            np.testing.assert_array_equal(
                tw.csr().pack(bad.to_padded_tensor(0.0)).dense(), [[1, 1, 0], [1, 1, 1]]
            )
    for bad in (torch.complex(x, x), torch.complex(x, x).conj()):
        with pytest.raises(ArgumentError) as caught:
            tw.csr().pack(bad)
        assert caught.value.code == "A102"
