"""Operators whose result is a CSR matrix with a pattern of its own: A B, A + B and A ∘ B.

SpGEMM goes row by row in the order of Gustavson: for each k of a row of A, row k of B goes into a
row workspace, a hash table, whose coordinates are sorted. Memory is in proportion to the operands,
the result and its longest row. Element by element the rows of both are merged, two ascending lists
with one position each; values that cancel are stored as zeros.
Reference: Gustavson, ACM TOMS 4 (1978); workspaces as in taco (Kjolstad et al., CGO 2019).
"""

import operator
from typing import Any

from tilewright.build import Definition
from tilewright.errors import ArgumentError
from tilewright.ops import row_lists
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import any_, indices, sparse, stored, sum_


def _row(A: Any, B: Any, M: Any = None) -> Any:
    i, k, j = indices("i:m k:k j:n")
    pattern = any_(stored(A[i, k]) & stored(B[k, j]), over=k)
    pattern = pattern if M is None else stored(M[i, j]) & pattern
    return i, j, pattern, sum_(A[i, k] * B[k, j], over=k)


_OPERANDS = {"A": sparse("m k"), "B": sparse("k n")}
spgemm_count, spgemm_fill = row_lists.programs("spgemm", _OPERANDS, _row)
masked_count, masked_fill = row_lists.programs("masked", {**_OPERANDS, "M": sparse("m n")}, _row)


def spgemm(A: Packed, B: Packed, mask: Packed | None = None) -> Packed:
    """C = A B as CSR, with an entry wherever entries of A and B meet, and `mask` (m, n) has one.
    A: (m, k), B: (k, n), all csr or dcsr on the host; the dtype is the wider one of A and B, sums
    are in its accumulator. Raises ArgumentError A102, A103, A105, A106."""
    row_lists.check_operands(A=A, B=B, **({} if mask is None else {"mask": mask}))
    if A.shape[1] != B.shape[0]:
        rule = f"A has {A.shape[1]} columns, B {B.shape[0]} rows"
        hint = "as many rows of B as columns of A"
        raise ArgumentError("A103", rule, where="argument B", hint=hint)
    shape = A.shape[0], B.shape[1]
    if mask is None:
        return row_lists.assembled(spgemm_count, spgemm_fill, {"A": A, "B": B}, shape)
    if mask.shape != shape:
        rule = f"mask has shape {mask.shape}, the product {shape}"
        hint = "a row for each of A, a column for each of B"
        raise ArgumentError("A103", rule, where="argument mask", hint=hint)
    return row_lists.assembled(masked_count, masked_fill, {"A": A, "B": B, "M": mask}, shape)


def _programs(pattern: Any, value: Any) -> tuple[Definition, Definition]:
    """The programs for an entry where `pattern` of (A has one, B has one) holds, with the `value`
    of both."""

    def row(A: Any, B: Any) -> Any:
        i, j = indices("i:m j:n")
        a, b = A[i, j], B[i, j]
        return i, j, pattern(stored(a), stored(b)), value(a, b)

    return row_lists.programs("elementwise", {"A": sparse("m n"), "B": sparse("m n")}, row)


add_count, add_fill = _programs(operator.or_, operator.add)
multiply_count, multiply_fill = _programs(operator.and_, operator.mul)


def add(A: Packed, B: Packed) -> Packed:
    """A + B as CSR: entries where A or B has one. A, B: (m, n), csr or dcsr on the host; the dtype
    is the wider one. Raises ArgumentError A102, A103, A105, A106."""
    return _elementwise(add_count, add_fill, A, B)


def multiply(A: Packed, B: Packed) -> Packed:
    """A ∘ B as CSR: entries where both have one. Arguments and errors as of `add`."""
    return _elementwise(multiply_count, multiply_fill, A, B)


def _elementwise(count: Definition, fill: Definition, A: Any, B: Any) -> Packed:
    row_lists.check_operands(A=A, B=B)
    if A.shape != B.shape:
        rule = f"A has shape {A.shape}, B {B.shape}"
        raise ArgumentError("A103", rule, where="argument B", hint="equal shapes")
    return row_lists.assembled(count, fill, {"A": A, "B": B}, A.shape)
