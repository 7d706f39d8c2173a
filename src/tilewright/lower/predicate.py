"""Pass: the guard of a sum moves into the loads that need it."""

from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir
from tilewright.ir.names import values_name


def predicate_loads(program: ir.Program) -> ir.Program:
    """A guarded sum of products is added without a branch: the loads under the guard become
    predicated, 0 where it fails. A branch would separate the loads of unrolled iterations, and
    their latencies would add up.

    before: if j >= 0                                after: acc += A.values[p]
              acc += A.values[p] * X[j, k]                         * where(j >= 0, X[j, k], 0)
    before: if p < end                               after: let j = where(p < end, idx[p], 0)
              let j = idx[p]                                acc += where(p < end, A.values[p], 0)
              acc += A.values[p] * X[j, k]                       * where(p < end, X[j, k], 0)

    Under a test of a padded coordinate the values of the format are loaded as they are where
    padding holds 0, not another fill. Only products of loads: another factor could be infinite,
    and 0 · ∞ is not 0.
    """
    filled = {values_name(t.name) for t in program.tensors if t.is_sparse and t.fill != 0}
    return ir.map_bodies(program, lambda body: ir.transform(body, lambda s: _visit(s, filled)))


def _visit(s: Any, filled: set[str]) -> Any:
    if not isinstance(s, ir.If):
        return s
    cond, names = s.cond, ir.free_vars(s.cond)
    padding = isinstance(cond, ir.Binary) and cond.op == ">=" and ir.is_const(cond.b, 0)

    def guarded(x: ir.Load) -> bool:
        return not padding or x.buffer.name in filled or bool(ir.free_vars(x) & names)

    body = _rewrite(s.body, s.cond, guarded)
    return s if body is None else body


def _rewrite(s: ir.Stmt, cond: ir.Expr, guarded: Any) -> ir.Stmt | None:
    """The statement without its guard, or None where it is no sum of products."""
    if isinstance(s, ir.For) and s.kind in ("vector", "unroll"):
        body = _rewrite(s.body, cond, guarded)
        return None if body is None else replace(s, body=body)
    if isinstance(s, ir.Seq):
        parts = [_rewrite(b, cond, guarded) for b in s.body]
        return None if None in parts else ir.seq(*(p for p in parts if p is not None))
    if isinstance(s, ir.Let):
        if isinstance(s.value, ir.Search):  # stays inside its array, whatever the key
            return s
        is_load = isinstance(s.value, ir.Load)
        return ir.Let(s.var, ir.zero_unless(cond, s.value)) if is_load else None
    if not isinstance(s, ir.Store) or s.buffer.scope != "register" or s.op != "sum":
        return None
    is_product = _is_product(s.value, guarded)
    return replace(s, value=_guard_loads(s.value, cond, guarded)) if is_product else None


def _is_product(e: ir.Expr, guarded: Any) -> bool:
    if isinstance(e, ir.Cast):
        return _is_product(e.a, guarded)
    if isinstance(e, ir.Binary) and e.op == "*":
        return _is_product(e.a, guarded) and _is_product(e.b, guarded)
    return isinstance(e, ir.Load) and (e.buffer.scope == "part" or guarded(e))


def _guard_loads(e: ir.Expr, cond: ir.Expr, guarded: Any) -> ir.Expr:
    if isinstance(e, ir.Load):
        return ir.zero_unless(cond, e) if guarded(e) else e
    return ir.rebuild(e, lambda c: _guard_loads(c, cond, guarded))
