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
from tilewright.ir import nodes as ir
from tilewright.ir.names import is_users
from tilewright.ir.rewrite import free_vars, loads, rebuild, statements


@dataclass(frozen=True, slots=True)
class Chain:
    """Loops (outermost first), the lets and guards among them, and the body they surround."""

    loops: tuple[ir.For, ...]
    lets: tuple[ir.Let, ...]
    guards: tuple[ir.Expr, ...]
    body: ir.Stmt


def chain_from(s: ir.Stmt) -> Chain:
    """The chain that starts at `s`."""
    loops: list[ir.For] = []
    lets: list[ir.Let] = []
    guards: list[ir.Expr] = []
    while True:
        if isinstance(s, ir.For):
            loops.append(s)
            s = s.body
        elif isinstance(s, ir.If):
            guards.append(s.cond)
            s = s.body
        elif (
            isinstance(s, ir.Seq)
            and all(isinstance(b, ir.Let) for b in s.body[:-1])
            and not isinstance(s.body[-1], ir.Let)
        ):
            lets += s.body[:-1]  # type: ignore[arg-type]
            s = s.body[-1]
        else:
            return Chain(tuple(loops), tuple(lets), tuple(guards), s)


def build_chain(chain: Chain) -> ir.Stmt:
    """The chain as a statement: each let and guard right below the last name it needs.

    What loads stands behind every guard that can be tested before it: a guard may be what keeps the
    load inside its array."""
    own = {f.name for f in chain.loops} | {x.var.name for x in chain.lets}
    return _below(chain.loops, (*chain.lets, *chain.guards), chain.body, own, frozenset())


def _below(
    loops: tuple[ir.For, ...],
    waiting: tuple[Any, ...],
    body: ir.Stmt,
    own: set[str],
    bound: frozenset[str],
) -> ir.Stmt:
    def ready(*parts: Any) -> bool:
        return all(name in bound or name not in own for e in parts for name in free_vars(e))

    def rank(x: Any) -> int:  # plain names, then guards, then loads
        return 1 if not isinstance(x, ir.Let) else 2 if reads_memory(x.value) else 0

    now = [x for x in waiting if ready(x.value if isinstance(x, ir.Let) else x)]
    # Not above the outermost loop: a name there would be bound for the chain's neighbours too.
    inside = bound or not loops or not ready(loops[0].begin, loops[0].end)
    if now and inside:
        first = min(now, key=rank)
        rest = tuple(x for x in waiting if x is not first)
        if isinstance(first, ir.Let):
            return ir.seq(first, _below(loops, rest, body, own, bound | {first.var.name}))
        return ir.If(first, _below(loops, rest, body, own, bound))
    if not loops:
        assert not waiting
        return body
    head = loops[0]
    if not ready(head.begin, head.end):
        raise ScheduleError(
            "S102", f"the range of loop {head.name} depends on loops that would stand inside it",
            hint="a level stays inside the levels above it",
        )  # fmt: skip
    return replace(head, body=_below(loops[1:], waiting, body, own, bound | {head.name}))


def reads_memory(e: ir.Expr) -> bool:
    """Whether an expression loads or searches."""
    return any(True for _ in loads(e))


def loop_names(program: ir.Program) -> list[str]:
    """All loops of a program, outermost first, each name once."""
    found: dict[str, None] = {}
    for stage in program.stages:
        for nest in stage:
            for x in statements(nest.body):
                if isinstance(x, ir.For):
                    found.setdefault(x.name)
    return list(found)


def clash(s: Any, taken: frozenset[str]) -> str | None:
    """A name of a loop or let that already means something where it stands, or is none that code
    can carry; None where all are well. `taken`: names that mean something everywhere."""
    if isinstance(s, ir.For):
        found = _clash_of(s.name, taken)
        return clash(s.body, taken | {s.name}) if found is None else found
    if isinstance(s, ir.If):
        return clash(s.body, taken)
    if isinstance(s, ir.Seq):
        for b in s.body:
            name = b.var.name if isinstance(b, ir.Let) else ""
            found = _clash_of(name, taken) if name else clash(b, taken)
            if found is not None:
                return found
            taken = taken | {name} if name else taken
    return None


def _clash_of(name: str, taken: frozenset[str]) -> str | None:
    return name if name in taken or not is_users(name) else None


def matches(loop: ir.For, name: str) -> bool:
    """A loop is found by its name, or, with `j` for `j_p`, by the axis it walks."""
    return loop.name == name or loop.name == f"{name}_p"


def rewrite_loops(s: ir.Stmt, name: str, f: Callable[[ir.For], ir.Stmt]) -> tuple[ir.Stmt, int]:
    """Every loop of that name below `s` replaced by `f(loop)`; how many there were."""
    count = 0

    def visit(x: Any) -> Any:
        nonlocal count
        if isinstance(x, ir.For) and matches(x, name):
            count += 1
            return f(x)
        return rebuild(x, visit) if isinstance(x, (ir.Seq, ir.For, ir.If)) else x

    return visit(s), count


def computes(s: ir.Stmt) -> list[ir.Compute]:
    return [x for x in statements(s) if isinstance(x, ir.Compute)]
