"""The command line: `tilewright VERB …`. A verb's module is imported when the verb is used.

The module of a verb has two functions named after it: `env_arguments(parser)` describes the
arguments, `env(args) -> int` runs it and gives the exit status. Errors of Tilewright print without
a traceback and exit with 2, an interrupt with 130.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.errors import TilewrightError

EXIT_ERROR, EXIT_INTERRUPT = 2, 130


@dataclass(frozen=True, slots=True)
class Verb:
    """`module` below `tilewright.tools` that has `name_arguments` and `name`."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "env": Verb("env", "what is installed, what is missing, and what to do about it"),
    "show": Verb("show", "a file's programs at every level, then the C++ and CUDA made of them"),
    "bench": Verb("bench", "measure against the best other implementations found here"),
    "cache": Verb("cache", "list or clear the compiled kernels"),
    "explain": Verb("explain", "what an error code means and how to mend it"),
    "demo": Verb("chat", "serve a small language model with kernels compiled on the spot"),
    "chat": Verb("chat", "talk to a model file (GGUF)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with its arguments (default: those of the process); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except TilewrightError as error:
        sys.stdout.flush()
        print(f"{type(error).__name__}{error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    except BrokenPipeError:  # the reader has gone, as in `tilewright show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
