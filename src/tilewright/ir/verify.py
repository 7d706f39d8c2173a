"""A verifier for each level. A violation is a bug of a pass (I101), never the user's fault."""

from __future__ import annotations

from typing import Any

from tilewright.errors import InternalError
from tilewright.ir.names import COUNT, SIZE, STRIDE, is_given
from tilewright.ir.nodes import (
    COMPARISON,
    Access,
    Alloc,
    Assign,
    Binary,
    Broadcast,
    Buffer,
    Compute,
    Const,
    Expr,
    For,
    If,
    Index,
    Let,
    Load,
    Mma,
    MmaStore,
    MmaZero,
    Nest,
    Prefetch,
    Program,
    Ramp,
    Reduce,
    ReduceLanes,
    ReduceThreads,
    Search,
    Seq,
    Stmt,
    Store,
    Sync,
    Tensor,
    Tile,
    Var,
    children,
)  # fmt: skip
from tilewright.ir.rewrite import path_to, statements, walk

LEGAL: dict[str, tuple[type, ...]] = {
    "coordinates": (Assign, Access, Reduce, Index),
    "positions": (
        Seq,
        For,
        Let,
        If,
        Compute,
        Store,
        Sync,
        Prefetch,
        Load,
        Search,
        Alloc,
        Mma,
        MmaZero,
        MmaStore,
        Tile,
    ),
    "loops": (
        Seq,
        For,
        Let,
        If,
        Store,
        Alloc,
        Prefetch,
        Sync,
        Load,
        Search,
        Ramp,
        Broadcast,
        ReduceLanes,
        ReduceThreads,
        Mma,
        MmaZero,
        MmaStore,
        Tile,
    ),
}


LEVELLED = (Access, Reduce, Load, Search, Ramp, Broadcast, ReduceLanes, ReduceThreads)


