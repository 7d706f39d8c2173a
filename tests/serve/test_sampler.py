"""Sampling against plain NumPy: distributions, cuts, penalties, seeds, log-probabilities; and the
text of an answer up to a stop text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tilewright.serve.engine import LLM, Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import draw, logprobs, penalized, sample
from tilewright.serve.tokenizer import AnswerText
from tilewright.serve.weights import open_model

HELLO = "and the thing is in the land"


@pytest.fixture(scope="module")
def llm(runnable_path: Path) -> LLM:
    return LLM(runnable_path)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def cut(p: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Probabilities after the cuts, one after the other, by sorting everything."""
    p = p.copy()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    keep = order[: top_k or len(p)]
    p[[i for i in range(len(p)) if i not in keep]] = 0
    p /= p.sum()
    mass, kept = 0.0, []
    for i in keep:
        if mass >= top_p and kept:
            break
        kept.append(i)
        mass += p[i]
    p[[i for i in range(len(p)) if i not in kept]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


CUTS = (
    {}, {"top_k": 1}, {"top_k": 7}, {"top_k": 500}, {"top_p": 0.5}, {"top_p": 0.95},
    {"top_p": 1e-9}, {"min_p": 0.2}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
)  # fmt: skip


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_distribution(options: dict[str, Any], temperature: float):
    """A grid of uniform numbers gives each token its share, to the width of the grid."""
    scores = np.random.default_rng(1).normal(0, 2, 60)
    wanted = cut(softmax(scores / temperature), **options)
    grid, how = 4000, Sampling(temperature=temperature, **options)
    drawn = [draw(scores, how, (i + 0.5) / grid) for i in range(grid)]
    share = np.bincount(drawn, minlength=60) / grid
    np.testing.assert_allclose(share, wanted, atol=2 / grid)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_flat_distribution_of_many_tokens(top_p: float):
    """More tokens than are sorted at first."""
    scores = np.random.default_rng(1).normal(0, 0.1, 5000)
    allowed = np.flatnonzero(cut(softmax(scores), top_p=top_p))
    how = Sampling(temperature=1.0, top_p=top_p)
    drawn = {draw(scores, how, u) for u in np.random.default_rng(2).random(400)}
    assert drawn <= set(allowed.tolist()) and len(drawn) > 200
    assert draw(scores, how, 1 - 1e-12) in allowed


def test_equal_logits_and_minus_infinity():
    scores = np.array([-np.inf, 1.0, 1.0, -np.inf, 1.0])
    drawn = {draw(scores, Sampling(temperature=1.0), u) for u in np.linspace(0, 0.9999, 50)}
    assert drawn == {1, 2, 4}
    assert draw(scores, Sampling(temperature=1.0, top_k=2), 0.99) == 2


def test_penalties_and_biases():
    how = Sampling(
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=2.0,
        logit_bias={0: 3.0, 5: -100.0},
        temperature=1.0,
    )
    request = Request(0, [1, 2, 2], how)
    for token in (3, 3, 4):
        request.tokens.append(token)
        request.counts[token] += 1
    logits = np.array([1.0, 2.0, -3.0, 4.0, -5.0, 6.0], np.float32)
    wanted = np.array([1 + 3, 2 / 2, -3 * 2, 4 / 2 - 0.5 - 2 * 0.25, -5 * 2 - 0.75, 6 - 100])
    np.testing.assert_allclose(penalized(request, logits), wanted, rtol=1e-12)


def test_a_seed_and_a_position_decide():
    """Not the engine's state: a request sampled again from any position gets the same tokens."""
    logits = np.random.default_rng(3).normal(0, 1, (30, 100)).astype(np.float32)
    tokens = []
    for seed in (1, 1, 2, 2**70):
        request = Request(0, [5], Sampling(temperature=1.0), seed=seed)
        for row in logits:
            request.tokens.append(sample(request, row))
        tokens.append(request.answer)
    assert tokens[0] == tokens[1] and len({tuple(t) for t in tokens}) == 3


def test_logprobs():
    logits = np.random.default_rng(3).normal(0, 3, 100).astype(np.float32)
    wanted = np.log(softmax(logits.astype(np.float64)))
    found = logprobs(logits, 17, 5)
    assert found.token == 17 and found.logprob == pytest.approx(wanted[17], rel=1e-9)
    order = np.argsort(-wanted)[:5]
    assert [t for t, _ in found.top] == order.tolist()
    np.testing.assert_allclose([x for _, x in found.top], wanted[order], rtol=1e-9)
    assert logprobs(logits, 17, 0).top == ()


def test_options_reach_the_model(llm: LLM):
    """Through the engine: each changes the answer as it says."""
    plain = llm.prompt(HELLO)

    def said(**options: Any) -> list[int]:
        request = llm.engine.submit(plain, Sampling(max_tokens=24, ignore_eos=True, **options))
        while not request.finish:
            llm.engine.step()
        return request.answer

    greedy = said()
    assert said(top_k=1, temperature=1.0, seed=1) == greedy == said(min_p=1.0, temperature=2.0)
    assert set(said(logit_bias={77: 100})) == {77}
    banned = said(logit_bias=dict.fromkeys(greedy, -100))
    assert not set(banned) & set(greedy)
    assert len(set(said(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(greedy))
    assert len({tuple(said(temperature=1.5)) for _ in range(3)}) > 1


def test_several_end_tokens(runnable_path: Path):
    engine = Engine(open_model(runnable_path), "cpp", Options())

    def said(**options: Any) -> Request:
        request = engine.submit([5, 9, 2], Sampling(max_tokens=30, **options))
        while not request.finish:
            engine.step()
        return request

    tokens = said(ignore_eos=True).answer
    for ends in ({tokens[7]}, {tokens[4], tokens[9]}):
        engine.tokenizer.ends = ends
        first = min(tokens.index(t) for t in ends)
        assert said().answer == tokens[:first] and said().finish == "stop"
        assert said(ignore_eos=True).answer == tokens


# ---------------------------------------------------------------------------- stop texts


class Letters:
    """A tokenizer whose tokens are the pieces of a text."""

    control: frozenset[int] = frozenset()

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def piece(self, token: int) -> bytes:
        return self.pieces[token].encode()


def pieces_of(text: str, rng: np.random.Generator) -> list[str]:
    borders = sorted({0, len(text), *rng.integers(0, len(text) + 1, 4).tolist()})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def test_stop_texts_across_borders_of_tokens():
    """Random texts of few letters, cut at random: what is said is the text before the first stop
    text, nothing is taken back, and nothing is kept longer than a stop text could need."""
    rng = np.random.default_rng(5)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choice(list("ab"), rng.integers(1, 14)))
        stops = [
            "".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))
        ]
        pieces = pieces_of(text, rng)
        answer = AnswerText(Letters(pieces), stops)  # pyright: ignore[reportArgumentType]
        said, read = "", ""
        for n, piece in enumerate(pieces):
            said, read = said + answer.push(n), read + piece
            if answer.stopped:
                break
            assert len(read) - len(said) < max(map(len, stops))
        said += answer.finish()
        ends = [text.find(s) + len(s) for s in stops if s in text]
        if not ends:
            assert said == text and not answer.stopped
            continue
        stopped += 1
        # the stop text that begins first among those complete when the first one is
        seen = text[: next(len("".join(pieces[: n + 1])) for n in range(len(pieces))
                           if any(s in "".join(pieces[: n + 1]) for s in stops))]  # fmt: skip
        assert answer.stopped and said == seen[: min(seen.find(s) for s in stops if s in seen)]
    assert stopped > 1000


def test_a_stop_text_ends_an_answer(llm: LLM):
    text = llm.generate(HELLO, max_tokens=30)
    assert isinstance(text, str)
    for start, size in ((3, 2), (5, 7), (len(text) - 4, 3)):
        stop = text[start : start + size]
        pieces = list(llm.stream(HELLO, max_tokens=30, stop=[stop, "\0never"]))
        assert "".join(pieces) == text[: text.find(stop)]
