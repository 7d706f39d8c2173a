"""Operators whose result is sparse with a pattern of its own: count, scan, fill.

A first kernel counts the entries of each row, NumPy adds the counts up to the starts of the rows, a
second kernel writes columns and values. Both walk the operands in the same way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.build import Definition, named_recipe
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime import host_allocator
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.formats import Format
from tilewright.sparse.pack import Packed, of_rows

ROWS_PER_UNIT = 256
FORMATS = ("csr", "dcsr")


@named_recipe
def recipe(s: Schedule) -> Schedule:
    """Blocks of rows in parallel."""
    return s.split("i", ROWS_PER_UNIT, into=("i_unit", "i_in")).parallel("i_unit")


def check_operands(A: Any, B: Any) -> None:
    """Checks what the operators of this file take: packed on the host, with a fill of 0 and
    coordinates of one type. Raises ArgumentError A102, A105, A106."""
    for name, x in (("A", A), ("B", B)):
        where = f"argument {name}"
        if not isinstance(x, Packed) or x.format.name not in FORMATS or x.fill != 0:
            kind = f"{x.format} with fill={x.fill:g}" if isinstance(x, Packed) else type(x).__name__
            raise ArgumentError(
                "A106", f"{name} is {kind}", where=where,
                hint=f"pack it without a fill, as one of: {', '.join(FORMATS)}",
            )  # fmt: skip
        if x.device != "cpu":
            raise ArgumentError("A105", f"{name} is on {x.device}", where=where, hint='to("cpu")')
        if x.dtype.kind == "b" or x.dtype.name.startswith("float8"):
            raise ArgumentError(
                "A102", f"{name} is {x.dtype}", where=where, hint="a float or an integer type"
            )
    kinds = A.structure.index_dtype, B.structure.index_dtype
    if kinds[0] != kinds[1]:
        raise ArgumentError(
            "A102", f"the coordinates of A are {kinds[0]}, those of B {kinds[1]}",
            where="argument B", hint='pack both with index="int64"',
        )  # fmt: skip


def phases(
    count: Definition, fill: Definition, formats: tuple[Format, ...], types: tuple[DType, ...]
) -> tuple[Definition, Definition]:
    """Both phases with their schedules, for the formats of A and B, and the dtypes of A, B, their
    coordinates and the result."""
    a, b, index, values = types

    def of(phase: Definition, **own: Any) -> Definition:
        typed = phase.typed(A=a, B=b, index=index, **own)
        return typed.decompose(A=formats[0], B=formats[1]).schedule(recipe)

    return of(count), of(fill, columns=index, values=values)


@cache
def _kernels(
    count: Definition, fill: Definition, formats: tuple[Format, ...], types: tuple[DType, ...]
) -> tuple[Kernel, ...]:
    return tuple(d.build("cpp") for d in phases(count, fill, formats, types))


def _empty(n: int, dtype: np.dtype) -> np.ndarray:
    is_large = n * dtype.itemsize >= host_allocator.SMALLEST
    return host_allocator.empty((n,), dtype) if is_large else np.empty(n, dtype)


def assembled(
    count: Definition, fill: Definition, A: Packed, B: Packed, shape: tuple[int, int]
) -> Packed:
    """Runs both phases. `count(A, B)` gives the entries of each row; `fill(A, B, start, columns,
    values)` writes them. The dtype of the result is the wider one, as of dense arrays."""
    index, dtype = A.structure.index_dtype, dtypes.promote(A.dtype, B.dtype)
    counted, filled = _kernels(count, fill, (A.format, B.format), (A.dtype, B.dtype, index, dtype))
    indptr = np.zeros(shape[0] + 1, np.int64)
    counted(A, B, out=indptr[1:])
    np.cumsum(indptr, out=indptr)
    columns, values = (_empty(int(indptr[-1]), t.numpy) for t in (index, dtype))
    if len(columns):
        filled(A, B, indptr[:-1], columns, values)
    return of_rows(indptr, columns, values, shape, dtype)
