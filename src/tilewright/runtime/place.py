"""Putting arrays on a device: torch's where torch is there, Tilewright's own otherwise."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError


def to_device(array: Any, device: str) -> Any:
    """A copy of `array` on `device` (`cpu`, `cuda`, `cuda:N`)."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return to_host(array)
    if kind != "cuda":
        raise ArgumentError("A105", f"unknown device {device!r}", hint="cpu, cuda or cuda:0")
    host = to_host(array)
    if "torch" in sys.modules or importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            unsigned = {"uint16": np.int16, "uint32": np.int32, "uint64": np.int64}.get(
                host.dtype.name
            )
            return torch.from_numpy(host.view(unsigned) if unsigned else host).to(device)
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray.from_numpy(host, ordinal=int(number or 0))


def to_host(array: Any) -> np.ndarray:
    """Any array as a NumPy array, copied where it is on a device."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):
        return array.detach().cpu().numpy()
    if hasattr(array, "to_numpy"):
        return array.to_numpy()
    if hasattr(array, "get"):
        return array.get()
    return np.asarray(array)
