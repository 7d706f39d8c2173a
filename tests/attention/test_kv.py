"""KV views: what they show, and everything that is refused at the door."""

from __future__ import annotations

import numpy as np
import pytest
from tests.attention.cases import paged

from tilewright.attention import reference
from tilewright.attention.kv import KV
from tilewright.errors import ArgumentError


def parts(**changed):
    """Arguments of a good KV.paged: 3 requests of 20, 0 and 32 keys."""
    made = {
        "k_pages": np.zeros((6, 16, 2, 8), np.float32),
        "v_pages": np.zeros((6, 16, 2, 8), np.float32),
        "kv_indptr": np.array([0, 2, 2, 4], np.int32),
        "kv_indices": np.array([5, 0, 3, 1], np.int32),
        "last_page_len": np.array([4, 0, 16], np.int32),
    }
    return made | changed


def refused(code, where, **changed):
    with pytest.raises(ArgumentError) as e:
        KV.paged(**parts(**changed))
    assert (e.value.code, e.value.where) == (code, where), str(e.value)


def test_a_view_and_no_copy():
    given = parts()
    kv = KV.paged(**given)
    assert kv.lengths().tolist() == [20, 0, 32] and kv.capacity().tolist() == [32, 0, 32]
    assert (kv.requests, kv.page_size, kv.kv_heads, kv.head_dim) == (3, 16, 2, 8)
    assert kv.k.pointer == given["k_pages"].ctypes.data
    assert "paged, page_size 16, 3 requests, 6 pages, 2 heads × 8, float32, cpu" in repr(kv)
    given["last_page_len"][0] += 1
    assert kv.lengths()[0] == 21


