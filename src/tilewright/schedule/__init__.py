"""Schedules: how a program runs, as a list of printable rewrites.

    s = s.split("i", 8).mark("i_o", "parallel").mark("k_i", "vector")
    print(s); s.history; s.undo()

A `Schedule` is a frozen value; each verb returns a new one or refuses (S codes) and changes
nothing. Verbs on coordinates come first; the first verb on loops lowers the program to positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.errors import ScheduleError
from tilewright.ir.nodes import For, LoopKind, Nest, Program, Stmt
from tilewright.ir.rewrite import statements
from tilewright.schedule import coords, loops, staging
from tilewright.schedule.tree import clash, loop_names
from tilewright.target import Target

NAMING = (loops.split, loops.fuse, loops.prefetch, staging.cache)  # verbs that give new names
Nests = tuple[int, ...] | None
OPERAND_FIRST = (loops.prefetch, staging.cache)  # verbs whose loop is their second argument


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
    lowering: Callable[[Program], Program]
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
    def shares_rows(self) -> bool:
        """Whether parts of a decomposition update the same elements of an output."""
        return any(n.shared for n in self.nests)

    def format_of(self, nest: int) -> Any:
        """The format that a nest of a decomposition serves, or the only one, or None."""
        part = self.nests[nest].part
        for t in self.program.tensors:
            if t.is_sparse:
                return t.format.formats[max(part, 0)]
        return None

    def undo(self, steps: int = 1) -> Schedule:
        """The schedule before the last `steps` verbs."""
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

    def on(self, *nests: int) -> Schedule:
        """The same schedule with later verbs applied to these nests only."""
        have = len(self.nests)
        for n in nests:
            if not isinstance(n, int) or not 0 <= n < have:
                raise ScheduleError("S101", f"no nest {n}", hint=f"nests: 0 … {have - 1}")
        return replace(self, selected=nests)

    def everywhere(self) -> Schedule:
        """The same schedule with later verbs applied to all nests."""
        return replace(self, selected=None)

    # -- verbs on coordinates --------------------------------------------------------------------

    def order_axes(self, output: str, *axes: str) -> Schedule:
        return self._coords(coords.order_axes, output, *axes)

    def fuse_axes(self, structure: str) -> Schedule:
        return self._coords(coords.fuse_axes, structure)

    def specialize(self, dim: str, size: int) -> Schedule:
        return self._coords(coords.specialize, dim, size)

    # -- verbs on loops --------------------------------------------------------------------------

    def split(
        self, loop: str, factor: int, tail: str = "guard", into: tuple[str, str] | None = None
    ) -> Schedule:
        return self._loops(loops.split, loop, factor, tail=tail, into=into)

    def fuse(self, outer: str, inner: str, into: str = "") -> Schedule:
        return self._loops(loops.fuse, outer, inner, into=into)

    def reorder(self, *order: str) -> Schedule:
        return self._loops(loops.reorder, *order)

    def mark(self, loop: str, kind: LoopKind) -> Schedule:
        return self._loops(loops.mark, loop, kind)

    def bind(self, loop: str, to: LoopKind) -> Schedule:
        return self._loops(loops.mark, loop, to)

    def parallel(self, loop: str) -> Schedule:
        return self._loops(loops.mark, loop, "parallel")

    def vectorize(self, loop: str) -> Schedule:
        return self._loops(loops.mark, loop, "vector")

    def unroll(self, loop: str, factor: int = 0) -> Schedule:
        return self._loops(loops.unroll, loop, factor)

    def rfactor(self, loop: str) -> Schedule:
        return self._loops(loops.rfactor, loop)

    def atomic(self, output: str) -> Schedule:
        return self._loops(loops.atomic, output)

    def mma(self, rows: str, cols: str, depth: str) -> Schedule:
        return self._loops(loops.mma, rows, cols, depth)

    def prefetch(self, buffer: str, loop: str, ahead: int) -> Schedule:
        return self._loops(loops.prefetch, buffer, loop, ahead)

    # -- verbs that give values a second home ----------------------------------------------------

    def cache(self, buffer: str, loop: str, scope: staging.CacheScope = "register") -> Schedule:
        return self._loops(staging.cache, buffer, loop, scope)

    def privatize(self, output: str, loop: str, copies: int) -> Schedule:
        if self.selected is not None:
            raise ScheduleError(
                "S102", "privatize changes all nests of an output", hint="everywhere() first"
            )
        args = output, loop, copies
        program = staging.privatize(self.lowered.program, *args)
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
            missing = f"nothing here is called {args[0]!r}"
            if verb in OPERAND_FIRST:
                missing = f"no loop {args[1]!r} reads {args[0]!r}"
            raise ScheduleError(
                "S101",
                f"{verb.__name__}: {missing}",
                hint=f"loops: {', '.join(self.loops)}",
            )
        given = tuple((k, v) for k, v in options.items() if v)
        step = Step(verb.__name__, args, given, self.selected)
        return self._recorded(replace(program, stages=tuple(stages)), step)

    def _check_names(self, verb: str, body: Stmt) -> None:
        taken = frozenset(t.name for t in self.program.tensors)
        found = clash(body, taken)
        if found:
            raise ScheduleError(
                "S102", f"{verb}: {found!r} is no new name for a loop",
                hint="letters, digits and underscores; a name that nothing around it has",
            )  # fmt: skip

    def _recorded(self, program: Program, step: Step) -> Schedule:
        return replace(self, program=program, history=(*self.history, step), before=self)

    def has(self, loop: str, nest: int | None = None) -> bool:
        """Whether there is a loop of that name (in one nest)."""
        chosen = self.nests if nest is None else (self.nests[nest],)
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
        loops.atomic, loops.mma, loops.prefetch, staging.cache, staging.privatize,
    )  # fmt: skip
    texts = {f.__name__: f.__doc__ for f in behind}
    for name, like in (("bind", "mark"), ("parallel", "mark"), ("vectorize", "mark")):
        texts[name] = f"`{like}` under the name that the field gives it.\n\n    {texts[like]}"
    for name, text in texts.items():
        getattr(Schedule, name).__doc__ = text


_document()


def replay(schedule: Schedule, steps: tuple[Step, ...]) -> Schedule:
    """The recorded steps done again, on another program of the same loops."""
    for step in steps:
        schedule = replace(schedule, selected=step.nests)
        schedule = getattr(schedule, step.verb)(*step.args, **dict(step.options))
    return schedule
