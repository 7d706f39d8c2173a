"""Memory of large results is used again, and never while an array still looks at it."""

import gc

import numpy as np

from tilewright.runtime import host_allocator

F32 = np.dtype(np.float32)
SHAPE = (1024, 1024)


def test_memory_is_used_again_after_the_last_reference():
    host_allocator.release()
    first = host_allocator.empty(SHAPE, F32)
    address = first.ctypes.data
    part = first[3:5]
    del first
    gc.collect()
    second = host_allocator.empty(SHAPE, F32)
    assert second.ctypes.data != address, "a slice is still alive"
    del part
    gc.collect()
    assert host_allocator._idle_bytes == 4 << 20
    third = host_allocator.empty(SHAPE, F32)
    assert third.ctypes.data == address
    assert host_allocator._idle_bytes == 0


def test_two_results_do_not_share_memory(rng):
    a, b = host_allocator.empty(SHAPE, F32), host_allocator.empty(SHAPE, F32)
    a[:] = values = rng.standard_normal(SHAPE, np.float32)
    b[:] = 7
    assert np.array_equal(a, values)


def test_what_is_kept_is_bounded():
    host_allocator.release()
    for n in range(64):
        host_allocator.empty((host_allocator.KEPT_BYTES // 16 + n,), np.dtype(np.uint8))
    assert 0 < host_allocator._idle_bytes <= host_allocator.KEPT_BYTES
    host_allocator.release()
