"""`python3 dev.py bench prefill`: prefill attention on a GPU, in TFLOP/s.

bfloat16, 32 query heads over 8 KV heads, 16 384 tokens in all in requests of equal length; keys
ragged, or in pages in random order. FLOPs are 4 · head_dim for each pair of query and key that the
mask keeps, so half the pairs where causal. Each run starts with a cold L2. A result is compared
with float64 before it counts. No peer is measured here yet: the rows have no ratio.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import Row, base_row, note, require_torch
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.variant import Causal, Full

TOKENS, QO_HEADS, KV_HEADS = 16384, 32, 8
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
VARIANTS = {"causal": Causal(), "full": Full()}
_ROUNDS, _FLUSH_BYTES = 15, 256 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One row; `page_size` 0: keys ragged."""

    variant: str
    head_dim: int
    length: int
    page_size: int = 0

    @property
    def flops(self) -> float:
        pairs = self.length * (self.length + 1) / 2 if self.variant == "causal" else self.length**2
        return 4.0 * self.head_dim * QO_HEADS * pairs * (TOKENS // self.length)

    @property
    def name(self) -> str:
        pages = f" page {self.page_size}" if self.page_size else ""
        return f"{self.variant} {self.length}{pages}"


def prefill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")


def cases() -> Iterator[Case]:
    for head_dim in (128, 64):
        for variant in VARIANTS:
            for length in LENGTHS:
                yield Case(variant, head_dim, length)
    for page_size in (16, 64, 1):
        for length in LENGTHS:
            yield Case("causal", 128, length, page_size)


def prefill(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel, in TFLOP/s: medians of three interleaved rounds."""
    chosen = [c for n, c in enumerate(cases()) if not args.rows or n in args.rows]
    torch = require_torch()
    torch.manual_seed(0)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    calls = {c: call(c) for c in chosen}
    errors = {c: _error(c, *calls[c]) for c in chosen}
    rounds = {c: [] for c in chosen}
    for _ in range(3):
        for c in chosen:
            rounds[c].append(_ms(calls[c][0], flush))
    for c in chosen:
        ms = statistics.median(rounds[c])
        row: Row = {
            "input": c.name, "width": c.head_dim, "dtype": "bfloat16", "impl": "tilewright",
            "heads": f"{QO_HEADS}/{KV_HEADS}", "ms": ms, "metric": "TFLOP/s",
            "value": c.flops / ms / 1e9, "ratio": None, "rounds": rounds[c], "error": errors[c],
        }  # fmt: skip
        note(f"{c.name:24} {c.head_dim:4} {ms:8.3f} ms {row['value']:7.1f} TFLOP/s")
        wrong = {"wrong": f"relative error {errors[c]:.2g}"} if not errors[c] < 8e-3 else {}
        yield row | wrong | base_row("prefill", "attention.prefill", "cuda")


def call(case: Case) -> tuple[Any, Any, Any, Any]:
    """A bound call, q, and keys and values in the order of the tokens."""
    torch = require_torch()
    attn = Attention(QO_HEADS, KV_HEADS, case.head_dim, VARIANTS[case.variant])
    shape = (TOKENS, KV_HEADS, case.head_dim)
    q = torch.randn(TOKENS, QO_HEADS, case.head_dim, device="cuda").bfloat16()
    k, v = (torch.randn(*shape, device="cuda").bfloat16() for _ in "kv")
    indptr = np.arange(0, TOKENS + 1, case.length, dtype=np.int32)
    if case.page_size:
        pages = TOKENS // case.page_size
        names = torch.randperm(pages, device="cuda")
        paged = [
            torch.empty(pages, case.page_size, *shape[1:], device="cuda").bfloat16() for _ in "kv"
        ]
        for to, x in zip(paged, (k, v), strict=True):
            to[names] = x.view(to.shape)
        lengths = torch.full((len(indptr) - 1,), case.length, dtype=torch.int32, device="cuda")
        table = Table(lengths, names.int().view(len(indptr) - 1, -1))
        kv = KV(table, Pool(*paged))
    else:
        kv = KV(Table.ragged(torch.from_numpy(indptr).cuda()), Pool(k, v))
    out = torch.empty_like(q)
    return attn.bind(q, kv, out, plan=attn.plan(indptr, kv)), q, k, v


def _ms(bound: Any, flush: Any) -> float:
    torch = require_torch()
    times = []
    for turn in range(_ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        bound()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _error(case: Case, bound: Any, q: Any, k: Any, v: Any) -> float:
    """The largest relative error of a few rows of the first and the last request, in float64."""
    torch = require_torch()
    bound.state.o.fill_(float("nan"))
    o = bound().o
    worst, group = 0.0, QO_HEADS // KV_HEADS
    for begin in (0, TOKENS - case.length):
        rows = slice(begin, begin + case.length)
        for head in (0, QO_HEADS - 1):
            keys, values = (x[rows, head // group].double() for x in (k, v))
            at = torch.tensor([0, 1, case.length // 2, case.length - 1], device="cuda")
            s = q[rows][at, head].double() @ keys.T * case.head_dim**-0.5
            if case.variant == "causal":
                s = s.masked_fill(
                    torch.arange(case.length, device="cuda") > at[:, None], -torch.inf
                )
            right = s.softmax(-1) @ values
            difference = o[rows][at, head].double() - right
            worst = max(worst, (difference.norm(dim=-1) / right.norm(dim=-1)).max().item())
    return worst
