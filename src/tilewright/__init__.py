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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright.build import Definition, program
from tilewright.errors import TilewrightError
from tilewright.ir.atoms import Atom
from tilewright.ir.nodes import equal
from tilewright.runtime.kernel import Bound, Kernel
from tilewright.runtime.step import Step
from tilewright.sparse.expressions import *
from tilewright.sparse.formats import *
from tilewright.sparse.pack import Packed
from tilewright.sparse.structured import band, bitmap, dia, n_m, paged
from tilewright.sparse.trace import dense, out, scalar, sparse, temp, update
from tilewright.target import Target, target

if TYPE_CHECKING:
    from tilewright import ops
    from tilewright.attention.batch import Attention
    from tilewright.attention.kv import KV
    from tilewright.attention.merge import State, merge
    from tilewright.attention.plan import Plan
    from tilewright.attention.pool import Pool
    from tilewright.attention.select import select
    from tilewright.attention.table import Table
    from tilewright.attention.tracing import (
        bit_mask,
        per_channel,
        per_head,
        per_key,
        per_request,
        per_token,
    )
    from tilewright.attention.variant import Alibi, Causal, Full, SlidingWindow, Softcap, variant
    from tilewright.attention.workspace import Workspace
    from tilewright.ops import recipes
    from tilewright.schedule import Schedule
    from tilewright.serve.engine import LLM

__version__ = "0.1.0"

abs, any, max, min, sum = abs_, any_, max_, min_, sum_

_ON_DEMAND = {
    name: module
    for module, names in {
        "ops": "ops", "ops.recipes": "recipes", "schedule": "Schedule", "serve.engine": "LLM",
        "attention.batch": "Attention", "attention.kv": "KV", "attention.merge": "State merge",
        "attention.plan": "Plan", "attention.pool": "Pool", "attention.select": "select",
        "attention.table": "Table",
        "attention.tracing": "bit_mask per_channel per_head per_key per_request per_token",
        "attention.variant": "Alibi Causal Full SlidingWindow Softcap variant",
        "attention.workspace": "Workspace",
    }.items()
    for name in names.split()
}  # fmt: skip
"""The module of each name that is imported when it is first used, to keep the import short."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    module = import_module(f"tilewright.{_ON_DEMAND[name]}")
    return module if name in ("ops", "recipes") else getattr(module, name)


__all__ = [
    "KV", "LLM", "Alibi", "Atom", "Attention", "Bound", "Causal", "Composed", "Definition",
    "Format", "Full", "Kernel", "Packed", "Plan", "Pool", "Schedule", "SlidingWindow", "Softcap",
    "State", "Step", "Table", "Target", "TilewrightError", "Where", "Workspace", "abs", "any",
    "argmax", "band", "bit_mask", "bitmap", "bsr", "bucket", "coo", "cos", "csc", "csf", "csr",
    "dbsr", "dcsr", "dense", "dia", "ell", "equal", "exp", "floor", "hyb", "indices", "log", "max",
    "maximum", "mean", "merge", "min", "minimum", "n_m", "ops", "out", "paged", "per_channel",
    "per_head", "per_key", "per_request", "per_token", "prod", "program", "ragged", "recipes",
    "rsqrt", "scalar", "select", "sigmoid", "sin", "size", "sparse", "sqrt", "sr_bcrs", "stored",
    "sum", "tanh", "target", "temp", "update", "variant", "where",
]  # fmt: skip
