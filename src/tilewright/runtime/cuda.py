"""CUDA on the device: modules, launches, graphs, and memory where no framework gives any.

Functions raise BuildError[B102] where there is no driver. Kernels take one struct by value, so a
launch has one parameter: the address of its bytes.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from ctypes import c_uint, c_void_p
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.dtypes import dtype as to_dtype
from tilewright.errors import ArgumentError, BuildError, InternalError
from tilewright.runtime.driver import ATTRIBUTE_MAJOR, device, driver
from tilewright.runtime.view import View, ordinal_of

Dim3 = tuple[int, int, int]
Params = ctypes.Array[Any]
"""The bytes of a kernel's one struct."""

_SMEM_WITHOUT_ASKING = 48 * 1024
_FUNCTION_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CAPTURE_RELAXED = 2  # memory may be freed meanwhile, as by Python's collector
_STREAM_NON_BLOCKING = 1
_POINTER_DEVICE_ORDINAL = 9


def available() -> bool:
    """Whether kernels can run here: a driver that starts, and a GPU."""
    try:
        return driver().returned("cuDeviceGetCount") > 0
    except BuildError:
        return False


def current_device() -> int:
    """The number of the GPU in use: torch's where torch is in use, else 0."""
    return int(sys.modules["torch"].cuda.current_device()) if _torch_streams() else 0


def current_stream(ordinal: int | None = None) -> int:
    """The stream to launch on: torch's current one, else CuPy's, else 0, the legacy default."""
    streams = _torch_streams()
    if streams is not None:
        return streams(current_device() if ordinal is None else ordinal)
    cupy = sys.modules.get("cupy")
    return 0 if cupy is None else int(cupy.cuda.get_current_stream().ptr)


_stream_getters: list[Callable[[int], int]] = []


def _torch_streams() -> Callable[[int], int] | None:
    """torch's current stream by the number of a GPU, once torch has started CUDA: from then on it
    is never asked again whether it has (1 µs of a call)."""
    if _stream_getters:
        return _stream_getters[0]
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 20 × faster than the object
    _stream_getters.append(raw or (lambda n: int(torch.cuda.current_stream(n).cuda_stream)))
    return _stream_getters[0]


def _active_stream(ordinal: int) -> int:
    """The current stream of a GPU, whose context becomes current in this thread."""
    device(ordinal).activate()
    return current_stream(ordinal)


def is_capturing(ordinal: int) -> bool:
    """Whether the current stream records a CUDA graph."""
    status = ctypes.c_int()
    driver().call("cuStreamIsCapturing", _active_stream(ordinal), ctypes.byref(status))
    return status.value != 0


def clear(array: View) -> None:
    """Set every byte of an array to 0, on a GPU in the order of its current stream."""
    nbytes = array.size * array.dtype.itemsize
    if array.device == "cpu":
        ctypes.memset(array.pointer, 0, nbytes)
        return
    stream = _active_stream(ordinal_of(array.device))
    driver().call("cuMemsetD8Async", array.pointer, 0, nbytes, stream)


def synchronize(stream: int = 0, ordinal: int = 0) -> None:
    """Wait until everything on a stream is done; failures of earlier kernels show here (B104)."""
    device(ordinal).activate()
    driver().call("cuStreamSynchronize", stream)


class Module:
    """A cubin, loaded into the primary context of a GPU until the process ends."""

    def __init__(self, image: bytes, ordinal: int = 0) -> None:
        """Raises BuildError[B102, B104]."""
        self.device = device(ordinal)
        self.device.activate()
        self._handle = driver().returned("cuModuleLoadData", image)

    def function(self, name: str) -> "Function":
        """A kernel by its `extern "C"` name. Raises BuildError[B104]."""
        self.device.activate()
        handle = driver().returned("cuModuleGetFunction", self._handle, name.encode())
        return Function(name, handle, self)


