"""`tilewright cache ls | clear`: the compiled kernels on disk."""

from __future__ import annotations

import argparse
import contextlib
import json
import time

from tilewright.toolchain import disk_cache

_KINDS = {
    "so": "shared library (C++)",
    "cubin": "module (CUDA)",
    "kernel": "source and manifest of a program",
    "version": "hash of the compiler's sources",
    "cxx": "version of a compiler",
    "failed": "source that a compiler refused",
}


def cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "clear"), nargs="?", default="ls")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def cache(args: argparse.Namespace) -> int:
    """List the entries of the current cache, newest last, or remove them."""
    folder = disk_cache.current().folder
    if args.action == "clear":
        removed = disk_cache.current().clear()
        text = f"removed {removed} entries of {folder}"
        print(json.dumps({"folder": str(folder), "removed": removed}) if args.json else text)
        return 0
    rows = []
    for entry in disk_cache.current().entries():
        with contextlib.suppress(OSError):  # another process has just removed it
            rows.append((entry.path.stat().st_mtime, entry))
    rows.sort(key=lambda row: row[0])
    if args.json:
        listed = [{"kind": e.kind, "key": e.key, "bytes": e.nbytes, "modified": t} for t, e in rows]
        print(json.dumps({"folder": str(folder), "entries": listed}))
        return 0
    for when, entry in rows:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
        kind = _KINDS.get(entry.kind, entry.kind)
        print(f"{stamp}  {entry.nbytes / 1024:8.1f} KiB  {entry.key[:12]}  {kind}")
    print(f"{len(rows)} entries, {sum(e.nbytes for _, e in rows) / 2**20:.1f} MiB in {folder}")
    return 0
