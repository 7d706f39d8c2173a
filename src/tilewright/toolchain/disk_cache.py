"""The kernel cache on disk: generated source and compiled binaries, one file an entry.

All entries are files `KEY.KIND` of one folder that is private to the user. A writer renames a
temporary file of the same folder, so any number of processes can share the folder without locks.
The last line of a file is a hash of its name and contents: a truncated, edited or moved file is a
miss, never loaded. (ELF files, cubins and source texts all tolerate a trailing line.) Sources that
a compiler refused are kept there too.
"""

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

PACKAGE = Path(__file__).resolve().parent.parent
_KEY = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9]*")
_TRAILER = b"\n//tilewright-sha256:"
_TRAILER_BYTES = len(_TRAILER) + 64 + 1
_MESSAGE_LINES = 30  # of a compiler that refused a source
_STALE_S = 3600.0  # the writer of a temporary file this old has died


@dataclass(slots=True)
class Stats:
    """Counters of this process, for reports. `compile_ms` is the time spent in compilers."""

    hits: int = 0
    compiled: int = 0
    compile_ms: float = 0.0


stats = Stats()


def count_compiled(name: str, began: float) -> None:
    """Count a compilation that began at `began` (perf_counter); print its time at debug level 1."""
    elapsed_ms = (time.perf_counter() - began) * 1e3
    stats.compiled += 1
    stats.compile_ms += elapsed_ms
    if knobs.get("debug") >= 1:
        print(f"tilewright: compiled {name} in {elapsed_ms:.0f} ms", file=sys.stderr)


