"""Measures steps of an engine and fits the cost of a step: `tilewright tune serve`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tilewright.errors import ArgumentError
from tilewright.runtime import pool
from tilewright.serve.cost import CONSTANTS, CostModel, Work
from tilewright.serve.engine import Engine
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.request import Request
from tilewright.serve.scheduler import Chunk, work_of

FEWEST = 2 * len(CONSTANTS)  # samples of a fit
GROUP = 20  # steps that are measured in turns
KNEES = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

Sample = tuple[Work, float]
"""What a step read, and the seconds it took."""


def fit(samples: Sequence[Sample], key: str = "", joins: bool = False) -> CostModel:
    """Fits the constants to measured steps, by least squares of the relative error. The time is
    linear in them: a constant's factor is the time by a model where it is 1 and all others 0.
    `joins`: that of the runner, whose steps may have more rows than are read.
    Raises ArgumentError[A109] for fewer samples than constants."""
    if len(samples) < len(CONSTANTS):
        rule = f"{len(samples)} measured steps for {len(CONSTANTS)} constants"
        raise ArgumentError("A109", rule, where="samples")
    best, least = CostModel(key=key), np.inf
    for knee in KNEES:
        start = CostModel(knee=knee, is_filled=int(joins), key=key)
        units = [replace(start, **{name: 1.0}) for name in CONSTANTS]
        x = np.array([[unit.seconds(work) / s for unit in units] for work, s in samples])
        constants = _least_squares(x, np.ones(len(samples)))
        error = float(((x @ constants - 1) ** 2).sum())
        if error < least * (1 - 1e-9):
            values = dict(zip(CONSTANTS, constants.tolist(), strict=True))
            best, least = replace(start, **values), error
    return best


def errors(model: CostModel, samples: Sequence[Sample]) -> list[float]:
    """The relative error of the predicted time of each measured step."""
    return [abs(model.seconds(work) / seconds - 1) for work, seconds in samples]


def _least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """argmin |x c - y| with c ≥ 0: of the constants that would be negative the worst is set to 0,
    until none is."""
    scale = np.maximum(np.linalg.norm(x, axis=0), 1e-300)
    free = np.arange(x.shape[1])
    while True:
        c = np.zeros(x.shape[1])
        c[free] = np.linalg.lstsq(x[:, free] / scale[free], y, rcond=None)[0]
        if c.min() >= 0:
            return c / scale
        free = free[free != c.argmin()]


def measure(engine: Engine, seconds: float, most: int = 1000, seed: int = 0) -> Iterator[Sample]:
    """Steps of random states with the time of each, of four runs, which a `GROUP` of them take in
    turns. Where the engine launches ahead a step is launched behind itself: the median of the times
    between the two ends. Elsewhere the least; one thread on a CPU is timed while it computes, and
    not while others have its core. Overwrites the KV cache. Ends after `most` steps, or after
    `seconds` but not before `FEWEST`. Raises ArgumentError[A109] for a context of one token."""
    rng = np.random.default_rng(seed)
    for array in (*engine.runner.keys, *engine.runner.values):
        engine.model.memory.write(array, 0)
    if engine.context < 2:
        rule = f"a context of {engine.context}: no prompt and no answer"
        raise ArgumentError("A109", rule, where="context", hint="2 or more")
    is_alone = not engine.model.target.is_cuda and pool.wanted_threads() == 1
    clock = time.thread_time if is_alone else time.perf_counter
    ends = time.perf_counter() + seconds

    def timed(chunks: list[Chunk]) -> float:
        began, logits = clock(), engine.runner.run(chunks)
        if engine.runs_ahead:
            front, logits = logits, engine.runner.run(chunks)
            front.wait()
            began = clock()
        logits.wait()
        return clock() - began

    for n in range(0, most, GROUP):
        if time.perf_counter() > ends and n >= FEWEST:
            break
        steps = [_chunks(engine, rng) for _ in range(min(GROUP, most - n))]
        # In turns, as the machine is slower for seconds. The first run also builds what it needs.
        times = [[timed(chunks) for chunks in steps] for _ in range(4)]
        found = np.median(times, 0) if engine.runs_ahead else np.min(times, 0)
        yield from zip(map(work_of, steps), found.tolist(), strict=True)


def _chunks(engine: Engine, rng: np.random.Generator) -> list[Chunk]:
    """A random step: answers, prompts in up to three chunks, or both."""
    limits, context = engine.scheduler.limits, engine.context
    vocab, kind = engine.model.config.vocab, rng.integers(3)
    answers = int(limits.running ** rng.random() + 0.5) if kind != 1 else 0

    def chunk(start: int, tokens: int, is_prompt: bool, is_final: bool) -> Chunk:
        stop = start + tokens
        ids = rng.integers(0, vocab, stop + (not is_final)).tolist()
        request = Request(0, ids)
        request.in_chunks = len(ids) if is_prompt else 0
        pages = (len(ids) // PAGE_SIZE + 1) * len(limits.windows)
        request.pages = rng.integers(0, limits.pages, pages).tolist()
        return Chunk(request, start, stop)

    longest = int(rng.integers(1, context))
    chunks = [chunk(int(rng.integers(longest)), 1, False, True) for _ in range(answers)]
    if kind:
        tokens = int(rng.integers(1, min(limits.step_tokens - answers, context - 1) + 1))
        parts = min(int(rng.integers(1, 4)), tokens, limits.running - answers)
        for size in np.diff(np.linspace(0, tokens, parts + 1).astype(int)).tolist():
            start = int(rng.integers(context - size)) if rng.integers(2) else 0
            chunks.append(chunk(start, size, True, bool(rng.integers(2))))
    return chunks
