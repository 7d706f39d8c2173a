"""Allocates a model's arrays: NumPy on the CPU, device memory on a GPU. Needs no torch."""

import math
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.runtime.cuda import DeviceArray, HostWords
from tilewright.runtime.transfer import write
from tilewright.target import Target


class Memory:
    """Allocates, writes and reads arrays of one target."""

    write = staticmethod(write)

    def __init__(self, target: Target) -> None:
        self.on_cuda = target.is_cuda

    def empty(self, *shape: int, dtype: str = "float32") -> Any:
        """A new array, not initialised."""
        kind = dtypes.dtype(dtype)
        return DeviceArray(shape, kind) if self.on_cuda else np.empty(shape, kind.numpy)

    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """The array in memory of the target: a copy on a GPU, but of a tensor that is there."""
        if not self.on_cuda or not isinstance(array, np.ndarray):
            return array
        return DeviceArray.from_numpy(np.ascontiguousarray(array), dtype)

    def readback(self, array: Any) -> Callable[[], Callable[[], np.ndarray]]:
        """A function that begins to read an int32 array, and returns one that waits for the values.
        Two may be waited for."""
        if not self.on_cuda:
            return lambda: partial(np.array, array.copy())
        copies = cycle([HostWords(0, math.prod(array.shape)) for _ in range(2)])
        return lambda: next(copies).copy(array)

    def sender(self, array: Any) -> Callable[[Any], None]:
        """What writes the first values of an int32 array; it waits while two are under way."""
        if not self.on_cuda:
            return lambda values: self.write(self.rows(array, 0, len(values)), values)
        copies = cycle([HostWords(0, math.prod(array.shape)) for _ in range(2)])
        return lambda values: next(copies).send(array, values)

    def rows(self, array: Any, begin: int, end: int) -> Any:
        """Rows begin … end-1 of the first dimension, in place."""
        return array.rows(begin, end) if isinstance(array, DeviceArray) else array[begin:end]
