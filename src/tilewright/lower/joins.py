"""Nests for rows whose coordinates come from a product of two sparse operands, in the order of
Gustavson (1978): for each k of a row of the first, the coordinates j of row k of the second go into
a row workspace, which is drained in ascending order.

before: out[i] = sum(where(any(stored(A[i, k]) & stored(B[k, j]) over k), 1, 0) over j)
after:  for i in 0:m.size
          alloc row
          for k_p in A.indptr1[i]:A.indptr1[i + 1]
            for j_p in B.indptr1[k]:B.indptr1[k + 1]
              row[B.indices1[j_p]] += false
          for n in row
            out[i] = sum(1 over j)
"""

from dataclasses import dataclass
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import core as ir
from tilewright.lower.drivers import is_identity
from tilewright.lower.reads import Reader, appended
from tilewright.lower.scope import Scope, has_list
from tilewright.lower.tables import Driver, Statement, Tables, unmergeable


@dataclass(frozen=True, slots=True)
class Join:
    """The coordinates `axis` at which `first` and `second` are stored for some `over`, and `mask`,
    where there is one."""

    axis: ir.Index
    over: ir.Index
    first: Driver
    second: Driver
    mask: Driver | None = None


def join_of(st: Statement) -> Join | None:
    """The join that a statement ranges over, or None."""
    if len(st.axes) != 1 or not isinstance(st.value, ir.Select):
        return None
    (axis,), cond, mask = st.axes, st.value.cond, None
    match cond:
        case ir.Binary("&", ir.Stored(m), rest) | ir.Binary("&", rest, ir.Stored(m)):
            cond, mask = rest, Driver.of(m)
    match cond:  # any(stored(A[i, k]) & stored(B[k, j]) over k)
        case ir.Binary(">", ir.Reduce("max", (ir.Index() as over,), ir.Cast(both))):
            match both:
                case ir.Binary("&", ir.Stored(a), ir.Stored(b)):
                    drivers = map(Driver.of, (a, b))
                    first, second = sorted(drivers, key=lambda d: axis.name in d.indices)
                    has_both = {axis.name, over.name} <= set(second.indices)
                    if has_both and axis.name not in first.indices:
                        return Join(axis, over, first, second, mask)
    return None


