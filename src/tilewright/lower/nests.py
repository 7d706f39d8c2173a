"""Builds the nest of loops over stored positions of one statement, for `lower.positions`.

The loops of the statement's indices are put in order (`loop_order`) and opened from the outermost
on; each adds the coordinates and positions that it binds to a `Scope`. The innermost loop holds the
statement, its accesses translated by `reads`. A reduction that the statement reads is computed in
the outermost loop that binds all its indices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tilewright.errors import ProgramError
from tilewright.ir import core as ir
from tilewright.ir.levels import Compressed, Level, may_miss
from tilewright.lower.drivers import Iteration, driver_of, drivers_read, iteration, outer_driver
from tilewright.lower.loop_order import LoopSpec, ordered_loops, revisits_outputs, visits_all
from tilewright.lower.placed import Row, check, online, refuse
from tilewright.lower.reads import Reader, appended
from tilewright.lower.scope import BlockPart, Scope, has_list
from tilewright.lower.tables import Driver, Statement, Tables, names_read, unmergeable, unsearchable

Wrap = Callable[[ir.Stmt], ir.Stmt]


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
        depends = needs == own or (merged and needs < own and own.isdisjoint(t.axes))
        return bool(t.op) and t.out.tensor.name in read and walks_one and depends

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


class BuiltNest(NamedTuple):
    """`driver`: the structure that the outer loops follow; `in_place`: the output is updated in
    memory, so that it needs a start value; `covers`: the loops store every output element."""

    body: ir.Stmt
    driver: Driver | None
    in_place: bool
    covers: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """The statement that loops are opened for. `shadowed`: indices that it reduces over and that a
    statement around it has too."""

    statement: Statement
    in_place: bool
    shadowed: frozenset[str] = frozenset()

    def tag(self, axis: str) -> str:
        """The name of the axis that a loop runs over. An index that shadows another of the same
        name has a tag of its own."""
        return f"{axis}.{self.statement.out.tensor.name}" if axis in self.shadowed else axis


class NestBuilder:
    """Builds the nest of `root` and of the inline reductions `temps`. `also`: lists that are
    appended to in the loops of the root."""

    def __init__(
        self, tables: Tables, root: Statement, temps: list[Statement],
        also: Sequence[Statement] = (),
    ) -> None:  # fmt: skip
        self.tables, self.root, self.also = tables, root, also
        self.emitted: set[str] = set()  # temporaries that are computed already
        self.placed = {p.temporary: p.loop for p in tables.program.placed}
        self.temps: list[Statement] = []
        for t in temps:  # a placed one may be the epilogue of those in front of it
            if t.out.tensor.name in self.placed:
                t, self.temps = fused(t, self.temps, "")
            self.temps.append(t)
        self.computed_in = {t.out.tensor.name: self._statement_around(t, root) for t in self.temps}

    def build(self) -> BuiltNest:
        st = self.root
        driver = driver_of(st) or (self._driver_inside() if self.tables.followed else None)
        if driver:
            self.tables.row_index[driver.structure] = driver.indices[0]
        scope = Scope(self.tables)
        specs = self._follow(st, driver, scope)
        is_sparse, reduced = st.out.tensor.is_sparse, {a.name for a in st.axes}
        own = (s for s in specs if s.axis.name not in reduced)
        covers = is_sparse or all(visits_all(self.tables, s) for s in own)
        is_update = bool(st.op) and not st.axes
        if st.op == "append":
            return BuiltNest(self._loops(_Target(st, False), specs, scope), driver, False, True)
        is_revisited = (self.tables.shared and not is_sparse) or revisits_outputs(st, specs)
        order = [s.axis.name in reduced for s in specs]
        is_fused = isinstance(st, Fused) and bool(self.temps) and not self.placed
        is_revisited |= is_fused and order != sorted(order)
        in_place = bool(st.op) and (is_update or is_revisited)
        body = self._loops(_Target(st, in_place), specs, scope)
        for name in {t.out.tensor.name for t in self.temps} & self.placed.keys() - self.emitted:
            raise refuse(name, f"{st.out} has no loop {self.placed[name]}", "a loop of its reader")
        body = online(body) if self.placed else body
        return BuiltNest(body, driver, in_place and not is_update, covers)

    # -- statements ----------------------------------------------------------------------------

    def _statement_around(self, t: Statement, root: Statement) -> str:
        """The output of the statement in whose loops `t` is computed: the root, or the reduction
        whose index it needs."""
        name = t.out.tensor.name
        own, around = (self._names_of(x, axes=False) for x in (t, root))
        if name in self.placed or own <= around:
            return root.out.tensor.name
        readers = (x for x in (*self.temps, self.root) if name in names_read(*x.values))
        return next(readers).out.tensor.name

    def _names_of(self, st: Statement, *, axes: bool = True) -> set[str]:
        return {x.name for x in (*ir.indices_of(st.out), *(st.axes if axes else ()))}

    def _temporary(self, t: Statement, scope: Scope) -> ir.Stmt:
        """The loops of a temporary inside those of another statement; none over an axis in whose
        loop it is placed."""
        tensor, loop = t.out.tensor, self.placed.get(t.out.tensor.name, "")
        driver, root, inside = driver_of(t), driver_of(self.root), scope.copy()
        around = (self.root, *(x for x in self.temps if x is not t))
        check(t, self.placed, self.emitted, set(scope.coordinates))
        for x in (x for st in around for e in st.values for x in ir.walk(e, ir.Access)):
            is_read = x.tensor.name == tensor.name
            for index, c in zip(t.out.coords, x.coords, strict=True) if is_read else ():
                if str(index) in scope.coordinates and c != index:
                    raise refuse(tensor.name, f"loop {index} reads {x}", f"outside of loop {index}")
        own = tuple(a for a in t.axes if a.name != loop)
        if own == t.axes:
            specs = self._follow(t, driver, inside)
        else:
            if driver != (root if root and loop in root.indices else None):
                raise refuse(tensor.name, f"loop {loop} has other coordinates", "another index")
            specs = self._follow(replace(t, axes=own), None, inside)
        if revisits_outputs(t, specs):
            rule = f"{t.out}, a reduction inside {self.root.out}, runs over rows stored in pieces"
            raise ProgramError("P107", rule)
        names = {name for x in around for name in self._names_of(x)}
        target = _Target(t, False, frozenset(a.name for a in own if a.name in names))
        if self.tables.tensors[tensor.name].role != "inline":
            return ir.seq(self._loops(target, specs, inside), ir.Sync())
        row = self.tables.rows[tensor.name] = Row.of(self.tables, t.out, scope)
        body = self._loops(target, specs, inside)
        return ir.seq(row.alloc(t.out, scope), body) if row.extents else body

    def _follow(self, st: Statement, driver: Driver | None, scope: Scope) -> list[LoopSpec]:
        if driver:
            scope.follow(driver, st)
        return self._merged(st, ordered_loops(self.tables, st, driver, scope.coordinates), scope)

    def _merged(self, st: Statement, specs: list[LoopSpec], scope: Scope) -> list[LoopSpec]:
        """The loops, with one over several lists in place of the reduced one where that is
        possible: a union must be merged, of an intersection the other structures are searched."""
        it = iteration(st)
        if it is None or not it.op:
            return specs
        bound = {s.axis.name for s in specs[:-1]} | scope.coordinates.keys()
        axis = specs[-1].axis if specs and specs[-1].fused is None else None
        lists = tuple(
            d for d in it.drivers
            if axis in st.axes and has_list(self.tables, d, specs[-1].axis.name, bound)
        )  # fmt: skip
        if st.op == "append" or it.op == "union":
            if lists != it.drivers:
                raise unmergeable(st, [self.tables.tensors[d.structure].format for d in it.drivers])
        elif len(lists) < 2 or lists[0] != it.drivers[0]:
            return self._scattered(st, specs, it, scope)
        return [*specs[:-1], replace(specs[-1], merged=replace(it, drivers=lists))]

    def _scattered(
        self, st: Statement, specs: list[LoopSpec], it: Iteration, scope: Scope
    ) -> list[LoopSpec]:
        """The loops of a product of two structures in the order of Gustavson, where that is
        possible: the last is over what the second stores at the coordinate of the reduction.

        before: for i; for j in 0:n; for k in A[i, :]
        after:  for i; for k in A[i, :]; for j in B[k, :]
        """
        *outer, inner = specs
        in_memory = st is self.root and not self.temps and st.out.dtype == st.value.dtype
        is_ordered = st.out.tensor.name in {order[0] for order in self.tables.program.orders}
        if not in_memory or is_ordered or inner.level is None:
            return specs
        for s in outer:
            rest = [x for x in outer if x is not s]
            bound = {x.axis.name for x in (*rest, inner)} | scope.coordinates.keys()
            for d in it.drivers[1:] if s.level is None and s.axis not in st.axes else ():
                if has_list(self.tables, d, s.axis.name, bound):
                    return [*rest, inner, replace(s, merged=Iteration((d,), "union"))]
        return specs

    def _driver_inside(self) -> Driver | None:
        """The driver of a reduction inside the root, where the root's own loops can follow it:
        where no level of theirs is below one that only the reduction walks."""
        own, followed = self._names_of(self.root, axes=False), self.tables.followed
        levels = self.tables.levels(followed)
        for driver in (*drivers_read(self.root), *map(outer_driver, self.temps)):
            if driver is None or driver.structure != followed:
                continue
            walked = [driver.indices[level.dim] in own for level in levels]
            own_levels = [(n, level) for n, level in enumerate(levels) if walked[n]]
            if own_levels and all(x.is_dense or all(walked[:n]) for n, x in own_levels):
                return driver
        if self.tables.is_composed(followed):
            raise unsearchable(followed, self.tables.tensors[followed].format)
        return None

    def _loops(self, target: _Target, specs: list[LoopSpec], scope: Scope) -> ir.Stmt:
        before: list[ir.Stmt] = []
        for t in self.temps:
            name = t.out.tensor.name
            is_inside = self.computed_in[name] == target.statement.out.tensor.name
            needed = {self.placed[name]} if name in self.placed else self._names_of(t, axes=False)
            if name not in self.emitted and is_inside and needed <= scope.coordinates.keys():
                self.emitted.add(name)
                own = (x for x in self.temps if x.out.tensor.name.startswith(f"{name}."))
                self.computed_in |= {x.out.tensor.name: self._statement_around(x, t) for x in own}
                before.append(self._temporary(t, scope))
        if not specs:
            return ir.seq(*before, self._leaf(target, scope))
        inside = scope.copy()
        wrap = self._open(specs[0], target, inside)
        return ir.seq(*before, wrap(self._loops(target, specs[1:], inside)))

    def _open(self, s: LoopSpec, target: _Target, scope: Scope) -> Wrap:
        """Enters a loop: adds its variable to `scope`, returns its wrapper of bodies."""
        if s.merged is not None:
            return self._open_merge(s, s.merged, target, scope)
        if s.level is None:
            var, end = self.tables.variable(s.axis.name), self.tables.size(s.axis.dim)
            scope.coordinates[s.axis.name] = var
            axes = (target.tag(s.axis.name),)
            return lambda body: ir.For(var, ir.Const(0, var.dtype), end, body, axes=axes)
        if s.fused is not None:
            return self._open_fused(s, s.fused, target, scope)
        return self._open_level(s, s.level, target, scope)

    def _open_merge(self, s: LoopSpec, it: Iteration, target: _Target, scope: Scope) -> Wrap:
        before: list[ir.Stmt] = []
        var, axis = self.tables.variable(f"{s.axis.name}_p"), self.tables.variable(s.axis.name)
        runs, ends = zip(*(scope.list_of(d, before) for d in it.drivers), strict=True)
        zero = ir.Const(0, var.dtype)
        lengths = (ir.binary("-", e, run.index[0]) for run, e in zip(runs, ends, strict=True))
        longest, axes = ir.add(zero, *lengths), (target.tag(s.axis.name),)
        for n, d in enumerate(it.drivers):
            position = ir.Cursor(var, n, self.tables.index, it.op == "union" and len(runs) > 1)
            scope.known_positions[d] = position
            if scope.is_read_at(d):
                scope.walks[d.structure].variables[s.depth] = position
        scope.coordinates[s.axis.name] = axis
        scope.rank = var
        key = ir.Let(axis, ir.Cursor(var, ir.KEY, axis.dtype))
        return lambda body: ir.seq(
            *before,
            ir.Merge(
                var, zero, longest, ir.seq(key, body), axes=axes, runs=runs, ends=ends, op=it.op
            ),
        )

    def _open_level(self, s: LoopSpec, level: Level, target: _Target, scope: Scope) -> Wrap:
        _, storage = scope.storage(s.structure, s.depth)
        zero = ir.Const(0, self.tables.index)
        # A dense level may be walked before the levels above it: its parent is only needed later.
        parent = zero if level.is_dense else scope.position(s.structure, s.depth - 1)
        before: list[ir.Stmt] = []
        begin, end, parent = scope.range_of(s.structure, s.depth, parent, before)
        row = self.tables.rows.get(target.statement.out.tensor.name)
        if row and row.tensor.is_sparse:
            if row.levels and not level.is_dense:
                raise refuse(row.tensor.name, "the lengths of its rows differ", 'scope="global"')
            row.levels.append((s.depth, begin, end))
        suffix = ("_i" if level.inner else "_o") if level.block else ""
        suffix += "_p" if level.keys or type(level).coord is not Level.coord else ""
        var = self.tables.variable(s.axis.name + suffix)
        variable: ir.Expr = parent if level.single else var
        scope.walks[s.structure].variables[s.depth] = variable
        coordinate = level.coord(storage, parent, variable)
        lets, guards = self._bind(s, level, coordinate, scope)
        if level.padded:
            c = coordinate if isinstance(coordinate, ir.Var) else lets[0].var
            guards.insert(0, level.guard(storage, parent, variable, c))
        if level.single:
            return lambda body: _inside(lets, guards, body)
        axes = (target.tag(s.axis.name),)
        return lambda body: ir.seq(
            *before, ir.For(var, begin, end, _inside(lets, guards, body), axes=axes)
        )

    def _bind(
        self, s: LoopSpec, level: Level, coordinate: ir.Expr, scope: Scope
    ) -> tuple[list[ir.Let], list[ir.Expr]]:
        """Names the coordinate of a level, (lets, guards); that of a blocked axis when both parts
        are known."""
        name, block = s.axis.name, level.block
        lets: list[ir.Let] = []
        guards: list[ir.Expr] = []
        if not isinstance(coordinate, ir.Var):
            var = self.tables.variable(name + (("_i" if level.inner else "_o") if block else ""))
            lets.append(ir.Let(var, coordinate))
            coordinate = var
        if not block:
            scope.coordinates[name] = coordinate
            return lets, guards
        scope.block_parts[BlockPart(name, block, level.inner)] = coordinate
        outer, inner = (scope.block_parts.get(BlockPart(name, block, x)) for x in (False, True))
        if outer is not None and inner is not None:
            joined = self.tables.variable(name)
            lets.append(ir.Let(joined, ir.add(ir.mul(outer, block), inner)))
            size = self.tables.size(s.axis.dim)
            if not (isinstance(size, ir.Const) and size.value % block == 0):
                guards.append(ir.binary("<", joined, size))
            scope.coordinates[name] = joined
        return lets, guards

    def _open_fused(self, s: LoopSpec, column: ir.Index, target: _Target, scope: Scope) -> Wrap:
        """Two levels as one loop over the entries of the lower one; a search in indptr gives the
        row."""
        upper, upper_storage = scope.storage(s.structure, 0)
        lower, storage = scope.storage(s.structure, 1)
        assert isinstance(lower, Compressed), "checked by the verb"
        row, col = s.axis.name, column.name
        var, i, j = map(self.tables.variable, (f"{row}{col}", row, col))
        rows = upper_storage.size if upper.is_dense else upper_storage.count
        zero = ir.Const(0, self.tables.index)
        parent = self.tables.variable(f"{row}_q")
        lets: list[ir.Stmt] = [
            ir.Let(parent, lower.parent(storage, rows, var)),
            ir.Let(i, upper.coord(upper_storage, parent, parent)),
            ir.Let(j, lower.coord(storage, parent, var)),
        ]
        scope.coordinates |= {row: i, col: j}
        scope.walks[s.structure].positions.update({0: parent, 1: var})
        axes = (target.tag(row), target.tag(col))
        return lambda body: ir.For(var, zero, storage.count, _inside(lets, [], body), axes=axes)

    def _leaf(self, target: _Target, scope: Scope) -> ir.Stmt:
        st, in_place = target.statement, target.in_place
        lets: list[ir.Stmt] = []
        reader = Reader(scope, lets)
        if st.op == "append":
            lists = (self.root, *self.also)
            return appended(reader, lists, [reader.expr(x.value.a) for x in lists])  # type: ignore[attr-defined]
        guards = self._stored_guard(st, scope, lets)
        it = iteration(st)
        merged = it is not None and it.exact and scope.rank is not None
        body = st.value.a if merged and isinstance(st.value, ir.Select) else st.value
        reductions, value = self._values(st, body, reader)
        out, inside = reader.element(st.out)
        if out.buffer.scope == "part" and may_miss(out.index[0]):
            inside = [ir.binary(">=", out.index[0], 0)]
        if in_place and out.dtype != value.dtype and not reductions:
            rule = f"{st.out.tensor.name} is {out.dtype}, and its sums in memory need {value.dtype}"
            hint = f'tw.out.typed("{value.dtype}")[…], or a format that keeps rows whole'
            raise ProgramError("P107", rule, hint=hint)
        op = "" if reductions else st.op
        if not op:
            value = ir.cast(value, out.dtype)
        axes = tuple(target.tag(a.name) for a in st.axes)
        shared = in_place and self.tables.shared
        compute = ir.Compute(out, value, op, axes, in_place, shared=shared, reductions=reductions)
        return _inside(lets, [*guards, *inside], compute)

    def _values(
        self, st: Statement, body: ir.Expr, reader: Reader
    ) -> tuple[tuple[ir.Reduction, ...], ir.Expr]:
        """The reductions of a statement with an epilogue, and the value that it stores; or
        `body` alone. A sum that is placed and kept in an array has its total for an epilogue."""
        name, rows = st.out.tensor.name, self.tables.rows
        if isinstance(st, Fused):
            rows |= {t.out.tensor.name: Row(t.out.tensor, (), ()) for t in st.totals}
            totals = ((rows[t.out.tensor.name].buffer, t) for t in st.totals)
            reductions = [ir.Reduction(b, t.op, reader.expr(t.value)) for b, t in totals]
            return tuple(reductions), reader.expr(st.epilogue)
        value = reader.expr(body)
        if not st.op or name not in self.placed or (name in rows and not rows[name].extents):
            return (), value
        total = ir.Buffer(f"{name}.0", value.dtype, (), "register")
        return (ir.Reduction(total, st.op, value),), ir.Load(total, (), total.dtype)

    def _stored_guard(self, st: Statement, scope: Scope, lets: list[ir.Stmt]) -> list[ir.Expr]:
        """The test that an entry is stored, for a reduction whose last level is searched."""
        driver = driver_of(st) if st.op else None
        if driver is None or not scope.is_read_at(driver):
            return []
        last = len(self.tables.levels(driver.structure)) - 1
        position = scope.position(driver.structure, last)
        if not may_miss(position):
            return []
        return [ir.binary(">=", scope.named_position(driver.structure, last, position, lets), 0)]


def _inside(lets: Sequence[ir.Stmt], guards: list[ir.Expr], body: ir.Stmt) -> ir.Stmt:
    """Lets, then the body under the guards that use them."""
    for g in reversed(guards):
        body = ir.If(g, body)
    return ir.seq(*lets, body)
