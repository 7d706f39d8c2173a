"""Packing: from a matrix to the arrays of a format, derived from its levels, and back.

pack:    map coordinates to levels → sort → fold the levels' `build` → scatter the values.
unpack:  expand the levels' arrays to one coordinate for each position.
The slot of each entry is kept, so new values need one scatter (`repack_values`) and no new
structure.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError, FormatError
from tilewright.ir.levels import Compressed, Parents, coordinates, lists_rows, row_major
from tilewright.sparse import entries
from tilewright.sparse.entries import Entries
from tilewright.sparse.formats import Composed, Format, csr

MOST_POSITIONS = 1 << 40  # of a level: beyond the memory of any machine, within an int64
ROUNDED_UP = 1 << 20  # units of the last CTA may count this far beyond the last entry


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The arrays of one part: `arrays[l]` of level l, positions per level, and where entries went.
    Those on the host are read-only, in copies and pickles too: kernels trust them.

    `entries` are indices into the caller's entries, `slots` their positions in `values`: all other
    positions are padding.
    """

    format: Format
    arrays: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    entries: np.ndarray
    slots: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", _each(self.arrays, _read_only))
        object.__setattr__(self, "entries", _read_only(self.entries))
        object.__setattr__(self, "slots", _read_only(self.slots))

    def __reduce__(self):
        return Part, (self.format, self.arrays, self.counts, self.entries, self.slots)

    @property
    def size(self) -> int:
        """Stored positions, padding included."""
        return self.counts[-1]

    def __repr__(self) -> str:
        return f"<{self.format}: {len(self.entries)} entries in {self.size} positions>"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Structure:
    """Where the entries of a matrix are: what several tensors of one sparsity share."""

    format: Format | Composed
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    nnz: int
    index_dtype: dtypes.DType
    device: str = "cpu"

    @property
    def padding(self) -> float:
        """The share of positions without an entry, from 0 to 1."""
        stored = sum(p.size for p in self.parts)
        return 1 - self.nnz / stored if stored else 0.0

    def stored(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """The coordinates of what is stored, in row-major order and each once, and the positions
        of their values in those of all parts, one part after the other."""
        parts, base = [], 0
        for p in self.parts:
            arrays = _each(p.arrays, lambda a: entries.array_of(a, "structure"))
            coords, at = coordinates(p.format.levels, arrays, p.counts, self.shape)
            is_entry = np.zeros(p.size, bool)
            is_entry[p.slots] = True
            parts.append((*coords, at + base, is_entry[at]))
            base += p.size
        *coords, position, is_entry = (np.concatenate(c) for c in zip(*parts, strict=True))
        order = row_major(coords, is_entry)
        return tuple(c[order] for c in coords), position[order]

    def __repr__(self) -> str:
        return f"<structure {self._text()}, {self.index_dtype} coordinates>"

    def _text(self, dtype: str = "") -> str:
        shape, padding = "×".join(map(str, self.shape)), 100 * self.padding
        counts = f"{self.nnz} entries, {padding:.1f} % padding"
        return f"{self.format} {shape}{dtype}, {counts}, on {self.device}"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A sparse tensor: its structure, and an array of values for each part of the format, of shape
    (positions, *inner): results may hold an array of shape `inner` at each position. Positions
    without an entry (the rest of a block, a gap of a ragged row, padding) hold `fill`."""

    structure: Structure
    values: tuple[Any, ...]
    dtype: dtypes.DType
    fill: float = 0.0
    inner: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its dimensions, without those of `inner`."""
        return self.structure.shape

    @property
    def format(self) -> Format | Composed:
        """The format that it is stored in."""
        return self.structure.format

    @property
    def nnz(self) -> int:
        """How many entries it has: positions without padding."""
        return self.structure.nnz

    @property
    def device(self) -> str:
        """Where its arrays are: "cpu", "cuda" or "cuda:N"."""
        return self.structure.device

    @property
    def padding(self) -> float:
        """The share of positions without an entry, from 0 to 1."""
        return self.structure.padding

    def with_values(self, values: Any, *, dtype: Any = None) -> "Packed":
        """A tensor of the same structure with other values: (nnz,), in the order of the entries of
        the matrix that was packed (row-major where equal coordinates were added up). Raises
        FormatError[F107] when their number is not nnz, and as `pack` for other objects."""
        array, kind = entries.values_of(values, "values")
        if array.shape != (self.nnz,):
            raise FormatError("F107", f"{array.shape} values, {self.nnz} entries", where="values")
        wanted = kind if dtype is None else dtypes.dtype(dtype)
        array = entries.converted(array, kind, wanted)
        arrays = tuple(_scatter(p, array, wanted, self.fill) for p in self.structure.parts)
        return Packed(self.structure, _on_device(arrays, self.device), wanted, self.fill)

    repack_values = with_values

    def entry_values(self) -> np.ndarray:
        """The values (nnz, *inner), in the order that `with_values` takes."""
        out = np.zeros((self.nnz, *self.inner), self.dtype.numpy)
        for part, values in zip(self.structure.parts, self.values, strict=True):
            out[part.entries] = entries.stored(values, self.dtype)[part.slots]
        return out

    def unpack(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """The stored coordinates, an int64 array (stored,) a dimension, and their values
        (stored, *inner), in row-major order; with explicit zeros, without padding."""
        coords, at = self.structure.stored()
        return coords, np.concatenate([entries.stored(v, self.dtype) for v in self.values])[at]

    def dense(self) -> np.ndarray:
        """The tensor as a NumPy array (*shape, *inner), with `fill` where nothing is stored."""
        coords, values = self.unpack()
        fill = entries.filling(self.fill, self.dtype)
        out = np.full((*self.shape, *self.inner), fill, self.dtype.numpy)
        out[coords] = values
        return out

    def to(self, device: str) -> "Packed":
        """The same tensor on another device (`"cuda"`, `"cuda:1"`): its structure and values are
        copied there. Raises ArgumentError[A105]."""
        device = str(device)
        if device == self.device:
            return self
        s = self.structure
        values = tuple(entries.stored(v, self.dtype) for v in self.values)
        parts = tuple(
            replace(p, arrays=_each(p.arrays, lambda a: entries.to_device(a, device)))
            for p in s.parts
        )
        moved = Structure(s.format, s.shape, parts, s.nnz, s.index_dtype, device)
        return replace(self, structure=moved, values=_on_device(values, device))

    def __str__(self) -> str:
        lines = [self.structure._text(f" {self.dtype}")]
        if len(self.structure.parts) > 1:
            lines += [
                f"  {p.format}: {len(p.entries)} entries in {p.counts[0]} rows"
                for p in self.structure.parts
            ]
        return "\n".join(lines)

    __repr__ = __str__


def pack(
    fmt: Format | Composed, matrix: Any, *, dtype: Any = None, values: Any = None,
    index: Any = None, fill: float = 0.0,
) -> Packed:  # fmt: skip
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
        rule = f"{fmt} of this matrix does not fit the memory: {error}"
        raise FormatError("F108", rule, where="matrix") from None


def _pack(
    fmt: Format | Composed, matrix: Entries, dtype: Any, values: Any, index: Any, fill: float
) -> Packed:
    shape = matrix.shape
    if len(shape) != fmt.ndim:
        rule = f"{fmt} stores {fmt.ndim} dimensions, the matrix has {len(shape)}"
        raise FormatError("F102", rule, where="matrix")
    fill = dtypes.real("fill", fill)
    array, kind = matrix.values, matrix.dtype
    if values is not None:
        array, kind = entries.values_of(values, "values")
    entries.check_count(array, matrix.nnz)
    wanted = kind if dtype is None else dtypes.dtype(dtype)
    array = entries.converted(array, kind, wanted)
    order = matrix.order
    coords = [c if order is None else c[order] for c in matrix.coords]
    if isinstance(fmt, Composed):  # which counts the entries of each row
        _check_positions(fmt, shape[0])
    takes = fmt.split(coords, shape)
    parts = [_pack_part(f, coords, shape, mine, roots, order) for f, mine, roots in takes]
    chosen = _index_type(index, max([matrix.nnz, *shape, *(n for p in parts for n in p.counts)]))
    parts = tuple(
        replace(p, arrays=tuple(
            {n: np.ascontiguousarray(a, (level.arrays[n] or chosen).numpy) for n, a in x.items()}
            for level, x in zip(p.format.levels, p.arrays, strict=True)
        ))
        for p in parts
    )  # fmt: skip
    structure = Structure(fmt, shape, parts, matrix.nnz, chosen)
    return Packed(structure, tuple(_scatter(p, array, wanted, fill) for p in parts), wanted, fill)


def _index_type(index: Any, largest: int) -> dtypes.DType:
    """The type of coordinates and positions: the one asked for, or the narrower one that counts to
    `largest`, which padded and dense positions belong to as entries do."""
    fits = largest < 2**31 - ROUNDED_UP
    if index is None:
        return dtypes.int32 if fits else dtypes.int64
    kind = dtypes.dtype(index)
    if kind not in (dtypes.int32, dtypes.int64):
        raise ArgumentError("A102", f"index is {kind}", where="index", hint="int32 or int64")
    if kind == dtypes.int32 and not fits:
        rule = f"coordinates or positions go up to {largest}, beyond int32"
        raise FormatError("F108", rule, where="index", hint='index="int64"')
    return kind


def _check_positions(of: Any, count: int) -> None:
    if count > MOST_POSITIONS:
        rule = f"{of} of this matrix has {count} positions, the limit is {MOST_POSITIONS}"
        raise FormatError("F108", rule, where="shape")


def _pack_part(
    fmt: Format, coords: list[np.ndarray], shape: tuple[int, ...],
    mine: np.ndarray | None, roots: np.ndarray | None, order: np.ndarray | None,
) -> Part:  # fmt: skip
    local = coords if mine is None else [c[mine] for c in coords]
    numbers = np.arange(len(coords[0])) if mine is None else mine
    keys = [level.coordinate_of(local[level.dim]) for level in fmt.levels]
    resort = entries.row_major_order(keys)
    if resort is not None:
        keys, numbers = [k[resort] for k in keys], numbers[resort]
    q = np.zeros(len(numbers), np.int64)
    units = np.ones(len(q), bool)
    if max(fmt.blocks) > 1:
        blocks = [k for level, k in zip(fmt.levels, keys, strict=True) if not level.inner]
        units[1:] = np.any([k[1:] != k[:-1] for k in blocks], axis=0)
    parents, arrays, counts, above = 1, [], [], {}
    for depth, (level, c) in enumerate(zip(fmt.levels, keys, strict=True)):
        extent = level.extent_of(shape)
        c = c.astype(np.int64, copy=False)
        reached = 0 if level.exact else int(c.max(initial=-1)) + 1  # by a row that leaves none out
        _check_positions(fmt, max(level.positions(parents, extent), reached))
        built, q, parents = level.build(q, c, Parents(parents, extent, above, units))
        above = {**above, level.dim: c}
        if depth == 0 and roots is not None and lists_rows(level):
            assert isinstance(level, Compressed)
            built, q, parents = level.with_roots(built, q, np.unique(level.coordinate_of(roots)))
        arrays.append(built)
        counts.append(parents)
    _check_positions(fmt, parents)
    return Part(fmt, tuple(arrays), tuple(counts), numbers if order is None else order[numbers], q)


def _scatter(part: Part, values: np.ndarray, dtype: dtypes.DType, fill: float) -> np.ndarray:
    out = np.full(part.size, entries.filling(fill, dtype), dtype.numpy)
    out[part.slots] = values[part.entries]
    return out


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


def _on_device(arrays: tuple[np.ndarray, ...], device: str) -> tuple[Any, ...]:
    return arrays if device == "cpu" else tuple(entries.to_device(a, device) for a in arrays)


_CSR = csr()


def of_rows(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: tuple[int, int],
    dtype: dtypes.DType,
) -> Packed:  # fmt: skip
    """The CSR tensor of computed arrays, which are not checked: columns of each row ascend."""
    nnz, index = len(indices), _index_type(None, max(len(indices), *shape))
    both, numbers = {"indptr": indptr, "indices": indices}, np.arange(nnz)
    arrays = {name: array.astype(index.numpy, copy=False) for name, array in both.items()}
    part = Part(_CSR, ({}, arrays), (shape[0], nnz), numbers, numbers)
    return Packed(Structure(part.format, shape, (part,), nnz, index), (values,), dtype)
