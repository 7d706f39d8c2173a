"""The sampler of a recorded step: its kernel on simulated warps, as cubins, and on a GPU, against
the native sampler of the CPU, whose tokens are the same to the bit."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from tests.attention import simulated
from tests.cubin.test_ops import ARCHS
from tests.runtime.test_cuda import fake  # noqa: F401 - a fixture

from tilewright.attention.spec import compile_cuda
from tilewright.runtime import cuda
from tilewright.runtime.view import view
from tilewright.serve import sampler
from tilewright.serve.memory import Memory
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import Seats, sample
from tilewright.serve.scheduler import Chunk
from tilewright.target import target
from tilewright.toolchain import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_cubin_without_spills(arch: str):
    found = compile_cuda(sampler.source("sample_gpu.cuh"), arch).resources["sample_rows"]
    assert found.spill_bytes == found.stack == 0
    assert 0 < found.registers * sampler.THREADS <= 65536


def words(array: Any) -> np.ndarray:
    """The memory of an array of the fake driver."""
    count = int(np.prod(array.shape)) * array.dtype.itemsize // 4
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(view(array).pointer))


class Rows:
    """Rows of logits in memory of a GPU, or of the fake driver, and what samples them there."""

    def __init__(self, logits: np.ndarray, dtype: str, on_gpu: bool) -> None:
        self.on_gpu, memory = on_gpu, Memory(target("cuda:sm_90a"))
        self.logits = memory.put(logits, dtype)
        self.tokens = memory.put(np.full((2, len(logits)), -7, np.int32))
        self.seats = Seats(memory, self.logits, self.tokens)
        self.launches: dict[int, Any] = {}

    def draw(self, requests: list[Request | None], seed: int = 0) -> tuple[list[int], list[int]]:
        """What the next step reads, and what is drawn."""
        plain, count = Request(99, [1]), len(requests)
        chunks = [Chunk(r or plain, 0, len((r or plain).tokens)) for r in requests]
        sampled = {r for r in requests if r and not r.sampling.is_plain_greedy}
        assert self.seats.take(chunks) == sampled
        if not sampled:
            return [-7] * count, [-7] * count
        launch = self.launches.setdefault(count, self.seats.bind(count))
        if self.on_gpu:
            launch.run(cuda.current_stream(0))
        else:
            run = simulated.kernel(sampler.source("sample_gpu.cuh"), "sample_rows", "SampleParams")
            seats = self.seats
            arrays = seats._rows, seats._scores, self.tokens, *filter(None, seats._edits)
            writes = [words(x) for x in arrays]
            # Each thread of a CTA stores what it knows of its row.
            simulated.launch(run, launch.params, sampler.THREADS, count, seed, writes,
                             [words(self.logits)], equal_stores=True)  # fmt: skip
        tokens, drawn = self.tokens.to_numpy()[:, :count].tolist()
        return tokens, drawn


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def on_gpu(request: pytest.FixtureRequest) -> bool:
    if request.param == "fake":
        if not nvrtc.available():
            pytest.skip("NVRTC is not installed")
        request.getfixturevalue("fake")
    return request.param == "gpu"


def random_options(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Any of the parameters, each in half of the requests."""
    biases = {int(t): float(rng.choice([-100, -1.5, 2.0, 30])) for t in rng.integers(0, vocab, 9)}
    options: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 3.0])),
        "top_k": int(rng.choice([1, 7, 50, vocab])),
        "top_p": float(rng.choice([1e-9, 0.5, 0.9, 0.999])),
        "min_p": float(rng.choice([0.01, 0.2, 1.0])),
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3,
        "logit_bias": biases,
    }  # fmt: skip
    return {name: x for name, x in options.items() if rng.integers(2)} | {"seed": 1}


