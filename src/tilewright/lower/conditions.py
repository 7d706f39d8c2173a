"""Passes on conditions: iterations that add nothing, because a condition fails in all of them, are
left out; the guard of a sum moves into the loads that need it.
"""

from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir
from tilewright.ir.affine import affine, extreme, slack_of
from tilewright.ir.names import values_name


def narrow_loops(program: ir.Program) -> ir.Program:
    """Loops that reduce end, or begin, where the condition of all terms can hold for one inside.

    before: for j in 0:n                                    after: for j in 0:min(n, i + 1)
              s = where(j <= i, x[i, j], -inf)                       …
              top = max(s over j) online
              out = sum(top.weight * V[j, c] over j) by top.factor

    Terms add nothing where they are the identity, or relative to a maximum whose terms are."""
    return ir.map_bodies(program, _narrow)


def _narrow(s: Any) -> Any:
    if type(s) is not ir.For or s.kind not in ("serial", "pipeline") or s.private:
        return ir.rebuild_body(s, _narrow)
    every = list(ir.walk(s, ir.Compute))
    sums = [(c, n) for c in every if ir.reduces(s, c) for n in range(len(c.sums))]
    kept = (c for c in every if c.out.buffer.scope != "register" and not ir.reduces(s, c))
    is_tile, narrowed = any(s.name in (c.mma or ()) for c in every), s
    if sums and not is_tile and not any(kept):
        for cond in set.intersection(*(_conditions(*x, every) for x in sums)):
            narrowed = _narrowed(narrowed, cond, ir.path_to(s.body, sums[0][0]) or [])
    return ir.rebuild_body(s, _narrow) if narrowed is s else narrowed


def _conditions(c: ir.Compute, n: int, every: list[ir.Compute]) -> set[ir.Expr]:
    """Conditions without which term `n` of a statement adds nothing."""
    (op, value), factor = c.sums[n], c.reductions[n].factor if c.reductions else None
    for top in every:
        if factor is not None and top.online and factor in top.online:
            return _conditions(top, 0, every)
    values = {x.out.buffer.name: x.value for x in every if not x.op}
    while isinstance(value, ir.Load) and value.buffer.name in values:
        value = values.pop(value.buffer.name)
    if isinstance(value, ir.Select) and value.b == ir.identity_of(op, value.dtype):
        return set(ir.conjuncts(value.cond))
    return set()


def _narrowed(f: ir.For, cond: ir.Expr, path: list[Any]) -> ir.For:
    """The loop without iterations for which `cond` fails in all loops of the path."""
    for let in reversed([x for x in path if isinstance(x, ir.Let)]):
        cond = ir.substitute(cond, {let.var.name: let.value})
    slack, inner = slack_of(cond), [x for x in path if isinstance(x, ir.For)]
    most = None if slack is None else extreme(slack, inner, largest=True)
    base, steps = (most is not None and affine(most, frozenset((f.name,)))) or (None, {})
    step = steps.get(f.name)
    if base is None or not isinstance(step, ir.Const) or not step.value:
        return f
    last = ir.binary("//", base, abs(int(step.value)))  # base + step · f >= 0
    if step.value < 0:
        if ir.reads_memory(last):  # it may be the largest number
            return replace(f, end=ir.add(ir.binary("min", ir.add(f.end, -1), last), 1))
        return replace(f, end=ir.binary("min", f.end, ir.add(last, 1)))
    return replace(f, begin=ir.binary("max", f.begin, ir.binary("-", 0, last)))


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

    def visit(s: Any) -> Any:
        if not isinstance(s, ir.If):
            return s
        cond, names = s.cond, ir.free_vars(s.cond)
        padding = isinstance(cond, ir.Binary) and cond.op == ">=" and ir.is_const(cond.b, 0)

        def guarded(x: ir.Load) -> bool:
            return not padding or x.buffer.name in filled or bool(ir.free_vars(x) & names)

        return _rewrite(s.body, s.cond, guarded) or s

    return ir.map_bodies(program, lambda body: ir.transform(body, visit))


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
    value = _predicated(s.value, cond, guarded)
    return None if value is None else replace(s, value=value)


def _predicated(e: ir.Expr, cond: ir.Expr, guarded: Any) -> ir.Expr | None:
    """A product of loads with those that are `guarded` predicated; None for any other value."""
    if isinstance(e, ir.Load):
        return ir.zero_unless(cond, e) if guarded(e) else e if e.buffer.scope == "part" else None
    is_product = isinstance(e, ir.Cast) or (isinstance(e, ir.Binary) and e.op == "*")
    factors = [_predicated(x, cond, guarded) for x in ir.children(e)] if is_product else [None]
    new = iter(factors)
    return None if None in factors else ir.rebuild(e, lambda _: next(new))
