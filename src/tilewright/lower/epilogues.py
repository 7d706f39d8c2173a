"""Fuses a statement that is a function of reductions with these reductions.

`out[i, j] = max(out.0[i, j] + b[j], 0)` and `out.0[i, j] = sum(… over k)` become one statement with
the loops of the sum. The function, called its epilogue, is computed for an element as soon as the
element's sum is complete, so `out.0` needs no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import walk
from tilewright.lower.drivers import driver_of, iteration, outer_driver
from tilewright.lower.tables import Statement, indices_in


@dataclass(frozen=True, slots=True)
class Fused(Statement):
    """`out = epilogue(totals)`. Its reductions have the same output indices, axes and driver; the
    fields of `Statement` are those of the first."""

    epilogue: ir.Expr
    totals: tuple[Statement, ...]


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
    read = set(_names_read(root))
    elsewhere = {name for t in temps for name in _names_read(t)}
    own = _indices(root)
    candidates = [
        t for t in temps
        if t.out.tensor.name in read - elsewhere
        and (_indices(t) == own or (merged and _indices(t) < own))
        and not (root.out.tensor.is_sparse and driver_of(t))
        and not _is_merged(t)
    ]  # fmt: skip
    candidates.sort(key=lambda t: _follows(t) != structure)
    group = [t for t in candidates if _loops(t) == _loops(candidates[0])]
    if not group:
        return root, temps
    first = group[0]
    joined = Fused(root.out, first.op, first.axes, first.value, root.value, tuple(group))
    return joined, [t for t in temps if t not in group]


def values_of(st: Statement) -> tuple[ir.Expr, ...]:
    """Every expression that a statement computes."""
    return (*(t.value for t in st.totals), st.epilogue) if isinstance(st, Fused) else (st.value,)


def _is_merged(t: Statement) -> bool:
    """Whether the loops of a reduction may follow several structures."""
    it = iteration(t)
    return it is not None and bool(it.op)


def _names_read(st: Statement) -> Iterator[str]:
    return (x.tensor.name for x in walk(st.value) if isinstance(x, ir.Access))


def _indices(st: Statement) -> set[str]:
    return {x.name for x in indices_in(st.out.coords)}


def _follows(t: Statement) -> str:
    driver = outer_driver(t)
    return driver.structure if driver else ""


def _loops(t: Statement) -> Any:
    return t.axes, driver_of(t)
