"""Affine forms and divisibility of index arithmetic."""

from collections.abc import Callable, Iterable
from math import gcd
from typing import NamedTuple

from tilewright.dtypes import DType
from tilewright.ir.names import STRIDE, is_generated
from tilewright.ir.nodes import Binary, Cast, Const, Expr, For, Var, binary, cast
from tilewright.ir.rewrite import add, free_vars, mul, simplify


class Affine(NamedTuple):
    """base + Σ steps[name] · name. Neither the base nor a step reads one of the names."""

    base: Expr
    steps: dict[str, Expr]


def affine(e: Expr, names: frozenset[str], to: DType | None = None) -> Affine | None:
    """`e` as an affine form in the variables `names`, or None. Names that do not occur are left
    out. With `to` all of it is computed in that type, otherwise in the types that `e` has."""
    occurs = bool(free_vars(e) & names)
    if not occurs and to is None:
        return Affine(e, {})
    dtype = to or e.dtype
    if isinstance(e, Var) and occurs:
        return Affine(Const(0, dtype), {e.name: Const(1, dtype)})
    if isinstance(e, Cast) and e.a.dtype.is_int and e.dtype.is_int:
        inner = affine(e.a, names, to)
        if inner is None or to is not None:
            return inner
        return Affine(cast(inner.base, dtype), {n: cast(s, dtype) for n, s in inner.steps.items()})
    if isinstance(e, Binary) and e.op in ("+", "-", "*") and e.dtype.is_int:
        a, b = affine(e.a, names, to), affine(e.b, names, to)
        return None if a is None or b is None else _combined(e.op, a, b)
    return None if occurs else Affine(cast(e, dtype), {})


def _combined(op: str, a: Affine, b: Affine) -> Affine | None:
    """`a op b`, or None where it is no affine form."""
    if op == "*":
        if a.steps and b.steps:
            return None
        a, b = (b, a) if b.steps else (a, b)
        return Affine(mul(a.base, b.base), {n: mul(s, b.base) for n, s in a.steps.items()})
    x, y, zero = a.steps, b.steps, Const(0, a.base.dtype)
    steps = {n: simplify(binary(op, x.get(n, zero), y.get(n, zero))) for n in x | y}
    base = add(a.base, b.base) if op == "+" else simplify(binary("-", a.base, b.base))
    return Affine(base, steps)


def slack_of(cond: Expr) -> Expr | None:
    """b - a for a condition a <= b of coordinates, which holds where that is not negative."""
    match cond:
        case Binary("<" | "<=" as op, a, b) | Binary(">" | ">=" as op, b, a):
            if a.dtype.name in ("int32", "int64"):  # a difference of others may not fit
                return add(binary("-", b, a), 0 if "=" in op else -1)
    return None


def extreme(e: Expr, loops: Iterable[For], largest: bool) -> Expr | None:
    """The largest or the least value of `e`, an affine form, in loops of constant extents."""
    ranges = {f.name: (f.begin, f.extent) for f in loops}
    value, steps = affine(e, frozenset(ranges)) or (None, {})
    for name, step in steps.items():
        begin, extent = ranges[name]
        if value is None or extent is None or not isinstance(step, Const):
            return None
        last = extent - 1 if (int(step.value) > 0) == largest else 0
        value = add(value, mul(step, add(begin, last)))
    return value


def is_multiple(e: Expr, n: int, known: Callable[[Var], bool] = lambda v: False) -> bool:
    """Whether `e` is certainly a multiple of `n`. `known` tells the variables that are."""
    if n == 1:
        return True
    if isinstance(e, Var):
        return known(e)
    if isinstance(e, Const):
        return int(e.value) % n == 0
    if isinstance(e, Cast):
        return e.a.dtype.is_int and is_multiple(e.a, n, known)
    if not isinstance(e, Binary):
        return False
    if e.op == "*" and isinstance(e.b, Const):
        return is_multiple(e.a, n // gcd(n, int(e.b.value)), known)
    if e.op == "*":
        return is_multiple(e.a, n, known) or is_multiple(e.b, n, known)
    both = e.op in ("+", "-", "min", "max")
    return both and is_multiple(e.a, n, known) and is_multiple(e.b, n, known)


def is_aligned(e: Expr, n: int) -> bool:
    """Whether an offset is a multiple of n, strides of arrays being multiples of 16 bytes: arrays
    for which that does not hold run the code that is compiled with TW_UNALIGNED."""
    return is_multiple(e, n, lambda v: is_generated(v.name, STRIDE))


def parted(e: Expr, belongs: Callable[[Expr], bool]) -> tuple[Expr, Expr]:
    """An integer expression as two sums: of the terms that belong to the first, and the others."""
    first = [t for t in terms(e) if belongs(t)]
    return add(0, *first), add(0, *(t for t in terms(e) if t not in first))


def terms(e: Expr) -> list[Expr]:
    """Splits an integer expression into terms that add up to it: (a + b) * n into a * n, b * n."""
    if isinstance(e, Cast) and e.a.dtype.is_int:
        return [cast(t, e.dtype) for t in terms(e.a)]
    if isinstance(e, Binary) and e.op == "+":
        return terms(e.a) + terms(e.b)
    if isinstance(e, Binary) and e.op == "*" and isinstance(e.b, (Const, Var)):
        return [mul(t, e.b) for t in terms(e.a)]
    return [e]
