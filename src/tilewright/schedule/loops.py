"""Verbs on loops. Each is a pure function nest body → nest body, the rewrite behind the method of
`Schedule` of its name, which documents it as before → after, records it, and turns "no such loop"
into an error that lists the loops there are.

None changes what is computed; one that cannot be done says why.
"""

from dataclasses import replace
from typing import Any

from tilewright.errors import illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import is_multiple
from tilewright.ir.atoms import ATOMS, SHAPES, Atom
from tilewright.schedule import tree

Rewritten = tuple[ir.Stmt, int]  # the body, and how many loops or updates changed
KINDS = ("serial", "parallel", "vector", "unroll", "cta.x", "cta.y", "thread.x", "thread.y")
TAILS = ("guard", "cut", "exact")


@tree.on_loops
def split(
    f: ir.For, loop: str, factor: int, tail: str = "guard", into: tuple[str, str] | None = None
) -> ir.Stmt:
    if f.kind in ("vector", "unroll", "pipeline", *ir.THREADS):
        raise illegal(f"loop {f.name} is marked {f.kind}", "split it first, then mark a part")
    own = tree.axis_name(loop)
    outer_name, inner_name = into or (f"{own}_o", f"{own}_i")
    if f.name in (outer_name, inner_name):
        why = f"split {loop} into {outer_name}, {inner_name}: the name is taken"
        raise illegal(why, "new names")
    t = f.var.dtype
    zero = ir.Const(0, t)
    outer, inner = ir.Var(outer_name, t), ir.Var(inner_name, t)
    extent = ir.simplify(ir.binary("-", f.end, f.begin))
    exact = isinstance(extent, ir.Const) and int(extent.value) % factor == 0
    if tail == "exact" and not exact and not is_multiple(extent, factor):
        hint = "specialize the dimension first, or use tail='cut'"
        raise illegal(f"{extent} is not known to be a multiple of {factor}", hint)
    index = ir.add(f.begin, ir.add(ir.mul(outer, factor), inner))
    is_guarded = tail == "guard" and not exact
    body = ir.If(ir.binary("<", f.var, f.end), f.body) if is_guarded else f.body
    inside = ir.seq(ir.Let(f.var, index), body)
    rounded = ir.add(extent, factor - 1) if is_guarded else extent
    count = ir.simplify(ir.binary("//", rounded, factor))
    inner_loop = ir.For(inner, zero, ir.Const(factor, t), inside, "serial", f.axes, f.private)
    nest: ir.Stmt = ir.For(outer, zero, count, inner_loop, f.kind, f.axes)
    if tail != "cut" or exact:
        return nest
    if any(x.op in ("min", "max") for x in ir.walk(count, ir.Binary)):  # it may run backwards
        count = ir.binary("max", count, 0)
    return ir.seq(nest, _tail(f, f"{own}_t", ir.simplify(ir.add(f.begin, ir.mul(count, factor)))))


def _tail(f: ir.For, name: str, begin: ir.Expr) -> ir.For:
    """The loop `f` from `begin` on, under another name; from 0 where its extent is constant, as
    accumulators and vectors need it. Its statements are objects of their own: passes find a
    `Compute` by identity (`path_to`)."""
    var, end = ir.Var(name, f.var.dtype), f.end
    at: ir.Expr = var
    if isinstance(begin, ir.Const) and isinstance(end, ir.Const):
        at, end = ir.add(begin, var), ir.simplify(ir.binary("-", end, begin))
        begin = ir.Const(0, var.dtype)
    body = ir.transform(
        ir.substitute(f.body, {f.name: at}),
        lambda x: replace(x) if isinstance(x, ir.Compute) else x,
    )
    return ir.For(var, begin, end, body, "serial", f.axes)


