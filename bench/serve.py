"""`dev.py bench serve`: replays the arrivals and lengths of a served trace on our engine.

Requests come when the trace says, time divided by `--speed`; prompts are random tokens of the
trace's lengths, times `--lengths`, and answers have the trace's lengths too. Rows: tokens a second
over the replay, time to the first token, gaps between tokens, goodput by each of `--itl-ms`, and
the part of the prompts that was known. `--timeline` writes the steps and their decisions for
Perfetto. A few answers are computed again alone, and have to be equal. With `--peers` other engines
serve the same requests (`serve_peers.py`), with `--shared-prefix` many answers share a prefix
(`serve_shared.py`), with `--steps` the parts of single steps are timed (`serve_steps.py`).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import inf
from pathlib import Path

import numpy as np

from bench.harness import Row, base_row, note, progress
from bench.simulate import (
    TRACE_HINT,
    Replay,
    in_time,
    percentiles,
    read_arrivals,
    simulate_rows,
    timeline,
)
from tilewright.errors import ArgumentError
from tilewright.serve.engine import Engine, Options
from tilewright.serve.policy import Decision
from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Batch, Scheduler
from tilewright.serve.tune import errors, fit, measure
from tilewright.serve.weights import open_model, packaged_model

TRACE = "traces/AzureLLMInferenceTrace_conv.csv.gz"  # in TILEWRIGHT_DATA, else ../shared/data
PEERS = ("transformers", "generate", "loop", "llama.cpp")
_CHECKED = 3  # answers that are computed again
_PLAINLY = Sampling()


@dataclass(slots=True)
class Job:
    """A request of the trace: seconds from the first arrival, its prompt, and how many tokens it
    is answered with; then these tokens, when they came, and how much of the prompt was known."""

    arrival_s: float
    prompt: list[int]
    answer: int
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    cached: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.times_s) == self.answer

    def note(self, token: int, at_s: float) -> None:
        """Notes a token of the answer, so many seconds after the replay began."""
        self.tokens.append(token)
        self.times_s.append(at_s)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a trace is replayed: its times are divided by `speed`, and it ends after `limit_s`."""

    speed: float = 1.0
    limit_s: float = inf


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model file (default: the packaged SmolLM2)")
    parser.add_argument("--target", default="cpp", help="cpp or cuda")
    data = os.environ.get("TILEWRIGHT_DATA")
    folder = Path(data) if data else Path(__file__).resolve().parents[2] / "shared/data"
    trace_help = "TIMESTAMP,ContextTokens,GeneratedTokens, or .jsonl of Mooncake; also .gz"
    parser.add_argument("--trace", type=Path, default=folder / TRACE, help=trace_help)
    parser.add_argument("--requests", type=int, default=100, help="the first ones of the trace")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="time of arrivals is divided by it"
    )
    parser.add_argument("--lengths", type=float, default=0.25, help="factor of all lengths")
    parser.add_argument("--running", type=int, default=16, help="requests answered at once")
    parser.add_argument("--step-tokens", type=int, default=256, help="tokens of one step")
    parser.add_argument("--simulate", action="store_true", help="on a virtual clock, by --cost")
    folder_of_costs = Path(__file__).resolve().parent / "costs"
    cost_help = "a file of `tilewright tune serve` (default of --simulate: an estimated H100)"
    parser.add_argument("--cost", type=Path, help=cost_help)
    parser.set_defaults(default_cost=folder_of_costs / "h100-llama-8b.json")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="promised first token")
    parser.add_argument(
        "--itl-ms", type=float, nargs="+", default=[20.0, 30.0, 50.0], help="promised gaps"
    )
    noise_help = "--simulate: how far steps are from their prediction, as `simulate` says"
    parser.add_argument("--noise", type=float, default=0.0, help=noise_help)
    parser.add_argument("--context", type=int, default=8192, help="of the simulated model")
    parser.add_argument("--kv-tokens", type=int, default=400_000, help="of the simulated cache")
    parser.add_argument("--timeline", type=Path, help="writes the steps for Perfetto (JSON)")
    parser.add_argument("--seconds", type=float, default=180.0, help="--predict: to fit a cost")
    parser.add_argument("--cost-out", type=Path, help="--predict, --peers: writes the fitted cost")
    parser.add_argument("--predict", type=int, help="compares so many random steps with --cost")
    parser.add_argument(
        "--peers", nargs="*", choices=[*PEERS, "ours"], metavar="PEER",
        help=f"serve the same requests (default: all): {', '.join(PEERS)}, ours",
    )  # fmt: skip
    fixed_help = (
        "--peers: steps of so many tokens, of ours without promises (default: --step-tokens)"
    )
    parser.add_argument("--fixed", type=int, nargs="*", help=fixed_help)
    parser.add_argument("--shape", help="--peers: a model of random weights instead of --model")
    parser.add_argument("--attention", default="", help="--peers: of transformers")
    parser.add_argument("--limit", type=float, default=inf, help="--peers: seconds of each")
    parser.add_argument("--shared-prefix", type=int, help="tokens that all requests begin with")
    parser.add_argument("--layers", type=int, help="--shared-prefix: of the shape, the first ones")
    parser.add_argument(
        "--long-prompt", type=int, help="tokens of a prompt that comes among answers"
    )
    steps_help = "what the time of steps goes to: answers+tokens of a prompt, as 63+960"
    parser.add_argument("--steps", nargs="*", metavar="STATE", help=steps_help)
    parser.add_argument("--fast", action="store_true", help="faster batches, not equal to the bit")


