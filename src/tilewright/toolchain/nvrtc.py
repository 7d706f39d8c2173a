"""Compile CUDA C++ source text to a cubin by NVRTC, in the process; needs no GPU and no driver.

NVRTC is called through ctypes: importing its typed bindings took 50 ms, the library itself 7 ms.
"""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

from tilewright.errors import BuildError, MissingExtra
from tilewright.toolchain import disk_cache

_REPORT = re.compile(
    r"Compiling entry function '(?P<entry>[^']+)'|Function properties for (?P<function>\S+)"
    r"|(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?:.* (?P<smem>\d+) bytes smem)?"
)
FLAGS: tuple[str, ...] = ("--std=c++17", "--ptxas-options=-v", "-default-device")
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas reports of one kernel (or function that was not inlined; those have 0 registers).

    `registers` are per thread, all other fields in bytes. `smem` is static shared memory only.
    """

    registers: int = 0
    smem: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spill_bytes(self) -> int:
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled module: its image for the driver, its architecture, resources by function."""

    image: bytes
    arch: str
    resources: Mapping[str, Resources]


def compile_cuda(
    source: str, *, arch: str, name: str = "", headers: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> Cubin:  # fmt: skip
    """Compile CUDA C++ to a cubin for `arch` (as `sm_90a`), through the cache.

    `name` is the kernel's, for errors. `headers` are texts that `#include "name"` finds; CUDA's own
    (`<cuda_bf16.h>`) come from its wheels. Functions to launch are `extern "C"`.
    Raises BuildError[B101] with the compiler's message and the file of the source;
    MissingExtra[E101] without NVRTC.
    """
    headers = headers or {}
    named = [text for name in sorted(headers) for text in (name, headers[name])]
    options = (f"--gpu-architecture={arch}", *FLAGS, *flags)
    key = disk_cache.key_of("cuda", toolkit_version(), "\0".join(options), source, *named)
    stored = disk_cache.get("cubin", key)
    if stored is None:
        began = time.perf_counter()
        status, log, image = _compile(source, headers, options)
        if status:
            lines = (line for line in log.splitlines() if not line.startswith("ptxas info"))
            compiler = f"NVRTC ({toolkit_version()}, {' '.join(options)})"
            raise disk_cache.refusal(compiler, name, "\n".join(lines), source, key)
        if not image:
            raise BuildError("B101", f"no cubin for {options[0]}: is it a real architecture?")
        disk_cache.count_compiled(f"{name or 'CUDA C++'} for {arch}", began)
        stored = _pack(image, parse_resources(log))
        disk_cache.put("cubin", key, stored)
    return _unpack(stored, arch)


@functools.cache
def toolkit_version() -> str:
    """NVRTC and CUDA header versions, for keys and reports. Raises MissingExtra[E101]."""
    site = _library().partition("/nvidia/")[0]
    # From the names of folders: reading the metadata of wheels is far slower.
    names = glob.glob("nvidia_cuda_*-*.dist-info", root_dir=site)
    wheels = sorted(n for n in names if n.startswith(("nvidia_cuda_nvrtc", "nvidia_cuda_runtime")))
    if len(wheels) >= 2:
        text = ", ".join(name.removesuffix(".dist-info") for name in wheels)
        return text.replace("-", " ").replace("_", "-")
    # Not installed as wheels: ask the library, and name the folder of its headers.
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"nvrtc {major.value}.{minor.value} with headers in {_include_folder()}"


def available() -> bool:
    """Whether CUDA source can be compiled here."""
    with contextlib.suppress(MissingExtra):
        return bool(_nvrtc())
    return False


def parse_resources(log: str) -> dict[str, Resources]:
    """Resources by function from the report of `--ptxas-options=-v`."""
    values: dict[str, dict[str, int]] = {}
    entry = function = ""
    for match in _REPORT.finditer(log):
        entry, function = match["entry"] or entry, match["function"] or function
        fields = {f.name: int(match[f.name] or 0) for f in dataclasses.fields(Resources)}
        name = entry if match["entry"] or match["registers"] else function
        values.setdefault(name, {}).update({n: x for n, x in fields.items() if x})
    return {name: Resources(**fields) for name, fields in values.items() if name}


def _pack(image: bytes, resources: Mapping[str, Resources]) -> bytes:
    """One cache entry: the image first, so that tools for cubins can read the file."""
    report = json.dumps({name: asdict(one) for name, one in resources.items()}).encode()
    return image + report + len(report).to_bytes(_LENGTH_BYTES, "little")


def _unpack(stored: bytes, arch: str) -> Cubin:
    length = int.from_bytes(stored[-_LENGTH_BYTES:], "little")
    report = json.loads(stored[-_LENGTH_BYTES - length : -_LENGTH_BYTES])
    resources = {name: Resources(**values) for name, values in report.items()}
    return Cubin(stored[: -_LENGTH_BYTES - length], arch, MappingProxyType(resources))


def _compile(
    source: str, headers: Mapping[str, str], options: Sequence[str]
) -> tuple[int, str, bytes]:
    """Run NVRTC; its status, the program log and the cubin."""
    nvrtc = _nvrtc()
    folder = _include_folder()
    if folder:
        options = (*options, f"--include-path={folder}")
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"tilewright.cu", len(headers),
        _strings(headers.values()), _strings(headers),
    )  # fmt: skip
    _check(status, "nvrtcCreateProgram")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _read(program, "ProgramLog").rstrip(b"\0").decode("utf-8", "replace")
        return status, log, b"" if status else _read(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(strings: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in strings]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _read(program: ctypes.c_void_p, name: str) -> bytes:
    """A result of a program (`CUBIN`, `ProgramLog`)."""
    nvrtc, size = _nvrtc(), ctypes.c_size_t()
    _check(nvrtc[f"nvrtcGet{name}Size"](program, ctypes.byref(size)), f"nvrtcGet{name}Size")
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    _check(nvrtc[f"nvrtcGet{name}"](program, buffer), f"nvrtcGet{name}")
    return buffer.raw[: size.value]


def _check(status: int, function: str) -> None:
    if status:
        message = _nvrtc().nvrtcGetErrorString(status).decode()
        raise BuildError("B101", f"{function} failed: {message}")


@functools.cache
def _include_folder() -> str:
    """The folder of CUDA's headers, or "": beside NVRTC, or in a wheel of their own (CUDA 12)."""
    root = os.path.dirname(os.path.dirname(_library()))
    for folder in (f"{root}/include", f"{os.path.dirname(root)}/cuda_runtime/include"):
        if os.path.isfile(f"{folder}/cuda_fp16.h"):
            return folder
    with contextlib.suppress(ImportError):
        from cuda.pathfinder import find_nvidia_header_directory

        return find_nvidia_header_directory("cudart") or ""
    return ""


@functools.cache
def _library() -> str:
    """The file of NVRTC: the newest in the wheels on the search path, else the one that pathfinder
    (40 ms to import) finds in conda and system toolkits. Raises MissingExtra[E101]."""
    files: dict[int, str] = {}
    for folder in sys.path:
        for path in glob.glob(f"{glob.escape(folder or '.')}/nvidia/*/lib/libnvrtc.so.*"):
            version = path.rpartition(".")[2]
            if version.isdecimal():
                files.setdefault(int(version), path)
    if files:
        return files[max(files)]
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return load_nvidia_dynamic_lib("nvrtc").abs_path or ""
    except (ImportError, RuntimeError) as error:
        raise _missing(error) from None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library. Raises MissingExtra[E101]."""
    path = _library()
    try:
        for part in glob.glob(f"{glob.escape(os.path.dirname(path))}/libnvrtc-builtins.so.*"):
            ctypes.CDLL(part)  # NVRTC opens it by its bare name, which finds it once it is loaded
        nvrtc = ctypes.CDLL(path)
    except OSError as error:
        raise _missing(error) from None
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _missing(error: Exception) -> MissingExtra:
    text = f"compiling for CUDA needs NVRTC ({error})"
    return MissingExtra("E101", text, hint="pip install 'tilewright[cuda]'")
