"""Operators whose result is sparse with a pattern of its own: count, scan, fill.

A first kernel counts the entries of each row, NumPy adds the counts up to the starts of the rows, a
second kernel writes columns and values. Both walk the operands in the same way.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.build import Definition, named_recipe, program_of
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime import host_allocator
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.formats import Format
from tilewright.sparse.pack import Packed, of_rows
from tilewright.sparse.trace import dense, out, sum_, update

ROWS_PER_UNIT = 256
FORMATS = ("csr", "dcsr")


def programs(
    name: str, operands: dict[str, Any], row: Callable[..., tuple[Any, Any, Any, Any]]
) -> tuple[Definition, Definition]:
    """The programs that count the entries of each row and that fill them. `row(**operands)` gives
    the indices of rows and columns, the condition of an entry, and its value."""

    def count(**of: Any) -> Any:
        i, j, condition, _ = row(**of)
        return out.typed("int64")[i](sum_(1, over=j, where=condition))

    def fill(start: Any, columns: Any, values: Any, **of: Any) -> Any:
        i, j, condition, value = row(**of)
        update(columns).append[start[i]](j, over=j, where=condition)
        return update(values).append[start[i]](value, over=j, where=condition)

    lists = {"start": dense("m", "int64"), "columns": dense("c"), "values": dense("c")}
    counted = program_of(f"{name}_count", operands, count)
    return counted, program_of(f"{name}_fill", {**operands, **lists}, fill)


@named_recipe
def recipe(s: Schedule) -> Schedule:
    """Blocks of rows in parallel."""
    return s.split("i", ROWS_PER_UNIT, into=("i_unit", "i_in")).parallel("i_unit")


def check_operands(**operands: Any) -> None:
    """Checks what the operators of this file take: packed on the host, with a fill of 0 and
    coordinates of one type. Raises ArgumentError A102, A105, A106."""
    for name, x in operands.items():
        where = f"argument {name}"
        if not isinstance(x, Packed) or x.format.name not in FORMATS or x.fill != 0:
            kind = f"{x.format} with fill={x.fill:g}" if isinstance(x, Packed) else type(x).__name__
            hint = f"pack it without a fill, as one of: {', '.join(FORMATS)}"
            raise ArgumentError("A106", f"{name} is {kind}", where=where, hint=hint)
        if x.device != "cpu":
            raise ArgumentError("A105", f"{name} is on {x.device}", where=where, hint='to("cpu")')
        if name != "mask" and x.dtype.kind == "b":
            hint = "a float or an integer type"
            raise ArgumentError("A102", f"{name} is {x.dtype}", where=where, hint=hint)
        index, first = x.structure.index_dtype, operands["A"].structure.index_dtype
        if index != first:
            rule = f"the coordinates of A are {first}, those of {name} {index}"
            raise ArgumentError("A102", rule, where=where, hint='pack both with index="int64"')


Operands = tuple[tuple[str, Format, DType], ...]  # name, format and dtype of each


def phases(
    count: Definition, fill: Definition, operands: Operands, index: DType, values: DType
) -> tuple[Definition, Definition]:
    """Both phases with their schedules; `values` is the dtype of the result."""

    def of(phase: Definition, **own: Any) -> Definition:
        types = {name: dtype for name, _, dtype in operands} | own
        formats = {name: fmt for name, fmt, _ in operands}
        return phase.typed(index=index, **types).decompose(**formats).schedule(recipe)

    return of(count), of(fill, columns=index, values=values)


@cache
def _kernels(
    count: Definition, fill: Definition, operands: Operands, index: DType, values: DType
) -> tuple[Kernel, ...]:
    return tuple(d.build("cpp") for d in phases(count, fill, operands, index, values))


def assembled(
    count: Definition, fill: Definition, operands: dict[str, Packed], shape: tuple[int, int]
) -> Packed:
    """Runs both phases: `count(*operands)` counts the entries of each row, `fill(*operands, start,
    columns, values)` writes them. The dtype of the result is the wider one of A and B."""
    A, B = operands["A"], operands["B"]
    index, dtype = A.structure.index_dtype, dtypes.promote(A.dtype, B.dtype)
    described = tuple((name, x.format, x.dtype) for name, x in operands.items())
    counted, filled = _kernels(count, fill, described, index, dtype)
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(counted(*operands.values()), out=indptr[1:])
    entries = (int(indptr[-1]),)
    columns, values = (host_allocator.empty(entries, t.numpy) for t in (index, dtype))
    if len(columns):
        filled(*operands.values(), indptr[:-1], columns, values)
    return of_rows(indptr, columns, values, shape, dtype)
