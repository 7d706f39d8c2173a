"""The CUDA driver through ctypes: the functions that Tilewright calls, with checked results.

ctypes on `libcuda` launches a kernel in a third of the time that the typed bindings take, and
needs no package. Nothing here runs at import; `driver()` loads the library and initialises it.
"""

import contextlib
import ctypes
import functools
import threading
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from tilewright.errors import BuildError
from tilewright.target import CUDA_ARCHS

LIBRARIES: tuple[str, ...] = ("libcuda.so.1", "libcuda.so")

_OUT, _IN = POINTER(c_void_p), c_void_p  # a handle returned, a handle passed
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,), "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)), "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),), "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int), "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuCtxGetCurrent": (_OUT,), "cuCtxSetCurrent": (_IN,),
    "cuModuleLoadData": (_OUT, c_char_p), "cuModuleGetFunction": (_OUT, _IN, c_char_p),
    "cuFuncSetAttribute": (_IN, c_int, c_int),
    "cuLaunchKernelEx": (c_void_p, _IN, c_void_p, c_void_p),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t), "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_OUT, c_size_t, c_uint), "cuMemFreeHost": (_IN,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, _IN),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, _IN),
    "cuMemsetD8Async": (c_uint64, ctypes.c_ubyte, c_size_t, _IN),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuStreamCreate": (_OUT, c_uint), "cuStreamDestroy_v2": (_IN,), "cuStreamSynchronize": (_IN,),
    "cuStreamIsCapturing": (_IN, POINTER(c_int)), "cuStreamBeginCapture_v2": (_IN, c_int),
    "cuStreamEndCapture": (_IN, _OUT),
    "cuEventCreate": (_OUT, c_uint), "cuEventRecord": (_IN, _IN), "cuEventSynchronize": (_IN,),
    "cuEventDestroy_v2": (_IN,),
    "cuGraphInstantiateWithFlags": (_OUT, _IN, ctypes.c_ulonglong), "cuGraphLaunch": (_IN, _IN),
    "cuGraphDestroy": (_IN,), "cuGraphExecDestroy": (_IN,),
    # map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill
    "cuTensorMapEncodeTiled": (c_void_p, c_int, c_uint, c_uint64, *[c_void_p] * 4, *[c_int] * 4),
}  # fmt: skip

_ATTRIBUTE_SMS = 16
ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76


class Driver:
    """The loaded library; each function of `_PROTOTYPES` is called by name with `call`."""

    def __init__(self) -> None:
        self.library = _load()
        self.functions: dict[str, Any] = {}
        try:
            for name, arguments in _PROTOTYPES.items():
                function = getattr(self.library, name)
                function.argtypes, function.restype = arguments, c_int
                self.functions[name] = function
        except AttributeError as error:
            text = f"the CUDA driver is too old: {error}"
            raise BuildError("B102", text, hint="CUDA 12.0 or newer is needed") from None
        code = self.functions["cuInit"](0)
        if code:
            text = f"the CUDA driver does not start: {self.error_name(code)}"
            raise BuildError("B102", text, hint="is there an NVIDIA GPU? cpp and interp need none")

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises BuildError[B104] with the driver's name for the failure."""
        code = self.functions[name](*arguments)
        if code:
            self.fail(name, code)

    def fail(self, name: str, code: int) -> None:
        """Raise BuildError[B104] for a result of `name` that is not success."""
        text = c_char_p()
        self.functions["cuGetErrorString"](code, ctypes.byref(text))
        message = (text.value or b"unknown").decode(errors="replace")
        raise BuildError("B104", f"{name} failed: {self.error_name(code)} ({message})")

    def error_name(self, code: int) -> str:
        name = c_char_p()
        self.functions["cuGetErrorName"](code, ctypes.byref(name))
        return name.value.decode() if name.value else f"CUresult {code}"

    def returned(self, name: str, *arguments: Any) -> int:
        """Call a function that returns a number or a handle through its first argument."""
        value = _PROTOTYPES[name][0]._type_()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value or 0


def _load() -> ctypes.CDLL:
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise BuildError("B102", "there is no CUDA driver (libcuda.so.1 is not found)")


_active = threading.local()


@functools.cache
def driver() -> Driver:
    """The driver, loaded once, or once by each of two threads. Raises BuildError[B102]."""
    return Driver()


class Device:
    """One GPU with its primary context, the one that torch and CuPy use."""

    def __init__(self, ordinal: int) -> None:
        api = driver()
        self.count = api.returned("cuDeviceGetCount")
        if not 0 <= ordinal < self.count:
            raise BuildError("B102", f"there is no GPU {ordinal}; this machine has {self.count}")
        self.ordinal = ordinal
        self._id = api.returned("cuDeviceGet", ordinal)
        self.context = api.returned("cuDevicePrimaryCtxRetain", self._id)

    def activate(self) -> None:
        """Make the context current in this thread."""
        # With one GPU nobody moves the thread elsewhere; with more, torch does it all the time.
        if self.count == 1 and getattr(_active, "ordinal", None) == self.ordinal:
            return
        api = driver()
        if api.returned("cuCtxGetCurrent") != self.context:
            api.call("cuCtxSetCurrent", self.context)
        _active.ordinal = self.ordinal

    def attribute(self, number: int) -> int:
        """A CUdevice_attribute by its number."""
        return driver().returned("cuDeviceGetAttribute", number, self._id)

    @functools.cached_property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        driver().call("cuDeviceGetName", text, len(text), self._id)
        return text.value.decode(errors="replace")

    @functools.cached_property
    def arch(self) -> str:
        """The architecture to compile for, as `sm_90a`: the best of `CUDA_ARCHS` that runs here."""
        return arch_of(self.attribute(ATTRIBUTE_MAJOR), self.attribute(_ATTRIBUTE_MINOR))

    @functools.cached_property
    def sms(self) -> int:
        """Streaming multiprocessors."""
        return self.attribute(_ATTRIBUTE_SMS)

    @functools.cached_property
    def memory_bytes(self) -> int:
        return driver().returned("cuDeviceTotalMem_v2", self._id)


def device(ordinal: int = 0) -> Device:
    """A GPU by its number. Raises BuildError[B102] where there is none."""
    return _device(ordinal)


_device = functools.cache(Device)


def arch_of(major: int, minor: int) -> str:
    """The architecture of a compute capability.

    Before 9.0 a cubin runs on later minors of its major; from 9.0 on the `a` architectures, with
    the tensor-core instructions that we use, run on their own capability alone.
    """
    if major >= 9:
        return f"sm_{major}{minor}a"
    own, numbers = major * 10 + minor, (int(a[3:]) for a in CUDA_ARCHS if a[3:].isdigit())
    return f"sm_{max((n for n in numbers if major * 10 <= n <= own), default=own)}"
