"""What packing is handed: matrices of every library, damaged ones, values that do not fit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from tests.compiler.cases import matrix

import tilewright as tw
from tilewright import dtypes
from tilewright.errors import ArgumentError, FormatError, TilewrightError
from tilewright.ir.levels import Compressed
from tilewright.runtime import transfer
from tilewright.sparse import pack as packing

I = np.array
CSR = tw.csr()


def refused(act, *codes: str, where: str = "") -> TilewrightError:
    with pytest.raises(TilewrightError) as caught:
        act()
    assert caught.value.code in codes, str(caught.value)
    assert not where or caught.value.where == where, str(caught.value)
    return caught.value


# ---------------------------------------------------------------------------- index arrays


def test_indptr_that_would_wrap_a_difference():
    """Differences of int64 wrap: these are 2⁶³-1, 1, 2⁶³-1 and 4."""
    indptr = I([0, 2**63 - 1, -(2**63), -1, 3])
    refused(lambda: CSR.pack((indptr, I([0, 1, 2]), None, (4, 3))), "F103", where="indptr")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4"])
def test_index_arrays_of_every_width(rng, dtype):
    """More rows than a small type counts; blocks wider than it."""
    indptr, indices = np.arange(301), rng.integers(0, 7, 300)
    wanted = np.zeros((300, 7), np.float32)
    wanted[np.arange(300), indices] = 1
    given = indices.astype(dtype)
    for fmt in (CSR, tw.bsr(300), tw.coo(), tw.hyb()):
        for pointers in (indptr, indptr.astype("uint64")):
            packed = fmt.pack((pointers, given, None, (300, 7)))
            np.testing.assert_array_equal(packed.dense(), wanted)


def test_empty_lists_are_index_arrays():
    assert CSR.pack(([0, 0], [], None, (1, 3))).nnz == 0


@pytest.mark.parametrize(
    "shape",
    [5, None, "12", ("a", 2), (float("nan"), 2), (1.5, 2), (-1, 2), (10**30, 4), (2**63, 4)],
)
def test_shapes_that_are_none(shape):
    for given in (((I([0]), I([0])), None, shape), (I([0, 1]), I([0]), None, shape)):
        error = refused(lambda given=given: CSR.pack(given), "F102", where="shape")
        assert "2**63" in error.hint


def test_shapes_beyond_memory():
    entry = I([2**49]), I([3])
    for fmt in (CSR, tw.ell(2), tw.hyb()):
        error = refused(lambda fmt=fmt: fmt.pack((entry, None, (2**50, 4))), "F108", where="shape")
        assert str(2**50) in error.message and str(2**40) in error.message
    refused(lambda: tw.bsr(2**30).pack(np.eye(2)), "F108")
    assert [int(c[0]) for c in tw.coo().pack((entry, None, (2**50, 4))).unpack()[0]] == [2**49, 3]


def test_memory_that_runs_out(monkeypatch):
    def full(*_):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(packing, "_pack_part", full)
    refused(lambda: CSR.pack(np.eye(2)), "F108")


@pytest.mark.parametrize("coords", [5, None, "ab", (1, 2), {}, (I([0]), None), (I([0]), [[0]])])
def test_coordinates_that_are_none(coords):
    refused(lambda: CSR.pack((coords, None, (2, 2))), "F102")


# ---------------------------------------------------------------------------- libraries


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("kind", ["to_dense", "to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
def test_tensors_of_torch(rng, kind):
    torch = pytest.importorskip("torch")
    dense = matrix("random", 8, 5, rng)
    tensor = torch.from_numpy(dense)
    recorded = getattr(tensor.clone().requires_grad_(), kind)()
    refused(lambda: CSR.pack(recorded), "A111")
    for given in (getattr(tensor, kind)(), recorded):
        for fmt in (CSR, tw.hyb(), tw.bsr(2)):
            with torch.no_grad():
                np.testing.assert_array_equal(fmt.pack(given).dense(), dense)
    packed = CSR.pack(getattr(tensor.bfloat16(), kind)())
    assert packed.dtype.name == "bfloat16" and packed.nnz == np.count_nonzero(dense)
    got, wanted = dtypes.bfloat16_values(packed.dense()), tensor.bfloat16().float().numpy()
    np.testing.assert_array_equal(got, wanted)
    again = CSR.pack(getattr(tensor.bfloat16(), kind)(), dtype="float32")
    np.testing.assert_array_equal(again.dense(), wanted)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensors_of_torch_that_are_no_matrix():
    torch = pytest.importorskip("torch")
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2))
    np.testing.assert_array_equal(CSR.pack(twice).dense(), [[0, 3], [0, 0]])
    assert CSR.pack(torch.tensor([[-0.0, 1.0]]).bfloat16()).nnz == 1
    for given in (
        torch.eye(4).to_sparse_bsr((2, 2)),
        torch.ones(2, 2, 2),
        torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 5), (6, 5)),
        torch.tensor(1.0),
    ):
        refused(lambda given=given: CSR.pack(given), "F102")
    refused(lambda: CSR.pack(torch.ones(2, 2).to(torch.float8_e4m3fn)), "A102")


def _indptr(at, value):
    def damage(m):
        m.indptr[at] = value

    return damage


def _index(m):
    m.indices[0] = 77


def _short(name):
    def damage(m):
        setattr(m, name, getattr(m, name)[:-1])

    return damage


DAMAGE = [_indptr(2, 99), _indptr(1, -5), _indptr(-1, 1), _index, _short("indptr"), _short("data")]


@pytest.mark.parametrize("layout", ["csr", "csc", "bsr"])
@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_matrices_of_scipy(layout, damage):
    """They are found before SciPy's loops, which trust them, see them."""
    sparse = pytest.importorskip("scipy.sparse")
    m = sparse.csr_matrix(np.triu(np.ones((6, 6), np.float32))[:, ::-1]).asformat(layout)
    m.indices, m.indptr, m.data = m.indices.copy(), m.indptr.copy(), m.data.copy()
    damage(m)
    refused(lambda: CSR.pack(m), "F103", "F104")


