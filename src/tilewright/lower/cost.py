"""What the loops of a scheduled program cost: searches, repeated work, bytes; as plain data.

Counts are those of the loops at the position level, in sizes and counts of positions. `A.row1` is
the mean number of positions below one above, in level 1 of A. Conditions count as if they held, but
for the guards of split loops: counts are exact without masks and padding, and bounds with them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any, NamedTuple

from tilewright.dtypes import int64
from tilewright.ir import core as ir
from tilewright.ir.affine import affine
from tilewright.ir.names import COUNT, GeneratedName, parse_name

MEMORY = ("global", "part", "row")
LANES = ("vector", "thread.x", "unroll")  # iterations that share what none of them changes
NONE: frozenset[str] = frozenset()
Rows = tuple[tuple[Any, ...], ...]


class Loop(NamedTuple):
    """A loop around a statement, over blocks of `trips`. If it is a `lane`, work that does not
    depend on it is done once for all iterations."""

    name: str
    trips: ir.Expr
    block: int
    lane: bool
    node: ir.For


class Computed(NamedTuple):
    """Evaluations of an expression by a statement, in `loops`; it depends on `own`. `within`: the
    keys of the expressions that contain it."""

    expr: ir.Expr
    statement: str
    loops: list[Loop]
    own: list[Loop]
    within: frozenset[str]


def costs(program: ir.Program, count: Callable[[ir.Expr], Any]) -> tuple[Rows, Rows, Rows, Rows]:
    """The tables of `runtime.report.Report` for a program at the position level: searches,
    recomputed, bytes, padding. An amount is its text and the data that `count` makes of it."""

    def amount(terms: Iterable[ir.Expr]) -> tuple[str, Any]:
        total = ir.add(_number(0), *(_product(e, _number(n)) for e, n in Counter(terms).items()))
        return str(total).replace(".size", ""), count(total)

    nests = [_Nest(program, nest) for nest in program.nests]
    for n in nests:
        n.statement(ir.used_lets(n.nest.body), ())
    unique = {key: size for n in nests for key, size in n.unique.items()}
    moved = [m for n in nests for m in n.moved]
    searched = [s for n in nests for s in n.searched if s[1]]
    return (
        tuple(
            (name, max(len(loops) for x, loops in searched if x == name),
             amount(_times(loops) for x, loops in searched if x == name))
            for name in dict.fromkeys(x for x, _ in searched)
        ),
        tuple(
            (*row, amount(elements), amount(evaluated))
            for n in nests for *row, elements, evaluated in n.recomputed()
        ),
        tuple(
            (name, way, amount(size for (x, _), size in unique.items() if x == name),
             amount(size for x, w, size in moved if (x, w) == (name, way)))
            for name, way in dict.fromkeys((name, way) for name, way, _ in moved)
        ),
        tuple(
            (name, amount(_symbol(name, len(f.levels) - 1, f, fmt) for f in fmt.formats),
             amount((ir.Var(f"{name}.entries", int64),)))
            for name, fmt in {t.structure: t.format for t in program.tensors if t.structure}.items()
            if not all(f.is_exact and not any(x.padded for x in f.levels) for f in fmt.formats)
        ),
    )  # fmt: skip


def _number(n: int) -> ir.Expr:
    return ir.Const(n, int64)


def _product(*factors: ir.Expr, divisor: int = 1) -> ir.Expr:
    """A product with its constants last, divided by a number."""
    number, result = Fraction(1, divisor), _number(1)
    for e in factors:
        if isinstance(e, ir.Binary) and e.op == "*" and isinstance(e.b, ir.Const):
            e, number = e.a, number * int(e.b.value)
        if isinstance(e, ir.Const):
            number *= int(e.value)
        else:
            result = ir.mul(result, e)
    result = ir.mul(result, _number(number.numerator))
    return ir.simplify(ir.binary("//", result, _number(number.denominator)))


def _times(loops: Sequence[Loop], *factors: ir.Expr) -> ir.Expr:
    """The iterations of nested loops, times more factors. Of a loop over blocks, with those inside
    of a block, a guard leaves out what the last block has too many."""
    extents, divisor = [], 1
    for x in loops:
        axis = (y.trips for y in loops if y.node.axes == x.node.axes)
        is_guarded = prod(int(e.value) for e in axis if isinstance(e, ir.Const)) == x.block
        extents.append(x.trips if is_guarded else ir.ceil_div(x.trips, x.block))
        divisor *= x.block if is_guarded else 1
    return _product(*extents, *factors, divisor=divisor)


def _symbol(structure: str, depth: int, part: Any, fmt: Any, kind: str = COUNT) -> ir.Expr:
    """The number of positions of a level of a part of `fmt`."""
    which = "" if part == fmt else f"[{part}]"
    name = GeneratedName(structure, kind, depth).name
    return _number(1) if depth < 0 else ir.Var(name + which, int64)


class _Nest:
    """The costs of one nest, statement by statement."""

    def __init__(self, program: ir.Program, nest: ir.Nest) -> None:
        self.nest = nest
        self.formats = {t.structure: t.format for t in program.tensors if t.structure}
        self.searched: list[tuple[str, tuple[Loop, ...]]] = []
        self.unique: dict[tuple[str, int], ir.Expr] = {}  # bytes, by array and part
        self.moved: list[tuple[str, str, ir.Expr]] = []  # array, "read" or "written", bytes
        self.computed: dict[str, list[Computed]] = {}
        self._depends: dict[str, frozenset[str]] = {}  # on loops, of a variable or register
        self._done: set[Any] = set()
        self._rows: dict[str, ir.Buffer] = {}  # rows of temporaries, as tables show them

    def statement(self, s: ir.Stmt, loops: tuple[Loop, ...]) -> None:
        if isinstance(s, ir.Seq):
            for b in s.body:
                self.statement(b, loops)
        elif isinstance(s, ir.For):
            self._loop(s, loops)
        elif isinstance(s, ir.If):
            self._evaluate(s.cond, loops)
            self.statement(s.body, loops)
        elif isinstance(s, ir.Compute):
            self._compute(s, loops)
        elif isinstance(s, ir.AllocRow):
            shown = replace(s.buffer, name=f"{s.buffer.name} (row)", shape=s.kept)
            self._rows[s.buffer.name] = shown
        elif isinstance(s, (ir.Let, ir.Store, ir.Scatter)):
            to = s.var if isinstance(s, ir.Let) else s.buffer if isinstance(s, ir.Store) else s.key
            self._evaluate(s.value, loops, str(to))
            self._depends[getattr(to, "name", "")] = self._depends_on(s.value)

    def _loop(self, s: ir.For, loops: tuple[Loop, ...]) -> None:
        for e in (s.begin, s.end):
            self._evaluate(e, loops)
        trips, block = _without_rounding(self._trips(s.begin, s.end))
        for run, stop in zip(s.runs, s.ends, strict=True) if isinstance(s, ir.Merge) else ():
            self._move(run.buffer, "read", loops, self._trips(run.index[0], stop))
        self._depends[s.name] = self._depends_on(s.begin) | self._depends_on(s.end) | {s.name}
        self.statement(s.body, (*loops, Loop(s.name, trips, block, s.kind in LANES, s)))

    def _compute(self, s: ir.Compute, loops: tuple[Loop, ...]) -> None:
        loops = tuple(x._replace(lane=x.lane or x.name in (s.mma or ())) for x in loops)
        name, at = s.out.buffer.name, NONE.union(*map(self._depends_on, s.out.index))
        kept = tuple(x for x in loops if x.name in at or not ir.reduces(x.node, s))
        reduced = {x.name for x in loops} - {x.name for x in kept}
        for r in s.reductions:
            self._evaluate(r.value, loops, name)
            self._depends[r.total.name] = self._depends_on(r.value) - reduced
        self._evaluate(s.value, kept if s.reductions else loops, name)
        depends = self._depends_on(s.value)
        self._depends |= {register.name: depends for register in s.online or ()}
        self._depends[name] = depends - reduced
        for e in s.out.index:
            self._evaluate(e, kept)
        around = self._around(at, loops if s.in_place else kept)
        key = ("store", s.out, *(x.name for x in around))  # parts of a loop that is cut share it
        if s.out.buffer.scope in MEMORY and self._is_new(key):
            for way in ("read", "written") if s.in_place else ("written",):
                self._move(s.out.buffer, way, around)

    def _evaluate(self, e: ir.Expr, loops: tuple[Loop, ...], statement: str = "") -> None:
        """The searches, loads and operations of an expression; of equal ones at one point, one."""
        for x in ir.walk(e):
            if isinstance(x, ir.Search):
                self.searched.append((x.keys.name, loops))
                self._move(x.keys, "read", loops)  # at least one element
            elif isinstance(x, ir.Load) and x.buffer.scope in MEMORY:
                around = self._around(self._depends_on(x), loops)
                if self._is_new((x, *(id(x.node) for x in around))):
                    self._move(x.buffer, "read", around)
        self._operations(e, loops, statement, NONE)

    def _operations(
        self, e: Any, loops: tuple[Loop, ...], statement: str, within: frozenset[str]
    ) -> None:
        if isinstance(e, (ir.Binary, ir.Unary)) and e.dtype.is_float:
            depends, key = self._depends_on(e), self._general(e)
            around = self._around(depends, loops)
            runs = around and not any(ir.is_const(x.trips, 0) for x in around)
            if runs and self._is_new((statement, e, *(id(x.node) for x in around))):
                own = [x for x in around if x.name in depends]
                computed = Computed(e, statement, around, own, within)
                self.computed.setdefault(key, []).append(computed)
            within |= {key}
        for child in () if isinstance(e, ir.Load) else ir.children(e):
            self._operations(child, loops, statement, within)

    def recomputed(self) -> list[tuple[Any, ...]]:
        """The largest expressions that are evaluated in loops that they do not depend on, or by
        several statements: text, loops, statements, terms of the elements and evaluations."""
        rows: dict[str, tuple[Any, ...]] = {}
        for key in sorted(self.computed, key=len, reverse=True):
            uses = self.computed[key]
            again = dict.fromkeys(x.name for f in uses for x in f.loops if x not in f.own)
            statements = dict.fromkeys(f.statement for f in uses)
            if (again or len(statements) > 1) and not all(f.within & rows.keys() for f in uses):
                own = (f.own for f in uses if f.statement == uses[0].statement)
                elements = {tuple(x.name for x in loops): _times(loops) for loops in own}
                texts = str(uses[0].expr), tuple(again), tuple(statements)
                rows[key] = (*texts, list(elements.values()), [_times(f.loops) for f in uses])
        return list(rows.values())

    def _depends_on(self, e: ir.Expr) -> frozenset[str]:
        """The names of the loops that a value depends on."""
        names = {x.name for x in ir.walk(e, ir.Var)}
        names |= {x.buffer.name for x in ir.walk(e, ir.Load)}
        return NONE.union(*(self._depends[x] for x in names if x in self._depends))

    def _around(self, depends: frozenset[str], loops: Sequence[Loop]) -> list[Loop]:
        """The loops in which work is done again: down to the innermost that it depends on; from
        those further in it is moved out."""
        last = max((n for n, x in enumerate(loops) if x.name in depends), default=-1)
        return [x for x in loops[: last + 1] if x.name in depends or not x.lane]

    def _general(self, e: ir.Expr) -> str:
        """The text of an expression with its loop variables and lets numbered."""
        names = dict.fromkeys(x.name for x in ir.walk(e, ir.Var) if x.name in self._depends)
        return str(ir.substitute(e, {v: ir.Var(f"${n}") for n, v in enumerate(names)}))

    def _is_new(self, key: Any) -> bool:
        is_new = key not in self._done
        self._done.add(key)
        return is_new

    def _move(self, b: ir.Buffer, way: str, loops: Sequence[Loop], *factors: ir.Expr) -> None:
        """One element, or a product of elements, moved in each iteration of `loops`."""
        b = self._rows.get(b.name, b)
        shape, parsed = [self._amount(e) for e in b.shape], parse_name(b.name)
        if parsed and parsed.kind == "indptr":
            shape = [ir.add(self._count(parsed.owner, parsed.number - 1), 1)]
        part, size = self.nest.part if b.scope == "part" else -1, _number(b.dtype.itemsize)
        self.unique[b.name, part] = _product(*shape, size)
        self.moved.append((b.name, way, _times(loops, *factors, size)))

    def _trips(self, begin: ir.Expr, end: ir.Expr) -> ir.Expr:
        """The trip count of a loop: of the operands of a minimum those whose difference to one of a
        maximum does not depend on other loops, a number if there is one."""
        bounds = product(_operands(end, "min"), _operands(begin, "max"))
        counts = [self._difference(*pair) for pair in bounds]
        known = [x for x in counts if not ir.free_vars(x) & self._depends.keys()]
        unknown = ir.Var(f"({end} - {begin})", int64)
        return next(filter(ir.is_const, known), known[0] if known else unknown)

    def _difference(self, a: ir.Expr, b: ir.Expr) -> ir.Expr:
        a, b = self._amount(a), self._amount(b)
        x, y = (affine(e, frozenset(self._depends), int64) for e in (a, b))
        if x and y and x.steps == y.steps:
            a, b = x.base, y.base
        return ir.simplify(ir.binary("-", a, b))

    def _amount(self, e: ir.Expr) -> ir.Expr:
        """A bound in int64, where a row starts at its number times the mean length of rows."""
        if isinstance(e, (ir.Cast, ir.Select)):
            return self._amount(e.a)
        if isinstance(e, ir.Const):
            return _number(int(e.value))
        parsed = parse_name(e.buffer.name if isinstance(e, ir.Load) else getattr(e, "name", ""))
        if isinstance(e, ir.Load) and parsed and parsed.kind == "indptr":
            return ir.mul(self._count(parsed.owner, parsed.number, "row"), self._amount(e.index[0]))
        if isinstance(e, ir.Var):
            if parsed and parsed.kind == COUNT:
                return self._count(parsed.owner, parsed.number)
            return ir.Var(e.name, int64)
        if not isinstance(e, ir.Binary):
            return ir.Var(str(e), int64)
        if e.op == "-":
            return self._difference(e.a, e.b)
        return ir.simplify(ir.binary(e.op, self._amount(e.a), self._amount(e.b)))

    def _count(self, structure: str, depth: int, kind: str = COUNT) -> ir.Expr:
        fmt = self.formats[structure]
        part = fmt.formats[self.nest.part if len(fmt.formats) > 1 else 0]
        return _symbol(structure, depth, part, fmt, kind)


def _operands(e: Any, op: str) -> list[ir.Expr]:
    nested = isinstance(e, ir.Binary) and e.op == op
    return [*_operands(e.a, op), *_operands(e.b, op)] if nested else [e]


def _without_rounding(e: Any) -> tuple[ir.Expr, int]:
    """n and b of (n + b - 1) // b, the loop over blocks, of which a guard leaves out the excess."""
    match e:
        case ir.Binary("//", ir.Binary("+", n, ir.Const(more)), ir.Const(b)) if more == b - 1:
            return n, int(b)
    return e, 1
