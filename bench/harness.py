"""`python3 dev.py bench SUITE`: ours and the best peers, in one process, on one device.

Runs are interleaved and medians taken; every result is checked against a float64 oracle before it
is timed; a wrong peer does not count. On a GPU each call is timed twice: with the L2 cache cleared
before it (`ms`), and replayed from a CUDA graph (`graph_ms`), both sides alike.
`ratio` is the best peer's time over ours, on the one row of ours that a user gets by default.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tilewright.errors import ArgumentError, MissingExtra
from tilewright.target import target as parse_target
from tilewright.tools.cli import check_output, guarded

SUITES = {
    "spmm": ("sparse", "sparse times dense"),
    "sddmm": ("sparse", "dense times dense at stored entries"),
    "spgemm": ("sparse", "sparse with sparse: A A, A + Aᵀ, A ∘ Aᵀ"),
    "graph_attention": ("graph_attention", "attention along the edges of a graph"),
    "graph_softmax": ("graph_attention", "the softmax of the entries of each row"),
    "gemm": ("gemm", "dense times dense on tensor cores, beside cuBLAS"),
    "blocks": ("blocks", "a matrix in blocks times dense, beside the dense product of cuBLAS"),
    "flash": ("flash", "lesson 9's flash attention on tensor cores, beside torch"),
    "attention": ("attention", "attention beside its peers: all suites of a GPU, or on the CPU"),
    "decode": ("decode", "decode attention over a paged cache, beside the time to read it"),
    "decode_variants": ("decode_variants", "decode with other pages, heads, masks and scores"),
    "cascade": ("cascade", "decode attention of requests that share a prefix, beside a flat table"),
    "quest": ("quest", "pages chosen by Quest and attention over them, beside all pages"),
    "prefill": ("prefill", "prefill attention, ragged and paged, causal and full"),
    "model": ("model", "tokens a second of a model, for prompts and for answers"),
    "serve": ("serve", "a trace of requests on the engine: tokens a second, first token, gaps"),
    "host": ("host", "time of a call, of import and of building, without the kernel"),
    "graphs": ("sparse", "the synthetic graphs and how well they fit"),
}

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 5, 200
_SAMPLE_S = 200e-6  # shorter calls are timed several at once
_SETTLE_S, _SAMPLES = 10e-3, 3  # of a turn on the CPU: untimed, then timed
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU; the memset hides the host's launch
_GRAPH_CALLS = 10

Row = dict[str, Any]


def or_inf(error: float) -> float:
    """An error, and infinity for one that is no number: `max` would leave NaN out."""
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute the result. `run` is the call as a user writes it; `to_host` brings what
    it returns into the form that the check takes. `costs` are milliseconds spent before."""

    impl: str
    run: Callable[[], Any]
    to_host: Callable[[Any], Any]
    is_ours: bool = False
    is_default: bool = False
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians in milliseconds; `graph_ms` on GPUs where the call can be captured."""

    ms: float
    graph_ms: float | None = None


# ---------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite with its arguments (default: those of the process); the exit status."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure against the best other installed implementations."
    )
    bench_arguments(parser)
    return bench(parser.parse_args(argv))


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    for name, (module, text) in SUITES.items():
        one = suites.add_parser(name, help=text, description=text)
        one.add_argument(
            "--json", action="store_true", help="one JSON object a line instead of a table"
        )
        one.add_argument(
            "--keep", nargs="?", type=Path, const=Path("bench/results"), metavar="DIR",
            help="append the rows to DIR/<device>/<suite>.jsonl (default: bench/results)",
        )  # fmt: skip
        one.add_argument(
            "--plot", type=Path, metavar="FILE.png", help="draw the ratios (needs matplotlib)"
        )
        getattr(importlib.import_module(f"bench.{module}"), f"{name}_arguments")(one)


def bench(args: argparse.Namespace) -> int:
    """Run a suite; 1 if one of our results was wrong. Raises ArgumentError[A109] before it runs
    where the results cannot be written, MissingExtra[E101] where they cannot be drawn."""
    _check_outputs(args)
    module = importlib.import_module(f"bench.{SUITES[args.suite][0]}")
    rows: list[Row] = []
    for row in getattr(module, args.suite)(args):
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
        elif args.suite in ("spmm", "sddmm", "gemm", "blocks", "flash"):
            print(line(row), flush=True)
        else:
            head = f"{row['input']:18} {row['width']:5} {row['target']:12} {row['impl']:34}"
            ratio = f"  ratio {row['ratio']:.2f}" if row["ratio"] else ""
            ratio += f"  {row['times_one']:.2f} times one" if "times_one" in row else ""
            roof = f"  {100 * row['roofline']:.0f} % of roofline" if row.get("roofline") else ""
            print(f"{head} {row['value']:9.4g} {row['metric']}{ratio}{roof}", flush=True)
        if args.keep:
            keep(args.keep, row)
    if not args.json and any(r.get("ratio") for r in rows):
        print("\n" + summary(rows))
    if args.plot:
        from bench import plot

        plot.draw(rows, args.plot)
    return 1 if any(r.get("wrong") and r["impl"].startswith("tilewright") for r in rows) else 0


def _check_outputs(args: argparse.Namespace) -> None:
    if args.plot:
        from bench import plot

        check_output("--plot", args.plot)
        plot.check(args.plot)
    if args.keep:
        try:
            args.keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                "A109", f"the folder cannot be created: {error}", where="--keep"
            ) from None
        check_output("--keep", args.keep / f"{args.suite}.jsonl")


def keep(folder: Path, row: Row) -> None:
    """Append a row to the results of its device and suite."""
    path = folder / slug(row["device"]) / f"{row['suite']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def line(row: Row) -> str:
    """A row for people."""
    ms = f"{row['ms']:10.4f} ms" if row.get("ms") is not None else f"{'–':>13}"
    graph = f"  graph {row['graph_ms']:9.4f}" if row.get("graph_ms") is not None else ""
    ratio = f"  ratio {row['ratio']:5.2f}" if row.get("ratio") else ""
    if row.get("graph_ratio"):
        ratio += f" ({row['graph_ratio']:.2f} replayed)"
    costs = "".join(f"  {k[:-3]} {row[k]:.0f} ms" for k in ("pack_ms", "build_ms") if k in row)
    costs += f"  {100 * row['longer']:+.1f} % of A B" if "longer" in row else ""
    wrong = f"  {row['wrong']}" if row.get("wrong") else ""
    value = f"{row['value']:9.1f} {row['metric']}" if row.get("value") is not None else ""
    head = f"{row['input']:16} {row['width']:5} {row['impl']:34}"
    return f"{head} {ms}{graph} {value}{ratio}{costs}{wrong}"


def summary(rows: Sequence[Row]) -> str:
    """Mean and worst ratio, over all inputs and by width."""
    lines = []
    with_ratio = [r for r in rows if r.get("ratio")]
    for name in ("ratio", "graph_ratio"):
        groups: dict[Any, list[Row]] = {}
        for row in with_ratio:
            if row.get(name):
                groups.setdefault(row["width"], []).append(row)
                groups.setdefault("all", []).append(row)
        for width, group in groups.items():
            worst = min(group, key=lambda r: r[name])
            mean = math.exp(statistics.fmean(math.log(r[name]) for r in group))
            lines.append(
                f"{name:11} width {width!s:>4}: geometric mean {mean:5.2f} of {len(group)}, "
                f"worst {worst[name]:5.2f} ({worst['input']}, {worst['width']})"
            )
    return "\n".join(lines)


# ---------------------------------------------------------------------------- timing


def measure(
    contenders: Sequence[Contender], on_gpu: bool, budget_s: float = 2.0
) -> dict[str, Timing]:
    """Median times of all contenders, run in turns for about `budget_s` in all."""
    return _measure_gpu(contenders, budget_s) if on_gpu else _measure_cpu(contenders, budget_s)


def _measure_cpu(contenders: Sequence[Contender], budget_s: float) -> dict[str, Timing]:
    """Turns of several calls each: after a switch the other side's idle threads still spin for a
    while, so the first calls of a turn are not timed."""
    repeat: dict[str, int] = {}
    total = 0.0
    for c in contenders:
        once = min(_elapsed(c.run, 1) for _ in range(WARM_UP))
        repeat[c.impl] = max(1, math.ceil(_SAMPLE_S / max(once, 1e-9)))
        total += _SETTLE_S + once * (1 + repeat[c.impl] * _SAMPLES)
    samples: dict[str, list[float]] = {c.impl: [] for c in contenders}
    for _ in range(_rounds(budget_s, total)):
        for c in contenders:
            settled = time.perf_counter() + _SETTLE_S
            c.run()
            while time.perf_counter() < settled:
                c.run()
            for _ in range(_SAMPLES):
                samples[c.impl].append(_elapsed(c.run, repeat[c.impl]) / repeat[c.impl])
    return {impl: Timing(1e3 * statistics.median(s)) for impl, s in samples.items()}


def _rounds(budget_s: float, each_s: float) -> int:
    return int(min(max(budget_s / max(each_s, 1e-9), MIN_ROUNDS), MAX_ROUNDS))


def _elapsed(run: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - began


def _measure_gpu(contenders: Sequence[Contender], budget_s: float) -> dict[str, Timing]:
    torch = require_torch()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    total = 0.0
    for c in contenders:
        for _ in range(WARM_UP):
            c.run()
        torch.cuda.synchronize()
        total += _elapsed(lambda c=c: (c.run(), torch.cuda.synchronize()), 1) + 2e-4
    events: dict[str, list[Any]] = {c.impl: [] for c in contenders}
    for _ in range(_rounds(budget_s / 2, total)):
        for c in contenders:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            flush.zero_()
            pair[0].record()
            c.run()
            pair[1].record()
            events[c.impl].append(pair)
    torch.cuda.synchronize()
    cold = {
        k: statistics.median(a.elapsed_time(b) for a, b in pairs) for k, pairs in events.items()
    }
    return {
        impl: Timing(cold[impl], g)
        for impl, g in _measure_graphs(contenders, cold, budget_s / 2).items()
    }


def _measure_graphs(
    contenders: Sequence[Contender], cold: dict[str, float], budget_s: float
) -> dict[str, float | None]:
    torch = require_torch()
    graphs: dict[str, tuple[Any, int]] = {}
    medians: dict[str, float | None] = dict.fromkeys(cold)
    for c in contenders:
        calls = _GRAPH_CALLS if cold[c.impl] < 5 else 2
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    c.run()
        except Exception as error:  # not every library can be captured
            torch.cuda.synchronize()
            note(f"{c.impl}: no graph ({type(error).__name__})")
            continue
        graphs[c.impl] = graph, calls
    each = sum(cold[i] * n for i, (_, n) in graphs.items()) / 1e3
    events: dict[str, list[Any]] = {impl: [] for impl in graphs}
    for turn in range(_rounds(budget_s, each) + 1):
        for impl, (graph, _) in graphs.items():
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            graph.replay()
            pair[1].record()
            if turn:  # the first replay of a graph uploads it
                events[impl].append(pair)
    torch.cuda.synchronize()
    for impl, pairs in events.items():
        medians[impl] = statistics.median(a.elapsed_time(b) for a, b in pairs) / graphs[impl][1]
    return medians


# ---------------------------------------------------------------------------- rows


def elements_beyond(got: Any, expected: Any, bound: Any) -> str:
    """How many elements of a tensor are further than `bound` from float64, or nothing."""
    beyond = ~((got.double() - expected).abs() <= bound)  # NaN is beyond too
    return f"{int(beyond.sum())} of {beyond.numel()} elements are wrong" if beyond.any() else ""


def compare(
    base: Row, contenders: Iterable[Contender], check: Callable[[Any], str], work: float
) -> list[Row]:
    """Check, time and rank contenders for one input: a row each, ours last.

    `base` holds what all rows share; `check` gives what is wrong with a result, or nothing; `work`
    is the number of floating-point operations.
    """
    good: list[Contender] = []
    rows: list[Row] = []
    for c in contenders:
        wrong = check(c.to_host(c.run()))
        if wrong:
            rows.append(
                base
                | {
                    "impl": c.impl,
                    "ms": None,
                    "metric": "GFLOP/s",
                    "value": None,
                    "ratio": None,
                    "wrong": wrong,
                }
            )
        else:
            good.append(c)
    times = measure(good, on_gpu=base["target"].startswith("cuda"))
    peers = [times[c.impl] for c in good if not c.is_ours]
    for c in sorted(good, key=lambda c: (c.is_ours, c.is_default, -times[c.impl].ms)):
        t = times[c.impl]
        row = base | {
            "impl": c.impl,
            "ms": t.ms,
            "metric": "GFLOP/s",
            "value": work / t.ms / 1e6,
            "ratio": None,
        }
        row |= {f"{k}_ms": v for k, v in c.costs.items()}
        if t.graph_ms is not None:
            row["graph_ms"] = t.graph_ms
        if c.is_default and peers:
            row["ratio"] = min(p.ms for p in peers) / t.ms
            replayed = [p.graph_ms for p in peers if p.graph_ms is not None]
            if t.graph_ms and replayed:
                row["graph_ratio"] = min(replayed) / t.graph_ms
        rows.append(row)
    return rows


def base_row(suite: str, op: str, target: str) -> Row:
    """What every row of a run shares: device, commit, versions."""
    return {
        "suite": suite,
        "op": op,
        "target": target,
        "device": device_name(target),
        "commit": commit(),
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def device_name(target: str) -> str:
    """The GPU, or the processor and the cores this process may use."""
    from tilewright.serve.cost import device_name

    return device_name(parse_target(target))


def slug(device: str) -> str:
    """A device's name as the name of a folder."""
    short = re.sub(r"\((R|TM)\)|CPU|NVIDIA", "", device)
    return re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-") or "unknown"


