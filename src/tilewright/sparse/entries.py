"""Reading a matrix: whatever library it comes from, as checked coordinates and values.

What is checked here is checked once: shapes, ranges, index pointers, counts, values that a dtype
cannot hold. Packing and unpacking trust the result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, FormatError, TilewrightError

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


def _no_device(array: Any, device: str) -> Any:
    raise FormatError("F102", f"nothing here can place arrays on {device}", where="device")


place: Callable[[Any, str], Any] = _no_device
"""Copies an array to a device, or from any to the host (`"cpu"`); `build` sets it to the runtime's,
which this room does not know."""


def read(matrix: Any) -> Entries:
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
    array, kind = values_of(matrix, "matrix")
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
        check_count(array_of(m.data, "values"), len(found[0]))
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
    array, kind = values_of(given, "values")
    check_count(array, nnz)
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
    a = array_of(x, name)
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


def check_count(values: np.ndarray, nnz: int) -> None:
    if values.shape != (nnz,):
        raise FormatError(
            "F102", f"{nnz} entries but values of shape {values.shape}", where="values"
        )


# ---------------------------------------------------------------------------- values


def array_of(x: Any, name: str) -> np.ndarray:
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


def values_of(x: Any, name: str) -> tuple[np.ndarray, DType]:
    """An array as it is stored, and its dtype. Raises FormatError[F102], ArgumentError[A102]."""
    a = array_of(x, name)
    if a.ndim == 0:
        return a, dtypes.float64  # no values: whoever asked says so
    own = getattr(x, "dtype", a.dtype)
    kind = dtypes.ALL.get(str(own).rpartition(".")[2]) or dtypes.dtype(a.dtype)
    return stored(a, kind), kind


def stored(x: Any, kind: DType) -> np.ndarray:
    """Values of `kind` as NumPy stores them: those that it does not know are bits."""
    a = array_of(x, "values")
    return a.view(kind.numpy) if _is_bits(kind) else a.astype(kind.numpy, copy=False)


def _is_bits(kind: DType) -> bool:
    return kind.is_float and kind.numpy.kind == "u"


def converted(values: np.ndarray, kind: DType, to: DType) -> np.ndarray:
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


def filling(fill: float, kind: DType) -> np.ndarray:
    if fill == 0:  # all bits 0 in every dtype, also in those that nothing here converts
        return np.zeros(1, kind.numpy)
    return converted(np.array([fill], np.float64), dtypes.float64, kind)
