"""Temporaries that are computed inside a loop of the statement that reads them
(`Schedule.compute_at`): their checks, their memory, and the online form of a softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import affine
from tilewright.lower.scope import Scope
from tilewright.lower.tables import Driver, Statement, Tables, names_read


def refuse(name: str, why: str, hint: str) -> ScheduleError:
    return illegal(f"{name} cannot be computed there: {why}", hint)


def with_roles(program: ir.Program) -> ir.Program:
    """The program with temporaries in memory of a unit marked as inline. Raises ScheduleError[S102]
    for one that several statements with loops of their own read."""
    placed = {p.temporary for p in program.placed}
    for name, loop, *_ in program.placed:
        readers = {  # a reduction of out is out.0
            a.out.tensor.name.partition(".")[0] for a in program.body
            if name in names_read(a.value)
        }  # fmt: skip
        roots = sorted(readers - placed)
        if len(roots) > 1 or not readers:
            hint = f"compute_at(…, {loop!r}) all readers but one"
            raise refuse(name, f"{' and '.join(roots) or 'nothing'} read it", hint)
    rows = {p.temporary for p in program.placed if p.scope == "row"}
    tensors = (replace(t, role="inline") if t.name in rows else t for t in program.tensors)
    return replace(program, tensors=tuple(tensors))


def check(t: Statement, placed: dict[str, str], emitted: set[str], around: set[str]) -> None:
    """Checks that `t` can be computed at its loop in `placed`. Raises ScheduleError[S102] if it
    reads a temporary not yet in `emitted`, or if another loop, in `around`, would repeat it."""
    name, loop = t.out.tensor.name, placed.get(t.out.tensor.name, "")
    for late in sorted((names_read(*t.values) & placed.keys()) - emitted - {name}):
        raise refuse(late, f"{name} reads it first", f"compute_at {name} further in")
    for again in sorted(around - {loop, *(x.name for x in ir.indices_of(t.out))}) if loop else ():
        hint = f"order_axes the statement that reads it, {loop} before {again}"
        raise refuse(name, f"loop {again} is around loop {loop}, and would repeat it", hint)


@dataclass(slots=True)
class Row:
    """The memory of an inline temporary: a register, or an array of what one iteration computes.

    Its indices are the variables of the `levels` walked inside (depth, begin and end), and the
    coordinates number `dims`, which have `sizes`."""

    tensor: ir.Tensor
    dims: tuple[int, ...]
    sizes: tuple[ir.Expr, ...]
    levels: list[tuple[int, ir.Expr, ir.Expr]] = field(default_factory=list)

    @classmethod
    def of(cls, tables: Tables, out: ir.Access, scope: Scope) -> "Row":
        """That of a temporary whose loops are inside those of a scope."""
        first = len(out.stored_coords) if out.tensor.is_sparse else 0
        own = list(enumerate(ir.indices_of(out)))[first:]
        free = [(n, tables.size(x.dim)) for n, x in own if x.name not in scope.coordinates]
        tensor = tables.tensors[out.tensor.name]
        return cls(tensor, tuple(n for n, _ in free), tuple(size for _, size in free))

    @property
    def extents(self) -> tuple[ir.Expr, ...]:
        lengths = (ir.simplify(ir.binary("-", end, begin)) for _, begin, end in self.levels)
        return (*lengths, *self.sizes)

    @property
    def buffer(self) -> ir.Buffer:
        extents = self.extents
        shape = (ir.as_expr(0), *extents[1:])[: len(extents)]  # `Alloc` has the first one
        scope = "row" if extents else "register"
        return ir.Buffer(self.tensor.name, self.tensor.dtype, shape, scope)

    def alloc(self, out: ir.Access, scope: Scope) -> ir.AllocRow:
        """Its declaration, in the scope around its loops; with the array of the temporary where its
        length is not constant, and a GPU keeps a part of it."""
        tables, tensor = scope.tables, self.tensor
        most = next((p.most for p in tables.program.placed if p.temporary == tensor.name), 0)
        if not most or all(isinstance(e, ir.Const) for e in self.extents):
            return ir.AllocRow(self.buffer, self.extents, self.extents)
        below = self.extents[1 : len(self.levels)]
        inner = [int(e.value) for e in below if isinstance(e, ir.Const)]
        if len(inner) + 1 < len(self.levels):
            raise refuse(tensor.name, "its rows have rows of their own", 'scope="global"')
        first = len(out.stored_coords) if tensor.is_sparse else 0
        own = ir.indices_of(*out.coords)[first:]
        at = [scope.coordinates.get(x.name, ir.Const(0, tables.index)) for x in own]
        array, along, steps = tables.buffer(tensor), self.dims, [ir.as_expr(1) for _ in self.dims]
        if tensor.is_sparse:
            start, last = scope.copy(), len(tables.levels(tensor.structure)) - 1
            walked = start.walks[tensor.structure]
            names = {d: ir.Var(f"at{d}", tables.index) for d, *_ in self.levels}
            walked.variables |= names
            position = start.position(tensor.structure, last)
            form = affine(position, frozenset(map(str, names.values())))
            if form is None:
                raise refuse(tensor.name, "its rows are not side by side", 'scope="global"')
            steps = [*(form.steps.get(x.name, ir.as_expr(0)) for x in names.values()), *steps]
            walked.variables |= {d: begin for d, begin, _ in self.levels}
            at.insert(0, start.position(tensor.structure, last))
            array = tables.values(tensor)
            along = (*(0 for _ in names), *(n - first + 1 for n in self.dims))
        kept = (ir.as_expr(max(most // prod(inner), 1)), *self.extents[1:])
        rest = (ir.Load(array, tuple(at), tensor.dtype),)
        return ir.AllocRow(self.buffer, self.extents, kept, rest, along, tuple(steps))

    def element(self, scope: Scope, e: ir.Access, coords: Sequence[ir.Expr]) -> ir.Load:
        """The element at coordinates. Raises ScheduleError[S102] where no loop follows them."""
        index: list[ir.Expr] = []
        if self.levels:
            driver = Driver.of(e)
            walked = scope.walks[driver.structure].variables
            if not (scope.is_read_at(driver) and all(d in walked for d, *_ in self.levels)):
                hint = "read it at the indices of a loop over its stored coordinates"
                raise refuse(e.tensor.name, f"{e} is read where no loop follows it", hint)
            index += (ir.binary("-", walked[d], begin) for d, begin, _ in self.levels)
        return ir.Load(self.buffer, (*index, *(coords[n] for n in self.dims)), e.dtype)


def online(body: ir.Stmt) -> ir.Stmt:
    """Maxima that are read in the loop they reduce over, before they are complete: a reader takes
    exp(x - maximum) of the terms x, and sums of that are multiplied by exp(old - new) whenever the
    maximum grows. Reference: Milakov and Gimelshein (2018), algorithm 3.

    before: top[] = max(s[] over j)            after: top[] = max(s[] over j) online
            w[] = exp(s[] - top[])                    w[] = top.weight[]
            l[] = sum(w[] over j)                     l[] = l.0[] where l.0 = sum(w[] over j)
                                                                                  by top.factor
    """
    rewriter = _Online()
    body = rewriter.visit(body, frozenset())

    def mark(x: Any) -> Any:
        is_read = isinstance(x, ir.Compute) and x.out.buffer.name in rewriter.registers
        return replace(x, online=rewriter.registers[x.out.buffer.name]) if is_read else x

    return ir.transform(body, mark)


class _Online:
    """`running`: the reductions around; `degrees`: the weights that a register is linear in."""

    def __init__(self) -> None:
        self.running: dict[str, ir.Compute] = {}
        self.registers: dict[str, tuple[ir.Buffer, ir.Buffer]] = {}
        self.degrees: dict[str, frozenset[str]] = {}

    def visit(self, s: Any, axes: frozenset[str]) -> Any:
        if isinstance(s, ir.Compute):
            return self.compute(s, axes)
        within = axes | frozenset(s.axes) if isinstance(s, ir.For) else axes
        return ir.rebuild_body(s, lambda x: self.visit(x, within))

    def compute(self, c: ir.Compute, axes: frozenset[str]) -> ir.Compute:
        name = c.out.buffer.name
        inside = {n: m for n, m in self.running.items() if axes & set(m.reduce)}
        outside = {n: m for n, m in inside.items() if not set(m.reduce) & set(c.reduce)}
        terms = [self.value(name, e, inside) for _, e in c.sums]
        degrees = [self.degree(e) for e in terms]
        for (op, _), degree in zip(c.sums, degrees, strict=True):
            if degree is None or (op and degree and (op != "sum" or len(degree) > 1)):
                raise self.not_linear(name)
        relative = [sorted((d or set()) - outside.keys()) for d in degrees]
        factors = [self.registers[names[0]][1] if names else None for names in relative]
        left = [(d or frozenset()) & outside.keys() for d in degrees]
        changed, own = replace(c, value=terms[0]), left[0]
        if c.reductions:
            self.degrees |= {r.total.name: d for r, d in zip(c.reductions, left, strict=True)}
            sums = zip(c.reductions, terms, factors, strict=True)
            reductions = tuple(replace(r, value=e, factor=f) for r, e, f in sums)
            changed = replace(c, reductions=reductions, value=self.value(name, c.value, outside))
            own = self.degree(changed.value)
        elif any(factors):
            total = ir.Buffer(f"{name}.0", terms[0].dtype, (), "register")
            sums = (ir.Reduction(total, c.op, terms[0], factors[0]),)
            changed = replace(c, op="", value=ir.Load(total, (), total.dtype), reductions=sums)
        if own is None or (own and c.out.buffer.scope != "register"):
            raise self.not_linear(name)
        self.degrees[name] = frozenset(own)
        if c.reduce:
            self.running[name] = c
        return changed

    def value(self, name: str, e: ir.Expr, inside: dict[str, ir.Compute]) -> ir.Expr:
        """A value computed in the loops of the maxima `inside`, which reads their weights."""

        def visit(x: Any) -> Any:
            match x:
                case ir.Unary(
                    "exp", ir.Binary("-", term, ir.Load(ir.Buffer(top, scope="register")))
                ) if top in inside and (inside[top].op, inside[top].value) == ("max", term):
                    kinds = f"{top}.weight", f"{top}.factor"
                    weight, factor = (ir.Buffer(kind, x.dtype, (), "register") for kind in kinds)
                    self.registers[top] = weight, factor
                    return ir.Load(weight, (), x.dtype)
            return ir.rebuild(x, visit)

        e = visit(e)
        for x in ir.walk(e):
            if isinstance(x, ir.Load) and x.buffer.name in inside and x.buffer.name != name:
                hint = f"only exp(x - {x.buffer.name}) of the terms x is read in its own loop"
                raise refuse(x.buffer.name, f"{name} reads it before it is complete", hint)
        return e

    def not_linear(self, name: str) -> ScheduleError:
        why = f"{name.removesuffix('.values')} is no sum of products with one exp(x - maximum)"
        hint = "sum(exp(score[i, j] - top[i]) * V[j, c], over=j)"
        return refuse(" and ".join(self.running), why, hint)

    def degree(self, e: Any) -> frozenset[str] | None:
        """The weights that an expression is linear in; None where it is not linear."""
        if isinstance(e, ir.Load) and e.buffer.scope == "register":
            maximum = e.buffer.name.removesuffix(".weight")
            is_weight = maximum in self.registers and maximum != e.buffer.name
            return frozenset({maximum} if is_weight else self.degrees.get(e.buffer.name, ()))
        parts = [self.degree(x) for x in ir.children(e)]
        used = [p for p in parts if p is None or p]
        if not used or None in used:
            return None if used else frozenset()
        is_sum = isinstance(e, ir.Binary) and e.op in "+-" and parts[0] == parts[1]
        is_scaled = isinstance(e, ir.Cast) or (
            isinstance(e, ir.Binary) and (e.op == "*" or (e.op == "/" and not parts[1]))
        )
        return used[0] if is_sum or (is_scaled and len(used) == 1) else None
