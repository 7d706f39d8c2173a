"""Indices and the operations on values that a traced function can use."""

import math
import re
from collections.abc import Callable
from itertools import chain, count
from typing import Any

from tilewright import dtypes
from tilewright.ir import nodes as ir
from tilewright.ir.nodes import Access, Expr, Index, as_expr
from tilewright.ir.rewrite import contains, driving, free_vars
from tilewright.sparse.tracing import checked_name, current, refusal

__all__ = [
    "abs_", "any_", "argmax", "cos", "exp", "floor", "indices", "log", "max_", "maximum", "mean",
    "min_", "minimum", "prod", "rsqrt", "sigmoid", "sin", "size", "sqrt", "stored", "sum_", "tanh",
    "where",
]  # fmt: skip


def indices(dims: str) -> Any:
    """Indices over dimensions: `i, j, k = indices("m n d")`. Their loops are called as the
    dimensions are, m, n and d; with `indices("row:m col:n")` they are called row and col.

    A dimension may occur twice (square matrices); its second loop is then called m1. One dimension
    returns one index, not a tuple."""
    if not isinstance(dims, str):
        raise refusal("P101", f"indices over {dims!r}", hint='names of dimensions, as "m n"')
    trace = current()
    created: list[Index] = []
    for word in dims.split():
        name, _, dim = word.rpartition(":")
        used = {x.name for x in trace.indices} | trace.tensors.keys()
        name = name or _loop_name(dim, used)
        if checked_name(name, "an index", "P102") in used:
            hint = "indices and parameters have names of their own"
            raise refusal("P102", f"index {name!r} is not a new name", hint=hint)
        created.append(Index(name, dim=int(dim) if dim.isdigit() else _known(dim)))
        trace.indices.append(created[-1])
    return created[0] if len(created) == 1 else tuple(created)


def _loop_name(dim: str, used: set[str]) -> str:
    """The name of a dimension for an index, with a number where it is taken; `i` for a size. The
    names that outputs and temporaries have by default are taken."""
    base = "i" if dim.isdigit() else f"i_{dim}" if re.fullmatch(r"(out|temp)\d*", dim) else dim
    return next(n for n in chain((base,), (f"{base}{n}" for n in count(1))) if n not in used)


def size(dim: str) -> Expr:
    """The run-time size of a dimension. Raises ProgramError[P102]."""
    return ir.size_var(_known(dim))


def _known(dim: str) -> str:
    """A dimension that a parameter has. Raises ProgramError[P102] for another one."""
    known = {d for t in current().tensors.values() for d in t.dims if isinstance(d, str)}
    if not isinstance(dim, str) or dim not in known:
        hint = f"dimensions: {', '.join(sorted(known))}"
        raise refusal("P102", f"no parameter has a dimension {dim!r}", hint=hint)
    return dim


def stored(access: Any) -> Expr:
    """Whether a sparse tensor stores an entry at coordinates: `stored(A[i, j])`."""
    if not isinstance(access, Access) or not access.tensor.is_sparse:
        raise refusal("P103", f"stored({access!r}): not sparse", hint="tw.stored(A[i, j])")
    return ir.Stored(access)


def any_(condition: Any, over: Index | tuple[Index, ...]) -> Expr:
    """Whether a condition holds for any coordinate of an index or a tuple of indices."""
    return ir.binary(">", max_(condition_of("any", condition), over), 0)


def condition_of(op: str, value: Any) -> Expr:
    """`value` as the condition of an operation. Raises ProgramError[P106] for other values."""
    if not isinstance(value, Expr) or value.dtype.kind != "b":
        hint = "tw.stored(A[i, j]), or a < b"
        raise refusal("P106", f"{op} where {value!r}: not a condition", hint=hint)
    return value


def _reduce(op: str) -> Callable[..., Expr]:
    def reduction(value: Any, over: Index | tuple[Index, ...], where: Expr | None = None) -> Expr:
        axes = over if isinstance(over, tuple) else (over,)
        if not axes or not all(isinstance(a, Index) for a in axes):
            raise refusal("P104", f"{op} over {over!r}: not indices", hint="over=j or over=(j, k)")
        body = as_expr(value)
        dtype = body.dtype.accumulator if body.dtype.kind != "b" else dtypes.int32
        if where is not None:
            body = _computed_in(body, dtype)
            body = ir.select(condition_of(op, where), body, ir.identity_of(op, dtype))
        missing = {a.name for a in axes} - free_vars(body)
        if missing:
            rule = f"{op} over {', '.join(sorted(missing))}, which its body does not use"
            raise refusal("P104", rule, hint="where=tw.stored(A[i, j]) ranges over what A stores")
        return ir.Reduce(op, axes, _computed_in(body, dtype), dtype)

    reduction.__name__ = reduction.__qualname__ = op
    reduction.__doc__ = (
        f"The {op} of `value` over an index or a tuple of indices, where the condition `where` "
        f"holds; the identity of {op} where it never does."
    )
    return reduction


