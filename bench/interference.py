"""`python -m bench.interference`: what answers and prompts cost each other on the SMs of one GPU.

Layers of Llama-3.1-8B's shape in bfloat16, random weights: products of torch, attention of
FlashAttention-3, CUDA graphs. A step of 64 answers and a chunk of 2048 tokens of prompts run alone
and at once, each on its share of the SMs (two green contexts), or on two streams of the whole GPU;
beside that the step that has both as one batch, for chunks of several sizes. Times are of the
layers that are run; the last lines say which way serves the most, for prompts that are 5.5 times as
long as their answers (the Azure trace) and for promised gaps.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.harness import base_row, note
from bench.serve import PEERS

DIM, FFN, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
LAYERS, ALL_LAYERS, ANSWERS, CHUNK, PAGE = 4, 32, 64, 2048, 256
SHARES = (16, 24, 32, 48, 64, 80, 96)
CHUNKS = (0, 128, 256, 352, 512, 1024, 2048)
RATIO = 5.5  # tokens of prompts for one of an answer


class Layers:
    """A few layers, and the cache of the answers' keys."""

    def __init__(self, device: str, keys: int) -> None:
        def random(*shape: int) -> Any:
            made = torch.randn(shape, dtype=torch.bfloat16, device=device)
            return made.mul_(shape[-1] ** -0.5)

        sizes = (
            ((HEADS + 2 * KV_HEADS) * HEAD, DIM),
            (DIM, HEADS * HEAD),
            (2 * FFN, DIM),
            (DIM, FFN),
        )
        self.weights = [[random(*size) for size in sizes] for _ in range(LAYERS)]
        pages = -(-keys // PAGE)
        shape = ANSWERS * pages, PAGE, KV_HEADS, HEAD
        self.cache = [(random(*shape), random(*shape)) for _ in range(LAYERS)]
        self.table = torch.randperm(shape[0], device=device, dtype=torch.int32).view(ANSWERS, pages)
        self.lengths = torch.full((ANSWERS,), keys, device=device, dtype=torch.int32)
        self.x = random(ANSWERS + CHUNK, DIM)
        self.flash = importlib.import_module("flash_attn_interface")

    def run(self, answers: int, chunk: int) -> None:
        """The layers over rows of answers, and of a prompt behind them."""
        x = self.x[: answers + chunk]
        for (qkv, o, gate_up, down), (k_cache, v_cache) in zip(
            self.weights, self.cache, strict=True
        ):
            heads = (x @ qkv.T).view(-1, HEADS + 2 * KV_HEADS, HEAD)
            q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
            parts = []
            if answers:
                one = self.flash.flash_attn_with_kvcache(
                    q[:answers, None].contiguous(), k_cache, v_cache, cache_seqlens=self.lengths,
                    page_table=self.table, causal=True,
                )  # fmt: skip
                parts.append(one[:, 0] if not isinstance(one, tuple) else one[0][:, 0])
            if chunk:
                own = (y[None, answers:] for y in (q, k, v))
                one = self.flash.flash_attn_func(*own, causal=True)
                parts.append(one[0] if not isinstance(one, tuple) else one[0][0])
            a = torch.cat([part.reshape(-1, HEADS * HEAD) for part in parts])
            x = torch.addmm(x, a, o.T)
            gate, up = (x @ gate_up.T).chunk(2, -1)
            x = torch.addmm(x, torch.nn.functional.silu(gate) * up, down.T)


def partition(count: int) -> tuple[Any, Any, int, int]:
    """Streams on about so many SMs and on all others, and their numbers."""
    cuda = ctypes.CDLL("libcuda.so.1")
    words = 64  # of 8 bytes: more than a CUdevResource of any version has

    def call(name: str, *args: Any) -> None:
        if code := getattr(cuda, name)(*args):
            raise RuntimeError(f"{name}: {code}")

    def stream(resource: Any) -> Any:
        description, context, handle = (ctypes.c_void_p() for _ in range(3))
        call("cuDevResourceGenerateDesc", ctypes.byref(description), resource, 1)
        call("cuGreenCtxCreate", ctypes.byref(context), description, 0, 1)
        call("cuGreenCtxStreamCreate", ctypes.byref(handle), context, 1, 0)
        return torch.cuda.ExternalStream(handle.value)

    every, some, rest = ((ctypes.c_uint64 * words)() for _ in range(3))
    call("cuDeviceGetDevResource", 0, every, 1)  # 1: SMs
    groups = ctypes.c_uint(1)
    call("cuDevSmResourceSplitByCount", some, ctypes.byref(groups), every, rest, 0, count)
    # The number of SMs is the first word behind the type and 92 bytes.
    sizes = [ctypes.cast(r, ctypes.POINTER(ctypes.c_uint32))[24] for r in (some, rest)]
    return stream(some), stream(rest), *sizes


def graph(run: Callable[[], None], stream: Any) -> Any:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made, stream=stream):
        run()
    return made


