"""Packing: from a matrix to the arrays of a format, derived from its levels, and back.

pack:    map coordinates to levels → sort → fold the levels' `build` → scatter the values.
unpack:  expand the levels' arrays to one coordinate for each position.
The slot of each entry is kept, so new values need one scatter (`repack_values`) and no new
structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, FormatError
from tilewright.ir.levels import coordinates, lists_rows, row_major
from tilewright.sparse import entries
from tilewright.sparse.entries import Entries
from tilewright.sparse.formats import Composed, Format

ROUNDED_UP = 1 << 20  # units of the last CTA may count this far beyond the last entry
MOST_POSITIONS = 1 << 40  # of a level: beyond the memory of any machine, within an int64


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The arrays of one part: `arrays[l]` of level l, positions per level, and where entries went.
    Those on the host are read-only: kernels trust them.

    `entries` are indices into the caller's entries, `slots` their positions in `values`.
    """

    format: Format
    arrays: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    entries: np.ndarray
    slots: np.ndarray

    @property
    def size(self) -> int:
        """Stored positions, padding included."""
        return self.counts[-1]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Structure:
    """Where the entries of a matrix are: what several tensors of one sparsity share.

    `tables` holds what others found out about it once: the kernel that an operator chose, its
    coordinates."""

    format: Format | Composed
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    nnz: int
    index_dtype: DType
    device: str = "cpu"
    tables: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A sparse tensor: a structure and one array of values for each part. Slots without an entry
    (the rest of a block, a gap of a ragged row, padding) hold `fill`."""

    structure: Structure
    values: tuple[Any, ...]
    dtype: DType
    fill: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.structure.shape

    @property
    def format(self) -> Format | Composed:
        return self.structure.format

    @property
    def nnz(self) -> int:
        return self.structure.nnz

    @property
    def device(self) -> str:
        return self.structure.device

    @property
    def padding(self) -> float:
        """The share of stored slots that hold no entry."""
        stored = sum(p.size for p in self.structure.parts)
        return 1 - self.nnz / stored if stored else 0.0

    def with_values(self, values: Any, *, dtype: Any = None) -> Packed:
        """A tensor of the same structure with other values: (nnz,), in the order of the entries
        that were packed. Raises FormatError[F107] when there are not nnz of them, and as `pack`
        for what are no values."""
        given, kind = entries.values_of(values, "values")
        if given.shape != (self.nnz,):
            raise FormatError(
                "F107", f"{given.shape} values for {self.nnz} entries", where="values",
                hint="one value for each entry, in the order they were packed",
            )  # fmt: skip
        wanted = kind if dtype is None else dtypes.dtype(dtype)
        given = entries.converted(given, kind, wanted)
        arrays = tuple(_scatter(p, given, wanted, self.fill) for p in self.structure.parts)
        return Packed(self.structure, _placed(arrays, self.device), wanted, self.fill)

    repack_values = with_values

    def entry_values(self) -> np.ndarray:
        """The values (nnz,), in the order of the entries that were packed."""
        out = np.zeros(self.nnz, self.dtype.numpy)
        for part, values in zip(self.structure.parts, self.values, strict=True):
            out[part.entries] = entries.stored(values, self.dtype)[part.slots]
        return out

    def unpack(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Coordinates (one array a dimension) and values of what is stored, in row-major order;
        padding is left out, explicit zeros inside dense levels are not."""
        found = [
            _unpack_part(p, entries.stored(v, self.dtype), self.shape)
            for p, v in zip(self.structure.parts, self.values, strict=True)
        ]
        coords = [np.concatenate([c[d] for c, *_ in found]) for d in range(len(self.shape))]
        values = np.concatenate([v for _, v, _ in found])
        order = row_major(coords, np.concatenate([e for *_, e in found]))
        return tuple(c[order] for c in coords), values[order]

    def dense(self) -> np.ndarray:
        """The dense array, with `fill` where nothing is stored."""
        coords, values = self.unpack()
        out = np.full(self.shape, entries.filling(self.fill, self.dtype), self.dtype.numpy)
        out[coords] = values
        return out

    def to(self, device: str) -> Packed:
        """The same tensor on another device (`"cuda"`, `"cuda:1"`): its structure and values are
        copied there. Raises ArgumentError[A105]."""
        device = str(device)
        if device == self.device:
            return self
        s = self.structure
        values = tuple(entries.stored(v, self.dtype) for v in self.values)
        parts = tuple(
            replace(p, arrays=_each(p.arrays, lambda a: _read_only(entries.place(a, device))))
            for p in s.parts
        )
        moved = Structure(s.format, s.shape, parts, s.nnz, s.index_dtype, device)
        return Packed(moved, _placed(values, device), self.dtype, self.fill)

    def __str__(self) -> str:
        lines = [
            f"{self.format} {'×'.join(map(str, self.shape))} {self.dtype}, {self.nnz} entries, "
            f"{100 * self.padding:.1f} % padding, on {self.device}"
        ]
        if len(self.structure.parts) > 1:
            lines += [
                f"  {p.format}: {len(p.entries)} entries in {p.counts[0]} rows"
                for p in self.structure.parts
            ]
        return "\n".join(lines)

    __repr__ = __str__


