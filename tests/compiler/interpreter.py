"""Interprets lowered IR, one scalar operation after the other, to judge the passes.

`execute` runs the position and the loop level. A value is a NumPy scalar of its dtype, or an array
of its lanes (bfloat16: float32). Memory that was never written is NaN, and an access outside of a
buffer raises InternalError[I101]. One thread runs: loops over threads are serial, barriers do
nothing; `tests.compiler.cta` runs what is lowered for CUDA. `reference.evaluate` has the coordinate
level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from tests.compiler.memory import (
    Array,
    Part,
    as_operand,
    constant,
    lane_dimensions,
    launches,
    poisoned,
)

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import free_vars, statements, walk
from tilewright.reference import evaluate
from tilewright.reference.evaluate import UFUNCS, cast, decode, encode


def execute(
    program: ir.Program,
    buffers: Mapping[str, np.ndarray],
    variables: Mapping[str, int],
    parts: Sequence[Part] = (),
) -> None:
    """Run a program at the position or the loop level, on arrays it reads and writes in place.

    `buffers` are the dense arrays by name; `variables` the sizes (`m.size`); `parts` what belongs
    to the parts of sparse tensors; strides are those of the arrays.
    Raises InternalError[I101] for an access out of bounds or a name that is not bound.
    """
    with np.errstate(all="ignore"):
        for stage in launches(program, buffers, variables, parts):
            nests = [_Nest(*nest, program.level == "positions") for nest in stage]
            for nest in nests:
                nest.start_sums()
            for nest in nests:
                nest.run()


class _Nest:
    """One nest under one part: `do` runs a statement, `value` evaluates an expression."""

    def __init__(
        self, nest: ir.Nest, memory: dict[str, Array], env: dict[str, Any], positions: bool
    ) -> None:
        self.nest, self.memory, self.env, self.positions = nest, memory, env, positions
        self.rows: dict[str, dict[Any, Any]] = {}  # row workspaces: values by coordinate
        self.scratch: set[str] = set()  # registers that a statement allocates
        self.registers: dict[str, Any] = {}  # values; at the position level one for each temporary
        self.started: set[str] = set()  # temporaries whose sum has begun in an outer loop
        # Position level: sums into memory, from buffer to the values by offset.
        self.sums: dict[str, dict[int, Any]] = {}
        self.lanes = lane_dimensions(nest.body)
        self.closures: dict[int, Callable[[], Any]] = {}  # of expressions, by id
        self.cached: dict[int, dict[str, Any]] = {}  # `starts` of loops, by id
        self.reads: dict[int, set[str]] = {}  # names that expressions read, by id
        self.around: list[ir.For] = []  # position level: the loops
        # Position level: totals of epilogues, by output, register, and offset.
        self.totals: dict[tuple[str, str, int], Any] = {}

    def start_sums(self) -> None:
        """Every element that a nest sums into starts at the identity."""
        for c in walk(self.nest.body):
            if isinstance(c, ir.Compute) and c.op and not c.in_place and _in_memory(c.out.buffer):
                view = self.memory[c.out.buffer.name].view
                view[...] = encode(cast(_identity(c), c.out.dtype), c.out.dtype, view.dtype)

    def run(self) -> None:
        grid = zip(self.nest.grid_vars, self.nest.grid, strict=True)
        ranges = [_range(v, 0, self.value(e)) for v, e in grid]
        try:
            for unit in itertools.product(*ranges):
                self.env.update(zip((v.name for v in self.nest.grid_vars), unit, strict=True))
                self.do(self.nest.body)
        except KeyError as error:
            raise InternalError("I101", f"{error.args[0]} is not bound") from None
        for c in walk(self.nest.body):
            if isinstance(c, ir.Compute):
                for at, total in self.sums.pop(c.out.buffer.name, {}).items():
                    flat = self.memory[c.out.buffer.name].flat
                    flat[at] = encode(cast(total, c.out.dtype), c.out.dtype, flat.dtype)

    # -- statements ------------------------------------------------------------------------------

    def do(self, s: ir.Stmt) -> None:
        if isinstance(s, ir.Seq):
            self.sequence(s)
        elif isinstance(s, ir.For):
            self.loop(s)
        elif isinstance(s, ir.Let):
            self.env[s.var.name] = self.value(s.value)
        elif isinstance(s, ir.If):
            if self.value(s.cond):
                self.do(s.body)
        elif isinstance(s, ir.Compute):
            self.compute(s)
        elif isinstance(s, ir.Store):
            self.store(s.buffer, s.index, self.value(s.value), s.op)
        elif isinstance(s, ir.Alloc):
            self.allocate(s.buffer, s.extents if isinstance(s, ir.AllocRow) else ())
        elif isinstance(s, ir.Scatter):
            row, key, value = self.rows[s.workspace.name], self.value(s.key), self.value(s.value)
            row[key] = row[key] + value if key in row else value
        elif isinstance(s, ir.Mma):
            m, n, k = s.shape
            fragment = self.registers[s.acc.name].reshape(-1, m, n)[self.value(s.slot)]
            dtype = s.b.buffer.dtype
            a, b = self.tile(s.a, m, k, dtype), self.tile(s.b, k, n, dtype)
            fragment += s.atom.numpy(a, b) if s.atom else a @ b
        elif not isinstance(s, (ir.Sync, ir.Commit, ir.Wait, ir.Prefetch)):
            raise InternalError("I101", f"{type(s).__name__} cannot be executed")

    def sequence(self, s: ir.Seq) -> None:
        """A loop and its tail that reduce into the same temporary share its start."""
        before = self.started
        for b in s.body:
            self.do(b)
            if self.positions:
                self.started = self.started | self.starts(b).keys()
        self.started = before

    def loop(self, s: ir.For) -> None:
        before = self.started
        starts = {n: v for n, v in self.starts(s).items() if n not in before}
        self.started = before | starts.keys()
        self.registers.update(starts)
        if starts:  # temporaries that are computed anew
            self.totals = {k: v for k, v in self.totals.items() if k[0] not in starts}
        if self.positions:
            self.around.append(s)
        if isinstance(s, ir.Merge):
            self.merge(s)
        elif isinstance(s, ir.Drain):
            self.drain(s)
        else:
            for i in _range(s.var, self.value(s.begin), self.value(s.end)):
                self.env[s.name] = i
                self.do(s.body)
        self.started = before
        if self.positions:
            self.leave(s)

    def merge(self, s: ir.Merge) -> None:
        """Runs the body for each coordinate of the lists, which ascend."""
        lists: list[dict[int, int]] = []
        for run, end in zip(s.runs, s.ends, strict=True):
            keys, first = self.memory[run.buffer.name], int(self.value(run.index[0]))
            positions = range(first, int(self.value(end)))
            coordinates = [int(keys.read(p, run.buffer.dtype)) for p in positions]
            if coordinates != sorted(set(coordinates)):
                raise InternalError("I101", f"{run.buffer.name} does not ascend: {coordinates}")
            lists.append(dict(zip(coordinates, positions, strict=True)))
        joined = set.union if s.op == "union" else set.intersection
        number = s.var.dtype.numpy.type
        for rank, key in enumerate(sorted(joined(*map(set, lists)))):
            self.env[s.name], self.env[cursor(s.name, ir.KEY)] = number(rank), number(key)
            for n, known in enumerate(lists):
                self.env[cursor(s.name, n)] = number(known.get(key, -1))
            self.do(s.body)

    def drain(self, s: ir.Drain) -> None:
        """Runs the body for each coordinate of a row workspace, and empties it."""
        assert s.workspace is not None
        row = self.rows[s.workspace.name]
        for rank, key in enumerate(sorted(row)):
            self.env[s.name] = s.var.dtype.numpy.type(rank)
            self.env[cursor(s.name, ir.KEY)] = key
            self.env[cursor(s.name, ir.VALUE)] = row[key]
            self.do(s.body)
        row.clear()

    def starts(self, s: ir.Stmt) -> dict[str, Any]:
        """Position level: temporaries that the loop `s` reduces into, and their first values."""
        if not isinstance(s, ir.For) or not self.positions:
            return {}
        if id(s) not in self.cached:
            self.cached[id(s)] = {
                c.out.buffer.name: _identity(c)
                for c in walk(s)
                if isinstance(c, ir.Compute)
                and ir.reduces(s, c)
                and c.out.buffer.scope in ("register", "row")
            }
        return self.cached[id(s)]

    def compute(self, s: ir.Compute) -> None:
        if s.reductions:
            self.add(s)
            return
        buffer, value = s.out.buffer, self.value(s.value)
        if not _in_memory(buffer):
            if s.op and buffer.name in self.started:
                if s.online:
                    self.weigh(s.online, self.registers[buffer.name], value)
                value = UFUNCS[s.op](self.registers[buffer.name], value)
            self.registers[buffer.name] = value
        elif not s.op or s.in_place:
            self.store(buffer, s.out.index, value, s.op)
        else:
            sums = self.sums.setdefault(buffer.name, {})
            at = self.memory[buffer.name].checked(self.offset(buffer, s.out.index))
            sums[at] = UFUNCS[s.op](sums[at] if at in sums else _identity(s), value)

    def store(self, b: ir.Buffer, index: tuple[ir.Expr, ...], value: Any, op: str) -> None:
        at, dtype = self.offset(b, index), b.dtype.scalar
        if _in_memory(b):
            cells = self.memory[b.name].flat
            self.memory[b.name].checked(at)
        else:
            cells = self.registers[b.name]
        if op:
            value = UFUNCS[op](decode(cells[at], dtype), value)
        cells[at] = encode(value, dtype, cells.dtype)

    def allocate(self, b: ir.Buffer, row: tuple[ir.Expr, ...]) -> None:
        if b.scope == "workspace":
            self.rows[b.name] = {}
            return
        extents = tuple(int(self.value(e)) for e in row or b.shape)
        if b.scope in ("shared", "row"):
            self.memory[b.name] = Array.of(b.name, poisoned(extents, b.dtype))
        else:
            shape = (prod(extents), b.dtype.lanes)[: 1 + (b.dtype.lanes > 1)]
            self.registers[b.name] = poisoned(shape, b.dtype.scalar)
            if b.scope == "fragment":
                self.registers[b.name][...] = 0
            self.scratch.add(b.name)

    def tile(self, t: ir.Tile, rows: int, cols: int, dtype: DType) -> np.ndarray:
        """The elements of an operand in float32, those of a fragment rounded to `dtype`; 0 beyond
        its limits."""
        if t.buffer.scope == "fragment":
            values = self.registers[t.buffer.name].reshape(-1, rows, cols)[self.value(t.offset)]
            return as_operand(cast(values, dtype), dtype)
        array = self.memory[t.buffer.name]
        fields = (t.offset, t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        first, down, right, high, wide = (int(self.value(f)) for f in fields)
        r, c = np.arange(rows)[:, None], np.arange(cols)
        inside = (r < high) & (c < wide)
        at = np.where(inside, first + r * down + c * right, 0)
        elements = np.zeros(inside.shape, np.float32)
        if inside.any():
            elements[inside] = as_operand(array.read(at[inside], t.buffer.dtype), t.buffer.dtype)
        return elements

    # -- epilogues: totals of each element, stored where the outermost loop that reduces ends ------

    def add(self, c: ir.Compute) -> None:
        """Adds the terms of a statement with an epilogue to the totals of its element."""
        at = self.element(c)
        for r in c.reductions:
            key = c.out.buffer.name, r.total.name, at
            value, before = self.value(r.value), self.totals.get(key, _identity(r))
            if r.factor is not None and before:
                before = before * self.registers[r.factor.name]
            self.totals[key] = UFUNCS[r.op](before, value)
        if not any(ir.reduces(f, c) for f in self.around):
            self.finish(c)

    def leave(self, loop: ir.For) -> None:
        """Stores the statements whose outermost loop that reduces ends here."""
        self.around.pop()
        for c in (c for c in statements(loop) if isinstance(c, ir.Compute) and c.reductions):
            if ir.reduces(loop, c) and not any(ir.reduces(f, c) for f in self.around):
                self.finish_below(loop, c, set())

    def finish_below(self, s: ir.Stmt, c: ir.Compute, reduced: set[str]) -> None:
        """Stores the elements of `c` below `s`, also those without a term: loops that reduce, and
        guards and names that depend on them, are passed by."""
        if s is c:
            self.finish(c)
        elif isinstance(s, ir.For):
            if ir.reduces(s, c):
                self.finish_below(s.body, c, reduced | {s.name})
                return
            for i in range(int(self.value(s.begin)), int(self.value(s.end))):
                self.env[s.name] = s.var.dtype.numpy.type(i)
                self.finish_below(s.body, c, reduced)
        elif isinstance(s, ir.If):
            if self.depends(s.cond, reduced) or self.value(s.cond):
                self.finish_below(s.body, c, reduced)
        elif isinstance(s, ir.Seq):
            reduced = set(reduced)
            for b in s.body:
                if isinstance(b, ir.Let) and self.depends(b.value, reduced):
                    reduced.add(b.var.name)
                elif isinstance(b, ir.Let):
                    self.do(b)
                else:
                    self.finish_below(b, c, reduced)

    def depends(self, e: ir.Expr, names: set[str]) -> bool:
        """Whether an expression reads one of the names."""
        if id(e) not in self.reads:
            self.reads[id(e)] = free_vars(e)
        return not names.isdisjoint(self.reads[id(e)])

    def finish(self, c: ir.Compute) -> None:
        """Stores a statement with an epilogue from the totals of its element."""
        at = self.element(c)
        for r in c.reductions:
            total = self.totals.get((c.out.buffer.name, r.total.name, at), _identity(r))
            self.registers[r.total.name] = cast(total, r.total.dtype)
        value = self.value(c.value)
        if c.out.buffer.scope == "register":
            self.registers[c.out.buffer.name] = value
        else:
            self.store(c.out.buffer, c.out.index, value, "")

    def weigh(self, online: tuple[ir.Buffer, ir.Buffer], old: Any, x: Any) -> None:
        """The weight of a term of a running maximum, and the factor of the sums before it."""
        weight, factor = online
        new = max(old, x)
        self.registers[weight.name] = np.exp(x - new) if x > -np.inf else x.dtype.type(0)
        self.registers[factor.name] = np.exp(old - new)

    def element(self, c: ir.Compute) -> int:
        buffer = c.out.buffer
        if buffer.scope == "register":
            return 0
        return int(self.memory[buffer.name].checked(self.offset(buffer, c.out.index)))

    # -- expressions -----------------------------------------------------------------------------

    def offset(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> Any:
        """The offset of an access: an integer, or an array with one for each lane. Before addresses
        are flattened there is one index for each dimension."""
        values = [self.value(i) for i in index]
        if _in_memory(b):
            return values[0] if len(values) == 1 else _offset(self.memory[b.name], values)
        at = 0
        for i, extent in zip(values, map(_integer, b.shape), strict=False):
            if not 0 <= i < extent:
                raise InternalError("I101", f"register {b.name}[{i}] is outside 0…{extent - 1}")
            at = at * extent + int(i)
        return at

    def value(self, e: ir.Expr) -> Any:
        run = self.closures.get(id(e))
        if run is None:
            run = self.closures[id(e)] = self.closure(e)
        return run()

    def closure(self, e: ir.Expr) -> Callable[[], Any]:
        """An expression as a function, which is built once and called often."""
        env = self.env
        if isinstance(e, ir.Var):
            return lambda: env[e.name]
        if isinstance(e, ir.Const):
            value = constant(e.value, e.dtype.scalar)
            return lambda: value
        if isinstance(e, ir.Cursor):
            name = cursor(e.loop.name, e.operand)
            return lambda: env[name]
        if isinstance(e, ir.Load):
            return self.load(e)
        if isinstance(e, ir.Search):
            return lambda: self.search(e)
        if isinstance(e, ir.Holds):
            return lambda: self.value(e.key) in self.rows[e.workspace.name]
        if isinstance(e, ir.ReduceThreads):
            return self.closure(e.a)  # the loop over threads has run in order
        operands = [self.closure(x) for x in ir.children(e)]
        if isinstance(e, ir.Select) and e.cond.dtype.lanes == 1:
            cond, a, b = operands
            return lambda: a() if cond() else b()
        act = operation(e)
        if isinstance(e, ir.Binary):
            a, b = operands
            if e.dtype == dtypes.bool_ and e.op in "&|":
                # The second operand may read what only the first one allows.
                return (lambda: a() and b()) if e.op == "&" else lambda: a() or b()
            return lambda: act(a(), b())
        return lambda: act(*(x() for x in operands))

    def load(self, e: ir.Load) -> Callable[[], Any]:
        b, name, dtype = e.buffer, e.buffer.name, e.dtype.scalar
        if _in_memory(b):
            if len(e.index) != 1:
                return lambda: self.memory[name].read(self.offset(b, e.index), dtype)
            at = self.closure(e.index[0])
            return lambda: self.memory[name].read(at(), dtype)
        if self.positions and name not in self.scratch:
            return lambda: self.registers[name]
        if e.dtype.lanes == b.dtype.lanes:
            return lambda: decode(self.registers[name][self.offset(b, e.index)], dtype)
        step = prod(_integer(extent) for extent in b.shape[self.lanes[name] + 1 :])
        span = step * (e.dtype.lanes - 1) + 1

        def lanes() -> Any:
            first = self.offset(b, e.index)
            return decode(self.registers[name][first : first + span : step], dtype)

        return lanes

    def search(self, e: ir.Search) -> Any:
        low, high, key = (int(self.value(x)) for x in (e.lo, e.hi, e.key))
        keys = self.memory[e.keys.name]
        if low < high:
            keys.checked(low)
            keys.checked(high - 1)
        at = low + int(np.searchsorted(keys.flat[low:high], key, "right" if e.last else "left"))
        if not e.last and not (at < high and keys.flat[at] == key):
            at = -1
        return e.dtype.numpy.type(at - e.last)


def operation(e: Any) -> Callable[..., Any]:
    """The function of the values of an expression's operands that gives its value, also of the
    expressions that only lowered programs have. The last dimension of an array are the lanes."""
    if isinstance(e, ir.Ramp):
        return lambda x: x[..., None] + np.arange(e.dtype.lanes, dtype=e.dtype.numpy)
    if isinstance(e, ir.Broadcast):
        return lambda x: np.repeat(x[..., None], e.dtype.lanes, -1)
    if isinstance(e, ir.ReduceLanes):
        return lambda x: UFUNCS[e.op].reduce(x, -1, x.dtype)
    return evaluate.operation(e)


def cursor(loop: str, operand: int) -> str:
    """The name of a cursor of a loop."""
    return f"{loop}.{operand}"


def _in_memory(b: ir.Buffer) -> bool:
    return b.scope not in ("register", "fragment")


def _offset(array: Array, index: Sequence[Any]) -> int:
    """The offset of an element by its index in each dimension, checked."""
    for i, n in zip(index, array.view.shape, strict=True):
        if not 0 <= i < n:
            raise InternalError("I101", f"{array.name}{[*index]} is outside {array.view.shape}")
    return sum(int(i) * s for i, s in zip(index, array.strides, strict=True))


def _range(v: ir.Var, begin: Any, end: Any) -> Iterator[Any]:
    """The values of a loop variable, in its dtype."""
    return map(v.dtype.numpy.type, range(int(begin), int(end)))


def _identity(c: ir.Compute | ir.Reduction) -> Any:
    return constant(ir.identity_of(c.op, c.value.dtype).value, c.value.dtype)


def _integer(e: ir.Expr) -> int:
    assert isinstance(e, ir.Const)
    return int(e.value)
