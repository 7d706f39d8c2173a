"""Schedules: how a program runs, as a list of printable rewrites.

    s = s.split("i", 8).mark("i_o", "parallel").mark("k_i", "vector")
    print(s); s.history; s.undo()

A `Schedule` is a frozen value; each verb returns a new one or refuses (S codes) and changes
nothing. Verbs on coordinates come first; the first verb on loops lowers the program to positions.

What is refused raises ScheduleError: S101 where nothing has that name or number, S102 where an
argument is not what the verb takes (`arguments.py`), or the verb is not legal here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.errors import ScheduleError
from tilewright.ir.nodes import For, LoopKind, Nest, Program, Stmt
from tilewright.ir.rewrite import statements
from tilewright.schedule import coords, loops, privatize, staging
from tilewright.schedule.arguments import (
    A_NAME,
    FAR,
    INT64_MAX,
    NAMES,
    NEAR,
    TWO_NAMES,
    one_of,
    optional,
    several,
    takes,
    whole,
)
from tilewright.schedule.tree import clash, computes, loop_names
from tilewright.target import Target

NAMING = (loops.split, loops.fuse, loops.prefetch, staging.cache)  # verbs that give new names
Nests = tuple[int, ...] | None
OPERAND_FIRST = (loops.prefetch, staging.cache)  # verbs whose loop is their second argument
NUMBER = whole(0, FAR)  # of a nest, or of steps
KIND = one_of(*loops.KINDS)
TAIL = one_of(*loops.TAILS)
SCOPE = one_of(*staging.SCOPES)


@dataclass(frozen=True, slots=True)
class Step:
    """One verb as it was called. `nests` are those it was applied to (None: all)."""

    verb: str
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    nests: Nests = None

    def __str__(self) -> str:
        args = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.options]
        on = f".on{self.nests}" if self.nests is not None else ""
        return f"{on}.{self.verb}({', '.join(args)})"


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """`program` at the coordinate or position level; `lowering` takes it from the first to the
    second."""

    program: Program
    lowering: Callable[[Program], Program] = field(compare=False)
    target: Target
    history: tuple[Step, ...] = ()
    selected: Nests = None
    before: Schedule | None = field(default=None, compare=False)

    # -- looking ---------------------------------------------------------------------------------

    @property
    def nests(self) -> tuple[Nest, ...]:
        """The nests of the lowered program, in order; `on(n)` selects by this number."""
        return tuple(n for stage in self.lowered.program.stages for n in stage)

    @property
    def lowered(self) -> Schedule:
        """This schedule at the position level."""
        if self.program.level == "positions":
            return self
        return replace(self, program=self.lowering(self.program))

    @property
    def loops(self) -> list[str]:
        """The names of all loops, outermost first."""
        return loop_names(self.lowered.program)

    @property
    def in_place(self) -> bool:
        """Whether elements of an output are met again after others, and updated in memory: their
        rows are shared by parts, or stored in pieces (coo, csc)."""
        return any(c.in_place for n in self.nests for c in computes(n.body))

    @property
    def shares_rows(self) -> bool:
        """Whether parts of a decomposition update the same elements of an output."""
        return any(n.shared for n in self.nests)

    @takes(nest=NUMBER)
    def format_of(self, nest: int) -> Any:
        """The format that a nest of a decomposition serves, or the only one, or None. Raises
        ScheduleError[S101, S102]."""
        part = self._nest(nest).part
        for t in self.program.tensors:
            if t.is_sparse:
                return t.format.formats[max(part, 0)]
        return None

    @takes(steps=NUMBER)
    def undo(self, steps: int = 1) -> Schedule:
        """The schedule before the last `steps` verbs. Raises ScheduleError[S102]."""
        s: Schedule = self
        for _ in range(steps):
            if s.before is None:
                raise ScheduleError(
                    "S102",
                    "there is nothing to undo",
                    hint=f"{len(self.history)} verbs were called",
                )
            s = s.before
        return s

    def __str__(self) -> str:
        steps = "\n".join(f"  {h}" for h in self.history) or "  (as written)"
        return f"schedule for {self.target}\n{steps}\n{self.lowered.program}"

    __repr__ = __str__

    # -- selecting -------------------------------------------------------------------------------

    @takes(nests=several(NUMBER, "numbers of nests"))
    def on(self, *nests: int) -> Schedule:
        """The same schedule with later verbs applied to these nests only. Raises
        ScheduleError[S101, S102]."""
        for n in nests:
            self._nest(n)
        return replace(self, selected=nests)

    def _nest(self, number: int) -> Nest:
        nests = self.nests
        if number >= len(nests):
            raise ScheduleError("S101", f"no nest {number}", hint=f"nests: 0 … {len(nests) - 1}")
        return nests[number]

    @takes()
    def everywhere(self) -> Schedule:
        """The same schedule with later verbs applied to all nests."""
        return replace(self, selected=None)

    # -- verbs on coordinates --------------------------------------------------------------------

    @takes(output=A_NAME, axes=NAMES)
    def order_axes(self, output: str, *axes: str) -> Schedule:
        return self._coords(coords.order_axes, output, *axes)

    @takes(structure=A_NAME)
    def fuse_axes(self, structure: str) -> Schedule:
        return self._coords(coords.fuse_axes, structure)

    @takes(dim=A_NAME, size=whole(1, INT64_MAX))
    def specialize(self, dim: str, size: int) -> Schedule:
        return self._coords(coords.specialize, dim, size)

    # -- verbs on loops --------------------------------------------------------------------------

    @takes(loop=A_NAME, factor=whole(1, FAR), tail=TAIL, into=optional(TWO_NAMES))
    def split(
        self, loop: str, factor: int, tail: str = "guard", into: tuple[str, str] | None = None
    ) -> Schedule:
        return self._loops(loops.split, loop, factor, tail=tail, into=into)

    @takes(outer=A_NAME, inner=A_NAME, into=A_NAME)
    def fuse(self, outer: str, inner: str, into: str = "") -> Schedule:
        return self._loops(loops.fuse, outer, inner, into=into)

    @takes(order=NAMES)
    def reorder(self, *order: str) -> Schedule:
        return self._loops(loops.reorder, *order)

    @takes(loop=A_NAME, kind=KIND)
    def mark(self, loop: str, kind: LoopKind) -> Schedule:
        return self._loops(loops.mark, loop, kind)

    @takes(loop=A_NAME, to=KIND)
    def bind(self, loop: str, to: LoopKind) -> Schedule:
        return self._loops(loops.mark, loop, to)

    @takes(loop=A_NAME)
    def parallel(self, loop: str) -> Schedule:
        return self._loops(loops.mark, loop, "parallel")

    @takes(loop=A_NAME)
    def vectorize(self, loop: str) -> Schedule:
        return self._loops(loops.mark, loop, "vector")

    @takes(loop=A_NAME, factor=whole(0, NEAR))
    def unroll(self, loop: str, factor: int = 0) -> Schedule:
        return self._loops(loops.unroll, loop, factor)

    @takes(loop=A_NAME)
    def rfactor(self, loop: str) -> Schedule:
        return self._loops(loops.rfactor, loop)

    @takes(output=A_NAME)
    def atomic(self, output: str) -> Schedule:
        return self._loops(loops.atomic, output)

    @takes(rows=A_NAME, cols=A_NAME, depth=A_NAME)
    def mma(self, rows: str, cols: str, depth: str) -> Schedule:
        return self._loops(loops.mma, rows, cols, depth)

    @takes(buffer=A_NAME, loop=A_NAME, ahead=whole(1, NEAR))
    def prefetch(self, buffer: str, loop: str, ahead: int) -> Schedule:
        return self._loops(loops.prefetch, buffer, loop, ahead)

    # -- verbs that give values a second home ----------------------------------------------------

    @takes(buffer=A_NAME, loop=A_NAME, scope=SCOPE)
    def cache(self, buffer: str, loop: str, scope: staging.CacheScope = "register") -> Schedule:
        return self._loops(staging.cache, buffer, loop, scope)

    @takes(output=A_NAME, loop=A_NAME, copies=whole(2, privatize.MOST_COPIES))
    def privatize(self, output: str, loop: str, copies: int) -> Schedule:
        if self.selected is not None:
            raise ScheduleError(
                "S102", "privatize changes all nests of an output", hint="everywhere() first"
            )
        args = output, loop, copies
        program = privatize.privatize(self.lowered.program, *args)
        return self._recorded(program, Step("privatize", args))

    # -- how a verb is done ----------------------------------------------------------------------

    def _coords(self, verb: Callable[..., Program], *args: Any) -> Schedule:
        if self.program.level != "coordinates":
            raise ScheduleError(
                "S102", f"{verb.__name__} comes before the verbs on loops", hint="call it first"
            )
        return self._recorded(verb(self.program, *args), Step(verb.__name__, args))

    def _loops(self, verb: Callable[..., tuple[Stmt, int]], *args: Any, **options: Any) -> Schedule:
        program = self.lowered.program
        done, number = 0, 0
        stages = []
        for stage in program.stages:
            nests = []
            for nest in stage:
                if self.selected is None or number in self.selected:
                    body, count = verb(nest.body, *args, **options)
                    done += count
                    if count and verb in NAMING:
                        self._check_names(verb.__name__, body)
                    nest = replace(nest, body=body)
                nests.append(nest)
                number += 1
            stages.append(tuple(nests))
        if not done:
            raise self._missing(verb, args)
        given = tuple((k, v) for k, v in options.items() if v)
        step = Step(verb.__name__, args, given, self.selected)
        return self._recorded(replace(program, stages=tuple(stages)), step)

    def _missing(self, verb: Callable[..., Any], args: tuple[Any, ...]) -> ScheduleError:
        """The refusal of a verb that changed nothing: it names what was not there."""
        known, name = self.loops, args[0]
        why = f"no loop is called {name!r}"
        if verb is loops.atomic:
            why = f"no output {name!r} is updated in place"
        elif verb in OPERAND_FIRST:
            name = args[1]
            why = f"no loop {name!r} reads {args[0]!r}"
        near = difflib.get_close_matches(name, known, 1) if name not in known else []
        hint = "".join(f"did you mean {n}? " for n in near) + f"loops: {', '.join(known)}"
        return ScheduleError("S101", f"{verb.__name__}: {why}", hint=hint)

    def _check_names(self, verb: str, body: Stmt) -> None:
        taken = frozenset(t.name for t in self.program.tensors)
        found = clash(body, taken)
        if found is not None:
            raise ScheduleError(
                "S102", f"{verb}: {found!r} is no new name for a loop",
                hint="letters, digits and single underscores; a name that nothing around it has",
            )  # fmt: skip

    def _recorded(self, program: Program, step: Step) -> Schedule:
        return replace(self, program=program, history=(*self.history, step), before=self)

    @takes(loop=A_NAME, nest=optional(NUMBER))
    def has(self, loop: str, nest: int | None = None) -> bool:
        """Whether there is a loop of that name (in one nest). Raises ScheduleError[S101, S102]."""
        chosen = self.nests if nest is None else (self._nest(nest),)
        return any(
            isinstance(x, For) and (x.name == loop or x.name == f"{loop}_p")
            for n in chosen
            for x in statements(n.body)
        )


def _document() -> None:
    """Each verb of a Schedule says what the function behind it says."""
    behind = (
        coords.order_axes, coords.fuse_axes, coords.specialize,
        loops.split, loops.fuse, loops.reorder, loops.mark, loops.unroll, loops.rfactor,
        loops.atomic, loops.mma, loops.prefetch, staging.cache, privatize.privatize,
    )  # fmt: skip
    texts = {f.__name__: f.__doc__ for f in behind}
    for name, like in (("bind", "mark"), ("parallel", "mark"), ("vectorize", "mark")):
        texts[name] = f"`{like}` under the name that the field gives it.\n\n    {texts[like]}"
    for name, text in texts.items():
        raises = "Raises ScheduleError[S101, S102]."
        getattr(Schedule, name).__doc__ = f"{str(text).rstrip()}\n\n    {raises}\n    "


_document()


def replay(schedule: Schedule, steps: tuple[Step, ...]) -> Schedule:
    """The recorded steps done again, on another program of the same loops."""
    for step in steps:
        schedule = replace(schedule, selected=step.nests)
        schedule = getattr(schedule, step.verb)(*step.args, **dict(step.options))
    return schedule
