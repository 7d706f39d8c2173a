"""`tilewright explain CODE`: the meaning of an error code, its usual cause and its remedy."""

import argparse
import difflib
import sys

from tilewright.errors import ADVICE, CATALOG


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
    if code in ADVICE:
        print("\n" + ADVICE[code])
    return 0
