"""The decode step of a model on a GPU: how many launches it has, and what they depend on."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture
from tests.runtime.test_step import missing
from tests.serve.sequence import Sequence

from tilewright.ops.rope import Rope
from tilewright.runtime.step import Step
from tilewright.serve import runner
from tilewright.serve.weights import ModelConfig, ModelFile, Weight
from tilewright.toolchain import nvrtc

CONFIG = ModelConfig(
    architecture="llama", layers=2, dim=64, ffn_dim=96, qo_heads=4, kv_heads=4, head_dim=16,
    vocab=128, context=96, rope=Rope(), rms_eps=1e-5, tied_embedding=True, rope_interleaved=True,
)  # fmt: skip
A_LAYER = 6  # q, k, v · RoPE and append · attention · o · gate and up · down
AROUND = 3  # embedding and positions · head · argmax


def model_file(config: ModelConfig = CONFIG) -> ModelFile:
    rng = np.random.default_rng(3)
    tensors = {
        name: Weight(name, "f32", shape, rng.normal(0, shape[-1] ** -0.5, shape).astype("f4"))
        for name, shape in config.shapes().items()
    }
    for name, w in tensors.items():
        if "norm" in name:
            w.data[...] = 1 + rng.normal(0, 0.3, w.shape)
    tensors["lm_head"] = tensors["embed"]
    return ModelFile(Path("tiny.gguf"), config, tensors, {})


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_launches_of_a_step(fake: ctypes.CDLL):  # noqa: F811
    """On the fake driver, whose graph counts them: 183 for the 30 layers of SmolLM2."""
    sequence = Sequence(model_file(), "cuda:sm_90a", 32)
    step = sequence.runner._record(1)
    wanted = CONFIG.layers * A_LAYER + AROUND
    assert step.count == fake.fake_nodes() == fake.fake_overlapping() == wanted
    assert A_LAYER * 30 + AROUND == 183
    assert missing(step.nodes, step.edges) == []
    for dropped in step.edges:
        assert dropped in missing(step.nodes, [e for e in step.edges if e != dropped])
    del sequence, step
    gc.collect()


def test_the_host_writes_what_it_wants_otherwise():
    """Tokens that are not the likeliest, a jump back, and the likeliest again, which nobody
    writes: logits as from reading the same tokens as a prompt."""
    sequence, prompt = Sequence(model_file()), [5, 9, 2]
    writes: list[Any] = []
    memory = sequence.runner.model.memory
    write = memory.write
    memory.write = lambda array, values: (writes.append(array), write(array, values))  # type: ignore[method-assign]
    sequence.prefill(prompt)
    said = list(prompt)

    def decode(token: int) -> int:
        writes.clear()
        said.append(token)
        sequence.decode(token)
        fresh = Sequence(model_file())
        np.testing.assert_allclose(sequence.logits(), fresh.prefill(said), rtol=2e-4, atol=2e-5)
        return len(writes)

    assert decode(7) > 0  # not what the prompt's logits say, or a new page
    likeliest = sequence.greedy()
    assert decode(likeliest) == 0
    assert decode((sequence.greedy() + 1) % CONFIG.vocab) == 1
    del said[4:]
    sequence.reset(4)
    sequence.request.tokens[:] = said
    assert decode(11) == 2  # a token and a length


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [True, False])
def test_a_step_on_a_gpu_says_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch, overlaps: bool):
    monkeypatch.setattr(runner, "Step", lambda bounds: Step(bounds, overlaps))
    file = model_file(replace(CONFIG, layers=5, context=256))
    sides = [Sequence(file, target, 200) for target in ("cpp", "cuda")]
    for side in sides:
        side.prefill(range(3, 40))
    tokens = []
    for _ in range(64):
        tokens.append(sides[0].greedy())
        assert sides[1].greedy() == tokens[-1]
        for side in sides:
            side.decode(tokens[-1])
        np.testing.assert_allclose(sides[1].logits(), sides[0].logits(), rtol=1e-3, atol=1e-4)
    assert len(set(tokens)) > 8
