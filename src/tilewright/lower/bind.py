"""Pass: the outermost parallel loops become the grid of a launch, thread loops its threads."""

from dataclasses import replace
from typing import Any

from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.names import COUNT, SIZE, is_generated
from tilewright.lower.reductions import framed
from tilewright.target import CTA_THREADS, WARP

UNROLLED = 16  # rounds of a copy to shared memory that are written out
TOGETHER = 4  # of those where there are more: all of 32 took registers that spilled
THREAD_X, THREAD_Y = ir.Var("thread_x"), ir.Var("thread_y")


def bind_grid(program: ir.Program) -> ir.Program:
    """Takes the chain of parallel loops off the top of each nest: they become units of work.

    before: for i_o in 0:ceil(n/8)  # cta.x          after: grid (ceil(n/8)), i_o = unit
              body                                          body
    """
    return replace(program, stages=tuple(tuple(map(_grid, stage)) for stage in program.stages))


def bind_threads(program: ir.Program) -> ir.Program:
    """CUDA: a loop bound to threads becomes one iteration of each thread; statements outside such
    loops are computed by all threads, but stored by one.

    before: for lane in 0:32  # thread.x           after: Y[o + thread_x] = …
              Y[o + lane] = …                             if thread_x == 0: Z[i] = …
            Z[i] = …                                      for o in 0:ceil(96/32)
            for t in 0:96  # threads                        let t = o*32 + thread_x
              S[t] = …                                      if t < 96: S[t] = …

    A nest with tile operations has 32 threads along x: a tile operation is done by a warp.
    """
    return replace(program, stages=tuple(tuple(map(_bound, stage)) for stage in program.stages))


def _bound(nest: ir.Nest) -> ir.Nest:
    extents = {kind: _extent(nest.body, kind) for kind in ir.THREADS}
    if ir.contains(nest.body, ir.Mma):
        if extents["thread.x"] > WARP:
            rule = f"{extents['thread.x']} threads along thread.x beside tile operations"
            raise illegal(rule, "a tile operation takes all of thread.x: bind loops to thread.y")
        extents["thread.x"] = WARP
    _check_cta(nest, extents["thread.x"] * extents["thread.y"])
    if ir.is_ordered(nest):
        rule = f"parts of {nest.structure}, which run at once, update the same rows of {nest.name}"
        raise illegal(rule, "atomic(), or a format that keeps rows whole")
    body = ir.simplify(_threads(nest.body, extents, frozenset()))
    _check_barriers(body, guarded=False)
    return replace(nest, body=body, threads=(extents["thread.x"], extents["thread.y"]))


def _check_cta(nest: ir.Nest, threads: int) -> None:
    if threads > CTA_THREADS:
        rule = f"{nest.name} has {threads} threads in a CTA"
        raise ScheduleError("S103", rule, hint=f"at most {CTA_THREADS}: bind smaller loops")
    if threads % WARP and ir.contains(nest.body, ir.Sync):
        rule = f"{nest.name} has a barrier and {threads} threads: a barrier takes complete warps"
        raise illegal(rule, "bind loops to threads so that their product is a multiple of 32")


def serialize_threads(program: ir.Program) -> ir.Program:
    """CPU: thread loops of a schedule for a GPU run one after the other.

    before: for lane in 0:32  # thread.x            after: for lane in 0:32
            for t in 0:96     # threads                    for t in 0:96
            sync
    """
    barriers = ir.Sync, ir.Commit, ir.Wait

    def visit(s: Any) -> Any:
        if isinstance(s, barriers):
            return ir.seq()
        if isinstance(s, ir.Alloc):
            return replace(s, rest=(), along=(), steps=())  # a CPU keeps all of a row
        if isinstance(s, ir.For) and s.kind in (*ir.THREADS, "threads"):
            s = replace(s, kind="serial")
        return ir.rebuild_body(s, visit)

    inline = {f"{t.name}.values" for t in program.tensors if t.role == "inline"}
    kept = tuple(b for b in program.buffers if b.name not in inline)
    return replace(ir.map_bodies(program, visit), buffers=kept)


