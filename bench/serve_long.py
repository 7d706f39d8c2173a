"""`dev.py bench serve --long-prompt TOKENS`: a long prompt that comes among answers.

`--running` less one requests of 512 tokens are answered, with a promised gap (the first of
`--itl-ms`). Then one comes with a prompt of TOKENS: how long do the others wait for a token, and
how much later has it its first one than alone on the same engine?

    python3 dev.py bench serve --long-prompt 32768 --running 65 --itl-ms 30 --shape llama-3.1-8b \\
        --target cuda --cost bench/costs/h200-llama-8b.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from bench.harness import Row, base_row, note
from bench.serve_shared import model_of
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.tune import fit, measure

PROMPT = 512  # tokens of those that are answered when the long prompt comes
ANSWERED = 4096  # tokens of each with its answer, which does not end before the prompt is read
LAST = 64  # tokens of each answer behind the first token of the long prompt
FIT_S = 40.0


def long_prompt_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The longest gap and the 99th percentile of all answers while the prompt is read; its first
    token beside them and alone, in milliseconds; `ratio` of that: beside answers over alone."""
    answers, gap_ms = args.running - 1, args.itl_ms[0]
    file = model_of(args)
    options = Options(
        context=min(args.long_prompt + 1024, file.config.context), running=args.running,
        step_tokens=2048, share=False, kv_tokens=args.long_prompt + 1024 + answers * ANSWERED,
        invariant=False, cost=args.cost,
    )  # fmt: skip
    engine = Engine(file, args.target, options)
    if args.target == "cuda":
        engine.runner.warm()
    if not engine.scheduler.model.is_fitted:
        key = engine.scheduler.model.key
        samples = [*measure(engine, FIT_S)]
        engine.scheduler.model = fit(samples, key, engine.runner.joins)
        if args.cost_out:
            engine.scheduler.model.save(args.cost_out)
    alone, _ = first_token(engine, args.long_prompt, 0, gap_ms)
    among, gaps = first_token(engine, args.long_prompt, answers, gap_ms)
    found = {
        "ms longest gap": 1e3 * max(gaps),
        "ms gap p99": 1e3 * float(np.percentile(gaps, 99)),
        "ms first token": 1e3 * among,
        "ms first token alone": 1e3 * alone,
    }
    note(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    for name, value in found.items():
        yield base_row("serve", "serve.long_prompt", args.target) | {
            "input": f"{args.long_prompt} among {answers}, {gap_ms:g} ms", "width": args.running,
            "dtype": engine.model.kv_dtype, "impl": "tilewright", "ms": None, "metric": name,
            "value": value, "ratio": among / alone if name == "ms first token" else None,
        }  # fmt: skip


def first_token(
    engine: Engine, tokens: int, answers: int, gap_ms: float
) -> tuple[float, list[float]]:
    """Seconds from the arrival of a prompt to its first token, and all gaps between tokens of the
    answers beside it from then until a while after."""
    rng, vocab = np.random.default_rng(answers), engine.model.config.vocab
    how = Sampling(max_tokens=ANSWERED - PROMPT, ignore_eos=True, itl_ms=gap_ms)
    others = [engine.submit(rng.integers(3, vocab, PROMPT).tolist(), how) for _ in range(answers)]
    while not all(request.answered > 4 for request in others):
        engine.step()
    arrived = time.perf_counter()
    last = dict.fromkeys(others, arrived)
    long = engine.submit(
        rng.integers(3, vocab, tokens).tolist(), Sampling(max_tokens=2, ignore_eos=True)
    )
    gaps: list[float] = []
    first, rest = 0.0, LAST
    while rest:
        ready = engine.step()
        now = time.perf_counter()
        gaps += gaps_of(ready, last, now)
        if not first and long.answered:
            first = now - arrived
        rest -= bool(first)
    if any(request.finish for request in others):
        raise RuntimeError("an answer ended before the long prompt was read")
    for request in others:
        engine.cancel(request)
    engine.step()
    return first, gaps


def gaps_of(ready: list[Request], last: dict[Request, float], now: float) -> list[float]:
    """Seconds since the last token of each request of `last` that has a token now."""
    answered = [request for request in ready if request in last]
    found = [now - last[request] for request in answered]
    last.update(dict.fromkeys(answered, now))
    return found