@tree.on_loops
def fuse(f: ir.For, outer: str, inner: str, into: str = "") -> ir.Stmt:
    chain = tree.chain_from(f)
    if len(chain.loops) < 2 or not tree.matches(chain.loops[1], inner):
        why, hint = tree.in_the_way(chain, inner) if len(chain.loops) < 2 else ("", "reorder first")
        raise illegal(f"loop {inner} is not right inside loop {outer}{why}", hint)
    a, b = chain.loops[:2]
    own = {a.name} | {x.var.name for x in chain.lets}
    if ir.free_vars(b.begin) & own or ir.free_vars(b.end) & own:
        raise illegal(f"the range of {b.name} depends on {a.name}", "only rectangular loops fuse")
    if any(ir.reduces(a, c) != ir.reduces(b, c) for c in tree.computes(chain.body)):
        hint = "fuse loops of the output, or loops of the sum"
        raise illegal(f"one of {a.name}, {b.name} reduces and the other does not", hint)
    width = ir.simplify(ir.binary("-", b.end, b.begin))
    both = ir.Var(into or a.name + b.name, a.var.dtype)
    height = ir.simplify(ir.binary("-", a.end, a.begin))
    axes = tuple(dict.fromkeys(a.axes + b.axes))
    joint = ir.For(both, ir.Const(0, both.dtype), ir.mul(height, width), chain.body, a.kind, axes)
    lets = (
        ir.Let(a.var, ir.add(a.begin, ir.simplify(ir.binary("//", both, width)))),
        ir.Let(b.var, ir.add(b.begin, ir.simplify(ir.binary("%", both, width)))),
    )
    loops = (joint, *chain.loops[2:])
    return tree.build_chain(replace(chain, loops=loops, lets=(*lets, *chain.lets)))


def reorder(body: ir.Stmt, *order: str) -> Rewritten:
    return tree.rewrite_loops(body, order, lambda f: _reordered(f, order))


def _reordered(top: ir.For, order: tuple[str, ...]) -> ir.Stmt:
    chain = tree.chain_from(top)
    named = [next((f for f in chain.loops if tree.matches(f, n)), None) for n in order]
    present = [f for f in named if f is not None]
    missing = [n for n, f in zip(order, named, strict=True) if f is None]
    below = [m for m in missing if tree.has_loop(chain.body, m)]
    if below:
        why, hint = tree.in_the_way(chain, below[0])
        raise illegal(f"between {top.name} and {', '.join(below)} the nest branches{why}", hint)
    if len({f.name for f in present}) < len(present):
        raise illegal(f"reorder({', '.join(order)}) names a loop twice", "each loop once")
    slots = iter(present)
    loops = tuple(next(slots) if f in present else f for f in chain.loops)
    return tree.build_chain(replace(chain, loops=loops))


@tree.on_loops
def reverse(f: ir.For, loop: str, into: str = "") -> ir.Stmt:
    if f.kind in ("vector", "pipeline"):
        raise illegal(f"loop {f.name} is marked {f.kind}", "reverse it first, then mark it")
    back = ir.Var(into or f"{tree.axis_name(loop)}_back", f.var.dtype)
    index = ir.simplify(ir.binary("-", ir.binary("-", f.end, 1), back))
    count = ir.simplify(ir.binary("-", f.end, f.begin))
    body = ir.seq(ir.Let(f.var, index), f.body)
    return replace(f, var=back, begin=ir.Const(0, f.var.dtype), end=count, body=body)


