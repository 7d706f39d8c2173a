"""The command line: `tilewright VERB …`. A verb's module is imported when the verb is used.

The module of a verb has two functions named after it: `env_arguments(parser)` adds the arguments,
`env(args) -> int` runs it and returns the exit status. Errors of Tilewright and of the disk print
without a traceback and exit with 2, an interrupt with 130.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tilewright.errors import ArgumentError, TilewrightError

EXIT_ERROR, EXIT_INTERRUPT = 2, 130


VERBS: dict[str, tuple[str, str]] = {
    "env": ("env", "list what is installed and what is missing"),
    "show": ("show", "print a file's programs at every level, then the generated C++ and CUDA"),
    "cache": ("cache", "list or clear the compiled kernels"),
    "explain": ("explain", "explain an error code and its remedy"),
    "demo": ("chat", "serve a small language model with kernels compiled on the spot"),
    "chat": ("chat", "talk to a model"),
    "serve": ("chat", "answer OpenAI's HTTP API with a model"),
    "tune": ("chat", "measure what a step of the server costs, which promised times need"),
}
"""The module below `tilewright.tools` that has `name_arguments` and `name`, and the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with its arguments (default: those of the process). Returns the exit status."""
    return guarded(_run, list(sys.argv[1:] if argv is None else argv))


def guarded(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command line and return its exit status. Interrupts, closed pipes and errors of
    Tilewright and of the disk end without a traceback."""
    _replace_unknown_characters()
    try:
        try:
            status = run(arguments)
        except TilewrightError as error:
            _flush()
            print(f"{type(error).__name__}{error}", file=sys.stderr)
            status = EXIT_ERROR
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


def _replace_unknown_characters() -> None:
    """Characters outside the terminal's encoding are replaced, in input and output."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # already in use, or closed
                stream.reconfigure(errors="replace")


def _flush() -> None:
    if sys.stdout is not None:  # None if the parent process closed it
        sys.stdout.flush()


def _drop_output() -> None:
    """Discard unwritten output, which Python would try to write again at exit."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_output(option: str, path: Path) -> None:
    """Check that a file can be written, before the work. Raises ArgumentError[A109]."""
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
    for name, (file, help_text) in VERBS.items():
        one = verbs.add_parser(name, help=help_text, description=help_text)
        if name == chosen:
            module = importlib.import_module(f"tilewright.tools.{file}")
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
