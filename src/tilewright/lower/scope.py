"""The coordinates, positions and lists of coordinates that are known at one point of a nest."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from tilewright.ir import core as ir
from tilewright.ir.levels import Level, Storage, may_miss
from tilewright.lower.tables import Driver, Statement, Tables, unsearchable


class BlockPart(NamedTuple):
    """One of the two halves of a blocked coordinate: the block's number, or the coordinate
    `inner` to the block."""

    axis: str
    block: int
    inner: bool


@dataclass(slots=True)
class Walk:
    """The levels of one structure as the loops around a point walk them: the names of the indices
    that it is read at, and by depth the loop variables and positions that are known."""

    indices: tuple[str, ...]
    variables: dict[int, ir.Expr] = field(default_factory=dict)
    positions: dict[int, ir.Expr] = field(default_factory=dict)

    def copy(self) -> "Walk":
        return Walk(self.indices, dict(self.variables), dict(self.positions))


@dataclass(slots=True)
class Scope:
    """`coordinates` by index, `block_parts` of blocked ones, `walks` by structure;
    `known_positions` in structures that outer loops walk at other indices; `rank`: how many
    coordinates the merge loop around has visited."""

    tables: Tables
    coordinates: dict[str, ir.Expr] = field(default_factory=dict)
    block_parts: dict[BlockPart, ir.Expr] = field(default_factory=dict)
    walks: dict[str, Walk] = field(default_factory=dict)
    known_positions: dict[Driver, ir.Expr] = field(default_factory=dict)
    rank: ir.Expr | None = None

    def copy(self) -> "Scope":
        walks = {structure: walk.copy() for structure, walk in self.walks.items()}
        known, parts = dict(self.known_positions), dict(self.block_parts)
        return Scope(self.tables, dict(self.coordinates), parts, walks, known, self.rank)

    def is_read_at(self, driver: Driver) -> bool:
        """Whether the loops walk a structure at these indices."""
        walk = self.walks.get(driver.structure)
        return walk is not None and walk.indices == driver.indices

    def follow(self, driver: Driver, st: Statement) -> None:
        """Walks the structure at the indices of `driver` from here on, in the loops of `st`.

        Variables and positions of levels that are opened again or that belong to other indices are
        forgotten, but the last level's position at the old indices stays known."""
        levels = self.tables.levels(driver.structure)
        walk = self.walks.setdefault(driver.structure, Walk(driver.indices))
        old = walk.indices
        if old != driver.indices and len(walk.variables) == len(levels):
            last = self.position(driver.structure, len(levels) - 1)
            self.known_positions[Driver(driver.structure, old)] = last
        walk.indices = driver.indices
        reduced = {a.name for a in st.axes}
        own = reduced | {x.name for x in ir.indices_of(st.out)}
        opened = reduced | (own - self.coordinates.keys())
        for part in [p for p in self.block_parts if p.axis in opened]:
            del self.block_parts[part]
        moved = False
        for depth, level in enumerate(levels):
            index = driver.indices[level.dim]
            other = index in opened or old[level.dim] != index
            if other or (moved and not level.is_dense):
                walk.variables.pop(depth, None)
            if other or moved:
                walk.positions.pop(depth, None)
                moved = True

    def position(self, structure: str, depth: int) -> ir.Expr:
        """The position at a level: that of a loop, or located from coordinates."""
        if depth < 0:
            return ir.Const(0, self.tables.index)
        walk = self.walks[structure]
        if depth in walk.variables:
            level, storage = self.storage(structure, depth)
            return level.pos(storage, self.position(structure, depth - 1), walk.variables[depth])
        if depth not in walk.positions:
            walk.positions[depth] = self._located(structure, depth)
        return walk.positions[depth]

    def storage(self, structure: str, depth: int) -> tuple[Level, Storage]:
        """A level of a structure that the loops walk, and its arrays in the IR."""

        def above(dim: int) -> ir.Expr:
            levels = self.tables.levels(structure)[:depth]
            return self._coordinate(structure, [x for x in levels if x.dim == dim][-1])

        return self.tables.storage(structure, depth, above)

    def list_of(self, driver: Driver, lets: list[ir.Stmt]) -> tuple[ir.Load, ir.Expr]:
        """The first element and the end, as `ir.Merge` has them, of the stored list of a structure
        below the coordinates that are known; empty where the levels above do not store those.
        Searches are appended to `lets`."""
        structure, depth = driver.structure, len(self.tables.levels(driver.structure)) - 1
        scope = self.copy()
        if not scope.is_read_at(driver):
            scope.walks = {structure: Walk(driver.indices)}
        begin, end, _ = scope.range_of(structure, depth, scope.position(structure, depth - 1), lets)
        level, storage = scope.storage(structure, depth)
        keys = storage[level.keys]
        return ir.Load(keys, (ir.cast(begin, self.tables.index),), keys.dtype), end

    def range_of(
        self, structure: str, depth: int, parent: ir.Expr, lets: list[ir.Stmt]
    ) -> tuple[ir.Expr, ir.Expr, ir.Expr]:
        """The range of a loop over a level below `parent`, empty where that is not stored, and the
        parent; a search for it becomes a let, and its variable the known position."""
        level, storage = self.storage(structure, depth)
        if not may_miss(parent):
            return *level.loop(storage, parent), parent
        var = self.named_position(structure, depth - 1, parent, lets)
        is_stored, zero = ir.binary(">=", var, 0), ir.Const(0, self.tables.index)
        begin, end = (ir.select(is_stored, e, zero) for e in level.loop(storage, var))
        return begin, end, var

    def named_position(
        self, structure: str, depth: int, position: ir.Expr, lets: list[ir.Stmt]
    ) -> ir.Var:
        """A located position as a variable, so that it is searched once."""
        var = ir.Var(self.tables.unused_name(f"{structure}_q{depth}"), position.dtype)
        self.walks[structure].positions[depth] = var
        lets.append(ir.Let(var, position))
        return var

    def _coordinate(self, structure: str, level: Level) -> ir.Expr:
        """The coordinate of a level, where that of its dimension is known."""
        axis = self.walks[structure].indices[level.dim]
        coordinate = self.block_parts.get(BlockPart(axis, level.block, level.inner))
        return part_of(level, self.coordinates[axis]) if coordinate is None else coordinate

    def _located(self, structure: str, depth: int) -> ir.Expr:
        level, storage = self.storage(structure, depth)
        if not level.unique:
            driver = Driver(structure, self.walks[structure].indices)
            raise unsearchable(driver, self.tables.formats[structure])
        parent = self.position(structure, depth - 1)
        position = level.locate(storage, parent, self._coordinate(structure, level))
        if may_miss(parent) and not level.is_dense:  # without a parent nothing is stored below it
            missing = ir.as_expr(-1, self.tables.index)
            position = ir.select(ir.binary(">=", parent, 0), position, missing)
        return position


def part_of(level: Level, coordinate: ir.Expr) -> ir.Expr:
    """The part of a coordinate that a level holds: all of it, its block, or the rest
    inside the block."""
    if not level.block:
        return coordinate
    return ir.simplify(ir.binary("%" if level.inner else "//", coordinate, level.block))


def has_list(tables: Tables, driver: Driver, axis: str, bound: Container[str]) -> bool:
    """Whether the coordinates of `axis` that a structure stores are a list, where the coordinates
    `bound` are known."""
    *above, last = tables.levels(driver.structure)
    return (
        last.ordered and last.unique and bool(last.keys) and not (last.padded or last.single)
        and not last.block and driver.indices[last.dim] == axis
        and all(x.unique and driver.indices[x.dim] in bound for x in above)
        and axis not in {driver.indices[x.dim] for x in above}
    )  # fmt: skip
