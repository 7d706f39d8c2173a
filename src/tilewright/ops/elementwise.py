"""Element-wise operators of two sparse matrices, with patterns of their own.

The rows of both are merged, two ascending lists with one position each. `add` stores an entry where
A or B does, `multiply` where both do; values that cancel are stored as zeros.
"""

import operator
from typing import Any

from tilewright.build import Definition
from tilewright.errors import ArgumentError
from tilewright.ops import row_lists
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import indices, sparse, stored


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
