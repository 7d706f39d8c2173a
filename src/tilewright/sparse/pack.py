"""Packing: from a matrix to the arrays of a format, derived from its levels, and back.

pack:    map coordinates to levels → sort → fold the levels' `build` → scatter the values.
unpack:  expand the levels' arrays to one coordinate for each position.
The slot of each entry is kept, so new values need one scatter (`repack_values`) and no new
structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import FormatError
from tilewright.ir.levels import coordinates, row_major
from tilewright.sparse.formats import Composed, Format

ROUNDED_UP = 1 << 20  # units of the last CTA may count this far beyond the last entry


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The arrays of one part: `arrays[l]` of level l, positions per level, and where entries went.

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
    """A sparse tensor: a structure and one array of values for each part."""

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
        that were packed. Raises FormatError[F107] when there are not nnz of them."""
        values = np.asarray(values)
        if values.shape != (self.nnz,):
            raise FormatError(
                "F107", f"{values.shape} values for {self.nnz} entries", where="values",
                hint="one value for each entry, in the order they were packed",
            )  # fmt: skip
        kind = dtypes.dtype(dtype) if dtype is not None else dtypes.dtype(values.dtype)
        arrays = tuple(_scatter(p, values, kind, self.fill) for p in self.structure.parts)
        packed = Packed(self.structure, arrays, kind, self.fill)
        return (
            packed
            if self.device == "cpu"
            else Packed(
                self.structure, tuple(place(a, self.device) for a in arrays), kind, self.fill
            )
        )

    repack_values = with_values

    def entry_values(self) -> np.ndarray:
        """The values (nnz,), in the order of the entries that were packed."""
        out = np.zeros(self.nnz, self.dtype.numpy)
        for part, values in zip(self.structure.parts, self.values, strict=True):
            out[part.entries] = _host(values)[part.slots]
        return out

    def unpack(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Coordinates (one array a dimension) and values of what is stored, in row-major order;
        padding is left out, explicit zeros inside dense levels are not."""
        found = [
            _unpack_part(p, v, self.shape)
            for p, v in zip(self.structure.parts, self.values, strict=True)
        ]
        coords = [np.concatenate([c[d] for c, *_ in found]) for d in range(len(self.shape))]
        values = np.concatenate([v for _, v, _ in found])
        order = row_major(coords, np.concatenate([e for *_, e in found]))
        return tuple(c[order] for c in coords), values[order]

    def dense(self) -> np.ndarray:
        """The dense array, with `fill` where nothing is stored."""
        coords, values = self.unpack()
        out = np.full(self.shape, self.fill, self.dtype.numpy)
        out[coords] = values
        return out

    def to(self, device: str) -> Packed:
        """The same tensor on another device (`"cuda"`): its structure and values are copied
        there."""
        if device == self.device:
            return self
        s = self.structure
        parts = tuple(
            Part(
                p.format,
                tuple({k: place(a, device) for k, a in level.items()} for level in p.arrays),
                p.counts,
                p.entries,
                p.slots,
            )
            for p in s.parts
        )
        moved = Structure(s.format, s.shape, parts, s.nnz, s.index_dtype, device)
        return Packed(moved, tuple(place(v, device) for v in self.values), self.dtype, self.fill)

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


def pack(fmt: Format | Composed, matrix: Any, *, dtype: Any = None, values: Any = None) -> Packed:
    """Pack `matrix` into `fmt`.

    `matrix`: a SciPy sparse matrix or array, a dense array (its non-zeros), a tuple (indptr,
    indices, values or None, shape) of CSR, or (coords, values or None, shape) of COO with one
    coordinate array a dimension. `values` overrides the values; `dtype` converts them. Raises
    FormatError F102–F106, F108.
    """
    coords, found, shape = _entries(matrix)
    if len(shape) != fmt.ndim:
        raise FormatError(
            "F102",
            f"{fmt} stores {fmt.ndim} dimensions, the matrix has {len(shape)}",
            where="matrix",
        )
    given = found if values is None else np.asarray(values)
    nnz = len(coords[0])
    if given is None:
        given = np.ones(nnz, np.float32)
    if given.shape != (nnz,):
        raise FormatError(
            "F102", f"{nnz} entries but values of shape {given.shape}", where="values"
        )
    kind = dtypes.dtype(dtype) if dtype is not None else dtypes.dtype(given.dtype)
    order = _row_major(coords, shape)
    coords = [c if order is None else c[order] for c in coords]
    _check_unique(coords)
    largest = max([nnz, *shape, *(_slots_bound(f, shape) for f in fmt.formats)])
    index = dtypes.int32 if largest < 2**31 - ROUNDED_UP else dtypes.int64
    parts = tuple(
        _pack_part(f, coords, shape, mine, roots, index, order)
        for f, mine, roots in _split(fmt, coords, shape)
    )
    structure = Structure(fmt, tuple(shape), parts, nnz, index)
    return Packed(structure, tuple(_scatter(p, given, kind, 0.0) for p in parts), kind)


def _slots_bound(f: Format, shape: Sequence[int]) -> int:
    """Positions a format may need whatever the entries: rows × width of a padded level."""
    widths = [getattr(level, "width", 1) for level in f.levels]
    return int(shape[0]) * max(1, *widths)


def _entries(matrix: Any) -> tuple[list[np.ndarray], np.ndarray | None, tuple[int, ...]]:
    if isinstance(matrix, tuple):
        if len(matrix) not in (3, 4):
            raise FormatError(
                "F102", f"a tuple of {len(matrix)} is no matrix", where="matrix",
                hint="(indptr, indices, values, shape) or (coords, values, shape)",
            )  # fmt: skip
        return _from_csr(*matrix) if len(matrix) == 4 else _from_coo(*matrix)
    if hasattr(matrix, "tocsr") and hasattr(matrix, "nnz"):
        m = matrix.tocsr()
        if m is matrix and not m.has_canonical_format:  # the caller's is left as it is
            m = m.copy()
        m.sum_duplicates()
        return _from_csr(m.indptr, m.indices, m.data, m.shape)
    if hasattr(matrix, "crow_indices"):
        indptr, indices = matrix.crow_indices(), matrix.col_indices()
        values = matrix.values().detach()
        return _from_csr(_host(indptr), _host(indices), _host(values), tuple(matrix.shape))
    try:
        array = np.asarray(matrix)
    except Exception:
        array = None
    if array is None or array.dtype == object or array.ndim == 0:
        raise FormatError(
            "F102",
            f"cannot pack a {type(matrix).__name__}",
            where="matrix",
            hint="a SciPy matrix, a dense array, (indptr, indices, values, shape) or "
            "(coords, values, shape)",
        )
    coords = [c.astype(np.int64) for c in np.nonzero(array)]
    return coords, array[tuple(coords)], array.shape


def _integers(x: Any, name: str) -> np.ndarray:
    a = _host(x)
    if a.ndim != 1 or a.dtype.kind not in "iu":
        raise FormatError(
            "F102",
            f"{name} has shape {a.shape} and dtype {a.dtype}",
            where=name,
            hint="a 1-D integer array",
        )
    return a


def _from_csr(
    indptr: Any, indices: Any, values: Any, shape: Any
) -> tuple[list[np.ndarray], np.ndarray | None, tuple[int, ...]]:
    indptr, indices = _integers(indptr, "indptr"), _integers(indices, "indices")
    shape = tuple(int(s) for s in shape)
    if len(shape) != 2 or min(shape) < 0:
        raise FormatError("F102", f"shape {shape} is not that of a matrix", where="shape")
    if len(indptr) != shape[0] + 1:
        raise FormatError(
            "F103",
            f"indptr has {len(indptr)} elements, a matrix of {shape[0]} rows needs {shape[0] + 1}",
            where="indptr",
        )
    if indptr[0] != 0 or indptr[-1] != len(indices):
        raise FormatError(
            "F103",
            f"indptr runs from {indptr[0]} to {indptr[-1]} but indices has {len(indices)} elements",
            where="indptr",
            hint="take both arrays from the same matrix",
        )
    steps = np.diff(indptr.astype(np.int64))
    if len(steps) and steps.min() < 0:
        row = int(steps.argmin())
        raise FormatError(
            "F103",
            f"indptr falls from {indptr[row]} to {indptr[row + 1]} at row {row}",
            where="indptr",
        )
    rows = np.repeat(np.arange(shape[0], dtype=indices.dtype), steps)
    return _from_coo((rows, indices), values, shape)


def _from_coo(
    coords: Any, values: Any, shape: Any
) -> tuple[list[np.ndarray], np.ndarray | None, tuple[int, ...]]:
    shape = tuple(int(s) for s in shape)
    coords = [_integers(c, f"coordinates of dimension {d}") for d, c in enumerate(coords)]
    if len(coords) != len(shape) or len({len(c) for c in coords}) > 1:
        raise FormatError("F102", "coordinate arrays and shape do not go together", where="coords")
    for d, c in enumerate(coords):
        if len(c) and (int(c.min()) < 0 or int(c.max()) >= shape[d]):
            bad = int(c.min()) if int(c.min()) < 0 else int(c.max())
            raise FormatError(
                "F104",
                f"coordinate {bad} of dimension {d} is outside 0…{shape[d] - 1}",
                where="indices",
                hint="check that rows and columns are not swapped",
            )
    return coords, None if values is None else _host(values), shape


def _row_major(coords: list[np.ndarray], shape: Sequence[int]) -> np.ndarray | None:
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


def _split(fmt: Format | Composed, coords: list[np.ndarray], shape: tuple[int, ...]):
    """(format, entry numbers, row numbers or None) of each part; checks the exact cover."""
    nnz = len(coords[0])
    if isinstance(fmt, Format):
        yield fmt, None, None
        return
    taken = np.zeros(nnz, np.int8)
    row_parts = np.zeros(shape[0], np.int16)
    chosen = []
    for where, part in fmt.parts:
        rows, entries = where.rows(coords[0], coords[1], shape)
        taken += entries
        row_parts += rows
        chosen.append(
            (part, np.flatnonzero(entries), np.flatnonzero(rows) if fmt.covers_rows else None)
        )
    if nnz and (taken.min() != 1 or taken.max() != 1):
        at = int(np.flatnonzero(taken != 1)[0])
        raise FormatError(
            "F106",
            f"entry {tuple(int(c[at]) for c in coords)} is in {int(taken[at])} parts of {fmt.name}",
            hint="each entry must be in exactly one part",
        )
    if (fmt.disjoint_rows and row_parts.size and row_parts.max() > 1) or (
        fmt.covers_rows and row_parts.size and row_parts.min() < 1
    ):
        at = int(np.flatnonzero(row_parts != 1)[0])
        raise FormatError(
            "F106",
            f"row {at} is in {int(row_parts[at])} parts of {fmt.name}",
            hint="its promise says one",
        )
    yield from chosen


def _pack_part(
    fmt: Format, coords: list[np.ndarray], shape: tuple[int, ...],
    mine: np.ndarray | None, roots: np.ndarray | None, index: DType, order: np.ndarray | None,
) -> Part:  # fmt: skip
    local = coords if mine is None else [c[mine] for c in coords]
    numbers = np.arange(len(coords[0])) if mine is None else mine
    keys = [level.coordinate_of(local[level.dim]) for level in fmt.levels]
    resort = _row_major(keys, shape)
    if resort is not None:
        keys, numbers = [k[resort] for k in keys], numbers[resort]
    q = np.zeros(len(numbers), np.int64)
    parents, arrays, counts = 1, [], []
    for depth, (level, c) in enumerate(zip(fmt.levels, keys, strict=True)):
        built, q, parents = level.build(q, c.astype(np.int64), parents, level.extent_of(shape))
        if depth == 0 and roots is not None and "indices" in built:
            built, q, parents = _with_roots(built, q, roots)
        arrays.append({k: np.ascontiguousarray(a, index.numpy) for k, a in built.items()})
        counts.append(parents)
    entries = numbers if order is None else order[numbers]
    return Part(fmt, tuple(arrays), tuple(counts), entries, q)


def _with_roots(built: dict[str, np.ndarray], q: np.ndarray, roots: np.ndarray):
    """The outermost level with all of `roots` stored, those without entries too."""
    at = np.searchsorted(roots, built["indices"])
    if len(built["indices"]) and len(np.unique(built["indices"])) != len(built["indices"]):
        return built, q, len(built["indices"])
    return (
        {"indptr": np.array([0, len(roots)]), "indices": roots},
        at[q] if len(q) else q,
        len(roots),
    )


def _scatter(part: Part, values: np.ndarray, dtype: DType, fill: float) -> np.ndarray:
    out = np.full(part.size, fill, dtype.numpy)
    if dtype.name == "bfloat16" and values.dtype.kind == "f":
        out[:] = 0
        out[part.slots] = dtypes.bfloat16_bits(values[part.entries].astype(np.float32))
    else:
        out[part.slots] = values[part.entries]
    return out


def _unpack_part(
    part: Part, values: Any, shape: tuple[int, ...]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Coordinates and values of what a part stores, and which of them are entries."""
    arrays = [{k: _host(a) for k, a in level.items()} for level in part.arrays]
    coords, positions = coordinates(part.format.levels, arrays, part.counts, shape)
    is_entry = np.zeros(part.size, bool)
    is_entry[part.slots] = True
    return coords, _host(values)[positions], is_entry[positions]


def _host(x: Any) -> np.ndarray:
    """Any array as NumPy, copied from its device where needed."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "cpu") and hasattr(x, "numpy"):
        return x.cpu().numpy()
    if hasattr(x, "to_numpy"):
        return x.to_numpy()
    if hasattr(x, "get"):
        return x.get()
    return np.asarray(x)


def _no_device(array: Any, device: str) -> Any:
    raise FormatError("F102", f"nothing here can place arrays on {device}", where="device")


place: Callable[[Any, str], Any] = _no_device
"""Copies an array to a device; `build` sets it to the runtime's, which this room does not know."""
