"""Pass: iterations that add nothing, because a condition fails in all of them, are left out."""

from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir
from tilewright.ir.affine import affine, extreme, slack_of


def narrow_loops(program: ir.Program) -> ir.Program:
    """Loops that reduce end, or begin, where the condition of all terms can hold for one inside.

    before: for j in 0:n                                    after: for j in 0:min(n, i + 1)
              s = where(j <= i, x[i, j], -inf)                       …
              top = max(s over j) online
              out = sum(top.weight * V[j, c] over j) by top.factor

    Terms add nothing where they are the identity, or relative to a maximum whose terms are."""
    return ir.map_bodies(program, _visit)


def _visit(s: Any) -> Any:
    if type(s) is not ir.For or s.kind not in ("serial", "pipeline") or s.private:
        return ir.rebuild(s, _visit) if isinstance(s, (ir.Seq, ir.For, ir.If)) else s
    every = list(ir.walk(s, ir.Compute))
    sums = [(c, n) for c in every if ir.reduces(s, c) for n in range(len(c.sums))]
    kept = (c for c in every if c.out.buffer.scope != "register" and not ir.reduces(s, c))
    is_tile, narrowed = any(s.name in (c.mma or ()) for c in every), s
    if sums and not is_tile and not any(kept):
        for cond in set.intersection(*(_conditions(*x, every) for x in sums)):
            narrowed = _narrowed(narrowed, cond, ir.path_to(s.body, sums[0][0]) or [])
    return ir.rebuild(s, _visit) if narrowed is s else narrowed


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
        return replace(f, end=ir.binary("min", f.end, ir.add(last, 1)))
    return replace(f, begin=ir.binary("max", f.begin, ir.binary("-", 0, last)))
