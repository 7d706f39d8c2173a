"""One internal description of every array that enters: `View`, and its adapters.

Arrays are recognised by the type's own module, so no framework is imported that the caller has
not imported already. Adapters are found once per type; a NumPy array then costs under 1 µs.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime import pages


@dataclass(slots=True)
class _Draft:
    """The fields of a View while it is made: seven plain stores, where a frozen class pays
    for seven calls of `object.__setattr__` (0.1 µs against 0.5)."""

    pointer: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    owner: object
    readonly: bool


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """An array as kernels see it.

    `pointer` is the address of the first element; `shape` and `strides` count elements; `device`
    is `cpu` or `cuda:N`; `owner` keeps the memory alive.
    """

    pointer: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    owner: object
    readonly: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return self.size == 0
            expected *= extent
        return True


def view(x: object) -> View:
    """The View of an array of NumPy, torch, CuPy, Tilewright, or anything with DLPack.

    Raises ArgumentError: A107 for what is not a dense array, A102 for a dtype (or byte order) that
    Tilewright has not, A104 for elements that are not aligned, A105 for an unknown device.
    """
    adapter = _ADAPTERS.get(type(x))
    if adapter is None:
        adapter = _ADAPTERS[type(x)] = _find_adapter(type(x))
    return adapter(x)


def overlaps(a: View, b: View) -> bool:
    """Whether the byte ranges of two views meet. Ranges, so interleaved views count as meeting."""
    if a.device != b.device:
        return False
    a_low, a_high = _extent(a)
    b_low, b_high = _extent(b)
    if a_low == a_high or b_low == b_high:  # no elements
        return False
    return a.pointer + a_low < b.pointer + b_high and b.pointer + b_low < a.pointer + a_high


def allocate(like: object, shape: tuple[int, ...], dtype: DType) -> Any:
    """An uninitialised row-major array of the same framework and device as `like`.

    bfloat16 and 8-bit floats in NumPy are those of `ml_dtypes` where it is imported, else bits.
    """
    if isinstance(like, np.ndarray):
        large = math.prod(shape) * dtype.itemsize >= pages.SMALLEST and dtype.name in _PLAIN
        return pages.empty(shape, dtype.numpy) if large else np.empty(shape, _numpy_type(dtype))
    module = _root_module(type(like))
    if module == "torch":
        torch = sys.modules["torch"]
        if not _TO_TORCH:
            _learn_torch()
        kind = _TO_TORCH[dtype.name]
        return torch.empty(shape, dtype=kind, device=like.device)  # pyright: ignore[reportAttributeAccessIssue]
    if module == "cupy":
        cupy = sys.modules["cupy"]
        with like.device:  # pyright: ignore[reportAttributeAccessIssue]
            return cupy.empty(shape, _numpy_type(dtype))
    place = view(like).device
    if place == "cpu":
        return np.empty(shape, _numpy_type(dtype))
    from tilewright.runtime.cuda import DeviceArray

    return DeviceArray(shape, dtype, int(place.partition(":")[2]))


# ---- NumPy ------------------------------------------------------------------------------------

_NUMPY_TYPES: dict[np.dtype, DType] = {
    t.numpy: t for t in dtypes.ALL.values() if t.numpy.name == t.name
}
_STRIDES: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
_STRIDES_KEPT = 4096


def _view_numpy(x: np.ndarray) -> View:
    kind = x.dtype
    known = _NUMPY_TYPES.get(kind)
    if known is None:
        known = _NUMPY_TYPES[kind] = _numpy_dtype(kind)
    key = (x.strides, kind.itemsize)
    strides = _STRIDES.get(key)
    if strides is None:
        strides = _element_strides(x.strides, kind.itemsize)
        if len(_STRIDES) >= _STRIDES_KEPT:
            _STRIDES.clear()
        _STRIDES[key] = strides
    pointer = _address(x)
    if pointer % key[1]:
        _refuse_alignment(pointer, known)
    return _made(pointer, known, x.shape, strides, "cpu", x, not x.flags.writeable)


def _made(
    pointer: int,
    dtype: DType,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: str,
    owner: object,
    readonly: bool,
) -> View:
    draft = _Draft(pointer, dtype, shape, strides, device, owner, readonly)
    draft.__class__ = View  # pyright: ignore[reportAttributeAccessIssue]  # the same slots
    return draft  # pyright: ignore[reportReturnType]


def _slow_address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])


def _fast_address(x: np.ndarray) -> int:
    # The data pointer is the first field of an array object after Python's header: part of
    # NumPy's public C interface. 0.09 µs against 0.8 µs for `__array_interface__`.
    return _read_pointer(id(x) + _OBJECT_HEADER).value or 0


_read_pointer = ctypes.c_void_p.from_address
_OBJECT_HEADER = object.__basicsize__


def _choose_address() -> Callable[[np.ndarray], int]:
    """The fast way where it agrees with the slow one on arrays of several kinds."""
    if sys.implementation.name != "cpython":
        return _slow_address
    whole = np.arange(24.0).reshape(4, 6)
    samples = (whole, whole[1:, ::2], whole[::-1].T, np.empty((0, 3)), np.zeros((), np.int8))
    agree = all(_fast_address(x) == _slow_address(x) for x in samples)
    return _fast_address if agree else _slow_address


_address = _choose_address()


def _numpy_dtype(kind: np.dtype) -> DType:
    """The DType of a NumPy dtype that the table lacks."""
    if not kind.isnative:
        raise ArgumentError(
            "A102",
            f"byte order of {kind.str} is not this machine's",
            hint="x.astype(x.dtype.newbyteorder('='))",
        )
    found = _EXTENSION_TYPES.get(kind.name)
    if found is None:
        names = ", ".join(dtypes.ALL)
        raise ArgumentError("A102", f"arrays of {kind} cannot be used", hint=f"one of {names}")
    return found


# ml_dtypes has an IEEE-like float8_e4m3 too: another format, refused.
_EXTENSION_TYPES = {
    "bfloat16": dtypes.bfloat16,
    "float8_e4m3fn": dtypes.float8_e4m3,
    "float8_e5m2": dtypes.float8_e5m2,
}


_PLAIN = {t.name: t.numpy for t in _NUMPY_TYPES.values()}
_EXTENSION_NAMES = {t.name: name for name, t in _EXTENSION_TYPES.items()}


def _numpy_type(dtype: DType) -> np.dtype:
    plain = _PLAIN.get(dtype.name)
    if plain is not None:
        return plain
    extensions = sys.modules.get("ml_dtypes")
    if extensions is None:
        return dtype.numpy
    return np.dtype(getattr(extensions, _EXTENSION_NAMES[dtype.name]))


# ---- torch ------------------------------------------------------------------------------------

_FROM_TORCH: dict[Any, DType] = {}
_TO_TORCH: dict[str, Any] = {}
_TORCH_PLACES: dict[Any, str] = {}


def _learn_torch() -> None:
    """Fill the tables of torch's dtypes, once torch is there."""
    torch = sys.modules["torch"]
    for name, known in dtypes.ALL.items():
        kind = getattr(torch, "float8_e4m3fn" if name == "float8_e4m3" else name, None)
        if kind is not None:  # older versions have no uint16 … uint64
            _FROM_TORCH[kind], _TO_TORCH[name] = known, kind


