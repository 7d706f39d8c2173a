"""`tilewright explain CODE`: the meaning of an error code, its usual cause and its remedy."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from tilewright.errors import CATALOG

FAMILIES = {
    "F": "FormatError: formats and packing",
    "P": "ProgramError: programs",
    "S": "ScheduleError: schedules",
    "A": "ArgumentError: arguments of a call",
    "B": "BuildError: building and running",
    "K": "KnobError: environment variables",
    "E": "MissingExtra: optional packages",
    "M": "ModelError: models and serving",
    "I": "InternalError: a bug of Tilewright",
}

_TEXT = Path(__file__).with_name("explain.txt").read_text(encoding="utf-8")

EXPLAIN: dict[str, str] = {}
for _line in _TEXT.splitlines():  # a code begins an entry, indented lines continue it
    _code = _line[:4].strip() or next(reversed(EXPLAIN))
    EXPLAIN[_code] = f"{EXPLAIN[_code]}\n{_line[5:]}" if _code in EXPLAIN else _line[5:]


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", help="such as F104; without one, all codes are listed")


def explain(args: argparse.Namespace) -> int:
    """Print one code, or all of them; 2 for a code that does not exist."""
    if args.code is None:
        for code, meaning in CATALOG.items():
            print(f"{code}  {meaning}")
        return 0
    code = args.code.upper().strip("[]")
    if code not in CATALOG:
        near = difflib.get_close_matches(code, CATALOG, n=3)
        suggestion = f"; near: {', '.join(near)}" if near else ""
        print(f"no error code {args.code}{suggestion}", file=sys.stderr)
        return 2
    print(f"{code}: {CATALOG[code]}")
    print(f"  {FAMILIES[code[0]]}")
    if code in EXPLAIN:
        print("\n" + EXPLAIN[code])
    return 0
