"""Formats as values: a `Format` is a list of levels, a `Composed` format a list of parts.

    csr()            dense(d0) compressed(d1)
    coo()            compressed(d0, chunk=-1) singleton(d1)
    ell(4)           dense(d0) fixed(d1, 4)
    bsr(16)          dense(d0/16) compressed(d1/16) dense(d0%16) dense(d1%16)
    hyb(buckets=…)   rows of similar length padded to a common width, long rows in CSR

Formats compare and hash by value; kernels are built for them and cached by them.
Reference: hyb(c, k) of SparseTIR (ASPLOS 2023, §4.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import FormatError
from tilewright.ir.levels import Compressed, Dense, Fixed, Level, Ragged, Singleton


@dataclass(frozen=True, slots=True, repr=False)
class Format:
    """A list of levels, outermost first. Formats of other names are other formats, though their
    levels be the same: so two parts of one matrix can have schedules of their own."""

    name: str
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        _check_levels(self)

    @property
    def ndim(self) -> int:
        return 1 + max(level.dim for level in self.levels)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of its parts: one, itself."""
        return (self,)

    @property
    def unique_rows(self) -> bool:
        """Whether each row is stored at one position of the outermost level."""
        return self.levels[0].unique

    @property
    def is_exact(self) -> bool:
        """Whether only entries are stored, no explicit zeros around them."""
        stored = [level.is_dense for level in self.levels]
        first = stored.index(False) if False in stored else 0
        ragged = any(isinstance(level, Ragged) for level in self.levels)
        return not ragged and not any(stored[first:])

    @property
    def covers_rows(self) -> bool:
        """Whether every row is stored, the empty ones too."""
        return self.levels[0].is_dense

    def pack(self, matrix: Any, *, dtype: Any = None, values: Any = None) -> Any:
        """Pack a SciPy sparse matrix, a dense array or (indptr, indices, values, shape).

        See `sparse.pack.pack`. Returns a `Packed`."""
        from tilewright.sparse.pack import pack

        return pack(self, matrix, dtype=dtype, values=values)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{self.name}: {' '.join(map(str, self.levels))}"


