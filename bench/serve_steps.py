"""`dev.py bench serve --steps`: what the time of a step on a GPU goes to.

Each state is so many answers of 600 keys and so many tokens of one prompt, read in one step of our
engine with products of a library. Rows: milliseconds until its tokens are on the host, and of these
products, attention, all between them, and what the GPU waits; and those of a step that is launched
before the tokens of the one in front are read.

    python3 dev.py bench serve --steps --shape llama-3.1-8b --target cuda
    python3 dev.py bench serve --steps 64+0 63+960 --shape qwen3-8b --target cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bench.harness import Row, base_row, note
from tilewright.errors import ArgumentError
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request
from tilewright.serve.scheduler import PENDING, Chunk

STATES = ("16+0", "64+0", "63+96", "63+448", "63+960", "0+2048")
KEYS, CONTEXT = 600, 4096
_PRODUCTS = ("nvjet", "gemm", "splitk", "cutlass")  # in names of a library's kernels
_ROUNDS, _PROFILED = 15, 3

Launch = tuple[float, float, str]
"""A launch on the GPU: its begin and end in microseconds, and the name of its kernel."""


def step_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each state. Raises ArgumentError[A101] without a GPU."""
    if args.target == "cpp":
        raise ArgumentError(
            "A101", "the parts of a step are timed on a GPU", where="--target", hint="cuda"
        )
    from bench.serve_shared import model_of

    states = [(text, *map(int, text.split("+"))) for text in args.steps or STATES]
    options = Options(
        context=CONTEXT, running=64, step_tokens=2048, share=False, kv_tokens=64 * CONTEXT,
        invariant=False,
    )  # fmt: skip
    engine = Engine(model_of(args), "cuda", options)
    for text, answers, prompt in states:
        chunks = chunks_of(engine, answers, prompt)

        def run(chunks: list[Chunk] = chunks) -> None:
            engine.runner.run(chunks).wait()

        found = measured(run, 1 + engine.model.config.qk_norm)
        found["ahead_ms"] = launched_ahead(engine, chunks)
        kept = found["products_ms"] + found["attention_ms"]
        note(f"{text:8} {found['waited_for_ms']:7.2f} ms: " + ", ".join(
            f"{name.removesuffix('_ms')} {ms:.2f}" for name, ms in found.items()))  # fmt: skip
        yield base_row("serve", "serve.step", "cuda") | {
            "input": f"{args.shape or 'a file'}, {answers} answers and {prompt} tokens of a prompt",
            "width": answers, "dtype": "bfloat16",
            "impl": f"tilewright, products by {engine.model.products_by}",
            "ms": found["waited_for_ms"], "metric": "ms", "value": found["waited_for_ms"],
            "ratio": None, "share_percent": 100 * kept / found["waited_for_ms"],
        } | found  # fmt: skip


def chunks_of(engine: Engine, answers: int, prompt: int) -> list[Chunk]:
    """The chunks of a step: answers of KEYS keys, and a prompt from its beginning."""
    rng, out = np.random.default_rng(7), list[Chunk]()
    vocab, pages = engine.model.config.vocab, engine.scheduler.limits.pages
    groups = len(engine.scheduler.limits.windows)
    for start, size in [*[(KEYS, 1)] * answers, *[(0, prompt)] * bool(prompt)]:
        request = Request(0, rng.integers(0, vocab, start + size).tolist())
        request.in_chunks = 0 if size == 1 and start else prompt
        blocks = (start + size) // 16 + 1
        request.pages = rng.integers(1, pages, blocks * groups).tolist()
        out.append(Chunk(request, start, start + size))
    return out


def launched_ahead(engine: Engine, chunks: list[Chunk]) -> float:
    """Milliseconds from the tokens of a step to those of the next, which is launched before."""
    for chunk in chunks:
        if not chunk.is_prompt:  # it is where the step in front has put it
            chunk.request.tokens[chunk.start] = PENDING
    times, front = [time.perf_counter()], engine.runner.run(chunks)
    for _ in range(_ROUNDS + 3):
        front, ended = engine.runner.run(chunks), front
        ended.wait()
        times.append(time.perf_counter())
    front.wait()
    return 1e3 * statistics.median(np.diff(times[3:]))


def measured(run: Callable[[], None], before: int) -> dict[str, float]:
    """Milliseconds of a step that waits for its tokens, and of its parts on the GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    times = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(_PROFILED):
            run()
        torch.cuda.synchronize()
    launches = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in found.events() or ()
        if e.device_type.name == "CUDA"
    )
    waited = {"waited_for_ms": 1e3 * statistics.median(times)}
    return waited | parts(launches, _PROFILED, before)


def parts(launches: Sequence[Launch], runs: int, before: int) -> dict[str, float]:
    """Milliseconds of a run that products take, attention, and all else; and those in which nothing
    ran between the first launch and the last, without the longest waits, between two runs.

    A layer has four products, and the head one, or none where our own layer reads its one row.
    Attention is what runs between the first of a layer and the second, but for the first `before`
    launches, which make its queries and keys."""
    sums, idle, end = {"products": 0.0, "attention": 0.0, "between": 0.0}, list[float](), 0.0
    names = [name.lower() for *_, name in launches]
    made = [any(part in name for part in _PRODUCTS) for name in names]
    firsts = [is_one and "reduce" not in name for is_one, name in zip(made, names, strict=True)]
    count, since, of_run = 0, 0, max(1, sum(firsts) // runs)
    for (begin, stop, name), is_one, is_first in zip(launches, made, firsts, strict=True):
        kind = "between"
        if is_one:
            count, since, kind = count + is_first, 0, "products"
        elif count % of_run % 4 == 1 and not name.startswith("Mem"):
            since += 1
            kind = "attention" if since > before else kind
        sums[kind] += stop - begin
        idle += [begin - end] if end and begin > end else []
        end = max(end, stop)
    waits = sum(sorted(idle)[: len(idle) - (runs - 1)])
    return {f"{n}_ms": us / 1e3 / runs for n, us in (sums | {"idle": waits}).items()}
