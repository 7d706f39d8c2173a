"""Runs CUDA-lowered IR without a GPU and reports what is wrong with its synchronisation.

All threads of all CTAs of a launch run in lockstep, as the lanes of NumPy arrays: the value of an
expression has shape (lanes,), or (1,) where it is the same for all; vectors have one more
dimension. Where control flow diverges, `mask` holds the lanes that run. An access of a lane that
is masked off does not happen. Lockstep hides no race: `races.History` judges each access by the
order that barriers give, not by the order in which it happens here.

Refused is raised for
* two accesses to one element, one of them a write, that no barrier orders (also of equal values);
* a barrier, a reduction over threads or a tile operation that some of its threads do not reach;
* a read of shared memory that was not written since its allocation;
* an access to an element while an asynchronous copy to it is under way. A copy lands when the
  thread that started it waits for its group, as a write of that thread: others see it after a
  barrier. Until then memory holds no number.
An access out of bounds raises InternalError[I101].

Barriers are those that `codegen.cuda` renders: `Sync`, for all threads of the nest or for groups of
lanes, and the two
inside of a reduction over thread.y (`across_rows` of gpu.cuh). Shuffles and matrix instructions
order no accesses to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

import numpy as np
from tests.compiler.interpreter import cursor, operation
from tests.compiler.memory import (
    Array,
    Part,
    as_operand,
    constant,
    lane_dimensions,
    launches,
    poisoned,
)
from tests.compiler.races import Flights, History

from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.atoms import QUAD
from tilewright.ir.names import ADDRESS, is_generated
from tilewright.ir.rewrite import walk
from tilewright.reference import evaluate as ops
from tilewright.target import WARP

Machine = Callable[..., "Launch"]
LINES = WARP // QUAD  # rows of a fragment that a warp holds at once


def element(e: int, lane: Any) -> tuple[Any, Any]:
    """Row and column of element `e` of a fragment in a lane, or in an array of lanes."""
    return lane // 4 + e // 2 % 2 * 8, lane % 4 * 2 + e % 2 + e // 4 * 8


def execute(
    program: ir.Program,
    buffers: Mapping[str, np.ndarray],
    variables: Mapping[str, int],
    parts: Sequence[Part] = (),
    machine: Machine | None = None,
) -> None:
    """Run a program whose threads are bound, on arrays it reads and writes in place.

    `buffers` are the dense arrays by name; `variables` the sizes (`m.size`); `parts` what belongs
    to the parts of sparse tensors; strides are those of the arrays. `machine` replaces `Launch`,
    for tests that leave a barrier out."""
    with np.errstate(all="ignore"):
        for stage in launches(program, buffers, variables, parts):
            written = {
                x.buffer.name
                for nest, _, _ in stage
                for x in walk(nest.body)
                if isinstance(x, ir.Store)
            }
            histories: dict[tuple[int, int], History] = {}  # by address and length of an array
            units = 0
            for nest, memory, env in stage:
                known: dict[str, History] = {}
                for name in written & memory.keys():
                    size = len(memory[name].flat)
                    key = memory[name].flat.ctypes.data, size
                    known[name] = histories.get(key) or histories.setdefault(key, History(size))
                launch = (machine or Launch)(nest, memory, env, known, units)
                launch.run()
                units += launch.units


class Refused(Exception):
    """What no kernel may do, and the statement that did it."""


class Launch:
    """One nest under one part: `do` runs a statement, `value` evaluates an expression."""

    def __init__(
        self,
        nest: ir.Nest,
        memory: dict[str, Array],
        env: dict[str, Any],
        histories: dict[str, History],
        first_unit: int,
    ) -> None:
        self.nest, self.memory, self.histories = nest, memory, histories
        self.env = {name: np.full(1, x) for name, x in env.items()}
        self.first_unit, self.units, self.threads = first_unit, 1, 1
        self.registers: dict[str, np.ndarray] = {}  # (lanes, elements[, lanes of a vector])
        self.shared: dict[str, np.ndarray] = {}  # whether an element was written, by name
        self.allocated: dict[int, tuple[Array, History]] = {}  # by id of the `Alloc`
        sums = [x for x in walk(nest.body) if isinstance(x, ir.ReduceThreads)]
        slots = [x.dtype.itemsize * x.dtype.lanes for x in sums if x.axis == "thread.y"]
        self.grain, self.slot_bytes = gcd(*slots), max(slots, default=0)
        self.scratch: History | None = None  # of reductions over thread.y, by grains of bytes
        self.vector_dimension = lane_dimensions(nest.body)
        self.statement: ir.Stmt = nest.body
        self._start(1)

    def _start(self, lanes: int) -> None:
        self.lane = np.arange(lanes)
        self.unit = self.lane // self.threads
        self.epoch, self.step = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.mask = np.ones(lanes, bool)
        self.flights = Flights(lanes)  # asynchronous copies

    def run(self) -> None:
        try:
            extents = [int(self.value(e)[0]) for e in self.nest.grid]
            (x, y), self.units = self.nest.threads, prod(max(n, 0) for n in extents)
            if not self.units:
                return
            self.threads = x * y
            self._start(self.units * x * y)
            thread = self.lane % self.threads
            self.env |= {"thread_x": thread % x, "thread_y": thread // x}
            coordinates = np.unravel_index(self.unit, extents or (1,))
            for v, c in zip(self.nest.grid_vars, coordinates, strict=False):
                self.env[v.name] = c.astype(v.dtype.numpy)
            self.do(self.nest.body)
        except KeyError as error:
            raise InternalError("I101", f"{error.args[0]} is not bound") from None

    def refuse(self, why: str) -> Refused:
        return Refused(f"{self.nest.name}: {why}, in\n{self.statement}")

    # -- statements ------------------------------------------------------------------------------

    def do(self, s: ir.Stmt) -> None:
        if isinstance(s, ir.Seq):
            for b in s.body:
                self.do(b)
            return
        if isinstance(s, ir.For):
            self.loop(s)
            return
        if isinstance(s, ir.If):
            self.within(self.value(s.cond), lambda: self.do(s.body))
            return
        self.statement = s
        if isinstance(s, ir.Let):
            self.env[s.var.name] = self.value(s.value)
        elif isinstance(s, ir.CopyAsync):
            self.copy_async(s)
        elif isinstance(s, ir.Store):
            self.store(s)
        elif isinstance(s, ir.Commit):
            self.flights.commit(self.mask)
        elif isinstance(s, ir.Wait):
            for name, at, value, lane in self.flights.landed(self.mask, s.pending):
                self.access(name, "write", at, self.who(lane))
                self.memory[name].flat[at] = value
        elif isinstance(s, ir.Alloc):
            self.allocate(s)
        elif isinstance(s, ir.Sync) and s.lanes:
            self.running(s.lanes, "lanes of a group do not reach a barrier")
            self.step[self.mask] += 1
        elif isinstance(s, ir.Sync):
            self.barrier(s)
        elif isinstance(s, (ir.Mma, ir.LoadTile)):
            self.tile_operation(s)
        elif not isinstance(s, ir.Prefetch):
            raise InternalError("I101", f"{type(s).__name__} cannot be executed")

    def within(self, cond: np.ndarray, run: Callable[[], Any]) -> Any:
        """Runs under a condition; None where it holds for no lane."""
        saved = self.mask
        self.mask = saved & cond
        try:
            return run() if self.mask.any() else None
        finally:
            self.mask = saved

    def loop(self, s: ir.For) -> None:
        if s.kind == "fragment":
            self.elements(s)
            return
        if isinstance(s, ir.Merge):
            self.merge(s)
            return
        if isinstance(s, ir.Drain):
            raise InternalError("I101", "a GPU has no row workspaces")
        at, end = np.broadcast_arrays(self.value(s.begin), self.value(s.end))
        at = at.astype(s.var.dtype.numpy)
        while ((at < end) & self.mask).any():
            self.env[s.name] = at
            self.within(at < end, lambda: self.do(s.body))
            at = at + at.dtype.type(1)

    def merge(self, s: ir.Merge) -> None:
        """Each lane walks its lists, in lockstep with the others: in a turn those lanes run the
        body whose coordinate is in any of their lists, or in all of them."""
        shape, number = (len(s.runs), len(self.lane)), s.var.dtype.numpy
        at, end = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for n, (run, last) in enumerate(zip(s.runs, s.ends, strict=True)):
            at[n], end[n] = self.value(run.index[0]), self.value(last)
        rank, union = np.zeros(shape[1], number), s.op == "union"
        while True:
            left = at < end
            running = self.mask & (left.any(0) if union else left.all(0))
            if not running.any():
                return
            keys = self.current_keys(s, at, end, running)
            key = keys.min(0) if union else keys.max(0)
            has = left & (keys == key)
            visits = running & (has.any(0) if union else has.all(0))
            self.env[s.name], self.env[cursor(s.name, ir.KEY)] = rank, key.astype(number)
            for n in range(shape[0]):
                self.env[cursor(s.name, n)] = np.where(has[n], at[n], -1).astype(number)
            self.within(visits, lambda: self.do(s.body))
            rank = rank + visits.astype(number)
            at = at + (running & np.where(visits, has, keys < key))

    def current_keys(
        self, s: ir.Merge, at: np.ndarray, end: np.ndarray, running: np.ndarray
    ) -> np.ndarray:
        """The coordinate that each list is at, for the lanes that run; behind its end the greatest
        number."""
        keys = np.full(at.shape, np.iinfo(np.int64).max)
        for n, run in enumerate(s.runs):
            name, lanes = run.buffer.name, running & (at[n] < end[n])
            if lanes.any():
                here, array = at[n][lanes], self.memory[name]
                if name in self.histories:
                    self.access(name, "read", here, self.who(lanes))
                keys[n][lanes] = array.read(here, run.buffer.dtype)
                follows = here + 1 < end[n][lanes]
                after = array.read(here[follows] + 1, run.buffer.dtype) if follows.any() else []
                if (after <= keys[n][lanes][follows]).any():
                    raise InternalError("I101", f"{name} does not ascend")
        return keys

    def elements(self, rows: ir.For) -> None:
        """The loops over a fragment: each lane runs the elements, pairs or rows that it holds."""
        cols = rows.body
        step = 1 if isinstance(cols, ir.For) and cols.kind == "fragment" else 2
        pairs = cols.extent or 0 if isinstance(cols, ir.For) else WARP // LINES
        for e in range(0, (rows.extent or 0) * pairs * step // WARP, step):
            row, col = element(e, self.lane % WARP)
            self.env[rows.name] = row.astype(rows.var.dtype.numpy)
            if isinstance(cols, ir.For):
                self.env[cols.name] = (col // step).astype(cols.var.dtype.numpy)
            self.do(cols.body if isinstance(cols, ir.For) else cols)

    def running(self, size: int, partly: str) -> np.ndarray:
        """The groups of `size` neighbouring lanes that run; none may run in part."""
        groups = self.mask.reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise self.refuse(f"some {partly}")
        return np.flatnonzero(groups.all(1))

    def barrier(self, where: ir.Sync | ir.ReduceThreads, number: int = 0) -> None:
        """Runs a barrier that every thread of a CTA must reach. A reduction over threads has
        several barriers; `number` says which of them this is."""
        self.running(self.threads, "threads of a CTA do not reach a barrier")
        self.epoch[self.mask] += 1

    def store(self, s: ir.Store) -> None:
        value, dtype = self.value(s.value), s.buffer.dtype.scalar
        if s.buffer.scope == "register":
            cells, at = self.cell(s.buffer, s.index)
            at = np.broadcast_to(at, self.lane.shape)[self.mask]
            where = (self.lane[self.mask], at)
        elif s.buffer.scope == "fragment":
            cells = self.registers[s.buffer.name]
            where = tuple(np.broadcast_to(i, self.lane.shape)[self.mask] for i in self.held(s))
        else:
            cells, at = self.memory[s.buffer.name].flat, self.offset(s.buffer, s.index)
            shape = (len(self.lane), *at.shape[1:])
            where = (np.broadcast_to(at, shape)[self.mask],)
            kind = "update" if s.atomic else "write"
            self.access(s.buffer.name, kind, where[0], self.who(self.mask))
        old = cells[where]
        value = np.broadcast_to(value, (len(self.lane), *old.shape[1:]))[self.mask]
        if s.atomic:  # lanes may update one element
            ops.UFUNCS[s.op].at(cells, where, value)
        else:
            new = ops.UFUNCS[s.op](ops.decode(old, dtype), value) if s.op else value
            cells[where] = ops.encode(new, dtype, cells.dtype)

    def copy_async(self, s: ir.CopyAsync) -> None:
        name, dtype, array = s.buffer.name, s.buffer.dtype.scalar, self.memory[s.buffer.name]
        value, at = self.value(s.value), self.offset(s.buffer, s.index)
        at = at if at.ndim > 1 else at[:, None]
        value = value if value.ndim > 1 else value[:, None]
        at = np.broadcast_to(at, (len(self.lane), at.shape[1]))[self.mask]
        value = np.broadcast_to(value, (len(self.lane), at.shape[1]))[self.mask]
        self.access(name, "write", at, self.who(self.mask))
        array.flat[at] = poisoned((), s.buffer.dtype)
        value = ops.encode(value, dtype, array.flat.dtype)
        self.flights.start(name, len(array.flat), (at, value, self.lane[self.mask]))

    def allocate(self, s: ir.Alloc) -> None:
        b, extents = s.buffer, tuple(int(self.value(e)[0]) for e in s.buffer.shape)
        if b.scope == "shared":
            size = prod(extents)
            if id(s) not in self.allocated:
                array = Array.of(b.name, poisoned((self.units * size,), b.dtype))
                self.allocated[id(s)] = array, History(len(array.flat))
            self.memory[b.name], self.histories[b.name] = self.allocated[id(s)]
            self.shared[b.name] = np.zeros(self.units * size, bool)
        elif b.scope == "fragment":
            warps, (slots, rows, *cols) = len(self.lane) // WARP, extents
            shape = (warps, slots, rows, *cols) if cols else (len(self.lane), slots, rows // LINES)
            self.registers[b.name] = np.zeros(shape, np.float32)
        else:
            shape = (len(self.lane), prod(extents), b.dtype.lanes)[: 2 + (b.dtype.lanes > 1)]
            starts_at_0 = is_generated(b.name, ADDRESS)
            empty = (
                np.zeros(shape, b.dtype.numpy) if starts_at_0 else poisoned(shape, b.dtype.scalar)
            )
            self.registers[b.name] = empty

    # -- memory ----------------------------------------------------------------------------------

    def who(self, lanes: np.ndarray) -> np.ndarray:
        """(lane, unit, epoch, group, step) of some lanes, by number or mask."""
        group = self.lane // self.nest.threads[0]
        rows = (self.lane, self.unit + self.first_unit, self.epoch, group, self.step)
        return np.stack([x[lanes] for x in rows])

    def access(self, name: str, kind: str, at: np.ndarray, who: np.ndarray) -> None:
        """Checks accesses and records them: of each of `who` to one element or a vector of them."""
        self.memory[name].checked(at)
        who = np.repeat(who, at.size // at.shape[0], axis=1)
        at, written = at.reshape(-1), self.shared.get(name)
        if self.flights.touches(name, at):
            raise self.refuse(f"a race: {kind} of {name} while a copy to it is under way")
        self.record(self.histories[name], name, kind, at, who)
        if written is not None and kind == "write":
            written[at] = True
        elif written is not None and not written[at].all():
            raise self.refuse(f"{name} is read before it is written")

    def record(
        self, history: History, name: str, kind: str, at: np.ndarray, who: np.ndarray
    ) -> None:
        conflict = history.record(kind, at, who)
        if conflict:
            n, other = conflict
            raise self.refuse(
                f"race at {name}[{at[n]}]: {kind} by thread {who[0, n] % self.threads} of unit "
                f"{who[1, n]}, {other} by another thread, and no barrier in between"
            )

    def offset(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> np.ndarray:
        """The offset of an access for each lane: in shared memory, in that of all units. 0 for
        lanes that do not run."""
        values = [self.value(i) for i in index]
        array, at = self.memory[b.name], values[0] if values else np.zeros(1, np.int64)
        shared, mask = b.scope == "shared", self.mask.reshape((-1,) + (1,) * (at.ndim - 1))
        if len(values) > 1:
            shape = [int(self.value(e)[0]) for e in b.shape] if shared else array.view.shape
            steps = [prod(shape[d + 1 :]) for d in range(len(shape))] if shared else array.strides
            inside = [(i >= 0) & (i < n) | ~mask for i, n in zip(values, shape, strict=True)]
            if not all(x.all() for x in inside):
                raise InternalError("I101", f"{b.name}[{index}] is outside {shape}")
            at = np.asarray(sum(i.astype(np.int64) * s for i, s in zip(values, steps, strict=True)))
        if shared:
            size = len(array.flat) // self.units
            if (((at < 0) | (at >= size)) & mask).any():
                raise InternalError("I101", f"{b.name} is accessed outside 0…{size - 1}")
            at = at + (self.unit * size).reshape(mask.shape)
        return at if len(at) == 1 else np.where(mask, at, 0)

    def cell(self, b: ir.Buffer, index: tuple[ir.Expr, ...]) -> tuple[np.ndarray, np.ndarray]:
        """A register buffer, and the element of each lane."""
        at = np.zeros(1, np.int64)
        for i, extent in zip(map(self.value, index), b.shape, strict=False):
            n = int(self.value(extent)[0])
            if (((i < 0) | (i >= n)) & self.mask).any():
                raise InternalError("I101", f"register {b.name} is accessed outside 0…{n - 1}")
            at = at * n + i
        return self.registers[b.name], at if len(at) == 1 else np.where(self.mask, at, 0)

    # -- tiles: every warp is 32 neighbouring lanes ------------------------------------------------

    def tile_operation(self, s: ir.Mma | ir.LoadTile) -> None:
        m, n, k = s.shape
        if isinstance(s, ir.LoadTile):
            shape = (m, k) if s.side == "a" else (k, n)
            tile = self.operand(replace(s.tile, held=""), *shape, s.tile.buffer.dtype)
            new = np.full((len(self.lane) // WARP, *shape), np.nan, np.float32)
            self.registers.setdefault(s.tile.held, new)[self.warps()] = tile
            return
        where, dtype = (self.warps(), self.of_warps(s.slot)), s.b.buffer.dtype
        a, b = self.operand(s.a, m, k, dtype), self.operand(s.b, k, n, dtype)
        self.registers[s.acc.name][where] += s.atom.numpy(a, b) if s.atom else a @ b

    def held(self, x: ir.Load | ir.Store) -> tuple[np.ndarray, ...]:
        """The indices of an element of a fragment for each lane, which holds that element."""
        slot, row, *col = map(self.value, x.index)
        if not col:
            if ((row % LINES != self.lane % WARP // QUAD) & self.mask).any():
                raise InternalError("I101", f"a lane accesses a row of {x.buffer.name} of another")
            return self.lane, slot, row // LINES
        return self.lane // WARP, slot, row, *col

    def warps(self) -> np.ndarray:
        """The warps that run."""
        if self.nest.threads[0] != WARP:
            raise self.refuse(f"a tile operation beside {self.nest.threads[0]} threads along x")
        return self.running(WARP, "lanes of a warp do not reach a tile operation")

    def of_warps(self, e: ir.Expr) -> np.ndarray:
        """A value for each warp that runs, which its lanes share."""
        values = np.broadcast_to(self.value(e), self.lane.shape).reshape(-1, WARP)[self.warps()]
        if (values != values[:, :1]).any():
            raise self.refuse("the lanes of a warp disagree on a tile")
        return values[:, 0].astype(np.int64)

    def window(self, t: ir.Tile, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
        """The offsets of the elements of a tile for each warp, and which are inside the limits. In
        shared memory all are: `shared_rows` of mma.cuh reads 16 rows and columns."""
        fields = (t.offset, t.row_stride, t.col_stride, t.row_limit, t.col_limit)
        first, down, right, high, wide = (self.of_warps(f)[:, None, None] for f in fields)
        r, c = np.indices((rows, cols))
        at, inside = first + r * down + c * right, (r < high) & (c < wide)
        if t.buffer.scope == "shared":
            size = len(self.memory[t.buffer.name].flat) // self.units
            if at.min() < 0 or at.max() >= size:
                raise InternalError("I101", f"a tile of {t.buffer.name} is outside 0…{size - 1}")
            return at + self.unit[self.warps() * WARP][:, None, None] * size, inside | True
        return at, inside

    def operand(self, t: ir.Tile, rows: int, cols: int, dtype: DType) -> np.ndarray:
        """The elements of a tile in float32, of a fragment rounded to `dtype`; 0 beyond its limits.
        The reader is the warp: no lane of it, so that lanes of the same warp need a barrier too."""
        if t.held:
            return self.registers[t.held][self.warps()]
        if t.buffer.scope == "fragment":
            values = self.registers[t.buffer.name][self.warps(), self.of_warps(t.offset)]
            return as_operand(ops.cast(values, dtype), dtype)
        at, inside = self.window(t, rows, cols)
        elements = np.zeros(at.shape, np.float32)
        if t.buffer.name in self.histories and inside.any():
            first = np.broadcast_to(self.warps()[:, None, None] * WARP, at.shape)[inside]
            who = self.who(first)
            who[0] += len(self.lane)
            self.access(t.buffer.name, "read", at[inside], who)
        if inside.any():
            read = self.memory[t.buffer.name].read(at[inside], t.buffer.dtype)
            elements[inside] = as_operand(read, t.buffer.dtype)
        return elements

    # -- expressions -----------------------------------------------------------------------------

    def value(self, e: ir.Expr) -> np.ndarray:
        """The value of an expression for each lane; of no meaning for lanes that do not run."""
        if isinstance(e, ir.Const):
            return np.full(1, constant(e.value, e.dtype.scalar))
        if isinstance(e, ir.Var):
            return self.env[e.name].astype(ops.computed(e.dtype), copy=False)
        if isinstance(e, ir.Cursor):
            return self.env[cursor(e.loop.name, e.operand)]
        if isinstance(e, ir.Load):
            return self.load(e)
        if isinstance(e, ir.Select) and e.cond.dtype.lanes == 1:
            return self.select(e)
        if isinstance(e, ir.Binary) and e.op in "&|" and e.dtype.scalar.kind == "b":
            return self.both(e)
        if isinstance(e, ir.Search):
            return self.search(e)
        if isinstance(e, ir.ReduceThreads):
            return self.across_lanes(e) if e.axis == "thread.x" else self.across_rows(e)
        operands = [self.value(x) for x in ir.children(e)]
        if e.dtype.lanes > 1 and not isinstance(e, (ir.Ramp, ir.Broadcast)):
            operands = [x[:, None] if x.ndim == 1 else x for x in operands]
        return operation(e)(*operands)

    def select(self, e: ir.Select) -> np.ndarray:
        cond, none = self.value(e.cond), np.zeros((1, 1)[: 1 + (e.dtype.lanes > 1)])
        a = self.within(cond, lambda: self.value(e.a))
        b = self.within(~cond, lambda: self.value(e.b))
        a, b = (none.astype(ops.computed(e.dtype)) if x is None else x for x in (a, b))
        return np.where(cond[:, None] if e.dtype.lanes > 1 else cond, a, b)

    def both(self, e: ir.Binary) -> np.ndarray:
        """The second operand may read what only the first one allows."""
        a = self.value(e.a)
        if a.ndim > 1:
            return operation(e)(a, self.value(e.b))
        b = self.within(a if e.op == "&" else ~a, lambda: self.value(e.b))
        return a if b is None else np.where(a, b, False) if e.op == "&" else np.where(a, True, b)

    def load(self, e: ir.Load) -> np.ndarray:
        b, name, dtype = e.buffer, e.buffer.name, e.dtype.scalar
        if b.scope == "register":
            return ops.decode(self.register(e), dtype)
        if b.scope == "fragment":
            *at, last = (x[:, None] for x in self.held(e))
            lanes = self.registers[name][(*at, last + np.arange(e.dtype.lanes))]
            return lanes if e.dtype.lanes > 1 else lanes[:, 0]
        at = self.offset(b, e.index)
        if name in self.histories:
            seen = np.broadcast_to(at, (len(self.lane), *at.shape[1:]))[self.mask]
            self.access(name, "read", seen, self.who(self.mask))
        return self.memory[name].read(at, dtype)

    def register(self, e: ir.Load) -> np.ndarray:
        cells, at = self.cell(e.buffer, e.index)
        row: Any = self.lane
        if e.dtype.lanes != e.buffer.dtype.lanes:  # a loop that is not yet a vector
            inner = e.buffer.shape[self.vector_dimension[e.buffer.name] + 1 :]
            step = prod(int(self.value(n)[0]) for n in inner)
            at, row = at[:, None] + step * np.arange(e.dtype.lanes), row[:, None]
        return cells[row, at] if len(at) > 1 or at.ndim > 1 else cells[:, int(at[0])]

    def search(self, e: ir.Search) -> np.ndarray:
        """`find` and `find_last` of gpu.cuh."""
        keys, parts = self.memory[e.keys.name], (e.lo, e.hi, e.key)
        low, high, key = map(np.array, np.broadcast_arrays(*map(self.value, parts)))
        end, running = high.copy(), np.broadcast_to(self.mask, self.lane.shape)
        running = running if len(low) > 1 else np.ones(1, bool)
        while (open_ := running & (low < high)).any():
            middle = low + (high - low) // 2
            at = keys.read(np.where(open_, middle, middle[open_.argmax()]), e.keys.dtype)
            right = at <= key if e.last else at < key
            low = np.where(open_ & right, middle + 1, low)
            high = np.where(open_ & ~right, middle, high)
        if e.last:
            return low - low.dtype.type(1)
        inside = running & (low < end)
        if not inside.any():
            return np.full(1, -1, e.dtype.numpy)
        at = keys.read(np.where(inside, low, low[inside.argmax()]), e.keys.dtype)
        return np.where(inside & (at == key), low, -1).astype(e.dtype.numpy)

    def across_lanes(self, e: ir.ReduceThreads) -> np.ndarray:
        """Over groups of neighbouring threads of a warp, by shuffles."""
        if self.threads % e.extent:
            raise self.refuse(f"{self.threads} threads are no groups of {e.extent}")
        self.running(e.extent, "lanes of a group do not reach a reduction over thread.x")
        value = self.value(e.a)
        value = np.broadcast_to(value, (len(self.lane), *value.shape[1:]))
        total = ops.UFUNCS[e.op].reduce(
            value.reshape(-1, e.extent, *value.shape[1:]), 1, value.dtype
        )
        return np.repeat(total, e.extent, axis=0)

    def across_rows(self, e: ir.ReduceThreads) -> np.ndarray:
        """Over the threads of a column: store, barrier, read the column, barrier."""
        value, (x, y) = self.value(e.a), self.nest.threads
        if e.extent != y:
            raise self.refuse(f"a reduction over {e.extent} rows beside {y} of threads")
        value = np.broadcast_to(value, (len(self.lane), *value.shape[1:]))
        self.share("write", e.dtype, self.lane[:, None] % self.threads)
        self.barrier(e, 0)
        column = self.lane[:, None] % x + np.arange(y) * x
        self.share("read", e.dtype, column)
        self.barrier(e, 1)
        rows = value.reshape(self.units, y, x, *value.shape[1:])
        total = ops.UFUNCS[e.op].reduce(rows, 1, value.dtype)
        return np.repeat(total[:, None], y, 1).reshape(value.shape)

    def share(self, kind: str, dtype: DType, slots: np.ndarray) -> None:
        """Accesses of each lane to slots at the start of shared memory, where reductions over rows
        of all types lie."""
        size = dtype.itemsize * dtype.lanes // self.grain
        unit_size = self.threads * self.slot_bytes // self.grain
        self.scratch = self.scratch or History(self.units * unit_size)
        at = slots[..., None] * size + np.arange(size) + self.unit[:, None, None] * unit_size
        at = at.reshape(len(self.lane), -1)[self.mask]
        who = np.repeat(self.who(self.mask), at.shape[1], axis=1)
        self.record(self.scratch, "the scratch of reductions over rows", kind, at.reshape(-1), who)
