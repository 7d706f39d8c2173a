"""Steps that are launched before the tokens of the step in front are read.

The runner of the CPU runs a step at once; `Late` keeps its tokens back until they are asked for,
as a GPU does, and checks that the engine asks in order and never reads a token it has not got.
`HostSeats` samples in the recorded step, as a GPU does, by the text that the GPU's kernel shares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.serve.sequence import Sequence as Alone

from tilewright.attention.batch import BoundAttention
from tilewright.runtime.pool import address_of, pool
from tilewright.runtime.view import view
from tilewright.serve import engine, sampler
from tilewright.serve.cost import CostModel
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import Seats
from tilewright.serve.scheduler import PENDING, Chunk, work_of
from tilewright.serve.weights import ModelFile, open_model
from tilewright.toolchain import compilers, cxx


@pytest.fixture(scope="module")
def tiny(runnable_path: Path) -> ModelFile:
    return open_model(runnable_path)


class Late:
    """Runs steps, and counts those that were launched while one in front had not been read."""

    def __init__(self, engine: Engine) -> None:
        self.run_now, self.unread = engine.runner.run, 0
        self.ahead = self.launched = self.mixed = 0  # mixed: of those ahead, beside answers
        self.rows: list[list[Request]] = []
        engine.runner.run = self.run
        engine.runs_ahead = True

    def run(self, chunks: Sequence[Chunk]) -> Any:
        answers = [c for c in chunks if not c.is_prompt]
        pending = [c.request.tokens[c.start] == PENDING for c in answers]
        if self.unread:  # no prompt of the step in front ended, and it has the same answers
            assert self.unread == 1 and all(pending)
            assert [c.request for c in answers] == self.rows[-1]
        else:
            assert not any(pending)
        for c in chunks:
            assert not c.is_prompt or PENDING not in c.request.tokens
        self.rows.append([c.request for c in chunks if c.wants_token])
        ahead, self.unread = self.unread, 0
        logits = self.run_now(chunks)
        self.unread = ahead + 1
        self.launched, self.ahead = self.launched + 1, self.ahead + ahead
        self.mixed += ahead * (0 < len(answers) < len(chunks))
        return LateLogits(self, logits)


class LateLogits:
    """Logits that know whether the engine has waited for them."""

    def __init__(self, runner: Late, logits: Any) -> None:
        self.runner, self.logits, self.is_read = runner, logits, False
        self.requests, self.left = logits.requests, logits.left
        self.groups = logits.groups

    def wait(self) -> None:
        self.runner.unread -= not self.is_read
        self.is_read = True
        self.logits.wait()
        self.tokens = self.logits.tokens

    def row(self, i: int) -> np.ndarray:
        assert self.is_read and self.runner.unread == 0, "another step has overwritten the logits"
        return self.logits.row(i)


STEP = """
extern "C" __attribute__((visibility("default"))) void step(const void* params, int64_t, int64_t) {
  const SampleParams& p = *static_cast<const SampleParams*>(params);
  for (int64_t i = 0; i < COUNT; ++i) {
    SampleRow& row = p.rows[i];
    if (row.size == 0) continue;
    stage0(&row, 0, 1);
    int32_t count;
    sample::advance(sample::Thread{nullptr, nullptr, nullptr, &count}, row);
    p.drawn[i] = row.token;
    if (row.token >= 0) p.tokens[i] = row.token;
  }
}
"""


class HostSeats(Seats):
    """Samples the rows of a recorded step on the CPU."""

    def bind(self, count: int) -> Any:
        text = f"#include <stdint.h>\nconstexpr int COUNT = {count};\n"
        text += sampler.source("sample_cpu.h") + STEP
        library = cxx.load_cpp(text, name="seats", isa=compilers.resolve_isa().name)
        tokens = view(self._tokens).pointer
        self.keep = [*getattr(self, "keep", []), library]
        block = sampler.PARAMS.pack(
            rows=view(self._rows).pointer, scores=0, tokens=tokens,
            drawn=tokens + 4 * self._tokens.shape[1],
        )  # fmt: skip
        self.keep.append(block)
        return HostLaunch((address_of(library.step), ctypes.addressof(block), 1, 1, False))


class HostLaunch:
    """A launch that can also be called by itself."""

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __call__(self) -> None:
        pool().prepare([self.launch])()


def sampling_in_the_step(engine: Engine) -> None:
    runner = engine.runner
    most = len(runner.table)
    chosen = runner.last["token"].base
    assert chosen.shape == (2, most)
    runner.seats = HostSeats(engine.model.memory, runner.last["logits"], chosen)


SAMPLED: tuple[dict[str, Any], ...] = (
    {"logprobs": 2, "temperature": 1.0, "seed": 7}, {"temperature": 1.0, "seed": 3},
    {"temperature": 1.5, "top_p": 0.9, "seed": 4}, {"repetition_penalty": 1.3},
    {"temperature": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.7, "seed": 5},
    {"temperature": 1.0, "top_k": 9, "logit_bias": {77: 6.0}, "seed": 6}, {}, {"min_p": 0.1},
)  # fmt: skip


def sampled_jobs(end: int) -> list[tuple[list[int], Sampling]]:
    """Those of `jobs` with other ways to choose a token."""
    made = [(p, {"max_tokens": how.max_tokens, "stop": how.stop}) for p, how in jobs(end)]
    return [(p, Sampling(**o, **how)) for (p, o), how in zip(made, SAMPLED, strict=True)]


def jobs(end: int) -> list[tuple[list[int], Sampling]]:
    rng = np.random.default_rng(end)
    made = []
    for i, count in enumerate((1, 30, 17, 48, 5, 64, 33, 16)):
        options: dict[str, Any] = {"max_tokens": 12 + 9 * (i % 4)}
        if i == 5:
            options |= {"temperature": 1.0, "seed": 3}
        if i == 6:
            options |= {"stop": ["a"]}
        made.append((rng.integers(3, 260, count).tolist(), Sampling(**options)))
    return made


def answers(engine: Engine, made: list[tuple[list[int], Sampling]], interval: int) -> list[Request]:
    """One comes every `interval` steps; the fourth is left after five tokens."""
    requests: list[Request] = []
    for step in range(2000):
        if step % interval == 0 and len(requests) < len(made):
            requests.append(engine.submit(*made[len(requests)]))
        engine.step()
        if len(requests) > 3 and requests[3].answered >= 5:
            engine.cancel(requests[3])
        if len(requests) == len(made) and all(r.finish for r in requests):
            engine.step()
            assert engine.scheduler.pages.held == 0 and not engine.scheduler.has_work
            return requests
    raise AssertionError("not done")


SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared pages": {"share": True},
    "preempted": {"kv_tokens": 176, "share": True},
    "few seats": {"running": 2},
}


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize(
    ("name", "interval"), [("plain", 1), ("shared pages", 7), ("preempted", 1), ("few seats", 7)]
)
def test_tokens_are_those_of_steps_in_turn(
    tiny: ModelFile, name: str, interval: int, in_step: bool
):
    """End tokens, lengths, stop texts, a cancel and preemption; sampling on the host, and in the
    step."""
    sizes: dict[str, Any] = {"context": 128, "share": False} | SIZES[name]
    options = Options(**sizes)
    engine, plain = Engine(tiny, "cpp", options), Engine(tiny, "cpp", options)
    made = sampled_jobs(1) if in_step else jobs(1)
    if in_step:
        sampling_in_the_step(engine)
    wanted = answers(plain, made, interval)
    said = [r.answer for r in wanted if r.answered > 15]
    late = [a[n] for a in said for n in range(9, 15) if a[n] not in a[:n]]
    ends = {late[0], late[-1]}  # end tokens in the middle of answers
    for one in (engine, plain):
        one.tokenizer.ends = ends
    wanted, runner = answers(plain, made, interval), Late(engine)
    for one, other in zip(wanted, answers(engine, made, interval), strict=True):
        if one.finish != "cancel":
            assert (other.answer, other.finish) == (one.answer, one.finish)
            assert other.logprobs == one.logprobs
            assert "".join(other.pieces) == "".join(one.pieces) and other.counts == one.counts
        else:
            assert other.answer[:5] == one.answer[:5] and other.finish == "cancel"
    assert {r.finish for r in wanted} == {"stop", "length", "cancel"}
    assert runner.unread == 0 and runner.ahead > 6


def test_steps_that_sample_are_launched_ahead(tiny: ModelFile):
    """All but the first of some requests that need nothing else of the host, one of them greedy:
    rows are written once."""
    engine = Engine(tiny, "cpp", Options(context=128, share=False))
    sampling_in_the_step(engine)
    wanted = Engine(tiny, "cpp", Options(context=128, share=False))
    made = [job for job in sampled_jobs(1) if job[1].logprobs is None]
    made = [(p, replace(how, max_tokens=30, stop=(), ignore_eos=True)) for p, how in made]
    late, said = Late(engine), [wanted.submit(*job) for job in made]
    requests = [engine.submit(*job) for job in made]
    for one, of in ((engine, requests), (wanted, said)):
        while not all(r.finish for r in of):
            one.step()
    assert [r.answer for r in requests] == [r.answer for r in said]
    assert late.ahead == 29 and set(engine.runner._sampling) == {7} and not engine.runner._steps


def test_a_late_stop_costs_one_token(tiny: ModelFile):
    """A request alone: as many steps as tokens, and one more, whose token is dropped."""
    engine, made = Engine(tiny, "cpp", Options(context=128, share=False)), jobs(2)[:1]
    long = engine.submit(made[0][0], Sampling(max_tokens=40, ignore_eos=True))
    while not long.finish:
        engine.step()
    runner, counts = Late(engine), []
    for end in (None, next(n for n in range(9, 40) if long.answer[n] not in long.answer[:n])):
        engine.tokenizer.ends = set() if end is None else {long.answer[end]}
        runner.launched = 0
        request = engine.submit(made[0][0], Sampling(max_tokens=40))
        while not request.finish:
            engine.step()
        assert request.answer == long.answer[:end]
        engine.step()
        counts.append((runner.launched, len(request.answer)))
    (of_length, length), (of_stop, stop) = counts
    assert of_length == length + 1 == 41  # the one behind the last
    assert of_stop == stop + 2  # the end token itself, and the one behind it


@pytest.mark.parametrize("options", [{}, SAMPLED[4]], ids=str)
def test_an_interrupt_in_flight_leaves_no_trace(tiny: ModelFile, options: dict[str, Any]):
    """A launch that fails while a step is under way: both requests go on with the right tokens."""
    how = Sampling(max_tokens=30, ignore_eos=True, **options)
    sizes = Options(context=128, share=False)
    engine = Engine(tiny, "cpp", sizes)
    sampling_in_the_step(engine)
    prompts = [p for p, _ in jobs(3)[1:3]]
    wanted = answers_of(Engine(tiny, "cpp", sizes), prompts, how)
    late = Late(engine)
    requests = [engine.submit(p, how) for p in prompts]
    run, failures = late.run, iter([False] * 9 + [True] + [False] * 7 + [True] + [False] * 200)

    def failing(chunks: Sequence[Chunk]) -> Any:
        if next(failures):
            late.unread = 0
            raise KeyboardInterrupt
        return run(chunks)

    engine.runner.run = failing
    assert interrupts(engine, requests) == 2
    assert [r.answer for r in requests] == wanted


@pytest.mark.parametrize("options", [{}, SAMPLED[4]], ids=str)
def test_an_exception_behind_a_launch(tiny: ModelFile, options: dict[str, Any]):
    """The text of one answer fails while the next step is under way: that token is read again, and
    so are those of the requests behind it."""
    how = Sampling(max_tokens=30, ignore_eos=True, **options)
    sizes = Options(context=128, share=False)
    engine = Engine(tiny, "cpp", sizes)
    sampling_in_the_step(engine)
    prompts = [p for p, _ in jobs(3)[1:4]]
    wanted = answers_of(Engine(tiny, "cpp", sizes), prompts, how)
    engine.runs_ahead = True
    requests = [engine.submit(p, how) for p in prompts]
    push, calls = requests[1].text.push, iter(range(1000))

    def failing(token: int) -> str:
        if next(calls) in (5, 6, 20):
            requests[1].tokens.pop()  # the engine appends it in front of its text
            requests[1].counts[token] -= 1
            raise KeyboardInterrupt
        return push(token)

    requests[1].text.push = failing
    assert interrupts(engine, requests) == 3
    assert [r.answer for r in requests] == wanted


def test_all_steps_share_partial_results_of_attention(tiny: ModelFile):
    """All layers of all batches: one array, and one more for each batch that needs a larger one."""
    engine = Engine(tiny, "cpp", Options(context=128, share=False))
    answers(engine, jobs(1), 7)
    steps = engine.runner._steps
    shared: dict[int, set[Any]] = {
        n: {b.boxes[1][-2:] for b in step.keep if isinstance(b, BoundAttention)}
        for n, step in steps.items()
    }
    assert len(steps) > 1 and len({len(s.keep) for s in steps.values()}) == 1
    assert all(len(boxes) == 1 for boxes in shared.values())
    addresses = [view(array).pointer for array in engine.runner.scratch.arrays]
    assert shared[max(steps)] == {tuple((a, a + 4) for a in addresses)}


def interrupts(engine: Engine, requests: list[Any]) -> int:
    """Steps until all requests have ended; how many of the steps were interrupted."""
    count = 0
    while not all(r.finish for r in requests):
        try:
            engine.step()
        except KeyboardInterrupt:
            count += 1
    return count


def answers_of(engine: Engine, prompts: list[list[int]], how: Sampling) -> list[list[int]]:
    requests = [engine.submit(p, how) for p in prompts]
    while not all(r.finish for r in requests):
        engine.step()
    return [r.answer for r in requests]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("windowed", [(True, True), (True, False)])
def test_pages_behind_a_window_serve_others(
    tiny: ModelFile, windowed: tuple[bool, ...], ahead: bool, share: bool
):
    """Answers that without a window would be longer than the pool together are the tokens that each
    has alone. Free pages hold NaN between the steps."""
    file = replace(tiny, config=replace(tiny.config, windowed=windowed, window=21))
    stem = np.random.default_rng(0).integers(3, 260, 50).tolist()
    prompts = [stem[:n] for n in (9, 50, 3, 37, 50, 21)]
    wanted = []
    for prompt in prompts:
        alone = Alone(file, context=128)
        alone.prefill(prompt)
        tokens = [alone.greedy()]
        while len(tokens) < 70:
            tokens.append(alone.decode(tokens[-1]))
        wanted.append(tokens)
    engine = Engine(file, "cpp", Options(context=128, kv_tokens=160, step_tokens=40, share=share))
    late = Late(engine) if ahead else None
    how = Sampling(max_tokens=70, ignore_eos=True)
    requests = [engine.submit(prompt, how) for prompt in prompts]
    pages, longest = engine.scheduler.pages, 0
    while not all(r.finish for r in requests):
        engine.step()
        longest = max(longest, sum(len(r.pages) for r in engine.scheduler.running))
        for layer in (*engine.runner.keys, *engine.runner.values):
            layer[pages.free] = np.nan
    assert [r.answer for r in requests] == wanted
    assert longest > (1.5 if all(windowed) else 1) * pages.count
    assert engine.scheduler.pages.held == 0
    assert late is None or late.ahead > 50


class Clock:
    """A GPU whose steps take what the cost says, some `slow` times as much, and a host that takes
    0.3 ms for each, and `pause` more where the GPU waits for it; what the engine reads instead of
    `time`."""

    def __init__(
        self, engine: Engine, rng: np.random.Generator, slow: float = 1.6, pause: float = 0.0
    ) -> None:
        self.engine, self.rng, self.now, self.free = engine, rng, 1.0, 0.0
        self.model, self.slow, self.pause = engine.scheduler.model, slow, pause
        self.last: dict[Request, float] = {}
        engine.runner.run = self.run

    def perf_counter(self) -> float:
        return self.now

    def run(self, chunks: Sequence[Chunk]) -> Any:
        self.now += 3e-4 + self.pause * (self.now >= self.free)
        slow = self.rng.choice([1.0, 1.0, 1.0, self.slow])
        seconds = self.model.seconds(work_of(chunks)) * slow
        self.free = max(self.now, self.free) + seconds
        requests = [c.request for c in chunks if c.wants_token]
        return Unread(self, requests, self.free)


class Unread:
    left = ()
    groups = SimpleNamespace(nodes=())

    def __init__(self, clock: Clock, requests: list[Request], end: float) -> None:
        self.clock, self.requests, self.end = clock, requests, end
        self.tokens = [5] * len(requests)

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.end)

    def row(self, i: int) -> np.ndarray:
        return np.zeros(4)


@pytest.mark.parametrize("ahead", [False, True])
def test_late_tokens_are_those_of_long_gaps(
    monkeypatch: pytest.MonkeyPatch, tiny: ModelFile, ahead: bool
):
    """Also where steps are committed when they are launched: by when their tokens come."""
    one, clock = timed_engine(monkeypatch, tiny, 1.6)
    one.runs_ahead = ahead
    gaps = gaps_of(one, clock, 60)
    late = sum(gap > 0.02 for gap in gaps)
    assert one.scheduler.late == late and 0 < late < len(gaps) / 2


def timed_engine(
    monkeypatch: pytest.MonkeyPatch, tiny: ModelFile, slow: float, pause: float = 0.0
) -> tuple[Engine, Clock]:
    file = replace(tiny, config=replace(tiny.config, context=500))
    options = Options(context=500, running=16, step_tokens=512, share=False, invariant=False)
    one = Engine(file, "cpp", options)
    one.scheduler.model = CostModel(step=0.007, prompt=25e-6, answer=1e-5)
    clock = Clock(one, np.random.default_rng(3), slow, pause)
    monkeypatch.setattr(engine, "time", clock)
    return one, clock


def gaps_of(one: Engine, clock: Clock, requests: int) -> list[float]:
    """The gaps between tokens of random requests, of which each is promised at most 20 ms."""
    rng, gaps = clock.rng, list[float]()
    for _ in range(requests):
        own = {"max_tokens": int(rng.integers(5, 40)), "itl_ms": 20.0, "ttft_ms": 1e6}
        how = Sampling(ignore_eos=True, best_effort=True, **own)
        one.submit([3] * int(rng.integers(20, 400)), how)
    while one.scheduler.has_work:
        for request in one.step():
            if request in clock.last:
                gaps.append(clock.now - clock.last[request])
            clock.last[request] = clock.now
    return gaps


def test_a_step_that_a_gpu_waits_for_is_given_less_time(
    monkeypatch: pytest.MonkeyPatch, tiny: ModelFile
):
    """4 ms pass in front of such a step: the engine measures them, plans so much less, and does not
    take the steps of the GPU for slower than they are."""
    one, clock = timed_engine(monkeypatch, tiny, 1.0, pause=0.004)
    one.runs_ahead, run, waited = True, one.runner.run, [0, 0]

    def counted(chunks: Sequence[Chunk]) -> Any:
        waited[int(clock.now < clock.free)] += 1
        return run(chunks)

    one.runner.run = counted
    gaps = gaps_of(one, clock, 30)
    assert max(gaps) > 0.02  # until it is known
    assert max(gaps_of(one, clock, 60)) < 0.02 and min(waited) > 50
    assert one.scheduler.pause == pytest.approx(0.0043, rel=0.1)
    assert one.scheduler.model.factors == pytest.approx((1, 1), rel=0.02)
    answered = one.submit([3] * 20, Sampling(max_tokens=9, itl_ms=20, ttft_ms=1e6))
    while answered.answered < 2:
        one.step()
    waiting = one.submit([3] * 20, Sampling(ttft_ms=1e6))
    idle, ahead = (one.scheduler.state(clock.now, x) for x in (False, True))
    assert ahead.due - idle.due == pytest.approx(one.scheduler.pause)
    assert ahead.waiting[0].due - idle.waiting[0].due == pytest.approx(one.scheduler.pause)
    assert ahead.waiting[0].due == pytest.approx(waiting.due - clock.now)