def _grid(nest: ir.Nest) -> ir.Nest:
    units: list[ir.For] = []
    frame: list[ir.Stmt] = []
    body = nest.body
    while True:
        if isinstance(body, ir.For) and body.kind in ir.GRID:
            most = _host_bound(body.end) if ir.is_const(body.begin, 0) else None
            if most is None:
                rule = f"loop {body.name} cannot be parallel: the host cannot compute its range"
                hint = "units of work: loops over a dimension, or the outermost level of a format"
                raise illegal(f"{rule} {body.begin}:{body.end}", hint)
            if most is not body.end:  # units behind the end do nothing
                frame.append(ir.If(ir.binary("<", body.var, body.end), body.body))
            units.append(replace(body, end=most))
            body = body.body
        elif isinstance(body, ir.If) and _has_grid(body.body):
            frame.append(body)
            body = body.body
        elif isinstance(body, ir.Seq) and body.body and _has_grid(body.body[-1]):
            *lets, last = body.body
            if not all(isinstance(b, ir.Let) for b in lets):
                break
            frame, body = [*frame, *lets], last
        else:
            break
    if _has_grid(body):
        below = next(x for x in ir.statements(body, ir.For) if x.kind in ir.GRID)
        above = next((x for x in ir.statements(body, ir.For)), below)
        outer = f"serial loop {above.name}" if above is not below else "a branch"
        hint = "reorder so that parallel loops come first: they are the units of the launch"
        raise illegal(f"in {nest.name} the parallel loop {below.name} is inside {outer}", hint)
    grid, variables = tuple(f.end for f in units), tuple(f.var for f in units)
    return replace(nest, body=framed(body, frame), grid=grid, grid_vars=variables)


def _has_grid(s: ir.Stmt) -> bool:
    return any(x.kind in ir.GRID for x in ir.statements(s, ir.For))


def _host_bound(e: ir.Expr) -> ir.Expr | None:
    """The most that an extent can be, of what the host knows before a launch (sizes and counts);
    None where nothing says. Of min(length[r], size) it is the size."""
    local = [x for x in ir.walk(e, ir.Var) if not is_generated(x.name, SIZE, COUNT)]
    unknown = bool(local) or ir.reads_memory(e)
    if not unknown or not isinstance(e, ir.Binary):
        return None if unknown else e
    a, b = _host_bound(e.a), _host_bound(e.b)
    if e.op == "min":
        return b if a is None else a
    rises = e.op in ("+", "//") and isinstance(e.b, ir.Const) and e.b.value > 0
    return ir.binary(e.op, a, e.b) if rises and a is not None else None


def _extent(body: ir.Stmt, kind: str) -> int:
    sums = (x for x in ir.walk(body, ir.ReduceThreads) if x.axis == kind)
    loops = [x for x in ir.statements(body, ir.For) if x.kind == kind]
    for x in loops:
        if x.extent is None:
            rule = f"loop {x.name} is bound to {kind} but its extent is not a constant"
            raise illegal(rule, "split it first")
    # The sums count also where no iteration is left.
    return max((1, *(x.extent for x in (*sums, *loops))))


def _check_barriers(s: ir.Stmt, *, guarded: bool) -> None:
    """Raises ScheduleError[S102] for a barrier that a guard keeps some threads from. Reductions
    over thread.y and copies to shared memory have barriers."""
    sums = ir.walk(s.value, ir.ReduceThreads) if isinstance(s, ir.Store) else ()
    over_y = any(x.axis == "thread.y" for x in sums)
    if guarded and (over_y or s == ir.Sync()):
        rule = "a guard keeps some threads from a barrier"
        raise illegal(rule, "specialize() the dimension and split it by a factor that divides it")
    if isinstance(s, ir.If):
        guarded |= bool(ir.free_vars(s.cond) & {THREAD_X.name, THREAD_Y.name})
    for child in ir.children(s):
        if isinstance(child, ir.Stmt):
            _check_barriers(child, guarded=guarded)


