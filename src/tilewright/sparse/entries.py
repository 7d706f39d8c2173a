"""Reading a matrix: whatever library it comes from, as checked coordinates and values.

What is checked here is checked once: shapes, ranges, index pointers, counts, repeated coordinates,
values that a dtype cannot hold. Packing and unpacking trust the result. Memory is in proportion to
the number of entries, and to the index pointers of the matrix where it has them.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import ArgumentError, FormatError, TilewrightError


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """A matrix of any library, read and checked: int coordinates (nnz,) of each dimension, in
    range and no two alike, and values (nnz,) of `dtype`, as it is stored.

    The order is the caller's; `order` sorts it by row, then column (None: it is sorted)."""

    coords: tuple[np.ndarray, ...]
    values: np.ndarray
    dtype: dtypes.DType
    shape: tuple[int, ...]
    order: np.ndarray | None

    @property
    def nnz(self) -> int:
        return len(self.values)


def _no_device(array: Any, device: str) -> Any:
    raise FormatError("F102", f"no runtime is loaded that copies to {device}", where="device")


to_device: Callable[[Any, str], Any] = _no_device
"""Copies an array to a device, or from any to the host (`"cpu"`); `build` sets it to the runtime's,
which this room does not know."""


def read(matrix: Any) -> Entries:
    """What a matrix stores. `matrix` and errors: as `pack`."""
    if isinstance(matrix, Entries):
        return matrix
    if isinstance(matrix, tuple):
        if len(matrix) not in (3, 4):
            raise FormatError("F102", f"a tuple of {len(matrix)} is no matrix", where="matrix")
        return _from_csr(*matrix) if len(matrix) == 4 else _from_coo(*matrix)
    if hasattr(matrix, "layout") and hasattr(matrix, "detach"):
        return _from_torch(matrix)
    return _from_scipy(matrix) if hasattr(matrix, "tocsr") else _from_dense(matrix)


def _from_dense(matrix: Any) -> Entries:
    array, kind = values_of(matrix, "matrix")
    if array.ndim == 0:
        raise FormatError("F102", f"cannot pack a {type(matrix).__name__}", where="matrix")
    # of bits all but the sign: -0.0 is no entry in any dtype
    coords = np.nonzero(array & (1 << kind.bits - 1) - 1 if kind == dtypes.bfloat16 else array)
    return Entries(coords, array[coords], kind, array.shape, None)


def _from_torch(t: Any) -> Entries:
    layout = str(t.layout).rpartition(".")[2]
    if layout == "strided":
        return _from_dense(t)
    if layout == "sparse_csr":
        return _from_csr(t.crow_indices(), t.col_indices(), t.values(), t.shape)
    if layout == "sparse_csc":
        shape, rows = _matrix_shape(t.shape), _index_array(t.row_indices(), "row_indices")
        cols = _expanded(t.ccol_indices(), len(rows), shape[1])
        return _from_coo((rows, cols), t.values(), shape)
    if layout == "sparse_coo":
        if t.requires_grad:  # `_values` would hide it
            return _from_coo(t.coalesce().indices(), t.coalesce().values(), t.shape)
        return _from_coo(t._indices(), t._values(), t.shape, repeats=True)
    hint = "its to_padded_tensor(0.0)" if t.is_nested else "its to_sparse_coo()"
    raise FormatError("F102", f"a torch tensor of layout {layout}", where="matrix", hint=hint)


def _from_scipy(matrix: Any) -> Entries:
    """A SciPy matrix, in the order of its `data` where it has one entry for each coordinate."""
    layout = getattr(matrix, "format", "")
    if layout in ("csr", "csc", "bsr"):
        coords, data = _of_compressed(matrix)
    elif layout == "dia":  # its non-zeros: SciPy would count the rows
        diagonal, cols = np.nonzero(matrix.data[:, : matrix.shape[1]])
        rows = cols - matrix.offsets[diagonal]
        inside = (rows >= 0) & (rows < matrix.shape[0])
        coords, data = (rows[inside], cols[inside]), matrix.data[diagonal, cols][inside]
    else:
        coo = matrix.tocoo()
        coords, data = coo.coords if hasattr(coo, "coords") else (coo.row, coo.col), coo.data
    return _from_coo(coords, data, matrix.shape, repeats=True)


