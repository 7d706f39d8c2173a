"""The program cache: the source and manifest of a built program, found without lowering it.

The second level (`cxx`, `nvrtc`) finds the binary by the source. Keys contain Tilewright's own
version, a hash of the compiler's source files.
"""

import functools
import os

from tilewright import knobs
from tilewright.toolchain import disk_cache
from tilewright.toolchain.disk_cache import PACKAGE, key_of

KIND = "kernel"
# The rooms that decide which text a program becomes.
ROOMS = ("", "ir", "sparse", "schedule", "lower", "codegen", "codegen/prelude", "ops", "runtime",
         "toolchain")  # fmt: skip


def load(key: str) -> bytes | None:
    """The data of a key, or None. Hits are counted once a kernel, at the second level."""
    return disk_cache.current().get(KIND, key) if knobs.get("cache") else None


def save(key: str, data: bytes) -> None:
    """Store an entry, unless a source file of the compiler changed since this process started: the
    process reads them only when it first lowers. Raises BuildError[B105]."""
    if knobs.get("cache") and _stamp() == _AT_START:
        disk_cache.put(KIND, key, data)


def _stamp() -> dict[str, str]:
    """Time and size of each source file of the compiler, by name."""
    stamps: dict[str, str] = {}
    for room in ROOMS:
        with os.scandir(f"{PACKAGE}/{room}") as files:
            for f in files:
                if f.name.endswith((".py", ".h", ".cuh")):
                    status = f.stat()
                    stamps[f"{room}/{f.name}"] = f"{status.st_mtime_ns} {status.st_size}"
    return dict(sorted(stamps.items()))


_AT_START = _stamp()  # before this process reads the files that lower


@functools.cache
def version() -> str | None:
    """A hash of the compiler's source files at the start of this process; None if one of them
    changed since then and the hash is not in the cache."""
    key = key_of("version", str(PACKAGE), "\n".join(_AT_START), "\n".join(_AT_START.values()))
    known = disk_cache.current().get("version", key) if knobs.get("cache") else None
    if known is not None:
        return known.decode()
    sources = [part for n in _AT_START for part in (n, (PACKAGE / n.lstrip("/")).read_bytes())]
    if _stamp() != _AT_START:
        return None
    digest = key_of(*sources)
    disk_cache.put("version", key, digest.encode())
    return digest
