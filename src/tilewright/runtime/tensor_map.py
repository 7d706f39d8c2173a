"""Tensor maps: what TMA knows of an array in global memory (sm_90 and newer)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.runtime.driver import driver

_TYPES = {dtypes.float16: 6, dtypes.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128, _PROMOTE_256, _WORDS = 3, 3, 16


def tensor_map(
    pointer: int, dtype: DType, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> list[int]:
    """A CUtensorMap as 16 words of 64 bits, for boxes in the 128-byte swizzle.

    Dimensions with the fastest first, which is contiguous; `strides` of the others, in elements.
    What lies outside `shape` reads as 0. Raises InternalError[I101] where the driver refuses.
    """
    rank, size = len(shape), dtype.itemsize
    buffer = (ctypes.c_uint64 * (2 * _WORDS))()  # a map lies at a multiple of 64 bytes
    address = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 64
    code = driver().functions["cuTensorMapEncodeTiled"](
        address, _TYPES[dtype], rank, pointer,
        (ctypes.c_uint64 * rank)(*shape), (ctypes.c_uint64 * rank)(*(n * size for n in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    if code:
        geometry = f"shape {tuple(shape)}, strides {tuple(strides)}, box {tuple(box)}"
        raise InternalError("I101", f"no tensor map: {driver().error_name(code)} of {geometry}")
    return list((ctypes.c_uint64 * _WORDS).from_address(address))
