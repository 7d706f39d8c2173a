"""Pass: statements that share the loops of a tile become operations on tiles in registers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from tilewright import dtypes
from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import extreme, slack_of
from tilewright.ir.atoms import QUAD
from tilewright.lower.reductions import finite, framed, least, reduced_names
from tilewright.lower.tiles import MEMORY, Product, slot_of, slots_of

LOG2E = ir.Const(math.log2(math.e), dtypes.float32)
LEAST = least(dtypes.float32)


def materialize_blocks(program: ir.Program) -> ir.Program:
    """Statements inside the loops of a tile, some of them products, become one after the other:
    each is computed for all elements of the tiles before the next one.

    before: for j_o                                after:  alloc top[16], total[16], acc[c tiles]
              for i_v in 0:16                              for j_o
                for j_u  # unroll                            alloc s[j tiles], w[j tiles]
                  for j_v in 0:16                            for j_u: mma s[j_u] += Q @ K
                    for k_v: s = sum(Q·K) mma                for j_u, i_v, j_v: top max= s
                    top = max(s) online                      top = max of the 4 lanes of a row
                    w = top.weight                           for j_u, i_v, j_v: w = exp2(s - top)
                    total = sum(w) by top.factor             total, acc *= factor; total += w
                    for c_v: out = sum(w·V) mma              for j_u: mma acc += w[j_u] @ V
                                                           out = acc

    The loops are those of the tile and the unrolled ones around it; sums are rescaled once for all
    of a block. Raises ScheduleError[S102]. Reference: Dao et al., FlashAttention (2022)."""
    return ir.map_bodies(program, _visit)


def _visit(s: Any) -> Any:
    computes = list(ir.statements(s, ir.Compute)) if isinstance(s, ir.For) else []
    if len(computes) > 1:
        block = _Block(s, computes)
        if block.products and (s is block.loops[0] or block.reducing(s)):
            return block.result()
    return ir.rebuild_body(s, _visit)


class _Block:
    """Statements that share tiles. `outer`: loops, lets and guards around these; `slots`: unrolled
    loops over tiles; `tile`: the loops over rows and columns of a tile."""

    def __init__(self, top: ir.For, computes: list[ir.Compute]) -> None:
        paths = [ir.path_to(top, c) or [] for c in computes]
        together = zip(*paths, strict=False)
        shared = takewhile(lambda nodes: all(x is nodes[0] for x in nodes), together)
        self.computes, self.path = computes, [x for x, *_ in shared]
        own = {f.name for f in self.path if isinstance(f, ir.For)}
        self.products = [c for c in computes if c.mma and own & set(c.mma)]
        names = {n for c in self.products for n in c.mma or ()} & own
        around = [
            n for n, f in enumerate(self.path, 1)
            if isinstance(f, ir.For) and f.name not in names and f.kind != "unroll"
        ]  # fmt: skip
        first = max(around, default=0)
        self.outer, region = self.path[:first], self.path[first:]
        self.inner = [path[len(self.path) :] for path in paths]
        self.lets = {f.var.name: f.value for f in region if isinstance(f, ir.Let)}
        self.loops = [f for f in region if isinstance(f, ir.For)]
        self.slots = [f for f in self.loops if f.name not in names]
        self.tile = [replace(f, kind="fragment") for f in self.loops if f.name in names]
        # Elements of fragments by the names of the registers that they replace.
        self.known: dict[str, ir.Load] = {}
        conds = (self.translated(f.cond) for f in region if isinstance(f, ir.If))
        self.guards = [x for cond in conds for x in ir.conjuncts(cond)]
        self.before: list[ir.Stmt] = []
        self.steps: list[ir.Stmt] = []
        self.after: list[ir.Stmt] = []

    def reducing(self, *loops: ir.For) -> list[ir.Compute]:
        return [c for c in self.computes if any(ir.reduces(f, c) for f in loops)]

    def result(self) -> ir.Stmt:
        if len(self.tile) != 2 or self.reducing(self.tile[0]):
            raise self.refuse(self.products[0], "has other tiles, or sums over their rows")
        self.rows, self.cols = self.tile
        self.at = slot_of(self.slots), self.rows.var, self.cols.var
        reducing = self.reducing(*self.loops)
        self.reduced = frozenset(n for c in reducing for n in reduced_names(self.path, c))
        self.all_rows = slots_of((*self.outer, *self.slots), self.reduced, "a block of tiles")
        self.block_rows = [f for f in self.all_rows if f in self.slots]
        self.row = slot_of(self.all_rows), self.rows.var
        for s, inner in zip(self.computes, self.inner, strict=True):
            c = self.translated(s)
            if s in self.products and c.mma[0] == self.rows.name:
                self.product(c, inner)
            elif inner:
                raise self.refuse(c, "has other loops inside")
            elif s in reducing:
                self.reduction(c)
            else:
                self.define(c.out.buffer.name, c.value)
        old, new = self.loops[0], ir.seq(*self.steps)
        top = ir.transform(self.path[0], lambda x: new if x is old else x)
        return ir.seq(*self.before, top, *self.after)

    def refuse(self, c: ir.Compute, why: str) -> ScheduleError:
        return illegal(
            f"{c.out.buffer.name} shares the loops of a tile and {why}",
            "products of two tiles, values of their elements, and reductions over their columns",
        )

    def translated(self, e: Any) -> Any:
        """An expression, or a statement, on fragments and without the lets of the loops."""
        while self.lets.keys() & ir.free_vars(e):
            e = ir.substitute(e, self.lets)
        return ir.transform(e, lambda x: self.known.get(x.buffer.name, x) if _is_load(x) else x)

    def each(self, body: ir.Stmt, slots: Sequence[ir.For], *tile: ir.For) -> ir.Stmt:
        """For each tile, and each element of it or each of its rows."""
        counted = (replace(f, kind="serial", unroll_hint=f.extent or 1) for f in slots)
        return framed(body, [*counted, *tile])

    def element(self, x: ir.Load, value: ir.Expr, op: str = "", guarded: bool = False) -> ir.Stmt:
        """Sets, or updates, an element or the value of its row, for all elements of a block."""
        store = framed(_set(x, value, op), [ir.If(g, ir.seq()) for g in self.guards * guarded])
        return self.each(store, self.slots, self.rows, self.cols)

    def local(self, name: str) -> ir.Load:
        """An element of fragments of one block, which start at 0."""
        b = _fragments(f"{name}_tile", self.slots, *self.tile)
        self.steps.append(ir.Alloc(b))
        return ir.Load(b, self.at, b.dtype)

    def define(self, name: str, value: ir.Expr) -> ir.Load:
        """A value for each element; -inf is stored where a condition of the program may fail."""
        if isinstance(value, ir.Load) and value.index == self.at:
            self.known[name] = value
            return value
        x = self.known[name] = self.local(name)
        names = {f.name for f in self.loops}
        reads = any(_is_load(e, *MEMORY) and ir.free_vars(e) & names for e in ir.walk(value))
        if isinstance(value, ir.Select) and ir.is_const(value.b, -math.inf) and not reads:
            self.steps.append(self.element(x, value.a))
            self.mask(x, ir.conjuncts(value.cond))
        else:
            self.steps.append(self.element(x, value, guarded=reads))
        return x

    def mask(self, x: ir.Load, conds: Iterable[ir.Expr]) -> None:
        """-inf for elements for which a condition fails."""
        for cond in conds:
            slack = slack_of(cond)
            cond = cond if slack is None else ir.binary(">=", slack, 0)  # few registers
            step = self.element(x, ir.select(cond, x, ir.Const(-math.inf, x.dtype)))
            least = None if slack is None else extreme(slack, self.loops, largest=False)
            self.steps.append(step if least is None else ir.If(ir.binary("<", least, 0), step))

    def state(self, name: str, start: ir.Const) -> ir.Load:
        """A value for each row that outlives the block."""
        b = _fragments(f"{name}_rows", self.all_rows, self.rows)
        x = self.known[name] = ir.Load(b, self.row, b.dtype)
        self.before += [ir.Alloc(b), self.each(_set(x, start), self.all_rows, self.rows)]
        return x

    def reduction(self, c: ir.Compute) -> None:
        name, ((op, value), *more) = c.out.buffer.name, c.sums
        if more:
            raise self.refuse(c, "has several sums")
        x = self.state(name, ir.identity_of(op, dtypes.float32))
        if c.online is not None:
            return self.online(c, x, value)
        factor = c.reductions[0].factor if c.reductions else None
        if factor is not None:
            scaled = _set(x, x * self.known[factor.name])
            self.steps.append(self.each(scaled, self.block_rows, self.rows))
        # Where a guard fails the weight of a term is 0.
        self.steps.append(self.element(x, value, op, guarded=factor is None))
        final = ir.seq(_set(x, _over_quad(op, x)), _set(x, self.total(c, [x])))
        self.after.append(self.each(final, self.all_rows, self.rows))
        if c.out.buffer.scope != "register":  # the lane of a row's first column stores it
            store = ir.If(ir.binary("==", self.cols.var, 0), ir.Store(c.out.buffer, c.out.index, x))
            conds = [ir.If(g, ir.seq()) for g in self.guards if not ir.free_vars(g) & self.reduced]
            self.after.append(self.each(framed(store, conds), self.all_rows, self.rows, self.cols))

    def total(self, c: ir.Compute, totals: Sequence[ir.Load]) -> Any:
        """The value of a statement whose sums are complete."""
        self.known |= {r.total.name: x for r, x in zip(c.reductions, totals, strict=False)}
        return self.translated(c.value) if c.reductions else totals[0]

    def online(self, c: ir.Compute, x: ir.Load, term: ir.Expr) -> None:
        """The maximum of a block, the factor of sums before it, and the weights of its terms, as
        powers of two. Beside the least number a weight of -inf is 0."""
        assert c.online is not None
        weight, factor = (b.name for b in c.online)
        term = self.define(f"{c.out.buffer.name}.term", term)
        self.mask(term, [g for g in self.guards if ir.free_vars(g) & self.reduced])
        top, by = finite(x * LOG2E), self.state(factor, LEAST)
        rows = ir.seq(_set(x, _over_quad("max", x)), _set(by, ir.unary("exp2", by - top)))
        self.steps += [
            self.each(_set(by, top), self.block_rows, self.rows),
            self.element(x, term, "max"),
            self.each(rows, self.block_rows, self.rows),
        ]
        self.define(weight, ir.unary("exp2", term * LOG2E - top))

    def product(self, c: ir.Compute, inner: list[Any]) -> None:
        """A tile operation whose result is a tile of the block, or one that outlives it."""
        assert c.mma is not None
        is_local = self.cols.name == c.mma[1]
        own = {f.name: f for f in (*self.loops, *inner) if isinstance(f, ir.For)}
        tile = [own.pop(name) for name in c.mma]
        order = [f for f in own.values() if ir.reduces(f, c)]  # operands are shared inside of these
        order += [f for f in reversed(own.values()) if f not in order]
        rest = (f for f in inner if not isinstance(f, ir.For))
        frame = [*order, *tile, *map(self.translated, rest)]
        frame += [ir.If(g, c) for g in self.guards]
        p = Product.of(framed(c, frame if is_local else [*self.outer, *frame]), c)
        if is_local:
            totals = [self.local(f"{c.out.buffer.name}.{n}") for n in range(len(c.sums))]
            accs, slot = [x.buffer for x in totals], self.at[0]
        else:
            names = (f"{c.out.buffer.name}_tile{n}" for n in range(len(c.sums)))
            accs, slot = [p.accumulator(name) for name in names], slot_of(p.slots)
            cols = replace(tile[1], kind="fragment")
            totals = [ir.Load(b, (slot, self.rows.var, cols.var), b.dtype) for b in accs]
            slots = [f for f in p.slots if f.name in own]
            for x, r in zip(totals, c.reductions, strict=False):
                if r.factor is not None:
                    scaled = _set(x, x * self.known[r.factor.name])
                    self.steps.append(self.each(scaled, slots, self.rows, cols))
        inside = p.outer[len(p.outer) - len(order) :]
        self.steps.append(framed(framed(p.update(accs, slot), p.inner), inside))
        if is_local:
            self.define(c.out.buffer.name, self.total(c, totals))
        else:
            self.before += map(ir.Alloc, accs)
            p = replace(p, compute=replace(c, value=self.of_rows(c.value)))
            self.after.append(p.store(accs, slot))

    def of_rows(self, e: Any) -> Any:
        """An epilogue in which what depends on rows alone is computed once for each row."""
        loads = [x for x in ir.walk(e) if _is_load(x)]
        if e in loads or not loads or not all(x.index == self.row for x in loads):
            return ir.rebuild(e, self.of_rows)
        x = self.state(f"value{len(self.after)}", LEAST)
        self.after.append(self.each(_set(x, e), self.all_rows, self.rows))
        return x


def _is_load(x: Any, *scopes: str) -> bool:
    return isinstance(x, ir.Load) and (not scopes or x.buffer.scope in scopes)


def _fragments(name: str, slots: Sequence[ir.For], *tile: ir.For) -> ir.Buffer:
    """A tile, or a value for each of its rows, for each iteration of the slots."""
    extents = math.prod(f.extent or 0 for f in slots), *(f.extent or 0 for f in tile)
    return ir.Buffer(name, dtypes.float32, tuple(map(ir.as_expr, extents)), "fragment")


def _set(x: ir.Load, value: ir.Expr, op: str = "") -> ir.Store:
    return ir.Store(x.buffer, x.index, ir.cast(value, x.dtype), op)


def _over_quad(op: str, x: ir.Load) -> ir.Expr:
    """The value of a row, of which each of four lanes has a part."""
    return ir.ReduceThreads(op, x, "thread.x", QUAD, x.dtype)
