"""Products of a library: torch on the CPU in place of a GPU's, against our own linear layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.serve import exact
from tests.serve.test_ahead import SAMPLED, Late, sampling_in_the_step
from tests.serve.test_decode_step import CONFIG, Answer, Spelled, advance, model_file

from tilewright.serve import cost, engine, runner
from tilewright.serve.gguf import Weight, dequantize
from tilewright.serve.memory import Memory
from tilewright.serve.models import llama
from tilewright.serve.products import OWN_ROWS, Products
from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Limits
from tilewright.serve.weights import ModelFile

gguf = pytest.importorskip("gguf", reason="weights are quantised by it")
torch = pytest.importorskip("torch", reason="the products are torch's")

HALVES = "halves, a head of its own"
MODELS = {
    "plain": CONFIG,
    "norms of heads": replace(CONFIG, qk_norm=True),
    "biases": replace(CONFIG, qkv_bias=True),
    HALVES: replace(CONFIG, rope_interleaved=False, kv_heads=2),
    "as Gemma": replace(
        CONFIG, post_norms=True, gelu=True, scaled_embedding=True, qk_norm=True, score_cap=20.0,
        windowed=(True, False), window=12,
    ),
}  # fmt: skip
QUANTISED = ("plain", "norms of heads", "biases")


def file_of(name: str) -> ModelFile:
    """The file of a model; "q8_0 NAME": its matrices in blocks."""
    file = model_file(MODELS[name.removeprefix("q8_0 ")])
    if name in MODELS:
        return file
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        n: Weight(n, "q8_0", w.shape, gguf.quants.quantize(w.data, kind)) if w.data.ndim == 2 else w
        for n, w in file.tensors.items()
    }
    return replace(file, tensors=tensors | {"lm_head": tensors["embed"]})


def logits_of(of: runner.Runner, prompts: list[list[int]], steps: int) -> list[Answer]:
    """Prompts that join one by one, and then answers of all."""
    made = [Answer(p, n) for n, p in enumerate(prompts)]
    for count in range(1, len(made) + 1):
        advance(of, made[:count])
    for _ in range(steps):
        advance(of, made)
    return made


def runner_of(file: ModelFile, invariant: bool = True, seats: int = 20) -> runner.Runner:
    limits = Limits(76 * seats, seats, 160, False, invariant)
    return runner.Runner(llama.Llama(file, "cpp", 1201), limits, 1200)


@pytest.mark.parametrize("name", [*MODELS, *(f"q8_0 {name}" for name in QUANTISED)])
@pytest.mark.parametrize("invariant", [True, False])
def test_logits_are_those_of_our_layers(
    monkeypatch: pytest.MonkeyPatch, name: str, invariant: bool
):
    """Prompts of 1 to 60 tokens, alone and beside answers, and up to 19 answers at once."""
    file, rng = file_of(name), np.random.default_rng(5)
    prompts = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (40, 1, 17, 60, 16, *[9] * 14)]
    wanted = logits_of(runner_of(file), prompts, 3)
    monkeypatch.setattr(llama, "products_of", lambda file, where: Products("cpu", "float32"))
    of = runner_of(file, invariant)
    found = logits_of(of, prompts, 3)
    joined = set() if invariant else {(64, 128)}
    assert set(of._mixed) == {(0, 64)} | joined and max(of._steps) == 19
    for one, other in zip(wanted, found, strict=True):
        assert one.request.tokens == other.request.tokens
        for a, b in zip(one.logits, other.logits, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2.4e-6 * np.abs(a).max())


def rounded(file: ModelFile) -> ModelFile:
    """The same with its matrices in bfloat16."""
    tensors = dict(file.tensors)
    for name, w in file.tensors.items():
        if len(w.shape) == 2:
            bits = (
                torch.from_numpy(dequantize(w)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            )
            tensors[name] = Weight(name, "bf16", w.shape, bits)
    tensors["lm_head"] = tensors["embed"]
    return replace(file, tensors=tensors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("invariant", [True, False])
def test_bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, invariant: bool):
    """Weights, inputs of products, queries, keys and values in bfloat16: greedy answers
    of as many steps as prompts, and twelve, within what that rounding leaves."""
    file, rng = rounded(file_of(name)), np.random.default_rng(5)
    prompts = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (40, 1, 17, *[9] * 15)]

    def empty(self: Memory, *shape: int, dtype: str = "float32") -> Any:
        is_wide = dtype == "bfloat16"
        return torch.zeros(shape, dtype=torch.bfloat16) if is_wide else np.zeros(shape, dtype)

    def product(x: Any, w: Any, out: Any, out_dtype: Any = None) -> None:
        out.copy_(x.float() @ w.float())

    monkeypatch.setattr(Memory, "empty", empty)
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(llama, "products_of", lambda file, where: Products("cpu", "bfloat16"))
    monkeypatch.setattr(
        llama.Llama, "kv_dtype", property(lambda self: "bfloat16", lambda *_: None), raising=False
    )
    found = logits_of(runner_of(file, invariant), prompts, 12)
    check_rounding(file, prompts, found, invariant)


def check_rounding(
    file: ModelFile, prompts: list[list[int]], found: list[Answer], invariant: bool
) -> None:
    """Logits are those of float64 up to what rounding to bfloat16 leaves. How much that is follows
    from the model itself: draws of random rounding of all that is rounded (`exact.Rounding`). The
    root of the mean square of 50 000 errors is the same in each draw up to 4 %, so a fault of few
    rows, or a value rounded once too often, shows in it. The largest error differs from draw
    to draw by a factor of two (0.05 to 0.11 for logits of about 3), so it bounds less. Greedy
    tokens are the likeliest up to twice the largest error."""
    errors, draws, behind = list[Any](), [list[Any]() for _ in range(5)], list[float]()
    for j, (answer, prompt) in enumerate(zip(found, prompts, strict=True)):
        tokens, first = answer.request.tokens[:-1], len(prompt) - 1
        wanted = exact.logits_of(file, tokens)[first:]
        errors.append(np.array(answer.logits) - wanted)
        behind += [max(row) - row[t] for row, t in zip(wanted, answer.request.answer, strict=True)]
        # Answer j is read with min(j + its tokens, 18) others: by our own layers up to 16 of them.
        answers = np.minimum(j + np.arange(len(tokens)) - first, len(prompts))
        wide = (np.arange(len(tokens)) <= first) | (answers > OWN_ROWS) | (not invariant)
        for seed, draw in enumerate(draws):
            rounding = exact.Rounding(100 * seed + j, wide)
            draw.append(exact.logits_of(file, tokens, rounding)[first:] - wanted)
    (found_rms, found_most), *drawn = map(_rms_and_most, [errors, *draws])
    rms, most = np.max(drawn, axis=0)
    print(f"rms {found_rms:.5f}, drawn {rms:.5f}; largest {found_most:.4f}, drawn {most:.4f}")
    assert found_rms <= 1.1 * rms
    assert found_most <= 1.5 * most
    assert max(behind) <= 3 * most


def _rms_and_most(errors: list[Any]) -> tuple[float, float]:
    every = np.concatenate(errors)
    return float(np.sqrt((every**2).mean())), float(np.abs(every).max())


@pytest.mark.parametrize("invariant", [True, False])
def test_answers_beside_prompts_are_sampled_there(monkeypatch: pytest.MonkeyPatch, invariant: bool):
    """First tokens too. Those that need the host it draws, and all are those of an engine whose
    host draws all. Steps that are recorded before are not recorded again."""
    monkeypatch.setattr(llama, "products_of", lambda file, where: Products("cpu", "float32"))
    monkeypatch.setattr(engine, "load_tokenizer", lambda file: Spelled())
    monkeypatch.setattr(engine, "cost_key", lambda *_: "")
    sizes = {"context": 96, "running": 6, "step_tokens": 70, "share": False}
    options = engine.Options(kv_tokens=600, invariant=invariant, **sizes)
    made = [([*range(3, 4 + n)], how) for n, how in enumerate(SAMPLED * 2)]
    said, left = [], set[Request]()
    for in_step in (False, True):
        one = engine.Engine(file_of("plain"), "cpp", options)
        if in_step:
            sampling_in_the_step(one)
            one.runner.warm()
            monkeypatch.setattr(one.runner, "_record", None)
        run, requests = one.runner.run, list[Request]()
        left.clear()

        def kept(chunks: Any, run: Any = run) -> Any:
            logits = run(chunks)
            left.update(logits.left)
            return logits

        one.runner.run = kept
        while len(requests) < len(made) or one.scheduler.has_work:
            if len(requests) < len(made):
                prompt, how = made[len(requests)]
                sampling = Sampling(max_tokens=20, ignore_eos=True, **how)
                requests.append(one.submit(prompt, replace(sampling, seed=len(requests))))
            one.step()
        said.append([(r.answer, r.logprobs) for r in requests])
    assert said[0] == said[1]
    if not invariant:
        assert [r.sampling.logprobs for r in left] == [2, 2]


@pytest.mark.parametrize("step_tokens", [20, 70])
@pytest.mark.parametrize("running", [1, 2, 9, 10])
def test_warming_up_fits_any_number_of_seats(
    monkeypatch: pytest.MonkeyPatch, running: int, step_tokens: int
):
    """One bucket of answers or two, of which the last may be one that no prompt is read beside;
    numbers of rows below six buckets and above."""
    monkeypatch.setattr(llama, "products_of", lambda file, where: Products("cpu", "float32"))
    monkeypatch.setattr(engine, "load_tokenizer", lambda file: Spelled())
    monkeypatch.setattr(engine, "cost_key", lambda *_: "")
    for module in (runner, cost):
        monkeypatch.setattr(module, "BUCKET", 8)
    sizes = {"context": 96, "running": running, "step_tokens": step_tokens, "share": False}
    options = engine.Options(kv_tokens=96 * running, invariant=False, **sizes)
    one = engine.Engine(file_of("plain"), "cpp", options)
    one.runner.warm()
    beside = {answers for answers, _ in one.runner._mixed}
    rows = {rows for _, rows in one.runner._mixed}
    assert rows == {cost.filled(n) for n in range(1, step_tokens + 8 * (running > 1))}
    assert beside == {n + -n % 8 for n in range(running)}
    monkeypatch.setattr(one.runner, "_record", None)  # all are recorded
    how = Sampling(max_tokens=4, ignore_eos=True)
    requests = [one.submit([*range(3, 9 + n)], how) for n in range(running)]
    while one.scheduler.has_work:
        one.step()
    assert all(len(r.answer) == 4 for r in requests)


TARGETS = ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)]


def engine_of(
    monkeypatch: pytest.MonkeyPatch, target: str, invariant: bool, name: str = "plain"
) -> engine.Engine:
    """One that reads at most 70 tokens a step, with products of a library."""
    if target == "cpp":
        monkeypatch.setattr(llama, "products_of", lambda file, where: Products("cpu", "float32"))
    monkeypatch.setattr(engine, "load_tokenizer", lambda file: Spelled())
    monkeypatch.setattr(engine, "cost_key", lambda *_: "")
    sizes = {"context": 400, "running": 8, "step_tokens": 70, "share": False, "kv_tokens": 4000}
    file = file_of(name)
    file = replace(file, config=replace(file.config, context=400))
    return engine.Engine(file, target, engine.Options(invariant=invariant, **sizes))


def submitted(one: engine.Engine, tokens: int) -> list[Request]:
    """Short prompts, and long ones that are read in several steps beside their answers."""
    rng = np.random.default_rng(11)
    prompts = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (5, 1, 30, 300, 17, 260)]
    how = Sampling(max_tokens=tokens, ignore_eos=True)
    return [one.submit(p, how) for p in prompts]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("invariant", [True, False])
def test_steps_with_prompts_are_launched_ahead(
    monkeypatch: pytest.MonkeyPatch, target: str, invariant: bool
):
    """Behind each step in which no prompt ends: the tokens are those of steps in turn, until one
    has ended, of which a step ahead has a row more (bits of a GPU depend on that)."""
    said = list[list[list[int]]]()
    for ahead in (False, True):
        one = engine_of(monkeypatch, target, invariant)
        late = Late(one)
        one.runs_ahead = ahead
        requests = submitted(one, 60)
        while not any(r.finish for r in requests):
            one.step()
        said.append([r.answer for r in requests])
        assert min(map(len, said[-1])) > 40
        assert (late.mixed >= 5) == ahead and late.ahead >= 40 * ahead
    assert said[0] == said[1] and len({*map(tuple, said[0])}) == 6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["plain", "as Gemma", HALVES])
@pytest.mark.parametrize("invariant", [True, False])
def test_steps_with_prompts_are_those_of_separate_steps(
    monkeypatch: pytest.MonkeyPatch, target: str, name: str, invariant: bool
):
    """Each step with prompts is also run as one of prompts and one of answers, with a cache of its
    own: tokens and logits of both agree."""
    one = engine_of(monkeypatch, target, invariant, name)
    limits, run_now = one.scheduler.limits, one.runner.run
    other = runner.Runner(llama.Llama(one.model.file, target, 401), limits, 400)
    errors, mixed, one.runs_ahead = list[Any](), 0, False
    within = 1e-4 if target == "cpp" else 0.2  # what rounding to bfloat16 leaves of logits of 3

    def run(chunks: Any) -> Any:
        nonlocal mixed
        own, wanted = run_now(chunks), dict[Request, Any]()
        own.wait()
        parts = [[c for c in chunks if c.is_prompt is prompt] for prompt in (True, False)]
        mixed += all(parts)
        for part in filter(None, parts):
            apart = other.run(part)
            apart.wait()
            wanted |= {r: apart.row(i).copy() for i, r in enumerate(apart.requests)}
        for i, request in enumerate(own.requests):
            errors.append(own.row(i) - wanted[request])
            assert wanted[request].max() - wanted[request][own.tokens[i]] <= within
        return own

    one.runner.run = run
    requests = submitted(one, 30)
    while not all(r.finish for r in requests):
        one.step()
    assert mixed >= 8 and np.abs(errors).max() <= within
    assert np.sqrt(np.square(errors).mean()) <= within / 8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["norms of heads", "q8_0 norms of heads", "as Gemma", HALVES])
@pytest.mark.parametrize("kind", ["stored", "bf16"])
@pytest.mark.parametrize("invariant", [True, False])
def test_on_a_gpu(name: str, kind: str, invariant: bool):
    """Prompts alone and beside answers, up to 18 answers, by cuBLAS in recorded steps: logits of
    float64, up to what rounding to bfloat16 leaves."""
    file, rng = file_of(name), np.random.default_rng(5)
    file = rounded(file) if kind == "bf16" else file
    prompts = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (40, 1, 17, *[9] * 15)]
    limits = Limits(76 * 20, 20, 160, False, invariant)
    of = runner.Runner(llama.Llama(file, "cuda", 1201), limits, 1200)
    assert of.model.products_by.startswith("torch")
    found = logits_of(of, prompts, 12)
    assert set(of._mixed) == {(0, 64)} | (set() if invariant else {(64, 128)})
    assert max(of._steps) == 24
    check_rounding(file, prompts, found, invariant)