def key_of(*parts: str | bytes) -> str:
    """The sha256 of several parts, as hex. Lengths are hashed too: "ab", "c" is not "a", "bc"."""
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
        """The file of an entry, whether or not it exists."""
        assert _KIND.fullmatch(kind) and _KEY.fullmatch(key), f"bad cache entry {kind}/{key}"
        return self.folder / f"{key}.{kind}"

    def get(self, kind: str, key: str) -> bytes | None:
        """The data of an intact entry, or None."""
        try:
            with open(self.path(kind, key), "rb", opener=_nonblocking) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return None
                contents = file.read()
        except OSError:
            return None
        data = contents[:-_TRAILER_BYTES]
        return data if contents[len(data) :] == _trailer(kind, key, data) else None

    def put(self, kind: str, key: str, data: bytes) -> Path:
        """Store or replace an entry atomically. Raises OSError."""
        import tempfile  # not needed by a process that finds all its kernels

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

    def entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files KEY.KIND of all entries, intact or not, by name, and their status."""
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                if _KEY.fullmatch(path.stem) and _KIND.fullmatch(path.suffix[1:]):
                    with contextlib.suppress(OSError):
                        yield path, path.stat()

    def clear(self) -> int:
        """Remove all entries and the temporary files of dead writers; the number of entries."""
        removed = 0
        for path, _ in list(self.entries()):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
        for path in self.folder.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        return removed


def _trailer(kind: str, key: str, data: bytes) -> bytes:
    digest = hashlib.sha256(f"{kind}:{key}:".encode())
    digest.update(data)
    return _TRAILER + digest.hexdigest().encode() + b"\n"


def _check_private(folder: Path) -> None:
    """Refuse a folder where another user could put a library. Raises BuildError[B105]."""
    status = folder.stat()
    where = f"cache folder {folder}"
    if status.st_uid != os.getuid():
        text = f"the cache folder belongs to user {status.st_uid}, not to {os.getuid()}"
        hint = "set TILEWRIGHT_CACHE_DIR to a folder of your own"
        raise BuildError("B105", text, where=where, hint=hint)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        text = f"others may write to the cache folder (mode {stat.S_IMODE(status.st_mode):04o})"
        raise BuildError("B105", text, where=where, hint=f"chmod 700 {folder}")


_open: dict[Path, Cache] = {}  # by folder, once it was checked; or the cache used instead
_private: list[Cache] = []  # the temporary folder of this process, made when first needed


def current() -> Cache:
    """The cache of the `cache_dir` knob; one in a temporary folder if that cannot be written or
    the cache is off."""
    if not knobs.get("cache"):
        return temporary()
    folder = knobs.get("cache_dir")
    cache = _open.get(folder)
    if cache is None:
        try:
            cache = Cache(folder)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(13, "the folder cannot be written")
        except OSError as error:
            cache = _fall_back(folder, error)
        _open[folder] = cache
    return cache


def get(kind: str, key: str) -> bytes | None:
    """The data of an entry of the current cache, or None. Count a hit."""
    data = current().get(kind, key) if knobs.get("cache") else None
    stats.hits += data is not None
    return data


def find(kind: str, key: str) -> Path | None:
    """As `get`, but the file: shared libraries are opened by name."""
    return None if get(kind, key) is None else current().path(kind, key)


def put(kind: str, key: str, data: bytes) -> Path:
    """Store an entry; in a temporary folder if the disk is full or read-only. Raises
    BuildError[B105] if neither can be written."""
    cache = current()
    try:
        return cache.put(kind, key, data)
    except FileNotFoundError:  # the folder was deleted: make it again
        _open.pop(cache.folder, None)
        with contextlib.suppress(OSError):
            return current().put(kind, key, data)
    except OSError as error:
        _open[cache.folder] = _fall_back(cache.folder, error)
    return put_private(kind, key, data)


def put_private(kind: str, key: str, data: bytes) -> Path:
    """Store an entry in the temporary folder of this process. Raises BuildError[B105]."""
    cache = temporary()
    try:
        return cache.put(kind, key, data)
    except OSError as error:
        text = f"the temporary folder {cache.folder} cannot be written: {error}"
        hint = "set TILEWRIGHT_CACHE_DIR or TMPDIR to a folder on a disk with free space"
        raise BuildError("B105", text, hint=hint) from None


def _fall_back(folder: Path, error: OSError) -> Cache:
    cache = temporary()
    warn(
        f"the kernel cache {folder} cannot be written ({error.strerror or error}); "
        f"kernels of this process are kept in {cache.folder} and lost at its end"
    )
    return cache


def warn(text: str) -> None:
    """Warn (RuntimeWarning) at the line that called into Tilewright."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def temporary() -> Cache:
    """The cache in a temporary folder of this process, removed when it ends; a new one if something
    deleted it. Raises BuildError[B105]."""
    import tempfile

    if not _private or not _private[0].folder.is_dir():
        try:
            folder = tempfile.mkdtemp(prefix="tilewright-")
        except OSError as error:
            hint = "set TILEWRIGHT_CACHE_DIR or TMPDIR to a folder that can be written"
            raise BuildError("B105", f"no temporary folder: {error}", hint=hint) from None
        _private[:] = [Cache(Path(folder))]
        atexit.register(_remove_temporary, os.getpid(), folder)
    return _private[0]


def _remove_temporary(owner: int, folder: str) -> None:
    import shutil

    if os.getpid() == owner:  # a forked child must not remove the kernels of its parent
        shutil.rmtree(folder, ignore_errors=True)


def _nonblocking(path: str, flags: int) -> int:
    """An opener: a plain open of a named pipe would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def refusal(compiler: str, name: str, log: str, source: str, key: str) -> BuildError:
    """B101 with the kernel's name, the first error of the compiler's log, and the log itself. The
    source is kept in the cache."""
    lines = log.strip().splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    kernel = f"kernel {name}" if name else "a kernel"
    hint = "run again with TILEWRIGHT_VERIFY=1 to check the program after each pass"
    if knobs.get("verify"):
        hint = "this is a bug of Tilewright, or the compiler is too old"
    text = f"{compiler} refused the code generated for {kernel}: {first.strip()}"
    text = "\n".join([text, *(lines[:_MESSAGE_LINES] if len(lines) > 1 else [])])
    hint = f"the source is kept in that file; {hint}"
    return BuildError("B101", text, where=keep(source, key), hint=hint)


def keep(source: str, key: str) -> str:
    """Store a source text for the user to look at; its file, or nothing if it cannot be written."""
    with contextlib.suppress(BuildError):
        return str(put("failed", key, source.encode()))
    return ""
