"""Pass: reductions get accumulators: a `Compute` becomes initialization, update and store.

The analysis is that of tiles too: the names that a reduction changes, and the loops, lets and
guards under which its total is stored.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from tilewright.dtypes import DType
from tilewright.errors import illegal
from tilewright.ir import core as ir
from tilewright.ir.names import ACCUMULATOR, TOTAL, GeneratedName, parse_name


def materialize_reductions(program: ir.Program) -> ir.Program:
    """An accumulator is opened just outside the outermost loop that reduces, as large as the
    spatial loops inside that loop, and stored after it. The order of loops alone decides.

    before: for k_o in 0:n/64                     after:  for k_o in 0:n/64
              for j in …                                    alloc acc[4, 16]; … acc = 0
                for k_u in 0:4  # unroll                    for j in …
                  for k_v in 0:16  # vector                   … acc[k_u, k_v] += …
                    Y[i, k] = sum(… over j)                 … Y[i, k] = acc[k_u, k_v]

    A vector or private loop that reduces has one accumulator an iteration, joined at the end in a
    fixed order; one bound to threads is joined across them. An output that is updated in place at
    coordinates which the reduced loops themselves compute is updated in memory.
    """
    return replace(ir.map_bodies(program, lambda body: _Materializer().visit(body)), level="loops")


@dataclass(frozen=True, slots=True)
class _Chain:
    """The statements between the outermost loop of a reduction and its `Compute`. There are several
    below that loop where a cut tail is inside another loop that reduces."""

    compute: ir.Compute
    spatial: tuple[ir.For, ...]  # loops that do not reduce and are not bound to threads
    lanes: tuple[ir.For, ...]  # reducing loops with an accumulator for each iteration
    threads: tuple[ir.For, ...]  # reducing loops bound to threads
    frame: tuple[Any, ...]  # spatial loops, and the lets and guards that depend on nothing reduced
    escapes: bool  # the output's coordinates depend on the reduced loops

    @property
    def key(self) -> tuple[Any, ...]:
        return self.compute.out, self.compute.op, frozenset(f.name for f in self.spatial)

    @property
    def cells(self) -> tuple[ir.For, ...]:
        """The loops whose iterations have an element of the accumulator each."""
        return (*self.spatial, *self.lanes)

    @property
    def index(self) -> tuple[ir.Var, ...]:
        return tuple(f.var for f in self.cells)

    @property
    def split(self) -> tuple[Any, ...]:
        """The loops that have an accumulator for each iteration or thread."""
        return tuple((f.var.name, f.extent) for f in (*self.lanes, *self.threads))


# By the loops inside: an accumulator for each reduction of a statement.
_Accumulators = dict[Any, tuple[tuple[ir.Buffer, ...], _Chain]]


class _Materializer:
    def __init__(self) -> None:
        self.count = 0
        self.maxima: dict[Any, ir.Buffer] = {}  # accumulators of running ones, by name and shape

    def visit(self, s: ir.Stmt) -> ir.Stmt:
        out: list[ir.Stmt] = []
        pending = list(ir.lines(s))
        while pending:
            group = [pending.pop(0)]
            targets = {c.key for c in _reductions(group[0])}
            while pending and targets & {c.key for c in _reductions(pending[0])}:
                group.append(pending.pop(0))
            out += self._reduce(group) if targets else [self._plain(group[0])]
        return ir.seq(*out)

    def _plain(self, s: ir.Stmt) -> ir.Stmt:
        if isinstance(s, (ir.For, ir.If)):
            return replace(s, body=self.visit(s.body))
        if isinstance(s, ir.Compute):
            alloc = [ir.Alloc(s.out.buffer)] if s.out.buffer.scope == "register" else []
            if s.reductions:  # no loop reduces: each total is its one value
                totals = [(r.total.name, r.value) for r in s.reductions]
                return ir.seq(*alloc, *_epilogue(s, totals))
            return ir.seq(*alloc, _store(s, s.value))
        return s

    def _reduce(self, group: list[ir.Stmt]) -> list[ir.Stmt]:
        """`group`: neighbouring loops that reduce into the same outputs (a loop and its tail)."""
        chains = [c for s in group for c in _reductions(s)]
        updates: dict[int, ir.Stmt] = {}  # by id of the `Compute`
        before: list[ir.Stmt] = []
        after: list[ir.Stmt] = []
        for key in dict.fromkeys(c.key for c in chains):
            accumulators: _Accumulators = {}
            for chain in (c for c in chains if c.key == key):
                updates[id(chain.compute)] = self._update(chain, accumulators)
            if accumulators:
                parts = list(accumulators.values())
                for accs, chain in parts:
                    for acc, (op, _) in zip(accs, chain.compute.sums, strict=True):
                        before += [ir.Alloc(acc), _initial(acc, chain, op)]
                after.append(self._final(parts))
                out = parts[0][1].compute.out.buffer
                if out.scope == "register":
                    before.insert(0, ir.Alloc(out))
        inside = [ir.transform(s, lambda x: updates.get(id(x), x)) for s in group]
        if any(c.compute.reductions for c in chains):
            inside = [ir.used_lets(s) for s in inside]  # others are those of epilogues
        return [*before, *(self._plain(s) for s in inside), *after]

    def _update(self, chain: _Chain, accumulators: _Accumulators) -> ir.Stmt:
        """The statement that replaces a `Compute`: it updates memory or accumulators, which are
        added to `accumulators` where they are new."""
        c = chain.compute
        if chain.escapes:
            if chain.threads and not c.atomic:
                rule = f"threads of loop {chain.threads[0].name} update {c.out} in memory at once"
                raise illegal(rule, "atomic(), or bind a loop of the output")
            return _store(c, c.value)
        shape = chain.split
        if shape not in accumulators:
            accs = tuple(self._accumulator(chain, value.dtype) for _, value in c.sums)
            accumulators[shape] = accs, chain
        index = accumulators[shape][1].index
        if c.online:
            self.maxima[c.out.buffer.name, shape] = accumulators[shape][0][0]
            return _online_term(c, ir.Load(accumulators[shape][0][0], index, c.value.dtype))
        lets: Sequence[ir.Stmt] = ()
        values: Sequence[ir.Expr] = [value for _, value in c.sums]
        if len(values) > 1:
            self.count += 1
            lets, values = _name_repeated(values, f"{c.out.buffer.name}.term{self.count}_")
        updates: list[ir.Stmt] = []
        factors = [r.factor for r in c.reductions] or [None]
        accs = accumulators[shape][0]
        for acc, (op, _), value, f in zip(accs, c.sums, values, factors, strict=True):
            value = ir.cast(value, acc.dtype)
            if f is not None:
                by = ir.cast(ir.Load(f, (), f.dtype), acc.dtype)
                value, op = ir.Load(acc, index, acc.dtype) * by + value, ""
            updates.append(ir.Store(acc, index, value, op))
        return ir.seq(*lets, *updates)

    def _accumulator(self, chain: _Chain, dtype: DType) -> ir.Buffer:
        out = chain.compute.out.buffer
        self.count += 1
        check_extents(chain.cells, out.name, "an accumulator has a constant size")
        shape = tuple(ir.Const(f.extent or 0, f.var.dtype) for f in chain.cells)
        name = GeneratedName(out.name, ACCUMULATOR, self.count).name
        return ir.Buffer(name, dtype, shape, "register")

    def _final(self, parts: list[tuple[tuple[ir.Buffer, ...], _Chain]]) -> ir.Stmt:
        """Under the spatial loops and guards: the accumulators joined, and the output stored."""
        first, chain = parts[0]
        c = chain.compute
        totals: list[tuple[str, ir.Expr]] = []
        is_split = len(parts) > 1 or any(each.lanes or each.threads for _, each in parts)
        for n, (op, _) in enumerate(c.sums):
            factor = c.reductions[n].factor if c.reductions and is_split else None
            joined = (
                _over_threads(self._scaled(_joined(accs[n], each, op), each, factor), each, op)
                for accs, each in parts
            )
            value = reduce(lambda a, b, op=op: ir.Binary(ir.REDUCTIONS[op], a, b, a.dtype), joined)
            own = parse_name(first[n].name)
            assert own is not None
            totals.append((own._replace(kind=TOTAL).name, value))
        across_threads = any(each.threads for _, each in parts)
        if not (across_threads or c.reductions):
            return framed(_store(c, totals[0][1]), chain.frame)
        *before, store = _epilogue(c, totals)
        if not across_threads:
            return framed(ir.seq(*before, store), chain.frame)
        # All threads take part in the reduction and its barriers: guards are around the store only.
        loops = tuple(f for f in chain.frame if isinstance(f, ir.For))
        guards = tuple(f for f in chain.frame if not isinstance(f, ir.For))
        return framed(ir.seq(*before, framed(store, guards)), loops)

    def _scaled(self, value: ir.Expr, chain: _Chain, factor: ir.Buffer | None) -> ir.Expr:
        """A sum that is relative to its own running maximum, relative to the maximum of all."""
        if factor is None:
            return value
        name = factor.name.removesuffix(".factor")
        own = self.maxima.get((name, chain.split))
        if own is None or chain.lanes:
            rule = f"{chain.compute.out.buffer.name} and {name} are split in different loops"
            raise illegal(rule, "split the loop around both by threads")
        total = ir.Load(ir.Buffer(name, own.dtype, (), "register"), (), own.dtype)
        by = ir.unary("exp", finite(ir.Load(own, (), own.dtype)) - finite(total))
        return ir.binary("*", value, ir.cast(by, value.dtype))


def _reductions(s: ir.Stmt) -> list[_Chain]:
    """The reductions for which the loop `s` is the outermost one that reduces."""
    if not isinstance(s, ir.For):
        return []
    computes = [x for x in ir.statements(s, ir.Compute) if ir.reduces(s, x)]
    return [_chain(c, ir.path_to(s, c) or []) for c in computes]


def _chain(compute: ir.Compute, path: list[Any]) -> _Chain:
    reduced = reduced_names(path, compute)
    frame = frame_of(path, reduced)
    loops = [s for s in path if isinstance(s, ir.For) and ir.reduces(s, compute)]
    threads = tuple(s for s in loops if s.kind in ir.THREADS)
    lanes = tuple(
        s for s in loops
        if s.kind not in ir.THREADS and (s.kind == "vector" or s.private) and s.extent != 0
    )  # fmt: skip
    # Each thread has registers of its own.
    spatial = tuple(s for s in frame if isinstance(s, ir.For) and s.kind not in ir.THREADS)
    out_vars = {name for i in compute.out.index for name in ir.free_vars(i)}
    escapes = compute.out.buffer.scope != "register" and bool(out_vars & reduced)
    # `simplify` removes the coordinates of a level of width 0; such a loop updates nothing. No
    # accumulator holds what a level visits that has as many coordinates as its dimension.
    escapes |= compute.in_place and any(isinstance(s, ir.For) and s.extent == 0 for s in path)
    escapes |= compute.in_place and any(f.extent is None for f in spatial)
    return _Chain(compute, spatial, lanes, threads, frame, escapes)


def _store(c: ir.Compute, value: ir.Expr) -> ir.Store:
    """The output set to `value`, or updated with it where it is updated in place."""
    value = ir.cast(value, c.out.buffer.dtype)
    return ir.Store(c.out.buffer, c.out.index, value, c.op if c.in_place else "", c.atomic)


def _initial(acc: ir.Buffer, chain: _Chain, op: str) -> ir.Stmt:
    """Every element of the accumulator set to the identity."""
    body: ir.Stmt = ir.Store(acc, chain.index, ir.identity_of(op, acc.dtype))
    for f in reversed(chain.cells):
        body = ir.For(f.var, f.begin, f.end, body, f.kind if f.kind == "vector" else "unroll")
    return body


def _online_term(c: ir.Compute, maximum: ir.Load) -> ir.Stmt:
    """One term x of a running maximum: its weight, the factor of what was summed before it, and the
    new maximum. Of the two exponentials one is exp(-|x - maximum|), and the other is 1."""
    assert c.online is not None
    weight, factor = (ir.Load(b, (), b.dtype) for b in c.online)
    x, old = (ir.Var(f"{c.out.buffer.name}.{n}", maximum.dtype) for n in ("term", "old"))
    one, grows = ir.Const(1.0, weight.dtype), ir.binary(">", x, old)
    distance = ir.unary("-", ir.unary("abs", x - old))
    return ir.seq(
        ir.Let(x, ir.cast(c.value, x.dtype)),
        ir.Let(old, finite(maximum)),
        ir.Alloc(weight.buffer),
        ir.Store(weight.buffer, (), ir.cast(ir.unary("exp", distance), weight.dtype)),
        ir.Alloc(factor.buffer),
        ir.Store(factor.buffer, (), ir.select(grows, weight, one)),
        ir.Store(weight.buffer, (), ir.select(grows, one, weight)),
        ir.Store(maximum.buffer, maximum.index, x, "max"),
    )


def least(dtype: DType) -> ir.Const:
    """The least finite number of a float type."""
    return ir.Const(-float(np.finfo(dtype.numpy).max), dtype)


def finite(maximum: ir.Expr) -> ir.Expr:
    """A maximum, at least the least number: exp(-inf - maximum) is then 0, also of the first."""
    return ir.binary("max", maximum, least(maximum.dtype))


def _over_threads(value: ir.Expr, chain: _Chain, op: str) -> ir.Expr:
    """A tail that all threads compute is not joined across them: each has all of it."""
    for f in chain.threads:
        value = ir.ReduceThreads(op, value, f.kind, f.extent or 0, value.dtype)
    return value


def _epilogue(c: ir.Compute, totals: list[tuple[str, ir.Expr]]) -> list[ir.Stmt]:
    """A register for each total, given by name and value, then the store of what is made of
    them."""
    lines: list[ir.Stmt] = []
    loads: list[ir.Expr] = []
    for name, value in totals:
        total = ir.Buffer(name, value.dtype, (), "register")
        lines += [ir.Alloc(total), ir.Store(total, (), value)]
        loads.append(ir.Load(total, (), value.dtype))
    if not c.reductions:
        return [*lines, _store(c, loads[0])]
    lets, value = with_totals(c, loads)
    return [*lines, ir.seq(*lets, _store(c, value))]


def _joined(acc: ir.Buffer, chain: _Chain, op: str) -> ir.Expr:
    """Combines the accumulators of one output element: private ones in order, then vector lanes."""
    spatial = tuple(f.var for f in chain.spatial)
    vector = next((f for f in chain.lanes if f.kind == "vector" and f.extent != 1), None)
    lanes = acc.dtype.vector(vector.extent or 1) if vector else acc.dtype
    ranges = [range(1) if f is vector else range(f.extent or 0) for f in chain.lanes]
    kinds = [f.var.dtype for f in chain.lanes]
    loads = (ir.Load(acc, (*spatial, *map(ir.Const, at, kinds)), lanes) for at in product(*ranges))
    total = reduce(lambda a, b: ir.Binary(ir.REDUCTIONS[op], a, b, a.dtype), loads)
    return ir.ReduceLanes(op, total, acc.dtype) if vector else total


# ---------------------------------------------------------------------------- the analysis


def reduced_names(path: Iterable[Any], c: ir.Compute) -> frozenset[str]:
    """Loops and names on the path to a statement that differ from one reduced iteration to the
    next."""
    reduced: set[str] = set()
    for s in path:
        if isinstance(s, ir.For):
            if ir.reduces(s, c) or (ir.free_vars(s.begin) | ir.free_vars(s.end)) & reduced:
                reduced.add(s.name)
        elif isinstance(s, ir.Let) and ir.free_vars(s.value) & reduced:
            reduced.add(s.var.name)
    return frozenset(reduced)


def check_threads(program: ir.Program) -> ir.Program:
    """Raises ScheduleError[S102] where threads update elements of an output in memory, and another
    thread, now or in the next reduced iteration, may have the same one, without a barrier in
    between: no coordinate says by itself which thread it belongs to."""
    for body, c in ((n.body, c) for n in program.nests for c in ir.statements(n.body, ir.Compute)):
        path = ir.path_to(body, c) or []
        reduced, used = reduced_names(path, c), [ir.free_vars(i) for i in c.out.index]
        in_memory, moves = c.in_place and not c.atomic, any(names & reduced for names in used)
        threads = (s for s in path if isinstance(s, ir.For) and s.kind in ir.THREADS)
        for f in (s for s in threads if in_memory and (moves or not ir.reduces(s, c))):
            own = {f.name}
            for x in (x for x in path if isinstance(x, ir.Let)):  # rows that are loaded may repeat
                known = ir.reduces(f, c) or not ir.reads_memory(x.value)
                own |= {x.name} if known and ir.free_vars(x.value) & own else set()
            if f.extent != 1 and not any(names & own and not names & reduced for names in used):
                rule = f"threads of loop {f.name} update {c.out} in memory at once"
                raise illegal(rule, "atomic(), or bind a loop of the output")
    return program


def check_extents(loops: Iterable[ir.For], out: str, why: str) -> None:
    """Raises ScheduleError[S102] for a loop inside the reduction of `out` whose extent is known at
    run time only."""
    for f in loops:
        if f.extent is None or not ir.is_const(f.begin, 0):
            rule = f"loop {f.name} inside the reduction of {out} has a run-time extent"
            raise illegal(rule, f"{why}: split the loop, keep its inner part inside")


def frame_of(path: Iterable[Any], reduced: frozenset[str]) -> tuple[Any, ...]:
    """The loops, lets and guards of a path that depend on nothing reduced: a total is stored under
    them. Of a guard that depends on it in part the rest remains."""
    frame: list[Any] = []
    for s in path:
        if isinstance(s, ir.If):
            kept = [x for x in ir.conjuncts(s.cond) if not ir.free_vars(x) & reduced]
            if kept:
                cond = ir.all_of(kept)
                frame.append(s if cond == s.cond else ir.If(cond, s.body))
        elif (s.name if isinstance(s, ir.For) else s.var.name) not in reduced:
            frame.append(s)
    return tuple(frame)


def framed(body: ir.Stmt, frame: Sequence[Any]) -> ir.Stmt:
    """The body under loops and guards, with the lets that it needs."""
    for f in reversed(frame):
        if not isinstance(f, ir.Let):
            body = replace(f, body=body)
        elif f.var.name in ir.free_vars(body):
            body = ir.seq(f, body)
    return body


def with_totals(c: ir.Compute, totals: Sequence[ir.Expr]) -> tuple[Sequence[ir.Stmt], ir.Expr]:
    """The value of a statement with an epilogue, with these expressions for its totals; names for
    what it would compute more than once."""
    pairs = zip((r.total for r in c.reductions), totals, strict=True)
    known = {total.name: ir.cast(value, total.dtype) for total, value in pairs}

    def visit(x: Any) -> Any:
        return known.get(x.buffer.name, x) if isinstance(x, ir.Load) else x

    lets, (value,) = _name_repeated([ir.transform(c.value, visit)], f"{c.out.buffer.name}.value")
    return lets, value


def _name_repeated(
    values: Sequence[ir.Expr], name: str
) -> tuple[Sequence[ir.Stmt], tuple[ir.Expr, ...]]:
    """Lets for what the values compute or load more than once, and the values that read them. What
    only arms of a select compute stays there: it may read what the condition allows.

    before: (acc + b) / (1 + exp(-(acc + b)))        after: let x = acc + b; x / (1 + exp(-x))
    """
    lets: list[ir.Let] = []
    while True:
        computed = [*(x.value for x in lets), *values]
        times = Counter(x for e in computed for x in ir.walk(e, ir.Expr))
        always = (x for e in computed for x in _always_computed(e))
        repeated = next((x for x in always if times[x] > 1), None)
        if repeated is None:
            return lets, tuple(values)
        var = ir.Var(f"{name}{len(lets)}", repeated.dtype)

        def visit(x: Any, old: ir.Expr = repeated, new: ir.Expr = var) -> Any:
            return new if x == old else ir.rebuild(x, visit)

        lets, values = [ir.Let(x.var, visit(x.value)) for x in lets], [visit(e) for e in values]
        readers = (n for n, x in enumerate(lets) if var.name in ir.free_vars(x.value))
        lets.insert(next(readers, len(lets)), ir.Let(var, repeated))


def _always_computed(e: Any) -> Iterator[ir.Expr]:
    """The operations and loads of memory in `e` that no condition keeps from being computed, from
    the outermost in."""
    is_memory = isinstance(e, ir.Load) and e.buffer.scope not in ("register", "fragment")
    if is_memory or isinstance(e, (ir.Binary, ir.Unary, ir.Cast, ir.Select, ir.Search)):
        yield e
    for child in (e.cond,) if isinstance(e, ir.Select) else () if is_memory else ir.children(e):
        yield from _always_computed(child)
