"""`dev.py bench serve --peers`: the same requests on our engine and on others, one after the other.

Arrivals, prompts and lengths of answers are those of the trace; end tokens are ignored. A peer
notes in each job its tokens and when they came; rates, times and goodput come from these alike for
all. A peer whose library is absent is left out, with a word.

    python3 dev.py bench serve --peers --shape tiny
    python3 dev.py bench serve --peers ours loop transformers --shape llama-3.1-8b --target cuda
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row, base_row, note
from bench.peer_models import PeerModel, random_model, read_model, temporary_folder
from bench.serve import Job, Pace, measures, read_trace, replay
from bench.simulate import in_time, prefill_first
from tilewright.runtime import pool
from tilewright.serve.engine import Engine, Options
from tilewright.serve.policy import decide
from tilewright.serve.request import Sampling
from tilewright.serve.tune import errors, fit, measure

FIT_S = 60  # seconds for the cost of our steps, where no file of it is named


@dataclass(frozen=True, slots=True)
class Setting:
    """What all peers share. `chunk`: tokens of a step of those that have fixed ones; `fixed`: of
    our own engine, each of which it serves by."""

    model: PeerModel
    jobs: tuple[Job, ...]
    pace: Pace
    seats: int
    chunk: int
    context: int
    ttft_ms: float
    itl_ms: tuple[float, ...]
    cost: Path | None
    fixed: tuple[int, ...]
    attention: str = ""
    cost_out: Path | None = None
    share: bool = False  # known beginnings of prompts, of our own engine

    def fresh(self) -> list[Job]:
        """The jobs as they were before anybody served them."""
        return [Job(job.arrival_s, job.prompt, job.answer) for job in self.jobs]

    def first_ones(self) -> list[Job]:
        """Short jobs that a peer serves before the clock runs: each number of answers occurs."""
        some = self.jobs[: self.seats]
        return [Job(0.0, job.prompt[:64], 2 + n) for n, job in enumerate(some)]


@dataclass(frozen=True, slots=True)
class Served:
    """What a peer did: the jobs with their tokens and times, and the seconds it took."""

    impl: str
    jobs: list[Job]
    took_s: float


Peer = Callable[[Setting], Iterator[Served]]


class Absent(Exception):
    """Why a peer does not run here."""


# ---------------------------------------------------------------------------- our engine


def ours(setting: Setting) -> Iterator[Served]:
    """Our engine by promised gaps, with fixed chunks, and with prompts first."""
    target = "cpp" if setting.model.device == "cpu" else "cuda"
    tokens = max(*setting.fixed, 2048 if target == "cuda" else 512)
    options = Options(
        context=setting.context, running=setting.seats, step_tokens=tokens, share=setting.share,
        kv_tokens=setting.seats * setting.context, invariant=False, cost=setting.cost,
    )  # fmt: skip
    engine = Engine(setting.model.ours(), target, options)
    replay(engine, setting.first_ones(), Pace())
    scheduler = engine.scheduler
    if target == "cuda":  # as the loop captures its graphs: before the clock runs
        engine.runner.warm()
    note(f"ours: products by {engine.model.products_by}")
    if not scheduler.model.is_fitted:
        key = scheduler.model.key
        samples = [*measure(engine, min(FIT_S, 2 * setting.pace.limit_s))]
        joins = engine.runner.joins
        scheduler.model = fit(samples, key, joins)
        unseen = errors(fit(samples[::2], key, joins), samples[1::2])
        p50, p90 = (100 * float(np.percentile(unseen, p)) for p in (50, 90))
        found = f"p50 {p50:.1f} %, p90 {p90:.1f} %"
        note(f"cost: {len(samples)} steps; fitted on half, error on the other {found}")
        if setting.cost_out:
            scheduler.model.save(setting.cost_out)

    def served(impl: str, how: Sampling) -> Served:
        jobs = setting.fresh()
        scheduler.prefix.evict(sum(1 for _ in scheduler.prefix.nodes()))  # nothing is known yet
        impl += ", known prefixes are not read again" * setting.share
        return Served(impl, jobs, replay(engine, jobs, setting.pace, how))

    for gap in setting.itl_ms:
        promise = Sampling(ttft_ms=setting.ttft_ms, itl_ms=gap, best_effort=True)
        yield served(f"tilewright {gap:g} ms", promise)
    wide = scheduler.limits
    for chunk in setting.fixed:
        scheduler.limits = replace(wide, step_tokens=chunk)
        yield served(f"tilewright, chunk {chunk}", Sampling())
    scheduler.limits, scheduler.policy = wide, prefill_first
    yield served("tilewright, prompts first", Sampling())
    scheduler.policy = decide


# ---------------------------------------------------------------------------- fixed chunks

Step = Callable[[Sequence[Any]], list[int]]


@dataclass(slots=True)
class Seat:
    """A request that is served: its tokens, and how many of them were read."""

    number: int
    job: Job
    all_tokens: list[int]
    read: int = 0


def in_chunks(jobs: list[Job], step: Step, setting: Setting, pace: Pace) -> float:
    """Serves jobs as most engines do: a step has a token of every answer, then prompts by arrival,
    up to `setting.chunk` tokens. The seconds it took. `step` gives the token after each row."""
    from bench.serve_loop import Row as Tokens

    waiting = sorted(jobs, key=lambda job: job.arrival_s)
    free, seats = list(range(setting.seats)), list[Seat]()
    began = time.perf_counter()
    while (waiting or seats) and (now := time.perf_counter() - began) < pace.limit_s:
        while waiting and free and waiting[0].arrival_s / pace.speed <= now:
            job = waiting.pop(0)
            seats.append(Seat(free.pop(), job, list(job.prompt)))
        if not seats:
            time.sleep(max(0.0, waiting[0].arrival_s / pace.speed - now))
            continue
        chosen: list[tuple[Seat, Tokens]] = []
        left = max(setting.chunk, len(seats))
        for seat in sorted(seats, key=lambda seat: not seat.job.times_s):  # answers first
            tokens = seat.all_tokens[seat.read : seat.read + left]
            if tokens:
                chosen.append((seat, Tokens(seat.number, tokens, seat.read)))
                left -= len(tokens)
        found = step([row for _, row in chosen])
        now = time.perf_counter() - began
        for (seat, row), token in zip(chosen, found, strict=True):
            seat.read += len(row.tokens)
            if seat.read == len(seat.all_tokens):
                seat.all_tokens.append(token)
                seat.job.note(token, now)
                if seat.job.is_done:
                    seats.remove(seat)
                    free.append(seat.number)
    return time.perf_counter() - began


def loop(setting: Setting) -> Iterator[Served]:
    """The minimal loop of torch."""
    if setting.model.device != "cpu" and importlib.util.find_spec("flash_attn_interface") is None:
        raise Absent("FlashAttention-3 (flash_attn_interface) is not installed")
    from bench.serve_loop import Loop

    made = Loop(setting.model, setting.seats, setting.context)
    in_chunks(setting.first_ones(), made.step, setting, Pace())
    jobs = setting.fresh()
    kind = "FlashAttention-3" if made.on_gpu else "torch"
    yield Served(f"loop over {kind}", jobs, in_chunks(jobs, made.step, setting, setting.pace))


def llama_cpp(setting: Setting) -> Iterator[Served]:
    """llama.cpp on the same GGUF file and as many threads, each request a sequence of its cache."""
    path = setting.model.path
    if setting.model.device != "cpu" or path is None or path.suffix != ".gguf":
        raise Absent("it takes a GGUF file, and is measured on CPUs alone")
    if importlib.util.find_spec("llama_cpp") is None:
        raise Absent("llama-cpp-python is not installed")
    from bench.serve_llama_cpp import LlamaCpp

    made = LlamaCpp(path, setting.seats, setting.context, setting.chunk, pool.wanted_threads())
    in_chunks(setting.first_ones(), made.step, setting, Pace())
    jobs = setting.fresh()
    took_s = in_chunks(jobs, made.step, setting, setting.pace)
    made.close()
    yield Served("llama.cpp", jobs, took_s)


# ---------------------------------------------------------------------------- transformers


def transformers(setting: Setting) -> Iterator[Served]:
    """Continuous batching of transformers."""
    yield from _with_transformers(_continuous, setting)


def generate(setting: Setting) -> Iterator[Served]:
    """Plain `generate` of transformers."""
    yield from _with_transformers(_generate, setting)


def _with_transformers(serve: Callable[[Setting], Served], setting: Setting) -> Iterator[Served]:
    if importlib.util.find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    import torch

    if importlib.util.find_spec("flash_attn_interface"):
        _call_it_flash_attn_3()
    with torch.no_grad():
        yield serve(setting)


def _attention(setting: Setting) -> str:
    """What transformers is to compute attention by: FlashAttention-3 where it is found."""
    if setting.attention:
        return setting.attention
    found = importlib.util.find_spec("flash_attn_interface")
    return "flash_attention_3" if found and setting.model.device != "cpu" else "sdpa"


def _call_it_flash_attn_3() -> None:
    """transformers knows FlashAttention-3 by the name of one wheel. Others have the same module: a
    folder on the path says that it is of the wheel that transformers looks for."""
    folder = temporary_folder()
    info = folder / "flash_attn_3-3.0.0.dist-info"
    info.mkdir()
    head = "Metadata-Version: 2.1\nName: flash-attn-3\nVersion: 3.0.0\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    (info / "top_level.txt").write_text("flash_attn_interface\n", encoding="utf-8")
    sys.path.append(str(folder))


def _continuous(setting: Setting) -> Served:
    """Its ContinuousBatchingManager, with its own sizes on a GPU."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest = max(len(job.prompt) for job in setting.jobs), max(job.answer for job in setting.jobs)
    sizes: dict[str, Any] = {}
    if setting.model.device == "cpu":  # which it takes from the memory of a GPU
        blocks = setting.seats * -(-setting.context // 256)
        sizes = {"num_blocks": blocks, "max_batch_tokens": setting.chunk + setting.seats}
    manager = setting.model.of_transformers(_attention(setting)).init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            max_requests_per_batch=setting.seats, allow_block_sharing=False, **sizes
        ),
        workload_hints=WorkloadHints(*longest, setting.seats),
    )
    manager.warmup()
    manager.start()

    def serve(jobs: list[Job], pace: Pace) -> tuple[float, float]:
        began, left = time.perf_counter(), len(jobs)
        for n, job in enumerate(jobs):
            wait = min(job.arrival_s / pace.speed, pace.limit_s) - (time.perf_counter() - began)
            time.sleep(max(0.0, wait))
            manager.add_request(
                list(job.prompt), f"{began}/{n}", max_new_tokens=job.answer, eos_token_id=-1,
                record_timestamps=True,
            )  # fmt: skip
        while left and (now := time.perf_counter() - began) < pace.limit_s:
            output = manager.get_result(timeout=min(0.2, pace.limit_s - now))
            if output is not None:
                _note_all(jobs, output, began)
                left -= 1
            elif not manager.is_running():
                raise RuntimeError("continuous batching of transformers has ended by itself")
        return began, time.perf_counter() - began

    serve(setting.first_ones(), Pace())
    jobs = sorted(setting.fresh(), key=lambda job: job.arrival_s)
    began, took_s = serve(jobs, setting.pace)
    manager.stop(block=True, timeout=30, hard_stop=True)
    while (output := manager.get_result(timeout=0.1)) is not None:  # those it did not finish
        _note_all(jobs, output, began)
    manager.destroy()
    return Served("transformers, continuous", jobs, took_s)


