"""Decisions by predicted time: worked by hand on a virtual clock, and invariants of random traces.

In the worked traces a step costs 10 ms, 1 ms a row of an answer and 1 ms a token of a prompt. A
line: the decision, and the milliseconds at which the step began.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from tests.serve.test_scheduler import span
from tests.serve.virtual import token_after

from tilewright.serve import policy
from tilewright.serve.cost import CostModel, Work
from tilewright.serve.policy import SAFETY, STARVED, Decision, Prompt, State, decide
from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Batch, Limits, Scheduler, work_of

PLAINLY = Sampling()
PLAIN = CostModel(step=0.010, answer=0.001, prompt=0.001)
TRACES = 1000 if os.environ.get("TILEWRIGHT_LONG_TESTS") else 100


@dataclass(frozen=True)
class Timed:
    """A request: prompt, tokens of the answer, second of its arrival, how it is served."""

    prompt: list[int]
    answer: int
    at: float = 0.0
    service: Sampling = PLAINLY


@dataclass
class TimedClock:
    """Runs the scheduler; a step takes as long as the model says. `log`: what was decided."""

    limits: Limits
    arrivals: list[Timed]
    model: CostModel
    now: float = 0.0
    log: list[str] = field(default_factory=list)
    states: list[tuple[State, Decision]] = field(default_factory=list)
    times: dict[int, list[float]] = field(default_factory=dict)

    def run(self) -> list[Request]:
        def observed(state: State, model: CostModel) -> Decision:
            decision = decide(state, model)
            self.states.append((state, decision))
            return decision

        scheduler = self.scheduler = Scheduler(self.limits, self.model, observed)
        requests = [
            Request(i, list(a.prompt), replace(a.service, max_tokens=a.answer), a.at)
            for i, a in enumerate(self.arrivals)
        ]
        coming = sorted(requests, key=lambda r: r.arrived)
        while coming or scheduler.has_work:
            if not scheduler.has_work:
                self.now = max(self.now, coming[0].arrived)
            while coming and coming[0].arrived <= self.now:
                scheduler.add(coming.pop(0))
            batch = scheduler.schedule(self.now)
            assert batch.chunks, "a step with work reads nothing"
            self.log.append(f"{1e3 * self.now:.0f}: {batch.decision}")
            self.step(batch)
        return requests

    def step(self, batch: Batch) -> None:
        held = {p for r in self.scheduler.running for p in r.pages}
        assert not held & set(self.scheduler.pages.free), "a page of a running request is free"
        seconds = self.model.seconds(work_of(batch.chunks))
        assert math.isclose(seconds, batch.decision.seconds), (
            work_of(batch.chunks),
            batch.decision,
        )
        self.now += seconds
        for request in self.scheduler.commit(batch, self.now):
            self.times.setdefault(request.id, []).append(self.now)
            request.tokens.append(token_after(request.tokens))
            if request.answered == request.sampling.max_tokens:
                self.scheduler.finish(request, "length")


def promise(itl_ms: float | None = None, ttft_ms: float | None = None) -> Sampling:
    return Sampling(itl_ms=itl_ms, ttft_ms=ttft_ms)


WIDE = Limits(200, running=8, step_tokens=64, share=False, page_size=4)
WORKED = {
    # Without promises a step is as full as it can be.
    "no promise": (
        WIDE, [Timed(span(70), 2), Timed(span(10, 90), 2)],
        ["0: prefill 0:64 +0 74.00 ms", "74: prefill 0:6 1:10 +1 26.00 ms",
         "100: decode 12.00 ms"],
    ),
    # 0.86 · 52 = 44.7 ms are planned: 10 for the step, 1 for the answer, so 33 tokens fit, in
    # quanta of 4: 32. The gaps of request 0 are 43, 43 and 11 ms.
    "a prompt gets what the gap leaves": (
        WIDE, [Timed(span(4), 5, service=promise(52)), Timed(span(80, 90), 1, at=0.014)],
        ["0: prefill 0:4 +0 14.00 ms", "14: hybrid 1:32 +1 43.00 ms", "57: hybrid 1:32 43.00 ms",
         "100: hybrid 1:16 27.00 ms", "127: decode 11.00 ms"],
    ),
    # Request 1 comes second, is due first and goes first.
    "the first that is due goes first": (
        WIDE, [Timed(span(64), 1, service=promise(ttft_ms=400)),
               Timed(span(64, 90), 1, service=promise(ttft_ms=100))],
        ["0: prefill 1:64 +1 74.00 ms", "74: prefill 0:64 +0 74.00 ms"],
    ),
    # 200 tokens cannot be read in 100 ms, at 74/64 ms each: request 0 gives way to 1, which can.
    "one that will be late gives way": (
        WIDE, [Timed(span(200), 1, service=promise(ttft_ms=100)),
               Timed(span(60, 900), 1, service=promise(ttft_ms=150))],
        ["0: prefill 1:60 0:4 +1 +0 74.00 ms", "74: prefill 0:64 74.00 ms",
         "148: prefill 0:64 74.00 ms", "222: prefill 0:64 74.00 ms", "296: prefill 0:4 14.00 ms"],
    ),
    # A gap of 18 ms: 15.48 are planned, 11 of them for the answer, so one quantum fits a step. A
    # second answer would leave none: request 1 is admitted when 0 has ended.
    "no seat where the gap leaves none": (
        WIDE, [Timed(span(4), 3, service=promise(18)),
               Timed(span(4, 90), 2, at=0.014, service=promise(18))],
        ["0: prefill 0:4 +0 14.00 ms", "14: decode 11.00 ms", "25: decode 11.00 ms",
         "36: prefill 1:4 +1 14.00 ms", "50: decode 11.00 ms"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKED)
def test_worked_by_hand(name: str):
    limits, arrivals, wanted = WORKED[name]
    clock = TimedClock(limits, arrivals, PLAIN)
    clock.run()
    assert clock.log == wanted


# ---------------------------------------------------------------------------- random traces


def random_trace(seed: int) -> TimedClock:
    """Few pages, equal beginnings, promises of all sizes, a random model."""
    rng = np.random.default_rng(seed)

    def upto(most: int) -> int:
        return int(rng.integers(1, most + 1))

    size, running, longest = int(rng.choice([2, 4, 16])), upto(6), 8 + upto(80)
    least = -(-longest // size) + 1
    limits = Limits(
        int(rng.integers(least, 4 * least + 2)), running, running + upto(40),
        bool(rng.integers(2)), bool(rng.integers(2)), size,
    )  # fmt: skip
    costs = rng.uniform(0.1, 1, 9) * (5e-3, 3e-3, 5e-4, 1e-5, 1e-3, 5e-6, 1e-3, 1e-3, 1e-4)
    model = CostModel(*map(float, costs), knee=int(rng.choice([0, 8, 64])))
    stems = rng.integers(0, 3, (2, 90)).tolist()
    arrivals = []
    for _ in range(upto(12)):
        count = upto(longest - 1)
        stem = stems[rng.integers(2)][: int(rng.integers(0, count + 1))]
        prompt = stem + rng.integers(0, 3, count - len(stem)).tolist()
        service = Sampling(
            priority=int(rng.choice([0, 0, 0, 1, 5])),
            itl_ms=(None, 12.0, 25.0, 60.0, 200.0)[upto(5) - 1],
            ttft_ms=(None, 30.0, 100.0, 400.0)[upto(4) - 1],
        )
        at = float(rng.uniform(0, 0.5))
        arrivals.append(Timed(prompt, upto(longest - count + 1), at, service))
    return TimedClock(limits, arrivals, model)


@pytest.mark.parametrize("part", range(4))
def test_random_traces(part: int):
    """No gap beyond its promise where steps could keep it, prompts and answers advance, a replay is
    equal to the byte."""
    kept = hard = 0
    for seed in range(part, TRACES, 4):
        clock, again = random_trace(seed), random_trace(seed)
        requests = clock.run()
        again.run()
        assert clock.log == again.log, seed
        for state, decision in clock.states:
            assert max((p.age for p in state.prompts), default=0) <= STARVED + len(state.prompts)
            assert decide(state, clock.model) == decision
        state, decision = clock.states[len(clock.states) // 2]
        names = vars(policy) | {"inf": math.inf}
        assert decide(eval(repr(state), dict(names)), clock.model) == decision
        assert eval(repr(decision), dict(names)) == decision
        promised = [r for r in requests if r.gap < math.inf]
        if is_feasible(clock):
            for r in promised:
                gaps = np.diff(clock.times[r.id])
                assert gaps.size == 0 or gaps.max() <= r.gap, (seed, r.id)
                kept += gaps.size
        else:
            hard += len(promised) > 0
    assert kept > TRACES // 4 and hard > TRACES // 20, "the traces are too easy or too hard"


def is_feasible(clock: TimedClock) -> bool:
    """Whether in each step a row of every answer and a quantum of a prompt fit into the smallest
    promised gap, and no request was preempted."""
    if clock.scheduler.preemptions:
        return False
    for state, _ in clock.states:
        prompt = max((p.start + p.left for p in (*state.prompts, *state.waiting)), default=0)
        work = Work(state.answers + 1, state.context + prompt + 1)
        needed = clock.model.seconds(work.plus(prompt, state.quantum))
        if needed > SAFETY * min(state.gap, *(p.gap for p in state.waiting), math.inf):
            return False
    return True


def test_a_decision_over_many_requests():
    """256 running and 64 waiting requests; what it takes is in docs/design/serving-log.md."""
    rng = np.random.default_rng(0)

    def prompts(first: int, count: int, pages: int) -> tuple[Prompt, ...]:
        left, due = rng.integers(1, 4000, count), rng.uniform(0.1, 2, count)
        return tuple(
            Prompt(first + i, 0, int(left[i]), float(due[i]), 0.05, i + 1, pages=pages)
            for i in range(count)
        )

    state = State(
        2048, 16, 100_000, 8, 248, 248 * 1500, 0.04, 0.04,
        prompts=prompts(0, 8, 0), waiting=prompts(1000, 64, 100),
    )  # fmt: skip
    model = CostModel(6e-3, 1e-3, 2e-6, 4e-8, 0.0, 2e-9, 1e-4, 1e-4, 3e-5, 192)
    decision = decide(state, model)
    assert decision.kind == "hybrid"
    assert model.seconds(Work(248, 248 * 1500)) < decision.seconds <= SAFETY * 0.04
    few = decide(replace(state, due=0.001), model)
    assert few.kind == "hybrid" and len(few.chunks) == 1 and few.chunks[0][1] == 16  # starved
