"""`dev.py bench serve --simulate`: the scheduler of the engine on a virtual clock, without a model.

A step takes the time that a cost model says. The same arrivals are served by the policy of the
engine, by the same scheduler with fixed chunks, and with prompts first. Goodput: requests a second
whose first token comes within `--ttft-ms`, and 99 % of whose gaps are within the promised one.

    python3 dev.py bench serve --simulate --cost bench/costs/h100-llama-8b.json --speed 4
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row, base_row
from tilewright.errors import ArgumentError
from tilewright.serve.cost import CostModel
from tilewright.serve.policy import Decision, State, decide
from tilewright.serve.request import Request, Sampling
from tilewright.serve.scheduler import Limits, Scheduler, work_of

Policy = Callable[[State, CostModel], Decision]
CHUNKS = (256, 448, 512, 960, 1024, 2048)  # 448 and 960 beside 64 rows of answers: full steps
TRACE_HINT = "a .csv of Azure's LLM inference traces (AzurePublicDataset), or a .jsonl of Mooncake"
BLOCK = 512  # tokens of a block in Mooncake's traces, whose ids are shared by equal beginnings


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace: seconds, tokens of its prompt, number of tokens of its answer."""

    at_s: float
    prompt: list[int]
    answer: int


@dataclass(slots=True)
class Replay:
    """What came of a replay: for each request the times of its tokens, and the steps."""

    requests: list[Request]
    times_s: dict[int, list[float]] = field(default_factory=dict)
    steps: list[tuple[float, float, Decision]] = field(default_factory=list)
    cached: int = 0
    preemptions: int = 0


