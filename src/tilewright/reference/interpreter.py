"""Interprets lowered IR, one scalar operation after the other: the tests run passes on it.

`execute` runs the position and the loop level. Each node becomes one Python closure, each value a
NumPy scalar of its dtype, or an array of its lanes (bfloat16: float32). Memory that was never
written is NaN, and an access outside of a buffer raises InternalError[I101]. One thread runs: loops
over threads are serial, barriers do nothing. `reference.evaluate` has the coordinate level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.names import stride_name
from tilewright.ir.rewrite import walk
from tilewright.reference.memory import Array, Part, poisoned
from tilewright.reference.ops_table import UFUNCS, cast, constant, decode, encode, operation

Env = dict[str, Any]
Run = Callable[[Env], Any]


def execute(
    program: ir.Program,
    buffers: Mapping[str, np.ndarray],
    variables: Mapping[str, int],
    parts: Sequence[Part] = (),
) -> None:
    """Run a program at the position or the loop level, on arrays it reads and writes in place.

    `buffers` are the dense arrays by name; `variables` the sizes (`m.size`); `parts` what belongs
    to the parts of sparse tensors; `memory.memory_of` makes all three. Strides are those of the
    arrays; an array of one dimension is contiguous.
    Raises InternalError[I101] for an access out of bounds or a name that is not bound.
    """
    memory = {name: Array.of(name, a) for name, a in buffers.items()}
    strides = {
        stride_name(name, d): s for name, a in memory.items() for d, s in enumerate(a.strides)
    }
    with np.errstate(all="ignore"):
        for stage in program.stages:
            nests: list[tuple[_Nest, Env]] = []
            for nest, (number, part) in itertools.product(stage, enumerate(parts or (Part(),))):
                if part.case == nest.part or (nest.part < 0 and number == 0):
                    own = {name: Array.of(name, a) for name, a in part.buffers.items()}
                    env = {**variables, **strides, **part.variables}
                    nests.append((_Nest(nest, memory | own, program.level), env))
            for nest, _ in nests:
                nest.start_sums()
            for nest, env in nests:
                nest.run(env)


class _Nest:
    """One nest under one part: statements and expressions as closures over an environment."""

    def __init__(self, nest: ir.Nest, memory: dict[str, Array], level: str) -> None:
        self.memory, self.positions = memory, level == "positions"
        self.types: dict[str, DType] = {}  # of variables
        self.scratch: set[str] = set()  # registers that a statement allocates
        self.registers: dict[str, Any] = {}  # values; at the position level one for each temporary
        self.started: set[str] = set()  # while building: temporaries whose sum has begun outside
        # Position level: sums into memory by buffer, what they start from, and their elements.
        self.sums: dict[str, tuple[DType, Any, dict[int, Any]]] = {}
        self.lanes = _lane_dimensions(nest.body)
        self.grid = [(v, self.expr(e)) for v, e in zip(nest.grid_vars, nest.grid, strict=True)]
        self.body = self.stmt(nest.body)

    def start_sums(self) -> None:
        """Every element that a nest sums into starts at the identity."""
        for name, (dtype, start, _) in self.sums.items():
            view = self.memory[name].view
            view[...] = encode(cast(start, dtype), dtype, view.dtype)

    def run(self, env: Env) -> None:
        env = {name: constant(n, self.types.get(name, dtypes.int64)) for name, n in env.items()}
        ranges = [_range(v, 0, extent(env)) for v, extent in self.grid]
        try:
            for unit in itertools.product(*ranges):
                env.update(zip((v.name for v, _ in self.grid), unit, strict=True))
                self.body(env)
        except KeyError as error:
            raise InternalError("I101", f"{error.args[0]} is not bound") from None
        for name, (dtype, _, elements) in self.sums.items():
            for offset, value in elements.items():
                self.memory[name].write(offset, cast(value, dtype), dtype)

    # -- statements ------------------------------------------------------------------------------

    def stmt(self, s: ir.Stmt) -> Run:
        if isinstance(s, (ir.Sync, ir.Prefetch)):
            return lambda env: None
        build = getattr(self, f"_{type(s).__name__.lower()}", None)
        if build is None:
            raise InternalError("I101", f"{type(s).__name__} cannot be executed")
        return build(s)

    def _seq(self, s: ir.Seq) -> Run:
        """A loop and its tail that reduce into the same temporary share its start."""
        before, steps = set(self.started), []
        for b in s.body:
            steps.append(self.stmt(b))
            self.started |= _sums_of(b).keys()
        self.started = before

        def run(env: Env) -> None:
            for step in steps:
                step(env)

        return run

    def _for(self, s: ir.For) -> Run:
        starts = {n: v for n, v in _sums_of(s).items() if n not in self.started}
        self.started |= starts.keys()
        name, begin, end, body = s.name, self.expr(s.begin), self.expr(s.end), self.stmt(s.body)
        self.started -= starts.keys()

        def run(env: Env) -> None:
            self.registers.update(starts)
            for value in _range(s.var, begin(env), end(env)):
                env[name] = value
                body(env)

        return run

    def _let(self, s: ir.Let) -> Run:
        value = self.expr(s.value)
        return lambda env: env.update({s.var.name: value(env)})

    def _if(self, s: ir.If) -> Run:
        cond, body = self.expr(s.cond), self.stmt(s.body)
        return lambda env: body(env) if cond(env) else None

    def _compute(self, s: ir.Compute) -> Run:
        value, buffer = self.expr(s.value), s.out.buffer
        if buffer.scope == "register":
            ufunc, name = UFUNCS.get(s.op), buffer.name
            if ufunc and name in self.started:
                return lambda env: self.registers.update(
                    {name: ufunc(self.registers[name], value(env))}
                )
            return lambda env: self.registers.update({name: value(env)})
        if not s.op or s.in_place:
            return self._store(ir.Store(buffer, s.out.index, s.value, s.op))
        array, offset = self.memory[buffer.name], self.offset(buffer, s.out.index)
        ufunc = UFUNCS[s.op]
        start = constant(ir.identity_of(s.op, s.value.dtype).value, s.value.dtype)
        _, _, elements = self.sums.setdefault(buffer.name, (s.out.dtype, start, {}))

        def accumulate(env: Env) -> None:
            at = array.checked(offset(env))
            elements[at] = ufunc(elements.get(at, start), value(env))

        return accumulate

    def _alloc(self, s: ir.Alloc) -> Run:
        b = s.buffer
        self.scratch.add(b.name)
        extents = tuple(_integer(e) for e in b.shape)
        if b.scope == "shared":
            empty = poisoned(extents, b.dtype)
            array = self.memory[b.name] = Array.of(b.name, empty.copy())
            return lambda env: np.copyto(array.view, empty)
        shape = (prod(extents), b.dtype.lanes)[: 1 + (b.dtype.lanes > 1)]
        return lambda env: self.registers.update({b.name: poisoned(shape, b.dtype.scalar)})

    def _store(self, s: ir.Store) -> Run:
        b, dtype = s.buffer, s.buffer.dtype.scalar
        value, offset, ufunc = self.expr(s.value), self.offset(b, s.index), UFUNCS.get(s.op)
        array = None if b.scope == "register" else self.memory[b.name]

        def store(env: Env) -> None:
            at, new = offset(env), value(env)
            cells = self.registers[b.name] if array is None else array.flat
            if array is not None:
                array.checked(at)
            new = ufunc(decode(cells[at], dtype), new) if ufunc else new
            cells[at] = encode(new, dtype, cells.dtype)

        return store

    # -- tiles -----------------------------------------------------------------------------------

    def _mmazero(self, s: ir.MmaZero) -> Run:
        fragment = self.fragment(s)
        return lambda env: fragment(env).fill(0)

    def _mma(self, s: ir.Mma) -> Run:
        m, n, k = s.shape
        fragment, a, b = self.fragment(s), self.tile(s.a, m, k), self.tile(s.b, k, n)

        def run(env: Env) -> None:
            left, right = (tile(env)[0].astype(np.float32) for tile in (a, b))
            fragment(env)[...] += left @ right

        return run

    def _mmastore(self, s: ir.MmaStore) -> Run:
        fragment, tile, buffer = self.fragment(s), self.tile(s.to, *s.shape[:2]), s.to.buffer

        def run(env: Env) -> None:
            old, offset, inside = tile(env)
            new = fragment(env) + old.astype(np.float32) if s.op else fragment(env)
            if inside.any():
                to = self.memory[buffer.name]
                to.write(offset[inside], cast(new[inside], buffer.dtype), buffer.dtype)

        return run

    def fragment(self, s: ir.MmaZero | ir.Mma | ir.MmaStore) -> Run:
        """One fragment: an m × n view of the accumulator."""
        m, n = s.shape[:2]
        slot = self.expr(s.slot)
        return lambda env: self.registers[s.acc.name].reshape(-1, m, n)[slot(env)]

    def tile(self, t: ir.Tile, rows: int, cols: int) -> Run:
        """(elements, their offsets, whether each is inside the limits) of a tile; 0 beyond them."""
        array, dtype = self.memory[t.buffer.name], t.buffer.dtype
        fields = (t.offset, t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        values = [self.expr(f) for f in fields]
        r, c = np.arange(rows)[:, None], np.arange(cols)

        def read(env: Env) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            first, down, right, high, wide = (int(f(env)) for f in values)
            inside = (r < high) & (c < wide)
            offset = np.where(inside, first + r * down + c * right, 0)
            elements = np.zeros(inside.shape, array.flat.dtype)
            if inside.any():
                elements[inside] = array.flat[array.checked(offset[inside])]
            return decode(elements, dtype), offset, inside

        return read

    # -- expressions -----------------------------------------------------------------------------

    def offset(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> Run:
        """The offset of an access: an integer, or an array with one for each lane. Before addresses
        are flattened there is one index for each dimension."""
        values = [self.expr(i) for i in index]
        if b.scope == "register":
            known = not self.positions or b.name in self.scratch
            extents = [_integer(e) for e in b.shape] if known else []
            return lambda env: _row_major(b.name, [i(env) for i in values], extents)
        array = self.memory[b.name]
        if len(values) == 1:
            return values[0]
        return lambda env: array.offset([i(env) for i in values])

    def expr(self, e: ir.Expr) -> Run:
        if isinstance(e, ir.Const):
            value = constant(e.value, e.dtype.scalar)
            return lambda env: value
        if isinstance(e, ir.Var):
            self.types[e.name] = e.dtype
            return lambda env: env[e.name]
        if isinstance(e, ir.Load):
            return self.load(e)
        if isinstance(e, ir.Search):
            return self.search(e)
        if isinstance(e, ir.ReduceThreads):
            return self.expr(e.a)  # the loop over threads has run in order
        operands = [self.expr(x) for x in ir.children(e)]
        if e.dtype.lanes == 1 and isinstance(e, ir.Select):
            cond, a, b = operands
            return lambda env: a(env) if cond(env) else b(env)
        if e.dtype == dtypes.bool_ and isinstance(e, ir.Binary) and e.op in ("&", "|"):
            a, b = operands  # the second one may read what only the first one allows
            return (lambda env: a(env) and b(env)) if e.op == "&" else lambda env: a(env) or b(env)
        act = operation(e)
        if len(operands) == 1:
            (a,) = operands
            return lambda env: act(a(env))
        if len(operands) == 2:
            a, b = operands
            return lambda env: act(a(env), b(env))
        return lambda env: act(*(x(env) for x in operands))

    def load(self, e: ir.Load) -> Run:
        b, name, dtype = e.buffer, e.buffer.name, e.dtype.scalar
        if b.scope != "register":
            array, offset = self.memory[name], self.offset(b, e.index)
            return lambda env: array.read(offset(env), dtype)
        if self.positions and name not in self.scratch:
            return lambda env: self.registers[name]
        offset = self.offset(b, e.index)
        if e.dtype.lanes == b.dtype.lanes:
            return lambda env: decode(self.registers[name][offset(env)], dtype)
        step = prod(_integer(extent) for extent in b.shape[self.lanes[name] + 1 :])
        span = step * (e.dtype.lanes - 1) + 1  # one vector of many scalars
        return lambda env: decode(self.registers[name][offset(env) :][:span:step], dtype)

    def search(self, e: ir.Search) -> Run:
        lo, hi, key = (self.expr(x) for x in (e.lo, e.hi, e.key))
        keys, kind = self.memory[e.keys.name], e.dtype.numpy.type

        def find(env: Env) -> Any:
            low, high, wanted = int(lo(env)), int(hi(env)), int(key(env))
            if low < high:
                keys.checked(low)
                keys.checked(high - 1)
            side = "right" if e.last else "left"
            at = low + int(np.searchsorted(keys.flat[low:high], wanted, side))
            if e.last:
                return kind(at - 1)
            return kind(at if at < high and keys.flat[at] == wanted else -1)

        return find


def _range(v: ir.Var, begin: Any, end: Any) -> Iterator[Any]:
    """The values of a loop variable, in its dtype."""
    return map(v.dtype.numpy.type, range(int(begin), int(end)))


def _sums_of(s: ir.Stmt) -> dict[str, Any]:
    """Temporaries that the loop `s` reduces into, and what they start from."""
    if not isinstance(s, ir.For):
        return {}
    return {
        c.out.buffer.name: constant(ir.identity_of(c.op, c.value.dtype).value, c.value.dtype)
        for c in walk(s)
        if isinstance(c, ir.Compute) and c.out.buffer.scope == "register" and ir.reduces(s, c)
    }


def _lane_dimensions(body: ir.Stmt) -> dict[str, int]:
    """Which dimension of an accumulator belongs to the lanes of a loop that is not yet a vector."""
    return {
        s.buffer.name: d
        for loop in walk(body)
        if isinstance(loop, ir.For) and loop.kind == "vector"
        for s in walk(loop)
        if isinstance(s, ir.Store) and s.buffer.scope == "register"
        for d, i in enumerate(s.index)
        if isinstance(i, ir.Var) and i.name == loop.name
    }


def _integer(e: ir.Expr) -> int:
    assert isinstance(e, ir.Const)
    return int(e.value)


def _row_major(name: str, index: list[Any], extents: list[int]) -> int:
    at = 0
    for i, n in zip(index, extents, strict=False):
        if not 0 <= i < n:
            raise InternalError("I101", f"register {name}[{i}] is outside 0…{n - 1}")
        at = at * n + int(i)
    return at
