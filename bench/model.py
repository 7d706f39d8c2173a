"""`bench model`: tokens a second of a real model, for prompts and for answers.

Beside it, where `llama_cpp` is installed and the target is a CPU, llama.cpp on the same file, with
as many threads, in turns with ours. Then one, two and four answers at once, in turns too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row, base_row, note, progress
from tilewright.runtime import pool
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request, Sampling
from tilewright.serve.weights import open_model, packaged_model

_ROUNDS = 7
_STREAMS = 1, 2, 4  # answers at once
_SHORT = 20  # tokens before an answer that follows a question
_OURS = "tilewright"


@dataclass(frozen=True, slots=True)
class Runner:
    """One engine: `read(tokens)` begins anew with a prompt, `write(n)` answers with n tokens."""

    impl: str
    read: Callable[[list[int]], Any]
    write: Callable[[int], Any]


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model file (default: the packaged SmolLM2)")
    parser.add_argument("--target", default="cpp", help="cpp or cuda")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")


def model(args: argparse.Namespace) -> Iterator[Row]:
    """Rows in tokens a second."""
    path = Path(args.model or packaged_model())
    sizes = Options(context=args.prompt + args.tokens + 1, share=False)
    ours = Engine(open_model(path), args.target, sizes)
    prompt = np.random.default_rng(5).integers(3, ours.model.config.vocab, args.prompt).tolist()
    runners = [_ours(ours)]
    if args.target == "cpp" and path.suffix == ".gguf":
        runners += _llama_cpp(path, args.prompt + args.tokens)
    short = min(_SHORT, args.prompt)
    samples: dict[tuple[str, int, str], list[float]] = {}
    for turn in range(_ROUNDS + 1):
        for runner in runners:
            for length in dict.fromkeys((short, args.prompt)):
                read, written = _timed(runner, prompt[:length], args.tokens)
                if turn:  # the first builds kernels and records the step
                    samples.setdefault(("prompt", length, runner.impl), []).append(read)
                    samples.setdefault(("decode", length, runner.impl), []).append(written)
        progress(turn + 1, _ROUNDS + 1, "rounds")
    rates = {key: statistics.median(rate) for key, rate in samples.items()}
    for (op, length, impl), rate in rates.items():
        peers = [r for (o, n, i), r in rates.items() if (o, n) == (op, length) and i != _OURS]
        ratio = rate / max(peers) if impl == _OURS and peers else None
        yield base_row("model", f"model.{op}", args.target) | {
            "input": f"{path.stem} {op}", "width": length, "dtype": "float32", "impl": impl,
            "ms": 1e3 / rate, "metric": "tokens/s", "value": rate, "ratio": ratio,
        }  # fmt: skip
    totals: dict[int, list[float]] = {count: [] for count in _STREAMS}
    for turn in range(_ROUNDS):
        for count, found in totals.items():
            found.append(_together(ours, prompt[:short], args.tokens, count))
        progress(turn + 1, _ROUNDS, "rounds of several answers")
    one = statistics.median(totals[1])
    for count, found in totals.items():
        rate = statistics.median(found)
        yield base_row("model", "model.streams", args.target) | {
            "input": f"{path.stem} answers after {short} tokens", "width": count,
            "dtype": "float32", "impl": _OURS, "ms": 1e3 * count / rate,
            "metric": "tokens/s of all", "value": rate, "ratio": None, "times_one": rate / one,
        }  # fmt: skip
    step = ours.runner._steps[1]  # of one request
    yield base_row("model", "model.launches", args.target) | {
        "input": f"{path.stem} decode", "width": 1, "dtype": "float32", "impl": _OURS, "ms": None,
        "metric": "launches a step", "value": step.count, "ratio": None,
    }  # fmt: skip


def _timed(runner: Runner, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Tokens a second of the prompt, and of the answer after it."""
    began = time.perf_counter()
    runner.read(prompt)
    between = time.perf_counter()
    runner.write(tokens)
    ended = time.perf_counter()
    return len(prompt) / (between - began), tokens / (ended - between)


def _together(engine: Engine, prompt: list[int], tokens: int, count: int) -> float:
    """Tokens a second of so many answers at once, once all are being answered."""
    how = Sampling(max_tokens=1 << 20, ignore_eos=True)
    requests = [engine.submit(prompt, how) for _ in range(count)]
    while not all(r.answered > 2 for r in requests):
        engine.step()
    began = time.perf_counter()
    for _ in range(tokens):
        engine.step()
    took_s = time.perf_counter() - began
    for request in requests:
        engine.cancel(request)
    return count * tokens / took_s


def _ours(engine: Engine) -> Runner:
    """The engine with one request: scheduling, sampling and decoding of text included."""
    how = Sampling(max_tokens=1 << 20, ignore_eos=True)
    running: list[Request] = []

    def read(prompt: list[int]) -> None:
        for request in running:
            engine.cancel(request)
        running[:] = [engine.submit(prompt, how)]
        while not running[0].answered:
            engine.step()

    def write(tokens: int) -> None:
        for _ in range(tokens):
            engine.step()

    return Runner(_OURS, read, write)


def _llama_cpp(path: Path, context: int) -> list[Runner]:
    try:
        import llama_cpp
    except ImportError:
        note("llama.cpp left out: pip install llama-cpp-python")
        return []
    threads = pool.wanted_threads()
    peer = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def read(prompt: list[int]) -> None:
        peer.reset()
        peer.eval(prompt)

    def write(tokens: int) -> None:
        for _ in range(tokens):
            peer.eval([peer.sample(temp=0.0)])

    return [Runner("llama.cpp", read, write)]
