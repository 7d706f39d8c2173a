"""Schedules: how a program runs, as a list of printable rewrites.

    s = s.split("i", 8).bind("i_o", "parallel").bind("k_i", "vector")
    print(s); s.history; s.undo()

A `Schedule` is a frozen value; each verb returns a new one or refuses (S codes) and changes
nothing. Verbs on coordinates come first; the first verb on loops lowers the program to positions.

A refused verb raises ScheduleError: S101 for an unknown name or number, S102 for an argument that
the verb does not take (`arguments.py`) or where the verb is not legal. The docstrings of all verbs
end in this.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.errors import ScheduleError, illegal
from tilewright.ir.atoms import Atom
from tilewright.ir.nodes import Access, For, LoopKind, Nest, Program, Stmt
from tilewright.ir.rewrite import map_bodies, statements, walk
from tilewright.schedule import arguments as rule
from tilewright.schedule import loops, programs, staging
from tilewright.schedule.arguments import A_NAME, AN_ATOM, FAR, NAMES, NEAR, TWO_NAMES, takes
from tilewright.schedule.tree import clash, computes, has_loop, unknown
from tilewright.target import Target

Nests = tuple[int, ...] | None
NUMBER = rule.integer(0, FAR)  # of a nest, or of steps
KIND = rule.one_of(*loops.KINDS)
TAIL = rule.one_of(*loops.TAILS)
SCOPE = rule.one_of(*staging.SCOPES)


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


@dataclass(slots=True, eq=False)
class Session:
    """What all schedules share that were made from one; nothing else of them changes. `lowering`
    takes a program from coordinates to positions; `calls` are the verbs called on any of them, but
    for those that were undone."""

    lowering: Callable[[Program], Program]
    calls: list[Step] = field(default_factory=list)
    last: tuple[Program, Program] | None = None

    def lowered(self, program: Program) -> Program:
        """A program on positions. The last one is kept: a recipe looks at the loops many times
        before its first verb."""
        if self.last is None or self.last[0] is not program:
            self.last = program, self.lowering(program)
        return self.last[1]


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """`program` at the coordinate or position level, after the verbs of `history`."""

    program: Program
    session: Session = field(compare=False)
    target: Target
    history: tuple[Step, ...] = ()
    selected: Nests = None
    before: Schedule | None = field(default=None, compare=False)

    # -- looking ---------------------------------------------------------------------------------

    @property
    def nests(self) -> tuple[Nest, ...]:
        """The nests of the lowered program, in order; `on(n)` selects by this number."""
        return self.lowered.program.nests

    @property
    def lowered(self) -> Schedule:
        """This schedule at the position level."""
        if self.program.level == "positions":
            return self
        return replace(self, program=self.session.lowered(self.program))

    @property
    def first(self) -> Schedule:
        """The schedule that no verb has changed yet."""
        s = self
        while s.before is not None:
            s = s.before
        return s

    @property
    def loops(self) -> list[str]:
        """The names of all loops, outermost first, each once."""
        loops = (x for n in self.nests for x in statements(n.body, For))
        return list(dict.fromkeys(f.name for f in loops))

    @property
    def rows(self) -> str:
        """The loop over the rows of the first sparse operand, or of its blocks, as a name for
        verbs: one schedule fits csr (`i`), hyb (`i_p`) and bsr (`i_o`). Raises
        ScheduleError[S101]."""
        reads = (x for a in self.first.program.body for x in walk(a.value, Access))
        rows = next((x.coords[0] for x in reads if x.tensor.is_sparse), None)
        return self.stored(str(rows))

    def stored(self, axis: str) -> str:
        """The loop over the stored coordinates of an axis, or of its blocks, as a name for verbs,
        whatever the format calls it (`j_p`, `j_o_p`). Raises ScheduleError[S101]."""
        if not self.has(f"outer({axis})"):
            raise self._unknown("stored", axis, f"no loop walks the axis {axis}")
        return f"outer({axis})"

    @property
    def in_place(self) -> bool:
        """Whether elements of an output are updated in memory several times: parts share their
        rows, or the format does not store a row contiguously (coo, csc)."""
        return any(c.in_place for n in self.nests for c in computes(n.body))

    @property
    def shares_rows(self) -> bool:
        """Whether parts of a decomposition update the same elements of an output."""
        return any(n.shared for n in self.nests)

    @takes(nest=NUMBER)
    def format_of(self, nest: int) -> Any:
        """The format that a nest of a decomposition serves, or the only one, or None."""
        part = self._nest(nest).part
        for t in self.program.tensors:
            if t.is_sparse:
                return t.format.formats[max(part, 0)]
        return None

    @takes(steps=NUMBER)
    def undo(self, steps: int = 1) -> Schedule:
        """The schedule before the last `steps` verbs."""
        s: Schedule = self
        for _ in range(steps):
            if s.before is None:
                raise illegal("there is nothing to undo", f"{len(self.history)} verbs were called")
            s = s.before
        undone = {id(step) for step in self.history[len(s.history) :]}
        self.session.calls = [step for step in self.session.calls if id(step) not in undone]
        return s

    def __str__(self) -> str:
        steps = "\n".join(f"  {h}" for h in self.history) or "  (as written)"
        return f"schedule for {self.target}\n{steps}\n{self.lowered.program}"

    __repr__ = __str__

    # -- selecting -------------------------------------------------------------------------------

    @takes(nests=rule.several(NUMBER, "numbers of nests"))
    def on(self, *nests: int) -> Schedule:
        """The same schedule with later verbs applied to these nests only."""
        for n in nests:
            self._nest(n)
        return replace(self, selected=nests)

    def _nest(self, number: int) -> Nest:
        nests = self.nests
        if number >= len(nests):
            raise unknown(f"no nest {number}", f"nests: 0 … {len(nests) - 1}")
        return nests[number]

    @takes()
    def everywhere(self) -> Schedule:
        """The same schedule with later verbs applied to all nests."""
        return replace(self, selected=None)

    # -- verbs on coordinates --------------------------------------------------------------------

    @takes(output=A_NAME, axes=NAMES)
    def order_axes(self, output: str, *axes: str) -> Schedule:
        """Reorder the loops of one statement.

        before: for i … for k … for j …: Y[i, k] = sum(A[i, j] * X[j, k] over j)
        after:  for k … for i … for j …                      (order_axes("out", "k", "i", "j"))

        A level stays inside the levels above it, whatever order is asked for."""
        return self._coords(programs.order_axes, output, *axes)

    @takes(temporary=A_NAME, loop=A_NAME, scope=rule.one_of("row", "global"), most=NUMBER)
    def compute_at(self, temporary: str, loop: str, scope: str = "row", most: int = 0) -> Schedule:
        """Compute a temporary inside the loop of an index of the statement that reads it: one
        launch, nothing is computed twice, and of the temporary exists what one iteration needs.

        before: for i: for j in A[i, :]: score[i, j] = sum(Q[i, k] * K[j, k] over k)
                for i: for c: for j in A[i, :]: out[i, c] = sum(score[i, j] * V[j, c] over j)
        after:  for i                                                (compute_at("score", "i"))
                  alloc score: row[number of entries of row i]
                  for j in A[i, :]: score[j] = sum(Q[i, k] * K[j, k] over k)
                  for c: for j in A[i, :]: out[i, c] = sum(score[j] * V[j, c] over j)

        A reduction at the index that it reduces over is updated in the loop of its reader. A
        maximum so placed is read before it is complete (the online softmax): readers inside take
        exp(x - maximum) of its own terms x, and sums of that are rescaled whenever it grows.
        Several elements are a row: on a CPU memory of the unit, on a GPU shared memory, or
        registers if all loops over it are unrolled. If its length is not constant, a GPU keeps the
        first `most` elements (of blocks: those of whole blocks, one at least) there, the others in
        a global array, as scope `"global"` does all."""
        return self._coords(programs.compute_at, temporary, loop, scope, most)

    @takes(output=A_NAME)
    def merge_sums(self, output: str) -> Schedule:
        """Compute all sums over the same axes that one statement reads in one loop; also a sum that
        several elements share, which each of them then computes for itself.

        before: for i in 0:m                after:  for i in 0:m
                  s = sum(f(X[i, k]))                 for j in 0:n
                  for j in 0:n                          Y[i, j] = g(sum(X[i, k] * W[j, k]), s)
                    Y[i, j] = g(sum(…), s)                where s = sum(f(X[i, k])), same loop

        Threads then share no result, and X is read once: for statements with few elements a CTA."""
        return self._coords(programs.merge_sums, output)

    @takes(structure=A_NAME)
    def fuse_axes(self, structure: str) -> Schedule:
        """Walk the two axes of a sparse matrix in one loop over its entries; a binary search in
        indptr yields the row of an entry.

        before: for i in 0:m                       after:  for ij in 0:nnz
                  for j_p in ptr[i]:ptr[i+1]                 let i = find_last(ij in ptr)
                    let j = idx[j_p]                         let j = idx[ij]"""
        return self._coords(programs.fuse_axes, structure)

    @takes(dim=A_NAME, size=rule.integer(1, rule.INT64_MAX))
    def specialize(self, dim: str, size: int) -> Schedule:
        """Fix the size of a dimension, so that loops over it have constant extents.

        before: for k in 0:size_d            after:  for k in 0:128         (specialize("d", 128))

        The kernel then refuses (A103) arrays of another size."""
        return self._coords(programs.specialize, dim, size)

    # -- verbs on loops --------------------------------------------------------------------------

    @takes(loop=A_NAME, factor=rule.integer(1, FAR), tail=TAIL, into=rule.optional(TWO_NAMES))
    def split(
        self, loop: str, factor: int, tail: str = "guard", into: tuple[str, str] | None = None
    ) -> Schedule:
        """Split a loop into two; the inner one has `factor` iterations.

        before: for i in 0:n                after:  for i_o in 0:ceil(n/8)
                  S(i)                                for i_i in 0:8
                                                        if i_o*8 + i_i < n: S(i_o*8 + i_i)

        `tail` handles a range that is no multiple of `factor`: `"guard"` tests each iteration,
        `"cut"` adds a loop `i_t` for the rest, `"exact"` requires a known multiple."""
        return self._loops(loops.split, loop, factor, tail=tail, into=into, new_names=True)

    @takes(outer=A_NAME, inner=A_NAME, into=A_NAME)
    def fuse(self, outer: str, inner: str, into: str = "") -> Schedule:
        """Fuse two loops, one directly inside the other, into one.

        before: for i in 0:n                after:  for ij in 0:n*m
                  for j in 0:m                        S(ij / m, ij % m)
                    S(i, j)"""
        return self._loops(loops.fuse, outer, inner, into=into, new_names=True)

    @takes(order=NAMES)
    def reorder(self, *order: str) -> Schedule:
        """Reorder nested loops; lets and guards move as far out as they can.

        before: for i in 0:n                after:  for j in 0:m
                  for j in 0:m                        for i in 0:n
                    S(i, j)                             S(i, j)

        Refused where the range of a loop would depend on a loop inside it, and where the nest
        branches between the loops."""
        return self._loops(loops.reorder, *order)

    @takes(loop=A_NAME, into=A_NAME)
    def reverse(self, loop: str, into: str = "") -> Schedule:
        """Run a loop from its last iteration to its first. Units of a launch start in the order
        of their loops: where the last ones have most work, starting them first balances the end.

        before: for i in 0:n                after:  for i_back in 0:n
                  S(i)                                S(n - 1 - i_back)"""
        return self._loops(loops.reverse, loop, into=into, new_names=True)

    @takes(loop=A_NAME, to=KIND)
    def bind(self, loop: str, to: LoopKind) -> Schedule:
        """Set how a loop runs.

        before: for i in 0:n                after:  for i in 0:n   # parallel

        `parallel`, `cta.x`, `cta.y`: its iterations are units of the launch. `thread.x`,
        `thread.y`: the threads of a CTA. `vector`: the lanes of a register. `unroll`: written out.
        A loop that reduces may be a vector or threads (there is one accumulator an iteration,
        joined in a fixed order at the end), not units."""
        return self._loops(loops.bind, loop, to)

    @takes(loop=A_NAME)
    def parallel(self, loop: str) -> Schedule:
        """Run the iterations of a loop as units of the launch: `bind(loop, "parallel")`."""
        return self._loops(loops.bind, loop, "parallel")

    @takes(loop=A_NAME)
    def vectorize(self, loop: str) -> Schedule:
        """Run a loop as the lanes of a register: `bind(loop, "vector")`."""
        return self._loops(loops.bind, loop, "vector")

    @takes(loop=A_NAME, factor=rule.integer(0, NEAR))
    def unroll(self, loop: str, factor: int = 0) -> Schedule:
        """Write out a loop of constant extent; with `factor`, only hint the compiler to unroll by
        it.

        before: for u in 0:2                after:  S(0); S(1)
                  S(u)"""
        return self._loops(loops.unroll, loop, factor)

    @takes(loop=A_NAME)
    def rfactor(self, loop: str) -> Schedule:
        """Give each iteration of a reducing loop its own accumulator; they are combined after the
        loop.

        before: for p_i in 0:4              after:  for p_i in 0:4
                  acc += x[p_i]                       acc[p_i] += x[p_i]
                                                    Y = ((acc[0] + acc[1]) + acc[2]) + acc[3]"""
        return self._loops(loops.rfactor, loop)

    @takes(output=A_NAME)
    def atomic(self, output: str) -> Schedule:
        """Make the in-place updates of an output atomic, so that several units may share its rows.
        The order of the sums, and with it the last bits, is then not fixed.

        before: Y[i, k] = sum(…) in place          after:  Y[i, k] = sum(…) in place atomic"""
        missing = output, f"no output {output!r} is updated in place"
        return self._loops(loops.atomic, output, missing=missing)

    @takes(rows=A_NAME, cols=A_NAME, depth=A_NAME, atom=rule.optional(AN_ATOM))
    def mma(self, rows: str, cols: str, depth: str, atom: Atom | None = None) -> Schedule:
        """Turn the three innermost loops of a matrix product into one tile operation.

        before: for i in 0:16                       after:  C[…] += mma(A tile, B tile)
                  for j in 0:8
                    for k in 0:16
                      C[i, j] = sum(A[i, k] * B[k, j] over k)

        Extents 16, 8, 16 or 16, 16, 16 of float16 or bfloat16 operands; 16, 8, 8 of float32
        operands, which are rounded to tf32 (10 bits of mantissa). The sums are float32. Where there
        are few rows the columns of the output can be the rows of the tile: mma("j", "i", "k").
        `atom`: an operation of yours. Statements that share loops of the tile are computed one tile
        after the other; their values stay in registers, and are rounded as operands."""
        return self._loops(loops.mma, rows, cols, depth, atom=atom)

    @takes(buffer=A_NAME, loop=A_NAME, ahead=rule.integer(1, NEAR))
    def prefetch(self, buffer: str, loop: str, ahead: int) -> Schedule:
        """Prefetch what a loop reads of `buffer`, `ahead` iterations early. Where the loop walks
        stored positions, these are the rows that it gathers.

        before: for n in 0:size_n                 after:  for n in 0:size_n
                  for k in 0:size_k                         let n_ahead = min(n + 8, size_n - 1)
                    y[n] = sum(… W[n, k] …)                 for k in 0:size_k
                                                              prefetch W[n_ahead, k]
                                                              y[n] = sum(… W[n, k] …)

        before: for j_p in ptr[i]:ptr[i+1]        after:  for j_p in ptr[i]:ptr[i+1]
                  let j = idx[j_p]                          let j = idx[j_p]
                  Y[i, k] = sum(… X[j, k] …)                let j_ahead = idx[min(j_p + 16, last)]
                                                            prefetch X[j_ahead, k]
                                                            Y[i, k] = sum(… X[j, k] …)

        The prefetch of a gather continues beyond the end of a row: the next row needs those
        entries. Apply it last on a nest: other verbs do not look past a prefetch."""
        missing = loop, f"no loop {loop!r} reads {buffer!r}"
        return self._loops(loops.prefetch, buffer, loop, ahead, missing=missing, new_names=True)

    # -- verbs that add memory ----------------------------------------------------

    @takes(buffer=A_NAME, loop=A_NAME, scope=SCOPE)
    def cache(self, buffer: str, loop: str, scope: staging.CacheScope = "register") -> Schedule:
        """Copy what one iteration of `loop` reads of an operand to scratch memory first; a gather
        becomes a dense tile.

        before: for j_o in 0:n/8                after:  for j_o in 0:n/8
                  for j_i in 0:8                          alloc X_shared: shared [8, 32]
                    let j = idx[j_o*8 + j_i]              for j_i, k in 0:8, 0:32  # threads
                    for k in 0:32                           X_shared[j_i, k] = X[idx[…], k]
                      Y[i, k] = sum(… X[j, k] …)          sync
                                                          for j_i in 0:8
                                                            for k in 0:32
                                                              Y[i, k] = sum(… X_shared[j_i, k] …)
                                                          sync

        Scratch has a dimension for each loop inside `loop` that the access depends on; their
        extents are constants. `scope`: `"register"`, or `"shared"` by the threads of a CTA, which
        copy together (on a CPU an array of the body). Where a guard would keep an element from
        being read, scratch holds 0. `buffer`: a dense operand, or a sparse one for its values."""
        padding = next((t.fill for t in self.program.tensors if t.name == buffer), 0)

        def cache(body: Stmt, *args: Any) -> tuple[Stmt, int]:
            return staging.cache(body, *args, padding=padding)

        missing = loop, f"no loop {loop!r} reads {buffer!r}"
        return self._loops(cache, buffer, loop, scope, missing=missing, new_names=True)

    @takes(loop=A_NAME, stages=rule.integer(2, staging.MOST_STAGES))
    def pipeline(self, loop: str, stages: int) -> Schedule:
        """Overlap the copies to shared memory that a loop makes with the work on them: they are
        asynchronous, into `stages` buffers, and start `stages` - 1 iterations early.

        before: for k in 0:n                    after:  for e in 0:2
                  S[t] = A[k, t]  # threads               async S[e, t] = A[e, t]; commit
                  sync                                  for k in 0:n
                  … S[t] …                                wait for the copy of k; sync
                  sync                                    async S[(k+2) % 3, t] = A[k+2, t]; commit
                                                          … S[k % 3, t] …

        It comes after `cache(…, "shared")` of all operands. A CPU copies at once."""
        return self._loops(staging.pipeline, loop, stages)

    @takes(output=A_NAME, loop=A_NAME, copies=rule.integer(2, programs.MOST_COPIES))
    def privatize(self, output: str, loop: str, copies: int) -> Schedule:
        """Give an output that is updated in place one copy for each of `copies` groups of
        iterations of an outermost loop. The groups run as units and a last stage adds the copies in
        order: units may share rows, and the sums are the same in each run.

        before: Y[i, k] = 0                    after:  Y.copies[c, i, k] = 0
                for p in 0:nnz                         for c in 0:8  # parallel
                  let i = row[p]                         for p in min(nnz, c*n) : min(nnz, …+n)
                  Y[i, k] = sum(…) in place                Y.copies[c, i, k] = sum(…) in place
                                                       Y[i, k] = Y.copies[0, i, k] + …"""
        if self.selected is not None:
            raise illegal("privatize changes all nests of an output", "everywhere() first")
        program = programs.privatize(self.lowered.program, output, loop, copies)
        return self._recorded(program, Step("privatize", (output, loop, copies)))

    # -- applying and recording --------------------------------------------------------------------

    def _coords(self, verb: Callable[..., Program], *args: Any) -> Schedule:
        if self.program.level != "coordinates":
            raise illegal(f"{verb.__name__} comes before the verbs on loops", "call it first")
        return self._recorded(verb(self.program, *args), Step(verb.__name__, args))

    def _loops(
        self, verb: Callable[..., tuple[Stmt, int]], *args: Any,
        missing: tuple[str, str] | None = None, new_names: bool = False, **options: Any,
    ) -> Schedule:  # fmt: skip
        """Apply a verb to the selected nests. `missing`: the name that no nest has and the message
        that says so (by default, of a loop: the first argument). `new_names`: the verb introduces
        names of loops, which are checked."""
        program, numbers, count = self.lowered.program, itertools.count(), 0

        def applied(body: Stmt) -> Stmt:
            nonlocal count
            number = next(numbers)
            if self.selected is not None and number not in self.selected:
                return body
            body, changed = verb(body, *args, **options)
            count += changed
            if changed and new_names:
                self._check_names(verb.__name__, body)
            return body

        program = map_bodies(program, applied)
        if not count:
            name, why = missing or (args[0], f"no loop is called {args[0]!r}")
            raise self._unknown(verb.__name__, name, why)
        recorded = tuple((k, v) for k, v in options.items() if v)
        step = Step(verb.__name__, args, recorded, self.selected)
        return self._recorded(program, step)

    def _unknown(self, verb: str, name: str, why: str) -> ScheduleError:
        known = self.loops
        near = difflib.get_close_matches(name, known, 1) if name not in known else []
        hint = "".join(f"did you mean {n}? " for n in near) + f"loops: {', '.join(known)}"
        return unknown(f"{verb}: {why}", hint)

    def _check_names(self, verb: str, body: Stmt) -> None:
        name = clash(body, frozenset(t.name for t in self.program.tensors))
        if name is not None:
            hint = "letters, digits and single underscores; a name that nothing around it has"
            raise illegal(f"{verb}: {name!r} is no new name for a loop", hint)

    def _recorded(self, program: Program, step: Step) -> Schedule:
        self.session.calls.append(step)
        return replace(self, program=program, history=(*self.history, step), before=self)

    @takes(loop=A_NAME, nest=rule.optional(NUMBER))
    def has(self, loop: str, nest: int | None = None) -> bool:
        """Whether there is a loop of that name (in one nest)."""
        chosen = self.nests if nest is None else (self._nest(nest),)
        return any(has_loop(n.body, loop) for n in chosen)