@dataclass(slots=True, eq=False)
class Function:
    """A kernel ready to launch."""

    name: str
    handle: int
    module: Module
    _smem: int = _SMEM_WITHOUT_ASKING

    def prepare(
        self, grid: Dim3, block: Dim3, smem_bytes: int, params: Params, overlaps: bool = False,
        cluster: Dim3 = (1, 1, 1), cooperative: bool = False,
    ) -> "Launch":  # fmt: skip
        """A launch whose arguments are converted once.

        `overlaps`: its CTAs may start before the launch in front has ended, on sm_90 and newer: the
        kernel waits itself (`tw::wait_for_previous_launch`). `cluster`: CTAs that share an SM group
        and see each other's shared memory (sm_90). `cooperative`: all CTAs run at the same time, so
        that they may wait for each other; a grid that does not fit is refused by the launch (B104).
        Raises BuildError[B104] for more shared memory than a CTA can have."""
        if smem_bytes > self._smem:
            self.module.device.activate()
            driver().call("cuFuncSetAttribute", self.handle, _FUNCTION_MAX_DYNAMIC_SMEM, smem_bytes)
            self._smem = smem_bytes
        asked = []
        if overlaps and self.module.device.attribute(ATTRIBUTE_MAJOR) >= 9:
            asked.append((_PROGRAMMATIC_SERIALIZATION, 1))
        if cluster != (1, 1, 1):
            asked.append((_CLUSTER_DIMENSION, *cluster))
        if cooperative:
            asked.append((_COOPERATIVE, 1))
        return Launch(self, grid, block, smem_bytes, params, _attributes(*asked))


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver's API."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("smem_bytes", c_uint), ("stream", c_void_p),
        ("attributes", c_void_p), ("attribute_count", c_uint),
    )  # fmt: skip


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver's API; its value is up to three ints."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 2, 4, 6


@cache
def _attributes(*asked: tuple[int, ...]) -> ctypes.Array[_Attribute]:
    """Launch attributes, each a number of the driver's API and its values."""
    every = (_Attribute(number, 0, (ctypes.c_int * 16)(*values)) for number, *values in asked)
    return (_Attribute * len(asked))(*every)


@dataclass(slots=True, eq=False)
class Launch:
    """A kernel with its grid and parameters: `run(stream)` launches it on a stream.

    The bytes of `params` are read at each `run`, so they may be rewritten between two.
    A grid with a zero launches nothing. `before`: a launch that each run has in front of its own.
    """

    function: Function
    grid: Dim3
    block: Dim3
    smem_bytes: int
    params: Params
    attributes: ctypes.Array[_Attribute]
    before: "Launch | None" = None
    # The native call by stream, never rewritten: two threads may launch on two streams.
    _calls: dict[int, Callable[[], int]] = field(default_factory=dict, init=False)

    def run(self, stream: int) -> None:
        """Launch on a stream. Raises BuildError[B104]."""
        self.function.module.device.activate()
        self.run_active(stream)

    def run_active(self, stream: int) -> None:
        """`run` where the GPU's context is current in this thread."""
        if self.before is not None:
            self.before.run_active(stream)
        call = self._calls.get(stream)
        if call is None:
            if 0 in self.grid:
                return
            call = self._calls[stream] = self._native_call(stream)
        code = call()
        if code:
            driver().fail(f"launching {self.function.name}", code)

    def _native_call(self, stream: int) -> Callable[[], int]:
        size = self.grid, self.block, self.smem_bytes
        attributes = ctypes.addressof(self.attributes)
        config = ctypes.byref(_Config(*size, stream, attributes, len(self.attributes)))
        pointers = (c_void_p * 1)(ctypes.addressof(self.params))
        launch = driver().functions["cuLaunchKernelEx"]
        return partial(launch, config, c_void_p(self.function.handle), pointers, None)


