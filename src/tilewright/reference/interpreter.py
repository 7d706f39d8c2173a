"""An interpreter of lowered IR, scalar by scalar in Python: passes are tested with it.

`execute` runs the position and the loop level. Each node becomes one Python closure; numbers have
the program's dtypes (bfloat16 is kept as its bits, as kernels keep it), memory that was never
written is NaN, and an access outside of a buffer raises InternalError[I101]. `reference.evaluate`
evaluates the coordinate level.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.names import STRIDE, is_given, stride_name
from tilewright.ir.rewrite import walk
from tilewright.reference.memory import Array, Part, constant, convert, poisoned
from tilewright.reference.ops_table import BINARY, UFUNCS, UNARY

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
    arrays.
    Raises InternalError[I101] for an access out of bounds or a register read before it is written.
    """
    memory = {name: Array.of(name, a) for name, a in buffers.items()}
    strides = {
        stride_name(name, d): s for name, a in memory.items() for d, s in enumerate(a.strides)
    }
    rows = parts or (Part(),)
    with np.errstate(all="ignore"):
        for stage in program.stages:
            _identities(stage, memory, rows)
            for nest in stage:
                for number, part in enumerate(rows):
                    if part.case == nest.part or (nest.part < 0 and number == 0):
                        own = {name: Array.of(name, a) for name, a in part.buffers.items()}
                        env: Env = {**variables, **strides, **part.variables}
                        _Nest(nest, memory | own, _is_flat(program), program.level).run(env)


def _identities(stage: tuple[ir.Nest, ...], memory: dict[str, Array], rows: Sequence[Part]) -> None:
    """Positions level: what a stage sums into starts at the identity, as its accumulators will."""
    for nest in stage:
        for c in walk(nest.body):
            if not isinstance(c, ir.Compute) or not c.op or c.in_place:
                continue
            out, value = c.out.buffer, ir.identity_of(c.op, c.value.dtype)
            start = convert(constant(value), c.value.dtype, out.dtype)
            if out.scope == "global":
                array = memory[out.name]
                for at in itertools.product(*map(range, array.shape)):
                    array.flat[array.offset(at)] = start
            elif out.scope == "part":
                for row in rows:
                    if row.case == nest.part or nest.part < 0:
                        row.buffers[out.name][:] = start


def _is_flat(program: ir.Program) -> bool:
    """Whether addresses are offsets already, and not one index a dimension. (Tiles always are.)"""

    def flat(x: Any) -> bool:
        if isinstance(x, ir.Tile):
            return False
        if isinstance(x, ir.Var) and is_given(x.name, STRIDE):
            return True
        if isinstance(x, (ir.Load, ir.Store)) and x.buffer.scope in ("global", "shared"):
            dims = len(x.buffer.shape)
            if len(x.index) != dims:
                return True
        return any(flat(child) for child in ir.children(x))

    return any(flat(nest.body) for stage in program.stages for nest in stage)


# ---------------------------------------------------------------------------- a nest


