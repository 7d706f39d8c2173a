"""A verifier for each level. A violation is a bug of a pass (I101), never the user's fault."""

from __future__ import annotations

from typing import Any

from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.names import COUNT, SIZE, STRIDE, is_generated
from tilewright.ir.rewrite import free_vars, is_const, path_to, statements, walk

# fmt: off
_STATEMENTS = (
    ir.Seq, ir.For, ir.Let, ir.If, ir.Store, ir.Alloc, ir.Prefetch, ir.Sync, ir.Commit, ir.Wait,
    ir.Mma, ir.Scatter,
)
_VECTORS = (ir.Ramp, ir.Broadcast, ir.ReduceLanes, ir.ReduceThreads)
LEGAL: dict[str, tuple[type, ...]] = {
    "coordinates": (ir.Assign, ir.Access, ir.Stored, ir.Reduce, ir.Index),
    "positions": (
        *_STATEMENTS, ir.Compute, ir.Load, ir.Search, ir.Cursor, ir.Holds, ir.ReduceThreads,
    ),
    "loops": (*_STATEMENTS, ir.Load, ir.Search, ir.Cursor, ir.Holds, *_VECTORS),
}
# fmt: on
LEVELLED = (ir.Access, ir.Stored, ir.Reduce, ir.Load, ir.Search, ir.Cursor, ir.Holds, *_VECTORS)


