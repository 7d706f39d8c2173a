"""CUDA C++ for NVRTC: a body for each stage, around which `shell.py` puts a `__global__` function.

A nest is a `__device__` function of (params, row of the work table, unit, shared memory); `run` of
a stage finds the row of its CTA. The work table is part of the parameter block: no load is needed
to find it, and another matrix changes only the number of CTAs of a launch.
"""

import math
import struct
from dataclasses import dataclass, field, replace
from itertools import groupby

from tilewright.codegen.cfamily import atom_texts, has, operand_kind
from tilewright.codegen.merge import MergeRenderer
from tilewright.codegen.params import C_TYPES, Params, c_name
from tilewright.ir import core as ir
from tilewright.ir.affine import is_aligned, parted, terms
from tilewright.ir.body import Body
from tilewright.ir.names import ADDRESS, is_generated, parse_name
from tilewright.target import WARP

RESIDENT = 1024  # threads of an SM that share its registers: 64 for each
WIDE = 16  # bytes of the widest access, and of a line that ldmatrix reads
LINES = 8  # of a matrix; a swizzle repeats after as many rows
ALIGNED = 128  # bytes: where an array of shared memory may start
REGISTERS = 65536  # of an SM
OPERANDS = 112  # registers of a thread for operands and addresses beside its fragments
LEAST_MMA = 168  # registers of a thread that has fragments


