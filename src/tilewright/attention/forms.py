"""Forms of a variant's hooks that the Hopper kernels compute beside their products: no branch, no
memory.

A hook in one of them becomes methods of the rendered struct; a kernel computes any other as it
stands, with nothing under way."""

from __future__ import annotations

from tilewright import dtypes
from tilewright.attention.tracing import SCORE
from tilewright.ir.nodes import Binary, Const, Expr, Unary, Var, binary
from tilewright.ir.rewrite import walk

ONE = Const(1.0, dtypes.float32)


def logits(e: Expr) -> tuple[dict[str, int], dict[str, Expr]]:
    """Constants and methods of logits. DIRECT: the score itself or, where it BENDS, outer ·
    tanh(inner · score)."""
    inner, outer, bends = ONE, ONE, False
    for tanh in walk(e, Unary):
        a, b = _factor(tanh.a, SCORE), _factor(e, tanh)
        if tanh.op == "tanh" and a is not None and b is not None:
            inner, outer, bends = a, b, True
    methods = {"float inner()": inner, "float outer()": outer}
    return {"DIRECT": int(bends or e == SCORE), "BENDS": int(bends)}, methods


def _factor(e: Expr, of: Expr) -> Expr | None:
    """What `of` is multiplied by in e, where it is the same for all scores."""
    if e == of:
        return ONE
    if not isinstance(e, Binary) or e.op not in "*/":
        return None
    other = e.b if e.a == of else e.a
    if of not in (e.a, e.b) or next(walk(other, Var), None) is not None:
        return None
    if e.op == "*":
        return other
    return binary("/", 1.0, other) if e.a == of else None
