"""`View`, the internal description of an array, and its adapters to NumPy, torch and others.

Arrays are recognised by the type's own module, so no framework is imported that the caller has
not imported already. An adapter is looked up once a type. `view` checks and describes an array
(1 to 2 µs); `layout` returns a key of its layout, and its address (0.3 µs). A kernel calls the
first once for each layout, and the second at each call.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime import host_allocator


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """An array as kernels see it.

    `pointer` is the address of the first element; `shape` and `strides` count elements; `device`
    is `cpu` or `cuda:N`; `owner` keeps the memory alive.
    """

    pointer: int
    dtype: dtypes.DType
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
        rows = zip(self.shape, self.strides, row_major_strides(self.shape), strict=True)
        return self.size == 0 or all(n == 1 or step == packed for n, step, packed in rows)


def view(x: object) -> View:
    """The View of an array of NumPy, torch, CuPy, Tilewright, or anything with DLPack.

    Raises ArgumentError: A107 for an object that is no dense array, A102 for a dtype (or byte
    order) that Tilewright does not support, A104 for elements that are not aligned, A105 for an
    unknown device, A111 for a tensor of torch whose gradient is recorded.
    """
    return _adapter(type(x)).view(x)


def named_view(where: str, x: object) -> View:
    """`view(x)`; errors say where `x` is an argument. Raises ArgumentError."""
    try:
        return view(x)
    except ArgumentError as e:
        raise ArgumentError(e.code, e.message, where=where, hint=e.hint) from None


def check_memory(pointer: int | None, shape: Sequence[int]) -> None:
    """Refuse elements at a null address. Raises ArgumentError[A107]."""
    if not pointer and math.prod(shape):
        text = f"an array of shape {tuple(shape)} without memory: its address is null"
        hint = "a meta or fake tensor has no values, a freed storage none any more"
        raise ArgumentError("A107", text, hint=hint)


def layout(x: object) -> tuple[Any, int, object]:
    """(key, address, owner): a key of the array's layout, its address, and an object that must live
    as long as the address is used (None: the array itself).

    Arrays with equal keys whose addresses agree in the low four bits have equal Views except for
    the address. Raises ArgumentError.
    """
    described = _adapter(type(x)).layout(x)
    if not described[1]:
        view(x)  # refuses elements at a null address
    return described


def address(x: object) -> int:
    """The address of an array. Raises ArgumentError for elements at a null address."""
    try:
        return _adapter(type(x)).address(x) or view(x).pointer
    except RuntimeError:  # torch, for a tensor without memory
        return view(x).pointer


def _layout_any(x: object) -> tuple[Any, int, object]:
    v = view(x)
    return (type(x), v.dtype, v.shape, v.strides, v.device, v.readonly), v.pointer, v


def byte_span(v: View) -> tuple[int, int]:
    """The address of the first byte, and that behind the last."""
    low, high = byte_range(v)
    return v.pointer + low, v.pointer + high


def allocate(like: object, shape: tuple[int, ...], dtype: dtypes.DType) -> Any:
    """An uninitialised row-major array of the same framework and device as `like`.

    bfloat16 in NumPy is that of `ml_dtypes` where it is imported, else bits.
    """
    return allocator(like, shape, dtype)(like)


def allocator(like: object, shape: tuple[int, ...], dtype: dtypes.DType) -> Callable[[Any], Any]:
    """A function that allocates an array of this shape and dtype; its argument is an array with the
    layout of `like`."""
    if isinstance(like, np.ndarray):
        kind = _numpy_type(dtype)
        empty = host_allocator.empty if kind.isbuiltin == 1 else np.empty
        return lambda _: empty(shape, kind)
    module = _root_module(type(like))
    if module == "torch":
        torch = sys.modules["torch"]
        kind = getattr(torch, dtype.name)
        device = like.device  # pyright: ignore[reportAttributeAccessIssue]
        return lambda _: torch.empty(shape, dtype=kind, device=device)
    if module == "cupy":
        return lambda like: _empty_cupy(like, shape, dtype)
    device = view(like).device
    if device == "cpu":
        return lambda _: np.empty(shape, _numpy_type(dtype))
    from tilewright.runtime.cuda import DeviceArray

    return lambda _: DeviceArray(shape, dtype, ordinal_of(device))


def _empty_cupy(like: Any, shape: tuple[int, ...], dtype: dtypes.DType) -> Any:
    with like.device:
        return sys.modules["cupy"].empty(shape, _numpy_type(dtype))


def _view_numpy(x: np.ndarray) -> View:
    dtype = dtypes.from_numpy(x.dtype)
    strides = element_strides(x.strides, x.shape, x.itemsize)
    return checked(View(_address(x), dtype, x.shape, strides, "cpu", x, not x.flags.writeable))


def checked(v: View) -> View:
    """The view itself. Raises ArgumentError: A107 for elements at a null address, A104 for an
    address that is not aligned to the element."""
    check_memory(v.pointer, v.shape)
    if v.pointer % v.dtype.itemsize:
        text = f"the data at {v.pointer:#x} is not aligned to {v.dtype.itemsize} bytes of {v.dtype}"
        raise ArgumentError("A104", text, hint="copy the array")
    return v


def _layout_numpy(x: np.ndarray) -> tuple[Any, int, object]:
    return (x.dtype, x.shape, x.strides, x.flags.writeable), _address(x), None


_read_pointer, _HEADER, _PROBE = ctypes.c_void_p.from_address, object.__basicsize__, np.zeros(2)[1:]
_IS_FIRST_FIELD = (
    sys.implementation.name == "cpython"
    and _read_pointer(id(_PROBE) + _HEADER).value == _PROBE.ctypes.data
)


def _address(x: np.ndarray) -> int:
    # The data pointer is the first field of an array object after Python's header: part of
    # NumPy's public C interface. 0.1 µs against 0.8 µs for `ctypes.data`.
    return (_read_pointer(id(x) + _HEADER).value if _IS_FIRST_FIELD else x.ctypes.data) or 0


def _numpy_type(dtype: dtypes.DType) -> np.dtype:
    extensions = sys.modules.get("ml_dtypes") if dtype.name == "bfloat16" else None
    return np.dtype(extensions.bfloat16) if extensions else dtype.numpy


_TORCH_NAMES = {f"torch.{name}": t for name, t in dtypes.ALL.items()}


def _view_torch(x: Any) -> View:
    v = describe_torch(x)
    check_gradient(x)
    if x.is_neg():
        raise ArgumentError("A107", "a lazily negated tensor is not dense", hint="x.resolve_neg()")
    return v


def check_gradient(x: Any, where: str = "") -> None:
    """Refuse a tensor of torch whose gradient would be lost. Raises ArgumentError[A111]."""
    if getattr(x, "requires_grad", False) and sys.modules["torch"].is_grad_enabled():
        text = f"a {type(x).__name__} that requires grad: results would be cut off from its graph"
        raise ArgumentError("A111", text, where=where)


def describe_torch(x: Any) -> View:
    """The View of a tensor's memory, whatever its values and its gradient are."""
    device, known = _torch_device(x.device), _TORCH_NAMES.get(str(x.dtype))
    if known is None:
        hint = f"one of {', '.join(dtypes.ALL)}"
        if x.is_complex():
            hint = "real numbers: torch.view_as_real(x.resolve_conj()) has two for each"
        raise ArgumentError("A102", f"tensors of {x.dtype} cannot be used", hint=hint)
    if x.is_nested:
        hint = "x.to_padded_tensor(0.0)"
        raise ArgumentError("A107", "a nested tensor is not a dense array", hint=hint)
    try:
        pointer, strides = x.data_ptr(), x.stride()
    except RuntimeError as error:  # sparse tensors have no strides
        text = f"this {type(x).__name__} is not a dense array: {error}"
        raise ArgumentError("A107", text, hint="x.to_dense(), or pack it with a format") from None
    return checked(View(pointer, known, tuple(x.shape), strides, device, x, False))


