"""`tilewright demo` and `tilewright chat`: a real model answers through Tilewright's kernels."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.runtime import cache
from tilewright.serve.engine import LLM
from tilewright.serve.weights import packaged_model

QUESTION = "What is the capital of France?"


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--model", help="a GGUF file (default: the packaged SmolLM2-135M-Instruct)")
    _shared_arguments(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `chat`."""
    parser.add_argument(
        "model", nargs="?", help="a GGUF file (default: the packaged SmolLM2-135M-Instruct)"
    )
    _shared_arguments(parser)


def _shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="cpp", help="cpp or cuda")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--context", type=int, help="tokens of prompt and answer together")


def _open(args: argparse.Namespace) -> tuple[LLM, float]:
    """The model, and the seconds it took to open."""
    began = time.perf_counter()
    path = args.model or str(packaged_model())
    llm = LLM(path, target=args.target, context=args.context)
    return llm, time.perf_counter() - began


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}


def demo(args: argparse.Namespace) -> int:
    """Answers one question, then prints what happened."""
    began = time.perf_counter()
    llm, opened_s = _open(args)
    print(f"{Path(llm.model.file.path).name} on {args.target}\n\n> {args.question}\n")
    first_s = 0.0
    for piece in llm.stream(args.question, **_options(args)):
        first_s = first_s or time.perf_counter() - began
        print(piece, end="", flush=True)
    print("\n")
    _report(llm, opened_s, first_s)
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation with history. Ctrl-C stops an answer; Ctrl-D or /exit ends the program."""
    llm, opened_s = _open(args)
    print(
        f"{Path(llm.model.file.path).name} on {args.target}, opened in {opened_s:.2f} s. "
        "Ctrl-C stops an answer, /new forgets the history, /exit leaves."
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if question in ("/exit", "/quit"):
            return 0
        if question == "/new":
            messages.clear()
        elif question:
            _turn(llm, messages, question, _options(args))


def _turn(llm: LLM, messages: list[dict[str, str]], question: str, options: dict[str, Any]) -> None:
    messages.append({"role": "user", "content": question})
    answer: list[str] = []
    try:
        prompt = _within_context(llm, messages) if llm.template else question
        for piece in llm.stream(prompt, **options):
            answer.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except TilewrightError as e:
        messages.pop()
        print(f"{type(e).__name__}{e}", file=sys.stderr)
        return
    messages.append({"role": "assistant", "content": "".join(answer)})
    c = llm.counts
    print(
        f"\n[{c.prompt_tokens} + {c.cached_tokens} cached tokens read at {c.prompt_rate:.0f}/s, "
        f"{c.answer_tokens} written at {c.answer_rate:.0f}/s]"
    )


def _within_context(llm: LLM, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation, its oldest turns dropped for good where no room for an answer is left."""
    left_out = llm.too_many(messages)
    if left_out:
        del messages[:left_out]
        print(f"[the {left_out} oldest messages no longer fit]")
    return list(messages)


def _report(llm: LLM, opened_s: float, first_s: float) -> None:
    c, stats = llm.counts, cache.stats
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [
        (
            "model",
            f"{llm.model.file.nbytes / 1e6:.0f} MB of weights, opened in {1e3 * opened_s:.0f} ms",
        ),
        (
            "kernels",
            f"{stats.compiled} compiled in {stats.compile_ms:.0f} ms, {stats.hits} from the cache",
        ),
        ("first token", f"{1e3 * first_s:.0f} ms after the start"),
        ("prompt", f"{c.prompt_tokens} tokens, {c.prompt_rate:.0f} tokens/s"),
        ("answer", f"{c.answer_tokens} tokens, {c.answer_rate:.0f} tokens/s"),
        ("memory", f"{peak_mb:.0f} MB at the peak"),
    ]
    print("\n".join(f"{name:12} {text}" for name, text in rows))
