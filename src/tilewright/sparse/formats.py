"""Formats as values: a `Format` is a list of levels, a `Composed` format a list of parts.

    csr()            dense(d0) compressed(d1)
    coo()            compressed(d0, chunk=-1) singleton(d1)
    ell(4)           dense(d0) fixed(d1, 4)
    bsr(16)          dense(d0/16) compressed(d1/16) dense(d0%16) dense(d1%16)
    hyb(buckets=…)   rows of similar length padded to a common width, long rows in CSR

Formats compare and hash by value; kernels are built for them and cached by them.
Reference: hyb(c, k) of SparseTIR (ASPLOS 2023, §4.2.1).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from tilewright.errors import FormatError
from tilewright.ir.levels import Compressed, Dense, Fixed, Level, Ragged, Singleton, integer
from tilewright.ir.levels.lists import lists_rows

__all__ = [
    "Composed", "Format", "Where", "bsr", "bucket", "coo", "csc", "csf", "csr", "dbsr", "dcsr",
    "ell", "hyb", "ragged", "sr_bcrs",
]  # fmt: skip
MOST_PARTS = 1 << 16  # of a composed format: a row of its work table each
Chosen = tuple["Format", np.ndarray | None, np.ndarray | None]  # format, entries, rows of a part


@dataclass(frozen=True, slots=True, repr=False)
class Format:
    """A list of levels, outermost first. Formats with different names are different formats, also
    where their levels are equal: two parts of one matrix can then have their own schedules.

    Raises FormatError[F101]."""

    name: str
    levels: tuple[Level, ...]
    is_composed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_levels(self)

    @property
    def ndim(self) -> int:
        """How many dimensions a tensor stored in it has."""
        return 1 + max(level.dim for level in self.levels)

    @property
    def formats(self) -> tuple["Format", ...]:
        """The formats of its parts: one, itself."""
        return (self,)

    @property
    def is_exact(self) -> bool:
        """Whether only entries are stored, no explicit zeros around them."""
        return self.is_tight and max(self.blocks) == 1

    @property
    def is_tight(self) -> bool:
        """Whether the only explicit zeros are those in blocks that have an entry."""
        stored = [level.is_dense for level in self.levels if not level.inner]
        first = stored.index(False) if False in stored else 0
        return all(level.exact for level in self.levels) and not any(stored[first:])

    @property
    def blocks(self) -> tuple[int, ...]:
        """The size of its blocks along each dimension; 1 where it has none."""
        sizes = {level.dim: level.block for level in self.levels}
        return tuple(sizes[dim] or 1 for dim in range(self.ndim))

    @property
    def repeats(self) -> bool:
        """Whether a coordinate that is no entry may be stored at several positions."""
        return not self.is_exact and not all(level.unique for level in self.levels)

    @property
    def covers_rows(self) -> bool:
        """Whether every row is stored, the empty ones too."""
        return self.levels[0].is_dense and self.levels[0].dim == 0

    def pack(
        self, matrix: Any, *, dtype: Any = None, values: Any = None, index: Any = None,
        fill: float = 0.0,
    ) -> Any:  # fmt: skip
        """Pack a SciPy sparse matrix, a torch tensor, a dense array or (indptr, indices, values,
        shape). `index`: the type of its coordinates, `"int32"` or `"int64"`; None: by size. `fill`:
        the value of missing coordinates, as the program declares it.

        See `sparse.pack.pack`. Returns a `Packed`."""
        from tilewright.sparse.pack import pack

        return pack(self, matrix, dtype=dtype, values=values, index=index, fill=fill)

    def split(self, coords: Sequence[np.ndarray], shape: tuple[int, ...]) -> Iterator[Chosen]:
        """Its one part: all entries, and rows as they come."""
        yield self, None, None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{self.name}: {' '.join(map(str, self.levels))}"


@dataclass(frozen=True, slots=True)
class Where:
    """Selects the entries of a part: those in range `col_part` of `col_parts` equal ranges of
    columns, of the rows that have `shortest` to `longest` entries there (both included; `longest`
    None: no limit). Where a part of the format stores blocks no block is divided: ranges of columns
    end at multiples of its size, and a row counts as long as the longest of its block.

    Raises FormatError[F101]."""

    shortest: int = 0
    longest: int | None = None
    col_part: int = 0
    col_parts: int = 1

    def __post_init__(self) -> None:
        most = np.iinfo(np.int64).max  # rows may be longer than an int32
        integer("where", "shortest", self.shortest, most=most)
        if self.longest is not None:
            integer("where", "longest", self.longest, most=most)
        integer("where", "col_parts", self.col_parts, 1)
        integer("where", "col_part", self.col_part, most=self.col_parts - 1)

    def __str__(self) -> str:
        top = "∞" if self.longest is None else self.longest
        cols = f", columns {self.col_part}/{self.col_parts}" if self.col_parts > 1 else ""
        return f"rows of {self.shortest}…{top} entries{cols}"

    def choose(self, entries: "ByRow") -> tuple[np.ndarray, np.ndarray]:
        """A bool mask of the selected rows, and the numbers of the selected entries."""
        numbers, length = entries.of_columns(self.col_part, self.col_parts)
        longest = entries.over_blocks(np.maximum, length)
        rows = longest >= self.shortest
        if self.longest is not None:
            rows &= longest <= self.longest
        taken = np.where(rows, length, 0)
        skipped = np.cumsum(length - taken)  # entries of rows in front that are not selected
        mine = np.arange(taken.sum()) + np.repeat(skipped, taken)
        return rows, mine if numbers is None else numbers[mine]


class ByRow:
    """The entries of a matrix, sorted by row, from which `Where` selects those of a part. `coords`:
    one array (nnz,) a dimension; `blocks`: the size, along each dimension, of the blocks that no
    part may divide. The row lengths of a range of columns are counted once."""

    def __init__(
        self, coords: Sequence[np.ndarray], shape: tuple[int, ...], blocks: tuple[int, ...] = (1, 1)
    ) -> None:
        self.coords, self.shape, self.blocks = coords, shape, blocks
        self.of_columns = cache(self._of_columns)

    def over_blocks(self, op: np.ufunc, rows: np.ndarray) -> np.ndarray:
        """For each row, `op` of the values that all rows of its block have."""
        block = self.blocks[0]
        if block == 1 or not len(rows):
            return rows
        return np.repeat(op.reduceat(rows, np.arange(0, len(rows), block)), block)[: len(rows)]

    def _of_columns(self, part: int, parts: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Selects the entries in range `part` of `parts` equal ranges of columns. Returns their
        numbers (None for all entries, if `parts` is 1), and how many of them each row has."""
        rows, numbers = self.coords[0], None
        if parts > 1:
            block = self.blocks[1]
            width = max(-(-self.shape[1] // (parts * block)), 1) * block
            numbers = np.flatnonzero(self.coords[1] // width == part)
            rows = rows[numbers]
        return numbers, np.bincount(rows, minlength=self.shape[0])


@dataclass(frozen=True, slots=True, repr=False)
class Composed:
    """A matrix as the sum of parts. Each is a `Where` (or any object with its `choose`), which
    selects entries, and the `Format` that stores them.

    Packing checks that each entry is in one part, and that no block is divided between parts
    (FormatError[F106]). It checks two promises too: `disjoint_rows`, no row is in two parts, and
    `covers_rows`, every row is in a part and stored there, an empty one too. Raises
    FormatError[F101], also for `covers_rows` with a part that cannot store an empty row: one whose
    outermost level is of columns, or of single entries.
    """

    name: str
    parts: tuple[tuple[Any, Format], ...]
    disjoint_rows: bool = False
    covers_rows: bool = False
    is_composed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kinds = {"name": str, "parts": tuple, "disjoint_rows": bool, "covers_rows": bool}
        _check_fields(self, kinds, "(where, format) pair", _is_part)
        dims = {f.ndim for _, f in self.parts}
        wrong = ""
        if not dims:
            wrong = f"{self.name} has no parts"
        elif len(dims) != 1:
            wrong = f"the parts of {self.name} have different numbers of dimensions"
        elif dims == {1}:
            wrong = f"the parts of {self.name} have one dimension"
        if wrong:
            raise FormatError("F101", wrong, where="parts")
        for at, (_, f) in enumerate(self.parts):
            top = f.levels[0]
            stores_empty = top.dim == 0 and (top.is_dense or getattr(top, "chunk", 0) >= 0)
            if self.covers_rows and not stores_empty:
                wrong = f"{self.name} covers rows, but parts[{at}], {f}, stores no empty rows"
                hint = "covers_rows=False, or rows first: tw.dcsr()"
                raise FormatError("F101", wrong, where="covers_rows", hint=hint)

    @property
    def ndim(self) -> int:
        """How many dimensions a tensor stored in it has."""
        return self.parts[0][1].ndim

    @property
    def formats(self) -> tuple[Format, ...]:
        """The distinct formats of the parts, in order: one compiled body serves each."""
        return tuple(dict.fromkeys(f for _, f in self.parts))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The size along each dimension of the blocks that no part may divide."""
        return tuple(map(math.lcm, *(f.blocks for f in self.formats)))

    @property
    def unique_rows(self) -> bool:
        """Whether the loops of only one part visit each row: parts share no rows, and each lists
        its own. Loops over a dense level of rows visit those of other parts too."""
        return self.disjoint_rows and all(lists_rows(f.levels[0]) for _, f in self.parts)

    @property
    def repeats(self) -> bool:
        """Whether a coordinate without an entry may be stored at several positions."""
        return any(f.repeats or not f.is_tight for f in self.formats)

    pack = Format.pack

    def split(self, coords: Sequence[np.ndarray], shape: tuple[int, ...]) -> Iterator[Chosen]:
        """Divides entries at `coords`, sorted by row, among the parts: the format of each, the
        numbers of its entries, and those of its rows where all rows are covered. Raises
        FormatError[F106]."""
        counter = np.min_scalar_type(len(self.parts))  # an entry in all of them must not wrap it
        of_entry, of_row = np.zeros(len(coords[0]), counter), np.zeros(shape[0], counter)
        chosen: list[Chosen] = []
        entries, taken = ByRow(coords, shape, self.blocks), 0
        for at, (where, part) in enumerate(self.parts):
            rows, numbers = self._checked(at, where.choose(entries), coords[0], shape[0])
            of_entry[numbers] += 1
            taken += len(numbers)
            of_row += entries.over_blocks(np.logical_or, rows)
            chosen.append((part, numbers, np.flatnonzero(rows) if self.covers_rows else None))
        if (of_entry != 1).any():
            at = int((of_entry != 1).argmax())
            entry = tuple(int(c[at]) for c in coords)
            wrong = f"entry {entry} is in {of_entry[at]} parts of {self.name}"
            raise FormatError("F106", wrong, hint="each entry must be in exactly one part")
        if taken != len(of_entry):
            wrong = f"a part of {self.name} takes an entry more than once"
            raise FormatError("F106", wrong, hint="the numbers that `choose` gives differ")
        wrong = (self.disjoint_rows & (of_row > 1)) | (self.covers_rows & (of_row < 1))
        if wrong.any():
            at = int(wrong.argmax())
            wrong = f"row {at} is in {of_row[at]} parts of {self.name}"
            raise FormatError("F106", wrong, hint="its promise says one")
        self._check_blocks(coords, shape, chosen)
        yield from chosen

    def _check_blocks(
        self, coords: Sequence[np.ndarray], shape: tuple[int, ...], chosen: list[Chosen]
    ) -> None:
        """Raises FormatError[F106] where two parts have entries of one block."""
        if max(self.blocks) == 1 or not len(coords[0]):
            return
        part, of_block, block = np.zeros((3, len(coords[0])), np.int64)
        for at, (_, numbers, _) in enumerate(chosen):
            part[numbers] = at
        for c, extent, size in zip(coords, shape, self.blocks, strict=True):
            block = np.unique(block * extent + c // size, return_inverse=True)[1]
        of_block[block] = part
        wrong = part != of_block[block]
        if wrong.any():
            parts = sorted((part[wrong][0], of_block[block][wrong][0]))
            rule = f"a block has entries in parts {parts[0]} and {parts[1]} of {self.name}"
            raise FormatError("F106", rule, hint=f"choose whole blocks of {self.blocks}")

    def _checked(self, at: int, chosen: Any, row_of: np.ndarray, rows: int) -> Any:
        """What part number `at` chose: a mask of the rows, and entries of these rows."""
        mask: Any
        numbers: Any
        try:
            mask, numbers = map(np.asarray, chosen)
        except (TypeError, ValueError):
            mask, numbers = np.zeros(0), np.zeros(0)
        if not numbers.size:
            numbers = numbers.astype(np.int64)
        wrong = ""
        if mask.dtype != bool or mask.shape != (rows,):
            wrong = f"gave a row mask of {mask.dtype} and shape {mask.shape}"
        elif numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            wrong = f"gave entry numbers of {numbers.dtype} and shape {numbers.shape}"
        elif numbers.size and not 0 <= numbers.min() <= numbers.max() < len(row_of):
            wrong = f"gave entry numbers outside 0…{len(row_of) - 1}"
        elif not mask[row_of[numbers]].all():
            row = int(row_of[numbers][mask[row_of[numbers]].argmin()])
            wrong = f"took an entry of row {row}, which its row mask leaves out"
        if wrong:
            wrong = f"`choose` of parts[{at}] of {self.name} {wrong}"
            hint = f"a bool mask of {rows} rows, and the numbers of entries in these rows"
            raise FormatError("F106", wrong, where="parts", hint=hint)
        return mask, numbers

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        rows = "\n".join(f"  {i}: {where}: {fmt!r}" for i, (where, fmt) in enumerate(self.parts))
        return f"{self.name}:\n{rows}"


def _is_part(part: Any) -> bool:
    is_pair = isinstance(part, tuple) and len(part) == 2
    return is_pair and callable(getattr(part[0], "choose", None)) and isinstance(part[1], Format)


def _check_fields(of: Any, kinds: dict[str, type], item: str, fits: Any) -> None:
    """Raises FormatError[F101] for a field of another type, or for an `item` that does not fit."""
    for name, kind in kinds.items():
        value: Any = getattr(of, name)
        wrong = "" if isinstance(value, kind) else f" is {value!r}, not a {kind.__name__}"
        for at, one in enumerate(value if kind is tuple and not wrong else ()):
            wrong = wrong or ("" if fits(one) else f"[{at}] is {one!r}, not a {item}")
        if wrong:
            raise FormatError("F101", f"format {of.name!r}: {name}{wrong}", where=name)


def _check_levels(f: Format) -> None:
    def bad(why: str, hint: str = "") -> FormatError:
        return FormatError("F101", f"format {f.name}: {why}", where="levels", hint=hint)

    kinds = {"name": str, "levels": tuple}
    _check_fields(f, kinds, "level", lambda level: isinstance(level, Level))
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
    if not f.levels[0].outermost:
        raise bad("the outermost level must be dense, compressed or a bitmap")
    for depth, level in enumerate(f.levels[1:], 1):
        if why := level.misfit(f.levels[:depth]):
            raise bad(why)


def csr() -> Format:
    """Compressed rows: `indptr`, `indices`, `values`."""
    return Format("csr", (Dense(0), Compressed(1)))


def csf(ndim: int) -> Format:
    """Compressed sparse fibres: each dimension lists the coordinates that have entries."""
    ndim = integer(f"csf({ndim!r})", "ndim", ndim, 1)
    return Format(f"csf({ndim})", tuple(Compressed(d) for d in range(ndim)))


def plain(ndim: int) -> Format:
    """What a sparse parameter is stored as where nothing else is said."""
    return csr() if ndim == 2 else csf(ndim)


def csc() -> Format:
    """Compressed columns."""
    return Format("csc", (Dense(1), Compressed(0)))


def dcsr(name: str = "dcsr") -> Format:
    """CSR without its empty rows."""
    return Format(name, (Compressed(0), Compressed(1)))


def coo() -> Format:
    """Coordinates: a row index and a column index for each entry, sorted by row."""
    return Format("coo", (Compressed(0, chunk=-1), Singleton(1)))


def ell(width: int) -> Format:
    """ELLPACK: every row padded to `width` entries. Raises FormatError[F101]; packing a longer row
    raises F108."""
    width = integer(f"ell({width!r})", "width", width)
    return Format(f"ell({width})", (Dense(0), Fixed(1, width=width)))


def ragged() -> Format:
    """Rows of different lengths without gaps: padded batches, sequences.

    A gap between the entries of a row is stored as an explicit 0, and explicit zeros are stored
    coordinates: a reduction over a row ranges over them too, so `min`, `max` and `prod` see the 0,
    or the fill of the tensor: with `fill=inf`, in the program and in `pack`, a `min` is that of the
    entries.
    """
    return Format("ragged", (Dense(0), Ragged(1)))


def bsr(block: int) -> Format:
    """Dense `block × block` tiles under compressed rows of tiles. Raises FormatError[F101].

    What a tile holds beside its entries are explicit zeros, and explicit zeros are stored
    coordinates, which reductions see: as `ragged` says."""
    block = integer(f"bsr({block!r})", "block", block, 1)
    inside = (Dense(dim, block=block, inner=True) for dim in (0, 1))
    return Format(f"bsr({block})", (Dense(0, block=block), Compressed(1, block=block), *inside))


def dbsr(block: int) -> Format:
    """BSR without its empty rows of tiles; explicit zeros as in `bsr`. Raises FormatError[F101]."""
    block = integer(f"dbsr({block!r})", "block", block, 1)
    return Format(f"dbsr({block})", (Compressed(0, block=block), *bsr(block).levels[1:]))


def sr_bcrs(rows: int) -> Format:
    """Columns of `rows` elements, those with an entry, in each stripe of `rows` rows: a matrix tile
    multiplies rows of the other operand gathered by index. Zeros as in `bsr`; F101 too.

    Reference: SR-BCRS of Magicube (SC 2022), where memory holds whole groups of columns. Here a
    schedule splits a stripe into groups, and `cache` fills up the last one."""
    rows = integer(f"sr_bcrs({rows!r})", "rows", rows, 1)
    stripe, inside = Dense(0, block=rows), Dense(0, block=rows, inner=True)
    return Format(f"sr_bcrs({rows})", (stripe, Compressed(1), inside))


def bucket(width: int, *, split: bool = False) -> Format:
    """A list of rows of at most `width` entries, padded to `width`; with `split` longer rows are
    cut into pieces. Raises FormatError[F101]."""
    width = integer(f"bucket({width!r})", "width", width)
    rows = Compressed(0, chunk=width if split else 0)
    return Format(f"bucket({width}{', split' if split else ''})", (rows, Fixed(1, width=width)))


def hyb(
    col_parts: int = 1, buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32), *, long_rows: str = "csr"
) -> Composed:
    """SparseTIR's hyb(c, k): columns in `col_parts` ranges; in each, a row goes to the first bucket
    that holds it. Rows longer than the last go to a CSR part, or, with `long_rows="split"`, are cut
    into pieces of the last bucket (whose sums then share rows).

    With one column range and `"csr"` no row is shared: sums need no atomics and are deterministic.
    Raises FormatError[F101].
    """
    call = f"hyb(col_parts={col_parts!r}, buckets={buckets!r})"
    buckets = _widths(call, buckets)
    col_parts = integer(call, "col_parts", col_parts, 1, MOST_PARTS // (len(buckets) + 1))
    if not isinstance(long_rows, str) or long_rows not in ("csr", "split"):
        raise FormatError("F101", f"long_rows={long_rows!r}", where="long_rows", hint="csr, split")
    cuts_rows = long_rows == "split"
    disjoint = col_parts == 1 and not cuts_rows
    parts: list[tuple[Where, Format]] = []
    for c in range(col_parts):
        here = {"col_part": c, "col_parts": col_parts}
        if not cuts_rows:
            parts.append((Where(buckets[-1] + 1, None, **here), dcsr()))
        for low, width in reversed([*pairwise((0, *buckets))]):
            split = cuts_rows and width == buckets[-1]
            rows = Where(low + 1, None if split else width, **here)
            parts.append((rows, bucket(width, split=split)))
    if disjoint:
        parts.append((Where(0, 0), bucket(0)))
    name = f"hyb({col_parts}; {', '.join(map(str, buckets))}{'; split' if cuts_rows else ''})"
    return Composed(name, tuple(parts), disjoint_rows=disjoint, covers_rows=disjoint)


def _widths(of: str, buckets: Any) -> tuple[int, ...]:
    """The widths of the buckets of `of`: a tuple or list, ascending."""
    is_list = isinstance(buckets, tuple | list)
    widths = tuple(integer(of, "buckets", w, 1) for w in (buckets if is_list else ()))
    if not widths or list(widths) != sorted(set(widths)):
        rule = f"{of}: buckets are widths, ascending"
        raise FormatError("F101", rule, where="buckets", hint="as (1, 2, 4, 8)")
    return widths