@dataclass
class CudaRenderer(MergeRenderer):
    """The GPU's renderer: read-only loads, reductions across threads, matrix tiles of a warp."""

    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0  # of shared memory, used by the body so far
    fragments: dict[tuple[ir.Tile, str], str] = field(default_factory=dict)  # loaded operand tiles
    fragment_count: int = 0
    held: frozenset[str] = frozenset()  # registers of operands that are declared here

    def block(self, head: str, body: ir.Stmt) -> None:
        held, self.fragments = self.held, {}
        super().block(head, body)
        self.held, self.fragments = held, {}

    def visit_Sync(self, s: ir.Sync) -> None:
        self.fragments.clear()
        barrier = f"tw::bar_sync(BARRIER, {self.threads[0] * self.threads[1]})"
        self.line(f"{f'__syncwarp(tw::group_mask<{s.lanes}>())' if s.lanes else barrier};")

    def visit_CopyAsync(self, s: ir.CopyAsync) -> None:
        cond = f", {self.expr(s.value.cond)}" if isinstance(s.value, ir.Select) else ""
        (to,), (load, at) = s.index, s.source
        carried, rest = parted(at, _is_address)  # an address, if any, is aligned
        start = f"{self.expr(carried)} + {self.expr(rest)}"
        start = start if _is_address(carried) else self.address(load.buffer, rest)
        kind = _vector_of(load.buffer, rest, load.dtype.lanes)
        to = self.address(s.buffer, to.base if isinstance(to, ir.Ramp) else to)
        self.line(f"tw::copy_async<{kind}>({to}, {start}{cond});")

    def visit_Commit(self, s: ir.Commit) -> None:
        self.line("tw::copy_async_commit();")

    def visit_Wait(self, s: ir.Wait) -> None:
        self.line(f"tw::copy_async_wait<{s.pending}>();")

    restrict, prefetch_function = "__restrict__", "tw::prefetch"
    unroll_pragma = "#pragma unroll"

    def mask(self, text: str, lanes: int) -> str:
        return f"tw::convert<bool, {lanes}>({text})"

    def visit_Var(self, e: ir.Var) -> str:
        if e.name in ("thread_x", "thread_y"):
            return f"static_cast<{self.type(e.dtype)}>({'tx' if e.name == 'thread_x' else 'ty'})"
        return super().visit_Var(e)

    def at(self, b: ir.Buffer, offset: ir.Expr) -> str:
        if not b.swizzled:
            return self.expr(offset)
        # Behind what a thread decides, what the layout leaves alone and all threads share.
        period = LINES * _row(b)
        parts = parted(offset, lambda t: is_aligned(t, period) and not _by_thread(t))
        outside, inside = map(self.expr, parts)
        return f"{_layout(b)}::at({inside}) + {outside}"

    def load_scalar(self, b: ir.Buffer, element: str) -> str:
        verb = self.load_verb(b)
        return element if verb == "load" else f"tw::{verb}(&{element})"

    def load_vector(self, b: ir.Buffer, base: ir.Expr, lanes: int) -> str:
        return f"tw::{self.load_verb(b)}<{_vector_of(b, base, lanes)}>({self.address(b, base)})"

    def load_verb(self, b: ir.Buffer) -> str:
        """How memory is read: weights through the read-only path; inputs, which a launch before may
        have written, too, where launches do not overlap; what the program writes by plain loads."""
        if b.name in self.params.written or b.scope == "shared":
            return "load"
        return "load_const" if b.kind == "weight" else "load_input"

    def store_vector(self, b: ir.Buffer, base: ir.Expr, value: str, lanes: int) -> str:
        return f"tw::store<{_vector_of(b, base, lanes)}>({self.address(b, base)}, {value});"

    def visit_Const(self, e: ir.Const) -> str:
        if not e.dtype.is_float or math.isfinite(e.value):
            return super().visit_Const(e)
        value = math.nan if math.isnan(e.value) else e.value  # one of many NaNs
        if e.dtype.bits == 64:
            return f"__longlong_as_double(0x{struct.pack('>d', value).hex()}ll)"
        return f"__uint_as_float(0x{struct.pack('>f', value).hex()}u)"

    def visit_Select(self, e: ir.Select) -> str:
        """Render a guarded load as a predicated load. A branch would serialise the latencies of
        neighbouring loads."""
        is_zero = ir.is_const(e.b.a if isinstance(e.b, ir.Broadcast) else e.b, 0)
        if not (isinstance(e.a, ir.Load) and e.a.index and e.cond.dtype.lanes == 1 and is_zero):
            return super().visit_Select(e)
        buffer, index = e.a.buffer, e.a.index[0]
        is_gather = e.dtype.lanes > 1 and not isinstance(index, ir.Ramp)
        if is_gather or buffer.scope == "register" or buffer.name in self.params.written:
            return super().visit_Select(e)
        index = index.base if isinstance(index, ir.Ramp) else index
        kind, verb = _vector_of(buffer, index, e.dtype.lanes), self.load_verb(buffer)
        lanes = "" if e.dtype.lanes > 1 else "[0]"
        return f"tw::{verb}_if<{kind}>({self.expr(e.cond)}, {self.address(buffer, index)}){lanes}"

    def visit_ReduceThreads(self, e: ir.ReduceThreads) -> str:
        value, op = self.expr(e.a), f"tw::op_{e.op}<{self.type(e.dtype)}>"
        if e.axis == "thread.x":
            return f"tw::across_lanes<{op}, {e.extent}>({value})"
        args = f"{value}, smem, BARRIER, {self.threads[0]}, tx, ty"
        return f"tw::across_rows<{op}, {e.extent}>({args})"

    def visit_Alloc(self, s: ir.Alloc) -> None:
        b, name = s.buffer, parse_name(s.buffer.name)
        if name is not None and name.kind == ADDRESS:
            array = self.pointer(replace(b, name=name.owner, scope="global"))
            self.line(f"const auto* {c_name(b.name)} = {array};")
        elif b.scope == "fragment":
            slots, _, *cols = map(self.expr, b.shape)
            kind = f"tw::fragment<{cols[0]}>" if cols else "tw::fragment_rows"
            self.line(f"{kind} {c_name(b.name)}[{slots}] = {{}};")
        elif b.scope == "shared":
            aligned = ALIGNED if b.swizzled else WIDE
            kind, first = self.type(b.dtype), -(-self.smem_bytes // aligned) * aligned
            self.line(
                f"{kind}* const {c_name(b.name)} = reinterpret_cast<{kind}*>(smem + {first});"
            )
            self.smem_bytes = first + b.dtype.itemsize * math.prod(int(e.value) for e in b.shape)  # type: ignore[attr-defined]
        else:
            super().visit_Alloc(s)

    def visit_For(self, s: ir.For) -> None:
        if s.kind != "fragment":
            super().visit_For(s)
            return
        self.fragments.clear()
        cols = s.body if isinstance(s.body, ir.For) else None
        step = 1 if cols and cols.kind == "fragment" else 2  # rows are two elements apart
        self.line("#pragma unroll")
        count = (cols.extent or 0) * step // 2 if cols else 4
        with self.braces(f"for (int e__ = 0; e__ < {count}; e__ += {step})"):
            for f, which in ((s, "row(e__, tx)"), (cols, f"col(e__, tx) / {step}")):
                if f is not None:
                    kind = self.type(f.var.dtype)
                    self.line(f"const {kind} {c_name(f.name)} = tw::fragment_{which};")
            self.stmt(cols.body if cols else s.body)

    def visit_Load(self, e: ir.Load) -> str:
        if e.buffer.scope == "fragment" and e.dtype.lanes == 2:
            first = self.register(e.buffer, e.index)
            return f"tw::vec<float, 2>{{{{{first}, {first[:-1]} + 1]}}}}"
        return super().visit_Load(e)

    def register(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> str:
        if b.scope == "fragment":
            lane = "[e__ / 4][e__ % 4]" if len(index) == 3 else "[e__ / 2 % 2]"
            return f"{c_name(b.name)}[{self.expr(index[0])}].v{lane}"
        return super().register(b, index)

    def visit_Seq(self, s: ir.Seq) -> None:
        """Neighbours that multiply by one tile b become one operation."""
        for b, group in groupby(s.body, lambda x: isinstance(x, ir.Mma) and not x.atom and x.b):
            lines = tuple(group)
            products = [x for x in lines if isinstance(x, ir.Mma)]
            if not isinstance(b, ir.Tile) or len(lines) == 1:
                super().visit_Seq(ir.Seq(lines))
                continue
            kind = operand_kind(b.buffer.dtype)
            text = [self.fragment(b, f"b<{products[0].shape[1]}>", kind)]
            for x in products:
                acc = f"{c_name(x.acc.name)}[{self.expr(x.slot)}]"
                text += [acc, self.fragment(x.a, "a", kind)]
            self.line(f"tw::mma_column<{kind}>({', '.join(text)});")

    def visit_Mma(self, s: ir.Mma) -> None:
        kind = operand_kind(s.b.buffer.dtype)
        a, b = self.fragment(s.a, "a", kind), self.fragment(s.b, f"b<{s.shape[1]}>", kind)
        acc = f"{c_name(s.acc.name)}[{self.expr(s.slot)}]"
        function = s.atom.name if s.atom else f"tw::mma<{kind}>"
        self.line(f"{function}({acc}, {a}, {b});")

    def visit_LoadTile(self, s: ir.LoadTile) -> None:
        name = c_name(s.tile.held)
        if name not in self.held:
            kind = "fragment_a" if s.side == "a" else f"fragment_b<{s.shape[1]}>"
            self.line(f"tw::{kind} {name};")
            self.held |= {name}
        self.line(f"tw::load_fragment({name}, {self.tile(s.tile)}, tx);")

    def fragment(self, t: ir.Tile, side: str, kind: str) -> str:
        """The fragment of an operand tile, made once for all products of a block that read it."""
        if t.held:
            return c_name(t.held)
        if (t, side) not in self.fragments:
            name = self.fragments[t, side] = f"{side[0]}__{self.fragment_count}"
            self.fragment_count += 1
            self.line(f"tw::fragment_{side} {name};")
            if t.buffer.scope == "fragment":
                tile = f"{c_name(t.buffer.name)}[{self.expr(t.offset)}]"
                self.line(f"tw::pack_fragment<{kind}>({name}, {tile});")
            else:
                self.line(f"tw::load_fragment({name}, {self.tile(t)}, tx);")
        return self.fragments[t, side]

    def tile(self, t: ir.Tile) -> str:
        if t.buffer.scope != "shared":
            fields = (t.row_stride, t.col_stride, t.row_limit, t.col_limit)
            address = self.address(t.buffer, t.offset)
            return f"tw::tile({address}, {', '.join(map(self.expr, fields))})"
        kind, chunk = C_TYPES[t.buffer.dtype.name], WIDE // t.buffer.dtype.itemsize
        kind, pointer = f"{kind}, {_layout(t.buffer)}", self.pointer(t.buffer)
        strides = ("rows", t.row_stride, t.col_stride), ("cols", t.col_stride, t.row_stride)
        for lines, across, along in strides:
            parts = _line_start(t.buffer, t.offset)
            if ir.is_const(along, 1) and is_aligned(across, chunk) and parts is not None:
                own, rest = parted(parts[0], _by_thread)
                known, start = parted(rest, ir.is_const)
                own, *numbers = map(self.expr, (own, start, known, parts[1], across))
                return f"tw::shared_{lines}<{kind}>{{{{{pointer} + {own}, {', '.join(numbers)}}}}}"
        fields = ", ".join(map(self.expr, (t.offset, t.row_stride, t.col_stride)))
        return f"tw::shared_window<{kind}>{{{pointer}, {fields}}}"


def _is_address(e: ir.Expr) -> bool:
    """Whether a term is an address that a loop carries: a pointer, in the text."""
    return isinstance(e, ir.Load) and is_generated(e.buffer.name, ADDRESS)


def _by_thread(e: ir.Expr) -> bool:
    return bool(ir.free_vars(e) & {"thread_x", "thread_y"})


def _row(b: ir.Buffer) -> int:
    """Elements of a row of scratch."""
    assert isinstance(b.shape[-1], ir.Const)
    return int(b.shape[-1].value)


def _layout(b: ir.Buffer) -> str:
    return f"tw::swizzled<{_row(b)}, {b.dtype.itemsize}>" if b.swizzled else "tw::row_major"


def _line_start(b: ir.Buffer, offset: ir.Expr) -> tuple[ir.Expr, ir.Expr] | None:
    """The offset of a tile whose lines start at multiples of 16 bytes in two parts: one that the
    layout of the buffer leaves alone, and columns that it exchanges. None for other tiles."""
    chunk, row = WIDE // b.dtype.itemsize, _row(b)
    if not b.swizzled:
        return (offset, ir.as_expr(0)) if is_aligned(offset, chunk) else None
    rows = (is_aligned(t, LINES * row if is_aligned(t, row) else chunk) for t in terms(offset))
    return parted(offset, lambda t: is_aligned(t, LINES * chunk)) if all(rows) else None


def _vector_of(b: ir.Buffer, base: ir.Expr, lanes: int) -> str:
    """Template arguments of a vector access. It is element by element where the offset is not known
    to be a multiple of the vector size."""
    unaligned = "" if is_aligned(base, lanes) else ", true"
    return f"{C_TYPES[b.dtype.name]}, {lanes}{unaligned}"


def render(program: ir.Program, declarations: str, params: Params) -> tuple[Body, ...]:
    """A body for each stage of a program at the loop level; all share one text. `declarations` are
    the structs Params and Row."""
    text, bodies = [declarations, *atom_texts(program, "cuda")], []
    for number, stage in enumerate(program.stages):
        used = 0
        for case, nest in enumerate(stage):
            body, nbytes = _body(program, params, nest, f"body{number}_{case}")
            text.append(body)
            used = max(used, nbytes)
        text.append(_run(stage, number))
        reads, writes = _accesses(stage)
        bodies.append(
            Body(
                "", f"run{number}", stage_threads(stage),
                REGISTERS // max(map(_registers, stage)), used, _headers(stage), reads, writes,
            )
        )  # fmt: skip
    return tuple(replace(b, text="\n".join(text)) for b in bodies)


def _headers(stage: tuple[ir.Nest, ...]) -> tuple[str, ...]:
    stores = (x.buffer.scope for n in stage for x in ir.walk(n.body, ir.Store))
    needs = {"mma.cuh": has(stage, ir.Mma), "fragments.cuh": "fragment" in stores}
    needs["async.cuh"] = has(stage, ir.Wait)
    return ("gpu.cuh", *(file for file, is_needed in needs.items() if is_needed))


def _accesses(stage: tuple[ir.Nest, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the buffers in global memory that a stage reads, and of those that it writes."""
    nodes = [x for n in stage for x in ir.walk(n.body, ir.Load, ir.Tile, ir.Store, ir.Search)]
    writes = [x.buffer for x in nodes if isinstance(x, ir.Store)]
    read = (x for x in nodes if not isinstance(x, ir.Store) or x.op)
    reads = [x.keys if isinstance(x, ir.Search) else x.buffer for x in read]

    def names(buffers: list[ir.Buffer]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(b.name for b in buffers if b.scope in ("global", "part")))

    return names(reads), names(writes)


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
    sums = (x for x in ir.walk(nest.body, ir.ReduceThreads) if x.axis == "thread.y")
    sizes = (nest.threads[0] * x.extent * x.dtype.itemsize * x.dtype.lanes for x in sums)
    return max(sizes, default=0)


def stage_threads(stage: tuple[ir.Nest, ...]) -> int:
    """Threads of a CTA: the maximum over its bodies. Smaller bodies leave the rest idle."""
    return max(n.threads[0] * n.threads[1] for n in stage)


def _registers(nest: ir.Nest) -> int:
    """Registers of a thread that a nest is compiled for. More of them cost CTAs of an SM."""
    allocs = (x.buffer for x in ir.walk(nest.body, ir.Alloc))
    shapes = [b.shape for b in allocs if b.scope == "fragment"]
    held = sum(math.prod(int(e.value) for e in shape) // WARP for shape in shapes)
    return max(LEAST_MMA, held + OPERANDS) if held else REGISTERS // RESIDENT


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
