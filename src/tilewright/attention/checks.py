"""Checks of arguments that the nouns of the attention engine share."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime.transfer import to_host
from tilewright.runtime.view import View, named_view

FLOATS = (dtypes.float32, dtypes.float16, dtypes.bfloat16)
INTEGERS = (dtypes.int32, dtypes.int64)


def check_view(
    name: str, seen: View, kinds: Sequence[DType] = (), shape: tuple[int, ...] | None = None,
    device: str = "", where: str = "", hint: str = "",
) -> None:  # fmt: skip
    """An argument has one of these dtypes, this shape, and is on this device, where they are given.
    Raises ArgumentError[A102, A103, A105]."""
    where = where or name
    if kinds and seen.dtype not in kinds:
        text = f"{name} is {seen.dtype}, not {' or '.join(map(str, dict.fromkeys(kinds)))}"
        raise ArgumentError("A102", text, where=where, hint=hint)
    if shape is not None and seen.shape != shape:
        text = f"{name} has shape {seen.shape}, not {shape}"
        raise ArgumentError("A103", text, where=where, hint=hint)
    if device and seen.device != device:
        raise ArgumentError("A105", f"{name} is on {seen.device}, not {device}", where=where)


def float_view(name: str, array: Any) -> View:
    """A view of float32, float16 or bfloat16. Raises ArgumentError[A102]."""
    seen = named_view(name, array)
    check_view(name, seen, FLOATS, hint="bfloat16 in NumPy: ml_dtypes")
    return seen


def integer_view(
    name: str, array: Any, ndim: int = 1, kinds: Sequence[DType] = INTEGERS, device: str = "",
    size: int | None = None,
) -> View:  # fmt: skip
    """A view of integers whose last dimension is contiguous; `size`: its length.
    Raises ArgumentError."""
    seen = named_view(name, array)
    check_view(name, seen, kinds)
    if seen.ndim != ndim:
        raise ArgumentError("A103", f"{name} has {seen.ndim} dimensions, not {ndim}", where=name)
    if seen.size and seen.shape[-1] > 1 and seen.strides[-1] != 1:
        raise ArgumentError("A104", f"{name} is not contiguous", where=name)
    shape = seen.shape if size is None else (size,)
    check_view(name, seen, shape=shape, device=device, hint="one a request; an indptr has one more")
    return seen


def rises(indptr: np.ndarray) -> bool:
    """Whether no number is below the one before it. Differences would wrap around in int32."""
    return not bool((indptr[1:] < indptr[:-1]).any())


def host_indptr(name: str, array: Any, requests: int) -> np.ndarray:
    """`array` (requests + 1,) on the host as int32, rising from 0. Raises ArgumentError."""
    try:
        indptr = np.asarray(array if isinstance(array, list) else to_host(array))
    except ValueError as error:  # lists of different lengths
        raise ArgumentError("A107", f"no array: {error}", where=name) from None
    if indptr.dtype.kind not in "iu" or indptr.shape != (requests + 1,):
        text = f"{name} is {indptr.dtype} of shape {indptr.shape}, of {requests} requests"
        raise ArgumentError("A103", text, where=name, hint="int32 of shape (requests + 1,)")
    if indptr[0] != 0 or not rises(indptr) or int(indptr[-1]) >= 2**31:
        raise ArgumentError("A109", f"{name} must rise from 0", where=name)
    return indptr.astype(np.int32)


def check_range(name: str, values: np.ndarray, lowest: int, highest: int) -> None:
    """Every value is in lowest … highest; `name`: of the argument, and behind a comma what the
    values are. Raises ArgumentError[A109]."""
    if values.size and (values.min() < lowest or values.max() > highest):
        bad, where = values[(values < lowest) | (values > highest)][0], name.partition(",")[0]
        raise ArgumentError("A109", f"{name} holds {bad}, outside {lowest}..{highest}", where=where)


def check_count(name: str, value: Any, most: int = 2**31 - 1, least: int = 1) -> int:
    """`value` as an int of least … most. Raises ArgumentError[A103]."""
    if not is_integer(value) or not least <= value <= most:
        text = f"{name}={value!r} is no integer of {least}..{most}"
        raise ArgumentError("A103", text, where=name)
    return int(value)


def is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def is_integer(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)