def test_pages_are_read_in_their_order(rng):
    kv = paged(rng, [40], (16, 2, 8))
    keys, _ = reference.gather(kv, 0)
    k, names = kv.arrays[0], kv.arrays[3]
    assert keys.shape == (40, 2, 8) and not np.isnan(keys).any()
    np.testing.assert_array_equal(keys[16:32], k[names[1]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_memory_without_keys_is_not_touched(rng, dtype):
    """Signalling NaN where no key is: NumPy warns when one of them is converted."""
    kv = paged(rng, [40, 3], (16, 2, 8), dtype)
    wanted = [reference.gather(kv, r) for r in (0, 1)]
    bits = {4: np.uint32(0x7F800001), 2: np.uint16(0x7C01)}[np.dtype(dtype).itemsize]
    for pages in kv.arrays[:2]:
        empty = np.isnan(pages)
        pages.view(bits.dtype)[empty] = bits
    for r in (0, 1):
        np.testing.assert_array_equal(reference.gather(kv, r), wanted[r])


def test_what_went_bad_in_place_is_clamped(rng):
    """As the kernels do it: no page means page 0, no length more than what is there."""
    kv = paged(rng, [40, 3], (16, 2, 8))
    k, indptr, names, last = kv.arrays[0], *kv.arrays[2:]
    names[0] = 77
    np.testing.assert_array_equal(reference.gather(kv, 0)[0][:16], k[0])
    last[:] = 99, -5
    assert kv.lengths().tolist() == [48, 0]
    indptr[:] = -7, 2, 10**9
    assert kv.lengths().tolist() == [32, 16] and kv.capacity().tolist() == [32, 32]
    assert [len(reference.gather(kv, r)[0]) for r in (0, 1)] == [32, 16]
    indptr[:] = 3, 1, 0
    assert kv.lengths().tolist() == [0, 0]


def test_bad_arrays():
    zeros = np.zeros((6, 16, 2, 8), np.float32)
    refused("A102", "k_pages", k_pages=zeros.astype(np.float64))
    refused("A102", "k_pages", k_pages=zeros.astype(np.uint16))
    refused("A103", "k_pages", k_pages=zeros[0])
    refused("A103", "v_pages", v_pages=zeros[:5])
    refused("A102", "v_pages", v_pages=zeros.astype(np.float16))
    refused("A104", "v_pages", v_pages=np.zeros((6, 16, 2, 16), np.float32)[..., ::2])
    refused("A103", "k_pages", k_pages=zeros[:, :0], v_pages=zeros[:, :0])
    refused("A107", "k_pages", k_pages=[1.0])


def test_bad_integers():
    refused("A102", "kv_indptr", kv_indptr=np.array([0, 2, 2, 4]))
    refused("A102", "kv_indices", kv_indices=np.zeros(4, np.float32))
    refused("A103", "kv_indices", kv_indices=np.zeros((2, 2), np.int32))
    refused("A104", "kv_indices", kv_indices=np.zeros(8, np.int32)[::2])
    refused("A103", "kv_indptr", kv_indptr=np.zeros(0, np.int32))
    refused("A103", "last_page_len", last_page_len=np.array([1, 1], np.int32))
    refused("A107", "last_page_len", last_page_len=[4, 0, 16])


def test_contents_out_of_range():
    refused("A109", "kv_indptr", kv_indptr=np.array([0, 2, 1, 4], np.int32))
    refused("A109", "kv_indptr", kv_indptr=np.array([1, 2, 2, 4], np.int32))
    refused("A109", "kv_indptr", kv_indptr=np.array([0, 2, 2, 5], np.int32))
    wraps = np.array([0, 2**31 - 1, -(2**31), -1, 3], np.int32)  # no difference is negative
    refused("A109", "kv_indptr", kv_indptr=wraps, last_page_len=np.zeros(4, np.int32))
    refused("A109", "kv_indices", kv_indices=np.array([5, 0, 6, 1], np.int32))
    refused("A109", "kv_indices", kv_indices=np.array([5, -1, 3, 1], np.int32))
    refused("A109", "last_page_len", last_page_len=np.array([4, 0, 17], np.int32))
    refused("A109", "last_page_len", last_page_len=np.array([-1, 0, 16], np.int32))


def test_entries_behind_the_last_page_are_not_looked_at(rng):
    """A buffer of a recorded step is longer than what is in use."""
    kv = paged(rng, [40, 3], (16, 2, 8))
    k, v, indptr, names, last = kv.arrays
    longer = np.append(names, np.array([-1, 2**31 - 1, -(2**31)], np.int32))
    same = KV.paged(k, v, indptr, longer, last)
    for r in (0, 1):
        for a, b in zip(reference.gather(kv, r), reference.gather(same, r), strict=True):
            np.testing.assert_array_equal(a, b)
    refused("A109", "kv_indices", kv_indices=np.array([5, 0, 3, 6, 0], np.int32))
    KV.paged(**parts(kv_indices=np.array([5, 0, 3, 5, -7], np.int32)))


def test_which_size_is_0():
    for axis, name in enumerate(("page_size", "kv_heads", "head_dim"), 1):
        shape = [6, 16, 2, 8]
        shape[axis] = 0
        k = np.zeros(shape, np.float32)
        with pytest.raises(ArgumentError, match=f"A103.*has {name} 0"):
            KV.paged(**parts(k_pages=k, v_pages=k))
    with pytest.raises(ArgumentError, match=r"A103.*has kv_heads 0"):
        none = np.zeros((4, 0, 8), np.float32)
        KV.ragged(none, none, np.array([0, 4], np.int32))


def test_ragged():
    k = np.zeros((9, 2, 8), np.float16)
    kv = KV.ragged(k, k.copy(), np.array([0, 4, 9], np.int32))
    assert kv.lengths().tolist() == [4, 5] and "ragged" in repr(kv)
    wraps = [0, 2**31 - 1, -(2**31), -1, 9]
    for code, indptr in (("A109", [0, 4, 10]), ("A109", [0, 5, 4]), ("A109", wraps)):
        with pytest.raises(ArgumentError) as e:
            KV.ragged(k, k, np.array(indptr, np.int32))
        assert e.value.code == code
    with pytest.raises(ArgumentError) as e:
        KV.ragged(k[:, 0], k[:, 0], np.array([0, 4], np.int32))
    assert e.value.code == "A103"
