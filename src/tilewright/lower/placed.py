"""Temporaries that are computed inside a loop of the statement that reads them
(`Schedule.compute_at`): their checks, their memory, and the online form of a softmax.

A maximum that is computed in the loop it reduces over is read before it is complete. The terms of a
sum over exp(x - maximum) are then relative to the maximum so far, and the sum is multiplied by
exp(old - new) whenever the maximum grows. Reference: Milakov and Gimelshein (2018), algorithm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.errors import ScheduleError
from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import rebuild, simplify, walk
from tilewright.lower.epilogues import Fused, fused, values_of
from tilewright.lower.scope import Scope
from tilewright.lower.tables import Driver, Statement, index_names, indices_in


@dataclass(slots=True)
class Row:
    """The memory of a placed temporary: a register, or an array of what one iteration computes.

    Its indices are the variables of the `levels` walked inside (depth, begin and end), and the
    coordinates number `dims`, which have `sizes`."""

    tensor: ir.Tensor
    dims: tuple[int, ...]
    sizes: tuple[ir.Expr, ...]
    levels: list[tuple[int, ir.Expr, ir.Expr]] = field(default_factory=list)

    @property
    def extents(self) -> tuple[ir.Expr, ...]:
        return (
            *(simplify(ir.binary("-", end, begin)) for _, begin, end in self.levels),
            *self.sizes,
        )

    @property
    def buffer(self) -> ir.Buffer:
        extents = self.extents
        if not extents:
            return ir.Buffer(self.tensor.name, self.tensor.dtype, (), "register")
        shape = (ir.as_expr(0), *extents[1:])  # `Alloc` has the first one
        return ir.Buffer(self.tensor.name, self.tensor.dtype, shape, "row")

    def element(self, scope: Scope, e: ir.Access, coords: Sequence[ir.Expr]) -> ir.Load:
        """The element at coordinates. Raises ScheduleError[S102] for another row than that of the
        iteration."""
        index: list[ir.Expr] = []
        if self.levels:
            driver = Driver(e.tensor.structure, index_names(e))
            walked = scope.walks[driver.structure].variables
            if not (scope.is_read_at(driver) and all(d in walked for d, *_ in self.levels)):
                raise refuse(
                    e.tensor.name, f"{e} is read where no loop follows it",
                    "read it at the indices of a loop over its stored coordinates",
                )  # fmt: skip
            index += (ir.binary("-", walked[d], begin) for d, begin, _ in self.levels)
        return ir.Load(self.buffer, (*index, *(coords[n] for n in self.dims)), e.dtype)


def refuse(name: str, why: str, hint: str) -> ScheduleError:
    return ScheduleError("S102", f"{name} cannot be computed there: {why}", hint=hint)


def with_roles(program: ir.Program) -> ir.Program:
    """The program with temporaries in memory of a unit marked as inline. Raises ScheduleError[S102]
    for one that several statements with loops of their own read."""
    placed = {name: (loop, scope) for name, loop, scope in program.placed}
    for name, (loop, _) in placed.items():
        readers = [a for a in program.body if _reads(a.value, name)]
        roots = {r.out.tensor.name for r in readers} - placed.keys()
        through = {r.out.tensor.name for r in readers} & placed.keys()
        if len(roots) > 1 or not (roots or through):
            raise refuse(
                name, f"{' and '.join(sorted(roots)) or 'nothing'} read it",
                f"compute_at(…, {loop!r}) all readers but one",
            )  # fmt: skip
    tensors = tuple(
        replace(t, role="inline") if placed.get(t.name, ("", ""))[1] == "row" else t
        for t in program.tensors
    )
    roles = {t.name: t for t in tensors}

    def visit(x: Any) -> Any:
        if isinstance(x, ir.Access):
            coords = tuple(visit(c) for c in x.coords)
            return replace(x, tensor=roles[x.tensor.name], coords=coords)
        return rebuild(x, visit)

    body = tuple(ir.Assign(visit(a.out), visit(a.value), a.op) for a in program.body)
    return replace(program, tensors=tensors, body=body)


def _reads(e: Any, name: str) -> bool:
    return any(isinstance(x, ir.Access) and x.tensor.name == name for x in walk(e))


def nest_of(
    root: Statement, temps: list[Statement], placed: dict[str, str]
) -> tuple[Statement, list[Statement], Online]:
    """The statements of a nest, placed ones with their epilogues; running maxima read by weight."""
    for t in [t for t in temps if t.out.tensor.name in placed]:
        at = temps.index(t)
        joined, rest = fused(t, temps[:at], "")
        temps = [*rest, joined, *temps[at + 1 :]]
    running = {
        t.out.tensor.name: t for t in temps
        if placed.get(t.out.tensor.name) in {a.name for a in t.axes}
    }  # fmt: skip
    online = Online({}, {}, placed, running, {})
    if running:
        temps = [online.statement(t) for t in temps]
        root = online.statement(root)
    return root, temps, online


@dataclass(frozen=True, slots=True)
class Online:
    """Rewrites the statements of a nest that read `running` maxima. `registers`: of weight and
    factor, by name of the maximum; `relative`: the maxima that sums are relative to, by name of the
    sum; `degrees` by temporary, as `degree` has them."""

    registers: dict[str, tuple[ir.Buffer, ir.Buffer]]
    relative: dict[str, str]
    placed: dict[str, str]
    running: dict[str, Statement]
    degrees: dict[str, dict[str, int]]

    def statement(self, st: Statement) -> Statement:
        name = st.out.tensor.name
        around = {self.placed.get(name, "")} - {a.name for a in st.axes}
        if name not in self.placed and st.out.tensor.role != "inline":
            around = {x.name for x in indices_in(st.out.coords)}
        within = around | {a.name for a in st.axes}
        if isinstance(st, Fused):
            totals = tuple(self.reduction(t, within) for t in st.totals)
            epilogue = self.value(name, st.epilogue, around)
            return replace(st, totals=totals, value=totals[0].value, epilogue=epilogue)
        if st.op:
            return self.reduction(st, within)
        return replace(st, value=self.value(name, st.value, around))

    def value(self, name: str, e: ir.Expr, loops: set[str]) -> ir.Expr:
        """A value computed in `loops`, with weights in place of exp(x - maximum)."""
        waiting = {n: t for n, t in self.running.items() if self.placed[n] in loops and n != name}
        e = self.by_weight(e, waiting)
        for n in waiting:
            if _reads(e, n):
                raise refuse(
                    n, f"{name} reads it before it is complete",
                    f"only exp(x - {n}) of the terms x of a maximum is read in its own loop",
                )  # fmt: skip
        degree = self.degree(e)
        if degree is None:
            raise self._not_linear(name)
        self.degrees[name] = degree
        return e

    def reduction(self, st: Statement, loops: set[str]) -> Statement:
        name = st.out.tensor.name
        value = self.value(name, st.value, loops)
        relative = self.degrees.pop(name)
        if relative and (st.op != "sum" or len(relative) > 1):
            raise self._not_linear(name)
        if relative:
            self.relative[name] = next(iter(relative))
        return replace(st, value=value)

    def _not_linear(self, name: str) -> ScheduleError:
        return refuse(
            " and ".join(self.running), f"{name} is no sum of products with one exp(x - maximum)",
            "sum(exp(score[i, j] - top[i]) * V[j, c], over=j)",
        )  # fmt: skip

    def by_weight(self, e: Any, running: dict[str, Statement]) -> Any:
        """`e` with exp(x - maximum) read from the register of its weight."""
        if isinstance(e, ir.Unary) and e.op == "exp" and isinstance(e.a, ir.Binary):
            b = e.a.b
            t = running.get(b.tensor.name) if isinstance(b, ir.Access) else None
            if t is not None and (e.a.op, t.op) == ("-", "max") and e.a.a == t.value:
                name = t.out.tensor.name
                weight, factor = (
                    ir.Buffer(f"{name}.{kind}", e.dtype, (), "register")
                    for kind in ("weight", "factor")
                )
                self.registers[name] = weight, factor
                return ir.Load(weight, (), e.dtype)
        return rebuild(e, lambda x: self.by_weight(x, running))

    def degree(self, e: Any) -> dict[str, int] | None:
        """The weights that an expression is linear in; None where it is not linear."""
        if isinstance(e, ir.Load):
            return {e.buffer.name.removesuffix(".weight"): 1}
        if isinstance(e, ir.Access):
            return self.degrees.get(e.tensor.name, {})
        parts = [self.degree(x) for x in ir.children(e)]
        used = [p for p in parts if p != {}]
        if not used or None in used:
            return None if used else {}
        is_scaled = isinstance(e, ir.Cast) or (isinstance(e, ir.Unary) and e.op == "-")
        is_scaled |= isinstance(e, ir.Binary) and e.op in "*/" and used == parts[: len(used)]
        is_scaled |= isinstance(e, ir.Binary) and e.op == "*" and len(used) == 1
        is_sum = isinstance(e, ir.Binary) and e.op in "+-" and parts[0] == parts[1]
        return used[0] if (is_scaled and len(used) == 1) or is_sum else None


def unready(t: Statement, placed: dict[str, str], emitted: set[str]) -> list[str]:
    """The placed temporaries that `t` reads and that are not computed yet."""
    reads = (x for v in values_of(t) for x in walk(v) if isinstance(x, ir.Access))
    names = {x.tensor.name for x in reads} & placed.keys()
    return sorted(names - emitted - {t.out.tensor.name})


def check_around(t: Statement, loop: str, around: set[str]) -> None:
    """Raises ScheduleError[S102] where a loop around a placed temporary would repeat it."""
    name, own = t.out.tensor.name, {loop, *(x.name for x in indices_in(t.out.coords))}
    again = sorted(around - own)
    if again:
        raise refuse(
            name, f"loop {again[0]} is around loop {loop}, and would repeat it",
            f"order_axes the statement that reads it, {loop} before {again[0]}",
        )  # fmt: skip
