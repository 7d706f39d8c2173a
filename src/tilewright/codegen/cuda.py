"""CUDA C++ for NVRTC: a body for each stage, around which `shell.py` puts a `__global__` function.

A nest is a `__device__` function of (params, row of the work table, unit, shared memory); `run` of
a stage finds the row of its CTA. The work table is part of the parameter block: no load is needed
to find it, and another matrix changes only the number of CTAs of a launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tilewright.codegen.cfamily import Renderer, has_tiles
from tilewright.codegen.params import C_TYPES, Params, c_name, collect_params
from tilewright.ir import nodes as ir
from tilewright.ir.affine import is_multiple
from tilewright.ir.body import Body
from tilewright.ir.names import STRIDE, is_generated
from tilewright.ir.rewrite import is_const, walk

RESIDENT = 1024  # threads of an SM that share its registers: 64 for each
EIGHT = 8  # elements of a row that ldmatrix reads at once
WIDE = 16  # bytes of the widest access: where an array of shared memory may start
RESIDENT_MMA = 384  # where accumulators are fragments: 168 registers for each


_BITS32 = {"nan": "0x7fc00000", "inf": "0x7f800000", "-inf": "0xff800000"}
_BITS64 = {"nan": "0x7ff8000000000000", "inf": "0x7ff0000000000000", "-inf": "0xfff0000000000000"}


@dataclass
class CudaRenderer(Renderer):
    """The GPU's renderer: read-only loads, reductions across threads, matrix tiles of a warp."""

    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0  # of shared memory, used by the body so far
    fragments: dict[tuple[ir.Tile, str], str] = field(default_factory=dict)  # loaded operand tiles
    fragment_count: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.written = self.params.written

    def block(self, head: str, body: ir.Stmt) -> None:
        self.fragments.clear()
        super().block(head, body)
        self.fragments.clear()

    def sync(self) -> None:
        self.fragments.clear()
        self.line(f"tw::bar_sync(BARRIER, {self.threads[0] * self.threads[1]});")

    def unroll_pragma(self, n: int) -> str:
        return f"#pragma unroll {n}"

    restrict = "__restrict__"

    def mask(self, text: str, lanes: int) -> str:
        return f"tw::convert<bool, {lanes}>({text})"

    def prefetch(self, address: str) -> str:
        return f"tw::prefetch({address});"

    def var(self, e: ir.Var) -> str:
        if e.name in ("thread_x", "thread_y"):
            return f"static_cast<{self.type(e.dtype)}>({'tx' if e.name == 'thread_x' else 'ty'})"
        return super().var(e)

    def load_scalar(self, b: ir.Buffer, element: str) -> str:
        verb = self.load_verb(b)
        return element if verb == "load" else f"tw::{verb}(&{element})"

    def load_vector(self, b: ir.Buffer, base: ir.Expr, lanes: int) -> str:
        kind = _vector_of(b, base, lanes)
        return f"tw::{self.load_verb(b)}<{kind}>({self.address(b, base)})"

    def load_verb(self, b: ir.Buffer) -> str:
        """How memory is read: weights through the read-only path; inputs, which a launch before may
        have written, too, where launches do not overlap; what the program writes by plain loads."""
        if b.name in self.written or b.scope == "shared":
            return "load"
        return "load_const" if b.kind == "weight" else "load_input"

    def store_vector(self, b: ir.Buffer, base: ir.Expr, value: str, lanes: int) -> str:
        return f"tw::store<{_vector_of(b, base, lanes)}>({self.address(b, base)}, {value});"

    def const(self, e: ir.Const) -> str:
        if not e.dtype.is_float or math.isfinite(e.value):
            return super().const(e)
        which = "nan" if math.isnan(e.value) else "inf" if e.value > 0 else "-inf"
        if e.dtype.bits == 64:
            return f"__longlong_as_double({_BITS64[which]}ll)"
        return f"__uint_as_float({_BITS32[which]}u)"

    def select(self, e: ir.Select) -> str:
        """Render a guarded load as a predicated load. A branch would serialise the latencies of
        neighbouring loads."""
        if (
            isinstance(e.a, ir.Load)
            and e.cond.dtype.lanes == 1
            and e.a.buffer.name not in self.written
            and is_const(e.b.a if isinstance(e.b, ir.Broadcast) else e.b, 0)
        ):
            index = e.a.index[0].base if isinstance(e.a.index[0], ir.Ramp) else e.a.index[0]
            if e.dtype.lanes == 1 or isinstance(e.a.index[0], ir.Ramp):
                kind = _vector_of(e.a.buffer, index, e.dtype.lanes)
                lanes = "" if e.dtype.lanes > 1 else "[0]"
                address = self.address(e.a.buffer, index)
                verb = self.load_verb(e.a.buffer)
                return f"tw::{verb}_if<{kind}>({self.expr(e.cond)}, {address}){lanes}"
        return super().select(e)

    def reduce_threads(self, e: ir.ReduceThreads) -> str:
        value, op = self.expr(e.a), f"tw::op_{e.op}<{self.type(e.dtype)}>"
        if e.axis == "thread.x":
            return f"tw::across_lanes<{op}, {e.extent}>({value})"
        return (
            f"tw::across_rows<{op}, {e.extent}>({value}, smem, BARRIER, {self.threads[0]}, tx, ty)"
        )

    def alloc(self, b: ir.Buffer) -> None:
        if b.scope == "fragment":
            self.line(f"tw::fragment {c_name(b.name)}[{self.expr(b.shape[0])}];")
        elif b.scope == "shared":
            kind, first = self.type(b.dtype), -(-self.smem_bytes // WIDE) * WIDE
            self.line(
                f"{kind}* const {c_name(b.name)} = reinterpret_cast<{kind}*>(smem + {first});"
            )
            self.smem_bytes = first + b.dtype.itemsize * math.prod(int(e.value) for e in b.shape)  # type: ignore[attr-defined]
        else:
            super().alloc(b)

    def loop(self, s: ir.For) -> None:
        if s.kind != "fragment":
            super().loop(s)
            return
        cols = s.body
        assert isinstance(cols, ir.For) and cols.kind == "fragment"
        self.line("#pragma unroll")
        self.line("for (int e__ = 0; e__ < 4; ++e__) {")
        self.depth += 1
        for f, which in ((s, "row"), (cols, "col")):
            self.line(f"const {self.type(f.var.dtype)} {c_name(f.name)} = "
                      f"tw::fragment_{which}(e__, tx);")  # fmt: skip
        self.stmt(cols.body)
        self.depth -= 1
        self.line("}")

    def register(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> str:
        if b.scope == "fragment":
            return f"{c_name(b.name)}[{self.expr(index[0])}].v[e__]"
        return super().register(b, index)

    def mma(self, s: ir.Mma | ir.MmaZero | ir.MmaStore) -> None:
        acc = f"{c_name(s.acc.name)}[{self.expr(s.slot)}]"
        if isinstance(s, ir.MmaZero):
            self.line(f"tw::mma_zero({acc});")
        elif isinstance(s, ir.Mma):
            a, b = self.fragment(s.a, "a"), self.fragment(s.b, "b")
            self.line(f"tw::mma_{s.a.buffer.dtype.name}({acc}, {a}, {b});")
        else:
            kind = f"tw::{s.to.buffer.dtype.name}_bits"
            verb = "mma_add" if s.op else "mma_store"
            self.line(f"tw::{verb}<{kind}>({self.tile(s.to)}, {acc}, tx);")

    def fragment(self, t: ir.Tile, side: str) -> str:
        """The fragment of an operand tile, loaded once for all products of a block that read it."""
        if (t, side) not in self.fragments:
            name = self.fragments[t, side] = f"{side}__{self.fragment_count}"
            self.fragment_count += 1
            self.line(f"tw::fragment_{side} {name};")
            self.line(f"tw::load_fragment({name}, {self.tile(t)}, tx);")
        return self.fragments[t, side]

    def tile(self, t: ir.Tile) -> str:
        address = self.address(t.buffer, t.offset)
        fields = (t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        if t.buffer.scope != "shared":
            return f"tw::tile({address}, {', '.join(map(self.expr, fields))})"
        down, right = (self.expr(f) for f in fields[:2])
        if _is_multiple(t.offset, EIGHT):
            if right == "1" and _is_multiple(t.row_stride, EIGHT):
                return f"tw::shared_rows_at({address}, {down})"
            if down == "1" and _is_multiple(t.col_stride, EIGHT):
                return f"tw::shared_cols_at({address}, {right})"
        return f"tw::shared_tile({address}, {down}, {right})"


def _vector_of(b: ir.Buffer, base: ir.Expr, lanes: int) -> str:
    """Template arguments of a vector access. It is element by element where the offset is not known
    to be a multiple of the vector size."""
    unaligned = "" if _is_multiple(base, lanes) else ", true"
    return f"{C_TYPES[b.dtype.name]}, {lanes}{unaligned}"


def _is_multiple(e: ir.Expr, n: int) -> bool:
    """Whether an offset is a multiple of n, strides of arrays being multiples of 16 bytes: arrays
    for which that does not hold run the code that is compiled with TW_UNALIGNED."""
    return is_multiple(e, n, lambda v: is_generated(v.name, STRIDE))


def render(
    program: ir.Program, declarations: str, params: Params | None = None
) -> tuple[Body, ...]:
    """A body for each stage of a program at the loop level; all share one text. `declarations` are
    the structs Params and Row."""
    params = params or collect_params(program)
    text, bodies = [declarations], []
    for number, stage in enumerate(program.stages):
        used = 0
        for case, nest in enumerate(stage):
            body, nbytes = _body(program, params, nest, f"body{number}_{case}")
            text.append(body)
            used = max(used, nbytes)
        text.append(_run(stage, number))
        tiles, (reads, writes) = has_tiles(stage), _accesses(stage)
        bodies.append(
            Body(
                "", f"run{number}", stage_threads(stage), RESIDENT_MMA if tiles else RESIDENT, used,
                ("gpu.cuh", *("mma.cuh",) * tiles), reads, writes,
            )
        )  # fmt: skip
    return tuple(replace(b, text="\n".join(text)) for b in bodies)


def _accesses(stage: tuple[ir.Nest, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the buffers that a stage reads, and of those that it writes."""
    reads, writes = {}, {}
    for x in (x for nest in stage for x in walk(nest.body)):
        if isinstance(x, (ir.Store, ir.MmaStore)):
            to = x.buffer if isinstance(x, ir.Store) else x.to.buffer
            writes[to.name] = to
            if x.op:
                reads[to.name] = to
        elif isinstance(x, ir.Load):
            reads[x.buffer.name] = x.buffer
        elif isinstance(x, ir.Mma):
            reads |= {t.buffer.name: t.buffer for t in (x.a, x.b)}
        elif isinstance(x, ir.Search):
            reads[x.keys.name] = x.keys
    outside = ("global", "part")
    return tuple(
        tuple(n for n, b in found.items() if b.scope in outside) for found in (reads, writes)
    )  # type: ignore[return-value]


def _body(program: ir.Program, params: Params, nest: ir.Nest, name: str) -> tuple[str, int]:
    renderer = CudaRenderer(
        program, params, threads=nest.threads, smem_bytes=_reduction_bytes(nest)
    )
    body = renderer.body(nest)
    x, y = nest.threads
    args = "const Params& p, const Row& r, int64_t unit, int thread, char* smem"
    head = f"TW_INLINE void {name}({args})"
    thread_ids = f"  const int tx = thread % {x}, ty = thread / {x};  // {x} x {y} threads"
    return f"// {nest.name}\n{head} {{\n{thread_ids}\n{body}\n}}", renderer.smem_bytes


def _reduction_bytes(nest: ir.Nest) -> int:
    """Bytes at the start of shared memory for the reductions over thread.y."""
    sums = (x for x in walk(nest.body) if isinstance(x, ir.ReduceThreads) and x.axis == "thread.y")
    sizes = (nest.threads[0] * x.extent * x.dtype.itemsize * x.dtype.lanes for x in sums)
    return max(sizes, default=0)


def stage_threads(stage: tuple[ir.Nest, ...]) -> int:
    """Threads of a CTA: the maximum over its bodies. Smaller bodies leave the rest idle."""
    return max(n.threads[0] * n.threads[1] for n in stage)


def _run(stage: tuple[ir.Nest, ...], number: int) -> str:
    """The function of a stage: finds the row of a CTA in the work table and calls its body."""
    threads = stage_threads(stage)
    head = f"TW_INLINE void run{number}(const Params& p, int64_t unit, int thread, char* smem) {{\n"

    def call(case: int, nest: ir.Nest, unit: str, row: str) -> str:
        mine = nest.threads[0] * nest.threads[1]
        guard = f"if (thread < {mine}) " if mine < threads else ""
        return f"{guard}body{number}_{case}(p, {row}, {unit}, thread, smem);"

    if stage[0].part < 0:
        return head + f"  {call(0, stage[0], 'unit', 'p.rows[0]')}\n}}"
    cases = "\n".join(
        f"    case {n.part}: {call(c, n, 'unit - r.first', 'r')} break;"
        for c, n in enumerate(stage)
    )
    return head + (
        "  int at = 0;\n"
        "  while (at + 1 < p.row_count && unit >= p.rows[at + 1].first) ++at;\n"
        "  const Row& r = p.rows[at];\n"
        "  switch (static_cast<int>(r.body)) {\n" + cases + "\n  }\n}"
    )
