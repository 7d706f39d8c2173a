"""The reference model: known answers of real models, and its parts against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.models.reference import ReferenceLlama
from tests.models.stories import write
from tests.serve.tiny import render

from tilewright.errors import MissingExtra
from tilewright.serve.chat import ChatTemplate, template_of
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import ModelFile, open_model, packaged_model

GOLDEN = (
    "Zoo was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but she didn't want to play with"
)


@pytest.fixture(scope="module")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    return open_model(write(data_dir / "llm", tmp_path_factory.mktemp("stories") / "m.gguf"))


def test_stories_golden_text(stories: ModelFile):
    tokenizer, model = load_tokenizer(stories), ReferenceLlama(stories)
    prompt = tokenizer.encode("Zoo")
    ids = prompt + model.generate(prompt, 60 - 3)
    assert tokenizer.decode(ids, special=False) == f" {GOLDEN}"


def test_token_by_token_is_all_at_once(stories: ModelFile):
    ids = load_tokenizer(stories).encode("Once upon a time there was a dragon")
    model = ReferenceLlama(stories)
    at_once = model.forward(ids)
    model.reset()
    one_by_one = np.concatenate([model.forward([i]) for i in ids])
    np.testing.assert_allclose(one_by_one, at_once, rtol=1e-4, atol=1e-4)


def test_two_forms_of_rotation_are_one(stories: ModelFile):
    """With the rows of Q and K of each head reordered, half rotation gives the same logits."""
    ids = load_tokenizer(stories).encode("Lily had a red ball")
    interleaved = ReferenceLlama(stories)
    halves = ReferenceLlama(stories)
    halves.config = config = replace(stories.config, rope_interleaved=False)
    order = np.concatenate([np.arange(0, config.head_dim, 2), np.arange(1, config.head_dim, 2)])
    for i in range(config.layers):
        for name in (f"layers.{i}.attn.q", f"layers.{i}.attn.k"):
            rows = halves.weights[name].reshape(-1, config.head_dim, config.dim)
            halves.weights[name] = rows[:, order].reshape(-1, config.dim)
    expected = interleaved.forward(ids)
    np.testing.assert_allclose(halves.forward(ids), expected, rtol=1e-4, atol=1e-4)
    halves.config = stories.config
    halves.reset()
    assert np.abs(halves.forward(ids) - expected).max() > 0.1  # the test can tell them apart


def test_smollm_answers():
    """Five prompts, up to 64 tokens each, greedy."""
    pytest.importorskip("jinja2", reason="chat templates need the models extra")
    try:
        file = open_model(packaged_model())
    except MissingExtra as missing:
        pytest.skip(f"SmolLM2 is not installed: {missing.hint}")
    tokenizer, model = load_tokenizer(file), ReferenceLlama(file)
    source = template_of(file.metadata)
    chat = ChatTemplate(source, tokenizer)
    answers = {
        "What is the capital of France?": "The capital of France is Paris.",
        "What is 2+2?": "4",
        "What colour is the sky on a clear day?": "blue",
        "Write one sentence about the sea.": "sea",
        "Name three fruits.": "1.",
    }
    for question, expected in answers.items():
        prompt = tokenizer.encode(render(chat, [{"role": "user", "content": question}]))
        answer = tokenizer.decode(model.generate(prompt, 64, stop=(tokenizer.named.get("eos", 0),)))
        assert expected in answer, f"{question} -> {answer}"
        if expected.startswith("The capital"):
            assert answer == expected