def _refuse_fake(x: Any) -> View:
    check_memory(0, x.shape)  # asked for its address, torch would warn
    raise ArgumentError("A107", f"a {type(x).__name__} has no memory", hint="a tensor with values")


def _layout_torch(x: Any) -> tuple[Any, int, object]:
    check_gradient(x)
    try:
        return (x.dtype, x.shape, x.stride(), x.device, x.is_neg()), x.data_ptr(), None
    except RuntimeError:  # no dense array: `view` raises the error
        return _layout_any(x)


@functools.cache
def _torch_device(device: Any) -> str:
    if device.type == "meta":
        raise ArgumentError("A107", "a tensor on meta has no memory", hint="a tensor with values")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError("A105", f"tensors on {device} cannot be used", hint="cpu or cuda")
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


class Adapter(NamedTuple):
    """How arrays of one type become a View, a layout (see `layout`), and an address."""

    view: Callable[[Any], View]
    layout: Callable[[Any], tuple[Any, int, object]] = _layout_any
    address: Callable[[Any], int] = lambda x: view(x).pointer


_ADAPTERS = {np.ndarray: Adapter(_view_numpy, _layout_numpy, _address)}


def _adapter(kind: type) -> Adapter:
    known = _ADAPTERS.get(kind)
    if known is None:
        known = _ADAPTERS[kind] = _find_adapter(kind)
    return known


