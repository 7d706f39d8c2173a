"""Pass: every reduction becomes a statement of its own."""

from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir
from tilewright.lower.joins import join_of
from tilewright.lower.tables import Statement


def hoist_reductions(program: ir.Program) -> ir.Program:
    """Names each reduction that is part of a larger expression, innermost first.

    before: out[i, j] = exp(A[i, j]) / sum(exp(A[i, j]) over j)
    after:  out.0[i]  = sum(exp(A[i, j]) over j)          (inline: computed inside the nest of out)
            out[i, j] = exp(A[i, j]) / out.0[i]

    A reduction that depends on no index of its statement becomes a temporary with a stage of its
    own. One under a `where` is reduced under its condition where it must be (`_conditioned`).
    """
    body: list[ir.Assign] = []
    tensors = {t.name: t for t in program.tensors}
    for statement in program.body:
        if join_of(Statement.of(statement)):  # its sums are those of a row workspace
            body.append(statement)
            continue
        hoister = _Hoister(statement)
        value = _conditioned(statement.value)
        inner = value.a if isinstance(value, ir.Cast) else value
        own = inner if isinstance(inner, ir.Reduce) and not statement.op else None
        if own is not None and not _reads_other_coordinates(statement, own):  # it reduces itself
            new = ir.Reduce(own.op, own.axes, hoister.visit(own.body, (own,)), own.dtype)
            value = ir.cast(new, value.dtype)
        else:
            value = hoister.visit(value, ())
        tensors |= {a.out.tensor.name: a.out.tensor for a in hoister.hoisted}
        body += [*hoister.hoisted, ir.Assign(statement.out, value, statement.op)]
    return replace(program, tensors=tuple(tensors.values()), body=tuple(body))


def _conditioned(e: Any, held: tuple[ir.Expr, ...] = ()) -> Any:
    """Moves the condition of a `where` into the reductions of its arms that read dense tensors at
    coordinates computed from its indices: where it fails they read nothing and give the identity.

    before: where(i > 0, sum(X[i - 1, j] over j), 0)
    after:  where(i > 0, sum(where(i > 0, X[i - 1, j], 0) over j), 0)
    """
    if isinstance(e, ir.Select):
        cond = _conditioned(e.cond, held)
        a, b = _conditioned(e.a, (*held, cond)), _conditioned(e.b, (*held, ir.unary("not", cond)))
        return ir.Select(cond, a, b, e.dtype)
    if isinstance(e, ir.Reduce):
        body = _conditioned(e.body, held)
        used, nothing = _computed_coordinates(body), ir.identity_of(e.op, body.dtype)
        for cond in reversed(held):
            if used & ir.free_indices(cond).keys():
                body = ir.Select(cond, body, nothing, body.dtype)
        return ir.Reduce(e.op, e.axes, body, e.dtype)
    return ir.rebuild(e, lambda child: _conditioned(child, held))


def _computed_coordinates(e: ir.Expr) -> set[str]:
    """The indices of coordinates of dense tensors that are not the indices of their dimensions."""
    dense = [x for x in ir.walk(e, ir.Access) if not x.tensor.is_sparse]
    coords = [pair for x in dense for pair in zip(x.coords, x.tensor.dims, strict=True)]
    computed = (c for c, dim in coords if not (isinstance(c, ir.Index) and c.dim == dim))
    return {name for c in computed for name in ir.free_indices(c)}


def _reads_other_coordinates(statement: ir.Assign, e: ir.Reduce) -> bool:
    """Whether a reduction cannot be its statement: the output follows the stored coordinates of one
    tensor and the reduction those of another."""
    own = {a.name for a in e.axes}
    return statement.out.tensor.is_sparse and any(
        x.tensor.is_sparse and any(isinstance(c, ir.Index) and c.name in own for c in x.coords)
        for x in ir.walk(e.body, ir.Access)
    )


class _Hoister:
    def __init__(self, statement: ir.Assign) -> None:
        self.out = statement.out
        self.hoisted: list[ir.Assign] = []
        self.known: dict[Any, ir.Access] = {}

    def visit(self, e: Any, binders: tuple[ir.Reduce, ...]) -> Any:
        if not isinstance(e, ir.Reduce):
            return ir.rebuild(e, lambda child: self.visit(child, binders))
        own = {a.name for a in e.axes}
        free = ir.free_indices(e)
        # The same text under another binder is another value: its indices mean other loops.
        binding = tuple(id(b) for b in binders if {a.name for a in b.axes} & free.keys())
        key = (_numbered(e), binding)
        if key in self.known:
            return self.known[key]
        inner = ir.Reduce(e.op, e.axes, self.visit(e.body, (*binders, e)), e.dtype)
        assert not own & free.keys()
        name = f"{self.out.tensor.name}.{len(self.hoisted)}"
        role = "inline" if free or not self.out.coords else "temp"
        order = [n.name for c in self.out.coords for n in ir.walk(c, ir.Index)]
        order += [a.name for b in binders for a in b.axes]
        ordered = sorted(free.values(), key=lambda x: order.index(x.name))
        tensor = ir.Tensor(name, tuple(x.dim for x in ordered), e.dtype, role)
        self.known[key] = ir.Access(tensor, tuple(ordered), e.dtype)
        self.hoisted.append(ir.Assign(self.known[key], inner))
        return self.known[key]


def _numbered(e: Any, depth: int = 0) -> Any:
    """`e` with numbers for the indices it binds: equal for expressions that differ in their names
    only."""
    if not isinstance(e, ir.Reduce):
        return ir.rebuild(e, lambda child: _numbered(child, depth))
    fresh = {a.name: replace(a, name=str(depth + n)) for n, a in enumerate(e.axes)}
    body = _numbered(ir.substitute(e.body, fresh), depth + len(fresh))
    return replace(e, axes=tuple(fresh.values()), body=body)
