"""The program cache: the source and manifest of a built program, found without lowering it.

The second level (`cxx`, `nvrtc`) finds the binary by the source. Keys contain Tilewright's own
version: where the source files of the compiler are, and the time and the size of each.
"""

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
    if knobs.get("cache") and stamp() == VERSION:
        disk_cache.put(KIND, key, data)


def stamp() -> str:
    """The version of the source files as they are now, as a key."""
    stamps: list[str] = []
    for room in ROOMS:
        with os.scandir(f"{PACKAGE}/{room}") as files:
            for f in files:
                if f.name.endswith((".py", ".h", ".cuh")):
                    status = f.stat()
                    stamps.append(f"{room}/{f.name} {status.st_mtime_ns} {status.st_size}")
    return key_of(str(PACKAGE), *sorted(stamps))


VERSION = stamp()  # before this process reads the files that lower
