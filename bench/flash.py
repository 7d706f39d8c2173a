"""`python3 dev.py bench flash`: the flash attention of lesson 9, a tile program written in the
language, beside torch's attention (FlashAttention-2 and cuDNN) on a GPU.

One prompt, bfloat16 or float16. TFLOP/s count 4 · m · n · heads · head_dim, half of it where
causal. Every result is compared with float64 before it counts.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.harness import Contender, Row, base_row, compare, elements_beyond, require_torch

LESSON = Path(__file__).resolve().parents[1] / "examples" / "09_flash_attention.py"
SIZES = 4096, 512, 1024, 2048, 8192
_TOLERANCE = 2e-2  # weights and outputs are rounded to 16 bits, sums are of about one weight


def flash_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, action="append", metavar="N", help="queries and keys; several times"
    )
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar="H")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="head_dim (default: 128)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--tile", type=int, nargs=4, action="append", default=[], metavar="N",
        help="further schedules: rows, warps, keys and stages of a CTA",
    )  # fmt: skip


def flash(args: argparse.Namespace) -> Iterator[Row]:
    """Rows for each size, causal and full: torch's, then ours."""
    torch = require_torch()
    torch.manual_seed(0)
    heads, kv_heads = args.heads
    for n in args.size or SIZES:
        q, k, v = (
            torch.randn(n, h, args.dim, device="cuda").to(getattr(torch, args.dtype))
            for h in (heads, kv_heads, kv_heads)
        )
        for causal in (True, False):
            base = base_row("flash", "attention", "cuda") | {
                "input": f"{'causal' if causal else 'full'} {n}", "width": args.dim,
                "dtype": args.dtype, "heads": f"{heads}/{kv_heads}",
            }  # fmt: skip
            contenders = [*_peers(q, k, v, causal), *_ours(q, k, v, causal, args.tile)]
            work = 4.0 * n * n * heads * args.dim / (2 if causal else 1)
            yield from compare(base, contenders, check(q, k, v, causal), work)


def _ours(q: Any, k: Any, v: Any, causal: bool, tiles: list[list[int]]) -> Iterator[Contender]:
    torch = require_torch()
    lesson = runpy.run_path(str(LESSON), run_name="lesson")
    (_, heads, dim), kv_heads = q.shape, k.shape[1]
    dtype = str(q.dtype)[6:]
    program = lesson["attention"](heads // kv_heads, causal).typed(Q=dtype, K=dtype, V=dtype)
    sizes = heads, heads // kv_heads, dim
    names = [dict(zip(("rows", "warps", "keys", "stages"), t, strict=True)) for t in tiles]
    for choice in ({}, *names):
        kernel = program.schedule(lambda s, c=choice: lesson["tiles"](s, *sizes, **c)).build("cuda")
        out = torch.full_like(q, float("nan"))
        yield Contender(
            "tilewright" + "".join(f", {n} {name}" for name, n in choice.items()),
            lambda kernel=kernel, out=out: kernel(q, k, v, dim**-0.5, out=out),
            lambda y: y, is_ours=True, is_default=not choice,
        )  # fmt: skip


def _peers(q: Any, k: Any, v: Any, causal: bool) -> Iterator[Contender]:
    torch = require_torch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q4, k4, v4 = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return attend(q4, k4, v4, is_causal=causal, enable_gqa=True)

    backends = {
        "torch SDPA, FlashAttention-2": SDPBackend.FLASH_ATTENTION,
        "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in backends.items():
        yield Contender(name, lambda b=backend: run(b), lambda y: y[0].transpose(0, 1))


def check(q: Any, k: Any, v: Any, causal: bool) -> Callable[[Any], str]:
    """What is wrong with an output (m, heads, head_dim): elements away from float64."""
    import torch

    m, n, group = len(q), len(k), q.shape[1] // k.shape[1]
    expected = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    later = torch.arange(n, device=q.device) - n > torch.arange(m, device=q.device)[:, None] - m
    for h in range(q.shape[1]):  # a head at a time: m · n scores
        scores = (q[:, h].double() @ k[:, h // group].double().T) * q.shape[2] ** -0.5
        if causal:
            scores.masked_fill_(later, float("-inf"))
        expected[:, h] = torch.softmax(scores, 1) @ v[:, h // group].double()

    return lambda got: elements_beyond(got, expected, _TOLERANCE * (1 + expected.abs()))
