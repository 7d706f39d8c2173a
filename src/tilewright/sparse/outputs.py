"""Outputs, temporaries and updates of a traced program, and the checks of their statements."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilewright import dtypes
from tilewright.ir import core as ir
from tilewright.ir.names import PRIME
from tilewright.sparse.expressions import condition_of
from tilewright.sparse.tracing import checked_name, current, refusal


@dataclass(frozen=True, slots=True)
class Output:
    """`out[i, k](value)` declares and computes an output; `temp` a value of the program's own.

    `out.like(A)` has the structure of A, and may have dense dimensions behind its own,
    `out.like(A)[i, j, head]`; `out.named("Y")` a name; `out.typed("float16")` a dtype.
    """

    role: ir.Role
    name: str = ""
    dtype: dtypes.DType | None = None
    structure_of: ir.Tensor | None = None

    def like(self, tensor: ir.Tensor) -> "Output":
        """With the structure of a sparse tensor. Raises ProgramError[P103]."""
        if not getattr(tensor, "is_sparse", False):
            raise refusal("P103", f"{tensor!r} has no structure to share", hint="tw.out.like(A)")
        return replace(self, structure_of=tensor)

    def named(self, name: str) -> "Output":
        """With a name in place of `out` or `temp`."""
        return replace(self, name=name)

    def typed(self, dtype: Any) -> "Output":
        """With a dtype in place of that of its value. Raises ArgumentError[A102]."""
        return replace(self, dtype=dtypes.dtype(dtype))

    def __getitem__(self, coords: Any) -> Callable[[Any], ir.Tensor]:
        coords = coords if isinstance(coords, tuple) else (coords,)
        return lambda value: _assign(self, coords, ir.as_expr(value))


out, temp = Output("output"), Output("temp")


@dataclass(frozen=True, slots=True)
class Update:
    """`update(pages)[slot[t], d](value)` writes into a parameter, at computed coordinates;
    `update(Y).add[at[t]](value)` adds, also where coordinates repeat.

    `update(C).append[start[i]](value, over=j, where=condition)` writes the values at the
    coordinates j, ascending, at which the condition holds, one behind the other from start[i] on:
    how a sparse output is filled. The condition is made of `stored`."""

    tensor: ir.Tensor
    op: str = ""

    @property
    def append(self) -> "Update":
        return replace(self, op="append")

    @property
    def add(self) -> "Update":
        return replace(self, op="sum")

    def __getitem__(self, coords: Any) -> Callable[..., ir.Tensor]:
        access = self.tensor[coords]
        if self.op == "append":
            return lambda value, over, where: self._append(access, ir.as_expr(value), over, where)
        return lambda value: self._assign(access, ir.as_expr(value))

    def _append(self, to: ir.Access, value: ir.Expr, over: ir.Index, where: ir.Expr) -> ir.Tensor:
        if len(to.coords) != 1 or not isinstance(over, ir.Index):
            rule = f"append to {to} over {over!r}: a list has one dimension, and `over` one index"
            raise refusal("P104", rule, hint="tw.update(C).append[at[i]](value, over=j, where=…)")
        body = ir.zero_unless(condition_of("append", where), ir.cast(value, self.tensor.dtype))
        return replace(self, op="")._assign(to, ir.Reduce("append", (over,), body, body.dtype))

    def _assign(self, to: ir.Access, value: ir.Expr) -> ir.Tensor:
        trace, written = current(), replace(self.tensor, role="output", kind="state")
        if self.op and written.dtype not in ir.ATOMIC[self.op]:
            kinds = ", ".join(t.name for t in ir.ATOMIC[self.op])
            rule = f"{written.name} is {written.dtype}: add updates arrays of {kinds}"
            raise refusal("P106", rule, hint="add into an array of a wider type, then convert it")
        trace.tensors[written.name] = written
        _check_bound(to.coords, value)
        _check_reads_of_updated(to, value, self.op)
        trace.body.append(_statement(ir.Access(written, to.coords, written.dtype), value, self.op))
        return written


def update(tensor: ir.Tensor) -> Update:
    """Writes into a parameter: see `Update`. Raises ProgramError[P101]."""
    if not isinstance(tensor, ir.Tensor):
        raise refusal("P101", f"update({tensor!r}): no parameter", hint="tw.update(Y)[i](…)")
    return Update(tensor)


def _check_reads_of_updated(to: ir.Access, value: ir.Expr, op: str) -> None:
    """Refuses reads of an updated tensor at other coordinates than those of the update: updates
    run in no fixed order, so such a read could see either value."""
    plain = all(isinstance(c, ir.Index) for c in to.coords)
    for x in ir.walk(value, ir.Access):
        if x.tensor.name == to.tensor.name and (x.coords != to.coords or not plain or op):
            rule = f"{to} is updated from {x}, which another update may have changed"
            hint = f"tw.update({to.tensor.name}).add[…](value) to add; else write to an output"
            raise refusal("P103", rule, hint=hint)


def _assign(output: Output, coords: tuple[Any, ...], value: ir.Expr) -> ir.Tensor:
    trace = current()
    if not all(isinstance(c, ir.Index) for c in coords):
        raise refusal("P103", f"an {output.role} is written at plain indices", "tw.update")
    if len({c.name for c in coords}) != len(coords):
        raise refusal("P103", "an index occurs twice in the coordinates of an output")
    _check_bound(coords, value)
    number = sum(t.role == output.role for t in trace.tensors.values())
    prefix = "out" if output.role == "output" else output.role
    name = output.name or f"{prefix}{number or ''}"
    checked_name(name, f"an {output.role}")
    if any(x.name == name for x in trace.indices):
        raise refusal("P102", f"{name} is an index already")
    if name in trace.tensors:
        raise refusal("P101", f"{name} is defined twice")
    dtype = output.dtype or (_output_dtype(value) if output.role == "output" else value.dtype)
    like = output.structure_of
    own = len(like.dims) if like else 0
    if like is not None and (like.inner or tuple(c.dim for c in coords[:own]) != like.dims):
        rule = f"{name} has the structure of {like.name} but other dimensions"
        hint = "those of the structure, then dense ones: tw.temp.like(A)[i, j, head]"
        raise refusal("P103", rule, hint=hint)
    tensor = ir.Tensor(name, tuple(c.dim for c in coords), dtype, output.role)
    if like is not None:
        inner = len(coords) - own
        tensor = replace(tensor, structure=like.structure, format=like.format, inner=inner)
    trace.tensors[name] = tensor
    trace.body.append(_statement(ir.Access(tensor, coords, dtype), value))
    return tensor


def _statement(to: ir.Access, value: ir.Expr, op: str = "") -> ir.Assign:
    """`to = value`, or `to += value` with op "sum". No reduction in it binds an index that the
    coordinates or a reduction around it bind."""
    bound = frozenset().union(*(ir.free_vars(c) for c in to.coords))
    return ir.Assign(to, ir.cast(_with_own_indices(value, bound), to.dtype), op)


def _with_own_indices(e: Any, taken: frozenset[str]) -> Any:
    """`e` with each index that a reduction binds, and that a scope around it binds too, renamed to
    j', j'', …; `taken` are the names bound around `e`.

    before: out[i, j] = e / sum(e over j)               e = exp(A[i, j])
    after:  out[i, j] = exp(A[i, j]) / sum(exp(A[i, j']) over j')
    """

    def visit(x: Any) -> Any:
        return _with_own_indices(x, taken)

    if not isinstance(e, ir.Reduce):
        return ir.rebuild(e, visit)
    fresh: dict[str, ir.Var] = {}
    for a in e.axes:
        name = a.name
        while name in taken:
            name += PRIME
        if name != a.name:
            fresh[a.name] = replace(a, name=name)
    axes = tuple(fresh.get(a.name, a) for a in e.axes)
    inner = taken | {a.name for a in axes}
    return replace(e, axes=axes, body=_with_own_indices(ir.substitute(e.body, fresh), inner))


def _output_dtype(value: ir.Expr) -> dtypes.DType:
    """A float result takes the dtype of the last dense float activation, as products do."""
    if not value.dtype.is_float:
        return value.dtype
    read = [x.tensor for x in ir.walk(value, ir.Access) if x.tensor.dims and not x.tensor.is_sparse]
    own = [t.dtype for t in read if t.kind == "activation" and t.role != "temp"]
    floats = [t for t in own if t.is_float]
    return floats[-1] if floats and floats[-1].bits <= value.dtype.bits else value.dtype


def _check_bound(coords: tuple[ir.Expr, ...], value: ir.Expr) -> None:
    """Every index is in the coordinates or under a reduction, and runs over one dimension."""
    for x in ir.walk(value, ir.Access):
        for c, dim in zip(x.coords, x.tensor.dims, strict=True):
            if isinstance(c, ir.Index) and c.dim != dim:
                rule = f"{c.name} runs over {c.dim} but means {dim} in {x}"
                raise refusal("P102", rule)
        if not all(isinstance(c, ir.Index) for c in x.coords[len(x.stored_coords) :]):
            raise refusal("P103", f"{x}: the dense dimensions of a structure are read at indices")
    loose = sorted(ir.free_indices(value).keys() - set().union(*map(ir.free_indices, coords)))
    if loose:
        rule = f"index {', '.join(loose)} is neither in the output nor under a reduction"
        raise refusal("P104", rule, hint=f"write sum(…, over={loose[0]})")
