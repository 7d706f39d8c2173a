"""The command line: `tilewright VERB …`. A verb's module is imported when the verb is used.

The module of a verb has two functions named after it: `env_arguments(parser)` describes the
arguments, `env(args) -> int` runs it and gives the exit status. Errors of Tilewright, and of a disk
that is full, print without a traceback and exit with 2, an interrupt with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.errors import ArgumentError, TilewrightError

EXIT_ERROR, EXIT_INTERRUPT = 2, 130


@dataclass(frozen=True, slots=True)
class Verb:
    """`module` below `tilewright.tools` that has `name_arguments` and `name`."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "env": Verb("env", "what is installed, what is missing, and what to do about it"),
    "show": Verb("show", "a file's programs at every level, then the C++ and CUDA made of them"),
    "cache": Verb("cache", "list or clear the compiled kernels"),
    "explain": Verb("explain", "what an error code means and how to mend it"),
    "demo": Verb("chat", "serve a small language model with kernels compiled on the spot"),
    "chat": Verb("chat", "talk to a model file (GGUF)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with its arguments (default: those of the process); the exit status."""
    return guarded(_run, list(sys.argv[1:] if argv is None else argv))


def guarded(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit status of a command line; interrupts, closed pipes and errors of Tilewright and of
    a disk end without a traceback."""
    _take_any_text()
    try:
        status = _coded(run, arguments)
        _flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader has gone, as in `tilewright show … | head`
        _drop_output()
        return 0
    except OSError as error:  # a full disk, most likely
        print(f"tilewright: {error}", file=sys.stderr)
        _drop_output()
        return EXIT_ERROR


def _coded(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; an error of Tilewright becomes its message and exit status."""
    try:
        return run(arguments)
    except TilewrightError as error:
        _flush()
        print(f"{type(error).__name__}{error}", file=sys.stderr)
        return EXIT_ERROR


def _take_any_text() -> None:
    """What the terminal's encoding does not have is replaced, in and out, and no error."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # read from before, or closed
                stream.reconfigure(errors="replace")


def _flush() -> None:
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.flush()


def _drop_output() -> None:
    """Forget what standard output could not take: Python tries again as it ends."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_output(option: str, path: Path) -> None:
    """That a file can be written, before the work whose result it is to hold. Raises
    ArgumentError[A109]."""
    folder = path.parent
    if path.is_dir():
        wrong = "is a folder"
    elif not folder.is_dir():
        wrong = f"cannot be written: there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        wrong = "cannot be written: permission denied"
    else:
        return
    raise ArgumentError("A109", f"{path} {wrong}", where=option)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tilewright",
        description="Sparse and attention kernels, written in Python, run as native code.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    chosen = next((a for a in arguments if not a.startswith("-")), "")
    module = None
    for name, verb in VERBS.items():
        one = verbs.add_parser(name, help=verb.help, description=verb.help)
        if name == chosen:
            module = importlib.import_module(f"tilewright.tools.{verb.module}")
            getattr(module, f"{name}_arguments")(one)
    args = parser.parse_args(arguments)
    if args.version:
        import tilewright

        print(f"tilewright {tilewright.__version__}")
        return 0
    if module is None:
        parser.print_help()
        return EXIT_ERROR
    return int(getattr(module, chosen)(args))