def random_logits(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Rows of several spreads, some with equal logits, some flat, some with excluded tokens; as
    bits where they are bfloat16."""
    x = rng.normal(0, 1, shape) * rng.choice([0.01, 1, 3, 10], (shape[0], 1))
    for row in x[rng.integers(0, 2, shape[0]) == 1]:
        row[:] = np.round(row, int(rng.integers(0, 3)))
    x[rng.integers(0, 9, shape[0]) == 0, 1::3] = -np.inf
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits.view(np.float32)


def check(rng: np.random.Generator, shape: tuple[int, int], dtype: str, steps: int, on_gpu: bool):
    """Steps of rows with random parameters, some of them not sampled: tokens of the native sampler,
    with edits that the kernel has kept itself."""
    vocab = shape[1]
    logits = random_logits(rng, shape, dtype)
    rows = Rows(logits, dtype, on_gpu)
    wide = (logits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else logits
    requests: list[Request | None] = []
    for i in range(shape[0]):
        how = Sampling(max_tokens=steps + 9, **random_options(rng, vocab))  # 8 have been answered
        said = rng.integers(0, vocab, int(rng.integers(1, 9))).tolist()
        request = Request(i, said, how, seed=int(rng.integers(2**63)) * 2 + 1)
        request.prompt_tokens = len(said) - int(rng.integers(len(said)))
        request.counts.update(request.answer)
        requests.append(None if rng.integers(5) == 0 else request)
    held = [r for r in requests if r]
    for step in range(steps):
        wanted = iter(token for token, _ in sample(held, [wide[r.id] for r in held]))
        tokens, drawn = rows.draw(requests, step)
        for i, request in enumerate(requests):
            if request is None:
                continue
            token = next(wanted)
            if request.sampling.is_plain_greedy:
                continue
            assert drawn[i] == tokens[i] == token, (step, i, request.sampling)
            request.tokens.append(token)
            request.counts[token] += 1
    kept = [r if r and not r.sampling.is_plain_greedy else None for r in requests]
    assert rows.seats._held == [r and (r, r.answered) for r in kept]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 1), (5, 33), (8, 1000), (12, 5003)], ids=str)
def test_tokens_are_those_of_the_cpu(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str, on_gpu: bool
):
    check(rng, shape, dtype, 4, on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("vocab", [49_152, 128_256, 151_936])
def test_tokens_of_large_vocabularies(rng: np.random.Generator, count: int, vocab: int):
    for dtype in ("float32", "bfloat16"):
        check(rng, (count, vocab), dtype, 5, on_gpu=True)


def test_logits_that_are_no_numbers(on_gpu: bool):
    """No token is drawn; what the next step reads is left as it is. Rows beside are sampled."""
    x = np.tile(np.arange(2100, dtype=np.float32), (4, 1))
    x[0, 5], x[2, 7], x[3] = np.nan, np.inf, -np.inf
    rows, how = (
        Rows(x, "float32", on_gpu),
        Sampling(temperature=1.0, top_k=1, repetition_penalty=1.1),
    )
    requests: list[Request | None] = [Request(i, [1], how) for i in range(4)]
    assert rows.draw(requests) == ([-7, 2099, -7, -7], [-1, 2099, -1, -1])


def test_rows_are_written_where_requests_change(on_gpu: bool, monkeypatch: pytest.MonkeyPatch):
    """Not for a step behind another; where one goes, comes, or where a token is computed again.
    Rows behind those of a step are cleared."""
    x = np.random.default_rng(2).normal(0, 1, (3, 300)).astype(np.float32)
    rows, writes = Rows(x, "float32", on_gpu), []
    write = rows.seats._memory.write
    monkeypatch.setattr(rows.seats._memory, "write", lambda *a: (writes.append(1), write(*a)))
    how = Sampling(temperature=1.0, frequency_penalty=1.0)
    first, second = (Request(i, [1, 2], how, seed=i) for i in (3, 4))

    def step(requests: list[Request | None]) -> int:
        """How often rows are written; the tokens are those of the CPU."""
        writes.clear()
        drawn = rows.draw(requests)[1]
        for i, request in enumerate(requests):
            if request:
                assert drawn[i] == sample([request], [x[i]])[0][0]
                request.tokens.append(drawn[i])
                request.counts[drawn[i]] += 1
        return len(writes)

    assert [step([first, None, second]) for _ in range(3)] == [2, 0, 0]
    first.counts[first.tokens.pop()] -= 1
    assert [step([first, None, second]) for _ in range(2)] == [1, 0]
    assert [step([second, None]), step([second, first, None]), step([second])] == [2, 1, 1]


def test_rows_behind_a_step_without_samples(on_gpu: bool):
    """A smaller step without samples leaves rows as they are: the next larger one clears them."""
    x = np.random.default_rng(5).normal(0, 1, (3, 300)).astype(np.float32)
    rows, how = Rows(x, "float32", on_gpu), Sampling(temperature=1.0)
    one, two, last = (Request(i, [1, 2], how, seed=i) for i in (6, 7, 8))
    rows.draw([one, two, last])
    rows.draw([None, None])  # of greedy answers; nothing is launched for it
    last.tokens.append(1)  # preempted and admitted again, it comes back behind the two
    rows.seats._memory.write(rows.tokens, np.full((2, 3), -7))
    tokens, drawn = rows.draw([None, None, last])
    assert tokens[:2] == [-7, -7]
    assert drawn[2] == sample([last], [x[2]])[0][0]