def _note_all(jobs: list[Job], output: Any, began: float) -> None:
    job = jobs[int(output.request_id.split("/")[1])]
    for token, at in zip(output.generated_tokens, output.timestamps or (), strict=False):
        job.note(int(token), at - began)


def _generate(setting: Setting) -> Served:
    """One batch of all that wait, padded on the left, until the longest answer has ended."""
    import torch
    from transformers import GenerationConfig

    model = setting.model.of_transformers(_attention(setting))
    device = setting.model.device

    def serve(jobs: list[Job], pace: Pace) -> float:
        waiting = sorted(jobs, key=lambda job: job.arrival_s)
        began = time.perf_counter()
        while waiting and (now := time.perf_counter() - began) < pace.limit_s:
            some = [j for j in waiting if j.arrival_s / pace.speed <= now][: setting.seats]
            if not some:
                time.sleep(max(0.0, waiting[0].arrival_s / pace.speed - now))
                continue
            waiting = waiting[len(some) :]
            longest = max(len(job.prompt) for job in some)
            ids = [[0] * (longest - len(job.prompt)) + list(job.prompt) for job in some]
            read = [[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in some]
            steps = max(job.answer for job in some)
            model.generate(
                torch.tensor(ids, device=device), attention_mask=torch.tensor(read, device=device),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=steps, eos_token_id=None, pad_token_id=0
                ),
                streamer=_Notes(some, began),
                stopping_criteria=[
                    lambda ids, _: torch.full(
                        (len(ids),), time.perf_counter() - began > pace.limit_s, device=device
                    )
                ],
            )  # fmt: skip
        return time.perf_counter() - began

    serve(setting.first_ones()[:2], Pace())
    jobs = setting.fresh()
    return Served("transformers, generate", jobs, serve(jobs, setting.pace))


