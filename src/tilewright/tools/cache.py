"""`tilewright cache ls | clear`: the compiled kernels on disk."""

import argparse
import json
import time

from tilewright.toolchain import disk_cache

_KINDS = {
    "so": "shared library (C++)", "cubin": "module (CUDA)",
    "kernel": "source and manifest of a program", "version": "hash of the compiler's sources",
    "cxx": "version of a compiler", "failed": "source that a compiler refused",
}  # fmt: skip


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
    entries = sorted(disk_cache.current().entries(), key=lambda e: e.modified)
    if args.json:
        listed = [
            {"kind": e.kind, "key": e.key, "bytes": e.nbytes, "modified": e.modified}
            for e in entries
        ]
        print(json.dumps({"folder": str(folder), "entries": listed}))
        return 0
    for e in entries:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.modified))
        print(f"{stamp}  {e.nbytes / 1024:8.1f} KiB  {e.key[:12]}  {_KINDS.get(e.kind, e.kind)}")
    print(f"{len(entries)} entries, {sum(e.nbytes for e in entries) / 2**20:.1f} MiB in {folder}")
    return 0
