"""Tilewright: one way to write sparse and attention computations, one compiler, one runtime.

    import tilewright as tw

    @tw.program
    def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
        i, j, k = tw.indices("m n d")
        return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))

    A = tw.hyb().pack(matrix)
    Y = spmm.decompose(A=tw.hyb()).build()(A, X)

Needs NumPy only; everything else is found when it is used.
"""

from __future__ import annotations

from tilewright.build import Definition, program
from tilewright.errors import TilewrightError
from tilewright.ir.nodes import equal
from tilewright.runtime.kernel import Bound, Kernel
from tilewright.runtime.launch import Step
from tilewright.schedule import Schedule
from tilewright.sparse.formats import (
    Composed, Format, Where, bsr, bucket, coo, csc, csr, dbsr, dcsr, ell, hyb, ragged,
)  # fmt: skip
from tilewright.sparse.pack import Packed
from tilewright.sparse.trace import (
    cos, dense, exp, floor, indices, log, maximum, minimum, out, prod, rsqrt, scalar, sigmoid, sin, size,
    sparse, sqrt, tanh, temp, update, where,
)  # fmt: skip
from tilewright.sparse.trace import abs_ as abs
from tilewright.sparse.trace import max_ as max
from tilewright.sparse.trace import min_ as min
from tilewright.sparse.trace import sum_ as sum
from tilewright.target import Target, target

__version__ = "0.1.0"

__all__ = [
    "Bound", "Composed", "Definition", "Format", "Kernel", "Packed", "Schedule", "Step", "Target", "TilewrightError", "Where",
    "abs", "bsr", "bucket", "coo", "cos", "csc", "csr", "dbsr", "dcsr", "dense", "ell", "equal", "exp", "floor", "hyb",
    "indices", "log", "max", "maximum", "min", "minimum", "out", "prod", "program", "ragged", "rsqrt", "scalar",
    "sigmoid", "sin", "size", "sparse", "sqrt", "sum", "tanh", "target", "temp", "update", "where",
]  # fmt: skip
