"""Verbs on programs: pure functions Program → Program, most of them before positions exist. Each is
the rewrite behind the method of `Schedule` of its name, which says what it does.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

from tilewright import dtypes
from tilewright.errors import illegal
from tilewright.ir import core as ir
from tilewright.ir.levels import Compressed, Dense
from tilewright.ir.names import COPIES, GeneratedName, stride_name
from tilewright.schedule.tree import computes, matches, unknown

T = TypeVar("T")
MOST_COPIES = 64  # of an output


def _named(kind: str, name: str, known: Mapping[str, T]) -> T:
    """What has a name. Raises ScheduleError[S101] for one that is not in `known`."""
    if name not in known:
        raise unknown(f"no {kind} {name!r}", f"there are: {', '.join(known) or 'none'}")
    return known[name]


def _statement(program: ir.Program, output: str) -> ir.Assign:
    """The statement of an output or a temporary, the first of several updates."""
    return _named("output or temporary", output, {s.out.tensor.name: s for s in program.body[::-1]})


def order_axes(program: ir.Program, output: str, *axes: str) -> ir.Program:
    has = {x.name: x for x in ir.indices_of(_statement(program, output))}
    if len(set(axes)) < len(axes):
        raise illegal(f"order_axes{axes!r}", "each axis once")
    for axis in axes:
        _named(f"axis of {output} is called", axis, has)
    return replace(program, orders=(*program.orders, (output, *axes)))


def compute_at(program: ir.Program, temporary: str, loop: str, scope: str, most: int) -> ir.Program:
    """The lowering checks what it takes."""
    _named("temporary", temporary, {t.name: t for t in program.tensors if t.role == "temp"})
    if most and scope != "row":
        raise illegal(f"most is {most}, and scope {scope!r}", 'scope="row" has a most')
    rest = (p for p in program.placed if p.temporary != temporary)
    return replace(program, placed=(*rest, ir.Placement(temporary, loop, scope, most)))


def merge_sums(program: ir.Program, output: str) -> ir.Program:
    _statement(program, output)
    return replace(program, merged=(*program.merged, output))


def fuse_axes(program: ir.Program, structure: str) -> ir.Program:
    sparse = {t.name: t for t in program.tensors if t.is_sparse}
    tensor = _named("sparse tensor", structure, sparse)
    for fmt in tensor.format.formats:
        rows, *cols = fmt.levels
        is_list = len(cols) == 1 and isinstance(cols[0], Compressed)
        if not (is_list and isinstance(rows, (Dense, Compressed))) or rows.block:
            raise illegal(f"{fmt} is no list of rows of entries", "csr and dcsr have axes to fuse")
    return replace(program, fused=(*program.fused, structure))


def specialize(program: ir.Program, dim: str, size: int) -> ir.Program:
    _named("dimension", dim, {str(d): d for t in program.tensors for d in t.dims})
    if size > program.index.most:
        why = f"specialize({dim!r}, {size}): coordinates are {program.index}"
        raise illegal(why, f"at most {program.index.most}, or typed(index='int64')", where="size")
    known_size = dict(program.sizes).get(dim, size)
    if known_size != size:
        raise illegal(f"{dim} is {known_size} already", "one size a dimension")
    return replace(program, sizes=(*program.sizes, (dim, size)))


def privatize(program: ir.Program, output: str, loop: str, copies: int) -> ir.Program:
    tensor = _named("output", output, {t.name: t for t in program.outputs})
    every = (c for n in program.nests for c in computes(n.body))
    updates = [c for c in every if c.out.buffer.name == output]
    if tensor.kind == "state":
        why = f"{output} is a parameter that is updated: its copies would not start from it"
        raise illegal(why, "atomic(), or one unit")
    if not any(c.in_place for c in updates):
        hint = "parallel() or bind() its loops"
        raise illegal(f"{output} is not updated in place: its units share no rows", hint)
    return _Copies(tensor, updates[0].out.buffer, loop, copies).applied(program)


class _Copies:
    def __init__(self, tensor: ir.Tensor, buffer: ir.Buffer, loop: str, copies: int) -> None:
        self.output, self.original, self.loop, self.copies = tensor, buffer, loop, copies
        name = GeneratedName(tensor.name, COPIES).name
        self.tensor = replace(
            tensor, name=name, dims=(copies, *tensor.dims), role="temp", kind="state",
            dtype=tensor.dtype.accumulator,
        )  # fmt: skip
        index = buffer.shape[0].dtype if buffer.shape else dtypes.int32
        strides = (
            *(ir.Var(stride_name(name, d), dtypes.int64) for d in range(len(tensor.dims))),
            ir.Const(1, dtypes.int64),
        )
        self.buffer = ir.Buffer(
            name, self.tensor.dtype, (ir.Const(copies, index), *buffer.shape), "global", strides,
            "state",
        )  # fmt: skip
        self.copy = ir.Var("copy", index)

    def applied(self, program: ir.Program) -> ir.Program:
        stages: list[tuple[ir.Nest, ...]] = []
        op = ""
        for stage in program.stages:
            own = [c for n in stage for c in computes(n.body) if self._is_update(c)]
            if not own:
                stages.append(stage)
                continue
            updates = [c for c in own if c.in_place]
            if not updates:
                stages.append(tuple(self._start(n) for n in stage))
                continue
            if len(stage) != 1 or stage[0].part >= 0:
                why = f"{len(stage)} parts of a composed format update {self.output.name}"
                raise illegal(why, "atomic(), or a format that keeps rows whole")
            op = updates[0].op
            stages += [(self._update(stage[0]),), (self._join(op),)]
        tensors, buffers = (*program.tensors, self.tensor), (*program.buffers, self.buffer)
        return replace(program, tensors=tensors, buffers=buffers, stages=tuple(stages))

    def _start(self, nest: ir.Nest) -> ir.Nest:
        """All copies start where the output did."""

        def started(c: ir.Compute) -> ir.Stmt:
            value = ir.cast(c.value, self.buffer.dtype)
            first = replace(c, out=self._at(self.copy, c), value=value)
            return ir.For(self.copy, ir.as_expr(0), ir.as_expr(self.copies), first)

        return replace(nest, body=self._each(nest.body, started))

    def _update(self, nest: ir.Nest) -> ir.Nest:
        top = nest.body
        if not (isinstance(top, ir.For) and matches(top, self.loop)):
            why = f"{self.loop!r} is not the outermost loop that updates {self.output.name}"
            raise unknown(why, f"the outermost is {getattr(top, 'name', 'none')}")
        if top.kind != "serial":
            raise illegal(f"loop {top.name} is marked {top.kind}", "privatize it first")
        share = ir.ceil_div(ir.simplify(ir.binary("-", top.end, top.begin)), self.copies)
        first = ir.add(top.begin, ir.mul(self.copy, share))
        begin = ir.binary("min", top.end, first)  # none runs backwards
        end = ir.binary("min", top.end, ir.add(begin, share))
        body = self._each(top.body, lambda c: replace(c, out=self._at(self.copy, c), atomic=False))
        groups = ir.For(
            self.copy, ir.as_expr(0), ir.as_expr(self.copies),
            ir.For(top.var, begin, end, body, "serial", top.axes), "parallel",
        )  # fmt: skip
        return replace(nest, body=groups)

    def _join(self, op: str) -> ir.Nest:
        """The output from its copies, the first one first."""
        axes = [ir.Var(f"copy_{d}", self.copy.dtype) for d in range(len(self.output.dims))]
        copies = (ir.Const(n, self.copy.dtype) for n in range(self.copies))
        loads = (ir.Load(self.buffer, (n, *axes), self.buffer.dtype) for n in copies)
        value = reduce(lambda a, b: ir.Binary(ir.REDUCTIONS[op], a, b, a.dtype), loads)
        out = ir.Load(self.original, tuple(axes), self.original.dtype)
        body: ir.Stmt = ir.Compute(out, ir.cast(value, out.dtype))
        for var, size in reversed([*zip(axes, self.original.shape, strict=True)]):
            kind = "parallel" if var is axes[0] else "serial"
            body = ir.For(var, ir.as_expr(0), size, body, kind)
        return ir.Nest(f"{self.output.name}.join", body)

    def _at(self, copy: ir.Expr, c: ir.Compute) -> ir.Load:
        return ir.Load(self.buffer, (copy, *c.out.index), self.buffer.dtype)

    def _each(self, s: Any, f: Any) -> Any:
        """`s` with `f` applied to each statement of the output."""
        return ir.transform(s, lambda x: f(x) if self._is_update(x) else x)

    def _is_update(self, x: Any) -> bool:
        return isinstance(x, ir.Compute) and x.out.buffer.name == self.output.name
