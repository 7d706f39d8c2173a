"""What a kernel does when it runs, as a value that prints as tables: launches and what they cost.

An amount is a number for the arguments of a call, and a formula in sizes without them: the counts
of `lower.cost`. Caches of the hardware are not part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from tilewright.errors import InternalError
from tilewright.ir.names import size_name
from tilewright.runtime.arguments import Arguments
from tilewright.runtime.manifest import Manifest, unit_count

Amount = int | float | str


class Launch(NamedTuple):
    """`resources`: registers, shared memory and spills, where the compiler tells them."""

    launch: str
    bodies: int
    threads: int
    resources: str


class Search(NamedTuple):
    """Binary searches in an array: how many loops are around them, and how often they run."""

    search_in: str
    depth: int
    times: Amount


class Recomputed(NamedTuple):
    """An expression of `elements` values that is evaluated more often: in `loops` that it does not
    depend on, or in several `statements`. As a temporary, with `compute_at` a loop outside of them,
    it is evaluated once for each element."""

    recomputed: str
    loops: tuple[str, ...]
    statements: tuple[str, ...]
    elements: Amount
    evaluated: Amount


class Bytes(NamedTuple):
    """Bytes of an array, read or written: those that it has, and those that the loops ask for. What
    does not depend on the innermost loops is loaded once for them; lanes of a vector or a warp, and
    iterations that are written out, share a load of one address."""

    array: str
    way: str
    unique: Amount
    issued: Amount


class Padding(NamedTuple):
    """The positions that a format stores, and how many of them are entries of the matrix."""

    structure: str
    positions: Amount
    entries: Amount


@dataclass(frozen=True, slots=True)
class Report:
    """The launches of a kernel and what they cost."""

    name: str
    target: str
    launches: tuple[Launch, ...]
    searches: tuple[Search, ...]
    recomputed: tuple[Recomputed, ...]
    bytes: tuple[Bytes, ...]
    padding: tuple[Padding, ...]

    def __str__(self) -> str:
        lines = [f"{self.name} for {self.target}"]
        for rows in (self.launches, self.searches, self.recomputed, self.bytes, self.padding):
            lines += _table(rows) if rows else []
            if rows and rows is self.recomputed:
                lines.append("  (once as a temporary, with compute_at outside of those loops)")
        return "\n".join(lines)

    __repr__ = __str__


def report(manifest: Manifest, resources: Any, arguments: Arguments | None) -> Report:
    """The report of a kernel, in numbers where it has the `arguments` of a call."""
    values = _values(arguments) if arguments else {}

    def amount(text: str, count: Any) -> Amount:
        try:
            number = Fraction(unit_count(count, values))
        except InternalError:  # a size that is not known
            return text
        return number.numerator if number.denominator == 1 else float(number)

    used = resources or {}
    launches = (
        Launch(s.entry, len(s.units), s.threads[0] * s.threads[1], str(used.get(s.entry, "")))
        for s in manifest.stages
    )
    searches, recomputed, moved, padding = manifest.costs
    return Report(
        manifest.name,
        manifest.target,
        tuple(launches),
        tuple(Search(name, depth, amount(*x)) for name, depth, x in searches),
        tuple(Recomputed(e, f, s, amount(*x), amount(*y)) for e, f, s, x, y in recomputed),
        tuple(Bytes(name, way, amount(*x), amount(*y)) for name, way, x, y in moved),
        tuple(Padding(name, amount(*x), amount(*y)) for name, x, y in padding),
    )


def _values(arguments: Arguments) -> dict[str, Any]:
    """The sizes and counts that amounts are made of, by name."""
    sizes = arguments.sizes.items()
    values: dict[str, Any] = {size_name(d): n for d, n in sizes if isinstance(d, str)}
    for name, s in arguments.structures.items():
        values[f"{name}.entries"] = s.nnz
        for fmt in s.format.formats:
            which = "" if fmt == s.format else f"[{fmt}]"
            counts = zip(*((1, *p.counts) for p in s.parts if p.format == fmt), strict=True)
            for level, (above, count) in enumerate(pairwise(map(sum, counts))):
                page = getattr(fmt.levels[level], "page", 1)
                values[f"{name}.count{level}{which}"] = count
                values[f"{name}.row{level}{which}"] = Fraction(count, above * page or 1)
    return values


def _table(rows: Sequence[Any]) -> list[str]:
    """Lines with aligned columns below their heads."""
    head = [field.replace("_", " ") for field in rows[0]._fields]
    texts = [head, *([_text(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    pairs = (zip(row, widths, strict=True) for row in texts)
    return [f"  {'  '.join(text.ljust(n) for text, n in row)}".rstrip() for row in pairs]


def _text(x: Any) -> str:
    if isinstance(x, (int, float)):
        return f"{x:,}" if isinstance(x, int) else f"{x:,.1f}"
    return (" ".join(x) if isinstance(x, tuple) else x) or "-"
