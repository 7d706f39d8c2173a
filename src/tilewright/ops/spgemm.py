"""SpGEMM: C = A B of two sparse matrices, as CSR.

Row by row in the order of Gustavson: for each k of a row of A, row k of B goes into a row
workspace, a hash table, whose coordinates are sorted. Memory is in proportion to the operands, the
result and its longest row.
Reference: Gustavson, ACM TOMS 4 (1978); workspaces as in taco (Kjolstad et al., CGO 2019).
"""

from __future__ import annotations

from tilewright.build import program
from tilewright.errors import ArgumentError
from tilewright.ops import row_lists
from tilewright.sparse import trace
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import any_, dense, indices, out, sparse, stored, update


@program
def spgemm_count(A=sparse("m k"), B=sparse("k n")):
    i, k, j = indices("i:m k:k j:n")
    meets = any_(stored(A[i, k]) & stored(B[k, j]), over=k)
    return out.typed("int64")[i](trace.sum_(1, over=j, where=meets))


@program
def spgemm_fill(
    A=sparse("m k"), B=sparse("k n"), start=dense("m", "int64"), columns=dense("c"),
    values=dense("c"),
):  # fmt: skip
    i, k, j = indices("i:m k:k j:n")
    meets = any_(stored(A[i, k]) & stored(B[k, j]), over=k)
    update(columns).append[start[i]](j, over=j, where=meets)
    total = trace.sum_(A[i, k] * B[k, j], over=k)
    return update(values).append[start[i]](total, over=j, where=meets)


def spgemm(A: Packed, B: Packed) -> Packed:
    """C = A B as CSR, with an entry wherever entries of A and B meet. A: (m, k), B: (k, n), csr or
    dcsr on the host; the dtype is the wider one, sums are in its accumulator. Raises ArgumentError
    A102, A103, A105, A106."""
    row_lists.check_operands(A, B)
    if A.shape[1] != B.shape[0]:
        raise ArgumentError(
            "A103", f"A has {A.shape[1]} columns, B {B.shape[0]} rows", where="argument B",
            hint="as many rows of B as columns of A",
        )  # fmt: skip
    return row_lists.assembled(spgemm_count, spgemm_fill, A, B, (A.shape[0], B.shape[1]))
