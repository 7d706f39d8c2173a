"""The model on compiled kernels against the plain NumPy one, and its cache."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.reference import ReferenceLlama
from tests.models.test_reference import GOLDEN
from tests.serve.sequence import Sequence
from tests.serve.tiny import render

from tilewright.errors import ModelError
from tilewright.ops.rope import Rope
from tilewright.runtime import pool as pools
from tilewright.serve.chat import ChatTemplate, template_of
from tilewright.serve.engine import Engine, Options
from tilewright.serve.models import llama as llama_module
from tilewright.serve.request import Sampling
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import ModelFile, open_model

STEPS = 64
TIE = 1e-4  # logits closer than this count as equal
QUESTIONS = (
    "What is the capital of France?",
    "What is 2+2?",
    "What colour is the sky on a clear day?",
    "Write one sentence about the sea.",
    "Name three fruits.",
)
OPENINGS = ("Zoo", "Once upon a time", "Lily had a red ball", "The dragon was", "Tom and Ben")


@pytest.fixture(scope="module")
def tiny(runnable_path: Path) -> ModelFile:
    return open_model(runnable_path)


@pytest.fixture(scope="module")
def llama(tiny: ModelFile) -> Sequence:
    """One model for many tests; each begins with `reset`."""
    return Sequence(tiny)


def greedy(model: Sequence, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits that each was chosen from."""
    model.reset()
    rows = [model.prefill(prompt)]
    tokens = [model.greedy()]
    while len(tokens) < steps:
        tokens.append(model.decode(tokens[-1]))
        rows.append(model.logits())
    return tokens, np.stack(rows)