def _view_torch(x: Any) -> View:
    """Gradients are not looked at: the caller's data is read as `detach()` would give it."""
    place = x.device
    device = _TORCH_PLACES.get(place) or _torch_place(place)
    known = _FROM_TORCH.get(x.dtype)
    if known is None:
        names = ", ".join(dtypes.ALL)
        raise ArgumentError("A102", f"tensors of {x.dtype} cannot be used", hint=f"one of {names}")
    try:
        pointer, strides = x.data_ptr(), x.stride()
    except RuntimeError as error:  # sparse tensors have no strides, fake ones no memory
        raise ArgumentError(
            "A107", f"this {type(x).__name__} is not a dense array: {error}"
        ) from None
    if x.is_neg():
        raise ArgumentError("A107", "a lazily negated tensor is not dense", hint="x.resolve_neg()")
    if pointer % known.itemsize:
        _refuse_alignment(pointer, known)
    return _made(pointer, known, tuple(x.shape), strides, device, x, False)


def _torch_place(place: Any) -> str:
    if place.type not in ("cpu", "cuda"):
        raise ArgumentError("A105", f"tensors on {place} cannot be used", hint="cpu or cuda")
    if not _FROM_TORCH:
        _learn_torch()
    named = "cpu" if place.type == "cpu" else f"cuda:{place.index or 0}"
    return _TORCH_PLACES.setdefault(place, named)


