"""Fuses a statement that is a function of reductions with these reductions.

`out[i, j] = max(out.0[i, j] + b[j], 0)` and `out.0[i, j] = sum(… over k)` become one statement with
the loops of the sum. The function, called its epilogue, is computed for an element as soon as the
element's sum is complete, so `out.0` needs no memory.
"""

from dataclasses import dataclass

from tilewright.ir import core as ir
from tilewright.lower.drivers import driver_of, iteration, outer_driver
from tilewright.lower.tables import Statement, names_read


@dataclass(frozen=True, slots=True)
class Fused(Statement):
    """`out = epilogue(totals)`. Its reductions have the same output indices, axes and driver; the
    fields of `Statement` are those of the first."""

    epilogue: ir.Expr
    totals: tuple[Statement, ...]

    @property
    def values(self) -> tuple[ir.Expr, ...]:
        return (*(t.value for t in self.totals), self.epilogue)


def fused(
    root: Statement, temps: list[Statement], structure: str, merged: bool = False
) -> tuple[Statement, list[Statement]]:
    """The root together with the reductions that it can be the epilogue of, and the other ones.

    before: out.0[i, j] = sum(A[i, k] * B[k, j] over k);  out[i, j] = max(out.0[i, j] + b[j], 0)
    after:  out[i, j] = max(out.0 + b[j], 0) where out.0 = sum(A[i, k] * B[k, j] over k)

    Those that follow `structure`, the driver of the nest, come first. `merged`: also reductions
    that depend on fewer indices, which are then computed for each element anew.
    """
    if root.op:
        return root, temps
    read = names_read(root.value) - names_read(*(t.value for t in temps))
    own = set(ir.indices_of(root.out))

    def is_candidate(t: Statement) -> bool:
        needs, it = set(ir.indices_of(t.out)), iteration(t)
        walks_one = not (it and it.op) and not (root.out.tensor.is_sparse and it)
        depends = needs == own or (merged and needs < own)
        return t.out.tensor.name in read and walks_one and depends

    def is_elsewhere(t: Statement) -> bool:
        return getattr(outer_driver(t), "structure", "") != structure

    candidates = sorted(filter(is_candidate, temps), key=is_elsewhere)
    if not candidates:
        return root, temps
    first = candidates[0]
    loops = first.axes, driver_of(first)
    group = [t for t in candidates if (t.axes, driver_of(t)) == loops]
    joined = Fused(root.out, first.op, first.axes, first.value, root.value, tuple(group))
    return joined, [t for t in temps if t not in group]
