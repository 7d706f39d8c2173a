"""Finding and rebuilding loops: what the verbs on loops share.

A *chain* is what stands between a loop and the place where a nest branches: loops, lets and guards
around one body. Verbs take a chain apart, change its loops, and put lets and guards back as far
out as the names they read allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilewright.errors import ScheduleError
from tilewright.ir.nodes import Compute, Expr, For, If, Let, Program, Seq, Stmt, seq
from tilewright.ir.rewrite import free_vars, rebuild, walk


@dataclass(frozen=True, slots=True)
class Chain:
    """Loops (outermost first), the lets and guards among them, and the body they surround."""

    loops: tuple[For, ...]
    lets: tuple[Let, ...]
    guards: tuple[Expr, ...]
    body: Stmt


def chain_from(s: Stmt) -> Chain:
    """The chain that starts at `s`."""
    loops: list[For] = []
    lets: list[Let] = []
    guards: list[Expr] = []
    while True:
        if isinstance(s, For):
            loops.append(s)
            s = s.body
        elif isinstance(s, If):
            guards.append(s.cond)
            s = s.body
        elif isinstance(s, Seq) and all(isinstance(b, Let) for b in s.body[:-1]) and not isinstance(s.body[-1], Let):
            lets += s.body[:-1]  # type: ignore[arg-type]
            s = s.body[-1]
        else:
            return Chain(tuple(loops), tuple(lets), tuple(guards), s)


def build_chain(chain: Chain, outside: Callable[[str], bool]) -> Stmt:
    """The chain as a statement: each let and guard right below the last name it needs.

    `outside(name)` tells whether a name is bound above the chain."""
    bound: set[str] = set()
    own = {f.name for f in chain.loops} | {x.var.name for x in chain.lets}

    def ready(e: Any) -> bool:
        return all(name in bound or name not in own for name in free_vars(e))

    def inner(loops: tuple[For, ...], lets: tuple[Let, ...], guards: tuple[Expr, ...]) -> Stmt:
        placed: list[Let] = []
        moved = True
        while moved:
            moved = False
            for x in lets:
                if x not in placed and ready(x.value):
                    placed.append(x)
                    bound.add(x.var.name)
                    moved = True
        lets = tuple(x for x in lets if x not in placed)
        now = [g for g in guards if ready(g)]
        guards = tuple(g for g in guards if g not in now)
        if loops:
            head = loops[0]
            if not (ready(head.begin) and ready(head.end)):
                raise ScheduleError(
                    "S102", f"the range of loop {head.name} depends on loops that would stand inside it",
                    hint="a level stays inside the levels above it",
                )  # fmt: skip
            bound.add(head.name)
            body: Stmt = replace(head, body=inner(loops[1:], lets, guards))
        else:
            assert not lets and not guards
            body = chain.body
        for g in reversed(now):
            body = If(g, body)
        return seq(*placed, body)

    assert outside is not None
    return inner(chain.loops, chain.lets, chain.guards)


def loop_names(program: Program) -> list[str]:
    """All loops of a program, outermost first, each name once."""
    found: dict[str, None] = {}
    for stage in program.stages:
        for nest in stage:
            for x in walk(nest.body):
                if isinstance(x, For):
                    found.setdefault(x.name)
    return list(found)


def matches(loop: For, name: str) -> bool:
    """A loop is found by its name, or, with `j` for `j_p`, by the axis it walks."""
    return loop.name == name or loop.name == f"{name}_p"


def rewrite_loops(s: Stmt, name: str, f: Callable[[For], Stmt]) -> tuple[Stmt, int]:
    """Every loop of that name below `s` replaced by `f(loop)`; how many there were."""
    count = 0

    def visit(x: Any) -> Any:
        nonlocal count
        if isinstance(x, For) and matches(x, name):
            count += 1
            return f(x)
        return rebuild(x, visit) if isinstance(x, (Seq, For, If)) else x

    return visit(s), count


def computes(s: Stmt) -> list[Compute]:
    return [x for x in walk(s) if isinstance(x, Compute)]


def reduces(loop: For, c: Compute) -> bool:
    """Whether `loop` is one of those that `c` reduces over."""
    return bool(set(loop.axes) & set(c.reduce))
