"""Sampling in a recorded step on a GPU: `python3 -m bench.sampling`.

First the kernel alone, µs a launch, in a graph of ten. Then an engine with the shape of SmolLM2 and
random weights, µs a step: greedy, sampled in the step, and sampled by the host as where no kernel
samples; rounds in turns, medians; beside them the recorded step alone, so that the difference is
what the host adds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peer_models import SHAPES
from tilewright.runtime import cuda
from tilewright.serve import engine as engines
from tilewright.serve.gguf import Weight
from tilewright.serve.memory import Memory
from tilewright.serve.models.config import Metadata, read_config
from tilewright.serve.request import Request, Sampling
from tilewright.serve.sampler import Seats
from tilewright.serve.scheduler import Chunk
from tilewright.serve.weights import ModelFile
from tilewright.target import target

KERNELS: dict[str, dict[str, Any]] = {
    "temperature": {}, "top_k 50": {"top_k": 50}, "top_p 0.9": {"top_p": 0.9},
    "both, penalty": {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
}  # fmt: skip
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 1}


def say(*columns: Any) -> None:
    print(" | ".join(f"{c:.0f}" if isinstance(c, float) else str(c) for c in columns), flush=True)


def kernels() -> None:
    memory, rng = Memory(target("cuda")), np.random.default_rng(0)
    say(
        "kernel, µs", *(f"{v // 1000}k x {n}" for v in (49152, 128256, 151936) for n in (1, 16, 64))
    )
    rows: dict[str, list[float]] = {name: [] for name in KERNELS}
    for vocab in (49152, 128256, 151936):
        logits = memory.put(rng.normal(0, 3, (64, vocab)).astype(np.float32))
        seats = Seats(memory, logits, memory.put(np.zeros((2, 64), np.int32)))
        for count in (1, 16, 64):
            launch = seats.bind(count)
            graph = cuda.Graph([launch] * 10)
            for name, options in KERNELS.items():
                how = Sampling(temperature=1.0, max_tokens=1000, **options)
                said = rng.integers(0, vocab, 500).tolist()
                requests = [Request(i, said, how, seed=i) for i in range(count)]
                times = []
                for _ in range(6):
                    seats._held = [None] * 64
                    seats.take([Chunk(r, 499, 500) for r in requests])
                    cuda.synchronize()
                    began = time.perf_counter()
                    graph.launch()
                    cuda.synchronize()
                    times.append((time.perf_counter() - began) * 1e5)
                rows[name].append(statistics.median(times[1:]))
    for name, times in rows.items():
        say(name, *times)


class Numbers:
    """A tokenizer of numbers."""

    ends: frozenset[int] = frozenset()
    control: frozenset[int] = frozenset()

    def piece(self, token: int) -> bytes:
        return b"%d " % token

    def stream(self) -> Numbers:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def built(shape: str) -> engines.Engine:
    config, rng = read_config(Metadata(SHAPES[shape]), has_head=True), np.random.default_rng(0)
    weights = {}
    for name, size in config.shapes().items():
        x = rng.normal(0, size[-1] ** -0.5, size).astype(np.float32) if len(size) > 1 else None
        if x is None:
            weights[name] = Weight(name, "f32", size, np.ones(size, np.float32))
        elif not (name == "lm_head" and config.tied_embedding):
            bits = (x.view(np.uint32) >> 16).astype(np.uint16)
            weights[name] = Weight(name, "bf16", size, bits)
    weights.setdefault("lm_head", weights["embed"])
    engines.load_tokenizer = lambda file: Numbers()
    engines.cost_key = lambda *_: ""
    file = ModelFile(Path("random"), config, weights, {})
    return engines.Engine(file, "cuda", engines.Options(context=1024, running=16))


def timed(one: engines.Engine, count: int, options: dict[str, Any], steps: int = 40) -> float:
    """The median of a step, µs."""
    rng = np.random.default_rng(1)
    how = Sampling(max_tokens=steps + 40, ignore_eos=True, **options)
    requests = [one.submit(rng.integers(0, 2000, 20).tolist(), how) for _ in range(count)]
    while min(r.answered for r in requests) < 5:
        one.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        one.step()
        times.append((time.perf_counter() - began) * 1e6)
    for request in requests:
        one.cancel(request)
    while one.scheduler.has_work or one._flight:
        one.step()
    return statistics.median(times)


def alone(step: Callable[[], None], replays: int = 20) -> float:
    step()
    cuda.synchronize()
    began = time.perf_counter()
    for _ in range(replays):
        step()
    cuda.synchronize()
    return (time.perf_counter() - began) / replays * 1e6


def steps(one: engines.Engine, counts: tuple[int, ...] = (1, 16)) -> None:
    runner, seats = one.runner, one.runner.seats
    say(
        "step, µs",
        "greedy",
        "alone",
        "host adds",
        "in the step",
        "alone",
        "host adds",
        "by the host",
    )
    for count in counts:
        found: dict[str, list[float]] = {"greedy": [], "step": [], "host": []}
        for _ in range(4):
            for name, options in (("greedy", {}), ("step", SAMPLED), ("host", SAMPLED)):
                runner.seats = None if name == "host" else seats
                found[name].append(timed(one, count, options))
        greedy, sampled, host = (statistics.median(x[1:]) for x in found.values())
        bare, drawn = alone(runner._steps[count]), alone(runner._sampling[count])
        say(f"{count} answers", greedy, bare, greedy - bare, sampled, drawn, sampled - drawn, host)


def main() -> None:
    one = built("smollm2-135m")
    for count in (1, 16):  # compiles
        for options in ({}, SAMPLED):
            timed(one, count, options, 2)
    while len(sys.argv) > 1 and not Path(sys.argv[1]).exists():  # until others leave the GPU
        time.sleep(0.1)
    steps(one)
    kernels()


if __name__ == "__main__":
    main()
