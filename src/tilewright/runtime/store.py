"""The first level of the kernel cache: what was built from a program, found without lowering it.

An entry holds the manifest and the source of a kernel; the second level (`native`, `nvrtc`) finds
the binary by the source. Keys hold Tilewright's own version: a hash of the compiler's files.
"""

from __future__ import annotations

import functools
import json
import os
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
    """The entry of a key, or None, also where it holds something else. Hits are counted at the
    second level, one a kernel."""
    data = cache.current().get(KIND, key) if knobs.get("cache") else None
    if data is None:
        return None
    try:
        head, _, source = data.partition(b"\n")
        held = json.loads(head)
        entries = tuple(held["entries"])
        if not all(isinstance(text, str) for text in entries):
            return None
        return Built(manifest_from(held["manifest"]), source.decode(), entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # as any other damage


def save(key: str, built: Built) -> None:
    """Keep an entry, unless the compiler was edited since the key was made: its files are read when
    they are first needed. Raises BuildError[B105] where nothing can be written."""
    if knobs.get("cache") and _stamp() == _LOADED:
        # The source stands behind the first line as it is: unescaping it took 0.1 ms.
        held = {"entries": built.entries, "manifest": manifest_text(built.manifest)}
        cache.put(KIND, key, f"{json.dumps(held)}\n{built.source}".encode())


# ---------------------------------------------------------------------------- version


def _stamp() -> dict[str, str]:
    """For each of the compiler's files, by name: its time and size."""
    found: dict[str, str] = {}
    for room in ROOMS:
        with os.scandir(f"{PACKAGE}/{room}") as files:
            for f in files:
                if f.name.endswith((".py", ".h", ".cuh")):
                    status = f.stat()
                    found[f"{room}/{f.name}"] = f"{status.st_mtime_ns} {status.st_size}"
    return dict(sorted(found.items()))


_LOADED = _stamp()  # of the files as they are before this process reads those that lower


@functools.cache
def version() -> str | None:
    """A hash of the compiler's sources as they were at the start of this process, or None when they
    were edited since and it is not known."""
    key = key_of("version", str(PACKAGE), "\n".join(_LOADED), "\n".join(_LOADED.values()))
    known = cache.current().get("version", key) if knobs.get("cache") else None
    if known is not None:
        return known.decode()
    texts = [part for n in _LOADED for part in (n, (PACKAGE / n.lstrip("/")).read_bytes())]
    if _stamp() != _LOADED:
        return None
    found = key_of(*texts)
    cache.put("version", key, found.encode())
    return found
