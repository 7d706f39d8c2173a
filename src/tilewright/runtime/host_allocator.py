"""Memory for large results on the CPU, kept for the next result of the same size.

Fresh memory costs a page fault and a cleared page for every 4 KiB: for the result of a sparse
product more time than the product. What the caller has dropped is handed out again, as GPU
allocators do."""

from __future__ import annotations

import sys

import numpy as np

SMALLEST = 1 << 20  # bytes; below, the C library keeps memory itself
KEPT_BYTES = 512 << 20

_idle: dict[int, list[np.ndarray]] = {}
_idle_bytes = 0


class _Lease:
    """Owns a block while an array uses it; the block goes back when the last such array dies."""

    __slots__ = ("__array_interface__", "__weakref__", "block")

    def __init__(self, block: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.block = block
        self.__array_interface__ = {
            "data": (block.ctypes.data, False), "shape": shape, "typestr": dtype.str, "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _give_back(self.block)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array of at least `SMALLEST` bytes, from memory that was used before if
    any."""
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    block = _take(nbytes)
    return np.asarray(_Lease(np.empty(nbytes, np.uint8) if block is None else block, shape, dtype))


def _take(nbytes: int) -> np.ndarray | None:
    global _idle_bytes
    blocks = _idle.get(nbytes)
    if not blocks:
        return None
    _idle_bytes -= nbytes
    return blocks.pop()


def _give_back(block: np.ndarray) -> None:
    global _idle_bytes
    if _idle_bytes + block.nbytes > KEPT_BYTES:
        _idle.clear()
        _idle_bytes = 0
    if block.nbytes <= KEPT_BYTES:
        _idle.setdefault(block.nbytes, []).append(block)
        _idle_bytes += block.nbytes


def release() -> None:
    """Gives all kept memory back to the system."""
    global _idle_bytes
    _idle.clear()
    _idle_bytes = 0