class Graph:
    """A recorded step: launches captured once, replayed by one call.

    All launches are on one GPU. A library's launches, beside ours, have a `run` too, and the one
    `stream` on which it can be captured. Addresses and parameters are those of the recording; the
    graph keeps the recorded launches alive, but not the arrays that they point to.
    """

    def __init__(self, launches: Sequence[Any]) -> None:
        """Raises BuildError[B104]."""
        api, self.launches = driver(), tuple(launches)
        own, *_ = (one for one in launches if isinstance(one, Launch))
        self.device = own.function.module.device
        self._handle = 0
        self.device.activate()
        lent = next((stream for x in launches if (stream := getattr(x, "stream", 0))), 0)
        stream = lent or api.returned("cuStreamCreate", _STREAM_NON_BLOCKING)
        graph = c_void_p()
        try:
            api.call("cuStreamBeginCapture_v2", stream, _CAPTURE_RELAXED)
            try:
                for launch in self.launches:
                    launch.run(stream)
            finally:
                code = api.functions["cuStreamEndCapture"](stream, ctypes.byref(graph))
            if code:
                api.fail("cuStreamEndCapture", code)
            self._handle = api.returned("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            if graph.value:
                api.functions["cuGraphDestroy"](graph)
            if not lent:
                api.functions["cuStreamDestroy_v2"](stream)

    def launch(self, stream: int = 0) -> None:
        """Replay on a stream. Raises BuildError[B104]."""
        self.device.activate()
        driver().call("cuGraphLaunch", self._handle, stream)

    def __del__(self) -> None:
        if getattr(self, "_handle", 0) and not sys.is_finalizing():
            driver().functions["cuGraphExecDestroy"](self._handle)


class DeviceArray:
    """A dense array on a GPU, for use without torch or CuPy. Freed with its last reference. Copies
    are ordered on `current_stream`."""

    __slots__ = ("__weakref__", "device", "dtype", "owner", "pointer", "shape")

    def __init__(self, shape: Sequence[int], dtype: DType | str, ordinal: int = 0) -> None:
        """Uninitialised memory. Raises BuildError[B102, B104]."""
        self.pointer = 0
        self.owner: DeviceArray | None = None
        self.device = device(ordinal)
        self.shape = tuple(int(n) for n in shape)
        self.dtype = to_dtype(dtype)
        if min(self.shape, default=0) < 0:
            raise ArgumentError("A103", f"an array cannot have shape {self.shape}")
        if self.nbytes:
            self.device.activate()
            self.pointer = driver().returned("cuMemAlloc_v2", self.nbytes)

    @classmethod
    def from_numpy(
        cls, array: np.ndarray, dtype: DType | str | None = None, ordinal: int = 0
    ) -> "DeviceArray":
        """A copy on the GPU. `dtype` names what the bits mean, as `bfloat16` for uint16."""
        copy = cls(array.shape, to_dtype(array.dtype if dtype is None else dtype), ordinal)
        copy.copy_from(array)
        return copy

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same memory under another shape of as many elements; -1 once for what the others
        leave. Raises ArgumentError[A103]."""
        rest = math.prod(self.shape) // max(1, math.prod([n for n in shape if n != -1]))
        shape = tuple(rest if n == -1 else n for n in shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ArgumentError("A103", f"{self.shape} cannot be seen as {shape}")
        view = DeviceArray.__new__(DeviceArray)
        view.pointer, view.device, view.dtype = self.pointer, self.device, self.dtype
        view.owner, view.shape = self, tuple(shape)
        return view

    def rows(self, begin: int, end: int) -> "DeviceArray":
        """Rows begin … end-1 of the first dimension, the same memory. Raises
        ArgumentError[A103]."""
        if not 0 <= begin <= end <= self.shape[0]:
            raise ArgumentError("A103", f"rows {begin}:{end} of {self.shape[0]}")
        view = self.reshape(*self.shape)
        view.shape = (end - begin, *self.shape[1:])
        view.pointer += begin * math.prod(self.shape[1:]) * self.dtype.itemsize
        return view

    def copy_from(self, array: np.ndarray, waits: bool = True) -> None:
        """Overwrite with a NumPy array of the same shape and itemsize; done when it returns, or
        else (`waits`) in the order of the stream, until when the caller leaves it as it is.

        Raises ArgumentError[A102, A103].
        """
        if array.shape != self.shape:
            raise ArgumentError("A103", f"shape {array.shape} does not fit {self.shape}")
        if array.dtype.itemsize != self.dtype.itemsize:
            raise ArgumentError("A102", f"{array.dtype} does not fit {self.dtype}")
        if not self.nbytes:
            return
        source = np.ascontiguousarray(array)
        self._copied("cuMemcpyHtoDAsync_v2", self.pointer, source.ctypes.data, waits)

    def to_numpy(self) -> np.ndarray:
        """A copy on the host, complete when it returns; bfloat16 as its bits."""
        out = np.empty(self.shape, self.dtype.numpy)
        if self.nbytes:
            self._copied("cuMemcpyDtoHAsync_v2", out.ctypes.data, self.pointer)
        return out

    def _copied(self, function: str, to: int, source: int, waits: bool = True) -> None:
        """Copy all bytes, in the order of the current stream, and wait for them (`waits`)."""
        stream = _active_stream(self.device.ordinal)
        driver().call(function, to, source, self.nbytes, stream)
        if waits:
            driver().call("cuStreamSynchronize", stream)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.numpy.str, "data": (self.pointer, False),
            "strides": None, "version": 3,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype}, cuda:{self.device.ordinal})"

    def __del__(self) -> None:
        if getattr(self, "pointer", 0) and self.owner is None and not sys.is_finalizing():
            self.device.activate()
            driver().functions["cuMemFree_v2"](self.pointer)


class HostWords:
    """`words`: int32 of the host that a GPU reads and writes at the same address, 0 at first."""

    def __init__(self, ordinal: int = 0, count: int = 1) -> None:
        self.pointer = 0
        self.device = device(ordinal)
        self.device.activate()
        portable_and_mapped = 1 | 2
        self.pointer = driver().returned("cuMemHostAlloc", 4 * count, portable_and_mapped)
        self.words = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(self.pointer))
        self.words[:] = 0
        self._copied = driver().returned("cuEventCreate", 0)

    def take(self) -> int:
        """The first word, which becomes 0."""
        value = int(self.words[0])
        if value:
            self.words[0] = 0
        return value

    def copy(self, array: DeviceArray) -> Callable[[], np.ndarray]:
        """Begin to copy an array in the order of the stream; the result waits for the words."""
        queue, call = _active_stream(array.device.ordinal), driver().call
        call("cuMemcpyDtoHAsync_v2", self.pointer, array.pointer, array.nbytes, queue)
        call("cuEventRecord", self._copied, queue)
        return lambda: call("cuEventSynchronize", self._copied) or self.words

    def send(self, array: DeviceArray, values: Any) -> None:
        """Begin to copy int32 values to the first words of an array, in the order of the stream.
        Waits for what was sent from here before."""
        queue, call, count = _active_stream(array.device.ordinal), driver().call, len(values)
        call("cuEventSynchronize", self._copied)
        self.words[:count] = values
        call("cuMemcpyHtoDAsync_v2", array.pointer, self.pointer, 4 * count, queue)
        call("cuEventRecord", self._copied, queue)

    def __del__(self) -> None:
        if getattr(self, "pointer", 0) and not sys.is_finalizing():
            self.device.activate()
            driver().functions["cuEventDestroy_v2"](self._copied)
            driver().functions["cuMemFreeHost"](self.pointer)


def pointer_device(address: int) -> int:
    """The number of the GPU that a device address belongs to."""
    device(current_device()).activate()
    ordinal = ctypes.c_int()
    driver().call("cuPointerGetAttribute", ctypes.byref(ordinal), _POINTER_DEVICE_ORDINAL, address)
    return ordinal.value


_MAP_TYPES = {dtypes.float16: 6, dtypes.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128, _PROMOTE_256, _WORDS = 3, 3, 16


@lru_cache(4096)
def tensor_map(
    pointer: int, dtype: DType, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> list[int]:
    """What TMA knows of an array in global memory: a CUtensorMap as 16 words of 64 bits, for boxes
    in the 128-byte swizzle (sm_90 and newer).

    Dimensions with the fastest first, which is contiguous; `strides` of the others, in elements.
    What lies outside `shape` reads as 0. Raises InternalError[I101] where the driver refuses.
    """
    rank, size = len(shape), dtype.itemsize
    buffer = (ctypes.c_uint64 * (2 * _WORDS))()  # a map lies at a multiple of 64 bytes
    address = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 64
    code = driver().functions["cuTensorMapEncodeTiled"](
        address, _MAP_TYPES[dtype], rank, pointer,
        (ctypes.c_uint64 * rank)(*shape), (ctypes.c_uint64 * rank)(*(n * size for n in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    if code:
        geometry = f"shape {tuple(shape)}, strides {tuple(strides)}, box {tuple(box)}"
        raise InternalError("I101", f"no tensor map: {driver().error_name(code)} of {geometry}")
    return list((ctypes.c_uint64 * _WORDS).from_address(address))
