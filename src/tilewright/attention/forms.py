"""Forms of a variant's hooks that the Hopper kernels compute beside their products: no branch, no
memory.

A hook in one of them becomes methods of the rendered struct; a kernel computes any other as it
stands, with nothing under way."""

from __future__ import annotations

import functools

from tilewright import dtypes
from tilewright.attention.tracing import SCORE
from tilewright.attention.variant import all_of, conditions
from tilewright.ir.nodes import Binary, Cast, Const, Expr, Load, Unary, Var, binary, unary
from tilewright.ir.rewrite import walk

ONE, ZERO = Const(1.0, dtypes.float32), Const(0, dtypes.int32)


def logits(e: Expr, lies: bool) -> tuple[dict[str, int], dict[str, Expr]]:
    """Constants and methods of logits. DIRECT: the score itself or, where it BENDS, outer ·
    tanh(inner · score); where it LEANS, plus slope · distance, if keys `lie` at their numbers."""
    inner, outer, slope, distance, bends, leans = ONE, ONE, ONE, ZERO, False, False
    if isinstance(e, Binary) and e.op == "+" and lies:
        found = _line(e.b)
        if found:
            e, (slope, distance), leans = e.a, found, True
    for tanh in walk(e, Unary):
        a, b = _factor(tanh.a, SCORE), _factor(e, tanh)
        if tanh.op == "tanh" and a is not None and b is not None:
            inner, outer, bends = a, b, True
    methods = {
        "float inner()": inner, "float outer()": outer,
        "float slope(const At& at)": slope, "int distance(const At& at)": distance,
    }  # fmt: skip
    direct = bends or e == SCORE
    return {"DIRECT": int(direct), "BENDS": int(bends), "LEANS": int(direct and leans)}, methods


def limit(mask: Expr, lies: bool) -> tuple[dict[str, int], dict[str, Expr]]:
    """Constants and methods of a mask. LIMITED: `rest`, and keys up to `limit`, where they lie at
    their numbers. READS: it reads tensors."""
    limits, rest = [], []
    for e in conditions(mask):
        a, b = (e.b, e.a) if isinstance(e, Binary) and e.op == ">=" else (e.a, e.b)
        if isinstance(e, Binary) and e.op in ("<=", ">=") and _is_key(a) and not _differs(b):
            limits.append(b)
        else:
            rest.append(e)
    least = functools.reduce(functools.partial(binary, "min"), limits) if limits else ZERO
    methods = {"int limit(const At& at)": least, "bool rest(const At& at)": all_of(rest)}
    reads = any(x.index for x in walk(mask, Load))
    return {"LIMITED": int(lies and bool(limits)), "READS": int(reads)}, methods


def _line(e: Expr) -> tuple[Expr, Expr] | None:
    """a · b, where b is a distance that grows by 1 from a key to the next, and a reads no key."""
    if isinstance(e, Binary) and e.op == "*":
        for a, b in ((e.a, e.b), (e.b, e.a)):
            d = b.a if isinstance(b, Cast) else b
            if not isinstance(d, Binary) or d.op != "-" or _differs(a):
                continue
            if _is_key(d.a) and not _differs(d.b):
                return a, d
            if _is_key(d.b) and not _differs(d.a):
                return unary("-", a), binary("-", d.b, d.a)
    return None


def _is_key(e: Expr) -> bool:
    return isinstance(e, Var) and e.name in ("at.kv", "at.key")


def _differs(e: Expr) -> bool:
    """Whether e differs between the keys of a row."""
    return any(_is_key(x) or x == SCORE for x in walk(e, Var))


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
