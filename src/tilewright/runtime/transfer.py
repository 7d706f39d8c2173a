"""Copies between host and device: torch tensors if torch is installed, else `DeviceArray`."""

import importlib.util
import sys
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime.view import check_gradient, describe_torch, view


def to_device(array: Any, device: str) -> Any:
    """A copy of `array` on `device` (`cpu`, `cuda`, `cuda:N`). Raises ArgumentError[A105]."""
    ordinal = ordinal_in(str(device))
    host = to_host(array)
    if ordinal is None:
        return host
    if "torch" in sys.modules or importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            if ordinal >= torch.cuda.device_count():
                raise ArgumentError("A105", f"there is no device {device}", where="device")
            if host.dtype.kind == "u" and host.itemsize > 1:  # older versions of torch lack these
                host = host.view(f"i{host.itemsize}")
            if not host.flags.writeable:  # torch warns
                host = host.copy()
            return torch.from_numpy(host).to(str(device))
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray.from_numpy(host, ordinal=ordinal)


def ordinal_in(device: str) -> int | None:
    """The number of a CUDA device that a user names; None for the host. Raises
    ArgumentError[A105]."""
    kind, colon, number = device.partition(":")
    if kind == "cuda" and (number.isdecimal() or not colon):
        return int(number or 0)
    if device != "cpu":
        raise ArgumentError("A105", f"no device {device!r}", where="device", hint="cpu or cuda:0")
    return None


def to_host(array: Any) -> np.ndarray:
    """Any array as a NumPy array, copied where it is on a device; torch's bfloat16, which NumPy
    does not know, as its bits (uint16). Raises ArgumentError: A107 for elements at a null address,
    also in a list, A102 for a dtype of torch, A111 for a gradient."""
    if isinstance(array, (list, tuple)):
        array = [x if isinstance(x, (int, float, str)) else to_host(x) for x in array]
    if hasattr(array, "detach"):
        check_gradient(array)
        return _torch_to_host(array.detach())
    if hasattr(array, "to_numpy"):
        return array.to_numpy()
    if hasattr(array, "get") and hasattr(array, "dtype"):  # CuPy; a dict has `get` but no dtype
        return array.get()
    if hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
        return np.from_dlpack(array)
    return np.asarray(array)


def _torch_to_host(tensor: Any) -> np.ndarray:
    if str(tensor.layout) == "torch.strided":
        (describe_torch if tensor.is_neg() else view)(tensor)  # before its memory is read
    host = tensor.resolve_neg().cpu()
    if str(host.dtype) != "torch.bfloat16":
        return host.numpy()
    import torch

    return host.view(torch.int16).numpy().view(np.uint16)


def as_float64(array: Any, at: Any = ()) -> np.ndarray:
    """Any float array as float64 on the host; of a cache only the elements at the index `at`: the
    rest may be large, and was perhaps never written."""
    kind, is_torch = view(array).dtype, hasattr(array, "detach")
    host = to_host(array.detach()[at]) if is_torch else to_host(array)[at]
    if kind == dtypes.bfloat16 and host.dtype == np.uint16:
        host = dtypes.bfloat16_values(host)
    return np.asarray(host, np.float64)


def write(array: Any, values: Any, waits: bool = True) -> None:
    """Overwrites an array with a number, or values of NumPy, converted to its dtype. `waits`: as in
    `DeviceArray.copy_from`."""
    if hasattr(array, "copy_from"):
        values = np.asarray(values, array.dtype.numpy)
        array.copy_from(np.broadcast_to(values, array.shape), waits=waits)
    elif hasattr(array, "detach"):  # bfloat16 among them
        array.detach().copy_(sys.modules["torch"].as_tensor(values))
    else:
        array[...] = values
