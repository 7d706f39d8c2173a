"""Compile C++ source text to a shared library, through the cache, and load it."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright import knobs
from tilewright.errors import BuildError
from tilewright.toolchain import compilers, disk_cache

_TIMEOUT_S = 600
_ELF_DYN = 3
_SHORTAGES = ("signal terminated program", "No space left on device", "out of memory")
_PROBE = '#include <stdint.h>\nextern "C" int64_t tw_probe(int64_t x) { return x; }\n'
_OTHER_COMPILER = "set TILEWRIGHT_CXX to a C++ compiler: g++ or clang++"

_loaded: dict[Path, ctypes.CDLL] = {}


def compile_cpp(
    source: str, *, name: str = "", isa: str = "", flags: Sequence[str] = (),
    full_link: bool = False,
) -> Path:  # fmt: skip
    """The file of the library of one translation unit, compiled unless it is in the cache.

    `name` is the kernel's, for errors. `isa` is a name of `compilers.ISAS` (empty: this CPU's).
    Functions to load are `extern "C"` with default visibility. `flags` are appended; `full_link`
    adds the C++ library, start files and threads, which kernels do without.
    Raises BuildError: B101 with the compiler's message, B102 without a working compiler, B103 for
    an instruction set that this CPU lacks, B105 if nothing can be written.
    """
    job = _job(source, name, isa, flags, full_link)
    return disk_cache.find("so", job.key) or disk_cache.put("so", job.key, job.run())


def load_cpp(source: str, *, name: str = "", isa: str = "", full_link: bool = False) -> ctypes.CDLL:
    """`compile_cpp`, then `load`. Works also while other processes empty the cache, and where its
    disk is mounted noexec: the library is then loaded from a temporary folder of this process."""
    job = _job(source, name, isa, (), full_link)
    try:
        return load(disk_cache.find("so", job.key) or disk_cache.put("so", job.key, job.run()))
    except BuildError as error:
        if error.code != "B105":
            raise
    return load(disk_cache.put_private("so", job.key, disk_cache.get("so", job.key) or job.run()))


def load(path: Path) -> ctypes.CDLL:
    """Open a library of `compile_cpp`; the same path is opened once. Calls release the GIL. Raises
    BuildError[B105]."""
    library = _loaded.get(path)
    if library is None:
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            text = f"a compiled library does not load: {error}"
            hint = "is the cache on a disk mounted noexec? Set TILEWRIGHT_CACHE_DIR elsewhere"
            raise BuildError("B105", text, where=str(path), hint=hint) from None
        if knobs.get("cache"):  # without the cache the same path is compiled anew each time
            _loaded[path] = library
    return library


@dataclass(frozen=True, slots=True)
class _Job:
    """One compilation. The key covers everything that decides the library."""

    compiler: compilers.Compiler
    source: str
    name: str
    flags: tuple[str, ...]
    link: tuple[str, ...]
    key: str

    def run(self) -> bytes:
        """Compile; the bytes of the library."""
        began = time.perf_counter()
        status, log, library = self.call(self.source)
        if status:
            raise self.failure(status, log)
        if not _is_library(library):
            message = f"; it said: {log.splitlines()[0]}" if log else ""
            text = f"{self.compiler} made no shared library{message}"
            raise BuildError("B102", text, hint=_OTHER_COMPILER)
        disk_cache.count_compiled(self.name or "C++", began)
        return library

    def call(self, source: str) -> tuple[int, str, bytes]:
        """Run the compiler on standard input; its exit status, messages and output. The output goes
        to a folder of this process, which nobody empties, and which is not the cache's disk."""
        import subprocess  # 3 ms, only for kernels that are not in the cache
        import tempfile

        try:
            handle, output = tempfile.mkstemp(prefix="out-", dir=disk_cache.temporary().folder)
        except OSError as error:
            raise BuildError("B105", f"no temporary file can be made: {error}") from None
        os.close(handle)
        command = [*self.compiler.command, *self.flags, "-x", "c++", "-", "-o", output, *self.link]
        try:
            done = subprocess.run(
                command, input=source.encode(), capture_output=True, timeout=_TIMEOUT_S,
                check=False, env=os.environ | {"LC_ALL": "C"},
            )  # fmt: skip
            library = b"" if done.returncode else Path(output).read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError("B102", f"{self.compiler} did not finish: {error}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(output)
        return done.returncode, done.stderr.decode("utf-8", "replace").strip(), library

    def failure(self, status: int, log: str) -> BuildError:
        """Whether the machine, the compiler or the generated code is to blame."""
        # A signal ends the compiler, or a program that it runs.
        if status < 0 or any(text in log for text in _SHORTAGES):
            how = "ran out of something"
            if status < 0:
                how = f"was ended by signal {-status} ({signal.strsignal(-status)})"
            text = f"{self.compiler} {how}: {log or 'no message'}"
            hint = "free memory, or space in TMPDIR; the source is kept in that file"
            return BuildError("B101", text, where=disk_cache.keep(self.source, self.key), hint=hint)
        status, message, _ = self.call(_PROBE)
        if status:
            text = f"{self.compiler} cannot compile an empty kernel (exit status {status}): "
            return BuildError("B102", text + (message or "no message"), hint=_OTHER_COMPILER)
        return disk_cache.refusal(str(self.compiler), self.name, log, self.source, self.key)


def _job(source: str, name: str, isa: str, flags: Sequence[str], full_link: bool) -> _Job:
    compiler = compilers.find_compiler()
    all_flags = (*compilers.COMMON_FLAGS, *compilers.resolve_isa(isa).flags, *flags)
    link = compilers.FULL_LINK if full_link else compilers.BARE_LINK
    parts = (compiler.command, (compiler.version,), all_flags, link)
    key = disk_cache.key_of("cpp", source, *("\0".join(words) for words in parts))
    return _Job(compiler, source, name, all_flags, link, key)


def _is_library(data: bytes) -> bool:
    """Whether a compiler's output begins like a shared library: an ELF file of type DYN."""
    if sys.platform != "linux":
        return bool(data)
    return data.startswith(b"\x7fELF") and int.from_bytes(data[16:18], sys.byteorder) == _ELF_DYN