def _threads(s: ir.Stmt, extents: dict[str, int], inside: frozenset[str]) -> ir.Stmt:
    if isinstance(s, ir.Sync):
        return _barrier(extents["thread.x"], inside)
    if isinstance(s, ir.For) and s.kind == "threads":
        if inside:
            hint = "cache at a loop around those bound to threads"
            raise illegal("shared memory is filled inside a loop bound to threads", hint)
        return _distributed(s, extents)
    if isinstance(s, ir.For) and s.kind in ir.THREADS:
        if s.kind in inside:
            hint = "bind one of them to the other kind of thread"
            raise illegal(f"loop {s.name} is bound to {s.kind} inside a loop that already is", hint)
        var = THREAD_X if s.kind == "thread.x" else THREAD_Y
        body = _threads(s.body, extents, inside | {s.kind})
        body = ir.substitute(body, {s.name: replace(var, dtype=s.var.dtype)})
        partial = s.extent is not None and s.extent < extents[s.kind]
        return ir.If(ir.binary("<", var, s.extent), body) if partial else body
    if isinstance(s, ir.For) and s.kind == "fragment":
        _check_tile(inside)
        nested = isinstance(s.body, ir.For) and s.body.kind == "fragment"
        within = inside if nested else inside | {"thread.x"}  # each lane stores what it holds
        return replace(s, body=_threads(s.body, extents, within))
    if isinstance(s, (ir.For, ir.If)):
        return replace(s, body=_threads(s.body, extents, inside))
    if isinstance(s, ir.Seq):
        return ir.seq(*(_threads(b, extents, inside) for b in s.body))
    if isinstance(s, ir.Store) and s.buffer.scope in ("global", "part", "shared"):
        for kind, var in (("thread.x", THREAD_X), ("thread.y", THREAD_Y)):
            if extents[kind] > 1 and kind not in inside:
                s = ir.If(ir.binary("==", var, 0), s)
        return s
    if isinstance(s, ir.Mma):
        _check_tile(inside)
    return s


def _barrier(x: int, inside: frozenset[str]) -> ir.Sync:
    """A barrier of all threads of a CTA, or of the `x` lanes with an iteration of thread.y."""
    if "thread.x" in inside or (inside and WARP % x):
        hint = "bind that loop to thread.y, and loops of 2, 4, 8, 16 or 32 inside to thread.x"
        raise illegal("threads share memory inside a loop bound to threads", hint)
    return ir.Sync(x if inside else 0)


def _check_tile(inside: frozenset[str]) -> None:
    if "thread.x" in inside:
        hint = "its own 32 threads are those of thread.x: bind the loop to thread.y"
        raise illegal("a tile operation is inside a loop bound to thread.x", hint)


def _distributed(s: ir.For, extents: dict[str, int]) -> ir.Stmt:
    """A loop over all threads of the CTA: neighbouring threads run neighbouring iterations."""
    assert s.extent is not None
    x, y = extents["thread.x"], extents["thread.y"]
    dtype = s.var.dtype
    thread: ir.Expr = replace(THREAD_X, dtype=dtype)
    if y > 1:
        thread = ir.add(ir.mul(replace(THREAD_Y, dtype=dtype), x), thread)
    rounds = -(-s.extent // (x * y))
    outer = ir.Var(f"{s.name}_o", dtype)
    body = ir.If(ir.binary("<", s.var, s.extent), s.body) if s.extent % (x * y) else s.body
    # Digits of the number are those of the round and of the thread, so that what a thread copies in
    # other rounds is a constant further than in the first.
    number = ir.add(ir.mul(outer, x * y), ir.binary("%", thread, x * y))
    body = ir.substitute(body, {s.name: number})
    loop = ir.For(outer, ir.Const(0, dtype), ir.Const(rounds, dtype), body, "unroll")
    return loop if rounds <= UNROLLED else replace(loop, kind="serial", unroll_hint=TOGETHER)
