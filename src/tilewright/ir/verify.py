"""A verifier for each level. A violation is a bug of a pass (I101), never the user's fault."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from tilewright.errors import InternalError
from tilewright.ir import core as ir
from tilewright.ir.names import COUNT, SIZE, STRIDE, is_generated

# fmt: off
_STATEMENTS = (
    ir.Seq, ir.For, ir.Let, ir.If, ir.Store, ir.Alloc, ir.Prefetch, ir.Sync, ir.Commit, ir.Wait,
    ir.Mma, ir.LoadTile, ir.Scatter,
)
_READS = (ir.Load, ir.Search, ir.Cursor, ir.Holds)
_VECTORS = (ir.Ramp, ir.Broadcast, ir.ReduceLanes, ir.ReduceThreads)
LEGAL: dict[str, tuple[type, ...]] = {
    "coordinates": (ir.Assign, ir.Access, ir.Stored, ir.Reduce, ir.Index),
    "positions": (*_STATEMENTS, *_READS, ir.Compute, ir.ReduceThreads),
    "loops": (*_STATEMENTS, *_READS, *_VECTORS),
}
# fmt: on
LEVELLED = (ir.Stmt, ir.Access, ir.Stored, ir.Reduce, *_READS, *_VECTORS)


def verify(program: ir.Program, after: str = "") -> None:
    """Checks every node of a program: its kind, its types, and that each name is bound where it is
    read. Raises InternalError[I101] that names the pass `after` which it ran."""
    check = _Checker(program, after)
    for statement in program.body if program.level == "coordinates" else ():
        check.node(statement, set().union(*map(ir.free_vars, statement.out.coords)), {})
    for nest in program.nests:
        check.node(nest.body, {v.name for v in nest.grid_vars} | {"thread_x", "thread_y"}, {})
    if after == "coordinates_to_positions":
        for t in program.tensors:
            if t.role in ("output", "temp") and t.kind != "state" and not t.is_sparse:
                check.covered(program, t)


class _Checker:
    def __init__(self, program: ir.Program, after: str) -> None:
        self.legal = LEGAL[program.level]
        self.level, self.after = program.level, after
        self.tensors = {t.name for t in program.tensors}
        self.buffers = {b.name for b in program.buffers}

    def fail(self, why: str, node: Any) -> None:
        ran = f" after {self.after}" if self.after else ""
        raise InternalError("I101", f"{self.level} level{ran}: {why}: {node}")

    def covered(self, program: ir.Program, t: ir.Tensor) -> None:
        """The first stage that stores a dense output stores every element of it."""
        stores = (
            [(nest, c) for nest in stage for c in ir.statements(nest.body, ir.Compute)
             if c.out.buffer.name == t.name and c.out.buffer.scope == "global"
             and nest.name in (t.name, f"{t.name}.init")]  # in others what is read of it
            for stage in program.stages
        )  # fmt: skip
        for nest, compute in next(filter(None, stores), []):
            listed = nest.part >= 0 and program.tensor(nest.structure).format.covers_rows
            if not listed and not _visits_all(nest.body, compute):
                self.fail(f"some elements of {t.name} are not stored", nest.body)

    def node(self, x: Any, bound: set[str], allocated: Mapping[str, ir.Buffer] | None) -> None:
        """Checks a node and all below it. `bound` names the variables around it, `allocated` the
        buffers; None where totals are read, which are allocated later."""
        if isinstance(x, LEVELLED) and not isinstance(x, self.legal):
            self.fail(f"{type(x).__name__} is illegal at this level", x)
        if why := _fault(x) or _mismatch(x):
            self.fail(why, x)
        for name in _buffer_fields(type(x)):
            self.declared(getattr(x, name), allocated, x)
        if isinstance(x, ir.Var):
            if x.name not in bound and not is_generated(x.name, SIZE, STRIDE, COUNT):
                self.fail(f"{x.name} is not bound", x)
        elif isinstance(x, ir.Seq):
            self.seq(x, set(bound), dict(allocated or {}))
        elif isinstance(x, (ir.For, ir.Reduce)):
            variables = x.axes if isinstance(x, ir.Reduce) else (x.var,)
            own = {v.name for v in variables}
            if shadowed := own & bound:
                self.fail(f"{', '.join(sorted(shadowed))} is bound twice", x)
            for child in ir.children(x):
                inside = any(child is y for y in (x.body, *variables))
                self.node(child, bound | own if inside else bound, allocated)
        elif isinstance(x, ir.Let):
            self.node(x.value, bound, allocated)
        else:
            if isinstance(x, ir.Assign) and x.out.tensor.name not in self.tensors:
                self.fail("unknown tensor", x)
            for child in ir.children(x):
                self.node(child, bound, None if isinstance(x, ir.Compute) else allocated)

    def seq(self, s: ir.Seq, bound: set[str], allocated: dict[str, ir.Buffer]) -> None:
        own: set[str] = set()
        for b in s.body:
            self.node(b, bound, allocated)
            if isinstance(b, ir.Let):
                if b.var.name in bound:
                    self.fail(f"{b.var.name} is bound twice", b)
                bound.add(b.var.name)
            if isinstance(b, ir.Alloc):
                if b.buffer.name in own:
                    self.fail(f"{b.buffer.name} is allocated twice", b)
                own.add(b.buffer.name)
                allocated[b.buffer.name] = b.buffer

    def declared(self, b: ir.Buffer, allocated: Mapping[str, ir.Buffer] | None, node: Any) -> None:
        """Fails for a buffer that is neither a parameter nor allocated around the node."""
        if b.scope in ("global", "part"):
            if b.name not in self.buffers:
                self.fail(f"buffer {b.name} is not declared", node)
        elif allocated is not None and b.name not in allocated:
            self.fail(f"{b.scope} {b.name} is not allocated here", node)


@cache
def _buffer_fields(cls: type) -> tuple[str, ...]:
    """The fields of a node class for the buffers that it uses, and does not declare itself."""
    names = (f.name for f in fields(cls) if str(f.type).startswith("Buffer"))
    return () if issubclass(cls, (ir.Alloc, ir.Reduction)) else tuple(names)


def _fault(x: Any) -> str:
    """What is wrong with a node by itself; "" if nothing is."""
    if isinstance(x, ir.If) and (x.cond.dtype.kind != "b" or x.cond.dtype.lanes != 1):
        return "a guard is one truth value"
    if isinstance(x, ir.Compute) and x.reductions and (x.op or x.in_place or not x.reduce):
        return "an epilogue belongs to a reduction that is not in place"
    if isinstance(x, ir.Binary):
        if x.a.dtype != x.b.dtype and x.op not in ("<<", ">>"):
            return f"{x.a.dtype} {x.op} {x.b.dtype}"
        if (x.op in ir.COMPARISON) != (x.dtype.kind == "b") and x.op not in ("&", "|", "^"):
            return f"{x.op} gives {x.dtype}"
    if isinstance(x, (ir.Load, ir.Store)) and x.buffer.scope == "register":
        read, declared = len(x.index), len(x.buffer.shape)
        return "" if read == declared else f"{x.buffer} accessed with {read} indices"
    return ""


def _mismatch(x: Any) -> str:
    """Says that the value of a statement has another dtype than what it goes to."""
    if isinstance(x, ir.Store):
        to = x.buffer.dtype.vector(x.value.dtype.lanes)
    elif isinstance(x, (ir.Scatter, ir.Let)):
        to = (x.var if isinstance(x, ir.Let) else x.workspace).dtype
    elif isinstance(x, ir.Assign) or (isinstance(x, ir.Compute) and not x.op):
        to = x.out.dtype
    else:
        return ""
    return "" if x.value.dtype == to else f"{x.value.dtype} goes to {to}"


def _visits_all(body: ir.Stmt, compute: ir.Compute) -> bool:
    """Whether loops and guards around `compute` leave out no element of its output: those that do
    not reduce go from 0 to a size, and only the end of a block is cut off."""
    reducing = False
    for s in ir.path_to(body, compute) or ():
        if isinstance(s, ir.For):
            reducing |= ir.reduces(s, compute)
            covers = ir.is_const(s.begin, 0) and not any(map(_is_read, ir.walk(s.end)))
            if not (ir.reduces(s, compute) or covers):
                return False
        elif isinstance(s, ir.If) and not reducing and not _is_tail(s.cond):
            return False
    return True


def _is_read(e: Any) -> bool:
    is_count = isinstance(e, ir.Var) and is_generated(e.name, COUNT)
    return is_count or isinstance(e, (ir.Load, ir.Search))


def _is_tail(cond: ir.Expr) -> bool:
    end = cond.b if isinstance(cond, ir.Binary) and cond.op == "<" else None
    return end is not None and not any(map(_is_read, ir.walk(end)))
