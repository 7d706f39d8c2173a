"""Passes: loops of kind `pipeline` copy to shared memory for later iterations while they work, and
load operands of products from it for the next step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir


def pipeline_loops(program: ir.Program) -> ir.Program:
    """Copies to shared memory become asynchronous, into one of several buffers, `stages` - 1
    iterations early. One barrier an iteration is enough: it follows the wait for what this
    iteration reads, and comes before the copies into the buffer that the last one read.

    before: for k in a:b  # pipeline, 3 stages    after: alloc S[3, 64]
              alloc S[64]                                for e in 0:2
              for t in 0:64  # threads                     if a + e < b: async S[e, …] = A[a + e, …]
                S[t] = A[k, t]                             commit
              sync                                       for k in a:b
              … S[t] …                                     wait 1; sync
              sync                                         if k + 2 < b: async S[(k - a + 2) % 3, …]
                                                           commit
                                                           … S[(k - a) % 3, t] …

    Copies of an iteration are a group even where there are none, so that the number of groups that
    may still be under way is always the same. A branch around them was faster than predicates.
    Reference: the multistage main loop of CUTLASS, for the order of wait, barrier and copies.
    """
    return ir.map_bodies(program, lambda body: _visit(body, False))


def _visit(s: Any, repeated: bool) -> Any:
    """`repeated`: a loop around `s` runs it again in the same CTA."""
    if isinstance(s, ir.For):
        repeated_below = repeated or s.kind not in (*ir.GRID, *ir.THREADS)
        s = ir.rebuild(s, lambda x: _visit(x, repeated_below))
        return _pipelined(s, repeated) if s.kind == "pipeline" else s
    return ir.rebuild(s, lambda x: _visit(x, repeated)) if isinstance(s, (ir.Seq, ir.If)) else s


def is_copy(s: ir.Stmt) -> bool:
    """Whether a statement is the copy of an operand by all threads of the CTA."""
    return isinstance(s, ir.For) and s.kind == "threads"


def _pipelined(f: ir.For, repeated: bool) -> ir.Stmt:
    assert isinstance(f.body, ir.Seq)
    scratch = {
        s.buffer.name: replace(s.buffer, shape=(ir.as_expr(f.stages), *s.buffer.shape))
        for s in f.body.body if isinstance(s, ir.Alloc) and s.buffer.scope == "shared"
    }  # fmt: skip
    copies = ir.seq(*filter(is_copy, f.body.body))
    work = [s for s in f.body.body if not is_copy(s) and not isinstance(s, (ir.Alloc, ir.Sync))]
    first, last = (ir.Var(f"{f.name}.{end}", f.var.dtype) for end in ("first", "last"))

    def staged(s: Any, number: ir.Expr) -> Any:
        """`s` on the buffer of the iteration of that number."""
        stage = ir.simplify(ir.binary("%", number, f.stages))

        def visit(x: Any) -> Any:
            if isinstance(x, (ir.Load, ir.Store)) and x.buffer.name in scratch:
                return replace(x, buffer=scratch[x.buffer.name], index=(stage, *x.index))
            return x

        return ir.transform(s, visit)

    def asynchronous(x: Any) -> Any:
        return ir.CopyAsync(x.buffer, x.index, x.value) if isinstance(x, ir.Store) else x

    def started(iteration: ir.Expr, number: ir.Expr) -> ir.Stmt:
        moved = staged(ir.substitute(copies, {f.name: iteration}), number)
        moved = ir.transform(moved, asynchronous)
        return ir.seq(ir.If(ir.binary("<", iteration, last), moved), ir.Commit())

    number = ir.simplify(ir.binary("-", f.var, first))
    ahead = f.stages - 1
    early = ir.Var(f"{f.name}.early", f.var.dtype)
    prologue = started(ir.add(first, early), early)
    body = ir.seq(
        ir.Wait(ahead - 1), ir.Sync(), started(ir.add(f.var, ahead), ir.add(number, ahead)),
        staged(ir.seq(*work), number),
    )  # fmt: skip
    return ir.seq(
        ir.Let(first, f.begin), ir.Let(last, f.end), *map(ir.Alloc, scratch.values()),
        ir.For(early, ir.as_expr(0), ir.as_expr(ahead), prologue),
        replace(f, begin=first, end=last, body=body, kind="serial", stages=0, unroll_hint=1),
        *([ir.Sync()] if repeated else []),
    )  # fmt: skip


def load_operands_ahead(program: ir.Program) -> ir.Program:
    """A pipeline that only multiplies loads the operands of a step from shared memory before the
    products of the step before it. Those of the next iteration, too: its wait, its barrier and its
    copies come before the last step of this one.

    before: for k in a:b                  after: if a < b
              wait 1; sync; copies k + 2           wait 1; sync; copies a + 2
              acc += S[k, 0] @ T[k, 0]             x[0] = S[a, 0]; y[0] = T[a, 0]
              acc += S[k, 1] @ T[k, 1]             for k in a:b
                                                     x[1] = S[k, 1]; y[1] = T[k, 1]
                                                     acc += x[0] @ y[0]
                                                     wait 1; sync
                                                     x[0] = S[min(k + 1, b - 1), 0]; …
                                                     copies k + 3
                                                     acc += x[1] @ y[1]

    A step is a run of products into different sums. The last iteration loads its own operands
    again, because a branch would part loads from products.
    """
    return ir.map_bodies(program, lambda body: ir.transform(body, _ahead))


def _ahead(f: Any) -> Any:
    body = f.body.body if isinstance(f, ir.For) and isinstance(f.body, ir.Seq) else ()
    start = next((n + 1 for n, s in enumerate(body) if isinstance(s, ir.Commit)), len(body))
    head, work = body[:start], body[start:]
    steps: list[dict[tuple[str, ir.Expr], Any]] = []
    for s in work:
        if not isinstance(s, ir.Mma):
            return f
        if not steps or (s.acc.name, s.slot) in steps[-1]:
            steps.append({})
        steps[-1][s.acc.name, s.slot] = s
    used = [dict.fromkeys((x, getattr(s, x)) for s in y.values() for x in "ab") for y in steps]
    if len({s.shape for s in work}) != 1 or len(used) < 2 or used[0].keys() & used[-1].keys():
        return f
    tiles = {x: list(dict.fromkeys(getattr(s, x) for s in work)) for x in "ab"}
    rows, cols, depth = work[0].shape
    buffers: dict[str, ir.Buffer] = {}
    for x, *shape in (("a", rows, depth), ("b", depth, cols)):
        extents = tuple(map(ir.as_expr, (len(tiles[x]), *shape)))
        buffers[x] = ir.Buffer(f"{f.name}.{x}", tiles[x][0].buffer.dtype, extents, f"operand_{x}")

    def held(x: str, t: ir.Tile) -> ir.Tile:
        _, high, wide = buffers[x].shape
        return ir.Tile(buffers[x], ir.as_expr(tiles[x].index(t)), wide, ir.as_expr(1), high, wide)

    def loads(step: int, iteration: ir.Expr) -> ir.Stmt:
        every = (ir.LoadTile(buffers[x], held(x, t).offset, t) for x, t in used[step])
        return ir.simplify(ir.substitute(ir.seq(*every), {f.name: iteration}))

    after, last = ir.add(f.var, 1), ir.add(f.end, -1)
    new: list[ir.Stmt] = []
    for n, step in enumerate(steps):
        if n + 1 < len(steps):
            new.append(loads(n + 1, f.var))
        else:
            ready, copies = (
                ir.substitute(ir.seq(*x), {f.name: after}) for x in (head[:2], head[2:])
            )
            new += [ready, loads(0, ir.binary("min", after, last)), copies]
        new += [replace(s, a=held("a", s.a), b=held("b", s.b)) for s in step.values()]
    first = ir.seq(ir.substitute(ir.seq(*head), {f.name: f.begin}), loads(0, f.begin))
    loop = ir.If(ir.binary("<", f.begin, f.end), ir.seq(first, replace(f, body=ir.seq(*new))))
    return ir.seq(*map(ir.Alloc, buffers.values()), loop)
