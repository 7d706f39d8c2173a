"""The interpreter's epilogues: functions of reductions, at the position level."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import free_vars, statements
from tilewright.reference.ops_table import UFUNCS, cast, constant


class Epilogues:
    """The totals of a statement with an epilogue, by element of its output. When its outermost
    reduced loop ends, the epilogue is stored for each element of that loop, also for those without
    a term."""

    def __init__(self, nest: Any) -> None:
        self.nest = nest
        self.around: list[ir.For] = []
        self.totals: dict[tuple[str, str, int], Any] = {}  # by output, register, and offset

    def enter(self, loop: ir.For) -> None:
        self.around.append(loop)

    def start(self, outputs: Collection[str]) -> None:
        """Forgets the totals of temporaries that are computed anew."""
        self.totals = {k: v for k, v in self.totals.items() if k[0] not in outputs}

    def add(self, c: ir.Compute) -> None:
        at = self._offset(c)
        for r in c.reductions:
            key = c.out.buffer.name, r.total.name, at
            value, before = self.nest.value(r.value), self.totals.get(key, _identity(r))
            if r.factor is not None and before:
                before = before * self.nest.registers[r.factor.name]
            self.totals[key] = UFUNCS[r.op](before, value)
        if not any(ir.reduces(f, c) for f in self.around):
            self._store(c)

    def leave(self, loop: ir.For) -> None:
        self.around.pop()
        for c in statements(loop):
            if not isinstance(c, ir.Compute) or not c.reductions or not ir.reduces(loop, c):
                continue
            if not any(ir.reduces(f, c) for f in self.around):
                self._store_below(loop, c, set())

    def _store_below(self, s: ir.Stmt, c: ir.Compute, reduced: set[str]) -> None:
        """Stores the elements of `c` below `s`: loops that reduce, and guards and names that depend
        on them, are passed by."""
        run = self.nest
        if s is c:
            self._store(c)
        elif isinstance(s, ir.For):
            if ir.reduces(s, c):
                self._store_below(s.body, c, reduced | {s.name})
                return
            for i in range(int(run.value(s.begin)), int(run.value(s.end))):
                run.env[s.name] = s.var.dtype.numpy.type(i)
                self._store_below(s.body, c, reduced)
        elif isinstance(s, ir.If):
            if free_vars(s.cond) & reduced or run.value(s.cond):
                self._store_below(s.body, c, reduced)
        elif isinstance(s, ir.Seq):
            reduced = set(reduced)
            for b in s.body:
                if isinstance(b, ir.Let) and free_vars(b.value) & reduced:
                    reduced.add(b.var.name)
                elif isinstance(b, ir.Let):
                    run.do(b)
                else:
                    self._store_below(b, c, reduced)

    def _store(self, c: ir.Compute) -> None:
        at = self._offset(c)
        for r in c.reductions:
            total = self.totals.get((c.out.buffer.name, r.total.name, at), _identity(r))
            self.nest.registers[r.total.name] = cast(total, r.total.dtype)
        value = self.nest.value(c.value)
        if c.out.buffer.scope == "register":
            self.nest.registers[c.out.buffer.name] = value
        else:
            self.nest.store(c.out.buffer, c.out.index, value, "")

    def weigh(self, online: tuple[ir.Buffer, ir.Buffer], old: Any, x: Any) -> None:
        """The weight of a term of a running maximum, and the factor of the sums before it."""
        weight, factor = online
        new = max(old, x)
        self.nest.registers[weight.name] = np.exp(x - new) if x > -np.inf else x.dtype.type(0)
        self.nest.registers[factor.name] = np.exp(old - new)

    def _offset(self, c: ir.Compute) -> int:
        buffer = c.out.buffer
        if buffer.scope == "register":
            return 0
        return int(self.nest.memory[buffer.name].checked(self.nest.offset(buffer, c.out.index)))


def _identity(r: ir.Reduction) -> Any:
    return constant(ir.identity_of(r.op, r.value.dtype).value, r.value.dtype)
