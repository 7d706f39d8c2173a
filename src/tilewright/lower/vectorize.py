"""Passes on unrolled loops, which are written out, and on vector loops, which become registers."""

import math
from dataclasses import replace
from typing import Any

from tilewright.dtypes import DType
from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import affine


def vectorize_loops(program: ir.Program) -> ir.Program:
    """A vector loop becomes straight-line code on vector registers.

    before: for v in 0:16  # vector          after: acc[0] += broadcast(a[p]) * X[o +: 16]
              acc[0, v] += a[p] * X[o + v]          (acc: one register of 16 lanes)
    """
    return ir.map_bodies(program, _vectorize)


def pair_fragments(program: ir.Program) -> ir.Program:
    """The two neighbours in a row of a fragment that a thread has become a vector, unless what is
    done differs between them.

    before: for r in 0:16  # fragment        after: for r in 0:16  # fragment
              for c in 0:8  # fragment                for c.pair in 0:4  # pairs
                Y[o + c] = acc[r, c] * 2                for c.lane in 0:2  # vector
                                                          Y[o + c.pair*2 + c.lane] = …
    """

    def visit(s: Any) -> Any:
        if not isinstance(s, ir.For) or s.kind != "fragment" or isinstance(s.body, ir.For):
            return s
        if any(x.buffer.scope == "fragment" for x in ir.walk(s, ir.Store)):
            return s  # in registers neighbours are not together
        pair, lane = (ir.Var(f"{s.name}.{part}", s.var.dtype) for part in ("pair", "lane"))
        body = ir.substitute(s.body, {s.name: ir.add(ir.mul(pair, 2), lane)})
        vector = ir.For(lane, ir.as_expr(0), ir.as_expr(2), body, "vector")
        try:
            _Vectorizer(vector, {}).stmt(body)
        except ScheduleError:
            return s
        return ir.For(pair, s.begin, ir.as_expr((s.extent or 0) // 2), vector, "pairs")

    return ir.map_bodies(program, lambda body: ir.transform(body, visit))


def unroll_loops(program: ir.Program) -> ir.Program:
    """An unrolled loop of constant extent is written out.

    before: for u in 0:2  # unroll           after: acc[0] = 0; acc[1] = 0
              acc[u] = 0
    """
    return ir.map_bodies(program, lambda body: ir.simplify(ir.transform(body, _Unroller().visit)))


def split_registers(program: ir.Program) -> ir.Program:
    """A register array whose indices are all constants becomes one register for each element:
    compilers keep named vectors in registers where they leave arrays in memory.

    before: alloc acc[4]; acc[0] = 0; …      after: alloc acc.0, acc.1, …; acc.0 = 0; …
    """
    return ir.map_bodies(program, _split)


class _Unroller:
    def __init__(self) -> None:
        self.copies = 0

    def visit(self, s: Any) -> Any:
        if not (isinstance(s, ir.For) and s.kind == "unroll" and s.extent is not None):
            return s
        first = int(s.begin.value)  # type: ignore[attr-defined]
        copies = []
        for i in range(first, first + s.extent):
            self.copies += 1
            body = ir.substitute(s.body, {s.name: ir.Const(i, s.var.dtype)})
            copies.append(_renamed_lets(body, f".{self.copies}") if s.extent > 1 else body)
        lines = enumerate(ir.lines(ir.seq(*copies)))
        once = {b if isinstance(b, ir.Prefetch) else n: b for n, b in lines}
        return ir.seq(*once.values())  # each prefetch once


def _renamed_lets(s: ir.Stmt, suffix: str) -> ir.Stmt:
    """The lets and registers of a copy under new names, so that copies share a scope: also those
    under guards, which may prove to be always true."""
    if isinstance(s, ir.If):
        return replace(s, body=_renamed_lets(s.body, suffix))
    out: list[ir.Stmt] = []
    names: dict[str, ir.Expr] = {}
    buffers: dict[str, ir.Buffer] = {}
    for b in ir.lines(s):
        b = _rename_buffers(ir.substitute(b, names), buffers)
        if isinstance(b, ir.Let):
            fresh = ir.Var(b.var.name + suffix, b.var.dtype)
            names[b.var.name] = fresh
            b = ir.Let(fresh, b.value)
        elif isinstance(b, ir.Alloc):
            buffers[b.buffer.name] = replace(b.buffer, name=b.buffer.name + suffix)
            b = replace(b, buffer=buffers[b.buffer.name])
        elif isinstance(b, ir.If):
            b = _renamed_lets(b, suffix)
        out.append(b)
    return ir.seq(*out)


def _rename_buffers(s: Any, buffers: dict[str, ir.Buffer]) -> Any:
    if not buffers:
        return s

    def visit(x: Any) -> Any:
        if isinstance(x, (ir.Load, ir.Store, ir.Tile)) and x.buffer.name in buffers:
            return replace(x, buffer=replace(x.buffer, name=buffers[x.buffer.name].name))
        if isinstance(x, ir.Mma) and x.acc.name in buffers:
            return replace(x, acc=buffers[x.acc.name])
        return x

    return ir.transform(s, visit)


def _vectorize(body: ir.Stmt) -> ir.Stmt:
    wide: dict[str, tuple[int, int]] = {}  # accumulator -> (its vector dimension, lanes)

    def visit(s: Any) -> Any:
        if isinstance(s, ir.For) and s.kind == "vector":
            if s.extent is None or not ir.is_const(s.begin, 0):
                rule = f"loop {s.name} is to be a vector but its extent is not a constant"
                raise illegal(rule, "split it by the number of lanes first, with tail='cut'")
            if s.extent == 1:
                return ir.substitute(s.body, {s.name: s.begin})
            return _Vectorizer(s, wide).stmt(s.body)
        return s

    return _narrow(ir.transform(ir.transform(body, _apart), visit), wide)


def _apart(s: Any) -> Any:
    """A vector loop leaves its lets to the statements around it, so they get names of their own
    where the statements behind it (the tail of a split loop) bind the same ones."""
    if not isinstance(s, ir.Seq):
        return s
    out: list[ir.Stmt] = []
    for n, b in enumerate(s.body):
        if isinstance(b, ir.For) and (b.kind == "vector" or (b.kind, b.extent) == ("unroll", 1)):
            behind = {x.var.name for later in s.body[n + 1 :] for x in ir.statements(later, ir.Let)}
            if any(x.var.name in behind for x in ir.statements(b.body, ir.Let)):
                b = replace(b, body=_renamed_lets(b.body, ".vector"))
        out.append(b)
    return ir.seq(*out)


class _Vectorizer:
    """Rewrites the body of one vector loop; `varying` are the names that differ by lane."""

    def __init__(self, loop: ir.For, wide: dict[str, tuple[int, int]]) -> None:
        self.loop, self.wide = loop, wide
        self.lanes = loop.extent or 1
        self.varying: dict[str, DType] = {}
        self.lets: dict[str, ir.Expr] = {}  # those of varying names that are linear
        self.registers: set[str] = set()

    def refuse(self, why: str, hint: str = "vectorize another loop") -> ScheduleError:
        return illegal(f"loop {self.loop.name} cannot be a vector: {why}", hint)

    def varies(self, e: ir.Expr) -> bool:
        varying = {self.loop.name, *self.varying}
        return self.reads_register(e) or any(x.name in varying for x in ir.walk(e, ir.Var))

    def reads_register(self, e: ir.Expr) -> bool:
        return any(x.buffer.name in self.registers for x in ir.walk(e, ir.Load))

    def stmt(self, s: ir.Stmt) -> ir.Stmt:
        if isinstance(s, ir.Seq):
            return ir.seq(*(self.stmt(b) for b in s.body))
        if isinstance(s, ir.Let):
            if not self.varies(s.value):
                return s
            if self.linear(s.value):
                self.lets[s.var.name] = ir.substitute(s.value, self.lets)
            value = self.vector(s.value)
            self.varying[s.var.name] = value.dtype
            return ir.Let(ir.Var(s.var.name, value.dtype), value)
        if isinstance(s, ir.Alloc) and not isinstance(s, ir.AllocRow):
            if s.buffer.scope == "shared":
                raise self.refuse(f"it fills {s.buffer.name}", "cache at a loop around it")
            self.registers.add(s.buffer.name)
            return ir.Alloc(replace(s.buffer, dtype=s.buffer.dtype.vector(self.lanes)))
        if isinstance(s, ir.If):
            if self.varies(s.cond):
                hint = 'split with tail="cut", or specialize() the dimension to a multiple'
                raise self.refuse(f"the guard {s.cond} differs from lane to lane", hint)
            return replace(s, body=self.stmt(s.body))
        if isinstance(s, ir.For):
            if self.varies(s.begin) or self.varies(s.end):
                raise self.refuse(f"the range of loop {s.name} differs from lane to lane")
            return replace(s, body=self.stmt(s.body))
        if isinstance(s, ir.Store):
            return self.store(s)
        if isinstance(s, ir.Prefetch):  # the line of the first lane: a register is one line
            form = self.linear(s.element.index[0])
            return ir.Seq(()) if form is None else ir.Prefetch(replace(s.element, index=(form[0],)))
        raise self.refuse(f"it holds a {type(s).__name__}")

    def store(self, s: ir.Store) -> ir.Stmt:
        value = self.vector(s.value)
        if s.buffer.name in self.registers:
            wide = replace(s.buffer, dtype=s.buffer.dtype.vector(self.lanes))
            return replace(s, buffer=wide, value=value)
        if s.buffer.scope == "register":
            return replace(s, index=self.register_index(s.buffer, s.index), value=value)
        form = self.linear(s.index[0])
        if form is None or form[1] == 0:
            raise self.refuse(f"lanes write {s.buffer.name} at unrelated addresses")
        base, step = form
        if s.atomic or step != 1:
            return replace(s, index=(self.vector(s.index[0]),), value=value)
        return replace(s, index=(ir.Ramp(base, base.dtype.vector(self.lanes)),), value=value)

    def register_index(self, buffer: ir.Buffer, index: tuple[ir.Expr, ...]) -> tuple[ir.Expr, ...]:
        dims = [n for n, i in enumerate(index) if self.varies(i)]
        if len(dims) != 1 or not isinstance(index[dims[0]], ir.Var):
            raise self.refuse(f"the accumulator {buffer.name} does not belong to one lane")
        self.wide[buffer.name] = (dims[0], self.lanes)
        return tuple(ir.Const(0, i.dtype) if n == dims[0] else i for n, i in enumerate(index))

    def vector(self, e: ir.Expr) -> ir.Expr:
        if self.varies(e):
            return self.expr(e)
        return (
            e if self.lanes in (1, e.dtype.lanes) else ir.Broadcast(e, e.dtype.vector(self.lanes))
        )

    def expr(self, e: Any) -> ir.Expr:
        if isinstance(e, ir.Var):
            if e.name == self.loop.name:
                return ir.Ramp(ir.Const(0, e.dtype), e.dtype.vector(self.lanes))
            return ir.Var(e.name, self.varying[e.name])
        if isinstance(e, (ir.Binary, ir.Unary, ir.Cast, ir.ReduceThreads)):
            return replace(ir.rebuild(e, self.vector), dtype=e.dtype.vector(self.lanes))
        if isinstance(e, ir.Select):
            dtype = e.dtype.vector(self.lanes)
            loads = (x for arm in (e.a, e.b) for x in ir.walk(arm, ir.Load))
            if self.varies(e.cond) and any(x.buffer.scope != "register" for x in loads):
                raise self.refuse(f"whether it reads {e.a} differs from lane to lane")
            cond = self.vector(e.cond) if self.varies(e.cond) else e.cond
            return ir.Select(cond, self.vector(e.a), self.vector(e.b), dtype)
        if isinstance(e, ir.Load):
            return self.load(e)
        raise self.refuse(f"{e} has no vector form")

    def load(self, e: ir.Load) -> ir.Expr:
        dtype = e.dtype.vector(self.lanes)
        if e.buffer.name in self.registers:
            return ir.Load(replace(e.buffer, dtype=dtype), e.index, dtype)
        if e.buffer.scope == "register":
            return ir.Load(e.buffer, self.register_index(e.buffer, e.index), dtype)
        form = self.linear(e.index[-1])
        if form and e.buffer.scope == "fragment":
            return ir.Load(e.buffer, (*e.index[:-1], form[0]), dtype)
        if form and form[1] == 1:
            return ir.Load(e.buffer, (ir.Ramp(form[0], form[0].dtype.vector(self.lanes)),), dtype)
        return ir.Load(e.buffer, (self.vector(e.index[0]),), dtype)

    def linear(self, e: ir.Expr) -> tuple[ir.Expr, int] | None:
        """(base, step) when e = base + step * lane."""
        if self.reads_register(e):
            return None
        e = ir.simplify(ir.substitute(e, self.lets))
        form = affine(e, frozenset((self.loop.name, *self.varying)))
        if form is None or form.steps.keys() - {self.loop.name}:
            return None
        step = form.steps.get(self.loop.name, ir.Const(0, e.dtype))
        return (form.base, int(step.value)) if isinstance(step, ir.Const) else None


def _narrow(body: ir.Stmt, wide: dict[str, tuple[int, int]]) -> ir.Stmt:
    """Accumulators of vector loops have lanes in place of the dimension of the loop."""
    if not wide:
        return body

    def buffer(b: ir.Buffer) -> ir.Buffer:
        dim, lanes = wide[b.name]
        return replace(b, dtype=b.dtype.vector(lanes), shape=b.shape[:dim] + b.shape[dim + 1 :])

    def visit(x: Any) -> Any:
        if isinstance(x, ir.Alloc) and x.buffer.name in wide:
            return ir.Alloc(buffer(x.buffer))
        is_access = isinstance(x, (ir.Load, ir.Store))
        if is_access and x.buffer.name in wide and x.buffer.dtype.lanes == 1:
            dim, lanes = wide[x.buffer.name]
            if (x.value if isinstance(x, ir.Store) else x).dtype.lanes != lanes:
                rule = f"{x.buffer.name} holds {lanes} lanes in one loop and not in another"
                hint = "vectorize the loop before cache(), and every loop over it alike"
                raise illegal(rule, hint)
            return replace(x, buffer=buffer(x.buffer), index=x.index[:dim] + x.index[dim + 1 :])
        return x

    return ir.transform(body, visit)


def _split(body: ir.Stmt) -> ir.Stmt:
    buffers = (x.buffer for x in ir.walk(body, ir.Alloc))
    arrays = {b.name: b for b in buffers if b.scope == "register" and b.shape}
    for x in ir.walk(body, ir.Load, ir.Store):
        if x.buffer.name in arrays and any(ir.contains(i, ir.Var) for i in x.index):
            arrays.pop(x.buffer.name)

    def one(b: ir.Buffer, index: tuple[ir.Expr, ...]) -> ir.Buffer:
        flat = 0
        for i, extent in zip(index, b.shape, strict=True):
            flat = flat * int(extent.value) + int(i.value)  # type: ignore[attr-defined]
        return replace(b, name=f"{b.name}.{flat}", shape=())

    def visit(x: Any) -> Any:
        if isinstance(x, ir.Alloc) and x.buffer.name in arrays:
            total = math.prod(int(extent.value) for extent in x.buffer.shape)  # type: ignore[attr-defined]
            scalar = replace(x.buffer, shape=())
            names = (f"{scalar.name}.{i}" for i in range(total))
            return ir.seq(*(ir.Alloc(replace(scalar, name=name)) for name in names))
        if isinstance(x, (ir.Load, ir.Store)) and x.buffer.name in arrays and x.index:
            return replace(x, buffer=one(x.buffer, x.index), index=())
        return ir.seq(*x.body) if isinstance(x, ir.Seq) else x

    return ir.transform(body, visit)