def serve(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of one replay, of simulations, of predicted steps, or of peers. Each says which peers
    did not run, and why: `peers_missing`."""
    for row in _rows(args):
        yield {"peers_missing": dict.fromkeys(PEERS, "not asked for")} | row


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    if args.simulate:
        args.cost = args.cost or args.default_cost
        yield from simulate_rows(args)
        return
    if args.predict:
        yield from predicted(args)
        return
    if args.peers is not None:
        from bench.serve_peers import peer_rows

        yield from peer_rows(args)
        return
    if args.steps is not None:
        from bench.serve_steps import step_rows

        yield from step_rows(args)
        return
    if args.long_prompt:
        from bench.serve_long import long_prompt_rows

        yield from long_prompt_rows(args)
        return
    if args.shared_prefix:
        from bench.serve_shared import shared_prefix_rows

        yield from shared_prefix_rows(args)
        return
    file = open_model(args.model or packaged_model())
    context = min(file.config.context, 4096)
    sizes = {"running": args.running, "step_tokens": args.step_tokens, "invariant": not args.fast}
    jobs = read_trace(args.trace, args.requests, args.lengths, (context, file.config.vocab))
    engine = Engine(file, args.target, Options(context=context, **sizes))
    replay(engine, [Job(0.0, job.prompt[:40], 4) for job in jobs[: args.running]], Pace())  # builds
    pace, steps, began = Pace(args.speed), watched(engine.scheduler), time.perf_counter()
    took_s = replay(engine, jobs, pace)
    if args.timeline:
        shown = [(at - began, seconds, decision) for at, seconds, decision in steps]
        text = json.dumps(timeline(as_simulated(jobs, pace, shown)))
        args.timeline.write_text(text, encoding="utf-8")
    if not args.fast:
        check(Engine(file, args.target, Options(context=context, share=False)), jobs)
    name = f"{args.trace.name.split('.')[0]} x{args.speed:g} lengths x{args.lengths:g}"
    found = measures(jobs, pace, took_s) | goodput(jobs, pace, took_s, args.ttft_ms, args.itl_ms)
    for metric, value in found.items():
        yield base_row("serve", "serve.replay", args.target) | {
            "input": name, "width": len(jobs), "dtype": "float32", "impl": "tilewright",
            "ms": 1e3 * took_s, "metric": metric, "value": value, "ratio": None,
        }  # fmt: skip


def predicted(args: argparse.Namespace) -> Iterator[Row]:
    """The error of a fitted cost over random steps that it has not seen: of --cost, or of one
    fitted on others. Beside it what no model can say: how far two measurements of the same step
    are apart."""
    options = Options(
        context=2048, running=args.running, step_tokens=args.step_tokens, cost=args.cost,
        invariant=not args.fast,
    )  # fmt: skip
    if args.shape:
        from bench.peer_models import random_model

        file = random_model(args.shape, "cpu" if args.target == "cpp" else "cuda").ours()
    else:
        file = open_model(args.model or packaged_model())
    engine = Engine(file, args.target, options)
    model = engine.scheduler.model
    if args.cost is None:
        samples = [*measure(engine, args.seconds, args.predict, seed=1)]
        model = fit(samples, model.key, engine.runner.joins)
    if args.cost_out:
        model.save(args.cost_out)
    samples, again = ([*measure(engine, 1e9, args.predict, seed=2)] for _ in range(2))
    apart = [abs(b / a - 1) for (_, a), (_, b) in zip(samples, again, strict=True)]
    for name, found in (("error", errors(model, samples)), ("between two", apart)):
        for p in (50, 90, 99):
            yield base_row("serve", "serve.predict", args.target) | {
                "input": "random steps", "width": len(found), "dtype": "float32",
                "impl": "tilewright", "ms": None, "metric": f"% {name} p{p}",
                "value": 100 * float(np.percentile(found, p)), "ratio": None,
            }  # fmt: skip


def read_trace(path: Path, count: int, factor: float, sizes: tuple[int, int]) -> list[Job]:
    """The first requests of a trace of Azure or Mooncake with random tokens, equal where Mooncake's
    prompts are; `sizes`: the context, in which prompt and answer are cut to fit, and the
    vocabulary. Raises ArgumentError[A109]."""
    context, vocab = sizes
    if ".jsonl" in path.name:
        arrivals = read_arrivals(path, count, 1.0, context)
        lengths = [(int(len(a.prompt) * factor), int(a.answer * factor)) for a in arrivals]
        return [
            Job(a.at_s, random_tokens(a.prompt[: max(1, read)], vocab), max(1, written))
            for a, (read, written) in zip(arrivals, lengths, strict=True)
        ]
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            rows = [row for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
        if not rows:
            raise ValueError("no rows")
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
        lengths = [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in rows]
    except (OSError, KeyError, ValueError) as error:
        rule = f"{path} is no trace: {error}"
        raise ArgumentError("A109", rule, where="--trace", hint=TRACE_HINT) from None
    rng = np.random.default_rng(0)
    jobs = []
    for at, (prompt, answer) in zip(times, lengths, strict=True):
        read = int(np.clip(prompt * factor, 1, context - 2))
        written = int(np.clip(answer * factor, 1, context - read))
        jobs.append(Job(at - times[0], rng.integers(3, vocab, read).tolist(), written))
    return jobs


def random_tokens(numbers: list[int], vocab: int) -> list[int]:
    """A token for each number, always the same one (a multiplicative hash)."""
    mixed = np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (3 + (mixed >> np.uint64(33)) % np.uint64(vocab - 3)).astype(int).tolist()


def replay(engine: Engine, jobs: list[Job], pace: Pace, how: Sampling = _PLAINLY) -> float:
    """Runs the jobs in real time and notes when each got its tokens; the seconds it took. What is
    under way at the end of the time is cancelled."""
    began = time.perf_counter()
    waiting = sorted(jobs, key=lambda job: job.arrival_s)
    running: dict[Request, Job] = {}
    while (waiting or running) and (now := time.perf_counter() - began) < pace.limit_s:
        while waiting and waiting[0].arrival_s / pace.speed <= now:
            job = waiting.pop(0)
            sampling = replace(how, max_tokens=job.answer, ignore_eos=True)
            arrived = began + job.arrival_s / pace.speed
            running[engine.submit(job.prompt, sampling, arrived)] = job
        if not running:
            time.sleep(max(0.0, waiting[0].arrival_s / pace.speed - now))
            continue
        ready = engine.step()
        now = time.perf_counter() - began
        for request in ready:
            running[request].note(request.tokens[-1], now)
            running[request].cached = request.cached
            if request.finish:
                del running[request]
                progress(len(jobs) - len(waiting) - len(running), len(jobs), "requests")
    took_s = time.perf_counter() - began
    for request in running:
        engine.cancel(request)
    engine.step()  # the one under way, if any
    return took_s


def measures(jobs: list[Job], pace: Pace, took_s: float) -> dict[str, float]:
    """Rates over the replay, and percentiles in milliseconds: of the first tokens that came, and of
    the gaps between tokens."""
    done = sum([job.is_done for job in jobs])
    return {
        "done": float(done),
        "requests/s": done / took_s,
        "answer tokens/s": sum([len(job.times_s) for job in jobs]) / took_s,
        "prompt tokens/s": sum([len(job.prompt) for job in jobs if job.times_s]) / took_s,
        "hit rate": sum([job.cached for job in jobs]) / sum([len(job.prompt) for job in jobs]),
    } | percentiles([j.arrival_s / pace.speed for j in jobs], [j.times_s for j in jobs])


def goodput(
    jobs: list[Job], pace: Pace, took_s: float, ttft_ms: float, gaps_ms: Sequence[float]
) -> dict[str, float]:
    """Requests a second, of those that were done, whose first token came within `ttft_ms`, and 99 %
    of whose gaps are within each of `gaps_ms`."""
    done = [(job.arrival_s / pace.speed, job.times_s) for job in jobs if job.is_done]
    kept = {g: [in_time(at, own, ttft_ms / 1e3, g / 1e3) for at, own in done] for g in gaps_ms}
    return {f"goodput requests/s, {g:g} ms": sum(good) / took_s for g, good in kept.items()}


def watched(scheduler: Scheduler) -> list[tuple[float, float, Decision]]:
    """The steps of a scheduler from now on: when each was decided, its seconds until it was
    committed, and the decision."""
    steps: list[tuple[float, float, Decision]] = []
    begun: dict[int, float] = {}
    schedule, commit = scheduler.schedule, scheduler.commit

    def noted(now: float = 0.0, ahead: bool = False) -> Batch:
        batch = schedule(now, ahead)
        begun[batch.step] = now
        return batch

    def committed(batch: Batch, now: float = 0.0) -> list[Request]:
        steps.append((begun[batch.step], now - begun[batch.step], batch.decision))
        return commit(batch, now)

    scheduler.schedule, scheduler.commit = noted, committed
    return steps


def as_simulated(jobs: list[Job], pace: Pace, steps: list[tuple[float, float, Decision]]) -> Replay:
    """A replay by the clock as one of the simulator, of the jobs that got a token."""
    begun = [(i, job) for i, job in enumerate(jobs) if job.times_s]
    requests = [Request(i, job.prompt, arrived=job.arrival_s / pace.speed) for i, job in begun]
    return Replay(requests, {i: job.times_s for i, job in begun}, steps)


def check(engine: Engine, jobs: list[Job]) -> None:
    """The shortest jobs again, each alone: their tokens have to be equal."""
    for job in sorted(jobs, key=lambda job: len(job.prompt) + 8 * job.answer)[:_CHECKED]:
        again = Job(0.0, job.prompt, job.answer)
        replay(engine, [again], Pace())
        if again.tokens != job.tokens:
            note("WRONG: an answer in the batch differs from the same one alone")
            raise SystemExit(1)
