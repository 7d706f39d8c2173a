"""Passes: loops of kind `pipeline` copy to shared memory for later iterations while they work."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewright.ir import core as ir
from tilewright.ir.affine import affine, is_aligned, parted
from tilewright.ir.names import ADDRESS, STRIDE, GeneratedName, is_generated


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
        repeated_below = repeated or (s.kind not in (*ir.GRID, *ir.THREADS) and s.extent != 1)
        s = ir.rebuild_body(s, lambda x: _visit(x, repeated_below))
        return _pipelined(s, repeated) if s.kind == "pipeline" else s
    return ir.rebuild_body(s, lambda x: _visit(x, repeated))


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
    """A pipeline that only multiplies loads the operands of a step (products into different sums)
    among the products of the step before it, those of the next iteration behind its barrier.

    before: for k in a:b                          after: wait 1; sync; copies a + 2; x = S[a, 0]
              wait 1; sync; copies k + 2                 for k in a:b
              acc += S[k, 0]; acc += S[k, 1]               y = S[k, 1]; acc += x; wait 1; sync
                                                           x = S[min(k + 1, b - 1), 0]
                                                           copies k + 3; acc += y

    The last iteration loads its own operands again: a branch would part loads from products.
    """
    return ir.map_bodies(program, lambda body: ir.transform(body, _ahead))


def _ahead(f: Any) -> Any:
    body = ir.lines(f.body) if isinstance(f, ir.For) else ()
    start = next((n + 1 for n, s in enumerate(body) if isinstance(s, ir.Commit)), len(body))
    work: list[Any] = list(body[start:])
    numbers: dict[tuple[str, ir.Tile], int] = {}
    if not (work and all(isinstance(s, ir.Mma) for s in work)):
        return f

    def held(t: ir.Tile, side: str) -> ir.Tile:
        return replace(t, held=f"{f.name}.{side}{numbers.setdefault((side, t), len(numbers))}")

    def at(statements: Sequence[ir.Stmt], iteration: ir.Expr) -> ir.Stmt:
        return ir.substitute(ir.seq(*statements), {f.name: iteration})

    size = len({(s.acc, s.slot) for s in work})
    work = [replace(s, a=held(s.a, "a"), b=held(s.b, "b")) for s in work]
    steps = [work[n : n + size] for n in range(0, len(work), size)]
    sides = [dict.fromkeys((getattr(s, x), x, s.shape) for s in y for x in "ab") for y in steps]
    if sides[0].keys() & sides[-1].keys():  # there is one step, or one that loads the first's again
        return f
    loads = [[ir.LoadTile(*x) for x in step] for step in sides]
    after, last = ir.add(f.var, 1), ir.add(f.end, -1)
    new = [x for n, step in enumerate(steps[:-1]) for x in (*loads[n + 1], *step)]
    new += [at(body[:2], after), at(loads[0], ir.binary("min", after, last))]
    new += [at(body[2:start], after), *steps[-1]]
    first = at((*body[:start], *loads[0]), f.begin)
    return ir.If(ir.binary("<", f.begin, f.end), ir.seq(first, replace(f, body=ir.seq(*new))))


def carry_addresses(program: ir.Program) -> ir.Program:
    """A pipeline has one address for all copies of an operand that are constants apart, to which an
    iteration adds its step. Otherwise each copy computes its address anew, and has registers for
    the parts of it that stay.

    before: for k in a:b                             after: at = a*64 + thread
              async S[…] = A[k*64 + thread]                 for k in a:b
              async S[…] = A[k*64 + thread + 512]             async S[…] = A[at]
              commit                                          async S[…] = A[at + 512]
                                                              commit; at += 64
    """
    return ir.map_bodies(program, lambda body: ir.transform(body, _carried))


def _carried(f: Any) -> Any:
    if not (isinstance(f, ir.For) and isinstance(f.body, ir.Seq) and ir.Commit() in f.body.body):
        return f
    inside = {x.name for x in ir.statements(f.body, ir.For, ir.Let)}
    registers: dict[tuple[str, ir.Expr], ir.Load] = {}
    before: list[ir.Stmt] = []
    steps: list[ir.Stmt] = []

    def is_carried(term: ir.Expr) -> bool:
        names = ir.free_vars(term)
        known = all(is_generated(n, STRIDE) for n in names)
        return not (known or names & inside or ir.contains(term, ir.Load))

    def visit(s: Any) -> Any:
        if not isinstance(s, ir.CopyAsync):
            return s
        load, at = s.source
        start, rest = parted(at, is_carried)
        form = affine(start, frozenset((f.name,)))
        if form is None or not form.steps or not is_aligned(start, load.dtype.lanes):
            return s
        if (load.buffer.name, start) not in registers:
            name = GeneratedName(load.buffer.name, ADDRESS, len(registers)).name
            b = ir.Buffer(name, start.dtype, (), "register")
            registers[load.buffer.name, start] = ir.Load(b, (), b.dtype)
            first = ir.substitute(start, {f.name: f.begin})
            before.extend((ir.Alloc(b), ir.Store(b, (), first, "sum")))
            steps.append(ir.Store(b, (), form.steps[f.name], "sum"))
        return s.read_at(ir.add(registers[load.buffer.name, start], rest))

    body = ir.seq(ir.transform(f.body, visit), *steps)
    if not before:
        return f
    return ir.If(ir.binary("<", f.begin, f.end), ir.seq(*before, replace(f, body=body)))
