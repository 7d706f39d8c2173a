"""C++ source text → shared library → loaded functions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tilewright import knobs
from tilewright.errors import BuildError
from tilewright.toolchain import compilers, disk_cache

_MESSAGE_LINES = 30
_TIMEOUT_S = 600
_ELF_HEAD, _ELF_SHARED = 20, 3  # word size and byte order at 4, kind of file at 16, processor at 18

_loaded: dict[Path, ctypes.CDLL] = {}


def compile_cpp(
    source: str, *, isa: str | None = None, flags: Sequence[str] = (), full_link: bool = False
) -> Path:
    """Compile one translation unit to a shared library, through the cache.

    `isa` is a name of `compilers.ISAS` (None: this CPU's). Functions to be loaded are `extern "C"`
    with default visibility. `flags` are appended; `full_link` adds the C++ library, start files
    and threads, which kernels do without.
    Raises BuildError: B101 with the compiler's message, B102 without a compiler or where it makes
    no library, B103 for an instruction set that does not run here, B105 if nothing can be written.
    """
    target = compilers.resolve_isa(isa)
    compiler = compilers.find_compiler()
    link = compilers.FULL_LINK if full_link else compilers.BARE_LINK
    compile_flags = (*compilers.COMMON_FLAGS, *target.flags, *flags)
    key = disk_cache.key_of(
        "cpp", source, "\0".join(compile_flags), "\0".join(link), compiler.path, compiler.version
    )
    found = disk_cache.find("so", key)
    if found is not None:
        return found
    began = time.perf_counter()
    library = _compile(compiler.path, source, compile_flags, link, key)
    elapsed_ms = (time.perf_counter() - began) * 1e3
    disk_cache.stats.compiled += 1
    disk_cache.stats.compile_ms += elapsed_ms
    if knobs.get("debug") >= 1:
        print(
            f"tilewright: compiled {len(source)} characters of C++ in {elapsed_ms:.0f} ms",
            file=sys.stderr,
        )
    return disk_cache.put("so", key, library)


def load(path: Path) -> ctypes.CDLL:
    """Open a library of `compile_cpp`; the same path is opened once. Calls release the GIL."""
    found = _loaded.get(path)
    if found is None:
        try:
            found = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            raise BuildError(
                "B105",
                f"a compiled library does not load: {error}",
                where=str(path),
                hint="is the cache on a disk mounted noexec? Set TILEWRIGHT_CACHE_DIR elsewhere",
            ) from None
        if knobs.get("cache"):  # without the cache the same path is compiled anew each time
            _loaded[path] = found
    return found


def _compile(
    compiler: str, source: str, flags: Sequence[str], link: Sequence[str], key: str
) -> bytes:
    """Run the compiler on standard input; the bytes of the library."""
    import subprocess  # what only a kernel that the cache does not know needs
    import tempfile

    try:
        # in the cache's folder, where no other user can put a file in its place
        handle, output = tempfile.mkstemp(prefix=".tmp-", dir=disk_cache.current().folder)
    except OSError as error:
        raise BuildError("B105", f"no temporary file can be made: {error}") from None
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *flags, "-x", "c++", "-", "-o", output, *link],
            input=source.encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
        library = b"" if done.returncode else Path(output).read_bytes()
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError("B101", f"{compiler} did not get to its end: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(output)
    if done.returncode:
        kept = disk_cache.put("failed", key, source.encode())
        raise _refusal(compiler, done.returncode, done.stderr.decode(errors="replace"), kept)
    if not _is_loadable(library):
        raise BuildError(
            "B102",
            f"{compiler} made no shared library for this machine",
            hint="set TILEWRIGHT_CXX to a C++ compiler: g++ or clang++",
        )
    return library


def _refusal(compiler: str, code: int, message: str, kept: Path) -> BuildError:
    """What a compiler that failed has to say, if anything, and who is to blame."""
    import signal

    lines = message.strip().splitlines()[:_MESSAGE_LINES]
    if code < 0 or "signal terminated program" in message:  # its own, or that of a part of it
        how = signal.strsignal(-code) if code < 0 else None
        first = f"{compiler} was ended by signal {-code} ({how}):" if code < 0 else f"{compiler}:"
        hint = "was memory short? The source is kept in that file"
    else:
        first = f"{compiler} refused generated code (exit status {code}):"
        hint = "this is a bug of Tilewright or an old compiler; the source is kept in that file"
    text = "\n".join([first, *lines]) if lines else first.rstrip(":") + ", without a word"
    return BuildError("B101", text, where=str(kept), hint=hint)


@functools.cache
def _own_head() -> bytes:
    """The first bytes of this process's program; none where there are no ELF files."""
    try:
        with open("/proc/self/exe", "rb") as file:
            return file.read(_ELF_HEAD)
    except OSError:
        return b""


def _is_loadable(library: bytes) -> bool:
    """Whether it begins as a shared library of this machine does."""
    own, head = _own_head(), library[:_ELF_HEAD]
    if not own.startswith(b"\x7fELF"):
        return bool(library)
    is_shared = int.from_bytes(head[16:18], sys.byteorder) == _ELF_SHARED
    return is_shared and (head[:6], head[18:]) == (own[:6], own[18:])