def verify(program: Program, after: str = "") -> None:
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
    def __init__(self, program: Program, after: str) -> None:
        self.legal = LEGAL[program.level]
        self.level, self.after = program.level, after
        self.tensors = {t.name for t in program.tensors}
        self.buffers = {b.name for b in program.buffers}

    def fail(self, why: str, node: Any) -> None:
        place = f" after {self.after}" if self.after else ""
        raise InternalError(
            "I101", f"{self.level} level{place}: {why}: {node}", hint="please report this bug"
        )

    def covered(self, program: Program, t: Tensor) -> None:
        """The first stage that stores a dense output stores every element of it."""
        stores = [
            [(n, c) for n in stage for c in statements(n.body)
             if isinstance(c, Compute) and c.out.buffer.name == t.name]
            for stage in program.stages
        ]  # fmt: skip
        for nest, compute in next(filter(None, stores), []):
            listed = nest.part >= 0 and program.tensor(nest.structure).format.covers_rows
            if not listed and not _visits_all(nest.body, compute):
                self.fail(f"some elements of {t.name} are not stored", nest.body)

    def assign(self, s: Assign) -> None:
        if s.out.tensor.name not in self.tensors:
            self.fail("unknown tensor", s)
        if s.value.dtype != s.out.dtype:
            self.fail(f"{s.value.dtype} assigned to {s.out.dtype}", s)
        bound = {x for c in s.out.coords for x in _names(c)}
        self.expr(s.value, bound)

    def nest(self, n: Nest) -> None:
        bound = {v.name for v in n.grid_vars} | {"thread_x", "thread_y"}
        self.stmt(n.body, bound, {})

    def stmt(self, s: Stmt, bound: set[str], registers: dict[str, Buffer]) -> None:
        if not isinstance(s, self.legal):
            self.fail(f"{type(s).__name__} has no place here", s)
        if isinstance(s, Seq):
            self.seq(s, set(bound), dict(registers))
        elif isinstance(s, For):
            self.expr(s.begin, bound, registers)
            self.expr(s.end, bound, registers)
            if s.name in bound:
                self.fail(f"loop {s.name} hides another name", s)
            self.stmt(s.body, bound | {s.name}, registers)
        elif isinstance(s, If):
            if s.cond.dtype.kind != "b" or s.cond.dtype.lanes != 1:
                self.fail("a guard is one truth value", s.cond)
            self.expr(s.cond, bound, registers)
            self.stmt(s.body, bound, registers)
        elif isinstance(s, Let):
            self.expr(s.value, bound, registers)
            if s.value.dtype != s.var.dtype:
                self.fail(f"{s.var.name} is {s.var.dtype} but gets {s.value.dtype}", s)
        elif isinstance(s, Compute):
            self.compute(s, bound)
        elif isinstance(s, Store):
            self.store(s, bound, registers)
        else:
            if isinstance(s, (Mma, MmaZero, MmaStore)):
                self.declared(s.acc, registers, s)
            for child in children(s):
                if isinstance(child, Tile):
                    self.declared(child.buffer, registers, s)
                for e in children(child) if isinstance(child, Tile) else (child,):
                    self.expr(e, bound, registers)

    def declared(self, b: Buffer, registers: dict[str, Buffer] | None, node: Any) -> None:
        """Fails for a buffer that no parameter brings and no statement around allocates."""
        if b.scope in ("global", "part"):
            if b.name not in self.buffers:
                self.fail(f"buffer {b.name} is not declared", node)
        elif registers is not None and b.name not in registers:
            self.fail(f"{b.scope} {b.name} is not allocated here", node)

    def seq(self, s: Seq, bound: set[str], registers: dict[str, Buffer]) -> None:
        own: set[str] = set()
        for b in s.body:
            self.stmt(b, bound, registers)
            if isinstance(b, Let):
                if b.var.name in bound:
                    self.fail(f"{b.var.name} is bound twice", b)
                bound.add(b.var.name)
            if isinstance(b, Alloc):
                if b.buffer.name in own:
                    self.fail(f"{b.buffer.name} is allocated twice", b)
                own.add(b.buffer.name)
                registers[b.buffer.name] = b.buffer

    def compute(self, s: Compute, bound: set[str]) -> None:
        self.expr(s.out, bound, None)
        self.expr(s.value, bound, None)
        if not s.op and s.value.dtype != s.out.dtype:
            self.fail(f"{s.value.dtype} assigned to {s.out.dtype}", s)

    def store(self, s: Store, bound: set[str], registers: dict[str, Buffer]) -> None:
        for i in s.index:
            self.expr(i, bound, registers)
        self.expr(s.value, bound, registers)
        if s.value.dtype.scalar != s.buffer.dtype.scalar:
            self.fail(f"{s.value.dtype} stored to {s.buffer.dtype}", s)
        self.declared(s.buffer, registers, s)
        self.indices(s)

    def indices(self, x: Load | Store) -> None:
        if x.buffer.scope == "register" and len(x.index) != len(x.buffer.shape):
            self.fail(f"{x.buffer} accessed with {len(x.index)} indices", x)

    def expr(self, e: Expr, bound: set[str], registers: dict[str, Buffer] | None = None) -> None:
        if isinstance(e, Var):
            if e.name not in bound and not is_given(e.name, SIZE, STRIDE, COUNT):
                self.fail(f"{e.name} is not bound", e)
            return
        if isinstance(e, Const):
            return
        if isinstance(e, Binary):
            if e.a.dtype != e.b.dtype and e.op not in ("<<", ">>"):
                self.fail(f"{e.a.dtype} {e.op} {e.b.dtype}", e)
            if (e.op in COMPARISON) != (e.dtype.kind == "b") and e.op not in ("&", "|", "^"):
                self.fail(f"{e.op} gives {e.dtype}", e)
        elif isinstance(e, LEVELLED) and not isinstance(e, self.legal):
            self.fail(f"{type(e).__name__} has no place here", e)
        if isinstance(e, Reduce):
            hidden = [a.name for a in e.axes if a.name in bound]
            if hidden:
                self.fail(f"the reduction hides {', '.join(hidden)}", e)
            self.expr(e.body, bound | {a.name for a in e.axes}, registers)
            return
        if isinstance(e, Load):
            self.declared(e.buffer, registers, e)
            self.indices(e)
        elif isinstance(e, Search):
            self.declared(e.keys, registers, e)
        for child in children(e):
            self.expr(child, bound, registers)


def _visits_all(body: Stmt, compute: Compute) -> bool:
    """Whether loops and guards around `compute` leave out no element of its output: those that do
    not reduce go from 0 to a size, and only the end of a block is cut off."""
    reducing = False
    for s in path_to(body, compute) or ():
        if isinstance(s, For):
            reduces = bool(set(s.axes) & set(compute.reduce))
            reducing |= reduces
            whole = s.begin == Const(0, s.begin.dtype) and not any(_is_read(x) for x in walk(s.end))
            if not (reduces or whole):
                return False
        elif isinstance(s, If) and not reducing and not _is_tail(s.cond):
            return False
    return True


def _is_read(e: Any) -> bool:
    return isinstance(e, (Load, Search)) or (isinstance(e, Var) and is_given(e.name, COUNT))


def _is_tail(cond: Expr) -> bool:
    return isinstance(cond, Binary) and cond.op == "<" and not any(map(_is_read, walk(cond.b)))


def _names(e: Expr) -> set[str]:
    found = {e.name} if isinstance(e, Var) else set()
    for child in children(e):
        found |= _names(child)
    return found