@dataclass(frozen=True, slots=True)
class Where:
    """The entries a part takes: rows by length (inclusive; `longest` None = no limit), columns by
    range `col_part` of `col_parts` equal ones. Lengths count entries inside the column range."""

    shortest: int = 0
    longest: int | None = None
    col_part: int = 0
    col_parts: int = 1

    def __str__(self) -> str:
        top = "∞" if self.longest is None else self.longest
        cols = f", columns {self.col_part}/{self.col_parts}" if self.col_parts > 1 else ""
        return f"rows of {self.shortest}…{top} entries{cols}"

    def rows(
        self, row_of: np.ndarray, col_of: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the rows and of the entries it takes."""
        inside = None
        if self.col_parts > 1:
            width = -(-shape[1] // self.col_parts)
            inside = col_of // width == self.col_part
        length = np.bincount(row_of if inside is None else row_of[inside], minlength=shape[0])
        rows = length >= self.shortest
        if self.longest is not None:
            rows &= length <= self.longest
        entries = rows[row_of]
        return rows, entries if inside is None else entries & inside


@dataclass(frozen=True, slots=True, repr=False)
class Composed:
    """A = Σ parts. Each part is a `Where` (or any object with its `rows` method) and a `Format`.

    `disjoint_rows`: no row is in two parts; `covers_rows`: every row is in one. Both are promises
    that packing checks; programs that are not sums need the first.
    """

    name: str
    parts: tuple[tuple[Any, Format], ...]
    disjoint_rows: bool = False
    covers_rows: bool = False

    def __post_init__(self) -> None:
        if not self.parts:
            raise FormatError(
                "F101", f"{self.name} has no parts", hint="give at least one (where, format)"
            )
        if len({f.ndim for _, f in self.parts}) != 1:
            raise FormatError(
                "F101", f"the parts of {self.name} have different numbers of dimensions"
            )

    @property
    def ndim(self) -> int:
        return self.parts[0][1].ndim

    @property
    def formats(self) -> tuple[Format, ...]:
        """The distinct formats of the parts, in order: one compiled body serves each."""
        return tuple(dict.fromkeys(f for _, f in self.parts))

    @property
    def unique_rows(self) -> bool:
        """Whether each row of the result belongs to one part: parts that list their rows, one by
        one. A dense or blocked level of rows walks rows of other parts too."""
        tops = [f.levels[0] for _, f in self.parts]
        listed = all(isinstance(t, Compressed) and t.dim == 0 and not t.block for t in tops)
        return self.disjoint_rows and listed and all(t.unique for t in tops)

    pack = Format.pack

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        rows = "\n".join(f"  {i}: {where}: {fmt!r}" for i, (where, fmt) in enumerate(self.parts))
        return f"{self.name}:\n{rows}"


def _check_levels(f: Format) -> None:
    def bad(why: str, hint: str = "") -> FormatError:
        return FormatError("F101", f"format {f.name}: {why}", hint=hint)

    if not f.levels:
        raise bad("no levels")
    for dim in range(f.ndim):
        of_dim = [level for level in f.levels if level.dim == dim]
        if not of_dim:
            raise bad(f"dimension {dim} is stored by no level")
        blocks = {level.block for level in of_dim}
        kinds = sorted(level.inner for level in of_dim)
        if blocks == {0} and len(of_dim) == 1:
            continue
        if len(blocks) != 1 or 0 in blocks or kinds != [False, True]:
            raise bad(f"dimension {dim} must be whole, or once its quotient and once its remainder")
    for above, level in zip((None, *f.levels), f.levels, strict=False):
        if isinstance(level, Singleton) and not (
            isinstance(above, Compressed) and above.chunk == -1
        ):
            raise bad("a singleton level needs compressed(chunk=-1) above it")
        if isinstance(level, Fixed) and level.width < 0:
            raise bad(f"a fixed level of width {level.width}")
    if any(isinstance(level, (Fixed, Ragged, Singleton)) for level in f.levels[:1]):
        raise bad("the outermost level must be dense or compressed")


def csr() -> Format:
    """Compressed rows: `indptr`, `indices`, `values`."""
    return Format("csr", (Dense(0), Compressed(1)))


def csc() -> Format:
    """Compressed columns."""
    return Format("csc", (Dense(1), Compressed(0)))


def dcsr(name: str = "dcsr") -> Format:
    """Compressed rows of which the empty ones are left out."""
    return Format(name, (Compressed(0), Compressed(1)))


def coo() -> Format:
    """One row and one column for each entry."""
    return Format("coo", (Compressed(0, chunk=-1), Singleton(1)))


def ell(width: int) -> Format:
    """`width` slots for every row."""
    return Format(f"ell({width})", (Dense(0), Fixed(1, width=width)))


def ragged() -> Format:
    """Rows of different lengths without gaps: padded batches, sequences."""
    return Format("ragged", (Dense(0), Ragged(1)))


def bsr(block: int) -> Format:
    """Dense `block × block` tiles under compressed rows of tiles."""
    if block < 1:
        raise FormatError("F101", f"bsr({block}): a block has at least one row")
    return Format(
        f"bsr({block})",
        (
            Dense(0, block=block),
            Compressed(1, block=block),
            Dense(0, block=block, inner=True),
            Dense(1, block=block, inner=True),
        ),
    )


def dbsr(block: int) -> Format:
    """BSR without its empty rows of tiles."""
    outer = Compressed(0, block=block)
    return Format(f"dbsr({block})", (outer, *bsr(block).levels[1:]))


def bucket(width: int, *, split: bool = False) -> Format:
    """A list of rows (pieces of rows, with `split`) of at most `width` entries, padded to
    `width`."""
    rows = Compressed(0, chunk=width if split else 0)
    return Format(f"bucket({width}{', split' if split else ''})", (rows, Fixed(1, width=width)))


def hyb(
    col_parts: int = 1,
    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    *,
    long_rows: str = "csr",
) -> Composed:
    """SparseTIR's hyb(c, k): columns in `col_parts` ranges; in each, a row goes to the first bucket
    that holds it. Rows longer than the last go to a CSR part, or, with `long_rows="split"`, are cut
    into pieces of the last bucket (whose sums then share rows).

    With one column range and `"csr"` no row is shared: sums need no atomics and are deterministic.
    """
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or col_parts < 1:
        raise FormatError(
            "F101",
            f"hyb(col_parts={col_parts}, buckets={buckets})",
            hint="ascending widths, at least 1 each",
        )
    if long_rows not in ("csr", "split"):
        raise FormatError("F101", f"long_rows={long_rows!r}", hint="csr or split")
    disjoint = col_parts == 1 and long_rows == "csr"
    lows = (1, *(w + 1 for w in buckets[:-1]))
    parts: list[tuple[Where, Format]] = []
    for c in range(col_parts):
        here = {"col_part": c, "col_parts": col_parts}
        if long_rows == "csr":
            parts.append((Where(buckets[-1] + 1, None, **here), dcsr()))
        for low, width in reversed(list(zip(lows, buckets, strict=True))):
            split = long_rows == "split" and width == buckets[-1]
            parts.append((Where(low, None if split else width, **here), bucket(width, split=split)))
    if disjoint:
        parts.append((Where(0, 0), bucket(0)))
    name = (
        f"hyb({col_parts}; {', '.join(map(str, buckets))}{'' if long_rows == 'csr' else '; split'})"
    )
    return Composed(name, tuple(parts), disjoint_rows=disjoint, covers_rows=disjoint)
