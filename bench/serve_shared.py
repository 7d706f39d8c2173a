"""`dev.py bench serve --shared-prefix TOKENS`: many answers on one prefix, reads shared and not.

`--running` requests begin with the same tokens and go on with 240 others; each is answered with 48
tokens. Measured are the steps in which all are answered, on and off in turns.

    python3 dev.py bench serve --shared-prefix 8192 --running 64 --shape llama-3.1-8b --target cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np

from bench.harness import Row, base_row, note
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Sampling
from tilewright.serve.weights import ModelFile, open_model, packaged_model

OWN, ANSWER = 240, 48  # tokens of a prompt behind the prefix, and of an answer
_TURNS = 3


def shared_prefix_rows(args: argparse.Namespace) -> Iterator[Row]:
    """The milliseconds of a step of answers, with shared reads and without; `ratio`: how many times
    as long it takes without."""
    file, count = model_of(args), args.running
    tokens = args.shared_prefix + OWN + ANSWER
    options = Options(
        context=tokens, running=count, step_tokens=max(args.step_tokens, count + 1),
        kv_tokens=args.shared_prefix + (count + 1) * (OWN + ANSWER + 32), invariant=False,
    )  # fmt: skip
    engine = Engine(file, args.target, options)
    ms = measured(engine, args.shared_prefix, count)
    flat, cascade = ms["flat"], ms["cascade"]
    note(f"{count} x ({args.shared_prefix} + {OWN}), {file.config.layers} layers: flat {flat:.3f} "
         f"ms a step, cascade {cascade:.3f}, {flat / cascade:.2f} times")  # fmt: skip
    counts = engine.counts()
    if not counts["cascaded_rows_total"]:
        note("no group pays: both are flat steps")
    for impl, value in ms.items():
        yield base_row("serve", "serve.shared", args.target) | {
            "input": f"{count} x ({args.shared_prefix} + {OWN})", "width": count,
            "dtype": engine.model.kv_dtype, "impl": impl, "ms": value, "metric": "ms a step",
            "value": value, "ratio": flat / value, "layers": file.config.layers,
            "cascaded_rows": counts["cascaded_rows_total"],
            "saved_bytes": counts["cascade_saved_bytes_total"],
        }  # fmt: skip


def model_of(args: argparse.Namespace) -> ModelFile:
    if not args.shape:
        return open_model(args.model or packaged_model())
    from bench.peer_models import SHAPES, random_model

    name = args.shape
    if args.layers:
        name = f"{args.shape}, {args.layers} layers"
        SHAPES[name] = SHAPES[args.shape] | {"num_hidden_layers": args.layers}
    return random_model(name, "cpu" if args.target == "cpp" else "cuda").ours()


def measured(engine: Engine, prefix: int, count: int) -> dict[str, float]:
    """The median step of `count` answers, by the form of their steps."""
    rng, vocab = np.random.default_rng(0), engine.model.config.vocab
    common = rng.integers(0, vocab, prefix).tolist()
    first = engine.submit([*common, 0], Sampling(max_tokens=1))
    while not first.finish:
        engine.step()
    times: dict[str, list[float]] = {"flat": [], "cascade": []}
    for turn in range(2 * _TURNS):
        engine.runner.cascade.is_on = bool(turn % 2)
        how = Sampling(max_tokens=ANSWER, ignore_eos=True)
        prompts = [[*common, *rng.integers(0, vocab, OWN).tolist()] for _ in range(count)]
        requests = [engine.submit(prompt, how) for prompt in prompts]
        while not all(r.finish for r in requests):
            began, all_are = time.perf_counter(), all(r.answered > 3 for r in requests)
            engine.step()
            if all_are and not any(r.finish for r in requests):
                times["cascade" if turn % 2 else "flat"].append(time.perf_counter() - began)
    return {impl: 1e3 * statistics.median(found) for impl, found in times.items()}