def read_arrivals(path: Path, count: int, speed: float, longest: int) -> list[Arrival]:
    """The first requests of a trace of Azure (csv) or Mooncake (jsonl), also .gz; times divided by
    `speed`, prompts and answers cut to `longest` tokens together. Raises ArgumentError[A109]."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            mooncake = ".jsonl" in path.name
            lines = map(json.loads, file) if mooncake else csv.DictReader(file)
            rows = [row for row, _ in zip(lines, range(count), strict=False)]
        read = _mooncake if mooncake else _azure
        found = [read(row, i, longest) for i, row in enumerate(rows)]
        first = found[0].at_s
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        rule = f"{path} is no trace: {error}"
        raise ArgumentError("A109", rule, where="--trace", hint=TRACE_HINT) from None
    return [replace(a, at_s=(a.at_s - first) / speed) for a in found]


def _azure(row: dict[str, str], i: int, longest: int) -> Arrival:
    at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    count = min(int(row["ContextTokens"]), longest - 1)
    prompt = list(range(i << 24, (i << 24) + max(count, 1)))  # no two prompts begin alike
    return Arrival(at, prompt, max(1, min(int(row["GeneratedTokens"]), longest - count)))


def _mooncake(row: dict[str, Any], i: int, longest: int) -> Arrival:
    ids = [b * BLOCK + k for b in row["hash_ids"] for k in range(BLOCK)]
    prompt = ids[: min(int(row["input_length"]), longest - 1)]
    answer = max(1, min(int(row["output_length"]), longest - len(prompt)))
    return Arrival(float(row["timestamp"]) / 1e3, prompt, answer)


def fixed(state: State, model: CostModel) -> Decision:
    """Answers, then prompts by arrival, in steps of `step_tokens`: the policy without promises."""
    return decide(_unpromised(state), model)


def prefill_first(state: State, model: CostModel) -> Decision:
    """Prompts before answers, as long as there are any."""
    state = _unpromised(state)
    decision = decide(state, model)
    if decision.kind != "hybrid":
        return decision
    alone = decide(replace(state, answers=0, context=0, growth=0, waiting=()), model)
    known = {p.id for p in state.prompts}
    if not known:
        return decision
    return replace(alone, admit=()) if alone.chunks else decision


def _unpromised(state: State) -> State:
    prompts, waiting = (
        tuple(p._replace(due=inf, gap=inf) for p in some) for some in (state.prompts, state.waiting)
    )
    return replace(state, due=inf, gap=inf, prompts=prompts, waiting=waiting)


def simulate(
    arrivals: list[Arrival], limits: Limits, model: CostModel, policy: Policy, promise: Sampling,
    noise: float = 0.0,
) -> Replay:  # fmt: skip
    """Serves the arrivals on a virtual clock, each with the times of `promise`. Steps take what the
    model says, times 1 + `noise` · Student's t of 5 degrees of freedom, at least 0.8: with 0.043 as
    far from it as the steps of a GPU were from their prediction (3, 8 and 16 % at p50, 90, 99)."""
    scheduler, rng = Scheduler(limits, model, policy), np.random.default_rng(0)
    requests = [
        Request(i, list(a.prompt), replace(promise, max_tokens=a.answer), a.at_s)
        for i, a in enumerate(arrivals)
    ]
    done = Replay(requests)
    coming, now = requests[::-1], 0.0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, coming[-1].arrived)
        while coming and coming[-1].arrived <= now:
            scheduler.add(coming.pop())
        batch = scheduler.schedule(now)
        seconds = model.seconds(work_of(batch.chunks))
        seconds *= max(0.8, 1 + noise * rng.standard_t(5))
        done.steps.append((now, seconds, batch.decision))
        now += seconds
        for request in scheduler.commit(batch, now):
            done.times_s.setdefault(request.id, []).append(now)
            request.tokens.append(-1 - request.id)
            if request.answered == request.sampling.max_tokens:
                scheduler.finish(request, "length")
    done.cached = sum(r.cached for r in requests)
    done.preemptions = scheduler.preemptions
    return done


def measures(done: Replay, ttft_s: float, gap_s: float) -> dict[str, float]:
    """Goodput, percentiles in milliseconds, rates, and the part of prompt tokens that was known."""
    times = [done.times_s[r.id] for r in done.requests]
    arrived = [r.arrived for r in done.requests]
    took = max(own[-1] for own in times)
    good = sum([in_time(a, own, ttft_s, gap_s) for a, own in zip(arrived, times, strict=True)])
    prompts = sum([r.prompt_tokens for r in done.requests])
    return {
        "goodput requests/s": good / took, "requests/s": len(times) / took,
        **percentiles(arrived, times),
        "hit rate": done.cached / prompts, "preemptions": float(done.preemptions),
    }  # fmt: skip


def in_time(arrived_s: float, times_s: Sequence[float], ttft_s: float, gap_s: float) -> bool:
    """Whether the first token came within `ttft_s`, and 99 % of the gaps are within `gap_s`."""
    gaps = np.diff(times_s)
    slow = np.quantile(gaps, 0.99, method="higher") if gaps.size else 0.0
    return bool(times_s[0] - arrived_s <= ttft_s and slow <= gap_s)


def percentiles(arrived_s: Sequence[float], times_s: Sequence[Sequence[float]]) -> dict[str, float]:
    """Milliseconds to the first token of each request that got one, and between tokens."""
    first = [own[0] - a for a, own in zip(arrived_s, times_s, strict=True) if len(own)]
    gaps = np.concatenate([np.diff(own) for own in times_s])
    return {
        f"ms {name} p{p}": 1e3 * float(np.percentile(samples if len(samples) else [0.0], p))
        for name, samples in (("first token", first), ("gap", gaps))
        for p in (50, 90, 99)
    } | {"ms gap max": 1e3 * float(max(gaps, default=0.0))}


def simulate_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each policy, promised gap and measure. `ratio`: of our goodput over the best other
    one, which `--plot` draws."""
    model = CostModel.load(args.cost, None)
    arrivals = read_arrivals(args.trace, args.requests, args.speed, args.context)
    seats, tokens = args.running, args.step_tokens
    pages = args.kv_tokens // 16
    if args.kv_tokens < args.context:
        rule = f"--kv-tokens {args.kv_tokens} hold no request of --context {args.context}"
        raise ArgumentError("A109", rule, where="--kv-tokens", hint="at least the context")
    name = f"{args.trace.name.split('.')[0]} x{args.speed:g}"
    name += f", noise {args.noise:g}" if args.noise else ""
    for gap_ms in args.itl_ms:
        promise = Sampling(ttft_ms=args.ttft_ms, itl_ms=gap_ms)
        policies: dict[str, tuple[Policy, int]] = {"tilewright": (decide, tokens)}
        policies |= {f"fixed chunk {c}": (fixed, c) for c in CHUNKS if c > seats}
        policies["prefill first"] = prefill_first, tokens
        rows: list[Row] = []
        for impl, (policy, step_tokens) in policies.items():
            limits = Limits(pages, seats, step_tokens)
            done = simulate(arrivals, limits, model, policy, promise, args.noise)
            if args.timeline and impl == "tilewright":
                path = args.timeline.with_stem(f"{args.timeline.stem}-{gap_ms:g}ms")
                path.write_text(json.dumps(timeline(done)), encoding="utf-8")
            for metric, value in measures(done, args.ttft_ms / 1e3, gap_ms / 1e3).items():
                rows.append(base_row("serve", "serve.simulate", "cpp") | {
                    "input": f"{name}, {gap_ms:g} ms", "width": len(arrivals), "dtype": "none",
                    "impl": impl, "device": f"simulated: {model.key}", "ms": None,
                    "metric": metric, "value": value, "ratio": None,
                })  # fmt: skip
        goodput = {r["impl"]: r for r in rows if r["metric"].startswith("goodput")}
        ours = goodput.pop("tilewright")
        best = max(r["value"] for r in goodput.values())
        ours["ratio"] = ours["value"] / best if best else None
        yield from rows


def timeline(done: Replay) -> dict[str, Any]:
    """The steps and the requests in the trace-event format, which Perfetto reads."""
    events: list[dict[str, Any]] = [
        {"name": d.kind, "ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * at, "dur": 1e6 * seconds,
         "args": {"decision": str(d)}}
        for at, seconds, d in done.steps
    ]  # fmt: skip
    for request in done.requests:
        times = [request.arrived, *done.times_s[request.id]]
        spans = (("first token", times[0], times[1]), ("answer", times[1], times[-1]))
        events += [
            {"name": name, "ph": "X", "pid": 1, "tid": request.id, "ts": 1e6 * begin,
             "dur": 1e6 * (end - begin), "args": {"prompt": request.prompt_tokens}}
            for name, begin, end in spans
        ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}