class _Notes:
    """Takes the tokens of a batch from `generate`, a step at a time; the first are the prompts."""

    def __init__(self, jobs: list[Job], began: float) -> None:
        self.jobs, self.began, self.has_begun = jobs, began, False

    def put(self, tokens: Any) -> None:
        if not self.has_begun:
            self.has_begun = True
            return
        now = time.perf_counter() - self.began
        for job, token in zip(self.jobs, tokens.tolist(), strict=True):
            if not job.is_done:
                job.note(token, now)

    def end(self) -> None:
        pass


PEERS: dict[str, Peer] = {
    "transformers": transformers, "generate": generate, "loop": loop, "llama.cpp": llama_cpp,
    "ours": ours,
}  # fmt: skip


# ---------------------------------------------------------------------------- rows


def peer_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each way to serve, with all its `measures`. `ratio`, of ours: its tokens a second
    over those of the best other library, if all read the same tokens; `peers_missing`: which did
    not run, and why."""
    setting = _setting(args)
    name = f"{setting.model.name}, {args.trace.name.split('.')[0]} x{args.speed:g}"
    everything: list[Served] = []
    rows: list[Row] = []
    asked = args.peers or [*PEERS]
    missing = {peer: "not asked for" for peer in PEERS if peer not in (*asked, "ours")}
    for peer in asked:
        for served in _served(peer, setting, missing):
            everything.append(served)
            found = measures(served.jobs, setting.pace, served.took_s)
            for gap in setting.itl_ms:
                found |= goodput(served, setting, gap)
            rows.append(base_row("serve", "serve.peers", args.target) | {
                "input": name, "width": len(served.jobs), "impl": served.impl,
                "dtype": str(setting.model.weights["embed"].dtype).removeprefix("torch."),
                "ms": 1e3 * served.took_s, "metric": "answer tokens/s",
                "value": found["answer tokens/s"], "ratio": None, "measures": found,
            })  # fmt: skip
        gc.collect()
        _empty_cache()
    others = [r["value"] for r in rows if not r["impl"].startswith("tilewright")]
    for row in rows:
        if row["impl"].startswith("tilewright") and others and not setting.share:
            row["ratio"] = row["value"] / max(others)
        yield row | {"peers_missing": missing}
    _say_what_agrees(everything)
    note(table(rows).replace("\n", "\n# "))


def _served(peer: str, setting: Setting, missing: dict[str, str]) -> Iterator[Served]:
    """What a peer did; why it did nothing goes to `missing`."""
    try:
        yield from PEERS[peer](setting)
    except Absent as reason:
        missing[peer] = str(reason)
        note(f"without {peer}: {reason}")


def _setting(args: argparse.Namespace) -> Setting:
    device = "cpu" if args.target == "cpp" else "cuda"
    model = random_model(args.shape, device) if args.shape else read_model(_path(args), device)
    context = min(model.config.context, args.context)
    vocab = model.config.vocab
    jobs = read_trace(args.trace, args.requests, args.lengths, (context - 1, vocab))
    pace = Pace(args.speed, args.limit)
    if device == "cpu":  # as many threads as ours
        import torch

        torch.set_num_threads(pool.wanted_threads())
    return Setting(
        model, tuple(jobs), pace, args.running, args.step_tokens, context, args.ttft_ms,
        tuple(args.itl_ms), args.cost, tuple(args.fixed or [args.step_tokens]), args.attention,
        args.cost_out, ".jsonl" in args.trace.name,
    )  # fmt: skip


def _path(args: argparse.Namespace) -> Path:
    from tilewright.serve.weights import packaged_model

    return Path(args.model) if args.model else packaged_model()


def goodput(served: Served, setting: Setting, gap_ms: float) -> dict[str, float]:
    """Requests a second that ended, with the first token and 99 % of the gaps in time."""
    speed = setting.pace.speed
    good = [
        in_time(job.arrival_s / speed, job.times_s, setting.ttft_ms / 1e3, gap_ms / 1e3)
        for job in served.jobs
        if job.is_done
    ]
    return {f"goodput {gap_ms:g} ms": sum(good) / served.took_s}


def _say_what_agrees(everything: list[Served]) -> None:
    """How many tokens of each peer are those of the first one, up to the first difference."""
    if not everything:
        return
    first = everything[0]
    for served in everything[1:]:
        same = total = 0
        for a, b in zip(_by_prompt(first), _by_prompt(served), strict=True):
            shared = min(len(a.tokens), len(b.tokens))
            differ = np.flatnonzero(np.array(a.tokens[:shared]) != np.array(b.tokens[:shared]))
            same, total = same + int(differ[0] if differ.size else shared), total + shared
        if total:
            note(f"{served.impl}: {100 * same / total:.1f} % of tokens equal to {first.impl}")


def _by_prompt(served: Served) -> list[Job]:
    return sorted(served.jobs, key=lambda job: (job.arrival_s, job.prompt))


def table(rows: Sequence[Row]) -> str:
    """All measures, a line for each way to serve."""
    names = ["done", "answer tokens/s", "prompt tokens/s", "ms first token p50",
             "ms first token p90", "ms gap p50", "ms gap p99"]  # fmt: skip
    names += [n for n in (rows[0]["measures"] if rows else ()) if n.startswith("goodput")]
    heads = [n.replace("first token", "TTFT").replace("tokens", "tok") for n in names]
    lines = [f"{'':26}" + "".join(f"{head:>15}" for head in heads)]
    for row in rows:
        values = "".join(f"{row['measures'][name]:15.4g}" for name in names)
        lines.append(f"{row['impl']:26}{values}")
    return "\n".join(lines)


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