def verify(program: ir.Program, after: str = "") -> None:
    """Checks every node of a program: its kind, its types, and that each name is bound where it is
    read. Raises InternalError[I101] that names the pass `after` which it ran."""
    check = _Checker(program, after)
    if program.level == "coordinates":
        for statement in program.body:
            check.assign(statement)
    for stage in program.stages:
        for nest in stage:
            check.nest(nest)
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
        raise InternalError(
            "I101", f"{self.level} level{ran}: {why}: {node}", hint="please report this bug"
        )

    def covered(self, program: ir.Program, t: ir.Tensor) -> None:
        """The first stage that stores a dense output stores every element of it."""
        stores = [
            [(n, c) for n in stage for c in statements(n.body)
             if isinstance(c, ir.Compute) and c.out.buffer.name == t.name]
            for stage in program.stages
        ]  # fmt: skip
        for nest, compute in next(filter(None, stores), []):
            listed = nest.part >= 0 and program.tensor(nest.structure).format.covers_rows
            if not listed and not _visits_all(nest.body, compute):
                self.fail(f"some elements of {t.name} are not stored", nest.body)

    def assign(self, s: ir.Assign) -> None:
        if s.out.tensor.name not in self.tensors:
            self.fail("unknown tensor", s)
        if s.value.dtype != s.out.dtype:
            self.fail(f"{s.value.dtype} assigned to {s.out.dtype}", s)
        bound = set().union(*map(free_vars, s.out.coords))
        self.expr(s.value, bound)

    def nest(self, n: ir.Nest) -> None:
        bound = {v.name for v in n.grid_vars} | {"thread_x", "thread_y"}
        self.stmt(n.body, bound, {})

    def stmt(self, s: ir.Stmt, bound: set[str], registers: dict[str, ir.Buffer]) -> None:
        if not isinstance(s, self.legal):
            self.fail(f"{type(s).__name__} is illegal at this level", s)
        if isinstance(s, ir.Seq):
            self.seq(s, set(bound), dict(registers))
        elif isinstance(s, ir.For):
            self.loop(s, bound, registers)
        elif isinstance(s, ir.If):
            if s.cond.dtype.kind != "b" or s.cond.dtype.lanes != 1:
                self.fail("a guard is one truth value", s.cond)
            self.expr(s.cond, bound, registers)
            self.stmt(s.body, bound, registers)
        elif isinstance(s, ir.Let):
            self.expr(s.value, bound, registers)
            if s.value.dtype != s.var.dtype:
                self.fail(f"{s.var.name} is {s.var.dtype} but gets {s.value.dtype}", s)
        elif isinstance(s, ir.Compute):
            self.compute(s, bound)
        elif isinstance(s, ir.Store):
            self.store(s, bound, registers)
        else:
            if isinstance(s, ir.Scatter) and s.value.dtype != s.workspace.dtype:
                self.fail(f"{s.value.dtype} added to {s.workspace.dtype}", s)
            self.leaf(s, bound, registers)

    def loop(self, s: ir.For, bound: set[str], registers: dict[str, ir.Buffer]) -> None:
        for child in ir.children(s):
            if child is not s.body and child is not s.var:
                self.expr(child, bound, registers)
        if isinstance(s, ir.Drain) and s.workspace is not None:
            self.declared(s.workspace, registers, s)
        if s.name in bound:
            self.fail(f"loop {s.name} shadows another name", s)
        self.stmt(s.body, bound | {s.name}, registers)

    def leaf(self, s: ir.Stmt | ir.Tile, bound: set[str], registers: dict[str, ir.Buffer]) -> None:
        """A statement without others inside, or one of its operands: its buffer and expressions."""
        for name in ("workspace", "acc", "buffer") if not isinstance(s, ir.Alloc) else ():
            if hasattr(s, name):
                self.declared(getattr(s, name), registers, s)
        for child in ir.children(s):
            if isinstance(child, ir.Tile):
                self.leaf(child, bound, registers)
            else:
                self.expr(child, bound, registers)

    def declared(self, b: ir.Buffer, registers: dict[str, ir.Buffer] | None, node: Any) -> None:
        """Fails for a buffer that is neither a parameter nor allocated around the node."""
        if b.scope in ("global", "part"):
            if b.name not in self.buffers:
                self.fail(f"buffer {b.name} is not declared", node)
        elif registers is not None and b.name not in registers:
            self.fail(f"{b.scope} {b.name} is not allocated here", node)

    def seq(self, s: ir.Seq, bound: set[str], registers: dict[str, ir.Buffer]) -> None:
        own: set[str] = set()
        for b in s.body:
            self.stmt(b, bound, registers)
            if isinstance(b, ir.Let):
                if b.var.name in bound:
                    self.fail(f"{b.var.name} is bound twice", b)
                bound.add(b.var.name)
            if isinstance(b, ir.Alloc):
                if b.buffer.name in own:
                    self.fail(f"{b.buffer.name} is allocated twice", b)
                own.add(b.buffer.name)
                registers[b.buffer.name] = b.buffer

    def compute(self, s: ir.Compute, bound: set[str]) -> None:
        self.expr(s.out, bound, None)
        for e in (s.value, *(r.value for r in s.reductions)):
            self.expr(e, bound, None)
        if s.reductions and (s.op or s.in_place or not s.reduce):
            self.fail("an epilogue belongs to a reduction that is not in place", s)
        if not s.op and s.value.dtype != s.out.dtype:
            self.fail(f"{s.value.dtype} assigned to {s.out.dtype}", s)

    def store(self, s: ir.Store, bound: set[str], registers: dict[str, ir.Buffer]) -> None:
        self.leaf(s, bound, registers)
        if s.value.dtype.scalar != s.buffer.dtype.scalar:
            self.fail(f"{s.value.dtype} stored to {s.buffer.dtype}", s)
        self.indices(s)

    def indices(self, x: ir.Load | ir.Store) -> None:
        if x.buffer.scope == "register" and len(x.index) != len(x.buffer.shape):
            self.fail(f"{x.buffer} accessed with {len(x.index)} indices", x)

    def expr(
        self, e: ir.Expr, bound: set[str], registers: dict[str, ir.Buffer] | None = None
    ) -> None:
        if isinstance(e, ir.Var):
            if e.name not in bound and not is_generated(e.name, SIZE, STRIDE, COUNT):
                self.fail(f"{e.name} is not bound", e)
            return
        if isinstance(e, ir.Const):
            return
        if isinstance(e, ir.Binary):
            if e.a.dtype != e.b.dtype and e.op not in ("<<", ">>"):
                self.fail(f"{e.a.dtype} {e.op} {e.b.dtype}", e)
            if (e.op in ir.COMPARISON) != (e.dtype.kind == "b") and e.op not in ("&", "|", "^"):
                self.fail(f"{e.op} gives {e.dtype}", e)
        elif isinstance(e, LEVELLED) and not isinstance(e, self.legal):
            self.fail(f"{type(e).__name__} is illegal at this level", e)
        if isinstance(e, ir.Reduce):
            shadowed = [a.name for a in e.axes if a.name in bound]
            if shadowed:
                self.fail(f"the reduction shadows {', '.join(shadowed)}", e)
            self.expr(e.body, bound | {a.name for a in e.axes}, registers)
            return
        for name in ("buffer", "keys", "workspace"):  # of Load, Search and Holds
            if hasattr(e, name):
                self.declared(getattr(e, name), registers, e)
        if isinstance(e, ir.Load):
            self.indices(e)
        for child in ir.children(e):
            self.expr(child, bound, registers)


def _visits_all(body: ir.Stmt, compute: ir.Compute) -> bool:
    """Whether loops and guards around `compute` leave out no element of its output: those that do
    not reduce go from 0 to a size, and only the end of a block is cut off."""
    reducing = False
    for s in path_to(body, compute) or ():
        if isinstance(s, ir.For):
            reducing |= ir.reduces(s, compute)
            covers = is_const(s.begin, 0) and not any(map(_is_read, walk(s.end)))
            if not (ir.reduces(s, compute) or covers):
                return False
        elif isinstance(s, ir.If) and not reducing and not _is_tail(s.cond):
            return False
    return True


def _is_read(e: Any) -> bool:
    return isinstance(e, (ir.Load, ir.Search)) or (
        isinstance(e, ir.Var) and is_generated(e.name, COUNT)
    )


def _is_tail(cond: ir.Expr) -> bool:
    return isinstance(cond, ir.Binary) and cond.op == "<" and not any(map(_is_read, walk(cond.b)))
