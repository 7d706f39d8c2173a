"""`tilewright demo`, `chat`, `serve` and `tune`: a language model on Tilewright's kernels."""

import argparse
import logging
import math
import resource
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError, TilewrightError, needed_for
from tilewright.serve.chat import Prompts
from tilewright.serve.engine import LLM, Engine, Options
from tilewright.serve.request import Sampling
from tilewright.serve.tune import errors, fit, measure
from tilewright.serve.weights import open_model, packaged_model
from tilewright.target import target as parse_target
from tilewright.toolchain import compilers, disk_cache
from tilewright.tools.cli import check_output

QUESTION = "What is the capital of France?"
MODEL = "a GGUF file, or a folder of safetensors (default: SmolLM2-135M-Instruct)"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "question": {"nargs": "?", "default": QUESTION},
    "model": {"nargs": "?", "help": MODEL},
    "--model": {"help": MODEL},
    "--target": {"default": "cpp", "help": "cpp (default) or cuda"},
    "--context": {"type": int, "help": "tokens of prompt and answer (default: at most 2048)"},
    "--max-tokens": {"type": int, "default": 256, "help": "of an answer (default: %(default)s)"},
    "--temperature": {"type": float, "default": 0.0, "help": "0 takes the likeliest token"},
    "--seed": {"type": int, "help": "with a temperature: equal seeds give equal answers"},
    "--running": {"type": int, "default": 16, "help": "requests answered at once (%(default)s)"},
    "--step-tokens": {"type": int, "default": 256, "help": "tokens of one step (%(default)s)"},
    "--kv-tokens": {"type": int, "help": "tokens of the KV cache (default: four contexts)"},
    "--fast": {"action": "store_true", "help": "faster batches, not equal to the bit"},
    "--name": {"help": "the model's name in the API (default: the file's)"},
    "--host": {"default": "127.0.0.1", "help": "address to listen at (%(default)s)"},
    "--port": {"type": int, "default": 8000, "help": "0 takes a free one (%(default)s)"},
    "--api-key": {"action": "append", "default": [], "help": "a client must send one of these"},
    "--of-client": {"type": int, "default": 64, "help": "of a client at once (%(default)s)"},
    "--cost": {"help": "measured costs of a step, which ttft_ms and itl_ms need"},
}
ANSWER = ("--max-tokens", "--temperature", "--seed", "--target", "--context")
SERVER = ("--name", "--host", "--port", "--api-key", "--of-client")
ENGINE = ("--running", "--step-tokens", "--kv-tokens", "--fast", "--cost", "--target", "--context")
MEASURED = ("--running", "--step-tokens", "--fast", "--target", "--context")


def add_arguments(names: Sequence[str], parser: argparse.ArgumentParser) -> None:
    for name in names:
        parser.add_argument(name, **ARGUMENTS[name])


def engine_options(args: argparse.Namespace) -> Options:
    """The options of an engine, of those that a parser has."""
    options = {n: x for n, x in vars(args).items() if n in Options.__dataclass_fields__}
    return Options(invariant=not args.fast, **options)


demo_arguments = partial(add_arguments, ("question", "--model", *ANSWER))
chat_arguments = partial(add_arguments, ("model", *ANSWER))
serve_arguments = partial(add_arguments, ("model", *SERVER, *ENGINE))


def _open(args: argparse.Namespace) -> tuple[LLM, float]:
    """The model, and the seconds it took to open. Raises ModelError[M106] for bad options."""
    Sampling(**_options(args))
    began = time.perf_counter()
    llm = LLM(args.model or packaged_model(), target=args.target, context=args.context)
    return llm, time.perf_counter() - began


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}


def _title(llm: LLM, args: argparse.Namespace) -> str:
    interpreted = parse_target(args.target).kind == "cpp" and not compilers.has_compiler()
    where = f"{args.target}, interpreted: no C++ compiler" if interpreted else args.target
    return f"{Path(llm.model.file.path).name} on {where}"