def test_damaged_coordinates_of_scipy():
    sparse = pytest.importorskip("scipy.sparse")
    m = sparse.coo_matrix((np.ones(2), ([0, 1], [1, 0])), shape=(2, 2))
    m.row[0] = 2**30
    refused(lambda: CSR.pack(m), "F104")


def test_other_layouts_of_scipy(rng):
    sparse = pytest.importorskip("scipy.sparse")
    dense = matrix("random", 6, 4, rng)
    for layout in ("csr", "csc", "bsr", "coo", "dia", "lil", "dok"):
        m = sparse.csr_matrix(dense).asformat(layout)
        np.testing.assert_array_equal(CSR.pack(m).dense(), dense)
    roomy = sparse.csr_matrix(dense)
    wanted = roomy.toarray()
    roomy.indices, roomy.data = np.append(roomy.indices, 9), np.append(roomy.data, 9)
    np.testing.assert_array_equal(CSR.pack(roomy).dense(), wanted)
    cube = np.zeros((2, 2, 2))
    cube[1, 0, 1] = 3
    refused(lambda: CSR.pack(sparse.coo_array(cube)), "F102", where="matrix")
    three = tw.Format("three", tuple(Compressed(d) for d in range(3)))
    np.testing.assert_array_equal(three.pack(sparse.coo_array(cube)).dense(), cube)


# ---------------------------------------------------------------------------- values


def test_values_of_torch():
    torch = pytest.importorskip("torch")
    packed, new = CSR.pack(np.eye(3, dtype=np.float32)), torch.tensor([1.5, 2.5, 3.5])
    recorded = new.clone().requires_grad_()
    refused(lambda: packed.with_values(recorded), "A111")
    refused(lambda: CSR.pack(np.eye(3), values=recorded), "A111")
    for given in (new, recorded.detach(), [1.5, 2.5, 3.5]):
        np.testing.assert_array_equal(packed.with_values(given).dense(), np.diag([1.5, 2.5, 3.5]))
        assert CSR.pack(np.eye(3), values=given).entry_values().tolist() == [1.5, 2.5, 3.5]
    half = packed.with_values(new.bfloat16())
    assert half.dtype.name == "bfloat16"
    assert dtypes.bfloat16_values(half.entry_values()).tolist() == [1.5, 2.5, 3.5]
    assert half.with_values(half.entry_values(), dtype="bfloat16").dense().tolist() == (
        half.dense().tolist()
    )


@pytest.mark.parametrize("given", [[[1], [1, 2]], "abc", {}, [1.0], ["a", "b"], [1j, 2j], [None]])
def test_what_are_no_values(given):
    packed = CSR.pack(np.eye(2))
    refused(lambda: packed.with_values(given), "F107", "F102", "A102")
    refused(lambda: CSR.pack(np.eye(2), values=given), "F102", "A102")


UNFIT = [
    (np.nan, "int32"), (1e30, "int32"), (-np.inf, "int8"), (2.0**31, "int32"), (2.0**63, "int64"),
    (-1, "uint8"), (-1, "uint64"), (2**40, "int32"), (np.uint64(2**63), "int64"),
    (1e30, "float16"), (70000, "float16"), (1e300, "float32"), (3.4e38, "bfloat16"),
    (1e300, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "dtype"), UNFIT)
