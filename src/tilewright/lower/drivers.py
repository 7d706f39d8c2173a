"""Checks of the structures that drive a reduction: its value depends neither on the order of its
operands nor on coordinates that a format stores more than once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tilewright.errors import ProgramError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import FOLD
from tilewright.lower.tables import Driver, Statement, drivers


def check_reduction(st: Statement, tensors: dict[str, ir.Tensor]) -> None:
    """Raises ProgramError[P107] where the value of a reduction is not well defined."""
    shared = drivers(st)
    if not st.op or not shared:
        return
    values = [_value_where_missing(st.value, driver) for driver in shared]
    identity = ir.identity_of(st.op, st.value.dtype).value
    if len(shared) > 1 and values[0] != identity and any(v != 0 for v in values):
        names = " and ".join(t.name for t in shared.values())
        first = next(iter(shared.values())).name
        raise ProgramError(
            "P107",
            f"the structures of {names} share an axis of {st.op} over "
            f"{', '.join(a.name for a in st.axes)}, and {first}, the first, gives no {identity:g} "
            f"where it is missing: {st.value}",
            hint="write first the factor of a product that is 0 where it is missing, "
            "sum(A[i, j] * (B[i, j] + 1)); write a sum as two, sum(A[i, j]) + sum(B[i, j])",
        )
    driver = next(iter(shared))
    fmt = tensors[driver[0]].format
    if fmt.repeats and values[0] != identity:
        raise ProgramError(
            "P107",
            f"{fmt} stores zeros beside its entries more than once, and they change {st.op} of "
            f"{st.value}",
            hint=f"an expression that is {identity:g} where nothing is stored, or a format of "
            "entries only: csr, dcsr, hyb",
        )


def _value_where_missing(body: ir.Expr, driver: Driver) -> Any:
    """The value of `body` where `driver` stores no entry; None where that is no constant."""

    def fill(x: ir.Access) -> float | None:
        names = tuple(c.name if isinstance(c, ir.Index) else "" for c in x.coords)
        known = (x.tensor.structure, names) == driver and x.tensor.role == "input"
        return x.tensor.fill if known else None

    return constant(body, fill)


def constant(e: ir.Expr, read: Callable[[ir.Access], Any]) -> Any:
    """The value of an expression in which `read` knows the value of some accesses, else None.
    0 · x is 0, and ∞ + x is ∞, whatever x is."""
    if isinstance(e, ir.Const):
        return e.value
    if isinstance(e, ir.Access):
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
    "-": lambda a: -a,
    "abs": abs,
    "not": lambda a: not a,
    "exp": lambda a: math.exp(a) if a < 700 else math.inf,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else None,
    "tanh": math.tanh,
    "sin": lambda a: math.sin(a) if math.isfinite(a) else None,
}


def _binary(op: str, a: Any, b: Any) -> Any:
    if a is not None and b is not None:
        if op == "/":
            return a / b if b != 0 else None
        return FOLD[op](a, b) if op in FOLD and not (op in ("//", "%") and b == 0) else None
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
