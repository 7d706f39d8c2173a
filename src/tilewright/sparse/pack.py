"""Packing: from a matrix to the arrays of a format, derived from its levels, and back.

entries: read a matrix of any library as checked coordinates and values.
pack:    map coordinates to levels → sort → fold the levels' `build` → scatter the values.
unpack:  expand the levels' arrays to one coordinate for each position.
The slot of each entry is kept, so new values need one scatter (`repack_values`) and no new
structure.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, FormatError, TilewrightError
from tilewright.ir.levels import coordinates, row_major
from tilewright.sparse.formats import Composed, Format

ROUNDED_UP = 1 << 20  # units of the last CTA may count this far beyond the last entry
MOST_POSITIONS = 1 << 40  # of a level: beyond the memory of any machine, within an int64
MATRICES = (
    "a SciPy matrix, a torch tensor, a dense array, (indptr, indices, values, shape) or "
    "(coords, values, shape)"
)


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """A matrix of any library, read and checked: int coordinates (nnz,) of each dimension, in
    range, and values (nnz,) of `dtype`, as it is stored."""

    coords: tuple[np.ndarray, ...]
    values: np.ndarray
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nnz(self) -> int:
        return len(self.values)


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
        that were packed. Raises FormatError[F107] when there are not nnz of them, and as `pack`
        for what are no values."""
        given, kind = _values(values, "values")
        if given.shape != (self.nnz,):
            raise FormatError(
                "F107", f"{given.shape} values for {self.nnz} entries", where="values",
                hint="one value for each entry, in the order they were packed",
            )  # fmt: skip
        wanted = kind if dtype is None else dtypes.dtype(dtype)
        given = _converted(given, kind, wanted)
        arrays = tuple(_scatter(p, given, wanted, self.fill) for p in self.structure.parts)
        return Packed(self.structure, _placed(arrays, self.device), wanted, self.fill)

    repack_values = with_values

    def entry_values(self) -> np.ndarray:
        """The values (nnz,), in the order of the entries that were packed."""
        out = np.zeros(self.nnz, self.dtype.numpy)
        for part, values in zip(self.structure.parts, self.values, strict=True):
            out[part.entries] = _stored(values, self.dtype)[part.slots]
        return out

    def unpack(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Coordinates (one array a dimension) and values of what is stored, in row-major order;
        padding is left out, explicit zeros inside dense levels are not."""
        found = [
            _unpack_part(p, _stored(v, self.dtype), self.shape)
            for p, v in zip(self.structure.parts, self.values, strict=True)
        ]
        coords = [np.concatenate([c[d] for c, *_ in found]) for d in range(len(self.shape))]
        values = np.concatenate([v for _, v, _ in found])
        order = row_major(coords, np.concatenate([e for *_, e in found]))
        return tuple(c[order] for c in coords), values[order]

    def dense(self) -> np.ndarray:
        """The dense array, with `fill` where nothing is stored."""
        coords, values = self.unpack()
        out = np.full(self.shape, _filling(self.fill, self.dtype), self.dtype.numpy)
        out[coords] = values
        return out

    def to(self, device: str) -> Packed:
        """The same tensor on another device (`"cuda"`, `"cuda:1"`): its structure and values are
        copied there. Raises ArgumentError[A105]."""
        device = str(device)
        if device == self.device:
            return self
        s = self.structure
        values = tuple(_stored(v, self.dtype) for v in self.values)
        parts = tuple(
            replace(p, arrays=_each(p.arrays, lambda a: _read_only(place(a, device))))
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
    fmt: Format | Composed, matrix: Any, *, dtype: Any = None, values: Any = None, index: Any = None
) -> Packed:
    """Pack `matrix` into `fmt`.

    `matrix`: a SciPy sparse matrix or array, a torch tensor (dense, COO, CSR or CSC), a dense array
    (its non-zeros), a tuple (indptr, indices, values or None, shape) of CSR, (coords, values or
    None, shape) of COO with one coordinate array a dimension, or `Entries`. `values` (nnz,)
    overrides the values; `dtype` converts them. `index`: the type of the coordinates, int32 or
    int64, for which a kernel is built with `typed(index=…)`; None: int32 where it is wide enough.

    Raises FormatError F102-F106, F108, ArgumentError A102 (a dtype), A109 (a value out of range).
    """
    try:
        return _pack(fmt, entries(matrix), dtype, values, index)
    except MemoryError as error:
        raise FormatError(
            "F108", f"{fmt} of this matrix does not fit the memory: {error}", where="matrix",
            hint="a format that stores less: tw.csr(), tw.coo()",
        ) from None  # fmt: skip


def _pack(fmt: Format | Composed, found: Entries, dtype: Any, values: Any, index: Any) -> Packed:
    shape = found.shape
    if len(shape) != fmt.ndim:
        raise FormatError(
            "F102", f"{fmt} stores {fmt.ndim} dimensions, the matrix has {len(shape)}",
            where="matrix",
        )  # fmt: skip
    given, kind = (found.values, found.dtype) if values is None else _values(values, "values")
    _check_count(given, found.nnz)
    wanted = kind if dtype is None else dtypes.dtype(dtype)
    given = _converted(given, kind, wanted)
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
    return Packed(structure, tuple(_scatter(p, given, wanted, 0.0) for p in parts), wanted)


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


# ---------------------------------------------------------------------------- reading a matrix


def entries(matrix: Any) -> Entries:
    """What a matrix stores. `matrix` and errors: as `pack`."""
    if isinstance(matrix, Entries):
        return matrix
    if isinstance(matrix, tuple):
        if len(matrix) not in (3, 4):
            raise FormatError(
                "F102", f"a tuple of {len(matrix)} is no matrix", where="matrix",
                hint="(indptr, indices, values, shape) or (coords, values, shape)",
            )  # fmt: skip
        return _from_csr(*matrix) if len(matrix) == 4 else _from_coo(*matrix)
    if hasattr(matrix, "layout") and hasattr(matrix, "detach"):
        return _from_torch(matrix.detach())
    if hasattr(matrix, "tocsr"):
        return _from_scipy(matrix)
    return _from_dense(matrix)


def _from_dense(matrix: Any) -> Entries:
    array, kind = _values(matrix, "matrix")
    if array.ndim == 0:
        raise FormatError(
            "F102", f"cannot pack a {type(matrix).__name__}", where="matrix", hint=MATRICES
        )
    # of bits all but the sign: -0.0 is no entry in any dtype
    coords = np.nonzero(array & (1 << kind.bits - 1) - 1 if _is_bits(kind) else array)
    return Entries(coords, array[coords], kind, array.shape)


def _from_torch(t: Any) -> Entries:
    layout = str(t.layout).rpartition(".")[2]
    if layout == "strided":
        return _from_dense(t)
    if layout == "sparse_csr":
        return _from_csr(t.crow_indices(), t.col_indices(), t.values(), t.shape)
    if layout == "sparse_csc":
        shape, rows = _matrix_shape(t.shape), _index_array(t.row_indices(), "row_indices")
        return _from_coo(
            (rows, _expanded(t.ccol_indices(), len(rows), shape[1])), t.values(), shape
        )
    if layout == "sparse_coo":
        found = _from_coo(t._indices(), t._values(), t.shape)  # checked before torch sorts them
        if t.is_coalesced():
            return found
        t = t.coalesce()
        return _from_coo(t.indices(), t.values(), t.shape)
    raise FormatError(
        "F102", f"a torch tensor of layout {layout}", where="matrix", hint="its to_sparse_coo()"
    )


def _from_scipy(matrix: Any) -> Entries:
    """A SciPy matrix; duplicates are summed, the caller's arrays left as they are."""
    _check_scipy(matrix)
    if matrix.ndim != 2:
        coo = matrix.tocoo(copy=True)
        coo.sum_duplicates()
        return _from_coo(coo.coords, coo.data, coo.shape)
    csr = matrix.tocsr()
    if csr is matrix and not csr.has_canonical_format:
        csr = csr.copy()
    csr.sum_duplicates()
    used = int(csr.indptr[-1])  # its arrays may be longer
    return _from_csr(csr.indptr, csr.indices[:used], csr.data[:used], csr.shape)


def _check_scipy(m: Any) -> None:
    """What SciPy's own loops trust: indptr, ranges and lengths."""
    shape = _shape(m.shape)
    layout = getattr(m, "format", "")
    if layout == "coo":
        found = _in_range(m.coords if hasattr(m, "coords") else (m.row, m.col), shape)
        _check_count(_array(m.data, "values"), len(found[0]))
    if layout not in ("csr", "csc", "bsr"):
        return  # their conversion trusts nothing
    major, minor = ((1, *shape) if len(shape) == 1 else shape)[:: -1 if layout == "csc" else 1]
    height, width = m.blocksize if layout == "bsr" else (1, 1)
    indices = _index_array(m.indices, "indices")
    used = min(len(indices), len(m.data))
    rows = _expanded(m.indptr, used, major // height, spare=True)
    _in_range((rows, indices[: len(rows)]), (major // height, minor // width))


def _from_csr(indptr: Any, indices: Any, values: Any, shape: Any) -> Entries:
    shape, indices = _matrix_shape(shape), _index_array(indices, "indices")
    return _from_coo((_expanded(indptr, len(indices), shape[0]), indices), values, shape)


def _from_coo(coords: Any, values: Any, shape: Any) -> Entries:
    shape = _shape(shape)
    checked = _in_range(coords, shape)
    nnz = len(checked[0]) if checked else 0
    given = np.ones(nnz, np.float32) if values is None else values
    array, kind = _values(given, "values")
    _check_count(array, nnz)
    return Entries(checked, array, kind, shape)


def _shape(shape: Any) -> tuple[int, ...]:
    """A shape as whole numbers that an int64 coordinate can count."""
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = (-1,)
    if not all(0 <= n < 2**63 for n in sizes):
        raise FormatError(
            "F102", f"{shape!r} is not the shape of a matrix", where="shape",
            hint="one whole number for each dimension, below 2**63",
        )  # fmt: skip
    return sizes


def _matrix_shape(shape: Any) -> tuple[int, ...]:
    sizes = _shape(shape)
    if len(sizes) != 2:
        raise FormatError("F102", f"shape {sizes} is not that of a matrix", where="shape")
    return sizes


def _index_array(x: Any, name: str) -> np.ndarray:
    a = _array(x, name)
    if a.ndim == 1 and not a.size:
        return np.zeros(0, np.int64)  # an empty list is float64 to NumPy
    if a.ndim != 1 or a.dtype.kind not in "iu":
        raise FormatError(
            "F102", f"{name} has shape {a.shape} and dtype {a.dtype}", where=name,
            hint="a 1-D integer array",
        )  # fmt: skip
    return a


def _expanded(indptr: Any, stored: int, rows: int, *, spare: bool = False) -> np.ndarray:
    """The row of each entry from a checked indptr of `rows` rows, for `stored` indices (`spare`: or
    fewer). Raises FormatError[F103]."""
    indptr = _index_array(indptr, "indptr")
    if len(indptr) != rows + 1:
        raise FormatError(
            "F103",
            f"indptr has {len(indptr)} elements, a matrix of {rows} rows needs {rows + 1}",
            where="indptr",
        )
    if indptr[0] != 0 or indptr[-1] > stored or (indptr[-1] != stored and not spare):
        raise FormatError(
            "F103",
            f"indptr runs from {indptr[0]} to {indptr[-1]} but indices has {stored} elements",
            where="indptr",
            hint="take both arrays from the same matrix",
        )
    falls = indptr[1:] < indptr[:-1]  # compared: a difference would wrap
    if falls.any():
        row = int(falls.argmax())
        raise FormatError(
            "F103",
            f"indptr falls from {indptr[row]} to {indptr[row + 1]} at row {row}",
            where="indptr",
        )
    return np.repeat(np.arange(rows, dtype=_counter((rows,))), np.diff(indptr.astype(np.int64)))


def _in_range(coords: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Coordinate arrays of one length and one type that holds them all, inside `shape`."""
    try:
        arrays = [_index_array(c, f"coords[{d}]") for d, c in enumerate(coords)]
    except TypeError:
        arrays = None
    if arrays is None or len(arrays) != len(shape) or len({len(c) for c in arrays}) > 1:
        raise FormatError(
            "F102", "coords and shape do not go together", where="coords",
            hint="one array for each dimension, all of one length",
        )  # fmt: skip
    for d, (c, n) in enumerate(zip(arrays, shape, strict=True)):
        low, high = (int(c.min()), int(c.max())) if len(c) else (0, -1)
        if low < 0 or high >= n:
            raise FormatError(
                "F104",
                f"coordinate {low if low < 0 else high} of dimension {d} is outside 0…{n - 1}",
                where="indices",
                hint="check that rows and columns are not swapped",
            )
    return tuple(c.astype(_counter(shape), copy=False) for c in arrays)


def _counter(shape: Sequence[int]) -> type:
    """The integer that holds every coordinate; the narrow one sorts faster."""
    return np.int32 if max(shape, default=0) < 2**31 else np.int64


def _check_count(values: np.ndarray, nnz: int) -> None:
    if values.shape != (nnz,):
        raise FormatError(
            "F102", f"{nnz} entries but values of shape {values.shape}", where="values"
        )


# ---------------------------------------------------------------------------- values


def _array(x: Any, name: str) -> np.ndarray:
    """Any array as NumPy, copied from its device where needed. Raises FormatError[F102]."""
    try:
        a = place(x, "cpu")
    except (TilewrightError, MemoryError):
        raise
    except Exception:  # each library refuses in its own way
        a = None
    if a is None or a.dtype == object:
        raise FormatError(
            "F102", f"a {type(x).__name__} is not an array of numbers", where=name,
            hint=MATRICES if name == "matrix" else "an array of NumPy, torch or CuPy",
        )  # fmt: skip
    return a


def _values(x: Any, name: str) -> tuple[np.ndarray, DType]:
    """An array as it is stored, and its dtype. Raises FormatError[F102], ArgumentError[A102]."""
    a = _array(x, name)
    if a.ndim == 0:
        return a, dtypes.float64  # no values: whoever asked says so
    own = getattr(x, "dtype", a.dtype)
    kind = dtypes.ALL.get(str(own).rpartition(".")[2]) or dtypes.dtype(a.dtype)
    return _stored(a, kind), kind


def _stored(x: Any, kind: DType) -> np.ndarray:
    """Values of `kind` as NumPy stores them: those that it does not know are bits."""
    a = _array(x, "values")
    return a.view(kind.numpy) if _is_bits(kind) else a.astype(kind.numpy, copy=False)


def _is_bits(kind: DType) -> bool:
    return kind.is_float and kind.numpy.kind == "u"


def _converted(values: np.ndarray, kind: DType, to: DType) -> np.ndarray:
    """Stored values of `kind` as those of `to`; unsigned integers of its width are its bits. Raises
    ArgumentError A109 where a value is out of range, A102 where nothing converts them."""
    if kind == to or (_is_bits(to) and kind.is_int and values.dtype == to.numpy):
        return values
    if "float8" in kind.name + to.name:
        raise ArgumentError(
            "A102",
            f"nothing here converts {kind} to {to}",
            where="dtype",
            hint="hand over its bits",
        )
    numbers = dtypes.bfloat16_values(values) if _is_bits(kind) else values
    with np.errstate(all="ignore"):  # what is lost is found below
        if _is_bits(to):
            made = dtypes.bfloat16_bits(numbers.astype(np.float32))
            lost = np.isfinite(numbers) & ~np.isfinite(dtypes.bfloat16_values(made))
        else:
            made = numbers.astype(to.numpy)
            lost = _lost(numbers, made)
    if lost.any():
        raise ArgumentError(
            "A109", f"the value {numbers[lost][0]} is out of the range of {to}", where="values",
            hint="a wider dtype, or values that fit",
        )  # fmt: skip
    return made


def _lost(numbers: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Which numbers the type of `made` cannot hold; fractions may be cut off."""
    if made.dtype.kind == "b":
        return np.zeros(made.shape, bool)
    if made.dtype.kind == "f":
        return np.isfinite(numbers) & ~np.isfinite(made)
    if numbers.dtype.kind != "f":
        return (made < 0) != (numbers < 0) if made.itemsize == 8 else made != numbers
    limits = np.iinfo(made.dtype)
    whole = np.trunc(numbers.astype(np.float64))
    return ~((whole >= float(limits.min)) & (whole < float(limits.max + 1)))


def _filling(fill: float, kind: DType) -> np.ndarray:
    if fill == 0:  # all bits 0 in every dtype, also in those that nothing here converts
        return np.zeros(1, kind.numpy)
    return _converted(np.array([fill], np.float64), dtypes.float64, kind)


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
        if depth == 0 and roots is not None and "indices" in built:
            built, q, parents = _with_roots(built, q, roots)
        arrays.append(built)
        counts.append(parents)
    _check_positions(fmt, parents)
    found = numbers if order is None else order[numbers]
    return Part(fmt, tuple(arrays), tuple(counts), _read_only(found), _read_only(q))


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
    out = np.full(part.size, _filling(fill, dtype), dtype.numpy)
    out[part.slots] = values[part.entries]
    return out


def _unpack_part(
    part: Part, values: np.ndarray, shape: tuple[int, ...]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Coordinates and values of what a part stores, and which of them are entries."""
    arrays = _each(part.arrays, lambda a: _array(a, "structure"))
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
    return arrays if device == "cpu" else tuple(place(a, device) for a in arrays)


def _no_device(array: Any, device: str) -> Any:
    raise FormatError("F102", f"nothing here can place arrays on {device}", where="device")


place: Callable[[Any, str], Any] = _no_device
"""Copies an array to a device, or from any to the host (`"cpu"`); `build` sets it to the runtime's,
which this room does not know."""