def pack(
    fmt: Format | Composed,
    matrix: Any,
    *,
    dtype: Any = None,
    values: Any = None,
    index: Any = None,
    fill: float = 0.0,
) -> Packed:
    """Pack `matrix` into `fmt`.

    `matrix`: a SciPy sparse matrix or array, a torch tensor (dense, COO, CSR or CSC), a dense array
    (its non-zeros), a tuple (indptr, indices, values or None, shape) of CSR, (coords, values or
    None, shape) of COO with one coordinate array a dimension, or `Entries`. `values` (nnz,)
    overrides the values; `dtype` converts them. `index`: the type of the coordinates, int32 or
    int64, for which a kernel is built with `typed(index=…)`; None: int32 where it is wide enough.
    `fill`: the value of missing coordinates, that of the program's parameter; formats that store
    more than entries (bsr, ragged) hold it there.

    Raises FormatError F102-F106, F108, ArgumentError A102 (a dtype), A109 (a value out of range).
    """
    try:
        return _pack(fmt, entries.read(matrix), dtype, values, index, fill)
    except MemoryError as error:
        raise FormatError(
            "F108", f"{fmt} of this matrix does not fit the memory: {error}", where="matrix",
            hint="a format that stores less: tw.csr(), tw.coo()",
        ) from None  # fmt: skip


def _pack(
    fmt: Format | Composed, found: Entries, dtype: Any, values: Any, index: Any, fill: float
) -> Packed:
    shape = found.shape
    if len(shape) != fmt.ndim:
        raise FormatError(
            "F102", f"{fmt} stores {fmt.ndim} dimensions, the matrix has {len(shape)}",
            where="matrix",
        )  # fmt: skip
    given, kind = (
        (found.values, found.dtype) if values is None else entries.values_of(values, "values")
    )
    entries.check_count(given, found.nnz)
    wanted = kind if dtype is None else dtypes.dtype(dtype)
    given = entries.converted(given, kind, wanted)
    order = _row_major(found.coords)
    coords = [c if order is None else c[order] for c in found.coords]
    _check_unique(coords)
    if isinstance(fmt, Composed):  # which counts the entries of each row
        _check_positions(fmt, shape[0])
    parts = [
        _pack_part(f, coords, shape, mine, roots, order)
        for f, mine, roots in fmt.split(coords, shape)
    ]
    listed = [n for p in parts for a, n in zip(p.arrays, p.counts, strict=True) if a]
    chosen = _index_type(index, max([found.nnz, *shape, *listed]))
    parts = tuple(
        replace(
            p, arrays=_each(p.arrays, lambda a: _read_only(np.ascontiguousarray(a, chosen.numpy)))
        )
        for p in parts
    )
    structure = Structure(fmt, shape, parts, found.nnz, chosen)
    arrays = tuple(_scatter(p, given, wanted, fill) for p in parts)
    return Packed(structure, arrays, wanted, float(fill))


def _index_type(index: Any, largest: int) -> DType:
    """The type of coordinates: the one asked for, or the narrowest that counts to `largest`."""
    fits = largest < 2**31 - ROUNDED_UP
    if index is None:
        return dtypes.int32 if fits else dtypes.int64
    kind = dtypes.dtype(index)
    if kind not in (dtypes.int32, dtypes.int64):
        raise ArgumentError("A102", f"index is {kind}", where="index", hint="int32 or int64")
    if kind == dtypes.int32 and not fits:
        raise FormatError(
            "F108", f"coordinates or positions go up to {largest}, beyond int32", where="index",
            hint='index="int64"',
        )  # fmt: skip
    return kind