@functools.cache
def commit() -> str:
    """The commit of the checkout that Tilewright runs from (`+` if edited), else its version."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        done = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            encoding="utf-8",
            timeout=20,
            check=True,
        )
        edited = subprocess.run(
            [*git, "status", "--porcelain", "-uno"],
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=True,
        )
        return done.stdout.strip() + ("+" if edited.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return f"v{versions()['tilewright']}"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of all that takes part, as far as it is installed."""
    import tilewright

    versions = {"tilewright": tilewright.__version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "torch", "nvidia-cuda-nvrtc", "nvidia-cusparse"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def require_torch() -> Any:
    """torch with a GPU. Raises MissingExtra[E101], ArgumentError[A105]."""
    try:
        import torch
    except ImportError:
        raise MissingExtra(
            "E101",
            "benchmarks on a GPU are timed with torch",
            hint="pip install 'tilewright[torch]'",
        ) from None
    if not torch.cuda.is_available():
        raise ArgumentError("A105", "torch finds no GPU here", hint="--target cpp")
    return torch


def progress(done: int, of: int, what: str) -> None:
    """Counts on one line of a terminal, away from the rows; nothing where nobody looks."""
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r# {done} of {of} {what}", end=end, file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A remark for people, away from the rows."""
    print(f"# {text}", file=sys.stderr, flush=True)