def _of_compressed(m: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Coordinates and values of SciPy's csr, csc and bsr, checked: its own conversions are not. Its
    arrays may be longer than `indptr` says."""
    shape, by_column = _shape(m.shape), m.format == "csc"
    height, width = m.blocksize if m.format == "bsr" else (1, 1)
    major, minor = ((1, *shape) if len(shape) == 1 else shape)[:: -1 if by_column else 1]
    indices = _index_array(m.indices, "indices")
    rows = _expanded(m.indptr, min(len(indices), len(m.data)), major // height, spare=True)
    data = m.data[: len(rows)]
    blocks = _in_range((rows, indices[: len(rows)]), (major // height, minor // width))
    blocks = [b.astype(_counter(shape), copy=False) for b in blocks]
    if m.format == "bsr":
        inner = np.indices((height, width), _counter(shape))[:, None]
        outer = (b[:, None, None] * n for b, n in zip(blocks, (height, width), strict=True))
        return [(o + i).ravel() for o, i in zip(outer, inner, strict=True)], data.ravel()
    return blocks[:: -1 if by_column else 1][-len(shape) :], data


def _from_csr(indptr: Any, indices: Any, values: Any, shape: Any) -> Entries:
    shape, indices = _matrix_shape(shape), _index_array(indices, "indices")
    return _from_coo((_expanded(indptr, len(indices), shape[0]), indices), values, shape)


def _from_coo(coords: Any, values: Any, shape: Any, *, repeats: bool = False) -> Entries:
    """Entries from coordinate arrays. Values of one coordinate are added up with `repeats`, and
    refused without (F105)."""
    shape = _shape(shape)
    checked = _in_range(coords, shape)
    nnz = len(checked[0]) if checked else 0
    array, kind = values_of(np.ones(nnz, np.float32) if values is None else values, "values")
    check_count(array, nnz)
    order = row_major_order(checked)
    ordered = checked if order is None else [c[order] for c in checked]
    same = np.ones(max(nnz - 1, 0), bool)
    for c in ordered:
        same &= c[1:] == c[:-1]
    if not same.any():
        return Entries(checked, array, kind, shape, order)
    at = int(same.argmax())
    if not repeats:
        rule = f"the entry at {tuple(int(c[at]) for c in ordered)} is stored twice"
        raise FormatError("F105", rule, where="indices")
    first = np.flatnonzero(np.append(True, ~same))
    numbers = array if order is None else array[order]
    numbers = dtypes.bfloat16_values(numbers) if kind == dtypes.bfloat16 else numbers
    sums = np.add.reduceat(numbers, first)
    sums = dtypes.bfloat16_bits(sums) if kind == dtypes.bfloat16 else sums
    return Entries(tuple(c[first] for c in ordered), sums, kind, shape, None)


def row_major_order(coords: Sequence[np.ndarray]) -> np.ndarray | None:
    """The permutation that sorts entries by row, then column; None when they are sorted."""
    ordered = np.ones(max(len(coords[0]) - 1, 0), bool) if len(coords) else np.ones(0, bool)
    for c in reversed(coords):
        less, same = c[:-1] < c[1:], c[:-1] == c[1:]
        ordered = less | (same & ordered)
    return None if ordered.all() else np.lexsort(coords[::-1])


def _shape(shape: Any) -> tuple[int, ...]:
    """A shape as Python integers, each within an int64. Raises FormatError[F102]."""
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = (-1,)
    if not all(0 <= n < 2**63 for n in sizes):
        rule = f"{shape!r} is not the shape of a matrix"
        raise FormatError("F102", rule, where="shape", hint="an integer below 2**63 a dimension")
    return sizes


def _matrix_shape(shape: Any) -> tuple[int, ...]:
    sizes = _shape(shape)
    if len(sizes) != 2:
        raise FormatError("F102", f"shape {sizes} is not that of a matrix", where="shape")
    return sizes


def _index_array(x: Any, name: str) -> np.ndarray:
    a = array_of(x, name)
    if a.ndim == 1 and not a.size:
        return np.zeros(0, np.int64)  # an empty list is float64 to NumPy
    if a.ndim != 1 or a.dtype.kind not in "iu":
        rule = f"{name} has shape {a.shape} and dtype {a.dtype}"
        raise FormatError("F102", rule, where=name, hint="a 1-D integer array")
    return a


def _expanded(indptr: Any, stored: int, rows: int, *, spare: bool = False) -> np.ndarray:
    """The row of each entry from a checked indptr of `rows` rows, for `stored` indices (`spare`: or
    fewer). Raises FormatError[F103]."""
    indptr = _index_array(indptr, "indptr")
    if len(indptr) != rows + 1:
        rule = f"indptr has {len(indptr)} elements, a matrix of {rows} rows needs {rows + 1}"
        raise FormatError("F103", rule, where="indptr")
    if indptr[0] != 0 or indptr[-1] > stored or (indptr[-1] != stored and not spare):
        rule = f"indptr runs from {indptr[0]} to {indptr[-1]} but indices has {stored} elements"
        raise FormatError("F103", rule, where="indptr", hint="take both arrays from one matrix")
    falls = indptr[1:] < indptr[:-1]  # compared: a difference would wrap
    if falls.any():
        row = int(falls.argmax())
        rule = f"indptr falls from {indptr[row]} to {indptr[row + 1]} at row {row}"
        raise FormatError("F103", rule, where="indptr")
    kind, count = _counter((rows,)), int(indptr[-1])
    if count < rows // 64:  # most rows are empty: in proportion to the entries
        return np.searchsorted(indptr, np.arange(count), "right").astype(kind) - kind(1)
    return np.repeat(np.arange(rows, dtype=kind), np.diff(indptr.astype(np.int64)))


def _in_range(coords: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Coordinate arrays of one length and one type that holds them all, inside `shape`."""
    try:
        arrays = [_index_array(c, f"coords[{d}]") for d, c in enumerate(coords)]
    except TypeError:
        arrays = None
    if arrays is None or len(arrays) != len(shape) or len({len(c) for c in arrays}) > 1:
        raise FormatError("F102", "coords and shape do not go together", where="coords")
    for d, (c, n) in enumerate(zip(arrays, shape, strict=True)):
        low, high = (int(c.min()), int(c.max())) if len(c) else (0, -1)
        if low < 0 or high >= n:
            rule = f"coordinate {low if low < 0 else high} of dimension {d} is outside 0…{n - 1}"
            raise FormatError("F104", rule, where="indices")
    return tuple(c.astype(_counter(shape), copy=False) for c in arrays)


def _counter(shape: Sequence[int]) -> type:
    """The integer that holds every coordinate; the narrow one sorts faster."""
    return np.int32 if max(shape, default=0) < 2**31 else np.int64


def check_count(values: np.ndarray, nnz: int) -> None:
    if values.shape != (nnz,):
        raise FormatError("F102", f"{nnz} entries, values of shape {values.shape}", where="values")


# ---------------------------------------------------------------------------- values


def array_of(x: Any, name: str) -> np.ndarray:
    """Any array as NumPy, copied from its device where needed. Raises FormatError[F102]."""
    try:
        a = to_device(x, "cpu")
    except (TilewrightError, MemoryError):
        raise
    except Exception:  # each library refuses in its own way
        a = None
    if a is None or a.dtype == object:
        raise FormatError("F102", f"a {type(x).__name__} is not an array of numbers", where=name)
    return a


def values_of(x: Any, name: str) -> tuple[np.ndarray, dtypes.DType]:
    """An array as it is stored, and its dtype. Raises FormatError[F102], ArgumentError[A102]."""
    a = array_of(x, name)
    if a.ndim == 0:
        return a, dtypes.float64  # no values: whoever asked says so
    own = getattr(x, "dtype", a.dtype)
    kind = dtypes.ALL.get(str(own).rpartition(".")[2]) or dtypes.dtype(a.dtype)
    return stored(a, kind), kind


def stored(x: Any, kind: dtypes.DType) -> np.ndarray:
    """Values of `kind` as NumPy stores them: those that it does not know are bits."""
    a = array_of(x, "values")
    return a.view(kind.numpy) if kind == dtypes.bfloat16 else a.astype(kind.numpy, copy=False)


def converted(values: np.ndarray, kind: dtypes.DType, to: dtypes.DType) -> np.ndarray:
    """Stored values of `kind` as those of `to`; unsigned integers of its width are its bits. Raises
    ArgumentError A109 where a value is out of range, A102 where nothing converts them."""
    if kind == to or (to == dtypes.bfloat16 and kind.is_int and values.dtype == to.numpy):
        return values
    numbers = dtypes.bfloat16_values(values) if kind == dtypes.bfloat16 else values
    with np.errstate(all="ignore"):  # what is lost is found below
        if to == dtypes.bfloat16:
            result = dtypes.bfloat16_bits(numbers.astype(np.float32))
            lost = np.isfinite(numbers) & ~np.isfinite(dtypes.bfloat16_values(result))
        else:
            result = numbers.astype(to.numpy)
            lost = _lost(numbers, result)
    if lost.any():
        rule = f"the value {numbers[lost][0]} is out of the range of {to}"
        raise ArgumentError("A109", rule, where="values", hint="a wider dtype, or values that fit")
    return result


def _lost(numbers: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Which numbers the type of `result` cannot hold; fractions may be cut off."""
    if result.dtype.kind == "b":
        return np.zeros(result.shape, bool)
    if result.dtype.kind == "f":
        return np.isfinite(numbers) & ~np.isfinite(result)
    if numbers.dtype.kind != "f":
        return (result < 0) != (numbers < 0) if result.itemsize == 8 else result != numbers
    limits = np.iinfo(result.dtype)
    truncated = np.trunc(numbers.astype(np.float64))
    return ~((truncated >= float(limits.min)) & (truncated < float(limits.max + 1)))


def filling(fill: float, kind: dtypes.DType) -> np.ndarray:
    if fill == 0:  # all bits 0 in every dtype, also in those that nothing here converts
        return np.zeros(1, kind.numpy)
    return converted(np.array([fill], np.float64), dtypes.float64, kind)
