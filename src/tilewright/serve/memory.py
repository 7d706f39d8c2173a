"""Allocates a model's arrays: NumPy on the CPU, device memory on a GPU. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.target import Target


IN_FLIGHT_BYTES = 4 << 20  # of the copies of a step that nobody waits for


class Memory:
    """Allocates, writes and reads arrays of one target."""

    def __init__(self, target: Target) -> None:
        self.on_cuda, self._transfers = target.is_cuda, None
        if self.on_cuda:
            from tilewright.runtime.cuda import Transfers

            self._transfers = Transfers(IN_FLIGHT_BYTES)

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

    def turn(self) -> None:
        """Begins a step: what the one before the last has copied may be forgotten."""
        if self._transfers is not None:
            self._transfers.turn()

    def write(self, array: Any, values: Any) -> None:
        """Overwrites an array of the target; on a GPU in the order of what is launched."""
        if self._transfers is None:
            array[...] = values
            return
        if array.dtype.name == "bfloat16":
            values = dtypes.bfloat16_bits(np.asarray(values, np.float32))
        whole = np.broadcast_to(np.asarray(values, array.dtype.numpy), array.shape)
        self._transfers.write(array, whole)

    def read(self, array: Any) -> np.ndarray:
        """The contents on the host."""
        return array if isinstance(array, np.ndarray) else array.to_numpy()

    def read_later(self, array: Any) -> Callable[[], np.ndarray]:
        """What the array holds when all that is launched now has run: a function that waits for
        it. Once a step."""
        if self._transfers is None:
            copy = array.copy()
            return lambda: copy
        return self._transfers.read(array)

    def rows(self, array: Any, begin: int, end: int) -> Any:
        """Rows begin … end-1 of the first dimension, in place."""
        return array[begin:end] if isinstance(array, np.ndarray) else array.rows(begin, end)
