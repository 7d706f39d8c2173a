"""Sampling against an fp64 oracle in plain NumPy: which token a random number chooses,
distributions, cuts, penalties, seeds, log-probabilities; and the text of an answer up to a stop
text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tilewright import knobs
from tilewright.errors import BuildError, ModelError
from tilewright.serve import engine as engine_module
from tilewright.serve import sampler
from tilewright.serve.engine import LLM, Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import sample
from tilewright.serve.tokenizer import AnswerText
from tilewright.serve.weights import open_model
from tilewright.toolchain import compilers, cxx

HELLO = "and the thing is in the land"


@pytest.fixture(scope="module")
def llm(runnable_path: Path) -> LLM:
    return LLM(runnable_path)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def cut(p: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """Probabilities after the cuts, one after the other, by sorting everything. A mass that is
    `top_p` up to rounding is enough."""
    p, order = p.copy(), np.argsort(-p, kind="stable")
    p[order[top_k or len(p) :]] = 0
    before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
    p[order[1:][before[1:] >= top_p - 1e-9]] = 0
    p[p < min_p * p.max() * (1 - 1e-9)] = 0
    return p / p.sum()


def philox(seed: int, position: int) -> int:
    """The first 64 bits of Philox4x32-10 for a key and a counter."""
    c, key = [position % 2**32, position >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ key[0], b % 2**32, a >> 32 ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c[0] | c[1] << 32


def requests_of(count: int, seed: int = 0, **options: Any) -> list[Request]:
    chosen: dict[str, Any] = {"temperature": 1.0, **options}
    how = Sampling(**chosen)
    return [Request(i, [0], how, seed=seed + i) for i in range(count)]


def drawn(logits: np.ndarray, count: int, seed: int = 0, **options: Any) -> list[int]:
    """Tokens of one row of logits for consecutive seeds."""
    x = logits.astype(np.float32)
    return tokens_of(requests_of(count, seed, **options), [x] * count)


def tokens_of(requests: list[Request], logits: list[np.ndarray]) -> list[int]:
    return [token for token, _ in sample(requests, logits)]


CUTS = (
    {}, {"top_k": 1}, {"top_k": 7}, {"top_k": 5000}, {"top_p": 0.5}, {"top_p": 0.95},
    {"top_p": 1e-9}, {"min_p": 0.2}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
)  # fmt: skip


def test_the_generator_is_philox():
    """Random123's known answers (kat_vectors)."""
    assert philox(0, 0) == 0xE169C58D6627E8D5
    assert philox(2**64 - 1, 2**64 - 1) != philox(0, 0)


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 257, 5000, 20_000])
def test_the_token_of_a_random_number(vocab: int, options: dict[str, Any]):
    """By the inverse of the cumulative distribution in fp64; temperature 0.7."""
    x = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
    sums = np.cumsum(cut(softmax(x.astype(np.float64) / 0.7), **options))
    for i, token in enumerate(drawn(x, 60, 2**64 - 30, temperature=0.7, **options)):
        u = philox((2**64 - 30 + i) % 2**64, 0) / 2**64
        low, high = np.searchsorted(sums, [u - 1e-5, u + 1e-5], side="right")
        assert low <= token <= min(high, vocab - 1)


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_distribution(options: dict[str, Any], temperature: float):
    """Pearson's chi-square over 4000 draws, below a bound of probability 1e-6; no token that a cut
    leaves out. Half of the logits are equal to others."""
    x = np.random.default_rng(1).normal(0, 2, 60).astype(np.float32)
    x[::2] = np.round(x[::2])
    wanted = cut(softmax(x.astype(np.float64) / temperature), **options)
    counts = np.bincount(drawn(x, 4000, temperature=temperature, **options), minlength=60)
    assert not counts[wanted == 0].any()
    rare = (wanted > 0) & (4000 * wanted < 5)
    expected = np.append(4000 * wanted[(wanted > 0) & ~rare], 4000 * wanted[rare].sum())
    found = np.append(counts[(wanted > 0) & ~rare], counts[rare].sum())
    degrees = np.count_nonzero(expected) - 1
    statistic = ((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert statistic <= degrees + 10 * np.sqrt(degrees) + 20 * (degrees > 0)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7])