def check_greedy(
    model: Sequence, reference: ReferenceLlama, prompt: list[int], steps: int, atol: float
) -> None:
    """Each token is the reference's own choice after the tokens before it, or ties with it; on a
    GPU up to 2 % of the largest logit, since queries, keys, values and weights of attention are
    bfloat16 there (the reference with just these roundings is up to 1.05 % away on the openings
    below), and where a library's products round their inputs and weights too, up to 4 %."""
    tokens, logits = greedy(model, prompt, steps)
    reference.reset()
    wanted = reference.forward([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    of = model.runner.model
    rounding = float(np.abs(wanted).max()) * 0.02
    rounding *= of.target.is_cuda + (
        of.products_by != "our own layers" and of.products.dtype == "bfloat16"
    )
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=atol + rounding)
    for step, token in enumerate(tokens):
        behind = wanted[step].max() - wanted[step, token]
        assert behind <= TIE + 2 * rounding, (
            f"token {step} is {token}, {behind} behind {wanted[step].argmax()}"
        )
    np.testing.assert_array_equal(logits.argmax(1), tokens)


def check_smollm(file: ModelFile, target: str) -> None:
    tokenizer = load_tokenizer(file)
    chat = ChatTemplate(template_of(file.metadata), tokenizer)
    model, reference = Sequence(file, target, context=256), ReferenceLlama(file)
    for question in QUESTIONS:
        prompt = tokenizer.encode(render(chat, [{"role": "user", "content": question}]))
        check_greedy(model, reference, prompt, STEPS, atol=1e-3)


def check_stories(file: ModelFile, target: str) -> None:
    tokenizer = load_tokenizer(file)
    model, reference = Sequence(file, target), ReferenceLlama(file)
    for opening in OPENINGS:
        check_greedy(model, reference, tokenizer.encode(opening), STEPS, atol=1e-3)
    if target == "cuda":
        return  # one rounding may change the whole story
    prompt = tokenizer.encode("Zoo")
    tokens, _ = greedy(model, prompt, 60 - 3)
    assert tokenizer.decode([*prompt, *tokens], special=False) == f" {GOLDEN}"


def check_tiny(file: ModelFile, target: str) -> None:
    """Weights of every kind, both layouts of rotary positions."""
    for interleaved in (True, False):
        config = replace(file.config, rope_interleaved=interleaved)
        one = replace(file, config=config)
        model, reference = Sequence(one, target), ReferenceLlama(one)
        for prompt in ([5], list(range(3, 40)), [7] * 17):
            check_greedy(model, reference, prompt, STEPS, atol=1e-3)


@pytest.mark.slow
def test_smollm(smollm: ModelFile):
    pytest.importorskip("jinja2", reason="chat templates need the models extra")
    check_smollm(smollm, "cpp")


def test_stories(stories: ModelFile):
    check_stories(stories, "cpp")


def test_tiny(tiny: ModelFile):
    check_tiny(tiny, "cpp")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_norms_of_any_stored_type(tmp_path: Path, kind: str):
    """They are read as numbers: the logits are those of the same numbers in float32."""
    gguf = pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import KINDS, runnable

    logits = []
    for stored in (kind, "f32"):
        made = runnable()
        for name, (_, values) in made.tensors.items():
            if "norm" in name:
                raw = gguf.quants.quantize(values[None], KINDS[kind])
                made.tensors[name] = (stored, gguf.quants.dequantize(raw, KINDS[kind])[0])
        file = open_model(made.write(tmp_path / f"{stored}.gguf"))
        assert file.tensors["norm"].kind == stored
        logits.append(Sequence(file).prefill([5, 9, 2]))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_linear_scaling_of_rope(tiny: ModelFile):
    scaled = replace(tiny, config=replace(tiny.config, rope=Rope(kind="linear", factor=4.0)))
    model, reference = Sequence(scaled), ReferenceLlama(scaled)
    check_greedy(model, reference, list(range(3, 40)), STEPS, atol=1e-3)
    model.reset()
    assert np.abs(model.prefill([5, 9, 2]) - Sequence(tiny).prefill([5, 9, 2])).max() > 1e-3


UNCOMPILED = """
import sys
from tests.serve.sequence import Sequence
from tilewright.serve.weights import open_model
model = Sequence(open_model(sys.argv[1]))
model.prefill([5, 9, 2])
tokens = [model.greedy()]
while len(tokens) < 6:
    tokens.append(model.decode(tokens[-1]))
print(*tokens, model.runner._steps[1].count)
"""


def test_without_a_compiler(tiny: ModelFile):
    """Kernels, attention and recorded steps on the interpreter, and one warning for all of it."""
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", UNCOMPILED, str(tiny.path)],
        env=os.environ | {"PATH": "", "CXX": "", "TILEWRIGHT_CXX": ""},
        capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    *tokens, launches = map(int, ran.stdout.split())
    assert ran.stderr.count("Warning") == ran.stderr.count("no C++ compiler was found") == 1
    assert launches > tiny.config.layers
    wanted = ReferenceLlama(tiny).forward([5, 9, 2, *tokens[:-1]])[2:]
    for step, token in enumerate(tokens):
        assert wanted[step].max() - wanted[step, token] <= TIE


@pytest.mark.gpu
def test_smollm_on_a_gpu(smollm: ModelFile):
    pytest.importorskip("jinja2", reason="chat templates need the models extra")
    check_smollm(smollm, "cuda")


@pytest.mark.gpu
def test_stories_on_a_gpu(stories: ModelFile):
    check_stories(stories, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("by_torch", [True, False])
def test_tiny_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny: ModelFile, by_torch: bool):
    if not by_torch:
        monkeypatch.setattr(llama_module, "products_of", lambda *_: None)
    check_tiny(tiny, "cuda")


# ---------------------------------------------------------------------------- prompts


PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 260, 50)]


def fresh(llama: Sequence, tokens: list[int]) -> np.ndarray:
    llama.reset()
    return llama.prefill(tokens)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_at_once_is_token_by_token(llama: Sequence):
    at_once = fresh(llama, PROMPT)
    llama.reset()
    for token in PROMPT:
        llama.prefill([token])
    close(llama.logits(), at_once)
    llama.reset()
    for token in PROMPT:
        llama.decode(token)
    close(llama.logits(), at_once)
    assert llama.length == len(PROMPT)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 17, 48, 49, 50])
