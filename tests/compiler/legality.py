"""Which program takes which format: the table tests/golden/legality.txt, and the cells it allows.

Rows are programs, columns the format of A. Of a program with a second structure each format of B
has a row of its own. A cell is `ok` or the code of the refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from tests.compiler.cases import (
    FORMATS,
    OTHER,
    SEARCHED,
    SPARSE,
    SQUARE,
    STRUCTURED,
    attention,
    filled,
    two_sparse,
)
from tests.conftest import GOLDEN

from tilewright.build import Definition
from tilewright.errors import TilewrightError

FILE = "legality.txt"
NARROW = ("float16", "bfloat16")
COLUMNS = FORMATS | STRUCTURED
PROGRAMS: tuple[Definition, ...] = (*SPARSE, *SQUARE, two_sparse, *OTHER, attention, filled)


def rows() -> Iterator[tuple[str, Definition]]:
    """The label and the program of each row, A's format still to be chosen."""
    for program in PROGRAMS:
        yield program.name, program
    for program in SPARSE[:2]:  # rows in pieces are not added up in a narrow type
        for dtype in NARROW:
            yield f"{program.name} in {dtype}", program.typed(A=dtype, X=dtype)
    for program in SEARCHED:
        for name, fmt in COLUMNS.items():
            yield f"{program.name}, B in {name}", program.decompose(B=fmt)


def outcome(definition: Definition) -> str:
    """`ok`, or the code with which the program is refused."""
    try:
        definition.lower()
    except TilewrightError as error:
        assert error.hint, str(error)
        return error.code
    return "ok"


def table() -> str:
    """The text of the table, from the compiler."""
    cells = [["", *COLUMNS]]
    for label, program in rows():
        cells.append([label, *(outcome(program.decompose(A=fmt)) for fmt in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (" | ".join(x.ljust(w) for x, w in zip(c, widths, strict=True)) for c in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)


@cache
def outcomes() -> dict[tuple[str, str], str]:
    """The committed table: the outcome by label and A's format."""
    path = GOLDEN / FILE
    if not path.is_file():  # written by --update-golden
        return {}
    head, *body = (
        [x.strip() for x in s.split("|")] for s in path.read_text(encoding="utf-8").splitlines()
    )
    return {(label, f): x for label, *line in body for f, x in zip(head[1:], line, strict=True)}


def accepted(
    programs: Sequence[Definition], dtype: str = "", formats: Iterable[str] = FORMATS
) -> list[Any]:
    """The cells of these programs that the committed table allows: (program, format of A)."""
    of = f" in {dtype}" if dtype in NARROW else ""
    return [(p, f) for p in programs for f in formats if outcomes().get((p.name + of, f)) == "ok"]


def accepted_pairs(
    programs: Sequence[Definition], of_a: Sequence[str], of_b: Sequence[str]
) -> list[Any]:
    """Likewise for programs of two structures: (program, format of A, format of B)."""
    return [
        (p, f, g) for p in programs for f in of_a for g in of_b
        if outcomes().get((f"{p.name}, B in {g}", f)) == "ok"
    ]  # fmt: skip
