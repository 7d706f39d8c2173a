"""The rewrites behind `Schedule.cache`, operands gathered to scratch memory near the threads, and
`Schedule.pipeline`. They come after the verbs that move loops.
"""

from dataclasses import replace
from math import prod
from typing import Any, Literal

from tilewright import dtypes
from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import affine, is_multiple
from tilewright.ir.names import values_name
from tilewright.schedule.tree import computes, rewrite_loops
from tilewright.target import SHARED_BYTES

CacheScope = Literal["register", "shared"]
SCOPES: tuple[CacheScope, ...] = ("register", "shared")
SHARED_LIMIT = max(SHARED_BYTES.values())  # of one array; `build` checks the sum for its target
REGISTERS = 256  # elements of one scratch array in registers
WIDE = 16  # bytes of the widest load
MOST_STAGES = 8  # buffers of a pipeline
BANK_CONFLICT = 32  # bytes: rows of shared memory that are multiples of it share banks


def cache(
    body: ir.Stmt, buffer: str, loop: str, scope: CacheScope = "register", padding: float = 0
) -> tuple[ir.Stmt, int]:
    """`padding`: the value of slots without an entry."""
    if not any(_reads(e, buffer) for c in computes(body) for e in _values(c)):
        return body, 0
    return rewrite_loops(
        body, (loop,), lambda f: _Staging(body, f, buffer, scope, padding).result()
    )


def _values(c: ir.Compute) -> tuple[ir.Expr, ...]:
    """All that a statement computes: its reductions and its value."""
    return (*(r.value for r in c.reductions), c.value)


def _reads(e: ir.Expr, operand: str) -> list[ir.Load]:
    """The loads of an operand from memory."""
    names = operand, values_name(operand)
    loads = (x for x in ir.walk(e, ir.Load) if x.buffer.scope in ("global", "part"))
    return [x for x in loads if x.buffer.name in names]


def pipeline(body: ir.Stmt, loop: str, stages: int) -> tuple[ir.Stmt, int]:

    def one(f: ir.For) -> ir.Stmt:
        copies = [s for s in ir.lines(f.body) if isinstance(s, ir.For) and s.kind == "threads"]
        if not copies or f.kind != "serial":
            why = f"loop {f.name} is {f.kind} and copies {len(copies)} operands to shared memory"
            raise illegal(why, 'cache(…, "shared") at a serial loop first')
        for copy in copies:
            _check_asynchronous(copy)
        return replace(f, kind="pipeline", stages=stages)

    return rewrite_loops(body, (loop,), one)


def _check_asynchronous(copy: ir.For) -> None:
    """Raises ScheduleError[S102] for a copy of single elements, or of other shared memory."""
    scratch = next(x for x in ir.statements(copy) if isinstance(x, ir.Store)).buffer
    lanes = prod(x.extent or 1 for x in ir.statements(copy.body) if isinstance(x, ir.For))
    nbytes = scratch.dtype.itemsize * lanes
    if nbytes not in (4, 8, 16):
        why = f"{scratch.name} is copied {nbytes} bytes at a time; asynchronous are 4, 8 or 16"
        hint = f"specialize() its last dimension to a multiple of {WIDE // scratch.dtype.itemsize}"
        raise illegal(why, hint)
    if any(isinstance(x, ir.Load) and x.buffer.scope == "shared" for x in ir.walk(copy)):
        why = f"the copy to {scratch.name} reads shared memory of the same iteration"
        raise illegal(why, "cache fewer operands")


