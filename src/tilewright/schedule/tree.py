"""Helpers of the verbs: searching and rebuilding loops, and the errors for refused verbs.

A *chain* is a loop and all below it down to where the nest branches: loops, lets and guards around
one body. Verbs split a chain into these, change its loops, and rebuild it with lets and guards as
far out as the names that they read allow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from tilewright.errors import ScheduleError, illegal
from tilewright.ir import core as ir
from tilewright.ir.names import is_users


def unknown(why: str, hint: str) -> ScheduleError:
    """The error for a loop or tensor name that does not exist; it lists those that do."""
    return ScheduleError("S101", why, hint=hint)


@dataclass(frozen=True, slots=True)
class Chain:
    """Loops (outermost first), the lets and guards among them, and the body they surround."""

    loops: tuple[ir.For, ...]
    lets: tuple[ir.Let, ...]
    guards: tuple[ir.Expr, ...]
    body: ir.Stmt


def chain_from(s: ir.Stmt) -> Chain:
    loops: list[ir.For] = []
    lets: list[ir.Let] = []
    guards: list[ir.Expr] = []
    while True:
        if isinstance(s, ir.For) and not isinstance(s, (ir.Merge, ir.Drain)):
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


def in_the_way(chain: Chain, loop: str) -> tuple[str, str]:
    """What a chain ends at before `loop`, or before its statement, and what to call instead: the
    statements beside it. Nothing where the chain does not branch."""
    lines = ir.lines(chain.body)
    is_below = any(has_loop(s, loop) for s in lines)
    wanted = [s for s in lines if (has_loop(s, loop) if is_below else isinstance(s, ir.Compute))]
    beside = [s for s in lines if s not in wanted and not isinstance(s, ir.Let)]
    names = dict.fromkeys(filter(None, map(_named, beside)))
    if not names:
        return "", "reorder first"
    hints = list(filter(None, dict.fromkeys(map(_instead, beside))))
    general = "loops change places where nothing else is between them"
    return f"; in the way: {', '.join(names)}", "; ".join(hints or [general])


def has_loop(s: ir.Stmt, loop: str) -> bool:
    """Whether there is a loop of that name below `s`."""
    return any(isinstance(x, ir.For) and matches(x, loop) for x in ir.statements(s))


def _named(s: ir.Stmt) -> str:
    """A statement in words: the loop, or what it computes, copies or prefetches."""
    if stored := next(ir.statements(s, ir.Store), None):
        return f"the copy to {stored.buffer.name}"
    if isinstance(s, ir.Prefetch):
        return f"the prefetch of {s.element.buffer.name}"
    outputs = dict.fromkeys(c.out.buffer.name for c in computes(s))
    if isinstance(s, ir.For):
        return f"loop {s.name} that computes {' and '.join(outputs)}"
    return f"the statement of {' and '.join(outputs)}" if outputs else ""


def _instead(s: ir.Stmt) -> str:
    if isinstance(s, ir.Prefetch) or any(isinstance(x, ir.Store) for x in ir.statements(s)):
        return "call cache and prefetch after the verbs that move loops"
    if any(c.out.buffer.scope == "register" for c in computes(s)):
        return "make that reduction a statement of its own, tw.temp[…](…)"
    if isinstance(s, ir.For) and s.name.endswith("_t"):
        return 'split with tail="guard", or reorder before the split'
    return ""


def build_chain(chain: Chain) -> ir.Stmt:
    """The chain as a statement: each let and guard right below the last name it needs.

    A let that loads comes after every guard that can be tested before it: the guard may keep the
    load inside its array."""
    own = {f.name for f in chain.loops} | {x.var.name for x in chain.lets}
    return _below(chain.loops, (*chain.lets, *chain.guards), chain.body, own, frozenset())


def _below(
    loops: tuple[ir.For, ...], waiting: tuple[Any, ...], body: ir.Stmt, own: set[str],
    bound: frozenset[str],
) -> ir.Stmt:  # fmt: skip
    def ready(*parts: Any) -> bool:
        return all(name in bound or name not in own for e in parts for name in ir.free_vars(e))

    def rank(x: Any) -> int:  # plain names, then guards, then loads
        return 1 if not isinstance(x, ir.Let) else 2 if ir.reads_memory(x.value) else 0

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
        why = f"the range of loop {head.name} depends on loops that would be inside it"
        raise illegal(why, "a level stays inside the levels above it")
    return replace(head, body=_below(loops[1:], waiting, body, own, bound | {head.name}))


def clash(s: Any, taken: frozenset[str]) -> str | None:
    """The first name of a loop or let that shadows one around it or cannot be a name in generated
    code; None where there is no such name. `taken`: the names bound around `s`."""
    if isinstance(s, (ir.For, ir.Let)):
        if s.name in taken or not is_users(s.name):
            return s.name
        return clash(s.body, taken | {s.name}) if isinstance(s, ir.For) else None
    for b in s.body if isinstance(s, ir.Seq) else (s.body,) if isinstance(s, ir.If) else ():
        if (name := clash(b, taken)) is not None:
            return name
        taken = taken | {b.name} if isinstance(b, ir.Let) else taken
    return None


def axis_name(loop: str) -> str:
    """The name of a loop without its statement and role: `j` of `out.j` and of `outer(j)`."""
    return loop.rpartition(".")[2].removeprefix("outer(").removesuffix(")")


def matches(loop: ir.For, name: str) -> bool:
    """Whether `name` is that of the loop, or of the axis that it walks (`j` for `j_p`). `out.j` is
    the loop j around the statement of `out`, whatever number the name of the loop ends in;
    `outer(j)` the loop over the axis j, or over its blocks (`j_o`, `j_o_p`), in any format."""
    statement, _, own = name.rpartition(".")
    axis = axis_name(own)
    names = (own, f"{own}_p") if axis == own else (axis, f"{axis}_p", f"{axis}_o", f"{axis}_o_p")
    if not statement:
        return loop.name in names
    of = (c.out.buffer.name.removesuffix(".values") for c in computes(loop))
    return statement in of and (loop.name in names or loop.name.rstrip("0123456789") in names)


def rewrite_loops(
    s: ir.Stmt, names: tuple[str, ...], f: Callable[[ir.For], ir.Stmt]
) -> tuple[ir.Stmt, int]:
    """Every outermost loop of these names below `s` replaced by `f(loop)`; how many were."""
    count = 0

    def visit(x: Any) -> Any:
        nonlocal count
        if isinstance(x, ir.For) and any(matches(x, n) for n in names):
            if isinstance(x, (ir.Merge, ir.Drain)):
                why = f"loop {x.name} merges lists of coordinates, one after the other"
                raise illegal(why, "schedule the loops around it")
            count += 1
            return f(x)
        return ir.rebuild_body(x, visit)

    return visit(s), count


def on_loops(f: Callable[..., ir.Stmt]) -> Callable[..., tuple[ir.Stmt, int]]:
    """The verb on nests whose first argument is the name of the loops that `f` rewrites. `f` takes
    a loop, and then the arguments of the verb."""

    def verb(body: ir.Stmt, loop: str, *args: Any, **options: Any) -> tuple[ir.Stmt, int]:
        return rewrite_loops(body, (loop,), lambda x: f(x, loop, *args, **options))

    return wraps(f)(verb)


def computes(s: ir.Stmt) -> list[ir.Compute]:
    return list(ir.statements(s, ir.Compute))
