"""Caching allocator of large results on the CPU.

Fresh memory costs a page fault and a cleared page every 4 KiB: for a sparse product more time than
the product itself. Blocks of arrays that died are reused for results of the same size, as caching
allocators of GPUs do.
"""

import math
import sys

import numpy as np

SMALLEST = 1 << 20  # bytes; smaller blocks are cached by the C library
KEPT_BYTES = 512 << 20

_idle: dict[int, list[np.ndarray]] = {}
_idle_bytes = 0


class _Lease:
    """Owns a block while arrays view it; returns it to the cache when the last of them dies."""

    __slots__ = ("__array_interface__", "__weakref__", "block")

    def __init__(self, block: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.block = block
        self.__array_interface__ = {
            "data": (block.ctypes.data, False), "shape": shape, "typestr": dtype.str, "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        global _idle_bytes
        block = self.block
        if sys.is_finalizing():
            return
        if _idle_bytes + block.nbytes > KEPT_BYTES:
            release()
        if block.nbytes <= KEPT_BYTES:
            _idle.setdefault(block.nbytes, []).append(block)
            _idle_bytes += block.nbytes


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array; one of at least `SMALLEST` bytes is in a cached block if there is one
    of its size."""
    global _idle_bytes
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST:
        return np.empty(shape, dtype)
    try:
        block = _idle[nbytes].pop()  # one step, so that two threads cannot take the same block
        _idle_bytes -= nbytes
    except LookupError:
        block = np.empty(nbytes, np.uint8)
    return np.asarray(_Lease(block, shape, dtype))


def release() -> None:
    """Return all cached blocks to the system."""
    global _idle_bytes
    _idle.clear()
    _idle_bytes = 0
