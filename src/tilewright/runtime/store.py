"""The first level of the kernel cache: what was built from a program, found without lowering it.

An entry holds the manifest and the source of a kernel; the second level (`native`, `nvrtc`) finds
the binary by the source. Keys hold Tilewright's own version: a hash of the compiler's files.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from tilewright import knobs
from tilewright.runtime import cache
from tilewright.runtime.cache import key_of
from tilewright.runtime.manifest import Manifest, manifest_from, manifest_text

KIND = "kernel"
PACKAGE = Path(__file__).resolve().parent.parent
ROOMS = ("", "ir", "sparse", "schedule", "lower", "codegen", "codegen/prelude", "ops", "runtime")


@dataclass(frozen=True, slots=True)
class Built:
    """What lowering and rendering made: enough to compile, load and call it."""

    manifest: Manifest
    source: str
    entries: tuple[str, ...]


def load(key: str) -> Built | None:
    """The entry of a key, or None. Hits are counted at the second level, one a kernel."""
    data = cache.current().get(KIND, key) if knobs.get("cache") else None
    if data is None:
        return None
    held = json.loads(data)
    return Built(manifest_from(held["manifest"]), held["source"], tuple(held["entries"]))


def save(key: str, built: Built) -> None:
    """Keep an entry. Raises BuildError[B105] where nothing can be written."""
    if knobs.get("cache"):
        held = {"entries": built.entries, "source": built.source}
        text = json.dumps(held | {"manifest": manifest_text(built.manifest)})
        cache.put(KIND, key, text.encode())


# ---------------------------------------------------------------------------- version


def _stamp() -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the compiler's files."""
    found = []
    for room in ROOMS:
        for p in sorted((PACKAGE / room).iterdir()):
            if p.suffix in (".py", ".h", ".cuh"):
                status = p.stat()
                found.append((f"{room}/{p.name}", status.st_mtime_ns, status.st_size))
    return tuple(found)


_LOADED = _stamp()  # of the files as they were when this process read them


@functools.cache
def version() -> str | None:
    """A hash of the compiler's sources, or None when they were edited since they were loaded."""
    if _stamp() != _LOADED:
        return None
    key = key_of("version", str(PACKAGE), repr(_LOADED))
    known = cache.current().get("version", key) if knobs.get("cache") else None
    if known is not None:
        return known.decode()
    names = [name for name, *_ in _LOADED]
    texts = [part for n in names for part in (n, (PACKAGE / n.lstrip("/")).read_bytes())]
    found = key_of(*texts)
    cache.put("version", key, found.encode())
    return found