def _computed_in(e: ir.Expr, to: dtypes.DType) -> ir.Expr:
    """`e` as `to`, where the integer arithmetic that makes it is done in `to`, not in the narrower
    types of its operands: a sum of int8 products multiplies in int32. A conversion to a wider
    integer inside of it changes no value; any other conversion ends the search."""
    kind = e.dtype
    if kind.is_int and to.is_int and kind.bits < to.bits:
        if isinstance(e, ir.Binary) and e.op not in ("<<", ">>"):
            return ir.Binary(e.op, _computed_in(e.a, to), _computed_in(e.b, to), to)
        if isinstance(e, ir.Unary):
            return ir.Unary(e.op, _computed_in(e.a, to), to)
        if isinstance(e, ir.Select):
            return ir.Select(e.cond, _computed_in(e.a, to), _computed_in(e.b, to), to)
        if isinstance(e, ir.Cast) and e.a.dtype.is_int and dtypes.promote(e.a.dtype, kind) == kind:
            return _computed_in(e.a, to)
    return ir.cast(e, to)


sum_, max_, min_, prod = (_reduce(op) for op in ("sum", "max", "min", "prod"))


def mean(value: Any, over: Index | tuple[Index, ...], where: Expr | None = None) -> Expr:
    """The sum of `value` over the number of its terms, NaN without any. Terms are the coordinates
    that the sparse operand stores, all of dense operands; of these where `where` holds. Raises
    ProgramError[P107] for operands of several structures without `where`."""
    total, terms = sum_(value, over, where), _terms("mean", value, over, where)
    kind = total.dtype if total.dtype.is_float else dtypes.float32
    dims = [a.dim for a in (over if isinstance(over, tuple) else (over,))]
    first, *more = (as_expr(ir.size_var(d) if isinstance(d, str) else d).cast(kind) for d in dims)
    number = math.prod(more, start=first) if terms is None else sum_(1, over, terms).cast(kind)
    return total.cast(kind) / number


def argmax(value: Any, over: Index, where: Expr | None = None) -> Expr:
    """The least coordinate at which `value` is greatest, some coordinate of the terms where one is
    NaN: int32, its largest number without terms. Terms and errors are those of `mean`."""
    if not isinstance(over, Index):
        raise refusal("P104", f"argmax over {over!r}: not an index", hint="over=j")
    # `<`, not `>=`: at least one value is not below the greatest, also if one is NaN.
    below = ir.binary("<", value, max_(value, over, where))
    last = ir.identity_of("min", dtypes.int32)
    return min_(ir.select(below, last, over), over, _terms("argmax", value, over, where))


def _terms(op: str, value: Any, over: Any, where: Expr | None) -> Expr | None:
    """The condition of the terms of a reduction, None where all coordinates are terms."""
    axes = over if isinstance(over, tuple) else (over,)
    found = [*driving(as_expr(value), frozenset(a.name for a in axes)).values()]
    if where is None and len(found) > 1:
        rule = f"{op} over coordinates of {' and '.join(map(str, found))}: which of them?"
        raise refusal("P107", rule, hint="where=tw.stored(A[i, j]), or | and & of several")
    if len(found) != 1 or (where is not None and contains(where, ir.Stored)):
        return where
    stored = ir.Stored(found[0])
    return stored if where is None else stored & where


def _function(op: str) -> Callable[[Any], Expr]:
    def apply(x: Any) -> Expr:
        return ir.unary(op, as_expr(x))

    apply.__name__ = apply.__qualname__ = op
    apply.__doc__ = f"{op} of a value, in float32 at least."
    return apply


exp, log, sqrt, rsqrt, tanh, sin, cos, abs_, floor = (
    _function(op) for op in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "abs", "floor")
)


def sigmoid(x: Any) -> Expr:
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + exp(-as_expr(x)))


def maximum(a: Any, b: Any) -> Expr:
    """The larger of two values."""
    return ir.binary("max", a, b)


def minimum(a: Any, b: Any) -> Expr:
    """The smaller of two values."""
    return ir.binary("min", a, b)


def where(cond: Expr, a: Any, b: Any) -> Expr:
    """`a` where `cond` holds, else `b`."""
    if not isinstance(cond, Expr):
        hint = "`==` compares the text of expressions: write tw.equal(i, j)"
        raise refusal("P101", f"the condition of where is {cond!r}", hint=hint)
    return ir.select(cond, a, b)
