"""Ascending lists of coordinates: the stored coordinates of a structure below known ones, and the
loops that walk several such lists together."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import add
from tilewright.lower.scope import Scope, Walk
from tilewright.lower.tables import Driver, Tables


@dataclass(frozen=True, slots=True)
class List:
    """The stored coordinates of a structure along its last level: `keys[begin:end]`."""

    driver: Driver
    keys: ir.Buffer
    begin: ir.Expr
    end: ir.Expr


def has_list(tables: Tables, driver: Driver, axis: str, bound: Container[str]) -> bool:
    """Whether the coordinates of `axis` that a structure stores are a list, where the coordinates
    `bound` are known."""
    *above, last = tables.levels(driver.structure)
    return (
        last.ordered and last.unique and bool(last.keys) and not last.block
        and driver.indices[last.dim] == axis
        and all(x.unique and driver.indices[x.dim] in bound for x in above)
        and axis not in {driver.indices[x.dim] for x in above}
    )  # fmt: skip


def list_of(scope: Scope, driver: Driver, lets: list[ir.Stmt]) -> List:
    """The stored list of a structure below the coordinates that `scope` knows; empty where the
    levels above do not store those. Searches are appended to `lets`."""
    tables, depth = scope.tables, len(scope.tables.levels(driver.structure)) - 1
    if not scope.is_read_at(driver):
        walks = {driver.structure: Walk(driver.indices)}
        scope = Scope(tables, scope.coordinates, scope.block_parts, walks)
    parent = scope.position(driver.structure, depth - 1)
    begin, end, _ = scope.copy().range_of(driver.structure, depth, parent, lets)
    level, storage = scope.storage(driver.structure, depth)
    return List(driver, storage[level.keys], ir.cast(begin, tables.index), end)


def merge_of(var: ir.Var, lists: list[List], op: str, axes: tuple[str, ...]) -> ir.Merge:
    """The loop over several lists, without a body."""
    zero = ir.Const(0, var.dtype)
    longest = add(zero, *(ir.binary("-", x.end, x.begin) for x in lists))
    runs = tuple(ir.Load(x.keys, (x.begin,), x.keys.dtype) for x in lists)
    ends = tuple(x.end for x in lists)
    return ir.Merge(var, zero, longest, ir.Seq(()), axes=axes, runs=runs, ends=ends, op=op)