# ---- CuPy, __cuda_array_interface__, our own -----------------------------------------------------


def _view_cupy(x: Any) -> View:
    known = _NUMPY_TYPES.get(x.dtype) or _numpy_dtype(x.dtype)
    strides = _element_strides(x.strides, x.dtype.itemsize)
    return _made(x.data.ptr, known, x.shape, strides, f"cuda:{x.device.id}", x, False)


def _view_device_array(x: Any) -> View:
    strides = _row_major(x.shape)
    return _made(x.pointer, x.dtype, x.shape, strides, f"cuda:{x.device.ordinal}", x, False)


def _view_cuda_interface(x: Any) -> View:
    from tilewright.runtime import cuda

    said = x.__cuda_array_interface__
    if said.get("mask") is not None:
        raise ArgumentError("A107", "a masked array is not a dense array")
    kind = np.dtype(said["typestr"])
    known = _NUMPY_TYPES.get(kind) or _numpy_dtype(kind)
    shape = tuple(said["shape"])
    steps = said.get("strides")
    strides = _row_major(shape) if steps is None else _element_strides(tuple(steps), kind.itemsize)
    pointer, readonly = said["data"]
    ordinal = cuda.pointer_device(pointer) if pointer else cuda.current_device()
    stream = said.get("stream")
    if stream is not None and stream != (cuda.current_stream(ordinal) or 1):
        cuda.synchronize(stream, ordinal)  # the producer may still be writing there
    return _made(pointer or 0, known, shape, strides, f"cuda:{ordinal}", x, bool(readonly))


# ---- DLPack -----------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_DL_READONLY = 1
_DL_CPU = (1, 3)  # host memory; host memory pinned for CUDA
_DL_CUDA = (2, 13)  # device memory; managed memory
_DL_TYPES = {
    (code, t.bits): t
    for code, kind in ((0, "i"), (1, "u"), (2, "f"), (6, "b"))
    for t in dtypes.ALL.values()
    if t.kind == kind and (t.name.startswith(("int", "uint", "bool")) or t.name[5:].isdigit())
} | {(4, 16): dtypes.bfloat16, (10, 8): dtypes.float8_e4m3, (12, 8): dtypes.float8_e5m2}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes, _capsule_pointer.restype = (
    [ctypes.py_object, ctypes.c_char_p],
    ctypes.c_void_p,
)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes, _capsule_is.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int