# ---------------------------------------------------------------------------- parts


def _row_major(coords: Sequence[np.ndarray]) -> np.ndarray | None:
    """The permutation that sorts entries by row, then column; None when they are sorted."""
    ordered = np.ones(max(len(coords[0]) - 1, 0), bool)
    for c in reversed(coords):
        less, same = c[:-1] < c[1:], c[:-1] == c[1:]
        ordered = less | (same & ordered)
    return None if ordered.all() else np.lexsort(coords[::-1])


def _check_unique(coords: list[np.ndarray]) -> None:
    if len(coords[0]) < 2:
        return
    same = np.ones(len(coords[0]) - 1, bool)
    for c in coords:
        same &= c[1:] == c[:-1]
    if same.any():
        at = int(same.argmax())
        raise FormatError(
            "F105",
            f"the entry at {tuple(int(c[at]) for c in coords)} is stored twice",
            where="indices",
            hint="sum duplicates first (SciPy: sum_duplicates)",
        )


def _check_positions(of: Any, count: int) -> None:
    if count > MOST_POSITIONS:
        raise FormatError(
            "F108", f"{of} of this matrix has {count} positions, the limit is {MOST_POSITIONS}",
            where="shape", hint="tw.coo() stores entries only, whatever the shape",
        )  # fmt: skip


def _pack_part(
    fmt: Format, coords: list[np.ndarray], shape: tuple[int, ...],
    mine: np.ndarray | None, roots: np.ndarray | None, order: np.ndarray | None,
) -> Part:  # fmt: skip
    local = coords if mine is None else [c[mine] for c in coords]
    numbers = np.arange(len(coords[0])) if mine is None else mine
    keys = [level.coordinate_of(local[level.dim]) for level in fmt.levels]
    resort = _row_major(keys)
    if resort is not None:
        keys, numbers = [k[resort] for k in keys], numbers[resort]
    q = np.zeros(len(numbers), np.int64)
    parents, arrays, counts = 1, [], []
    for depth, (level, c) in enumerate(zip(fmt.levels, keys, strict=True)):
        extent = level.extent_of(shape)
        _check_positions(fmt, parents * (extent if level.is_dense else getattr(level, "width", 1)))
        built, q, parents = level.build(q, c.astype(np.int64, copy=False), parents, extent)
        if depth == 0 and roots is not None and lists_rows(level):
            built, q, parents = _with_roots(built, q, roots)
        arrays.append(built)
        counts.append(parents)
    _check_positions(fmt, parents)
    found = numbers if order is None else order[numbers]
    return Part(fmt, tuple(arrays), tuple(counts), _read_only(found), _read_only(q))


def _with_roots(built: dict[str, np.ndarray], q: np.ndarray, roots: np.ndarray):
    """The outermost level with all of `roots` stored, those without entries too."""
    at = np.searchsorted(roots, built["indices"])
    return (
        {"indptr": np.array([0, len(roots)]), "indices": roots},
        at[q] if len(q) else q,
        len(roots),
    )


def _scatter(part: Part, values: np.ndarray, dtype: DType, fill: float) -> np.ndarray:
    out = np.full(part.size, entries.filling(fill, dtype), dtype.numpy)
    out[part.slots] = values[part.entries]
    return out


def _unpack_part(
    part: Part, values: np.ndarray, shape: tuple[int, ...]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Coordinates and values of what a part stores, and which of them are entries."""
    arrays = _each(part.arrays, lambda a: entries.array_of(a, "structure"))
    coords, positions = coordinates(part.format.levels, arrays, part.counts, shape)
    is_entry = np.zeros(part.size, bool)
    is_entry[part.slots] = True
    return coords, values[positions], is_entry[positions]


def _each(
    arrays: tuple[dict[str, Any], ...], change: Callable[[Any], Any]
) -> tuple[dict[str, Any], ...]:
    return tuple({k: change(a) for k, a in level.items()} for level in arrays)


def _read_only(array: Any) -> Any:
    """A host array that cannot be written through: a view, as the array may be the caller's."""
    if isinstance(array, np.ndarray):
        array = array.view()
        array.flags.writeable = False
    return array


def _placed(arrays: tuple[np.ndarray, ...], device: str) -> tuple[Any, ...]:
    return arrays if device == "cpu" else tuple(entries.place(a, device) for a in arrays)
