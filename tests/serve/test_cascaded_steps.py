"""Cascaded steps: logits as of steps in which each answer reads its keys alone.

`Both` runs each step of an engine on a second, flat runner with a cache of its own, and compares.
Groups pay from one page on here.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture
from tests.runtime.test_step import missing
from tests.serve.test_ahead import sampling_in_the_step
from tests.serve.test_decode_step import A_LAYER, AROUND, BFLOAT16, CONFIG, Spelled, model_file

from tilewright.serve import cascade, engine
from tilewright.serve.cascade import Groups
from tilewright.serve.engine import Engine, Options
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.models.llama import Llama
from tilewright.serve.request import Request, Sampling
from tilewright.serve.runner import Runner
from tilewright.serve.scheduler import PENDING, Chunk, Limits
from tilewright.toolchain import nvrtc

FULL = replace(CONFIG, context=256)
WINDOWED = replace(FULL, windowed=(True, False), window=20)
TARGETS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "JOIN_BYTES", 0)
    monkeypatch.setattr(cascade, "LAUNCH_BYTES", 0)
    monkeypatch.setattr(engine, "load_tokenizer", lambda file: Spelled())
    monkeypatch.setattr(engine, "cost_key", lambda *_: "")


class Both:
    """Runs steps of an engine, and the same on a flat runner."""

    def __init__(self, one: Engine, target: str) -> None:
        self.engine, self.run_now = one, one.runner.run
        limits = one.scheduler.limits
        model = Llama(one.model.file, target, one.context + 1)
        self.flat = Runner(model, limits, one.context)
        self.flat.cascade.is_on, one.runner.cascade.is_on = False, True
        self.within = BFLOAT16 if target == "cuda" else 2e-4
        self.kept: list[Groups] = []
        one.runner.run, one.runs_ahead = self.run, False

    def run(self, chunks: Sequence[Chunk]) -> Any:
        own, flat = self.run_now(chunks), self.flat.run(chunks)
        assert not flat.groups.nodes and own.requests == flat.requests
        self.check(own.groups, [c for c in chunks if not c.is_prompt])
        own.wait()
        flat.wait()
        for i in range(len(own.requests)):
            wanted = flat.row(i)
            np.testing.assert_allclose(own.row(i), wanted, rtol=self.within, atol=self.within)
            assert own.tokens[i] == own.row(i).argmax()
        return own

    def check(self, made: Groups, answers: list[Chunk]) -> None:
        """Pages of nodes are held and begin the lists of all of the node's answers, whose tokens
        go elsewhere; rows of the step that are of no answer are in no node."""
        holders = self.engine.scheduler.pages.holders
        assert sorted(made.order) == list(range(len(answers)))
        for begin, end, common in made.nodes:
            members = [answers[made.order[row]] for row in range(begin, end)]
            shared = members[0].request.pages[:common]
            for c in members:
                assert c.request.pages[:common] == shared and c.start >= common * PAGE_SIZE
                assert c.request.pages[c.start // PAGE_SIZE] not in shared
            assert all(holders[page] >= len(members) for page in shared)
        self.kept.append(made)


def jobs(seed: int, count: int = 12, most: int = 40) -> list[tuple[list[int], int]]:
    """Prompts that begin like the first or the second of two long ones, or like none; and tokens
    of their answers, fewer than `most`."""
    rng = np.random.default_rng(seed)
    long = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (70, 49, 0)]
    made = []
    for i in range(count):
        prompt = [*long[i % 5 % 3], *rng.integers(0, CONFIG.vocab, rng.integers(1, 20)).tolist()]
        made.append((prompt, int(rng.integers(3, most))))
    return made


def serve(one: Engine, made: list[tuple[list[int], int]], interval: int = 2) -> list[Request]:
    """One comes every `interval` steps; the fourth is cancelled in the middle."""
    requests: list[Request] = []
    for step in range(1000):
        if step % interval == 0 and len(requests) < len(made):
            prompt, tokens = made[len(requests)]
            how = Sampling(max_tokens=tokens, ignore_eos=True)
            requests.append(one.submit(prompt, how))
        one.step()
        if len(requests) > 3 and requests[3].answered >= 2:
            one.cancel(requests[3])
        if len(requests) == len(made) and all(r.finish for r in requests):
            one.step()
            assert one.scheduler.pages.held == 0
            return requests
    raise AssertionError("not done")


SIZES: dict[str, dict[str, Any]] = {
    "all run": {"running": 12}, "few seats": {"running": 4},
    "preempted": {"context": 176, "kv_tokens": 368},
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_flat_steps(target: str, name: str):
    """Requests join, leave, are cancelled and preempted; groups change with them."""
    sizes: dict[str, Any] = {"context": 256, "running": 12} | SIZES[name]
    one = Engine(model_file(FULL), target, Options(invariant=False, **sizes))
    both = Both(one, target)
    serve(one, jobs(9, most=80) if name == "preempted" else jobs(len(name)))
    kept = [g for g in both.kept if g.nodes]
    assert len(kept) > 12 and len({g.nodes for g in kept}) > 5
    assert any(len([n for n in g.nodes if n[2]]) == 2 for g in kept)  # two prefixes at once
    assert any(g.nodes[-1][2] == 0 for g in kept)  # and answers alone beside them
    assert (one.scheduler.preemptions > 0) == (name == "preempted")
    counts, cascade = one.counts(), one.runner.cascade
    assert counts["cascaded_rows_total"] == sum([g.rows for g in kept])
    page = 2 * PAGE_SIZE * FULL.kv_heads * FULL.head_dim * (2 if target == "cuda" else 4)
    saved = sum([g.saved for g in kept]) * page * FULL.layers
    assert counts["cascade_saved_bytes_total"] == saved > 0
    assert all(rows > 1 for rows in cascade.steps[0])


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_who_shares_reads(fake: ctypes.CDLL):  # noqa: F811
    """Not with `invariant`, the default, nor where a layer has a window or there is no kernel."""
    wide = replace(FULL, head_dim=160)
    cases = (
        (FULL, False, True),
        (FULL, True, False),
        (WINDOWED, False, False),
        (wide, False, False),
    )
    for config, invariant, shares in cases:
        limits = Limits(64, 12, 64, invariant=invariant)
        runner = Runner(Llama(model_file(config), "cuda:sm_90a", 97), limits, 96)
        assert runner.cascade.is_on is shares
        requests = [Request(n, [1] * 40) for n in range(5)]
        for r in requests:
            r.in_chunks, r.pages = 0, [1, 2, 10 + r.id]
        made = runner.cascade.of([Chunk(r, 39, 40) for r in requests], 5)
        assert made.nodes == (((0, 5, 2),) if shares else ()) and list(made.order) == [*range(5)]
        del runner
        gc.collect()


@pytest.mark.parametrize("target", TARGETS)
def test_steps_are_launched_ahead_while_the_answers_are_the_same(target: str):
    """Six answers on a prefix: one decision about groups, a step ahead at each token, the tokens
    of steps that are waited for."""
    prompts = [[*jobs(3)[0][0][:64], 5 + i] for i in range(6)]
    said, seen = [], list[tuple[bool, Groups]]()
    for ahead in (False, True):
        options = Options(context=256, running=12, invariant=False)
        one = Engine(model_file(FULL), target, options)
        run, one.runs_ahead, one.runner.cascade.is_on = one.runner.run, ahead, True

        def noted(chunks: Sequence[Chunk], run: Any = run) -> Any:
            logits = run(chunks)
            pending = any(c.request.tokens[c.start] == PENDING for c in chunks)
            seen.append((pending, logits.groups))
            return logits

        one.runner.run = noted
        first = one.submit(prompts[0], Sampling(max_tokens=1, ignore_eos=True))
        while not first.finish:
            one.step()
        how = Sampling(max_tokens=40, ignore_eos=True)
        requests = [one.submit(p, how) for p in prompts]
        while not all(r.finish for r in requests):
            one.step()
        said.append([r.answer for r in requests])
    assert said[0] == said[1]
    late = [made for pending, made in seen if pending]
    assert len(late) >= 35 and len({id(made) for made in late}) == 1
    assert late[0].nodes == ((0, 6, 4),)


def test_sampled_answers_of_a_cascade():
    """Rows in another order than the requests: each gets the token of its own row and seed, which
    the step draws, as where each reads alone."""
    rng, said = np.random.default_rng(5), []
    long = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (64, 48)]
    prompts = [[*long[i % 2], 7 + i] for i in range(6)]
    made = [{"temperature": 1.0, "seed": i} if i % 3 else {} for i in range(6)]
    for shares in (True, False):
        one = Engine(model_file(FULL), "cpp", Options(context=256, invariant=False))
        one.runner.cascade.is_on = shares
        sampling_in_the_step(one)
        for prefix in long:
            first = one.submit([*prefix, 1], Sampling(max_tokens=1, ignore_eos=True))
            while not first.finish:
                one.step()
        requests = [
            one.submit(prompt, Sampling(max_tokens=12, ignore_eos=True, **how))
            for prompt, how in zip(prompts, made, strict=True)
        ]
        while not all(r.finish for r in requests):
            one.step()
        assert (6 in one.runner.cascade.steps[1]) == shares
        assert list(one.runner.groups.order) == ([0, 2, 4, 1, 3, 5] if shares else [*range(6)])
        said.append([r.answer for r in requests])
    assert said[0] == said[1] and len({tuple(answer) for answer in said[0]}) == 6


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_launches_of_a_cascaded_step(fake: ctypes.CDLL):  # noqa: F811
    """On the fake driver: one more than a flat step has, the planner."""
    runner = Runner(Llama(model_file(), "cuda:sm_90a", 97), Limits(64, 12, 64, invariant=False), 96)
    requests = [Request(n, [1] * 40) for n in range(5)]
    for r in requests:
        r.in_chunks, r.pages = 0, [1, 2, 10 + r.id]
    made = runner.run([Chunk(r, 39, 40) for r in requests]).groups
    assert made.nodes == ((0, 5, 2),) and not runner._steps
    step = runner.cascade.steps[0][5]
    assert step.count == CONFIG.layers * A_LAYER + AROUND + 1
    assert missing(step.nodes, step.edges) == []
    del runner, step
    gc.collect()
