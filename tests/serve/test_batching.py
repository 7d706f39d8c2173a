"""Answers do not depend on what runs beside them: batches, chunks, known pages, preemption.

Tokens and log-probabilities are compared with those of each request alone, in a fresh engine, bit
for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.reference import ReferenceLlama
from tests.serve.sequence import Sequence

from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.weights import ModelFile, open_model

STEM = [int(t) for t in np.random.default_rng(7).integers(3, 260, 40)]


@pytest.fixture(scope="module")
def tiny(runnable_path: Path) -> ModelFile:
    return open_model(runnable_path)


def jobs() -> list[tuple[list[int], Sampling]]:
    """Prompts of 1 to 80 tokens, some with an equal beginning; greedy, sampled, and penalised."""
    rng = np.random.default_rng(3)
    made: list[tuple[list[int], Sampling]] = []
    for i, count in enumerate((1, 2, 17, 33, 49, 50, 64, 80, 16, 15)):
        prompt = (STEM[: count // 2] if i % 2 else []) + rng.integers(3, 260, count).tolist()
        options: dict[str, Any] = {
            "max_tokens": 30 + 5 * (i % 4),
            "ignore_eos": True,
            "logprobs": 2,
        }
        if i % 3 == 1:
            options |= {"temperature": 1.5, "seed": i, "top_p": 0.9}
        if i % 3 == 2:
            options |= {"temperature": 0.8, "seed": i, "top_k": 20, "frequency_penalty": 1.0}
        made.append((prompt[:80], Sampling(**options)))
    return made


def answers(engine: Engine, made: list[tuple[list[int], Sampling]]) -> list[Request]:
    """All of them in one engine; one comes every other step."""
    requests: list[Request] = []
    waiting = list(made)
    for step in range(2000):
        if waiting and step % 2 == 0:
            requests.append(engine.submit(*waiting.pop(0)))
        engine.step()
        if not waiting and all(r.finish for r in requests):
            assert engine.scheduler.pages.held == 0
            return requests
    raise AssertionError("not done")


@pytest.fixture(scope="module")
def alone(tiny: ModelFile) -> list[Request]:
    """Each request in an engine that has read nothing."""
    options = Options(context=128, share=False, step_tokens=200)
    return [answers(Engine(tiny, "cpp", options), [job])[0] for job in jobs()]


BATCHES = {
    "batched": Options(context=128, share=False),
    "chunks": Options(context=128, share=False, step_tokens=12, running=8),
    "chunks of one": Options(context=128, share=False, step_tokens=5, running=4),
    "one seat": Options(context=128, running=1, step_tokens=7),
    "shared pages": Options(context=128, share=True),
    "preempted": Options(context=128, kv_tokens=176, share=False, step_tokens=40),
    "preempted, shared pages": Options(context=128, kv_tokens=176, share=True, step_tokens=40),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bits_of_an_answer(tiny: ModelFile, alone: list[Request], name: str):
    engine = Engine(tiny, "cpp", BATCHES[name])
    together = answers(engine, jobs())
    for one, other in zip(alone, together, strict=True):
        assert other.answer == one.answer and other.finish == one.finish
        assert other.logprobs == one.logprobs
    if "preempted" in name:
        assert engine.scheduler.preemptions > 0
    if "shared" in name:
        assert sum(r.cached for r in together) > 0


def test_a_second_time_from_known_pages(tiny: ModelFile, alone: list[Request]):
    """Pages that other answers wrote token by token differ in last bits from those of a prompt;
    pages of prompts do not."""
    engine = Engine(tiny, "cpp", Options(context=128, kv_tokens=4096))
    answers(engine, jobs())
    for one, again in zip(alone, answers(engine, jobs()), strict=True):
        assert again.answer == one.answer and again.logprobs == one.logprobs
        assert again.cached == (one.prompt_tokens - 1) // 16 * 16


def test_faster_batches_are_near(tiny: ModelFile, alone: list[Request]):
    """Without `invariant` many answers share a kernel: log-probabilities differ in last bits."""
    together = answers(Engine(tiny, "cpp", Options(context=128, invariant=False)), jobs())
    for one, other in zip(alone, together, strict=True):
        assert other.answer == one.answer
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4


def test_two_at_once_against_plain_numpy(tiny: ModelFile):
    """Greedy tokens of two requests in one batch are those of the reference, each alone."""
    reference = ReferenceLlama(tiny)
    engine = Engine(tiny, "cpp", Options(context=128))
    how = Sampling(max_tokens=40, ignore_eos=True)
    prompts = (STEM, STEM[5:25])
    requests = [engine.submit(p, how) for p in prompts]
    while not all(r.finish for r in requests):
        engine.step()
    for request, prompt in zip(requests, prompts, strict=True):
        reference.reset()
        logits = reference.forward([*prompt, *request.answer[:-1]])[len(prompt) - 1 :]
        behind = logits.max(1) - logits[np.arange(40), request.answer]
        assert behind.max() <= 1e-4


def test_what_is_not_read_never_matters(tiny: ModelFile, alone: list[Request]):
    """A pool full of NaN: the row that pads a chunk, unwritten slots and other pages are unseen."""
    for share in (True, False):
        engine = Engine(tiny, "cpp", Options(context=128, share=share, step_tokens=40))
        for array in (*engine.runner.keys, *engine.runner.values):
            array[...] = np.nan
        for one, other in zip(alone, answers(engine, jobs()), strict=True):
            assert other.answer == one.answer and other.logprobs == one.logprobs


def test_contexts_so_long_that_keys_are_divided(tmp_path: Path):
    """2000 keys: an answer's keys are divided among workers, alone, beside prompts or not."""
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    made = runnable()
    made.metadata["llama.context_length"] = 4096
    file = open_model(made.write(tmp_path / "long.gguf"))
    how = Sampling(max_tokens=30, ignore_eos=True, logprobs=2)
    rng = np.random.default_rng(4)
    long = [(rng.integers(3, 260, n).tolist(), how) for n in (1990, 1100, 300, 1500)]
    together = Engine(file, "cpp", Options(context=4096, share=False, step_tokens=130))
    for job, other in zip(long, answers(together, long), strict=True):
        options = Options(context=4096, share=False, step_tokens=2000)
        [one] = answers(Engine(file, "cpp", options), [job])
        assert other.answer == one.answer and other.logprobs == one.logprobs