@tree.on_loops
def bind(f: ir.For, loop: str, kind: ir.LoopKind) -> ir.Stmt:
    reducing = [c for c in tree.computes(f.body) if ir.reduces(f, c)]
    if kind in ir.GRID:
        for c in reducing:
            if not (c.in_place and c.atomic):
                why = f"loop {f.name} sums into {c.out.buffer.name}: it has no separate units"
                raise illegal(why, "make the updates atomic, or parallelise a loop of the output")
    if kind not in ("serial", "unroll", "vector"):
        for c in tree.computes(f.body):
            if kind.startswith("thread") and not (c.in_place and not c.reduce):
                continue
            if c.in_place and not c.atomic and (c.shared or not _owns_rows(f, c)):
                why = f"units of loop {f.name} update the same elements of {c.out.buffer.name}"
                raise illegal(why, "atomic(), or a format that keeps rows whole")
    filled = {x.buffer for x in ir.statements(f.body, ir.Store) if x.buffer.scope == "register"}
    if kind in (*ir.GRID, *ir.THREADS) and filled - {x.buffer for x in ir.walk(f.body, ir.Alloc)}:
        raise illegal(f"loop {f.name} fills registers of one thread", "bind a loop around it")
    if kind in ("vector", *ir.THREADS) and f.extent is None:
        raise illegal(f"loop {f.name} has no constant extent", "split it first")
    if kind == "vector" and f.extent is not None and f.extent & (f.extent - 1):
        why = f"loop {f.name} has {f.extent} iterations: no register has as many lanes"
        raise illegal(why, "split it by a power of two first")
    if kind == "thread.x" and reducing and f.extent not in (1, 2, 4, 8, 16, 32):
        why = f"loop {f.name} reduces over {f.extent} threads: they come in powers of two, to 32"
        raise illegal(why, "split it by a power of two first")
    return replace(f, kind=kind, stages=0)


def _owns_rows(f: ir.For, c: ir.Compute) -> bool:
    """Whether no two iterations of `f` update the same element. They do not if an index of the
    output is the loop's variable, or computed from it alone by + - *; other values may repeat."""
    derived = {f.name}

    def distinct(e: ir.Expr) -> bool:
        if isinstance(e, ir.Binary):
            return e.op in ("+", "-", "*") and (distinct(e.a) or distinct(e.b))
        return isinstance(e, ir.Var) and e.name in derived

    for x in ir.statements(f.body):
        if not isinstance(x, ir.Let) or ir.reads_memory(x.value):
            continue
        if ir.free_vars(x.value) & derived and (c.reduce or distinct(x.value)):
            derived.add(x.var.name)
    used = [(i, ir.free_vars(i)) for i in c.out.index]
    return any(n & derived if c.reduce else len(n) == 1 and distinct(i) for i, n in used)


@tree.on_loops
def unroll(f: ir.For, loop: str, factor: int = 0) -> ir.Stmt:
    if f.extent is None and factor < 2:
        raise illegal(f"loop {f.name} has no constant extent", "unroll(loop, 4) hints the compiler")
    if not factor and f.extent is not None and f.extent > 256:
        raise illegal(f"loop {f.name} would be written out {f.extent} times", "split it first")
    return replace(f, kind="unroll") if not factor else replace(f, unroll_hint=factor)


@tree.on_loops
def rfactor(f: ir.For, loop: str) -> ir.Stmt:
    if not any(ir.reduces(f, c) for c in tree.computes(f.body)):
        raise illegal(f"loop {f.name} does not reduce", "rfactor splits a reduction")
    if f.extent is None:
        raise illegal(f"loop {f.name} has no constant extent", "split it first")
    return replace(f, private=True)


def atomic(body: ir.Stmt, output: str) -> Rewritten:
    updates = [c for c in tree.computes(body) if c.out.buffer.name == output and c.in_place]
    for c in updates:
        if c.out.dtype not in ir.ATOMIC.get(c.op, ()):
            known = f"{', '.join(ir.ATOMIC)} of float32, float64 and int32"
            hint = f"there are {known}; privatize() does without"
            raise illegal(f"no atomic {c.op} of {c.out.dtype} into {output}", hint)
    atomic = {id(c): replace(c, atomic=True) for c in updates}
    return ir.transform(body, lambda x: atomic.get(id(x), x)), len(updates)