def test_ties_go_to_the_smaller_index(top_k: int):
    """Of the zeros, of both signs, too."""
    x = np.array([-1, 0.0, 3, -0.0, 3, 0.0, 3, -0.0])
    for options in ({"top_k": top_k}, {"top_k": 8, "top_p": cut_mass(x, top_k)}):
        found = set(drawn(x, 600, temperature=5.0, **options))
        assert found == set(np.argsort(-x, kind="stable")[:top_k].tolist())
        assert found == set(np.flatnonzero(cut(softmax(x / 5), **options)).tolist())


def cut_mass(x: np.ndarray, count: int) -> float:
    """A top_p that the `count` likeliest have, the last of them but for a half."""
    p = np.sort(softmax(x / 5))[::-1]
    return float(p[:count].sum() - p[count - 1] / 2)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_flat_distribution_of_many_tokens(top_p: float):
    x = np.random.default_rng(1).normal(0, 0.1, 49152).astype(np.float32)
    allowed = np.flatnonzero(cut(softmax(x.astype(np.float64)), top_p=top_p + 1e-6))
    found = set(drawn(x, 100, top_p=top_p))
    assert found <= set(allowed.tolist()) and len(found) > 90


def test_infinite_and_excluded_logits():
    minus = -np.inf
    x = np.array([minus, 1.0, 1.0, minus, 1.0])
    assert set(drawn(x, 50)) == {1, 2, 4}
    assert set(drawn(x, 50, top_k=2)) == {1, 2}
    assert set(drawn(x, 50, top_k=4, min_p=1.0)) == {1, 2, 4}
    assert drawn(np.array([minus, minus, -5.0, minus]), 5) == [2] * 5
    assert drawn(np.array([minus, 7.0, 7.0]), 1, temperature=0.0, logprobs=2) == [1]
    largest = float(np.finfo(np.float32).max)
    assert drawn(np.array([-largest, largest]), 5) == [1] * 5


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2, "logprobs": 3}, {"temperature": 0.0}], ids=str
)
def test_no_token_of_logits_that_are_no_numbers(value: float, options: dict[str, Any]):
    x = np.arange(40.0)
    x[17] = value
    assert drawn(x, 3, logit_bias={17: -100}, **options) == [-1] * 3
    assert drawn(np.full(5, -np.inf), 2, **options) == [-1] * 2


def test_penalties_and_biases():
    """Against fp64: of 4 000 tokens the shares, and the token of the largest."""
    how: dict[str, Any] = {
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0,
        "logit_bias": {0: 3.0, 5: -100.0, 6: 100.0},
    }  # fmt: skip
    x = np.array([1.0, 2.0, -3.0, 4.0, -0.5, 6.0, -98.0, 0.0], np.float32)
    wanted = [1 + 3, 2 / 2, -3 * 2, 4 / 2 - 0.5 - 2 * 0.25, -0.5 * 2 - 0.75, 6 - 100, 2, 0]
    requests = requests_of(4000, **how)
    for request in requests:
        request.tokens = [1, 2, 2, 3, 3, 4]
        request.prompt_tokens = 3
        request.counts.update([3, 3, 4])
    share = np.bincount(tokens_of(requests, [x] * 4000), minlength=8) / 4000
    np.testing.assert_allclose(share, softmax(np.array(wanted)), atol=0.03)
    assert share[5] == 0
    assert drawn(x, 1, temperature=0.0, logit_bias={6: 100, 5: -100}) == [3]


def test_a_seed_and_a_position_decide():
    """Not the engine's state: a request sampled again from any position gets the same tokens."""
    logits = np.random.default_rng(3).normal(0, 1, (30, 100)).astype(np.float32)
    tokens: list[list[int]] = []
    for seed in (1, 1, 2, 2**70 + 3):
        request = Request(0, [5], Sampling(temperature=1.0), seed=seed)
        for row in logits:
            request.tokens += tokens_of([request], [row])
        tokens.append(request.answer)
    assert tokens[0] == tokens[1] and len({tuple(t) for t in tokens}) == 3