def test_rows_of_answers_of_every_number(tiny: ModelFile):
    """A recorded step of n answers gives each the logits that it has alone, for n = 1 … 16."""
    engine = Engine(tiny, "cpp", Options(context=128, share=False, kv_tokens=4096))
    how = Sampling(max_tokens=60, ignore_eos=True, logprobs=3)
    requests = []
    for n in range(16):
        requests.append(engine.submit(STEM[: 3 + 2 * n], how))
        engine.step()
        engine.step()
    while not all(r.finish for r in requests):
        engine.step()
    assert set(engine.runner._steps) == set(range(1, 17))
    model = Sequence(tiny)
    for request in requests[::5]:
        model.reset()
        model.prefill(request.tokens[: request.prompt_tokens])
        for token in request.answer[:-1]:
            assert model.greedy() == token
            model.decode(token)


@pytest.mark.slow
def test_smollm_bits_of_an_answer(smollm: ModelFile):
    """Real weights: requests together, in chunks, preempted, against each alone."""
    rng = np.random.default_rng(1)
    how = Sampling(max_tokens=56, ignore_eos=True, logprobs=1)
    made = [(rng.integers(3, 49_000, n).tolist(), how) for n in (1, 5, 33, 14, 49, 65)]
    sizes: dict[str, Any] = {"context": 160, "running": 8, "step_tokens": 48, "kv_tokens": 288}
    engine = Engine(smollm, "cpp", Options(**sizes))
    together = answers(engine, made)
    assert engine.scheduler.preemptions > 0
    single = Engine(smollm, "cpp", Options(context=160, share=False))
    for job, other in zip(made, together, strict=True):
        [one] = answers(single, [job])
        assert other.answer == one.answer and other.logprobs == one.logprobs
