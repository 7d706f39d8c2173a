"""`tilewright cache ls | clear`: the compiled kernels on disk."""

import argparse
import time

from tilewright.toolchain import disk_cache

_KINDS = {
    "so": "shared library (C++)", "cubin": "module (CUDA)",
    "kernel": "source and manifest of a program", "cxx": "version of a compiler",
    "failed": "source that a compiler refused",
}  # fmt: skip


def cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "clear"), nargs="?", default="ls")


def cache(args: argparse.Namespace) -> int:
    """List the entries of the current cache, newest last, or remove them."""
    folder = disk_cache.current().folder
    if args.action == "clear":
        removed = disk_cache.current().clear()
        print(f"removed {removed} entries of {folder}")
        return 0
    entries = sorted(disk_cache.current().entries(), key=lambda entry: entry[1].st_mtime)
    for path, status in entries:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
        kind, kib = path.suffix[1:], status.st_size / 1024
        print(f"{stamp}  {kib:8.1f} KiB  {path.stem[:12]}  {_KINDS.get(kind, kind)}")
    mib = sum(status.st_size for _, status in entries) / 2**20
    print(f"{len(entries)} entries, {mib:.1f} MiB in {folder}")
    return 0
