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

from tilewright.attention import arguments
from tilewright.attention.families import hopper
from tilewright.ops.rope import Rope
from tilewright.runtime import cuda
from tilewright.runtime.step import Step
from tilewright.serve import engine, runner
from tilewright.serve.gguf import Weight
from tilewright.serve.memory import Memory
from tilewright.serve.models.config import ModelConfig
from tilewright.serve.models.llama import Llama
from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Chunk, Limits
from tilewright.serve.weights import ModelFile
from tilewright.target import target
from tilewright.toolchain import nvrtc

CONFIG = ModelConfig(
    architecture="llama", layers=2, dim=64, ffn_dim=96, qo_heads=4, kv_heads=4, head_dim=16,
    vocab=128, context=96, rope=Rope(), rms_eps=1e-5, tied_embedding=True, rope_interleaved=True,
)  # fmt: skip
BFLOAT16 = 0.06  # logits of about 3 differ by so much where keys and values are bfloat16
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


def forget() -> None:
    """Gives back what nothing refers to, and the scalars of variants, which stay on a device."""
    arguments._constant.cache_clear()
    gc.collect()


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("windowed", [(), (True, False)])
def test_launches_of_a_step(
    fake: ctypes.CDLL,  # noqa: F811
    samples: bool,
    windowed: tuple[bool, ...],
):
    """On the fake driver, whose graph counts them: 183 for the 30 layers of SmolLM2, one more that
    samples. The pages of a further group of layers are computed beside the embedding."""
    config = replace(CONFIG, windowed=windowed, window=20 * bool(windowed))
    sequence = Sequence(model_file(config), "cuda:sm_90a", 32)
    step = sequence.runner._record(1, 1, samples)
    wanted = CONFIG.layers * A_LAYER + AROUND + samples
    assert step.count == fake.fake_nodes() == fake.fake_overlapping() == wanted
    assert A_LAYER * 30 + AROUND == 183
    assert missing(step.nodes, step.edges) == []
    for dropped in step.edges:
        assert dropped in missing(step.nodes, [e for e in step.edges if e != dropped])
    del sequence, step
    forget()


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_steps_of_other_models_are_bound_and_recorded(fake: ctypes.CDLL):  # noqa: F811
    """Norms of heads and a quantised embedding: arrays of a GPU in every shape that kernels take;
    a prompt on the fake driver, then answers of a number that is filled up."""
    file = model_file(replace(CONFIG, qk_norm=True))
    blocks = np.zeros((CONFIG.vocab, CONFIG.dim // 32 * 34), np.uint8)
    embed = Weight("embed", "q8_0", (CONFIG.vocab, CONFIG.dim), blocks)
    file = replace(file, tensors={**file.tensors, "embed": embed, "lm_head": embed})
    of = runner.Runner(Llama(file, "cuda:sm_90a", 97), Limits(64, 12, 64), 96)
    answers = [Answer([n], n) for n in range(9)]
    for answer in answers:
        answer.request.pages = [answer.request.id]
    advance(of, answers)
    advance(of, answers)
    assert set(of._steps) == {16} and of._lengths.tolist()[:17] == [2] * 9 + [-1] * 7 + [0]
    del of
    gc.collect()


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("windowed", [(), (True, False)])
def test_prompts_are_bound_to_what_the_host_writes(
    fake: ctypes.CDLL,  # noqa: F811
    windowed: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    """On the fake driver, whose memory is the host's: the Hopper kernels of all layers read their
    plan, and the rows of it, where the one copy of a step with prompts goes."""
    monkeypatch.setattr(hopper, "tensor_map", lambda *_: [0] * 16)
    config = replace(CONFIG, head_dim=64, dim=256, kv_heads=2, context=400)
    config = replace(config, windowed=windowed, window=48 * bool(windowed))
    of = runner.Runner(Llama(model_file(config), "cuda:sm_90a", 401), Limits(64, 6, 200), 400)
    request, groups = Request(0, list(range(90))), 1 + bool(windowed)
    request.pages = [*range(6 * groups)]
    of._lengths[:] = 9
    of.kv_len.copy_from(of._lengths)
    of.run([Chunk(request, 0, 70)]).wait()
    assert of.kv_len.to_numpy()[:3].tolist() == [70, 0, 9]  # a row without keys behind
    sent = of.ints.to_numpy()
    bound, end = of._mixed[0, 128], (3 + groups) * of.tokens + len(of.table)
    assert len(bound) == 2 and len(of._step_plans) == groups
    addresses = dict[Any, list[int]]()
    for attention, planner in of._step_plans.items():
        assert planner.shape.family == "hopper" and not planner.shape.splits
        work = planner.work(128, np.array([0, 70]), np.array([70]), 0)
        begin, end = end, end + planner.words(128)
        np.testing.assert_array_equal(sent[begin : begin + len(work)], work)
        parts = begin, begin + planner.requests + 1
        addresses[attention] = [of.ints.pointer + 4 * at for at in parts]
        del attention, planner
    assert sent[:70].tolist() == request.tokens[:70] and not sent[70:128].any()
    for group in range(groups):
        pages = sent[(3 + group) * of.tokens :][:128]
        assert pages[:70].tolist() == [groups * (n // 16) + group for n in range(70)]
        assert (pages[70:] == -1).all()
    for attention, launch in zip([x.attention for x in of.model.layers], bound, strict=True):
        params, planner = bytes(launch.launch.params), of._step_plans[attention]
        assert all(x.to_bytes(8, "little") in params for x in addresses[attention])
        assert launch.launch.grid[0] == min(planner.items(128), planner.workers)
        del attention, launch, planner
    del of, bound, addresses
    forget()


def test_values_are_sent_from_two_buffers(fake: ctypes.CDLL):  # noqa: F811
    """In turn, and each waits for what it sent before: nothing under way is overwritten."""
    memory, calls = Memory(target("cuda:sm_90a")), list[tuple[str, Any]]()
    array = memory.put(np.zeros(6, np.int32))
    send, copied = memory.sender(array), array.to_numpy
    with pytest.MonkeyPatch.context() as patch:
        call = cuda.driver().call

        def noted(name: str, *args: Any) -> Any:
            if name == "cuMemcpyHtoDAsync_v2":
                calls.append((name, args[1]))
            elif name in ("cuEventSynchronize", "cuEventRecord"):
                calls.append((name, args[0]))
            return call(name, *args)

        patch.setattr(cuda.driver(), "call", noted)
        for values in ([5, 7], np.arange(6), [9], [1, 2, 3]):
            send(values)
    assert copied().tolist() == [1, 2, 3, 3, 4, 5]
    one, two = calls[:3], calls[3:6]
    names = ["cuEventSynchronize", "cuMemcpyHtoDAsync_v2", "cuEventRecord"]
    assert calls == [*one, *two] * 2 and [name for name, _ in one] == names
    assert one[0][1] == one[2][1] and two[0][1] == two[2][1] and one[1] != two[1]
    del array, send, copied
    gc.collect()


def test_the_host_writes_what_it_wants_otherwise():
    """Tokens that are not the likeliest, a jump back, and the likeliest again: logits as from
    reading the same tokens as a prompt."""
    sequence, prompt = Sequence(model_file()), [5, 9, 2]
    writes: list[Any] = []
    memory = sequence.runner.model.memory
    write = memory.write
    memory.write = lambda array, values, **how: (writes.append(array), write(array, values, **how))  # type: ignore[method-assign]
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
    assert decode(likeliest) == decode((sequence.greedy() + 1) % CONFIG.vocab) == 1
    del said[4:]
    sequence.reset(4)
    sequence.request.tokens[:] = said
    assert decode(11) == 3  # a token, a length, and the pages of another request


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [True, False])
def test_a_step_on_a_gpu_says_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch, overlaps: bool):
    monkeypatch.setattr(runner, "Step", lambda bounds: Step(bounds, overlaps))
    file = model_file(replace(CONFIG, layers=5, context=256))
    sides = [Sequence(file, target, 200) for target in ("cpp", "cuda")]
    for side in sides:
        side.prefill(range(3, 40))
    tokens, differ = [], 0.0
    for _ in range(64):
        on_cpu, on_gpu = (side.logits() for side in sides)
        differ = max(differ, float(np.abs(on_cpu - on_gpu).max()))
        tokens.append(int(on_cpu.argmax()))
        assert on_cpu.max() - on_cpu[sides[1].greedy()] <= 2 * BFLOAT16
        for side in sides:
            side.decode(tokens[-1])
    assert 0 < differ <= BFLOAT16, differ
    assert len(set(tokens)) > 8


@pytest.mark.gpu
def test_bits_of_answers_on_a_gpu():
    """Logits of twelve answers, each alone, and together, with prompts read beside them."""
    file = model_file(replace(CONFIG, layers=3, context=1200))
    limits = Limits(1000, 12, 1300)
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, CONFIG.vocab, n).tolist() for n in (3, 40, 700, 1, 9, 64, 65, 1100)]
    prompts += [rng.integers(0, CONFIG.vocab, n).tolist() for n in (17, 300, 128, 2)]
    alone = runner.Runner(Llama(file, "cuda", 1201), limits, 1200)
    wanted = [Answer(p, n) for n, p in enumerate(prompts)]
    for one in wanted:
        for _ in range(30):
            advance(alone, [one])
    together = runner.Runner(Llama(file, "cuda", 1201), limits, 1200)
    answers = [Answer(p, n) for n, p in enumerate(prompts)]
    for count in range(1, 13):
        advance(together, answers[:count])  # one of them a prompt
        advance(together, answers[:count])
    while answers[-1].request.answered < 30:
        advance(together, [a for a in answers if a.request.answered < 30])
    for one, other in zip(wanted, answers, strict=True):
        assert one.request.tokens == other.request.tokens
        np.testing.assert_array_equal(one.logits, other.logits)
    assert set(together._steps) == {1, 2, 3, 4, 5, 6, 7, 8, 16}


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [False, True])
def test_an_engine_that_runs_ahead_on_a_gpu(monkeypatch: pytest.MonkeyPatch, samples: bool):
    """Ten requests that come one by one, with end tokens: as where each step is waited for, and
    where the host samples them."""
    monkeypatch.setattr(engine, "load_tokenizer", lambda file: Spelled())
    monkeypatch.setattr(engine, "cost_key", lambda *_: "")
    file, rng = model_file(replace(CONFIG, context=256)), np.random.default_rng(2)
    prompts = [
        rng.integers(0, CONFIG.vocab, n).tolist() for n in (3, 40, 1, 17, 90, 16, 2, 31, 8, 5)
    ]
    said: list[list[list[int]]] = []
    for ahead, in_step in ((False, False), (False, True), (True, True), (True, False)):
        one = engine.Engine(file, "cuda", engine.Options(context=256, running=12))
        assert one.runs_ahead
        one.runs_ahead, requests = ahead, []
        one.runner.seats = one.runner.seats if in_step else None
        while len(requests) < len(prompts) or one.scheduler.has_work:
            if len(requests) < len(prompts):
                options = OPTIONS[len(requests) % len(OPTIONS)] if samples else {}
                how = Sampling(max_tokens=50 + 10 * (len(requests) % 3), **options)
                requests.append(one.submit(prompts[len(requests)], how))
            for _ in range(3):
                one.step()
        said.append([r.answer for r in requests])
        assert {r.finish for r in requests} == {"stop", "length"}
        assert bool(one.runner._sampling) == (samples and in_step)
    assert said[0] == said[1] == said[2] == said[3]


OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "seed": 3}, {"temperature": 1.5, "top_p": 0.9, "seed": 4}, {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 9, "logit_bias": {77: 6.0}, "seed": 6},
    {"temperature": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.7, "seed": 5},
    {"temperature": 1.0, "logprobs": 3, "seed": 8},
)  # fmt: skip


class Spelled:
    """A tokenizer of numbers; some tokens end an answer."""

    ends, control = frozenset({7, 19, 64}), frozenset[int]()

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()


class Answer:
    """A request with pages of its own, and the logits of each of its tokens."""

    def __init__(self, prompt: list[int], number: int) -> None:
        self.request = Request(number, list(prompt))
        self.request.pages = list(range(76 * number, 76 * number + 76))
        self.logits: list[np.ndarray] = []


def advance(of: runner.Runner, answers: list[Answer]) -> None:
    """One step: a prompt is read at once."""
    ordered = sorted(answers, key=lambda a: a.request.computed == 0)
    requests = [a.request for a in ordered]
    result = of.run([Chunk(r, r.computed, len(r.tokens)) for r in requests])
    result.wait()
    for i, (answer, request) in enumerate(zip(ordered, requests, strict=True)):
        answer.logits.append(result.row(i).copy())
        request.computed = len(request.tokens)
        request.tokens.append(result.tokens[i])
