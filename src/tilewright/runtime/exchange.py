"""Arrays of other libraries: by DLPack, by `__cuda_array_interface__`, CuPy's, Tilewright's own.

Loaded when the first of them enters; NumPy's and torch's are known to `runtime.view` itself.
"""

import ctypes
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime.view import View, check_memory, checked, element_strides, row_major_strides


def view_cupy(x: Any) -> View:
    known = dtypes.from_numpy(x.dtype)
    strides = element_strides(x.strides, x.shape, x.dtype.itemsize)
    return checked(View(x.data.ptr, known, x.shape, strides, f"cuda:{x.device.id}", x, False))


def view_device_array(x: Any) -> View:
    strides, device = row_major_strides(x.shape), f"cuda:{x.device.ordinal}"
    return checked(View(x.pointer, x.dtype, x.shape, strides, device, x, False))


def view_cuda_interface(x: Any) -> View:
    from tilewright.runtime import cuda

    described = x.__cuda_array_interface__
    if described.get("mask") is not None:
        raise ArgumentError("A107", "a masked array is not a dense array")
    known = dtypes.from_numpy(np.dtype(described["typestr"]))
    shape = tuple(described["shape"])
    strides = row_major_strides(shape)
    if described.get("strides") is not None:
        strides = element_strides(tuple(described["strides"]), shape, known.itemsize)
    pointer, readonly = described["data"]
    ordinal = cuda.pointer_device(pointer) if pointer else cuda.current_device()
    stream = described.get("stream")
    if stream is not None and stream != (cuda.current_stream(ordinal) or 1):
        cuda.synchronize(stream, ordinal)  # the producer may still be writing there
    device, readonly = f"cuda:{ordinal}", bool(readonly)
    return checked(View(pointer or 0, known, shape, strides, device, x, readonly))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
        ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16),
        ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("byte_offset", c_uint64),
    )  # fmt: skip


class _DLVersioned(ctypes.Structure):
    _fields_ = (
        ("major", c_uint32), ("minor", c_uint32), ("context", c_void_p), ("deleter", c_void_p),
        ("flags", c_uint64), ("tensor", _DLTensor),
    )  # fmt: skip


_DL_READONLY = 1
_DL_CPU = (1, 3)  # host memory; host memory pinned for CUDA
_DL_CUDA = (2, 13)  # device memory; managed memory
_DL_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_DL_TYPES = {(_DL_CODES[t.kind], t.bits): t for t in dtypes.ALL.values() if t.name != "bfloat16"}
_DL_TYPES[4, 16] = dtypes.bfloat16

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = c_void_p
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes, _capsule_is.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int


def view_dlpack(x: Any) -> View:
    """The capsule stays unconsumed in `owner`: its own destructor gives the memory back."""
    capsule = _export(x)
    readonly = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _DLVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise ArgumentError("A107", f"DLPack version {managed.major}", hint="version 1")
        tensor, readonly = managed.tensor, bool(managed.flags & _DL_READONLY)
    elif _capsule_is(capsule, b"dltensor"):
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise ArgumentError("A107", f"{type(x).__name__}.__dlpack__ gave no DLPack capsule")
    known = _DL_TYPES.get((tensor.code, tensor.bits))
    if known is None or tensor.lanes != 1:
        name = f"type {tensor.code} of {tensor.bits} bits x {tensor.lanes}"
        raise ArgumentError("A102", f"DLPack arrays of {name} cannot be used")
    if tensor.device_type in _DL_CPU:
        device = "cpu"
    elif tensor.device_type in _DL_CUDA:
        device = f"cuda:{tensor.device_id}"
    else:
        raise ArgumentError("A105", f"DLPack device {tensor.device_type}", hint="cpu or cuda")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else row_major_strides(shape)
    check_memory(tensor.data, shape)  # an offset may hide that it is null
    pointer = (tensor.data or 0) + tensor.byte_offset
    return checked(View(pointer, known, shape, strides, device, (x, capsule), readonly))


def _export(x: Any) -> Any:
    """The capsule of an array, ordered on our stream."""
    options: dict[str, Any] = {}
    if x.__dlpack_device__()[0] in _DL_CUDA:
        from tilewright.runtime import cuda

        options["stream"] = cuda.current_stream() or 1  # 1 is the protocol's word for stream 0
    try:
        try:
            return x.__dlpack__(max_version=(1, 0), **options)
        except TypeError:  # an exporter older than versions
            return x.__dlpack__(**options)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("A107", f"{type(x).__name__} gives no DLPack array: {error}") from None
