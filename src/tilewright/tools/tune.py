"""`tilewright tune serve`: measures the cost of a step on this machine, and writes it."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from tilewright.errors import ArgumentError
from tilewright.serve.engine import Engine
from tilewright.serve.tune import errors, fit, measure
from tilewright.serve.weights import open_model, packaged_model
from tilewright.tools.chat import add_arguments, engine_options
from tilewright.tools.cli import check_output

_ENGINE = ("model", "--running", "--step-tokens", "--fast", "--target", "--context")


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("serve",))
    add_arguments(_ENGINE, parser)
    parser.add_argument("--out", type=Path, default=Path("cost.json"), help="default: cost.json")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long to measure")


def tune(args: argparse.Namespace) -> int:
    """Times random steps, fits the constants of `serve.cost`, and writes them as JSON for
    `tilewright serve --cost`. Raises ArgumentError[A109] before the work."""
    check_output("--out", args.out)
    if not 0 < args.seconds < math.inf:
        raise ArgumentError("A109", f"--seconds {args.seconds}", where="--seconds", hint="150")
    engine = Engine(open_model(args.model or packaged_model()), args.target, engine_options(args))
    samples = []
    for sample in measure(engine, args.seconds):
        samples.append(sample)
        print(f"\r{len(samples)} steps", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    model = fit(samples, engine.scheduler.model.key)
    model.save(args.out)
    p50, p90 = (100 * float(np.percentile(errors(model, samples), p)) for p in (50, 90))
    print(f"{args.out}: {len(samples)} steps, off by {p50:.1f} % at the median, {p90:.1f} % at p90")
    return 0
