"""The kernel cache: generated source and compiled binaries, one file an entry.

Level 1 maps a program's key to its source, level 2 a source's key to its binary; both live in one
folder private to the user. A file is written beside its final place and renamed, so any number
of processes may share the folder without locks. Its last line is a hash of what precedes it
and of its own name: a file cut short, edited or moved is a miss, never loaded. (ELF files and
source texts both tolerate a trailing comment.)
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilewright import knobs
from tilewright.errors import BuildError

_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_KEY = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9]*")
_TRAILER = b"\n//tilewright-sha256:"
_TRAILER_BYTES = len(_TRAILER) + 64 + 1
_STALE_S = 3600.0  # a temporary file this old has lost its writer


@dataclass(slots=True)
class Stats:
    """Counts of this process, for reports. `compile_ms` is time spent in compilers."""

    hits: int = 0
    misses: int = 0
    compiled: int = 0
    compile_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached file; `nbytes` includes the trailer."""

    kind: str
    key: str
    path: Path
    nbytes: int


stats = Stats()


def key_of(*parts: str | bytes) -> str:
    """The sha256 of several parts, as hex. Lengths are hashed too, so parts cannot run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class Cache:
    """The entries of one folder. Raises BuildError[B105] where the folder is not private."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lives, whether or not it exists."""
        assert _KIND.fullmatch(kind) and _KEY.fullmatch(key), f"bad cache entry {kind}/{key}"
        return self.folder / f"{key}.{kind}"

    def get(self, kind: str, key: str) -> bytes | None:
        """The data of a sound entry, or None."""
        try:
            with open(self.path(kind, key), "rb", opener=_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return None
                whole = file.read()
        except OSError:
            return None
        data = whole[:-_TRAILER_BYTES]
        return data if whole[len(data) :] == _trailer(kind, key, data) else None

    def find(self, kind: str, key: str) -> Path | None:
        """The file of a sound entry, or None; for what is opened by name (shared libraries)."""
        return None if self.get(kind, key) is None else self.path(kind, key)

    def put(self, kind: str, key: str, data: bytes) -> Path:
        """Store an entry in one step, replacing what is there. Raises OSError."""
        import tempfile  # not needed to read, as a program does that finds all its kernels

        path = self.path(kind, key)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.write(_trailer(kind, key, data))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return path

    def entries(self) -> Iterator[Entry]:
        """All entries, sound or not, by name."""
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                key, _, kind = path.name.partition(".")
                if _KEY.fullmatch(key) and _KIND.fullmatch(kind):
                    with contextlib.suppress(OSError):
                        yield Entry(kind, key, path, path.stat().st_size)

    def clear(self) -> int:
        """Remove every entry, and leftovers of writers that died; the number of entries removed."""
        removed = 0
        for entry in list(self.entries()):
            with contextlib.suppress(OSError):
                entry.path.unlink()
                removed += 1
        for path in self.folder.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        return removed


def _at_once(path: str, flags: int) -> int:
    """Opens a file without waiting: something else may bear its name, and a pipe waits for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _trailer(kind: str, key: str, data: bytes) -> bytes:
    digest = hashlib.sha256(f"{kind}:{key}:".encode())
    digest.update(data)
    return _TRAILER + digest.hexdigest().encode() + b"\n"


def _check_private(folder: Path) -> None:
    """Refuse a folder in which another user could plant a library."""
    status = folder.stat()
    where = f"cache folder {folder}"
    if status.st_uid != os.getuid():
        raise BuildError(
            "B105",
            f"the cache folder belongs to user {status.st_uid}, not to {os.getuid()}",
            where=where,
            hint="set TILEWRIGHT_CACHE_DIR to a folder of your own",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            "B105",
            f"others may write to the cache folder (mode {stat.S_IMODE(status.st_mode):04o})",
            where=where,
            hint=f"chmod 700 {folder}",
        )


_open: dict[Path, Cache] = {}  # folders already opened and checked
_private: list[Cache] = []  # the fallback of this process, made when first needed


def current() -> Cache:
    """The cache of the `cache_dir` knob; a private temporary one where that cannot be written."""
    if not knobs.get("cache"):
        return _temporary()
    folder = knobs.folder(knobs.get("cache_dir"))
    found = _open.get(folder)
    if found is None:
        try:
            found = Cache(folder)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(13, "the folder cannot be written")
        except OSError as error:
            found = _fall_back(folder, error)
        _open[folder] = found
    return found


def get(kind: str, key: str) -> bytes | None:
    """The data of an entry of the current cache, or None. Counts a hit or a miss."""
    data = current().get(kind, key) if knobs.get("cache") else None
    _count(data is not None)
    return data


def find(kind: str, key: str) -> Path | None:
    """The file of an entry of the current cache, or None. Counts a hit or a miss."""
    path = current().find(kind, key) if knobs.get("cache") else None
    _count(path is not None)
    return path


def put(kind: str, key: str, data: bytes) -> Path:
    """Store an entry; on a full or read-only disk in a temporary folder. Raises B105 at worst."""
    cache = current()
    try:
        return cache.put(kind, key, data)
    except FileNotFoundError:  # the folder was deleted under us
        _open.pop(cache.folder, None)
        fresh = current()
        with contextlib.suppress(OSError):
            return fresh.put(kind, key, data)
        cache = fresh
    except OSError as error:
        _open[cache.folder] = _fall_back(cache.folder, error)
    try:
        return _temporary().put(kind, key, data)
    except OSError as error:
        raise BuildError(
            "B105",
            f"neither {cache.folder} nor {_temporary().folder} can be written: {error}",
            hint="set TILEWRIGHT_CACHE_DIR to a folder with room",
        ) from None


def entries() -> Iterator[Entry]:
    """All entries of the current cache."""
    return current().entries()


def clear() -> int:
    """Empty the current cache; the number of entries removed."""
    return current().clear()


def _count(hit: bool) -> None:
    if hit:
        stats.hits += 1
    else:
        stats.misses += 1


def _fall_back(folder: Path, error: OSError) -> Cache:
    cache = _temporary()
    warn(
        f"the kernel cache {folder} cannot be written ({error.strerror or error}); "
        f"kernels of this process are kept in {cache.folder} and lost at its end"
    )
    return cache


def warn(text: str) -> None:
    """A RuntimeWarning at the line that called into Tilewright, however deep we are."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def _temporary() -> Cache:
    """A folder of this process alone, removed when it ends."""
    import tempfile

    if not _private:
        try:
            folder = tempfile.mkdtemp(prefix="tilewright-")
        except OSError as error:
            raise BuildError(
                "B105",
                f"no temporary folder can be made: {error}",
                hint="set TILEWRIGHT_CACHE_DIR or TMPDIR to a folder that can be written",
            ) from None
        _private.append(Cache(Path(folder)))
        atexit.register(_remove_temporary, os.getpid(), folder)
    return _private[0]


def _remove_temporary(owner: int, folder: str) -> None:
    import shutil

    if os.getpid() == owner:  # a forked child must not take its parent's kernels away
        shutil.rmtree(folder, ignore_errors=True)
