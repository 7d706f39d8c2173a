"""The values of expressions where some of what they read is known."""

import math
from collections.abc import Callable
from typing import Any

from tilewright.ir import core as ir


def constant(e: ir.Expr, read: Callable[[ir.Access | ir.Stored], Any]) -> Any:
    """The value of an expression in which `read` knows the value of some accesses, and whether some
    are stored, else None. 0 · x is 0, and ∞ + x is ∞, whatever x is."""
    if isinstance(e, ir.Const):
        return e.value
    if isinstance(e, (ir.Access, ir.Stored)):
        return read(e)
    if isinstance(e, ir.Cast):
        value = constant(e.a, read)
        return value if value is None or e.dtype.is_float or math.isfinite(value) else None
    if isinstance(e, ir.Unary):
        value = constant(e.a, read)
        return None if value is None else _UNARY.get(e.op, lambda _: None)(value)
    if isinstance(e, ir.Select):
        cond, a, b = (constant(x, read) for x in (e.cond, e.a, e.b))
        return (a if a == b else None) if cond is None else (a if cond else b)
    if isinstance(e, ir.Binary):
        return _binary(e.op, constant(e.a, read), constant(e.b, read))
    return None


_UNARY: dict[str, Callable[[Any], Any]] = {
    "-": lambda a: -a, "abs": abs, "not": lambda a: not a, "tanh": math.tanh,
    "exp": lambda a: math.exp(a) if a < 700 else math.inf,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else None,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else None,
}  # fmt: skip


def _binary(op: str, a: Any, b: Any) -> Any:
    if op in ("&", "|") and (a is (op == "|") or b is (op == "|")):
        return op == "|"
    if a is not None and b is not None:
        if op in ("&", "|") and isinstance(a, bool):
            return op == "&"
        if op == "/":
            return a / b if b != 0 else None
        return ir.FOLD[op](a, b) if op in ir.FOLD and not (op in ("//", "%") and b == 0) else None
    if op in ("*", "/") and a == 0:
        return a
    if op == "*" and b == 0:
        return b
    known = b if a is None else a
    if op in ("+", "-") and known is not None and math.isinf(known):
        return -known if op == "-" and a is None else known
    if (op, known) in (("min", -math.inf), ("max", math.inf)):
        return known
    return None
