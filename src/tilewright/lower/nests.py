"""One statement as a nest of loops over stored positions: what `lower.positions` is made of.

The loops of a statement's indices are put in order (spatial ones first, a level never before its
parents), opened one by one (a level tells its range, its coordinate and its position), and the
statement stands in the innermost. Reductions it needs are placed as far out as they can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import nodes as ir
from tilewright.ir.levels import (
    Level,
    is_list_of_pairs,
    lists_rows,
    load_value,
    locate_pair,
    may_miss,
)  # fmt: skip
from tilewright.ir.names import PRIME, given
from tilewright.ir.ranges import interval
from tilewright.ir.rewrite import add, mul, simplify, walk
from tilewright.lower.tables import Statement, Tables, indices_in, shares_rows, unsearchable


@dataclass(frozen=True, slots=True)
class _Spec:
    """One loop to open: level `depth` of a structure, a dense axis, or two levels as one
    (`fused`)."""

    axis: ir.Index
    structure: str = ""
    depth: int = -1
    level: Level | None = None
    fused: ir.Index | None = None


@dataclass(slots=True)
class _Env:
    """What is known at a place of the nest: coordinates that are bound, positions of structures."""

    bound: dict[str, ir.Expr] = field(default_factory=dict)
    halves: dict[tuple[str, int, bool], ir.Expr] = field(default_factory=dict)
    vars: dict[tuple[str, int], ir.Expr] = field(default_factory=dict)
    pos: dict[tuple[str, int], ir.Expr] = field(default_factory=dict)
    coords: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[tuple[str, tuple[str, ...]], ir.Expr] = field(default_factory=dict)

    def copy(self) -> _Env:
        return _Env(*(dict(getattr(self, f.name)) for f in fields(self)))


class NestBuilder:
    """Builds the nest of one root statement under one choice of formats."""

    def __init__(
        self,
        owner: Tables,
        root: Statement,
        temps: list[Statement],
        structure: str,
        *,
        shared: bool,
    ) -> None:
        self.owner, self.root, self.temps = owner, root, temps
        self.structure, self.shared = structure, shared
        self.followed: tuple[str, tuple[str, ...]] | None = None  # what the root's loops follow
        self.placed: set[str] = set()
        self.in_place = False
        self.covers = True  # whether the root's loops visit every element of its output
        self.rows: dict[str, str] = {}  # structure -> the index of the rows it is followed at
        self.at = root  # the statement whose loops are being opened
        self.hidden: frozenset[str] = frozenset()
        self.home = {t.out.tensor.name: self._home(t) for t in temps}

    def _home(self, t: Statement) -> str:
        """The statement inside whose loops `t` stands: the root, or the reduction whose index it
        needs."""
        spatial = {x.name for x in indices_in(self.root.out.coords)}
        needed = {x.name for x in indices_in(t.out.coords)}
        if needed <= spatial:
            return self.root.out.tensor.name
        for reader in (*self.temps, self.root):
            if any(
                isinstance(x, ir.Access) and x.tensor.name == t.out.tensor.name
                for x in walk(reader.value)
            ):
                return reader.out.tensor.name
        raise AssertionError(f"nobody reads {t.out}")

    def build(self) -> ir.Stmt:
        return self.emit(self.root, _Env())

    def emit(self, st: Statement, env: _Env) -> ir.Stmt:
        driver = self.owner.driver(st)
        if driver is None and st is self.root and self.structure:
            driver = self._borrowed(st)
        if driver:
            env = env.copy()
            if not hasattr(self.owner.format[driver[0]], "levels"):
                raise unsearchable(driver[0], self.owner.format[driver[0]])
            if st is self.root:
                self.followed = driver
                self.rows[driver[0]] = driver[1][0]
            else:
                self._check_whole_rows(st, driver)
            self._follow(st, driver, env)
        specs = self._ordered(st, driver, env)
        if st is self.root and not st.out.tensor.is_sparse:
            reduced = {a.name for a in st.axes}
            self.covers = all(self._visits_all(s) for s in specs if s.axis.name not in reduced)
        adds = bool(st.op) and not st.axes  # update(…).add: to what the caller's array holds
        in_place = adds or (bool(st.op) and self._is_in_place(st, specs))
        if in_place and st is not self.root:
            raise ProgramError(
                "P107",
                f"a reduction inside {self.root.out.tensor.name} meets rows stored in pieces",
            )
        self.in_place |= in_place and not adds
        around, hidden = self.at, self.hidden
        self.at, self.hidden = st, frozenset()
        if st is not self.root:
            others = (self.root, *(t for t in self.temps if t is not st))
            known = {x.name for o in others for x in (*indices_in(o.out.coords), *o.axes)}
            self.hidden = frozenset({a.name for a in st.axes} & known)
        nest = self._loops(st, specs, env, in_place)
        self.at, self.hidden = around, hidden
        return nest

    def _visits_all(self, s: _Spec) -> bool:
        """Whether the loop of an output index visits every coordinate of its dimension."""
        if s.level is None or (s.level.full and s.fused is None):
            return True
        fmt = self.owner.tensors[s.structure].format
        return s.depth == 0 and s.fused is None and fmt.covers_rows and lists_rows(s.level)

    def _borrowed(self, st: Statement) -> tuple[str, tuple[str, ...]] | None:
        """The driver of a reduction inside the root, where the root's own loops can follow it:
        where no level of theirs stands below one that only the reduction walks."""
        own = {x.name for x in indices_in(st.out.coords)}
        levels = self.owner.format[self.structure].levels
        for driver in map(self.owner.borrowable, self.temps):
            if driver is None or driver[0] != self.structure:
                continue
            walked = [driver[1][level.dim] in own for level in levels]
            reaches = (
                level.is_dense or all(walked[:depth])
                for depth, level in enumerate(levels)
                if walked[depth]
            )
            if any(walked) and all(reaches):
                return driver
        if hasattr(self.owner.tensors[self.structure].format, "parts"):
            raise unsearchable(self.structure, self.owner.tensors[self.structure].format)
        return None

    def _follow(self, st: Statement, driver: tuple[str, tuple[str, ...]], env: _Env) -> None:
        """Makes `driver` what its structure is read at. Positions below a level that is opened
        anew, or that belong to other indices, are forgotten; a whole old position stays known."""
        structure, names = driver
        levels = self.owner.format[structure].levels
        old = env.coords.get(structure, names)
        if old != names and all((structure, d) in env.vars for d in range(len(levels))):
            env.places[structure, old] = self._position(structure, len(levels) - 1, env)
        env.coords[structure] = names
        anew = {a.name for a in (*indices_in(st.out.coords), *st.axes) if a.name not in env.bound}
        anew |= {a.name for a in st.axes}
        for axis, block, inner in list(env.halves):
            if axis in anew:
                del env.halves[axis, block, inner]
        moved = False
        for depth, level in enumerate(levels):
            other = names[level.dim] in anew or old[level.dim] != names[level.dim]
            if other or (moved and not level.is_dense):
                env.vars.pop((structure, depth), None)
            if other or moved:
                env.pos.pop((structure, depth), None)
                moved = True

    def _check_whole_rows(self, st: Statement, driver: tuple[str, tuple[str, ...]]) -> None:
        """A reduction inside another statement is finished before it is read: its rows are
        whole."""
        structure, names = driver
        reduced = {a.name for a in st.axes}
        levels = self.owner.format[structure].levels
        pieces = any(not x.unique and names[x.dim] not in reduced for x in levels)
        if pieces or (self._is_part(structure) and (self.shared or names[0] in reduced)):
            raise shares_rows(self.root.out.tensor.name, self.owner.tensors[structure].format)
        self._check_own_rows(structure, names)

    def _is_part(self, structure: str) -> bool:
        """Whether the nest sees only a part of a structure."""
        return structure == self.structure and hasattr(
            self.owner.tensors[structure].format, "parts"
        )

    def _check_own_rows(self, structure: str, names: tuple[str, ...]) -> None:
        """A part is read at its own rows only: other rows may be in other parts."""
        own = self.rows.setdefault(structure, names[0])
        if self._is_part(structure) and (own != names[0] or self.shared):
            raise unsearchable(structure, self.owner.tensors[structure].format)

    def _loops(self, st: Statement, specs: list[_Spec], env: _Env, in_place: bool) -> ir.Stmt:
        before: list[ir.Stmt] = []
        for t in self.temps:
            name = t.out.tensor.name
            ready = all(x.name in env.bound for x in indices_in(t.out.coords))
            if name not in self.placed and self.home[name] == st.out.tensor.name and ready:
                self.placed.add(name)
                before.append(self.emit(t, env))
        if not specs:
            return ir.seq(*before, self._leaf(st, env, in_place))
        inside = env.copy()
        wrap = self._open(specs[0], inside)
        return ir.seq(*before, wrap(self._loops(st, specs[1:], inside, in_place)))

    # -- order -------------------------------------------------------------------------------

    def _ordered(
        self, st: Statement, driver: tuple[str, tuple[str, ...]] | None, env: _Env
    ) -> list[_Spec]:
        spatial = [x for x in indices_in(st.out.coords) if x.name not in env.bound]
        wanted = [*spatial, *st.axes]
        for order in self.owner.program.orders:
            if order[0] == st.out.tensor.name:
                rank = {name: r for r, name in enumerate(order[1:])}
                wanted.sort(key=lambda x: rank.get(x.name, len(rank)))
        levels: dict[int, _Spec] = {}
        if driver:
            structure, names = driver
            # A reduction of dense values ranges over all coordinates, not over stored ones.
            partial = {x.dim for x in self.owner.format[structure].levels if not x.full}
            partial = partial if self.owner.driver(st) is None else set()
            for depth, level in enumerate(self.owner.format[structure].levels):
                axis = next((x for x in wanted if x.name == names[level.dim]), None)
                if axis is not None and not (axis in st.axes and level.dim in partial):
                    levels[depth] = _Spec(axis, structure, depth, level)
            if structure in self.owner.program.fused and len(levels) == 2:
                both = _Spec(levels[0].axis, structure, 1, levels[1].level, fused=levels[1].axis)
                rest = [x for x in wanted if x not in (both.axis, both.fused)]
                return [both, *(_Spec(x) for x in rest)]
        result: list[_Spec] = []

        def place(spec: _Spec) -> None:
            if spec in result:
                return
            if spec.level is not None and not spec.level.is_dense:
                for depth in sorted(levels):
                    if depth < spec.depth:
                        place(levels[depth])
            result.append(spec)

        for axis in wanted:
            mine = [s for s in levels.values() if s.axis.name == axis.name]
            for spec in mine or [_Spec(axis)]:
                place(spec)
        return result

    def _is_in_place(self, st: Statement, specs: list[_Spec]) -> bool:
        """Whether an output element is met again after other elements: no accumulator can hold
        it."""
        reduced = {a.name for a in st.axes}
        is_sparse = st.out.tensor.is_sparse  # each stored entry is then an element of its own
        seen_reduction = False
        for s in specs:
            if s.axis.name in reduced:
                seen_reduction = True
                if s.fused is not None:
                    return True
            elif (
                (s.fused is not None and s.fused.name in reduced)
                or (s.level is not None and not s.level.unique and not is_sparse)
                or (s.level is not None and not s.level.is_dense and seen_reduction)
            ):
                return True
        return self.shared and st is self.root and not is_sparse

    # -- opening a loop ----------------------------------------------------------------------

    def _open(self, s: _Spec, env: _Env) -> Callable[[ir.Stmt], ir.Stmt]:
        """Enters the loop of `s`: updates `env`, returns what wraps a body into it."""
        if s.fused is not None:
            return self._open_fused(s, env)
        name = s.axis.name
        tag = self._tag(name)
        if s.level is None:
            var = ir.Var(self._fresh(name), self.owner.index)
            env.bound[name] = var
            end = self.owner.size(s.axis.dim)
            return lambda body: ir.For(var, ir.Const(0, var.dtype), end, body, axes=(tag,))
        level, storage = self.owner.storage(s.structure, s.depth)
        zero = ir.Const(0, self.owner.index)
        # A dense level may be walked before the levels above it: its parent is only needed later.
        q = zero if level.is_dense else self._position(s.structure, s.depth - 1, env)
        found: list[ir.Stmt] = []
        if may_miss(q):  # nothing is stored there: an empty range
            q, found = self._named(s.structure, s.depth - 1, q, env)
        begin, end = level.loop(storage, q)
        if found:
            stored = ir.binary(">=", q, 0)
            begin, end = ir.select(stored, begin, zero), ir.select(stored, end, zero)
        suffix = ("_i" if level.inner else "_o") if level.block else ""
        is_own_coord = level.is_dense or not level.arrays or level.arrays == ("indptr",)
        var = ir.Var(self._fresh(name + suffix + ("" if is_own_coord else "_p")), self.owner.index)
        single = "indices" in level.arrays and not level.pads and "indptr" not in level.arrays
        v: ir.Expr = q if single else var
        env.vars[s.structure, s.depth] = v
        lets, guards = self._bind(s, level, level.coord(storage, q, v), env)
        if single:
            return lambda body: _inside(lets, guards, body)
        return lambda body: ir.seq(
            *found, ir.For(var, begin, end, _inside(lets, guards, body), axes=(tag,))
        )

    def _named(
        self, structure: str, depth: int, q: ir.Expr, env: _Env
    ) -> tuple[ir.Var, list[ir.Stmt]]:
        """A located position under a name of its own."""
        var = ir.Var(self._fresh(f"{structure}_q{depth}"), q.dtype)
        env.pos[structure, depth] = var
        return var, [ir.Let(var, q)]

    def _bind(
        self, s: _Spec, level: Level, coord: ir.Expr, env: _Env
    ) -> tuple[list[ir.Stmt], list[ir.Expr]]:
        """Names the coordinate; whole axes at once, blocked ones when both halves are known."""
        name, lets, guards = s.axis.name, [], []
        if not isinstance(coord, ir.Var):
            known = ir.Var(self._fresh(name + ("_o" if level.block else "")), self.owner.index)
            lets.append(ir.Let(known, coord))
            coord = known
            if level.pads:
                guards.append(ir.binary(">=", known, 0))
        if not level.block:
            env.bound[name] = coord
            return lets, guards
        block = level.block
        env.halves[name, block, level.inner] = coord
        if (name, block, not level.inner) in env.halves:
            outer, inner = env.halves[name, block, False], env.halves[name, block, True]
            whole = ir.Var(self._fresh(name), self.owner.index)
            lets.append(ir.Let(whole, add(mul(outer, level.block), inner)))
            size = self.owner.size(s.axis.dim)
            if not (isinstance(size, ir.Const) and size.value % level.block == 0):
                guards.append(ir.binary("<", whole, size))
            env.bound[name] = whole
        return lets, guards

    def _open_fused(self, s: _Spec, env: _Env) -> Callable[[ir.Stmt], ir.Stmt]:
        """Two levels walked as one: entry e of the lower level; its row by search in indptr."""
        assert s.fused is not None
        upper, upper_storage = self.owner.storage(s.structure, 0)
        lower, storage = self.owner.storage(s.structure, 1)
        assert storage.indptr is not None, "checked by the verb"
        row, col = s.axis.name, s.fused.name
        var = ir.Var(self._fresh(f"{row}{col}"), self.owner.index)
        i, j = (
            ir.Var(self._fresh(row), self.owner.index),
            ir.Var(self._fresh(col), self.owner.index),
        )
        rows = upper_storage.size if upper.is_dense else upper_storage.count
        q = ir.Search(
            storage.indptr, ir.Const(0, self.owner.index), add(rows, 1), var, True, self.owner.index
        )
        parent = ir.Var(self._fresh(f"{row}_q"), self.owner.index)
        lets: list[ir.Stmt] = [
            ir.Let(parent, q),
            ir.Let(i, upper.coord(upper_storage, parent, parent)),
            ir.Let(j, lower.coord(storage, parent, var)),
        ]
        env.bound |= {row: i, col: j}
        env.pos |= {(s.structure, 0): parent, (s.structure, 1): var}
        zero = ir.Const(0, var.dtype)
        return lambda body: ir.For(
            var, zero, storage.count, _inside(lets, [], body), axes=(self._tag(row), self._tag(col))
        )

    def _position(self, structure: str, depth: int, env: _Env) -> ir.Expr:
        """The position at a level: known from a loop, or located from bound coordinates."""
        if depth < 0:
            return ir.Const(0, self.owner.index)
        if (structure, depth) in env.vars:
            level, storage = self.owner.storage(structure, depth)
            q = self._position(structure, depth - 1, env)
            return level.pos(storage, q, env.vars[structure, depth])
        if (structure, depth) not in env.pos:
            level, storage = self.owner.storage(structure, depth)
            if not level.unique:
                raise unsearchable(structure, self.owner.format[structure])
            axis = env.coords[structure][level.dim]
            if (axis, level.block, level.inner) in env.halves:
                coord = env.halves[axis, level.block, level.inner]
            else:
                coord = _part_of(level, env.bound[axis])
            q = self._position(structure, depth - 1, env)
            position = level.locate(storage, q, coord)
            if may_miss(q) and not level.is_dense:  # nothing is stored above: nothing is read below
                position = ir.select(
                    ir.binary(">=", q, 0), position, ir.as_expr(-1, self.owner.index)
                )
            env.pos[structure, depth] = position
        return env.pos[structure, depth]

    def _fresh(self, name: str) -> str:
        """`name` without primes, or with a number where another loop of the nest already has it."""
        name = name.replace(PRIME, "")
        chosen, n = name, 1
        while chosen in self.owner.names:
            n += 1
            chosen = f"{name}{n}"
        self.owner.names.add(chosen)
        return chosen

    # -- the innermost statement -------------------------------------------------------------

    def _leaf(self, st: Statement, env: _Env, in_place: bool) -> ir.Stmt:
        lets: list[ir.Stmt] = []
        guards = self._stored_guard(st, env, lets)
        value = self._resolve(st.value, env, lets)
        target = st.out.tensor
        if target.is_sparse:
            last = len(self.owner.format[target.structure].levels) - 1
            out = ir.Load(
                self.owner.values(target),
                (self._position(target.structure, last, env),),
                target.dtype,
            )
        else:
            coords = tuple(self._resolve(c, env, lets) for c in st.out.coords)
            guards += self._within(target, st.out, coords)
            out = ir.Load(self.owner.buffer(target), coords, target.dtype)
        if in_place and out.dtype != value.dtype:
            raise ProgramError(
                "P107",
                f"{target.name} is added to in memory, in {out.dtype}, where {value.dtype} is "
                "needed",
                hint=f'make it {value.dtype}, tw.out.typed("{value.dtype}")[…], or choose a format '
                "that keeps rows whole",
            )
        if not st.op:
            value = ir.cast(value, out.dtype)
        axes = tuple(self._tag(a.name) for a in st.axes)
        compute = ir.Compute(out, value, st.op, axes, in_place, shared=in_place and self.shared)
        return _inside(lets, guards, compute)

    def _tag(self, axis: str) -> str:
        """The axis a loop walks, as verbs and reductions know it: an index that the statement at
        hand reduces over, and that a statement around it has too, is another axis."""
        return f"{axis}.{self.at.out.tensor.name}" if axis in self.hidden else axis

    def _stored_guard(self, st: Statement, env: _Env, lets: list[ir.Stmt]) -> list[ir.Expr]:
        """Where the last level is searched, not walked, a reduction skips what is not stored."""
        driver = self.owner.driver(st) if st.op else None
        if driver is None or env.coords.get(driver[0]) != driver[1]:
            return []
        last = len(self.owner.format[driver[0]].levels) - 1
        q = self._position(driver[0], last, env)
        if not may_miss(q):
            return []
        var, named = self._named(driver[0], last, q, env)
        lets += named
        return [ir.binary(">=", var, 0)]

    def _resolve(self, e: Any, env: _Env, lets: list[ir.Stmt]) -> Any:
        """Accesses become loads; types are derived anew, since coordinates may be int64."""

        def visit(x: Any) -> Any:
            return self._resolve(x, env, lets)

        if isinstance(e, ir.Index):
            return env.bound[e.name]
        if isinstance(e, ir.Var):
            size = given(e.name)
            assert size is not None, "the only variables of a program are sizes"
            return self.owner.size(size.owner)
        if isinstance(e, ir.Access):
            tensor = self.owner.tensors[e.tensor.name]
            if tensor.is_sparse:
                return self._read_sparse(tensor, e, env, lets)
            coords = tuple(visit(c) for c in e.coords)
            return _where(
                self._within(tensor, e, coords), ir.Load(self.owner.buffer(tensor), coords, e.dtype)
            )
        if isinstance(e, ir.Binary):
            return ir.binary(e.op, visit(e.a), visit(e.b))
        if isinstance(e, ir.Unary):
            return ir.unary(e.op, visit(e.a))
        if isinstance(e, ir.Select):
            return ir.select(visit(e.cond), visit(e.a), visit(e.b))
        if isinstance(e, ir.Cast):
            return ir.cast(visit(e.a), e.dtype)
        return e

    def _read_sparse(
        self, tensor: ir.Tensor, e: ir.Access, env: _Env, lets: list[ir.Stmt]
    ) -> ir.Expr:
        names = tuple(c.name if isinstance(c, ir.Index) else "" for c in e.coords)
        fmt = self.owner.format[tensor.structure]
        if not hasattr(fmt, "levels"):
            raise unsearchable(tensor.name, fmt)
        last = len(fmt.levels) - 1
        own = "" not in names  # a coordinate that is no index follows nothing
        if own and env.coords.get(tensor.structure) == names:
            position = self._position(tensor.structure, last, env)
        elif own and (tensor.structure, names) in env.places:
            position = env.places[tensor.structure, names]
        else:
            self._check_own_rows(tensor.structure, names)
            coords = tuple(self._resolve(c, env, lets) for c in e.coords)
            position = self._locate(tensor, coords, self._within(tensor, e, coords), lets)
        return load_value(self.owner.values(tensor), position, tensor.fill)

    def _within(
        self, tensor: ir.Tensor, e: ir.Access, coords: tuple[ir.Expr, ...]
    ) -> list[ir.Expr]:
        """Conditions that keep computed coordinates inside the tensor: its own indices are, and so
        are coordinates whose range is known."""
        found: list[ir.Expr] = []
        for c, at, dim in zip(e.coords, coords, tensor.dims, strict=True):
            if isinstance(c, ir.Index) and c.dim == dim:
                continue
            (low, high), size = interval(c, self.owner.size), self.owner.size(dim)
            if low < 0:
                found.append(ir.binary(">=", at, 0))
            if not (isinstance(size, ir.Const) and high < size.value):
                wide = (
                    at if at.dtype.kind == "i" or at.dtype.bits == 64 else ir.cast(at, dtypes.int64)
                )
                found.append(ir.binary("<", wide, ir.cast(size, wide.dtype)))
        return found

    def _locate(
        self,
        tensor: ir.Tensor,
        coords: tuple[ir.Expr, ...],
        within: list[ir.Expr],
        lets: list[ir.Stmt],
    ) -> ir.Expr:
        """Searches level by level; -1 (or less, on dense levels) once something is missing."""
        fmt = self.owner.format[tensor.structure]
        pairs = is_list_of_pairs(fmt.levels)
        if not pairs and not all(level.unique for level in fmt.levels):
            raise unsearchable(tensor.name, fmt)
        q: ir.Expr = ir.Const(0, self.owner.index)
        held, nothing = (
            list(within),
            ir.as_expr(-1, self.owner.index),
        )  # under which q is a position
        at = [_part_of(level, coords[level.dim]) for level in fmt.levels]
        stored = [self.owner.storage(tensor.structure, d)[1] for d in range(len(fmt.levels))]
        for depth, level in enumerate(fmt.levels):
            if pairs and depth == 0:
                continue
            if pairs:
                found = locate_pair(stored[0], stored[1], at[0], at[1])
            else:
                found = level.locate(stored[depth], q, at[depth])
            if held:
                found = ir.select(reduce(lambda a, b: ir.binary("&", a, b), held), found, nothing)
            var = ir.Var(self._fresh(f"{tensor.name}_q{depth}"), self.owner.index)
            lets.append(ir.Let(var, found))
            q = var
            if held or not level.is_dense:
                held = [ir.binary(">=", q, 0)]
        return ir.select(held[0], q, nothing) if held else add(q, 0)


def _where(held: list[ir.Expr], value: ir.Expr) -> ir.Expr:
    """`value` where all conditions hold, else nothing: 0."""
    if not held:
        return value
    kind = value.dtype.accumulator if value.dtype.is_float else value.dtype
    nothing = ir.cast(ir.Const(0, dtypes.int32), kind)
    return ir.select(reduce(lambda a, b: ir.binary("&", a, b), held), ir.cast(value, kind), nothing)


def _part_of(level: Level, coord: ir.Expr) -> ir.Expr:
    if not level.block:
        return coord
    return simplify(ir.binary("%" if level.inner else "//", coord, level.block))


def _inside(lets: list[ir.Stmt], guards: list[ir.Expr], body: ir.Stmt) -> ir.Stmt:
    """Lets, then the body under the guards that use them."""
    for g in reversed(guards):
        body = ir.If(g, body)
    return ir.seq(*lets, body)
