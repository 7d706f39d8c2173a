"""The order of the loops of a statement, and which output elements they visit."""

from collections.abc import Container
from dataclasses import dataclass

from tilewright.ir import core as ir
from tilewright.ir.levels import Level, lists_rows
from tilewright.lower.drivers import Iteration, driver_of
from tilewright.lower.tables import Driver, Statement, Tables


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """One loop to open: over the dimension of `axis`, over level `depth` of a structure, or over
    two levels at once (`fused`: the axis of the lower one); or over the last levels of several
    structures together (`merged`)."""

    axis: ir.Index
    structure: str = ""
    depth: int = -1
    level: Level | None = None
    fused: ir.Index | None = None
    merged: Iteration | None = None


def ordered_loops(
    tables: Tables, st: Statement, driver: Driver | None, bound: Container[str]
) -> list[LoopSpec]:
    """The loops of a statement, outermost first. Loops over output indices come before loops over
    reduced ones unless `Schedule.order_axes` chose another order; in each case a sparse level
    comes after the levels above it. Indices in `bound` have loops already and get none here."""
    axes = [x for x in ir.indices_of(st.out) if x.name not in bound] + list(st.axes)
    for order in tables.program.orders:
        if order[0] == st.out.tensor.name:
            rank = {name: r for r, name in enumerate(order[1:])}
            axes.sort(key=lambda x: rank.get(x.name, len(rank)))
    levels = _levels_to_walk(tables, st, driver, axes) if driver else []
    if driver and driver.structure in tables.program.fused and len(levels) == 2:
        rows, cols = levels
        both = LoopSpec(rows.axis, driver.structure, 1, cols.level, fused=cols.axis)
        return [both, *(LoopSpec(x) for x in axes if x not in (both.axis, both.fused))]
    result: list[LoopSpec] = []
    for axis in axes:
        for spec in [s for s in levels if s.axis.name == axis.name] or [LoopSpec(axis)]:
            _append(spec, levels, result)
    return result


def _levels_to_walk(
    tables: Tables, st: Statement, driver: Driver, axes: list[ir.Index]
) -> list[LoopSpec]:
    levels = tables.levels(driver.structure)
    # A reduction of dense values ranges over all coordinates, not over stored ones.
    partial = set() if driver_of(st) else {x.dim for x in levels if not x.full}
    by_name = {x.name: x for x in reversed(axes)}
    return [
        LoopSpec(axis, driver.structure, depth, level)
        for depth, level in enumerate(levels)
        if (axis := by_name.get(driver.indices[level.dim])) is not None
        and not (axis in st.axes and level.dim in partial)
    ]


def _append(spec: LoopSpec, levels: list[LoopSpec], result: list[LoopSpec]) -> None:
    """Adds a loop, behind the loops over the levels above a sparse one."""
    if spec in result:
        return
    if spec.level is not None and not spec.level.is_dense:
        for above in levels:
            if above.depth < spec.depth:
                _append(above, levels, result)
    result.append(spec)


def revisits_outputs(st: Statement, specs: list[LoopSpec]) -> bool:
    """Whether the loops come back to an output element after they were at another one, so that no
    accumulator can hold it."""
    reduced = {a.name for a in st.axes}
    is_sparse = st.out.tensor.is_sparse  # each stored entry is then an element of its own
    is_below_reduction = False
    for s in specs:
        if s.axis.name in reduced:
            is_below_reduction = True
            if s.fused is not None:
                return True
        elif s.merged is not None:
            return True
        elif s.level is not None:
            reduces = s.fused is not None and s.fused.name in reduced
            repeats = not s.level.unique and not is_sparse
            if reduces or repeats or (is_below_reduction and not s.level.is_dense):
                return True
    return False


def visits_all(tables: Tables, s: LoopSpec) -> bool:
    """Whether the loop of an output index visits every coordinate of its dimension."""
    if s.merged is not None:
        return False
    if s.level is None or (s.level.full and s.fused is None):
        return True
    fmt = tables.tensors[s.structure].format
    return s.depth == 0 and s.fused is None and fmt.covers_rows and lists_rows(s.level)
