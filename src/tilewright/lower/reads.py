"""Expressions on coordinates as expressions on buffers: accesses become loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright import dtypes
from tilewright.ir import core as ir
from tilewright.ir.levels import Level, is_list_of_pairs, locate_pair, may_miss, or_fill
from tilewright.ir.names import parse_name
from tilewright.ir.ranges import interval
from tilewright.lower.scope import Scope, part_of
from tilewright.lower.tables import Driver, Statement, Tables, unsearchable


@dataclass(frozen=True, slots=True)
class Reader:
    """Translates expressions at one point of a nest; searches are appended to `lets`."""

    scope: Scope
    lets: list[ir.Stmt]

    @property
    def tables(self) -> Tables:
        return self.scope.tables

    def expr(self, e: Any) -> Any:
        """The expression with loads for accesses, typed again: coordinates may be int64."""
        if isinstance(e, ir.Index):
            return self.scope.coordinates[e.name]
        if isinstance(e, ir.Var):
            size = parse_name(e.name)
            assert size is not None, "the only variables of a program are sizes"
            return self.tables.size(size.owner)
        if isinstance(e, ir.Access):
            return self.access(e)
        if isinstance(e, ir.Stored):
            position = self._position(self.tables.tensors[e.access.tensor.name], e.access)
            return ir.binary(">=", position, 0) if may_miss(position) else ir.Const(True, e.dtype)
        if isinstance(e, ir.Binary):
            return ir.binary(e.op, self.expr(e.a), self.expr(e.b))
        if isinstance(e, ir.Unary):
            return ir.unary(e.op, self.expr(e.a))
        if isinstance(e, ir.Select):
            return ir.select(self.expr(e.cond), self.expr(e.a), self.expr(e.b))
        return ir.cast(self.expr(e.a), e.dtype) if isinstance(e, ir.Cast) else e

    def element(self, e: ir.Access) -> tuple[ir.Load, list[ir.Expr]]:
        """The element of a buffer that an access means, and the conditions under which it lies
        inside of a dense tensor. The position of a sparse one, its first index, may be -1."""
        tensor = self.tables.tensors[e.tensor.name]
        row = self.tables.rows.get(tensor.name)
        if tensor.is_sparse and not row:
            position = self._position(tensor, e)
            inner = map(self.expr, e.coords[len(e.stored_coords) :])
            return ir.Load(self.tables.values(tensor), (position, *inner), tensor.dtype), []
        coords = tuple(map(self.expr, e.coords))
        if row:
            return row.element(self.scope, e, coords), []
        element = ir.Load(self.tables.buffer(tensor), coords, tensor.dtype)
        return element, self.bounds(tensor, e, coords)

    def access(self, e: ir.Access) -> ir.Expr:
        """The value of an access: the fill where no entry is stored, 0 outside of an array."""
        element, inside = self.element(e)
        if e.tensor.is_sparse:
            return or_fill(element, e.tensor.fill)
        if not inside:
            return element
        dtype = element.dtype.accumulator if element.dtype.is_float else element.dtype
        outside = ir.cast(ir.Const(0, dtypes.int32), dtype)
        return ir.select(ir.all_of(inside), ir.cast(element, dtype), outside)

    def bounds(self, tensor: ir.Tensor, e: ir.Access, coords: tuple[ir.Expr, ...]) -> list[ir.Expr]:
        """Conditions under which the coordinates of an access lie inside the tensor, without those
        that always hold."""
        conditions: list[ir.Expr] = []
        for c, value, dim in zip(e.coords, coords, tensor.dims, strict=True):
            if isinstance(c, ir.Index) and c.dim == dim:
                continue
            (low, high), size = interval(c, self.tables.size), self.tables.size(dim)
            if low < 0:
                conditions.append(ir.binary(">=", value, 0))
            if not (isinstance(size, ir.Const) and high < size.value):
                is_wide = value.dtype.bits == 64 or value.dtype == size.dtype
                wide = value if is_wide else ir.cast(value, dtypes.int64)
                conditions.append(ir.binary("<", wide, ir.cast(size, wide.dtype)))
        return conditions

    def _position(self, tensor: ir.Tensor, e: ir.Access) -> ir.Expr:
        """The position of an access in the values of a sparse tensor; negative if not stored."""
        levels = self.tables.levels(tensor.structure, e)
        access = Driver.of(e)
        if access.is_plain and self.scope.is_read_at(access):
            return self.scope.position(tensor.structure, len(levels) - 1)
        if access.is_plain and access in self.scope.known_positions:
            return self.scope.known_positions[access]
        self.tables.check_row(access)
        return self._search(tensor, e, levels)

    def _search(self, tensor: ir.Tensor, e: ir.Access, levels: tuple[Level, ...]) -> ir.Expr:
        """The position of an entry, searched level by level inside of the tensor's shape; -1 (or
        less, on dense levels) from the first level on that does not store it."""
        coords = tuple(self.expr(c) for c in e.coords)
        conditions = self.bounds(tensor, e, coords)
        is_pairs = is_list_of_pairs(levels)
        if not is_pairs and not all(level.unique for level in levels):
            raise unsearchable(e, self.tables.formats[tensor.structure])
        missing = ir.as_expr(-1, self.tables.index)
        wanted = [part_of(level, coords[level.dim]) for level in levels]
        storages = [
            self.tables.storage(tensor.structure, d, {
                level.dim: c for level, c in zip(levels[:d], wanted, strict=False)
            }.__getitem__)[1]
            for d in range(len(levels))
        ]  # fmt: skip
        position: ir.Expr = ir.Const(0, self.tables.index)
        for depth, level in enumerate(levels):
            if is_pairs and depth == 0:
                continue
            if is_pairs:
                located = locate_pair(storages[0], storages[1], wanted[0], wanted[1])
            else:
                located = level.locate(storages[depth], position, wanted[depth])
            if conditions:
                located = ir.select(ir.all_of(conditions), located, missing)
            position = self.tables.variable(f"{tensor.name}_q{depth}")
            self.lets.append(ir.Let(position, located))
            if conditions or not level.is_dense:
                conditions = [ir.binary(">=", position, 0)]
        return ir.select(conditions[0], position, missing) if conditions else ir.add(position, 0)


def appended(reader: Reader, lists: Sequence[Statement], values: Sequence[ir.Expr]) -> ir.Stmt:
    """Each value stored at the next element of its list: where the list starts, and as many
    elements further as the loop around has visited coordinates."""
    rank, tables = reader.scope.rank, reader.tables
    assert rank is not None
    start = ir.cast(reader.expr(lists[0].out.coords[0]), dtypes.int64)
    at = ir.Var(tables.unused_name("at"), dtypes.int64)
    reader.lets.append(ir.Let(at, start + ir.cast(rank, dtypes.int64)))
    leaves: dict[tuple[ir.Expr, ...], list[ir.Stmt]] = {}  # by their guards
    for st, value in zip(lists, values, strict=True):
        tensor = st.out.tensor
        out = ir.Load(tables.buffer(tensor), (at,), tensor.dtype)
        store = ir.Compute(out, ir.cast(value, tensor.dtype))
        leaves.setdefault(tuple(reader.bounds(tensor, st.out, (at,))), []).append(store)
    bodies = [ir.seq(*b) if not g else ir.If(ir.all_of(g), ir.seq(*b)) for g, b in leaves.items()]
    return ir.seq(*reader.lets, *bodies)