def _refuse(x: object) -> View:
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    is_sparse, is_masked = _root_module(type(x)) == "scipy", isinstance(x, np.ma.MaskedArray)
    hint = "pack it with a format" if is_sparse else "x.filled(value)" if is_masked else ""
    raise ArgumentError("A107", f"{kind} is not a dense array", hint=hint)


def _find_adapter(kind: Any) -> Adapter:
    if issubclass(kind, np.ma.MaskedArray):
        return Adapter(_refuse)  # its mask would be ignored
    if issubclass(kind, np.ndarray):
        return _ADAPTERS[np.ndarray]
    module = _root_module(kind)
    if module == "torch":
        if any(base.__name__ == "FakeTensor" for base in kind.__mro__):
            return Adapter(_refuse_fake)
        return Adapter(_view_torch, _layout_torch, kind.data_ptr)
    from tilewright.runtime import exchange

    if module == "cupy":
        return Adapter(exchange.view_cupy)
    if kind.__module__ == "tilewright.runtime.cuda":
        return Adapter(exchange.view_device_array)
    if hasattr(kind, "__cuda_array_interface__"):
        return Adapter(exchange.view_cuda_interface)
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return Adapter(exchange.view_dlpack)
    return Adapter(_refuse)


def _root_module(kind: type) -> str:
    """The framework of an array type: `torch` or `cupy` also for subclasses of their arrays."""
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        if (root, base.__name__) in (("torch", "Tensor"), ("cupy", "ndarray")):
            return root
    return kind.__module__.partition(".")[0] if kind.__module__.startswith("scipy.") else ""


@functools.lru_cache(maxsize=4096)
def element_strides(
    steps: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...]:
    """Strides in elements from strides in bytes; that of an axis of one element is never used.
    Raises ArgumentError[A104]."""
    if any(step % itemsize and n > 1 for step, n in zip(steps, shape, strict=True)):
        text = f"strides {steps} (bytes) are no multiples of the {itemsize}-byte element"
        raise ArgumentError("A104", text, hint="copy the array")
    return tuple(step // itemsize for step in steps)


def ordinal_of(device: str) -> int:
    """The number of a GPU: 0 for "cuda", 2 for "cuda:2"."""
    return int(device.partition(":")[2] or 0)


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def byte_range(v: View) -> tuple[int, int]:
    """First and last byte (exclusive) relative to the pointer; equal for an empty view."""
    return _byte_range(v.shape, v.strides, v.dtype.itemsize)


@functools.lru_cache(4096)
def _byte_range(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    if 0 in shape:
        return 0, 0
    last = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    low, high = sum(min(n, 0) for n in last), sum(max(n, 0) for n in last)
    return low * itemsize, (high + 1) * itemsize
