"""Allocates a model's arrays: NumPy on the CPU, device memory on a GPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.target import Target


class Memory:
    """Allocates, writes and reads arrays of one target."""

    def __init__(self, target: Target) -> None:
        self.on_cuda = target.is_cuda

    def empty(self, *shape: int, dtype: str = "float32") -> Any:
        """A new array, not initialised."""
        if not self.on_cuda:
            return np.empty(shape, dtypes.dtype(dtype).numpy)
        from tilewright.runtime.cuda import DeviceArray

        return DeviceArray(shape, dtype)

    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """The array in memory of the target: itself on the CPU, a copy on a GPU."""
        if not self.on_cuda:
            return array
        from tilewright.runtime.cuda import DeviceArray

        return DeviceArray.from_numpy(np.ascontiguousarray(array), dtype)

    def write(self, array: Any, values: Any, waits: bool = True) -> None:
        """Overwrites an array of the target. `waits`: as in `DeviceArray.copy_from`."""
        if isinstance(array, np.ndarray):
            array[...] = values
            return
        if array.dtype.name == "bfloat16":
            values = dtypes.bfloat16_bits(np.asarray(values, np.float32))
        values = np.broadcast_to(np.asarray(values, array.dtype.numpy), array.shape)
        array.copy_from(values, waits=waits)

    def read(self, array: Any) -> np.ndarray:
        """The contents on the host."""
        return array if isinstance(array, np.ndarray) else array.to_numpy()

    def readback(self, array: Any) -> Callable[[], Callable[[], np.ndarray]]:
        """A function that begins to read an int32 array, and returns one that waits for the values.
        Two may be waited for."""
        if self.on_cuda:
            from tilewright.runtime.cuda import Readback

            return Readback(array).begin

        def begin() -> Callable[[], np.ndarray]:
            copy = array.copy()
            return lambda: copy

        return begin

    def rows(self, array: Any, begin: int, end: int) -> Any:
        """Rows begin … end-1 of the first dimension, in place."""
        return array[begin:end] if isinstance(array, np.ndarray) else array.rows(begin, end)
