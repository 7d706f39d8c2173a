"""Pass: products marked `mma` become tile operations, with their accumulators in fragments.

The addresses of both operands and of the output must be affine in the three loops of the tile:
their coefficients are the strides of the tile, so a transposed operand needs no word of its own.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilewright import dtypes
from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.affine import affine
from tilewright.ir.atoms import ATOMS
from tilewright.lower.flatten import flat_offset
from tilewright.lower.reductions import check_extents, frame_of, framed, reduced_names, with_totals

MEMORY = ("global", "part", "shared")
RESULTS = ("float32", "float16", "bfloat16")


def materialize_tiles(program: ir.Program) -> ir.Program:
    """The three loops of a tile become one operation. Its fragment is opened just outside the
    outermost loop that reduces, with a slot for each spatial iteration inside that loop, and stored
    after it. Guards on the three loops become limits: beyond them a tile reads 0, writes nothing.

    before: for k_o in 0:ceil(k/16)               after:  alloc acc[4 fragments]
              for u in 0:4  # unroll                      for k_o in 0:ceil(k/16)
                for i_i in 0:16                             for u in 0:4  # unroll
                  if i < m                                    mma acc[u] += A tile @ B tile
                    for j_i in 0:8                        for u in 0:4  # unroll
                      if j < n                              for i_i, j_i  # fragment
                        for k_i in 0:16                       if i < m, j < n
                          if k < size_k                         C[i, j] = acc[u, i_i, j_i]
                            C[i, j] = sum(…) mma(i_i, j_i, k_i)

    An output that is updated in place at coordinates which the reduced loops compute is updated in
    memory, a tile at a time. Raises ScheduleError[S102] for other values than products of tiles.
    """
    return ir.map_bodies(program, lambda body: _Tiler(body).visit(body))


class _Tiler:
    def __init__(self, body: ir.Stmt) -> None:
        self.count = 0
        computes = list(ir.statements(body, ir.Compute))
        times = Counter((c.out, c.op) for c in computes)
        for c in computes:
            if c.mma and times[c.out, c.op] > 1:
                why = f"{c.out.buffer.name} is summed by a tile operation and by another loop"
                raise illegal(why, "split the reduced loop with tail='guard'")

    def visit(self, s: Any) -> Any:
        if isinstance(s, ir.For):
            products = (c for c in ir.statements(s, ir.Compute) if c.mma)
            if mine := [c for c in products if ir.reduces(s, c) or s.name == c.mma[0]]:
                return self.reduce(s, mine)
        return ir.rebuild_body(s, self.visit)

    def reduce(self, top: ir.Stmt, computes: list[ir.Compute]) -> ir.Stmt:
        """Returns `top` with the products `computes` in it as tile operations, their accumulators
        allocated before it and stored after it. `top` is their outermost loop that reduces, or the
        outermost loop of the tile if no loop around the tile reduces."""
        before: list[ir.Stmt] = []
        after: list[ir.Stmt] = []
        for c in computes:
            p = Product.of(top, c)
            self.count += 1
            name = f"{c.out.buffer.name}_tile{self.count}"
            names = [name] if len(c.sums) == 1 else [f"{name}_{n}" for n in range(len(c.sums))]
            accs = [p.accumulator(n) for n in names]
            slot = slot_of(() if p.escapes else p.slots)
            update, store = p.update(accs, slot), p.store(accs, slot)
            if p.escapes:
                new = ir.seq(*map(ir.Alloc, accs), framed(update, p.inner), store)
            else:
                new = framed(update, p.inner)
                before += map(ir.Alloc, accs)
                after.append(store)
            top = ir.transform(top, lambda x, old=p.first, new=new: new if x is old else x)
        # The rest of the loop may hold products whose own reductions start further in.
        return ir.seq(*before, ir.rebuild_body(top, self.visit), *after)


@dataclass(frozen=True, slots=True)
class Product:
    """A product as a tile operation: the statements around its tile, its operands and its output.

    `outer`: loops, lets and guards from the outermost loop that reduces to the tile. `inner`: lets
    and guards of the tile that depend on none of its loops; `known`: the values of its other lets.
    `limits`: the number of valid iterations of each loop of the tile; `gaps`: other guards on such
    a loop, which an operand may have that is 0 where they fail: a copy in shared memory. `reduced`:
    names that differ from one reduced iteration to the next. `region`: all inside the tile."""

    compute: ir.Compute
    first: ir.For
    names: tuple[str, str, str]
    outer: tuple[Any, ...]
    inner: tuple[Any, ...]
    known: dict[str, ir.Expr]
    limits: dict[str, ir.Expr]
    gaps: tuple[ir.Expr, ...]
    reduced: frozenset[str]
    region: tuple[Any, ...]

    @classmethod
    def of(cls, top: ir.Stmt, c: ir.Compute) -> "Product":
        assert c.mma is not None
        path = ir.path_to(top, c)
        assert path is not None
        loops = [s for s in path if isinstance(s, ir.For)][-3:]
        exact = tuple(f.extent for f in loops) in ATOMS and all(
            f.kind == "serial" and not f.private and ir.is_const(f.begin, 0) for f in loops
        )
        if tuple(f.name for f in loops) != c.mma or not exact:
            why = f"the loops {', '.join(c.mma)} are no longer those of a tile operation"
            raise illegal(why, "call mma() after every other verb on these loops")
        if any(ir.reduces(f, c) for f in loops[:2]) or not ir.reduces(loops[2], c):
            raise illegal(f"a tile operation sums over its last loop only, {c.mma[2]}")
        if c.atomic:
            raise illegal("a tile operation has no atomic updates", "a format of whole rows")
        at = next(n for n, s in enumerate(path) if s is loops[0])
        outer, region = tuple(path[:at]), path[at:]
        inner, known, limits, gaps = _region(region, frozenset(c.mma))
        _check_serial(outer, c)
        reduced = reduced_names((*outer, *inner), c)
        p = cls(c, loops[0], c.mma, outer, inner, known, limits, gaps, reduced, tuple(region))
        for name in c.mma[:2]:
            # Beyond a limit one operand alone is 0, and 0 · ∞ would enter a sum that goes on.
            ends = (limits[name],) if name in limits else ()
            ends = (*ends, *(g for g in gaps if name in ir.free_vars(g)))
            if any(ir.free_vars(e) & reduced for e in ends) and not p.escapes:
                raise _not_affine(
                    f"how many iterations of {name} there are depends on a reduced loop"
                )
        return p

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, cols, depth = (s.extent or 0 for s in self.region if isinstance(s, ir.For))
        return rows, cols, depth

    @property
    def escapes(self) -> bool:
        """Whether the reduced loops decide where the output lies."""
        index = (ir.substitute(i, self.known) for i in self.compute.out.index)
        return any(ir.free_vars(i) & self.reduced for i in index)

    @property
    def slots(self) -> tuple[ir.For, ...]:
        """The spatial loops inside the reduction; each thread has fragments of its own."""
        return slots_of(self.outer, self.reduced, self.compute.out.buffer.name)

    def accumulator(self, name: str) -> ir.Buffer:
        """Fragments for the sums of all slots, or of one tile that is updated in memory."""
        total = 1 if self.escapes else math.prod(f.extent or 0 for f in self.slots)
        shape = tuple(ir.Const(n, dtypes.int32) for n in (total, *self.shape[:2]))
        return ir.Buffer(name, dtypes.float32, shape, "fragment")

    def update(self, accs: list[ir.Buffer], slot: ir.Expr) -> ir.Stmt:
        """acc[slot] += a tile · b tile, for each product."""
        rows, cols, depth = self.names
        products: list[ir.Stmt] = []
        for acc, (op, value) in zip(accs, self.compute.sums, strict=True):
            x, y = self._operands(op, value)
            a, b = self.tile(x, rows, depth), self.tile(y, depth, cols)
            products.append(ir.Mma(acc, slot, a, b, self.shape, self.compute.atom))
        return ir.seq(*products)

    def store(self, accs: list[ir.Buffer], slot: ir.Expr) -> ir.Stmt:
        """Each thread stores the elements that its fragments hold. Lets and guards of the tile
        stand inside of its two loops, but those of the sum."""
        c, path = self.compute, self.region if self.escapes else (*self.outer, *self.region)
        rows, cols, _ = (s for s in self.region if isinstance(s, ir.For))
        totals = [ir.Load(acc, (slot, rows.var, cols.var), acc.dtype) for acc in accs]
        lets, value = with_totals(c, totals) if c.reductions else ((), totals[0])
        if c.in_place:
            value = ir.binary("+", ir.cast(c.out, value.dtype), value)
        body = ir.seq(*lets, ir.Store(c.out.buffer, c.out.index, ir.cast(value, c.out.dtype)))
        reduced = reduced_names(path, c)
        inside = [s for s in self.region if not isinstance(s, ir.For)]
        body = framed(body, frame_of(inside, reduced))
        for f in (cols, rows):
            body = ir.For(f.var, f.begin, f.end, body, "fragment")
        return body if self.escapes else framed(body, frame_of(self.outer, reduced))

    def _operands(self, op: str, value: ir.Expr) -> tuple[ir.Load, ir.Load]:
        """The factor that has the rows, then the one that has the columns."""
        c = self.compute
        if not (isinstance(value, ir.Binary) and value.op == "*" and op == "sum"):
            raise illegal(f"{c.out.buffer.name} is no sum of products of two tiles")
        factors = []
        for e in (value.a, value.b):
            while isinstance(e, ir.Cast):
                e = e.a
            if not isinstance(e, ir.Load) or e.buffer.scope not in (*MEMORY, "fragment"):
                raise _not_affine(f"{e} is no element of an array")
            factors.append(e)
        x, y = factors
        kinds = {e.dtype.name for e in factors if e.buffer.scope in MEMORY}  # others are rounded
        known = [t for t in ATOMS[self.shape] if not c.atom or t in c.atom.operands]
        to_result = bool(c.reductions) or c.out.dtype.name in RESULTS
        if len(kinds) != 1 or not kinds <= set(known) or not to_result:
            raise illegal(
                f"a tile operation of {self.shape} multiplies {' or '.join(known)} "
                f"into float32, not {x.dtype} × {y.dtype} into {c.out.dtype}",
                'build it .typed(A="float16", B="float16"), with the output typed("float32")',
            )
        rows, cols, _ = self.names
        x_has, y_has = self._varies(x), self._varies(y)
        if cols in x_has or rows in y_has:
            x, y, x_has, y_has = y, x, y_has, x_has
        if cols in x_has or rows in y_has:
            raise _not_affine(f"{x} and {y} share a loop of the output's tile")
        return x, y

    def _varies(self, x: ir.Load) -> set[str]:
        index = (ir.free_vars(ir.substitute(i, self.known)) for i in x.index)
        return set(self.names) & set().union(*index)

    def tile(self, x: ir.Load, rows: str, cols: str) -> ir.Tile:
        """The window of memory that `x` runs over as the loops `rows` and `cols` run."""
        m, n = (self.shape[self.names.index(name)] for name in (rows, cols))
        if x.buffer.scope == "fragment":
            slot, *at = x.index
            if [getattr(i, "name", "") for i in at] != [rows, cols]:
                raise _not_affine(f"{x} is no tile of rows {rows} and columns {cols}")
            high, wide = ir.as_expr(m), ir.as_expr(n)
            return ir.Tile(x.buffer, slot, wide, ir.as_expr(1), high, wide)
        for gap in self.gaps if x.buffer.scope != "shared" else ():
            if ir.free_vars(gap) & {rows, cols}:
                raise _not_affine(f"the guard {gap} does not end one loop of the tile")
        x = replace(x, index=tuple(ir.substitute(i, self.known) for i in x.index))
        names = frozenset(self.names)
        offset = flat_offset(x)
        base, step = affine(offset, names, offset.dtype) or (None, {})
        if base is None or set(step) - {rows, cols}:
            raise _not_affine(f"{x} is at {offset}, no sum of multiples of {rows} and {cols}")
        zero = ir.Const(0, offset.dtype)
        down, right = (ir.simplify(step.get(n, zero)) for n in (rows, cols))
        ends = ((rows, m), (cols, n))
        high, wide = (self.limits.get(name, ir.Const(end, dtypes.int32)) for name, end in ends)
        return ir.Tile(x.buffer, ir.simplify(base), down, right, high, wide)


# ---------------------------------------------------------------------------- around a tile


def slots_of(path: Iterable[Any], reduced: frozenset[str], out: str) -> tuple[ir.For, ...]:
    """The loops of a path that do not reduce. Raises ScheduleError[S102] for run-time extents."""
    loops = tuple(
        s for s in path
        if isinstance(s, ir.For) and s.name not in reduced and s.kind not in ir.THREADS
    )  # fmt: skip
    check_extents(loops, out, "a warp keeps a constant number of tiles")
    return loops


def slot_of(slots: Sequence[ir.For]) -> ir.Expr:
    """The number of a fragment: the last spatial loop runs fastest."""
    at: ir.Expr = ir.Const(0, slots[0].var.dtype if slots else dtypes.int32)
    for f in slots:
        at = ir.add(ir.mul(at, f.extent or 1), f.var)
    return at


def _region(
    region: list[Any], names: frozenset[str]
) -> tuple[tuple[Any, ...], dict[str, ir.Expr], dict[str, ir.Expr], tuple[ir.Expr, ...]]:
    """The inside of a tile: (lets and guards that depend on none of its loops, the values of the
    other lets, the limits of its loops, the guards that are no limits)."""
    inner: list[Any] = []
    known: dict[str, ir.Expr] = {}
    limits: dict[str, ir.Expr] = {}
    gaps: list[ir.Expr] = []
    for s in region:
        if isinstance(s, ir.Let):
            value = ir.substitute(s.value, known)
            if ir.reads_memory(value) and not ir.free_vars(value) & names:
                inner.append(ir.Let(s.var, value))
            else:
                known[s.var.name] = value
        elif isinstance(s, ir.If):
            for cond in ir.conjuncts(ir.substitute(s.cond, known)):
                if not ir.free_vars(cond) & names:
                    inner.append(ir.If(cond, ir.Seq(())))
                    continue
                name, limit = _limit(cond, names) or ("", cond)
                if not name:
                    gaps.append(cond)
                    continue
                limits[name] = ir.binary("min", limits[name], limit) if name in limits else limit
    return tuple(inner), known, limits, tuple(gaps)


def _limit(cond: ir.Expr, names: frozenset[str]) -> tuple[str, ir.Expr] | None:
    """(loop, n) such that the condition holds for the first n iterations of the loop; or None."""
    if isinstance(cond, ir.Binary) and cond.op in ("<", "<=", ">", ">="):
        low, high = (cond.a, cond.b) if cond.op in ("<", "<=") else (cond.b, cond.a)
        form = affine(low, names, low.dtype) if low.dtype.is_int else None
        if form and len(form.steps) == 1 and not ir.free_vars(high) & names:
            ((name, by),) = form.steps.items()
            if ir.is_const(by, 1):
                more = 1 if cond.op in ("<=", ">=") else 0
                return name, ir.simplify(ir.add(ir.binary("-", high, form.base), more))
    return None


def _check_serial(outer: tuple[Any, ...], c: ir.Compute) -> None:
    """Raises ScheduleError[S102] for a loop around a tile that reduces in parts."""
    for s in (s for s in outer if isinstance(s, ir.For) and ir.reduces(s, c)):
        if s.kind in ("vector", *ir.THREADS) or s.private:
            kind = "private" if s.private else s.kind
            hint = "loops around a tile that reduce are serial"
            raise illegal(f"loop {s.name} reduces outside a tile and is {kind}", hint)


def _not_affine(why: str) -> ScheduleError:
    return illegal(
        f"no tile: {why}",
        "the operands and the output of a tile operation are read at affine addresses: "
        "tile other loops, or use a format whose blocks are dense, such as bsr(16)",
    )