class _Nest:
    """One nest under one part: statements and expressions as closures over an environment."""

    def __init__(self, nest: ir.Nest, memory: dict[str, Array], flat: bool, level: str) -> None:
        self.memory, self.flat, self.positions = dict(memory), flat, level == "positions"
        self.scratch: set[str] = set()  # registers that a statement allocates
        self.registers: dict[str, Any] = {}  # values; at the position level one for each temporary
        self.sums: dict[tuple[str, int], Any] = {}  # position level: accumulators of memory
        self.kinds: dict[str, tuple[DType, DType]] = {}
        self.started: set[str] = set()  # while building: temporaries whose sum has begun outside
        self.lanes = _lane_dimensions(nest.body)
        self.grid = [(v.name, self.expr(e)) for v, e in zip(nest.grid_vars, nest.grid, strict=True)]
        self.body = self.stmt(nest.body)

    def run(self, env: Env) -> None:
        extents = [range(int(extent(env))) for _, extent in self.grid]
        for unit in itertools.product(*extents):
            env.update(zip((name for name, _ in self.grid), unit, strict=True))
            self.body(env)
        for (name, offset), value in self.sums.items():
            self.memory[name].flat[offset] = convert(value, *self.kinds[name])

    # -- statements ------------------------------------------------------------------------------

    def stmt(self, s: ir.Stmt) -> Run:
        made = getattr(self, f"_{type(s).__name__.lower()}", None)
        if made is None:
            raise InternalError("I101", f"{type(s).__name__} cannot be executed")
        return made(s)

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
            for i in range(int(begin(env)), int(end(env))):
                env[name] = i
                body(env)

        return run

    def _let(self, s: ir.Let) -> Run:
        name, value = s.var.name, self.expr(s.value)

        def run(env: Env) -> None:
            env[name] = value(env)

        return run

    def _if(self, s: ir.If) -> Run:
        cond, body = self.expr(s.cond), self.stmt(s.body)

        def run(env: Env) -> None:
            if cond(env):
                body(env)

        return run

    def _compute(self, s: ir.Compute) -> Run:
        value, buffer = self.expr(s.value), s.out.buffer
        if buffer.scope == "register":
            name, ufunc = (
                buffer.name,
                UFUNCS[s.op] if s.op and buffer.name in self.started else None,
            )

            def cell(env: Env) -> None:
                new = value(env)
                self.registers[name] = ufunc(self.registers[name], new) if ufunc else new

            return cell
        array, place = self.memory[buffer.name], self.place(buffer, s.out.index)
        if not s.op:
            return lambda env: array.put(place(env), value(env))
        ufunc, start = UFUNCS[s.op], constant(ir.identity_of(s.op, s.value.dtype))
        if s.in_place:
            return lambda env: array.put(place(env), ufunc(array.flat[place(env)], value(env)))
        self.kinds[buffer.name] = s.value.dtype, s.out.dtype

        def accumulate(env: Env) -> None:
            key = buffer.name, array.at(place(env))
            self.sums[key] = ufunc(self.sums.get(key, start), value(env))

        return accumulate

    def _alloc(self, s: ir.Alloc) -> Run:
        b = s.buffer
        self.scratch.add(b.name)
        extents = tuple(_integer(e) for e in b.shape)
        if b.scope == "shared":
            empty = poisoned(extents, b.dtype)
            array = self.memory[b.name] = Array.of(b.name, empty.copy())
            return lambda env: np.copyto(array.flat, empty.ravel())
        total = prod(extents)
        lanes = (b.dtype.lanes,) if b.dtype.lanes > 1 else ()

        def run(env: Env) -> None:
            self.registers[b.name] = poisoned((total, *lanes), b.dtype.scalar)

        return run

    def _store(self, s: ir.Store) -> Run:
        value, place = self.expr(s.value), self.place(s.buffer, s.index)
        ufunc = UFUNCS[s.op] if s.op else None
        if s.buffer.scope == "register":
            name = s.buffer.name

            def register(env: Env) -> None:
                at, cells = place(env), self.registers[name]
                cells[at] = ufunc(cells[at], value(env)) if ufunc else value(env)

            return register
        array = self.memory[s.buffer.name]

        def memory(env: Env) -> None:
            at, new = array.at(place(env)), value(env)
            array.flat[at] = ufunc(array.flat[at], new) if ufunc else new

        return memory

    def _sync(self, s: ir.Sync) -> Run:
        return lambda env: None

    def _prefetch(self, s: ir.Prefetch) -> Run:
        return lambda env: None

    # -- tiles -----------------------------------------------------------------------------------

    def _mmazero(self, s: ir.MmaZero) -> Run:
        return self.fragment(s.acc, s.slot, s.shape, lambda env, acc: acc.fill(0))

    def _mma(self, s: ir.Mma) -> Run:
        m, n, k = s.shape
        a, b = self.tile(s.a, m, k), self.tile(s.b, k, n)

        def run(env: Env, acc: np.ndarray) -> None:
            (left, _), (right, _) = a(env), b(env)
            x = convert(left, s.a.buffer.dtype, dtypes.float32)
            acc += x @ convert(right, s.b.buffer.dtype, dtypes.float32)

        return self.fragment(s.acc, s.slot, s.shape, run)

    def _mmastore(self, s: ir.MmaStore) -> Run:
        m, n = s.shape[:2]
        to, dtype, array = self.tile(s.to, m, n), s.to.buffer.dtype, self.memory[s.to.buffer.name]

        def run(env: Env, acc: np.ndarray) -> None:
            old, at = to(env)
            new = acc[: at.shape[0], : at.shape[1]]
            if s.op:
                new = new + convert(old, dtype, dtypes.float32)[: at.shape[0], : at.shape[1]]
            array.flat[at] = convert(new, dtypes.float32, dtype)

        return self.fragment(s.acc, s.slot, s.shape, run)

    def fragment(self, acc: ir.Buffer, slot: ir.Expr, shape: tuple[int, ...], act: Any) -> Run:
        """`act` on one fragment, an m × n view of the accumulator."""
        m, n = shape[:2]
        number = self.expr(slot)

        def run(env: Env) -> None:
            first = number(env) * m * n
            act(env, self.registers[acc.name][first : first + m * n].reshape(m, n))

        return run

    def tile(
        self, t: ir.Tile, rows: int, cols: int
    ) -> Callable[[Env], tuple[np.ndarray, np.ndarray]]:
        """The elements of a tile, 0 beyond its limits, and the offsets of those within."""
        array = self.memory[t.buffer.name]
        fields = (t.offset, t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        made = [self.expr(f) for f in fields]

        def read(env: Env) -> tuple[np.ndarray, np.ndarray]:
            offset, down, right, high, wide = (int(f(env)) for f in made)
            m, n = min(max(high, 0), rows), min(max(wide, 0), cols)
            at = offset + down * np.arange(m)[:, None] + right * np.arange(n)
            elements = np.zeros((rows, cols), array.flat.dtype)
            if at.size:
                elements[:m, :n] = array.flat[array.at(at)]
            return elements, at

        return read

    # -- places ----------------------------------------------------------------------------------

    def place(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> Run:
        """The offset of an access: an integer, or an array with one for each lane."""
        made = [self.expr(i) for i in index]
        if b.scope == "register":
            known = not self.positions or b.name in self.scratch
            extents = [_integer(e) for e in b.shape] if known else []
            return lambda env: _row_major(b.name, [i(env) for i in made], extents)
        array = self.memory[b.name]
        if b.scope == "part" or self.flat or array.strides == (1,):
            (only,) = made or [lambda env: 0]
            return only
        return lambda env: array.offset([i(env) for i in made])

    # -- expressions -----------------------------------------------------------------------------

    def expr(self, e: ir.Expr) -> Run:
        return getattr(self, f"_x_{type(e).__name__.lower()}")(e)

    def _x_const(self, e: ir.Const) -> Run:
        value = constant(e)
        return lambda env: value

    def _x_var(self, e: ir.Var) -> Run:
        name = e.name

        def read(env: Env) -> Any:
            try:
                return env[name]
            except KeyError:
                raise InternalError("I101", f"{name} is not bound") from None

        return read

    def _x_load(self, e: ir.Load) -> Run:
        b, name = e.buffer, e.buffer.name
        integer = _is_plain(e.dtype)
        if b.scope == "register":
            if self.positions and name not in self.scratch:
                return lambda env: self.registers[name]
            place, step = self.place(b, e.index), 1
            if e.dtype.lanes == b.dtype.lanes:
                return lambda env: _plain(self.registers[name][place(env)], integer)
            for extent in b.shape[self.lanes[name] + 1 :]:  # one vector of many scalars
                step *= _integer(extent)
            reach = step * (e.dtype.lanes - 1) + 1
            return lambda env: self.registers[name][place(env) :][:reach:step]
        array, place = self.memory[name], self.place(b, e.index)
        return lambda env: _plain(array.flat[array.at(place(env))], integer)

    def _x_binary(self, e: ir.Binary) -> Run:
        a, b = self.expr(e.a), self.expr(e.b)
        if e.dtype.kind == "b" and e.dtype.lanes == 1 and e.op in ("&", "|"):
            return (lambda env: a(env) and b(env)) if e.op == "&" else lambda env: a(env) or b(env)
        act = _integer_act(e.op, e.a.dtype) if _is_plain(e.a.dtype) else BINARY[e.op]
        return lambda env: act(a(env), b(env))

    def _x_unary(self, e: ir.Unary) -> Run:
        a, act = self.expr(e.a), UNARY[e.op]
        if _is_plain(e.dtype):
            return lambda env: e.dtype.wrapped(int(act(a(env))))
        return lambda env: act(a(env))

    def _x_select(self, e: ir.Select) -> Run:
        cond, a, b = self.expr(e.cond), self.expr(e.a), self.expr(e.b)
        if e.cond.dtype.lanes > 1:
            return lambda env: np.where(cond(env), a(env), b(env))
        return lambda env: a(env) if cond(env) else b(env)

    def _x_cast(self, e: ir.Cast) -> Run:
        a, source, to = self.expr(e.a), e.a.dtype.scalar, e.dtype.scalar
        kind = to.numpy
        if source.numpy.kind == kind.kind == "f":  # not bits: NumPy's own conversion
            return lambda env: a(env).astype(kind)
        return lambda env: convert(a(env), source, to)

    def _x_search(self, e: ir.Search) -> Run:
        lo, hi, key, keys = (
            self.expr(e.lo),
            self.expr(e.hi),
            self.expr(e.key),
            self.memory[e.keys.name],
        )

        def find(env: Env) -> int:
            low, high, wanted = int(lo(env)), int(hi(env)), int(key(env))
            if low < high:
                keys.at(low)
                keys.at(high - 1)
            side = "right" if e.last else "left"
            at = low + int(np.searchsorted(keys.flat[low:high], wanted, side))
            if e.last:
                return at - 1
            return at if at < high and keys.flat[at] == wanted else -1

        return find

    def _x_ramp(self, e: ir.Ramp) -> Run:
        base, steps = self.expr(e.base), np.arange(e.dtype.lanes)
        return lambda env: base(env) + steps

    def _x_broadcast(self, e: ir.Broadcast) -> Run:
        a, lanes, integer = self.expr(e.a), e.dtype.lanes, e.dtype.is_int
        kind = None if integer or e.dtype.kind == "b" else e.dtype.numpy
        return lambda env: np.full(lanes, a(env), kind)

    def _x_reducelanes(self, e: ir.ReduceLanes) -> Run:
        a, ufunc, integer = self.expr(e.a), UFUNCS[e.op], _is_plain(e.dtype)
        return lambda env: _plain(ufunc.reduce(a(env)), integer)

    def _x_reducethreads(self, e: ir.ReduceThreads) -> Run:
        return self.expr(e.a)  # the loop over threads has run in order


_INTEGER: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "min": min, "max": max,
    "//": lambda a, b: a // b if b else 0, "%": lambda a, b: a % b if b else 0,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "<<": lambda a, b: a << b if 0 <= b < 64 else 0, ">>": lambda a, b: a >> (b if b >= 0 else 64),
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne,
}  # fmt: skip


def _is_plain(dtype: DType) -> bool:
    """Whether a value is a Python integer: index arithmetic is done on these."""
    return dtype.lanes == 1 and dtype.name in ("int32", "int64")


def _integer_act(op: str, dtype: DType) -> Callable[[Any, Any], Any]:
    """An operator on Python's integers, which wraps as `dtype` does."""
    act, least, most = _INTEGER[op], dtype.least, dtype.most
    if op in ir.COMPARISON:
        return act

    def apply(a: Any, b: Any) -> Any:
        x = act(a, b)
        return x if least <= x <= most else dtype.wrapped(int(x))

    return apply


def _sums_of(s: ir.Stmt) -> dict[str, Any]:
    """Temporaries that the loop `s` reduces into, and what they start from."""
    if not isinstance(s, ir.For):
        return {}
    return {
        c.out.buffer.name: constant(ir.identity_of(c.op, c.value.dtype))
        for c in walk(s)
        if isinstance(c, ir.Compute)
        and c.out.buffer.scope == "register"
        and set(s.axes) & set(c.reduce)
    }


def _lane_dimensions(body: ir.Stmt) -> dict[str, int]:
    """Which dimension of an accumulator belongs to the lanes of a loop that is still to be a
    vector."""
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
        at = at * n + i
    return at


def _plain(x: Any, integer: bool) -> Any:
    return int(x) if integer else x