def demo(args: argparse.Namespace) -> int:
    """Answers one question, then reports times and rates."""
    began = time.perf_counter()
    llm, opened_s = _open(args)
    pieces = llm.stream(args.question, **_options(args))  # raises before anything is printed
    print(f"{_title(llm, args)}\n\n> {args.question}\n")
    for piece in pieces:
        print(piece, end="", flush=True)
    print("\n")
    _report(llm, opened_s, llm.latest.first - began)
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation with history. Ctrl-C stops an answer or clears the input line; Ctrl-D or /exit
    ends the program."""
    llm, opened_s = _open(args)
    print(
        f"{_title(llm, args)}, opened in {opened_s:.2f} s. "
        "Ctrl-C stops an answer, /new forgets the history, /exit leaves."
    )
    messages: list[dict[str, str]] = []
    interrupted = False
    while True:
        try:  # around the loop's body: Ctrl-C may come at any time, also just after an answer
            if interrupted:
                interrupted = False
                print("\n[/exit or Ctrl-D leaves]")
            question = input("\n> ").strip()
            if question in ("/exit", "/quit"):
                return 0
            if question == "/new":
                messages.clear()
            elif question:
                _turn(llm, messages, question, _options(args))
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            interrupted = True


def serve(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; then answers that have begun are finished. Raises
    MissingExtra[E101], ArgumentError[A109]."""
    if not 0 <= args.port <= 65535:
        raise ArgumentError("A109", f"--port {args.port} is outside 0…65535")
    if args.of_client < 1:
        raise ArgumentError("A109", f"--of-client {args.of_client} is below 1")
    with needed_for("the server", "models,serve"):
        import uvicorn

        from tilewright.serve.api import ServerLimits, build_app
        from tilewright.serve.worker import Worker

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET  # of a name: IPv4
    try:  # before a model is loaded
        listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        rule = f"the server cannot listen at --host {args.host} --port {args.port}: {error}"
        raise ArgumentError("A109", rule, hint="--port 0 takes a free one") from None
    with listening:
        path = Path(args.model or packaged_model())
        options = engine_options(args)
        file, name = open_model(path), args.name or path.stem
        worker = Worker.process(str(path), args.target, options)
        prompts = Prompts(file, options.resolved(file.config)[0])
        limits = ServerLimits(of_client=args.of_client, api_keys=args.api_key)
        app = build_app(prompts, worker, name, limits)
        print(f"{name} at http://{args.host}:{listening.getsockname()[1]}/v1", flush=True)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False,
            timeout_graceful_shutdown=int(limits.answer_s),  # for those that read no answer
        )  # fmt: skip
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after its end
            uvicorn.Server(config).run([listening])
    return 0


def _turn(llm: LLM, messages: list[dict[str, str]], question: str, options: dict[str, Any]) -> None:
    """Answers one question. Both join the history, unless an error or Ctrl-C came before the first
    word of the answer."""
    asked = {"role": "user", "content": question}
    answer: list[str] = []
    stopped = False
    try:
        if llm.template and (left_out := llm.too_many([*messages, asked])):
            del messages[:left_out]  # the oldest turns: they leave no room for an answer
            print(f"[the {left_out} oldest messages no longer fit]")
        for piece in llm.stream([*messages, asked] if llm.template else question, **options):
            answer.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(" [stopped]", end="")
    except TilewrightError as e:
        print(f"{type(e).__name__}{e}", file=sys.stderr)
        return
    if stopped and not answer:
        print()
        return
    messages += [asked, {"role": "assistant", "content": "".join(answer)}]
    r = llm.latest
    read = f"{r.prompt_tokens - r.cached} + {r.cached} cached tokens read at {r.rates[0]:.0f}/s"
    print(f"\n[{read}, {r.answered} written at {r.rates[1]:.0f}/s]")


def _report(llm: LLM, opened_s: float, first_s: float) -> None:
    r, stats = llm.latest, disk_cache.stats
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weights_mb, compiled = llm.model.file.nbytes / 1e6, f"{stats.compiled} compiled"
    rows = {
        "model": f"{weights_mb:.0f} MB of weights, opened in {1e3 * opened_s:.0f} ms",
        "kernels": f"{compiled} in {stats.compile_ms:.0f} ms, {stats.hits} from the cache",
        "products": f"by {llm.model.products_by}",
        "first token": f"{1e3 * first_s:.0f} ms after the start",
        "prompt": f"{r.prompt_tokens} tokens, {r.rates[0]:.0f} tokens/s",
        "answer": f"{r.answered} tokens, {r.rates[1]:.0f} tokens/s",
        "memory": f"{peak_mb:.0f} MB at the peak",
    }
    print("\n".join(f"{name:12} {text}" for name, text in rows.items()))


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("serve",))
    add_arguments(("model", *MEASURED), parser)
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
    model = fit(samples, engine.scheduler.model.key, engine.runner.joins)
    model.save(args.out)
    p50, p90 = (100 * float(np.percentile(errors(model, samples), p)) for p in (50, 90))
    print(f"{args.out}: {len(samples)} steps, off by {p50:.1f} % at the median, {p90:.1f} % at p90")
    return 0
