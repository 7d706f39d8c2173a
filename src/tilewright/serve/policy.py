"""The policy: what the next step does, by predicted time.

    decision = decide(state, model)

`State` is all that a decision depends on, `Decision` what comes of it; both are frozen values whose
`repr` builds them again, so that a decision can be replayed anywhere. Steps are of five kinds:
*idle* (nothing), *decode* (a token of every answer), *hybrid* (these, and chunks of prompts),
*prefill* (chunks where nothing is answered), *preempt* (a running request gives up its pages; then
the policy decides again).

1. A step has a token of every answer, and ends before the next one of any is due. Prompts get the
   time that is left.
2. Of the promised first tokens as many as can be are kept (Moore, 1968: by due time; whenever one
   would be late, the longest so far gives way). Those that will be late come last, with requests
   without a promise.
3. A prompt that got nothing for `STARVED` steps gets one quantum before all others, even where that
   breaks a promise.
4. A request is admitted where its pages fit and answers beside it could keep their gaps, or once
   it has waited so long that its rank has grown.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from tilewright.serve.cost import CostModel, Work

SAFETY = 0.86  # of a promised time may be planned (docs/design/serving.md, *Scheduling*)
STARVED = 8  # steps


class Prompt(NamedTuple):
    """A prompt that is being processed or waits to be admitted. `left`: tokens still to process,
    from position `start` on; `due`: seconds from now until its first token is promised; `gap`:
    seconds promised between later tokens; `age`: steps since it last got tokens or was queued;
    `rank`: its `priority`, raised by waiting; `pages`: that it needs to be admitted (0: it runs).
    """

    id: int
    start: int
    left: int
    due: float = inf
    gap: float = inf
    age: int = 0
    priority: int = 0
    rank: int = 0
    pages: int = 0

    @property
    def is_starved(self) -> bool:
        return self.age >= STARVED and not self.pages


@dataclass(frozen=True, slots=True)
class State:
    """What a step can choose from, and its limits.

    `answers`: requests being answered, `context`: keys their next step reads, `due`: seconds until
    the first of their next tokens is due, `gap`: smallest gap promised to any running request,
    `growth`: pages they need now. `pages`: available; `seats`: for more requests; `worst`: rank and
    id of the running request that is preempted first; `block`: pages of the same tokens.
    """

    step_tokens: int
    quantum: int
    pages: int
    seats: int
    answers: int = 0
    context: int = 0
    due: float = inf
    gap: float = inf
    growth: int = 0
    worst: tuple[int, int] | None = None
    block: int = 1
    prompts: tuple[Prompt, ...] = ()
    waiting: tuple[Prompt, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A step: its kind, tokens of prompts by id, ids to admit first, the id to preempt (-1: none),
    and its predicted seconds."""

    kind: str
    chunks: tuple[tuple[int, int], ...] = ()
    admit: tuple[int, ...] = ()
    preempt: int = -1
    seconds: float = 0.0

    def __str__(self) -> str:
        words = [self.kind, *(f"{i}:{tokens}" for i, tokens in self.chunks)]
        words += [f"+{i}" for i in self.admit] + [f"-{self.preempt}"] * (self.preempt >= 0)
        return " ".join([*words, f"{1e3 * self.seconds:.2f} ms"] if self.seconds else words)


def decide(state: State, model: CostModel) -> Decision:
    """The next step; pure."""
    if state.worst is not None and _must_preempt(state, state.worst[0]):
        return Decision("preempt", preempt=state.worst[1])
    order = _order(state, model)
    admit = _admit(state, order, model)
    order = [p for p in order if not p.pages or p.id in admit]
    known = [p for p in order if p.left <= 0]  # prompts that are answered at once
    answers = Work(state.answers + len(known), state.context + sum(p.start + 1 for p in known))
    order = [p for p in order if p.left > 0]
    limit = SAFETY * state.due if answers.answers else inf
    chunks, work = _fill(state, order, answers, limit, model)
    kinds = ("decode", "hybrid") if work.answers else ("idle", "prefill")
    return Decision(kinds[bool(chunks)], chunks, admit, seconds=model.seconds(work))