class _Staging:
    """Rewrites loop `at` for `Schedule.cache`: copies `operand` to scratch and reads it there."""

    def __init__(
        self, nest: ir.Stmt, at: ir.For, operand: str, scope: CacheScope, padding: float
    ) -> None:
        self.nest, self.at, self.operand, self.padding = nest, at, operand, padding
        self.scope: CacheScope = scope
        self.padded = scope == "shared" and not all(c.mma for c in computes(at.body))
        if at.kind == "pipeline":
            raise self.refuse(f"loop {at.name} is a pipeline", "call cache before pipeline")
        self.groups: list[list[ir.For]] = []  # the loops of each dimension of scratch
        accesses = [
            self._access(x, c)
            for c in computes(at.body)
            for value in self._computed(c)
            for x in _reads(value, operand)
        ]
        if not accesses:
            hint = "a loop around the read; epilogues are computed outside of loops that reduce"
            raise self.refuse(f"loop {at.name} reads no {operand}", hint)
        self.access, self.path = accesses[0]
        scopes = [[s for s in path if not isinstance(s, ir.If)] for _, path in accesses]
        if any(x != self.access for x, _ in accesses) or any(s != scopes[0] for s in scopes):
            hint = "choose a loop further in, or cache before a cut"
            raise self.refuse(f"loop {at.name} reads it in more than one way", hint)
        if any(c.out.buffer.name == self.access.buffer.name for c in computes(at.body)):
            raise self.refuse("it is written in the same loop", "only operands are cached")
        self.inner = {s.name: s for s in self.path if isinstance(s, ir.For)}
        self.lets = {s.var.name: s.value for s in self.path if isinstance(s, ir.Let)}
        self._part_fused()

    def refuse(self, why: str, hint: str) -> ScheduleError:
        return illegal(f"{self.operand} cannot be cached: {why}", hint)

    def _access(self, x: ir.Load, c: ir.Compute) -> tuple[ir.Load, list[Any]]:
        """A load of the operand, and the loops, guards and lets around its statement."""
        selects = (y for e in self._computed(c) for y in ir.walk(e) if isinstance(y, ir.Select))
        arms = (arm for y in selects for arm in (y.a, y.b))
        if any(y == x for arm in arms for y in ir.walk(arm)):
            hint = "cache what is always read"
            raise self.refuse("whether it is read depends on a condition", hint)
        path = ir.path_to(self.at.body, c)
        assert path is not None
        return x, path

    def _computed(self, c: ir.Compute) -> tuple[ir.Expr, ...]:
        """What a statement computes inside of the loop: its epilogue only if neither the loop nor
        one around it reduces."""
        path = ir.path_to(self.nest, c) or []
        around = path[: next(n for n, s in enumerate(path) if s is self.at) + 1]
        is_later = any(isinstance(s, ir.For) and ir.reduces(s, c) for s in around)
        return _values(c)[:-1] if c.reductions and is_later else _values(c)

    def _part_fused(self) -> None:
        """Two loops that were fused count as two: an access may depend on one of them alone."""
        parts: dict[str, tuple[ir.For, ir.For]] = {}
        for name, value in self.lets.items():
            part = _part_of(value, self.inner)
            if part is not None:
                parts[name] = part[0], replace(part[0], var=ir.Var(name, value.dtype), end=part[1])
        rest = {name: value for name, value in self.lets.items() if name not in parts}
        guards = [s.cond for s in self.path if isinstance(s, ir.If)]
        used = {n for e in (*rest.values(), *guards, *self.access.index) for n in ir.free_vars(e)}
        kept = {name: f for name, (fused, f) in parts.items() if fused.name not in used}
        every = self.inner | kept
        order = (s.var.name for s in self.path if isinstance(s, (ir.For, ir.Let)))
        self.inner = {name: every[name] for name in order if name in every}  # outermost first
        self.lets = {name: value for name, value in self.lets.items() if name not in kept}

    def reads(self, e: Any) -> set[str]:
        """Names that an expression depends on, through the lets that it names."""
        names: set[str] = set()
        waiting = list(ir.free_vars(e))
        while waiting:
            name = waiting.pop()
            if name not in names:
                names.add(name)
                waiting += ir.free_vars(self.lets[name]) if name in self.lets else ()
        return names

    def result(self) -> ir.For:
        loops, scratch = self._dimensions(), self._scratch()
        source, inside = self.access, ir.Load(scratch, self._index(), self.access.dtype)

        def visit(x: Any) -> Any:
            return inside if x == source else x

        def rewritten(s: Any) -> Any:
            if isinstance(s, ir.Compute):
                sums = tuple(replace(r, value=ir.transform(r.value, visit)) for r in s.reductions)
                value = ir.transform(s.value, visit) if s.value in self._computed(s) else s.value
                return replace(s, value=value, reductions=sums)
            return ir.rebuild_body(s, rewritten)

        fill, body = ir.seq(ir.Alloc(scratch), self._fill(scratch, loops)), rewritten(self.at.body)
        lines = list(ir.lines(body))
        copied = _copied(lines)
        barrier = isinstance(lines[copied], ir.Sync)  # after the copies before this one
        if self.scope == "register":
            lines.insert(copied + barrier, fill)
        elif any(isinstance(x, ir.Load) and x.buffer.scope == "shared" for x in ir.walk(fill)):
            lines[copied + barrier : copied + barrier] = [fill, ir.Sync()]
        else:  # one barrier for all copies
            lines[copied:copied] = [fill] if barrier else [fill, ir.Sync()]
        if self.scope == "shared" and self.at.kind not in ir.GRID and lines[-1] != ir.Sync():
            lines.append(ir.Sync())
        return replace(self.at, body=ir.seq(*lines))

    # -- what scratch is indexed by --------------------------------------------------------------

    def _dimensions(self) -> list[ir.For]:
        """The loops inside `at` that the access depends on, in index order; also fills `groups`."""
        if any(s.kind in ir.GRID for s in self.inner.values()):
            hint = "choose a loop further in"
            raise self.refuse(f"loop {self.at.name} contains loops over units of the launch", hint)
        loops: dict[str, ir.For] = {}
        for index in self.access.index:
            needed = self.reads(index)
            group = [f for name, f in self.inner.items() if name in needed and name not in loops]
            self.groups.append(group)
            loops |= {f.name: f for f in group}
        if len(self.access.index) == 1:  # neighbours in memory are neighbours in scratch
            form = affine(self._resolved(self.access.index[0]), frozenset(loops))
            steps = form.steps.items() if form else ()
            near = [name for name, by in steps if ir.is_const(by, 1)]
            loops |= {name: loops.pop(name) for name in near}
        if self.scope == "register" or len(self.groups) == 1:  # no rows: a dimension for each loop
            self.groups = [[f] for f in loops.values()]
            row = [f for f in loops.values() if any(ir.reduces(f, c) for c in computes(self.at))]
            if self.padded and row and row[-1:] == self.groups[-1]:  # so rows are long
                self.groups = [g for g in self.groups if g[0] not in row] + [row]
        self.groups = [g for g in self.groups if g]
        for f in loops.values():
            if f.extent is None or not isinstance(f.begin, ir.Const) or f.begin.value != 0:
                why = f"loop {f.name} inside {self.at.name} has a run-time extent"
                raise self.refuse(why, "split it: scratch has a constant size")
            if f.kind in ir.THREADS and self.scope == "register":
                why = f"loop {f.name} inside {self.at.name} is bound to threads: no registers"
                raise self.refuse(why, 'scope="shared", or a loop inside of it')
        return list(loops.values())

    def _index(self) -> tuple[ir.Expr, ...]:
        """The index at which scratch is read: the loops of a group count as one number. Shared
        memory of one element is an array of one."""
        if not self.groups and self.scope == "shared":
            return (ir.as_expr(0),)
        index: list[ir.Expr] = []
        for group in self.groups:
            number: ir.Expr = group[0].var
            for f in group[1:]:
                number = ir.add(ir.mul(number, f.extent or 1), f.var)
            index.append(number)
        return tuple(index)

    def _scratch(self) -> ir.Buffer:
        name, dtype = f"{self.operand}_{self.scope}", self.access.dtype
        extents = [prod(f.extent or 0 for f in g) for g in self.groups]
        if self.scope == "shared" and not extents:
            extents = [1]
        rows = self.scope == "shared" and len(extents) > 1
        conflicts = rows and extents[-1] * dtype.itemsize % BANK_CONFLICT == 0
        is_power = bool(extents) and extents[-1] & (extents[-1] - 1) == 0
        swizzled = conflicts and is_power and not self.padded
        if conflicts and not swizzled:
            extents[-1] += WIDE // dtype.itemsize
        total = prod(extents)
        if self.scope == "register" and total > REGISTERS:
            raise self.refuse(f"{total} registers", f"at most {REGISTERS}: a smaller tile")
        if self.scope == "shared" and total * dtype.itemsize > SHARED_LIMIT:
            hint = f"at most {SHARED_LIMIT}: a smaller tile"
            raise self.refuse(f"{total * dtype.itemsize} bytes of shared memory", hint)
        shape = tuple(map(ir.as_expr, extents))
        return ir.Buffer(name, dtype, shape, self.scope, swizzled=swizzled)

    # -- the copy --------------------------------------------------------------------------------

    def _fill(self, scratch: ir.Buffer, loops: list[ir.For]) -> ir.Stmt:
        """Loops over scratch, with the lets that the access needs and its guards as a select."""
        fresh = {f.name: ir.Var(f"{f.name}_{scratch.name}", f.var.dtype) for f in loops}
        if self.scope == "shared":
            return self._fill_together(scratch, loops, fresh)
        body = self._element(scratch, fresh, tuple(fresh.values()), {})
        for f in reversed(loops):
            kind = "vector" if f.kind == "vector" else "unroll"
            body = ir.For(fresh[f.name], f.begin, f.end, body, kind)
        return body

    def _fill_together(
        self, scratch: ir.Buffer, loops: list[ir.For], fresh: dict[str, ir.Var]
    ) -> ir.Stmt:
        """All threads of the CTA copy scratch: row after row, neighbours by neighbours."""
        dtype = loops[0].var.dtype if loops else dtypes.int32
        at, lane = (ir.Var(f"{scratch.name}_{name}", dtype) for name in ("at", "lane"))
        lanes = self._lanes(loops, self._guards(set(fresh)))
        rest: ir.Expr = at
        starts: dict[str, ir.Expr] = {}
        digits: list[ir.Stmt] = []
        order = [f for group in self.groups for f in group]
        for f in reversed(order):
            wide = lanes if f is order[-1] else 1
            extent = (f.extent or 1) // wide
            digit = rest if f is order[0] else ir.binary("%", rest, extent)
            rest = ir.simplify(ir.binary("//", rest, extent))
            if wide > 1:
                starts[f.name] = ir.mul(digit, wide)
                digit = ir.add(starts[f.name], lane)
            digits.append(ir.Let(fresh[f.name], ir.simplify(digit)))
        to = tuple(ir.substitute(i, fresh) for i in self._index())
        body: ir.Stmt = ir.seq(*digits, self._element(scratch, fresh, to, starts))
        if lanes > 1:
            body = ir.For(lane, ir.as_expr(0), ir.as_expr(lanes), body, "vector")
        total = prod(f.extent or 0 for f in loops) // lanes
        return ir.For(at, ir.as_expr(0), ir.as_expr(total), body, "threads")

    def _lanes(self, loops: list[ir.For], guards: list[ir.Expr]) -> int:
        """Elements that one thread copies at once: neighbours of a row, where they are, and where
        guards hold for all of them or for none."""
        lanes = WIDE // self.access.dtype.itemsize
        if not loops or (loops[-1].extent or 0) % lanes:
            return 1
        last = loops[-1].name
        if any(last in self.reads(i) for i in self.access.index[:-1]):
            return 1
        together = all(self._is_uniform(g, last, lanes) for g in guards if last in self.reads(g))
        return lanes if together else 1

    def _is_uniform(self, guard: ir.Expr, last: str, lanes: int) -> bool:
        """Whether a guard is the same for each group of iterations of the last loop, from a
        multiple of `lanes` on: it compares x + last, x a multiple, with a size that is one."""
        if not (isinstance(guard, ir.Binary) and guard.op == "<" and isinstance(guard.b, ir.Const)):
            return False
        form = affine(self._resolved(guard.a), frozenset((last,)))
        if form is None or form.steps.keys() != {last} or not ir.is_const(form.steps[last], 1):
            return False
        return is_multiple(form.base, lanes) and int(guard.b.value) % lanes == 0

    def _resolved(self, e: ir.Expr) -> ir.Expr:
        """An expression without the lets on the way to the access."""
        while self.lets.keys() & ir.free_vars(e):
            e = ir.substitute(e, self.lets)
        return e

    def _element(
        self, scratch: ir.Buffer, fresh: dict[str, ir.Var], to: tuple[ir.Expr, ...],
        starts: dict[str, ir.Expr],
    ) -> ir.Stmt:  # fmt: skip
        """Scratch element = operand element. `starts`: for a loop whose iterations are copied
        together the first of them, for which guards are tested."""
        guards = self._guards(set(fresh))
        needed = {n for e in (*self.access.index, *guards) for n in self.reads(e)}
        names: dict[str, ir.Expr] = dict(fresh)
        out: list[ir.Stmt] = []
        held: ir.Expr | None = None
        for s in self.path:
            if isinstance(s, ir.Let) and s.var.name in needed - fresh.keys():
                var = ir.Var(f"{s.var.name}_{scratch.name}", s.var.dtype)
                value = ir.substitute(s.value, names)
                value = ir.zero_unless(held, value) if ir.reads_memory(value) else value
                out.append(ir.Let(var, value))
                names[s.var.name] = var
            for cond in ir.conjuncts(s.cond) if isinstance(s, ir.If) else ():
                if cond in guards:
                    if starts.keys() & self.reads(cond):
                        cond = self._resolved(cond)
                    cond = ir.substitute(cond, names | starts)
                    held = cond if held is None else ir.binary("&", held, cond)
        x = self.access
        at = tuple(ir.substitute(i, names) for i in x.index)
        store = ir.Store(scratch, to, ir.zero_unless(held, ir.Load(x.buffer, at, x.dtype)))
        return ir.seq(*out, store)

    def _guards(self, own: set[str]) -> list[ir.Expr]:
        """The guards of the access itself, which skip elements of the operand; guards that read
        other inner loops only do not concern it."""
        guards: list[ir.Expr] = []
        for s in self.path:
            for cond in ir.conjuncts(s.cond) if isinstance(s, ir.If) else ():
                reads = self.reads(cond) & self.inner.keys()
                if (reads and not reads & own) or self._is_of_coordinates(cond):
                    continue
                if reads - own:
                    why = f"the guard {cond} reads loops that the access does not"
                    raise self.refuse(why, "split with tail='cut', or specialize the dimension")
                guards.append(cond)
        return guards

    def _is_of_coordinates(self, cond: ir.Expr) -> bool:
        """Whether a guard of stored values bounds what their position does not depend on, a
        coordinate: beyond its bound the format stores padding, which is 0."""
        stored = self.access.buffer.scope == "part" and self.padding == 0
        if not (stored and isinstance(cond, ir.Binary) and cond.op == "<"):
            return False
        return bool(self.reads(cond.a) - set().union(*map(self.reads, self.access.index)))


def _part_of(e: ir.Expr, loops: dict[str, ir.For]) -> tuple[ir.For, ir.Expr] | None:
    """The fused loop of which `e` is the quotient or remainder, and the extent of that part."""
    match e:
        case ir.Binary("//" | "%" as op, ir.Var(name), ir.Const(n) as by):
            f = loops.get(name)
            if f is not None and f.extent is not None:
                return f, by if op == "%" else ir.Const(-(-f.extent // int(n)), e.dtype)
    return None


def _copied(lines: list[ir.Stmt]) -> int:
    """The number of lines up to the last copy that a loop makes: later copies may read it."""
    end = 0
    for n, s in enumerate(lines):
        if computes(s):
            break
        if any(isinstance(x, ir.Store) for x in ir.statements(s)):
            end = n + 1
    return end