@tree.on_loops
def mma(f: ir.For, rows: str, cols: str, depth: str, atom: Atom | None = None) -> ir.Stmt:
    chain, names = tree.chain_from(f), (rows, cols, depth)
    paths = ((c, ir.path_to(f, c) or ()) for c in tree.computes(f))
    below = [(c, [x for x in path if isinstance(x, ir.For)]) for c, path in paths]
    tiles = [(c, [x for n in names for x in path if tree.matches(x, n)]) for c, path in below]
    tiles = [(c, loops) for c, loops in tiles if len(loops) == 3]
    c, loops = tiles[0] if len(tiles) == 1 else (None, [])
    # Statements that share two loops of a tile are computed one tile after the other.
    shared = len(below) > 1 and sum(x in chain.loops for x in loops) == 2
    if c is None or not (shared or (chain.body is c and chain.loops[-3:] == tuple(loops))):
        why, hint = tree.in_the_way(chain, depth)
        text = f"{', '.join(names)} are not the three innermost loops of one product{why}"
        raise illegal(text, hint)
    extents = tuple(x.extent for x in loops if x)
    if extents not in ATOMS or (atom and atom.shape != extents):
        shapes = atom.shape if atom else SHAPES
        raise illegal(f"no tile operation is {extents}", f"split the loops into {shapes}")
    products = (op == "sum" and isinstance(x, ir.Binary) and x.op == "*" for op, x in c.sums)
    if not all(products) or not ir.reduces(loops[-1], c):
        hint = "only sum(A[i, k] * B[k, j], over=k), and functions of it, become tiles"
        raise illegal(f"{c.out.buffer.name} is no sum of products over {depth}", hint)
    tiled = replace(c, mma=tuple(x.name for x in loops if x), atom=atom)
    return ir.transform(f, lambda x: tiled if x is c else x)


def prefetch(body: ir.Stmt, buffer: str, loop: str, ahead: int) -> Rewritten:

    def one(f: ir.For) -> ir.Stmt:
        lines = ir.lines(f.body)
        let: Any = next((b for b in lines if _is_coordinate(b, f)), None)
        at, moving, end = 0, f.var, f.end
        if let is not None:
            at, moving, end = lines.index(let) + 1, let.var, let.value.buffer.shape[0]
        later = ir.binary("min", ir.add(f.var, ahead), ir.add(end, -1))
        value = later if let is None else replace(let.value, index=(later,))
        ahead_of = ir.Let(ir.Var(f"{moving.name}_ahead", moving.dtype), value)
        rest, count = _prefetched(ir.seq(*lines[at:]), buffer, {moving.name: ahead_of.var})
        if not count:
            why = f"loop {f.name} reads nothing of {buffer!r} by way of {moving.name}"
            raise tree.unknown(why, "name an operand, and a loop that its address depends on")
        known = ahead_of in lines  # by an earlier prefetch
        return replace(f, body=ir.seq(*lines[:at], *(() if known else (ahead_of,)), rest))

    return tree.rewrite_loops(body, (loop,), one)


def _is_coordinate(s: ir.Stmt, f: ir.For) -> bool:
    x = s.value if isinstance(s, ir.Let) else None
    return isinstance(x, ir.Load) and x.buffer.scope == "part" and x.index == (f.var,)


def _prefetched(s: ir.Stmt, buffer: str, later: dict[str, ir.Expr]) -> Rewritten:
    """`s` with prefetches of what its statements read of `buffer` once the names in `later` have
    these values, and the number of prefetches."""
    if isinstance(s, ir.Compute):
        loads = (x for _, e in s.sums for x in ir.walk(e, ir.Load) if x.buffer.name == buffer)
        moving = (x for x in loads if ir.free_vars(x) & later.keys())
        reads = list(dict.fromkeys(ir.substitute(x, later) for x in moving))
        return ir.seq(*(ir.Prefetch(x) for x in reads), s), len(reads)
    if isinstance(s, (ir.For, ir.If)):
        body, count = _prefetched(s.body, buffer, later)
        return replace(s, body=body), count
    if not isinstance(s, ir.Seq):
        return s, 0
    lines: list[ir.Stmt] = []
    total = 0
    for line in s.body:
        rewritten, count = _prefetched(line, buffer, later)
        lines.append(rewritten)
        total += count
        if (
            isinstance(line, ir.Let)
            and ir.free_vars(line.value) & later.keys()
            and not ir.reads_memory(line.value)  # what is loaded is not known early
        ):
            later = later | {line.var.name: ir.substitute(line.value, later)}
    return ir.seq(*lines), total
