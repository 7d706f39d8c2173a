"""Operators whose result is a CSR matrix with a pattern of its own: A B, A + B and A ∘ B.

Count, scan, fill: a first kernel counts the entries of each row, NumPy adds the counts up to the
starts of the rows, a second kernel writes columns and values. Both walk the operands in the same
way. SpGEMM goes row by row in the order of Gustavson: for each k of a row of A, row k of B goes
into a row workspace, a hash table, whose coordinates are sorted. Memory is in proportion to the
operands, the result and its longest row. Element by element the rows of both are merged, two
ascending lists with one position each; values that cancel are stored as zeros.
Reference: Gustavson, ACM TOMS 4 (1978); workspaces as in taco (Kjolstad et al., CGO 2019).
"""

import operator
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
from tilewright.sparse.trace import any_, dense, indices, out, sparse, stored, sum_, update

ROWS_PER_UNIT = 256
FORMATS = ("csr", "dcsr")
Phases = tuple[Definition, Definition]  # the programs that count the entries, and that fill them
Operands = tuple[tuple[str, Format, DType], ...]  # name, format and dtype of each

# ---------------------------------------------------------------------------- programs


def _phases(
    name: str, operands: dict[str, Any], row: Callable[..., tuple[Any, Any, Any, Any]]
) -> Phases:
    """Both programs of a result. `row(**operands)` returns the indices of rows and columns, the
    condition of an entry, and its value."""

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


def _product(A: Any, B: Any, M: Any = None) -> Any:
    i, k, j = indices("i:m k:k j:n")
    pattern = any_(stored(A[i, k]) & stored(B[k, j]), over=k)
    pattern = pattern if M is None else stored(M[i, j]) & pattern
    return i, j, pattern, sum_(A[i, k] * B[k, j], over=k)


def _elements(pattern: Any, value: Any) -> Phases:
    """The programs for an entry where `pattern` of (A has one, B has one) holds, with the `value`
    of both."""

    def row(A: Any, B: Any) -> Any:
        i, j = indices("i:m j:n")
        a, b = A[i, j], B[i, j]
        return i, j, pattern(stored(a), stored(b)), value(a, b)

    return _phases("elementwise", {"A": sparse("m n"), "B": sparse("m n")}, row)


_factors = {"A": sparse("m k"), "B": sparse("k n")}
spgemm_phases = _phases("spgemm", _factors, _product)
masked_phases = _phases("masked", {**_factors, "M": sparse("m n")}, _product)
add_phases = _elements(operator.or_, operator.add)
multiply_phases = _elements(operator.and_, operator.mul)


@named_recipe
def recipe(s: Schedule) -> Schedule:
    """Blocks of rows in parallel."""
    return s.split("i", ROWS_PER_UNIT, into=("i_unit", "i_in")).parallel("i_unit")


def definitions(phases: Phases, operands: Operands, index: DType, values: DType) -> Phases:
    """Both phases with their schedules; `values` is the dtype of the result."""

    def of(phase: Definition, **own: Any) -> Definition:
        types = {name: dtype for name, _, dtype in operands} | own
        formats = {name: fmt for name, fmt, _ in operands}
        return phase.typed(index=index, **types).decompose(**formats).schedule(recipe)

    count, fill = phases
    return of(count), of(fill, columns=index, values=values)


@cache
def _kernels(
    phases: Phases, operands: Operands, index: DType, values: DType
) -> tuple[Kernel, Kernel]:
    count, fill = definitions(phases, operands, index, values)
    return count.build("cpp"), fill.build("cpp")


# ---------------------------------------------------------------------------- the operators


def spgemm(A: Packed, B: Packed, mask: Packed | None = None) -> Packed:
    """C = A B as CSR, with an entry wherever entries of A and B meet, and `mask` (m, n) has one.
    A: (m, k), B: (k, n), all csr or dcsr on the host; the dtype is the wider one of A and B, sums
    are in its accumulator. Raises ArgumentError A102, A103, A105, A106."""
    _check(A=A, B=B, **({} if mask is None else {"mask": mask}))
    if A.shape[1] != B.shape[0]:
        rule = f"A has {A.shape[1]} columns, B {B.shape[0]} rows"
        hint = "as many rows of B as columns of A"
        raise ArgumentError("A103", rule, where="argument B", hint=hint)
    shape = A.shape[0], B.shape[1]
    if mask is None:
        return _assembled(spgemm_phases, {"A": A, "B": B}, shape)
    if mask.shape != shape:
        rule = f"mask has shape {mask.shape}, the product {shape}"
        hint = "a row for each of A, a column for each of B"
        raise ArgumentError("A103", rule, where="argument mask", hint=hint)
    return _assembled(masked_phases, {"A": A, "B": B, "M": mask}, shape)


def add(A: Packed, B: Packed) -> Packed:
    """A + B as CSR: entries where A or B has one. A, B: (m, n), csr or dcsr on the host; the dtype
    is the wider one. Raises ArgumentError A102, A103, A105, A106."""
    return _elementwise(add_phases, A, B)


def multiply(A: Packed, B: Packed) -> Packed:
    """A ∘ B as CSR: entries where both have one. Arguments and errors as of `add`."""
    return _elementwise(multiply_phases, A, B)


def _elementwise(phases: Phases, A: Any, B: Any) -> Packed:
    _check(A=A, B=B)
    if A.shape != B.shape:
        rule = f"A has shape {A.shape}, B {B.shape}"
        raise ArgumentError("A103", rule, where="argument B", hint="equal shapes")
    return _assembled(phases, {"A": A, "B": B}, A.shape)


def _check(**operands: Any) -> None:
    """Checks that operands are packed on the host, with a fill of 0 and coordinates of one type.
    Raises ArgumentError A102, A105, A106."""
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


def _assembled(phases: Phases, operands: dict[str, Packed], shape: tuple[int, int]) -> Packed:
    """Runs both phases: `count(*operands)` counts the entries of each row, `fill(*operands, start,
    columns, values)` writes them. The dtype of the result is the wider one of A and B."""
    A, B = operands["A"], operands["B"]
    index, dtype = A.structure.index_dtype, dtypes.promote(A.dtype, B.dtype)
    described = tuple((name, x.format, x.dtype) for name, x in operands.items())
    count, fill = _kernels(phases, described, index, dtype)
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(count(*operands.values()), out=indptr[1:])
    entries = (int(indptr[-1]),)
    columns, values = (host_allocator.empty(entries, t.numpy) for t in (index, dtype))
    if len(columns):
        fill(*operands.values(), indptr[:-1], columns, values)
    return of_rows(indptr, columns, values, shape, dtype)