class JoinBuilder:
    """Builds the nest of statements over the same join. Raises ProgramError[P107]."""

    def __init__(self, tables: Tables, statements: list[Statement], join: Join) -> None:
        self.tables, self.statements, self.join = tables, statements, join
        self.product = self._product()
        kind = dtypes.bool_ if self.product is None else self.product.dtype
        extent = tables.size(join.axis.dim)
        self.row = ir.Buffer(tables.unused_name("row"), kind, (extent,), "workspace")
        self.mask = ir.Buffer(tables.unused_name("mask"), dtypes.bool_, (extent,), "workspace")

    def build(self) -> ir.Nest:
        st, tables = self.statements[0], self.tables
        scope, outer = Scope(tables), ir.indices_of(st.out)
        for x in outer:
            scope.coordinates[x.name] = self.tables.variable(x.name)
        self._check_lists({x.name for x in outer})
        body = ir.seq(ir.Alloc(self.row), self._scatter(scope), self._drain(scope))
        if self.join.mask is not None:
            body = self._masked(scope, self.join.mask, body)
        for x in reversed(outer):
            var: Any = scope.coordinates[x.name]
            body = ir.For(var, ir.Const(0, tables.index), tables.size(x.dim), body, axes=(x.name,))
        return ir.Nest(st.out.tensor.name, body)

    def _check_lists(self, outer: set[str]) -> None:
        join, k = self.join, self.join.over.name
        if not (
            has_list(self.tables, join.first, k, outer)
            and (not join.mask or has_list(self.tables, join.mask, join.axis.name, outer))
            and has_list(self.tables, join.second, join.axis.name, outer | {k})
        ):
            tensors = self.tables.tensors
            drivers = [d for d in (join.mask, join.first, join.second) if d is not None]
            raise unmergeable(self.statements[0], [tensors[d.structure].format for d in drivers])

    def _product(self) -> ir.Reduce | None:
        """The sum over the join that the statements read. Raises ProgramError[P107] for several, or
        for one with terms outside of the join."""
        sums = {x: 0 for st in self.statements for x in ir.walk(_body(st), ir.Reduce)}
        for total in sums:
            if len(sums) > 1 or total.op != "sum" or not self._is_zero_outside(total):
                rule = f"{' and '.join(map(str, sums))}: a row of a product holds one sum, of terms"
                rule += f" that are 0 outside of {self.join.first} and {self.join.second}"
                raise ProgramError("P107", rule, hint="sum(A[i, k] * B[k, j], over=k)")
        return next(iter(sums), None)

    def _is_zero_outside(self, total: ir.Reduce) -> bool:
        if len(total.axes) != 1:
            return False
        body = ir.substitute(total.body, {total.axes[0].name: self.join.over})
        st = Statement(self.statements[0].out, "sum", (self.join.over,), body)
        return all(is_identity(st, {d}) for d in (self.join.first, self.join.second))

    def _walk(self, scope: Scope, driver: Driver, axis: ir.Index) -> Any:
        """Opens the loop over the list of a structure; returns its wrapper of bodies."""
        lets: list[ir.Stmt] = []
        run, end = scope.list_of(driver, lets)
        position, var = self.tables.variable(f"{axis.name}_p"), self.tables.variable(axis.name)
        scope.coordinates[axis.name] = var
        scope.known_positions[driver] = position
        key = ir.Let(var, ir.Load(run.buffer, (position,), var.dtype))
        return lambda body: ir.seq(
            *lets, ir.For(position, run.index[0], end, ir.seq(key, body), axes=(axis.name,))
        )

    def _scatter(self, scope: Scope) -> ir.Stmt:
        scope, join = scope.copy(), self.join
        around = self._walk(scope, join.first, join.over)
        inside = self._walk(scope, join.second, join.axis)
        lets: list[ir.Stmt] = []
        value: ir.Expr = ir.cast(ir.Const(0, dtypes.int32), self.row.dtype)
        if self.product is not None:
            term = ir.substitute(self.product.body, {self.product.axes[0].name: join.over})
            value = ir.cast(Reader(scope, lets).expr(term), self.row.dtype)
        key = scope.coordinates[join.axis.name]
        leaf = ir.seq(*lets, ir.Scatter(self.row, key, value))
        return around(inside(ir.If(ir.Holds(self.mask, key), leaf) if join.mask else leaf))

    def _masked(self, scope: Scope, mask: Driver, body: ir.Stmt) -> ir.Stmt:
        """The body with the coordinates of the mask in a row workspace of their own."""
        scope = scope.copy()
        around = self._walk(scope, mask, self.join.axis)
        key, empty = scope.coordinates[self.join.axis.name], ir.Const(False, dtypes.bool_)
        var, zero = self.tables.variable("mask_n"), ir.Const(0, self.tables.index)
        fill = around(ir.Scatter(self.mask, key, empty))
        clear = ir.Drain(var, zero, self.mask.shape[0], ir.Seq(()), workspace=self.mask)
        return ir.seq(ir.Alloc(self.mask), fill, body, clear)

    def _drain(self, scope: Scope) -> ir.Stmt:
        """The loop over the coordinates of a row, ascending where lists are made of it."""
        scope, axis, tables = scope.copy(), self.join.axis, self.tables
        var, key = self.tables.variable(f"{axis.name}_n"), self.tables.variable(axis.name)
        scope.coordinates[axis.name], scope.rank = key, var
        lets: list[ir.Stmt] = [ir.Let(key, ir.Cursor(var, ir.KEY, key.dtype))]
        st, reader = self.statements[0], Reader(scope, lets)

        def total(x: Any) -> Any:
            return ir.Cursor(var, ir.VALUE, self.row.dtype) if isinstance(x, ir.Reduce) else x

        values = [reader.expr(ir.transform(_body(x), total)) for x in self.statements]
        if st.op == "append":
            body = appended(reader, self.statements, values)
        else:
            out, inside = reader.element(st.out)
            body = ir.Compute(out, values[0], st.op, (axis.name,))
            body = ir.seq(*lets, ir.If(ir.all_of(inside), body) if inside else body)
        zero, end = ir.Const(0, tables.index), tables.size(axis.dim)
        return ir.Drain(var, zero, end, body, axes=(axis.name,), workspace=self.row)


def _body(st: Statement) -> ir.Expr:
    """The value of a statement where its condition holds."""
    assert isinstance(st.value, ir.Select)
    return st.value.a