def _must_preempt(state: State, least_rank: int) -> bool:
    """Whether answers lack pages, or the most urgent waiting request lacks a seat or pages that one
    of a lower rank has."""
    urgent = min(state.waiting, key=lambda p: (-p.priority, p.id), default=None)
    return state.growth > state.pages or (
        urgent is not None and least_rank < urgent.priority and not _fits(state, urgent, 0, 0)
    )


def _fits(state: State, p: Prompt, admitted: int, taken: int) -> bool:
    """Whether there are a seat and pages for a request, and a block more for each running one."""
    running = state.answers + len(state.prompts) + admitted
    return admitted < state.seats and state.pages - taken >= p.pages + running * state.block


def _order(state: State, model: CostModel) -> list[Prompt]:
    by_due = sorted([*state.prompts, *state.waiting], key=lambda p: (-p.rank, p.due, p.id))
    promised = [p for p in by_due if p.due < inf]
    per_token, clock = _seconds_a_token(state, model) if promised else 0.0, 0.0
    late: set[int] = set()
    kept: list[tuple[int, float, int]] = []  # the first gives way: of the lowest rank, the longest
    for p in promised:
        clock += p.left * per_token
        heappush(kept, (p.rank, -p.left * per_token, p.id))
        while kept and clock > p.due:
            _, seconds, i = heappop(kept)
            clock += seconds
            late.add(i)

    def key(p: Prompt) -> tuple[int, int, float, int]:
        return -p.age if p.is_starved else 0, -p.rank, inf if p.id in late else p.due, p.id

    return sorted(by_due, key=key)


def _seconds_a_token(state: State, model: CostModel) -> float:
    """Of prompts, beside the answers that run now and keep their gaps."""
    tokens = max(state.step_tokens - state.answers, 1)
    work = Work(state.answers, state.context)
    at_once = model.seconds(work.plus(0, tokens))
    alone = model.seconds(work) if state.answers else 0.0
    room = SAFETY * state.gap - alone
    if state.gap == inf or at_once <= SAFETY * state.gap or room <= 0:
        return at_once / tokens
    return state.gap / max(tokens * room / (at_once - alone), 1)


def _admit(state: State, order: Sequence[Prompt], model: CostModel) -> tuple[int, ...]:
    """Ids of waiting requests to admit, as far as a step can read their prompts."""
    admitted: list[int] = []
    taken, gap = 0, state.gap
    backlog = state.answers + sum([p.left for p in state.prompts])
    keys = state.context + sum([p.start + p.left for p in state.prompts])
    rows = Work(state.answers + len(state.prompts), keys)  # once all of them are answered
    for p in order:
        if not p.pages:
            continue
        if backlog >= state.step_tokens or not _fits(state, p, len(admitted), taken):
            break
        more = Work(rows.answers + 1, rows.context + p.start + p.left)
        least = min(gap, p.gap)
        if least < inf and rows.answers and p.rank == p.priority:
            quantum = more.plus(p.start, min(p.left, state.quantum))
            if model.seconds(quantum) > SAFETY * least:
                continue
        admitted.append(p.id)
        rows, gap = more, least
        taken += p.pages
        backlog += p.left
    return tuple(admitted)


def _fill(
    state: State, order: Sequence[Prompt], work: Work, limit: float, model: CostModel
) -> tuple[tuple[tuple[int, int], ...], Work]:
    """Chunks of prompts, in their order, beside `work`: as many tokens as a step takes before
    `limit` seconds. Returns what the step reads, too."""
    chunks: list[tuple[int, int]] = []
    left = state.step_tokens - work.answers
    for p in order:
        tokens = min(p.left, left, state.quantum if p.is_starved else p.left)
        is_forced = p.is_starved and not chunks
        is_late = not is_forced and model.seconds(work.plus(p.start, tokens)) > limit
        if is_late:  # then as many whole quanta as fit
            sizes = range(state.quantum, tokens, state.quantum)
            cost = lambda n, p=p, work=work: model.seconds(work.plus(p.start, n))  # noqa: E731
            tokens = state.quantum * bisect_right(sizes, limit, key=cost)
        if tokens > 0:
            chunks.append((p.id, tokens))
            work = work.plus(p.start, tokens)
            left -= tokens
        if is_late or left <= 0:
            break
    return tuple(chunks), work