def _view_dlpack(x: Any) -> View:
    """The capsule stays unconsumed in `owner`: its own destructor gives the memory back."""
    capsule = _export(x)
    readonly = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _DLVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise ArgumentError(
                "A107", f"DLPack version {managed.major} is not known", hint="version 1"
            )
        tensor, readonly = managed.tensor, bool(managed.flags & _DL_READONLY)
    elif _capsule_is(capsule, b"dltensor"):
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise ArgumentError("A107", f"{type(x).__name__}.__dlpack__ gave no DLPack capsule")
    known = _DL_TYPES.get((tensor.code, tensor.bits))
    if known is None or tensor.lanes != 1:
        spelled = f"type {tensor.code} of {tensor.bits} bits x {tensor.lanes}"
        raise ArgumentError("A102", f"DLPack arrays of {spelled} cannot be used")
    if tensor.device_type in _DL_CPU:
        device = "cpu"
    elif tensor.device_type in _DL_CUDA:
        device = f"cuda:{tensor.device_id}"
    else:
        raise ArgumentError(
            "A105", f"DLPack device type {tensor.device_type} is not known", hint="cpu or cuda"
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = (
        tuple(tensor.strides[i] for i in range(tensor.ndim))
        if tensor.strides
        else _row_major(shape)
    )
    pointer = (tensor.data or 0) + tensor.byte_offset
    if pointer % known.itemsize:
        _refuse_alignment(pointer, known)
    return _made(pointer, known, shape, strides, device, (x, capsule), readonly)


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
        raise ArgumentError(
            "A107", f"{type(x).__name__} cannot be shared by DLPack: {error}"
        ) from None


# ---- finding the adapter ------------------------------------------------------------------------


def _refuse(x: object) -> View:
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    hint = "a NumPy, torch or CuPy array, or any object with __dlpack__"
    if _root_module(type(x)) == "scipy":
        hint = "pack sparse matrices with a format"
    elif isinstance(x, np.ma.MaskedArray):
        hint = "x.filled(value)"
    raise ArgumentError("A107", f"{kind} is not a dense array", hint=hint)


def _find_adapter(kind: type) -> Callable[[Any], View]:
    if issubclass(kind, np.ma.MaskedArray):
        return _refuse  # its mask would be ignored
    if issubclass(kind, np.ndarray):
        return _view_numpy
    module = _root_module(kind)
    if module == "torch":
        return _view_torch
    if module == "cupy":
        return _view_cupy
    if kind.__module__ == "tilewright.runtime.cuda":
        return _view_device_array
    if hasattr(kind, "__cuda_array_interface__"):
        return _view_cuda_interface
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _view_dlpack
    return _refuse


_ADAPTERS: dict[type, Callable[[Any], View]] = {np.ndarray: _view_numpy}


def _root_module(kind: type) -> str:
    """The framework of an array type: `torch` or `cupy` also for subclasses of their arrays."""
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        if (root, base.__name__) in (("torch", "Tensor"), ("cupy", "ndarray")):
            return root
    return kind.__module__.partition(".")[0] if kind.__module__.startswith("scipy.") else ""


# ---- arithmetic -------------------------------------------------------------------------------


def _element_strides(steps: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    if any(step % itemsize for step in steps):
        raise ArgumentError(
            "A104",
            f"strides {steps} (bytes) are no multiples of the {itemsize}-byte element",
            hint="copy the array",
        )
    return tuple(step // itemsize for step in steps)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


_EXTENTS: dict[tuple[tuple[int, ...], tuple[int, ...], int], tuple[int, int]] = {}


def _extent(v: View) -> tuple[int, int]:
    """First and last byte (exclusive) relative to the pointer; equal for an empty view."""
    key = (v.shape, v.strides, v.dtype.bits)
    found = _EXTENTS.get(key)
    if found is None:
        low = high = 0
        for extent, stride in zip(v.shape, v.strides, strict=True):
            reach = (extent - 1) * stride
            low, high = low + min(reach, 0), high + max(reach, 0)
        item = v.dtype.itemsize
        found = (low * item, (high + 1) * item) if v.size else (0, 0)
        if len(_EXTENTS) >= _STRIDES_KEPT:
            _EXTENTS.clear()
        _EXTENTS[key] = found
    return found


def _refuse_alignment(pointer: int, dtype: DType) -> None:
    raise ArgumentError(
        "A104",
        f"the data at {pointer:#x} is not aligned to {dtype.itemsize} bytes of {dtype}",
        hint="copy the array",
    )
