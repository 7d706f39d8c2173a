"""CUDA C++ for NVRTC: bodies in thin shells (DESIGN 13).

A body is a `__device__` function of (params, row of the work table, unit, shared memory); the shell
around it finds the row of its CTA. The work table lies in the parameter block: no load is needed
to find it, and a new matrix needs no new launch configuration but the number of CTAs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilewright.codegen.cfamily import Renderer, Source
from tilewright.codegen.params import C_TYPES, Params, c_name, collect_params
from tilewright.ir.nodes import (
    Broadcast,
    Buffer,
    Const,
    Expr,
    Load,
    Mma,
    MmaStore,
    MmaZero,
    Nest,
    Program,
    Ramp,
    ReduceThreads,
    Select,
    Tile,
    Var,
)  # fmt: skip
from tilewright.ir.rewrite import walk

RESIDENT = 1024  # threads of an SM that the register budget is made for: 64 registers each
RESIDENT_MMA = 384  # where accumulators are fragments: 168 registers each


_BITS32 = {"nan": "0x7fc00000", "inf": "0x7f800000", "-inf": "0xff800000"}
_BITS64 = {"nan": "0x7ff8000000000000", "inf": "0x7ff0000000000000", "-inf": "0xfff0000000000000"}


@dataclass
class CudaRenderer(Renderer):
    """The GPU's renderer: read-only loads, reductions across threads, matrix tiles of a warp."""

    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.written = self.params.written

    def unroll_pragma(self, n: int) -> str:
        return f"#pragma unroll {n}"

    restrict = "__restrict__"

    def prefetch(self, place: str) -> str:
        return f"tw::prefetch({place});"

    def var(self, e: Var) -> str:
        if e.name in ("thread_x", "thread_y"):
            return f"static_cast<{self.type(e.dtype)}>({'tx' if e.name == 'thread_x' else 'ty'})"
        return super().var(e)

    def load_scalar(self, b: Buffer, place: str) -> str:
        if b.name in self.written or b.scope == "shared":
            return place
        return f"tw::load_const(&{place})"

    def load_vector(self, b: Buffer, place: str, lanes: int) -> str:
        verb = "load" if b.name in self.written or b.scope == "shared" else "load_const"
        return f"tw::{verb}<{C_TYPES[b.dtype.name]}, {lanes}>({place})"

    def const(self, e: Const) -> str:
        if not e.dtype.is_float or math.isfinite(e.value):
            return super().const(e)
        which = "nan" if math.isnan(e.value) else "inf" if e.value > 0 else "-inf"
        if e.dtype.bits == 64:
            return f"__longlong_as_double({_BITS64[which]}ll)"
        return f"__uint_as_float({_BITS32[which]}u)"

    def select(self, e: Select) -> str:
        """A load that a condition guards is predicated: a branch would part it from its neighbours
        and their latencies would add up."""
        if (
            isinstance(e.a, Load)
            and e.cond.dtype.lanes == 1
            and e.a.buffer.name not in self.written
            and _zero(e.b)
        ):
            index = e.a.index[0].base if isinstance(e.a.index[0], Ramp) else e.a.index[0]
            if e.dtype.lanes == 1 or isinstance(e.a.index[0], Ramp):
                kind = f"{C_TYPES[e.dtype.name]}, {e.dtype.lanes}"
                place = f"{self.pointer(e.a.buffer)} + {self.expr(index)}"
                lanes = "" if e.dtype.lanes > 1 else "[0]"
                return f"tw::load_const_if<{kind}>({self.expr(e.cond)}, {place}){lanes}"
        return super().select(e)

    def reduce_threads(self, e: ReduceThreads) -> str:
        value, op = self.expr(e.a), f"tw::op_{e.op}<{self.type(e.dtype)}>"
        if e.axis == "thread.x":
            return f"tw::across_lanes<{op}, {e.extent}>({value})"
        width = self.threads[0]
        self.smem_bytes = max(self.smem_bytes, width * e.extent * e.dtype.itemsize * e.dtype.lanes)
        return f"tw::across_rows<{op}, {e.extent}>({value}, smem, {width}, tx, ty)"

    def alloc(self, b: Buffer) -> None:
        if b.scope == "fragment":
            self.line(f"tw::fragment {c_name(b.name)}[{self.expr(b.shape[0])}];")
        else:
            super().alloc(b)

    def mma(self, s: Mma | MmaZero | MmaStore) -> None:
        acc = f"{c_name(s.acc.name)}[{self.expr(s.slot)}]"
        if isinstance(s, MmaZero):
            self.line(f"tw::mma_zero({acc});")
        elif isinstance(s, Mma):
            self.line(
                f"tw::mma_{s.a.buffer.dtype.name}({acc}, {self.tile(s.a)}, {self.tile(s.b)}, tx);"
            )
        else:
            kind = f"tw::{s.to.buffer.dtype.name}_bits"
            verb = "mma_add" if s.op else "mma_store"
            self.line(f"tw::{verb}<{kind}>({self.tile(s.to)}, {acc}, tx);")

    def tile(self, t: Tile) -> str:
        rest = ", ".join(
            self.expr(f) for f in (t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        )
        return f"tw::tile({self.pointer(t.buffer)} + {self.expr(t.offset)}, {rest})"


def _zero(e: Expr) -> bool:
    e = e.a if isinstance(e, Broadcast) else e
    return isinstance(e, Const) and e.value == 0


def render(program: Program, declarations: str, params: Params | None = None) -> Source:
    """The source of a program at the loop level. `declarations` are the structs Params and Row."""
    params = params or collect_params(program)
    uses_mma = any(isinstance(x, MmaZero) for s in program.stages for n in s for x in walk(n.body))
    text = ["// generated by Tilewright", '#include "gpu.cuh"']
    if uses_mma:
        text.append('#include "mma.cuh"')
    text.append(declarations)
    entries, smem = [], []
    for number, stage in enumerate(program.stages):
        used = 0
        for case, nest in enumerate(stage):
            body, nbytes = _body(program, params, nest, f"body{number}_{case}")
            text.append(body)
            used = max(used, nbytes)
        entries.append(f"stage{number}")
        smem.append(used)
        text.append(_shell(stage, number))
    return Source("\n".join(text), tuple(entries), tuple(smem))


def _body(program: Program, params: Params, nest: Nest, name: str) -> tuple[str, int]:
    renderer = CudaRenderer(program, params, threads=nest.threads)
    renderer.depth = 1
    renderer.stmt(nest.body)
    lines = [f"  {line}" for line in (*renderer.body_pointers(nest), *renderer.unit_to_grid(nest))]
    body = "\n".join((*lines, *renderer.lines))
    x, y = nest.threads
    args = "const Params& p, const Row& r, int64_t unit, int thread, char* smem"
    head = f"TW_INLINE void {name}({args})"
    place = f"  const int tx = thread % {x}, ty = thread / {x};  // {x} x {y} threads"
    return f"// {nest.name}\n{head} {{\n{place}\n{body}\n}}", renderer.smem_bytes


def stage_threads(stage: tuple[Nest, ...]) -> int:
    """Threads of a CTA: those of the body that has most; others leave the rest idle."""
    return max(n.threads[0] * n.threads[1] for n in stage)


def _shell(stage: tuple[Nest, ...], number: int) -> str:
    threads = stage_threads(stage)
    fragments = any(isinstance(x, MmaZero) for n in stage for x in walk(n.body))
    resident = RESIDENT_MMA if fragments else RESIDENT
    bounds = f"__launch_bounds__({threads}, {max(1, resident // threads)})"
    head = (
        f'extern "C" __global__ void {bounds} stage{number}(const __grid_constant__ Params p) {{\n'
        "  extern __shared__ __align__(16) char smem[];\n"
        "  const int thread = threadIdx.x;\n"
        "  const int64_t unit = blockIdx.x;\n"
    )

    def call(case: int, nest: Nest, unit: str, row: str) -> str:
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
