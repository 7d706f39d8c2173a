"""Memory of large results is used again, and never while an array still looks at it."""

import gc

import numpy as np

from tilewright.runtime import pages

F32 = np.dtype(np.float32)
SHAPE = (1024, 1024)


def test_memory_is_used_again_after_the_last_reference():
    pages.release()
    first = pages.empty(SHAPE, F32)
    address = first.ctypes.data
    part = first[3:5]
    del first
    gc.collect()
    second = pages.empty(SHAPE, F32)
    assert second.ctypes.data != address, "a slice is still alive"
    del part
    gc.collect()
    assert pages.idle_bytes() == 4 << 20
    third = pages.empty(SHAPE, F32)
    assert third.ctypes.data == address
    assert pages.idle_bytes() == 0


def test_two_results_do_not_share_memory(rng):
    a, b = pages.empty(SHAPE, F32), pages.empty(SHAPE, F32)
    a[:] = values = rng.standard_normal(SHAPE, np.float32)
    b[:] = 7
    assert np.array_equal(a, values)


def test_what_is_kept_is_bounded():
    pages.release()
    for n in range(64):
        pages.empty((pages.KEPT_BYTES // 16 + n,), np.dtype(np.uint8))
        gc.collect()
    assert pages.idle_bytes() <= pages.KEPT_BYTES
    pages.release()
