"""The analysis of accumulators, of scalars and of tiles: the names that a reduction changes, and
the loops, lets and guards under which its total is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from tilewright.ir import nodes as ir
from tilewright.ir.rewrite import conjuncts, free_vars, name_repeated, transform


def reduced_names(path: Iterable[Any], c: ir.Compute) -> frozenset[str]:
    """Loops and names on the path to a statement that differ from one reduced iteration to the
    next."""
    reduced: set[str] = set()
    for s in path:
        if isinstance(s, ir.For):
            if ir.reduces(s, c) or (free_vars(s.begin) | free_vars(s.end)) & reduced:
                reduced.add(s.name)
        elif isinstance(s, ir.Let) and free_vars(s.value) & reduced:
            reduced.add(s.var.name)
    return frozenset(reduced)


def frame_of(path: Iterable[Any], reduced: frozenset[str]) -> tuple[Any, ...]:
    """The loops, lets and guards of a path that depend on nothing reduced: a total is stored under
    them. Of a guard that depends on it in part the rest remains."""
    frame: list[Any] = []
    for s in path:
        if isinstance(s, ir.If):
            kept = [x for x in conjuncts(s.cond) if not free_vars(x) & reduced]
            if kept:
                cond = reduce(lambda a, b: ir.binary("&", a, b), kept)
                frame.append(s if cond == s.cond else ir.If(cond, s.body))
        elif (s.name if isinstance(s, ir.For) else s.var.name) not in reduced:
            frame.append(s)
    return tuple(frame)


def framed(body: ir.Stmt, frame: Sequence[Any]) -> ir.Stmt:
    """The body under loops and guards, with the lets that it needs."""
    for f in reversed(frame):
        if not isinstance(f, ir.Let):
            body = replace(f, body=body)
        elif f.var.name in free_vars(body):
            body = ir.seq(f, body)
    return body


def with_totals(c: ir.Compute, totals: Sequence[ir.Expr]) -> tuple[Sequence[ir.Stmt], ir.Expr]:
    """The value of a statement with an epilogue, with these expressions for its totals; names for
    what it would compute more than once."""
    known = {
        r.total.name: ir.cast(value, r.total.dtype)
        for r, value in zip(c.reductions, totals, strict=True)
    }

    def visit(x: Any) -> Any:
        return known.get(x.buffer.name, x) if isinstance(x, ir.Load) else x

    lets, (value,) = name_repeated([transform(c.value, visit)], f"{c.out.buffer.name}.value")
    return lets, value