def test_values_out_of_the_range_of_a_dtype(value, dtype):
    refused(lambda: CSR.pack(I([[value]]), dtype=dtype), "A109", where="values")
    refused(lambda: CSR.pack(I([[1]])).with_values(I([value]), dtype=dtype), "A109")


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (np.inf, "float16", np.inf), (2.0**31 - 1, "int32", 2**31 - 1),
        (-(2.0**63), "int64", -(2**63)),
        (-0.5, "uint8", 0), (1.9, "int32", 1), (3, "bfloat16", 0x4040), (65519.0, "float16", 65504),
        (np.uint16(0x4040), "bfloat16", 0x4040), (5, "bool", True),
    ],
)  # fmt: skip
def test_values_at_the_edge_of_a_dtype(value, dtype, stored):
    assert CSR.pack(((I([0]), I([0])), I([value]), (1, 1)), dtype=dtype).values[0].tolist() == [
        stored
    ]


def test_nothing_converts_eight_bits():
    refused(lambda: CSR.pack(np.eye(2), dtype="float8_e5m2"), "A102")


def test_a_fill_is_stored_as_the_values_are():
    packed = tw.ell(2).pack(np.eye(2), dtype="bfloat16")
    filled = packing.Packed(packed.structure, packed.values, packed.dtype, float("inf"))
    assert filled.with_values([1.0, 1.0], dtype="bfloat16").values[0].tolist() == [
        0x3F80, 0x7F80, 0x3F80, 0x7F80,
    ]  # fmt: skip
    assert filled.dense().tolist() == [[0x3F80, 0x7F80], [0x7F80, 0x3F80]]


# ---------------------------------------------------------------------------- index, devices


def test_an_index_that_is_asked_for(rng):
    dense = matrix("random", 6, 5, rng)
    for fmt in (CSR, tw.hyb(), tw.bsr(2)):
        for index, wanted in (
            (None, "int32"),
            ("int32", "int32"),
            ("int64", "int64"),
            (np.int64, "int64"),
        ):
            packed = fmt.pack(dense, index=index)
            assert packed.structure.index_dtype.name == wanted
            levels = [
                a for p in packed.structure.parts for level in p.arrays for a in level.values()
            ]
            assert {a.dtype.name for a in levels} == {wanted}
            np.testing.assert_array_equal(packed.dense(), dense)
    far = (I([2**33]), I([0])), None, (2**34, 4)
    assert tw.coo().pack(far).structure.index_dtype.name == "int64"
    refused(lambda: tw.coo().pack(far, index="int32"), "F108", where="index")
    refused(lambda: CSR.pack(dense, index="float32"), "A102", where="index")
    for index in ("x", 5):
        refused(lambda index=index: CSR.pack(dense, index=index), "A102")


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cuda:-1", "tpu", "cpu:0", None])
def test_devices_that_are_none(device):
    with pytest.raises(ArgumentError) as caught:
        CSR.pack(np.eye(2)).to(device)
    assert caught.value.code == "A105" and caught.value.where == "device"


def test_a_structure_is_read_only(rng):
    indptr, indices = I([0, 1, 2]), I([0, 1])
    empty = np.zeros(0, np.int64)
    for fmt in (CSR, tw.hyb(), tw.coo(), tw.ragged(), tw.ell(1)):
        packed = fmt.pack((indptr, indices, None, (2, 2)), index="int64")
        fmt.pack(((empty, empty), None, (2, 2)), index="int64")
        for part in (*packed.structure.parts, *packed.to("cpu").structure.parts):
            arrays = [a for level in part.arrays for a in level.values()]
            for a in (*arrays, part.slots, part.entries):
                assert not a.flags.writeable
        packed.values[0][...] = 5  # values are the caller's to write
    assert indptr.flags.writeable and indices.flags.writeable and empty.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        CSR.pack(np.eye(2)).structure.parts[0].arrays[1]["indices"][0] = 10**7


def test_torch_takes_what_is_read_only_without_a_warning(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = CSR.pack(np.eye(3)).to("cuda:0")
    assert moved.structure.parts[0].arrays[1]["indices"].tolist() == [0, 1, 2]
    refused(lambda: transfer.to_device(np.zeros(1), "cuda:1"), "A105")


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize("count", [2, 255, 257, 513])
def test_any_number_of_parts_that_all_take_an_entry(count):
    """257 of them count as one in eight bits."""
    fmt = tw.Composed("many", tuple((tw.Where(), tw.dcsr()) for _ in range(count)))
    error = refused(lambda: fmt.pack(np.eye(2)), "F106")
    assert f"{count} parts" in error.message


def test_parts_need_rows_and_columns():
    with pytest.raises(FormatError, match="F101"):
        tw.Composed("line", ((tw.Where(), tw.Format("v", (Compressed(0),))),))