def at_once(sides: list[tuple[Any, Any, int]]) -> list[float]:
    """The median milliseconds of a replay of each (graph, stream, replays), all at once."""
    for made, stream, _ in sides:
        with torch.cuda.stream(stream):
            made.replay()
    torch.cuda.synchronize()
    events: list[list[Any]] = []
    for made, stream, count in sides:
        own = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        with torch.cuda.stream(stream):
            own[0].record(stream)
            for event in own[1:]:
                made.replay()
                event.record(stream)
        events.append(own)
    torch.cuda.synchronize()
    begin = max(events, key=lambda own: events[0][0].elapsed_time(own[0]))[0]
    end = min(events, key=lambda own: events[0][0].elapsed_time(own[-1]))[-1]
    found = []
    for own in events:  # those that ran while the other side did
        inside = [
            a.elapsed_time(b)
            for a, b in itertools.pairwise(own)
            if begin.elapsed_time(a) >= 0 and b.elapsed_time(end) >= 0
        ]
        found.append(statistics.median(inside or [own[0].elapsed_time(own[-1]) / (len(own) - 1)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=1024, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    layers = Layers("cuda", args.keys)
    main_stream, other, urgent = (
        torch.cuda.Stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(priority=-1),
    )
    mixed = {c: graph(lambda c=c: layers.run(ANSWERS, c), main_stream) for c in CHUNKS}
    alone = graph(lambda: layers.run(0, CHUNK), other)
    decode = graph(lambda: layers.run(ANSWERS, 0), urgent)
    halves = {}
    for share in SHARES:
        first, second, few, rest = partition(share)
        halves[few, rest] = (
            graph(lambda: layers.run(ANSWERS, 0), first), first,
            graph(lambda: layers.run(0, CHUNK), second), second,
        )  # fmt: skip
    times: dict[Any, list[list[float]]] = {}

    def take(name: Any, *sides: tuple[Any, Any, int]) -> None:
        times.setdefault(name, []).append(at_once([*sides]))

    for _ in range(args.rounds):
        for c, made in mixed.items():
            take(("one batch", c), (made, main_stream, 12))
        take("prompt alone", (alone, other, 8))
        take("two streams", (decode, urgent, 40), (alone, other, 10))
        for (few, rest), (a, first, b, second) in halves.items():
            take(("answers alone", few), (a, first, 16))
            take(("prompt alone", rest), (b, second, 6))
            take(("split", few, rest), (a, first, 60), (b, second, 12))
    ms = {n: [statistics.median(x) for x in zip(*found, strict=True)] for n, found in times.items()}
    scale = ALL_LAYERS / LAYERS
    for name, found in ms.items():
        text = " ".join(map(str, name)) if isinstance(name, tuple) else name
        row = base_row("serve", "serve.interference", "cuda") | {
            "input": f"{ANSWERS} answers of {args.keys} keys, chunk of {CHUNK}, {LAYERS} layers",
            "width": ANSWERS, "dtype": "bfloat16", "impl": text, "ms": found[0],
            "metric": "ms of the layers", "value": found[0], "ratio": None, "both_ms": found,
            "peers_missing": dict.fromkeys(PEERS, "ways to share one GPU are compared"),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
    ways = {f"one batch, {c}": (x[0] * scale, ANSWERS, c) for (n, c), x in
            ((k, v) for k, v in ms.items() if k[0] == "one batch")}  # fmt: skip
    note("gap of all layers in ms, answer tokens/s, prompt tokens/s, requests of 1:5.5 by both")
    rows = [(name, gap, 1e3 * n / gap, 1e3 * c / gap) for name, (gap, n, c) in ways.items()]
    for name, found in ms.items():
        if name == "two streams" or name[0] == "split":
            gap, chunk = (x * scale for x in found)
            text = name if isinstance(name, str) else f"split {name[1]} + {name[2]}"
            rows.append((text, gap, 1e3 * ANSWERS / gap, 1e3 * CHUNK / chunk))
    for name, gap, answers, prompts in rows:
        both = min(answers, prompts / RATIO)
        note(f"{name:18} {gap:8.2f} {answers:9.0f} {prompts:9.0f} {both:9.0f}")
    for gap in (10, 15, 20, 30, 50):
        best = {}
        for kind in ("one batch", "split"):
            kept = [
                (prompts, name) for name, own, _, prompts in rows if own <= gap and kind in name
            ]
            best[kind] = max(kept, default=(0.0, "none"))
        note(f"gaps up to {gap} ms, most prompt tokens/s: {best}")


if __name__ == "__main__":
    main()