def test_chunks(llama: Sequence, monkeypatch: pytest.MonkeyPatch, chunk: int):
    """The bits of the logits do not depend on how a prompt is cut."""
    at_once = fresh(llama, PROMPT)
    monkeypatch.setattr(llama, "chunk", chunk)
    np.testing.assert_array_equal(fresh(llama, PROMPT), at_once)


def test_a_prompt_in_pieces(llama: Sequence):
    at_once = fresh(llama, PROMPT)
    fresh(llama, PROMPT[:13])
    llama.prefill(np.array(PROMPT[13:31]))
    close(llama.prefill(PROMPT[31:]), at_once)


def test_a_kept_beginning(llama: Sequence):
    """Tokens of another sequence stay in the pages; none of them is seen."""
    other = PROMPT[::-1]
    wanted = fresh(llama, PROMPT[:20] + other)
    fresh(llama, PROMPT)
    llama.decode(9)
    llama.reset(20)
    assert llama.length == 20
    np.testing.assert_array_equal(llama.prefill(other), wanted)


def test_logits_have_their_own_memory(llama: Sequence):
    first = fresh(llama, PROMPT)
    kept = first.copy()
    llama.decode(4)
    np.testing.assert_array_equal(first, kept)
    assert np.abs(llama.logits() - first).max() > 1e-3


BAD_TOKENS = (
    [],
    [-1],
    [268],
    [3, 2**31],
    [2**70],
    [1.5],
    ["a"],
    [[3, 4]],
    [[3], [4, 5]],
    3,
    None,
    [None],
)


@pytest.fixture(scope="module")
def engine(tiny: ModelFile) -> Engine:
    return Engine(tiny, "cpp", Options(context=40))


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=str)
def test_hostile_tokens(engine: Engine, tokens: object):
    with pytest.raises(ModelError) as caught:
        engine.submit(tokens, Sampling())
    assert caught.value.code == "M106" and not engine.scheduler.has_work


@pytest.mark.parametrize("count", [40, 41, 1000])
def test_prompts_that_do_not_fit(engine: Engine, count: int):
    with pytest.raises(ModelError) as caught:
        engine.submit([3] * count, Sampling())
    assert caught.value.code == "M105" and "40" in caught.value.message
    assert not engine.scheduler.has_work


@pytest.mark.parametrize("context", [0, -1, 129, 2**40, "64", 1.5, True, np.int64(0), [64]])
def test_hostile_contexts(tiny: ModelFile, context: object):
    with pytest.raises(ModelError) as caught:
        Engine(tiny, "cpp", Options(context=context))  # pyright: ignore[reportArgumentType]
    assert caught.value.code == "M105"


@pytest.mark.parametrize(
    "sizes",
    [{"running": 0}, {"running": 1.5}, {"step_tokens": 1}, {"kv_tokens": 39}, {"kv_tokens": "x"},
     {"running": 8, "step_tokens": 8}],
    ids=str,
)  # fmt: skip
def test_hostile_sizes(tiny: ModelFile, sizes: dict[str, Any]):
    with pytest.raises(ModelError) as caught:
        Engine(tiny, "cpp", Options(context=40, **sizes))
    assert caught.value.code == "M106" and caught.value.where in sizes


def test_a_context_of_numpy_is_one(tiny: ModelFile):
    options = Options(context=np.int64(64))  # pyright: ignore[reportArgumentType]
    assert Engine(tiny, "cpp", options).context == 64


# ---------------------------------------------------------------------------- the recorded step


def test_a_decode_step_is_one_native_call(tiny: ModelFile, monkeypatch: pytest.MonkeyPatch):
    pool = pools.pool()
    calls: list[int] = []
    run = pool.run

    def counted(address: int, launches: int) -> None:
        calls.append(launches)
        run(address, launches)

    monkeypatch.setattr(pool, "run", counted)
    model = Sequence(tiny)
    model.prefill(PROMPT)
    model.decode(3)
    for token in (4, 5, 6):
        calls.clear()
        model.decode(token)
        assert calls == [model.runner._steps[1].count]
    assert model.runner._steps[1].count > tiny.config.layers  # all layers are in it