@pytest.mark.parametrize("vocab", [1, 1000, 4099])
def test_the_batch_changes_nothing(vocab: int):
    """Nor do threads, vectors, and what lies around a row; the logits are left as they are."""
    rng = np.random.default_rng(vocab)
    around = np.full((17, vocab + 40), np.nan, np.float32)
    around[:, 20:-20] = rng.normal(0, 2, (17, vocab))
    logits, before = list(around[:, 20:-20]), around.copy()
    options = [dict(c) | {"logprobs": i % 3} for i, c in enumerate(CUTS)]
    requests = [requests_of(1, 90 + i, **options[i % len(options)])[0] for i in range(17)]
    wanted = [sample([r], [x])[0] for r, x in zip(requests, logits, strict=True)]
    for settings in ({"threads": 1}, {"threads": 3}, {"isa": "baseline"}):
        with knobs.scope(**settings):
            sampler.native.cache_clear()
            assert sample(requests, logits) == wanted
    sampler.native.cache_clear()
    assert all(x is not None for _, x in wanted)
    np.testing.assert_array_equal(around, before)


def test_logprobs():
    x = np.random.default_rng(3).normal(0, 3, 100).astype(np.float32)
    x[10] = x[20] = x.max()
    wanted = np.log(softmax(x.astype(np.float64)))
    order = np.argsort(-wanted, kind="stable")
    cases: list[tuple[int, dict[str, Any]]] = [
        (5, {}), (20, {"top_k": 3}), (0, {"logit_bias": {7: 100}}),
    ]  # fmt: skip
    for count, options in cases:
        (request,) = requests_of(1, logprobs=count, **options)
        ((token, found),) = sample([request], [x])
        assert (
            found
            and found.token == token
            and found.logprob == pytest.approx(wanted[token], abs=1e-5)
        )
        assert [t for t, _ in found.top] == order[:count].tolist()
        np.testing.assert_allclose([y for _, y in found.top], wanted[order[:count]], atol=1e-5)
    (request,) = requests_of(1, logprobs=20)
    ((_, found),) = sample([request], [x[:3].copy()])
    assert found and len(found.top) == 3


def test_logprobs_of_a_long_tail():
    """Tokens that weigh less than the smallest weight each, and much together."""
    x = np.full(150_000, -21.0, np.float32)
    x[7] = 0
    (request,) = requests_of(1, logprobs=1)
    ((_, found),) = sample([request], [x])
    wanted = -np.log1p((len(x) - 1) * np.exp(-21.0))
    assert found and found.top == ((7, pytest.approx(wanted, abs=4e-5)),)


def test_sampling_needs_a_compiler(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Said when a request comes, not in a step that others are in."""

    def none() -> Any:
        raise BuildError("B102", "no C++ compiler")

    monkeypatch.setattr(engine_module, "native", none)
    with pytest.raises(BuildError, match="B102"):
        llm.engine.submit([5], Sampling(temperature=1.0))
    assert not llm.engine.scheduler.has_work


def test_the_sampler_is_compiled_with_the_engine(
    runnable_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not while answers wait; without a compiler requests are refused when they come."""
    sampler.native.cache_clear()
    Engine(open_model(runnable_path), "cpp", Options(context=64))
    assert sampler.native.cache_info().currsize == 1
    monkeypatch.setattr(engine_module.compilers, "has_compiler", lambda: False)
    sampler.native.cache_clear()
    Engine(open_model(runnable_path), "interp", Options(context=64))
    assert sampler.native.cache_info().currsize == 0


def test_no_memory_ends_one_request(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """With a coded error, and no other: not the process."""
    text = sampler._text("sample_cpu.h").replace("__builtin_malloc(", "none(")
    text = f"#include <stdint.h>\nstatic void* none(int64_t) {{ return nullptr; }}\n{text}"
    library = cxx.load_cpp(text, name="sampler", isa=compilers.resolve_isa().name)
    monkeypatch.setattr(sampler, "native", lambda: library)
    assert drawn(np.zeros(9), 3) == [sampler.NO_MEMORY] * 3
    with pytest.raises(ModelError, match="M111"):
        llm.generate(HELLO, temperature=1.0, max_tokens=4)
    assert llm.generate(HELLO, max_tokens=4)


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
