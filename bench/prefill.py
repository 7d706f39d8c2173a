"""`python3 dev.py bench prefill`: prefill and append attention on a GPU, in TFLOP/s.

bfloat16, 32 query heads over 8 KV heads. Prefill: 16 384 tokens in all, in requests of one length
or of many; keys ragged, or in pages in random order. Append: a few new tokens of each of 16
requests over a long paged cache. FLOPs are 2 · (head_dim + head_dim_vo) for each pair of query and
key that the mask keeps, so half the pairs where causal. Each run starts with a cold L2; a row's
implementations run in turns. A result is compared with float64 before it counts. Peer:
FlashAttention-3 (package tokenspeed-fa3) where it can be imported: its dense, its ragged and its
paged form, of which the fastest counts. Others are not measured here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import Row, base_row, note, require_torch
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.variant import Causal, Full, SlidingWindow

TOKENS, QO_HEADS, KV_HEADS, WINDOW = 16384, 32, 8, 1024
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
VARIANTS = {"causal": Causal(), "full": Full(), "window": SlidingWindow(window=WINDOW)}
_ROUNDS, _TURNS, _FLUSH_BYTES = 3, 7, 256 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One row: queries and keys of each request; `page_size` 0: keys ragged."""

    name: str
    variant: str
    head_dim: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    page_size: int = 0
    head_dim_vo: int = 0

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim_vo or self.head_dim

    @property
    def flops(self) -> float:
        return 2.0 * sum(self.dims) * QO_HEADS * sum(map(self.pairs, self.queries, self.keys))

    def pairs(self, queries: int, keys: int) -> int:
        """Pairs that the mask keeps in a request."""
        if self.variant == "full":
            return queries * keys
        last = np.arange(keys - queries + 1, keys + 1)  # keys up to each query's own
        return int((np.minimum(last, WINDOW) if self.variant == "window" else last).sum())


def prefill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")


def even(variant: str, head_dim: int, length: int, page_size: int = 0, dim_vo: int = 0) -> Case:
    """Requests of one length, 16 384 tokens in all."""
    lengths = (length,) * (TOKENS // length)
    pages = f" page {page_size}" if page_size else ""
    name = f"{variant} {length}{pages}"
    return Case(name, variant, head_dim, lengths, lengths, page_size, dim_vo)


def uneven(kind: str) -> tuple[int, ...]:
    """Lengths of requests, 16 384 tokens in all: uniform in 1 … 4096; Zipf with exponent 1.5, times
    64; or prompts as the Azure conversation trace of 2023 has them (half below 1020, a tenth above
    3000, none above 4300), drawn from a lognormal law."""
    rng, drawn = np.random.default_rng(0), []
    while sum(drawn) < TOKENS:
        if kind == "uniform":
            drawn.append(int(rng.integers(1, 4097)))
        elif kind == "zipf":
            drawn.append(64 * min(int(rng.zipf(1.5)), 128))
        else:
            drawn.append(min(int(np.exp(rng.normal(6.6, 1.1))) + 1, 4300))
    drawn[-1] -= sum(drawn) - TOKENS
    return tuple(drawn)


def cases() -> Iterator[Case]:
    for head_dim in (128, 64):
        for variant in ("causal", "full"):
            for length in LENGTHS:
                yield even(variant, head_dim, length)
    for page_size in (16, 64, 1):
        for length in LENGTHS:
            yield even("causal", 128, length, page_size)
    for kind in ("uniform", "zipf", "trace"):
        yield Case(f"causal {kind}", "causal", 128, uneven(kind), uneven(kind))
    for length in (1024, 4096):
        yield even("causal", 96, length)
        yield even("causal", 256, length)
        yield even("causal", 192, length, dim_vo=128)
    yield even("window", 128, 4096)
    for keys in (4096, 32768):
        for new in (16, 64, 256):
            name = f"append {new} on {keys}"
            yield Case(name, "causal", 128, (new,) * 16, (keys,) * 16, 16)
    yield Case("append 64 on 32768, one request", "causal", 128, (64,), (32768,), 16)


def prefill(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel beside the peers, in TFLOP/s: medians of three interleaved rounds."""
    torch = require_torch()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for number, case in enumerate(cases()):
        if args.rows and number not in args.rows:
            continue
        yield measured(case, flush) | base_row("prefill", "attention.prefill", "cuda")


def measured(case: Case, flush: Any) -> Row:
    """The row of a case; `wrong` returns the fault of our result."""
    torch = require_torch()
    torch.manual_seed(0)
    batch = Batch(case)
    calls = {"tilewright": batch.ours(), **dict(batch.flash_attention_3())}
    error = {name: batch.error(call) for name, call in calls.items()}
    rounds = _rounds(calls, flush)
    times = {name: statistics.median(ms) for name, ms in rounds.items()}
    peers = {n: ms for n, ms in times.items() if n != "tilewright" and error[n] < 8e-3}
    best = min(peers, key=peers.__getitem__) if peers else ""
    ms = times["tilewright"]
    row: Row = {
        "input": case.name, "width": case.head_dim, "dtype": "bfloat16", "impl": "tilewright",
        "heads": f"{QO_HEADS}/{KV_HEADS}", "ms": ms, "metric": "TFLOP/s",
        "value": case.flops / ms / 1e9, "ratio": peers[best] / ms if best else None,
        "rounds": rounds["tilewright"], "error": error["tilewright"],
        "peer": best, "peers_ms": peers,
    }  # fmt: skip
    beside = f", {best} {case.flops / peers[best] / 1e9:6.1f} ({row['ratio']:.2f})" if best else ""
    note(f"{case.name:32} {case.head_dim:4} {ms:8.4f} ms {row['value']:7.1f} TFLOP/s{beside}")
    wrong = not error["tilewright"] < 8e-3
    return row | ({"wrong": f"relative error {error['tilewright']:.2g}"} if wrong else {})


class Batch:
    """Random queries, keys and values of a case: one request after the other, and in pages."""

    def __init__(self, case: Case) -> None:
        torch = require_torch()
        self.case = case
        self.qo_indptr, self.kv_indptr = (
            np.cumsum([0, *lengths]).astype(np.int32) for lengths in (case.queries, case.keys)
        )
        tokens, keys = int(self.qo_indptr[-1]), int(self.kv_indptr[-1])

        def drawn(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.q = drawn(tokens, QO_HEADS, case.head_dim)
        self.k, self.v = (drawn(keys, KV_HEADS, dim) for dim in case.dims)
        if case.page_size:  # lengths are multiples of it
            self.names = torch.randperm(keys // case.page_size, device="cuda").int()
            self.pages = []
            for x in (self.k, self.v):
                paged = torch.empty_like(x).view(-1, case.page_size, *x.shape[1:])
                paged[self.names.long()] = x.view(paged.shape)
                self.pages.append(paged)

    def ours(self) -> Callable[[], Any]:
        torch, case = require_torch(), self.case
        attn = Attention(
            QO_HEADS, KV_HEADS, case.head_dim, VARIANTS[case.variant], head_dim_vo=case.dims[1]
        )
        if case.page_size:
            kv = KV(Table(self.lengths(), self.block_table()), Pool(*self.pages))
        else:
            indptr = torch.from_numpy(self.kv_indptr).cuda()
            kv = KV(Table.ragged(indptr), Pool(self.k, self.v))
        out = torch.full((*self.q.shape[:2], case.dims[1]), torch.nan, device="cuda")
        plan = attn.plan(self.qo_indptr, kv)
        bound = attn.bind(self.q, kv, out.bfloat16(), plan=plan)
        return lambda: bound().o

    def lengths(self) -> Any:
        return require_torch().tensor(self.case.keys, dtype=require_torch().int32, device="cuda")

    def block_table(self) -> Any:
        return self.names.view(len(self.case.keys), -1)

    def flash_attention_3(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Calls of FlashAttention-3 in each of its forms that takes the case; none where it is not
        installed."""
        torch, case = require_torch(), self.case
        try:
            import flash_attn_interface as fa
        except ImportError:
            return
        how: dict[str, Any] = {"causal": case.variant != "full"}
        if case.variant == "window":
            how["window_size"] = (WINDOW - 1, 0)
        requests, is_even = len(case.queries), len(set(case.queries)) == 1
        q, k, v = (
            x.view(requests, -1, *x.shape[1:]) if is_even else x for x in (self.q, self.k, self.v)
        )
        if case.page_size:
            lengths, table = self.lengths(), self.block_table()
            for splits in (0, 1):
                yield f"fa3 paged, splits {splits or 'auto'}", lambda splits=splits: _first(
                    fa.flash_attn_with_kvcache(
                        q, *self.pages, cache_seqlens=lengths, page_table=table,
                        num_splits=splits, **how,
                    )
                )  # fmt: skip
            return
        if is_even:
            yield "fa3", lambda: _first(fa.flash_attn_func(q, k, v, **how))
        indptr = torch.from_numpy(self.qo_indptr).cuda()
        longest = max(case.queries)
        yield (
            "fa3 varlen",
            lambda: _first(
                fa.flash_attn_varlen_func(
                    self.q, self.k, self.v, indptr, indptr, longest, longest, **how
                )
            ),
        )

    def error(self, call: Callable[[], Any]) -> float:
        """The largest relative error of a few rows of the first, the last and the longest request,
        in float64; inf where the call fails."""
        torch, case = require_torch(), self.case
        o = call().reshape(len(self.q), QO_HEADS, case.dims[1])
        worst, group = 0.0, QO_HEADS // KV_HEADS
        for r in {0, len(case.queries) - 1, int(np.argmax(case.queries))}:
            rows, keys = (slice(x[r], x[r + 1]) for x in (self.qo_indptr, self.kv_indptr))
            n, m = case.queries[r], case.keys[r]
            at = torch.tensor([0, n // 3, n // 2, n - 1], device="cuda")
            last = at + (m - n)
            key = torch.arange(m, device="cuda")
            for head in (0, QO_HEADS - 1):
                k, v = (x[keys, head // group].double() for x in (self.k, self.v))
                s = self.q[rows][at, head].double() @ k.T * case.head_dim**-0.5
                if case.variant != "full":
                    s = s.masked_fill(key > last[:, None], -torch.inf)
                if case.variant == "window":
                    s = s.masked_fill(key <= last[:, None] - WINDOW, -torch.inf)
                right = s.softmax(-1) @ v
                difference = o[rows][at, head].double() - right
                worst = max(worst, (difference.norm(dim=-1) / right.norm(dim=-1)).max().item())
        return worst


def _first(o: Any) -> Any:
    return o[0] if isinstance(o, tuple) else o


def _rounds(calls: dict[str, Callable[[], Any]], flush: Any) -> dict[str, list[float]]:
    """Milliseconds of each call: the medians of three rounds, in which all take turns."""
    torch = require_torch()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(_TURNS + 1):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                torch.cuda._sleep(600_000)  # the host is ahead: its time is not measured
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                if turn:
                    times[name].append(begin.elapsed_time(end))
        for name, ms in times.items():
            found[name].append(statistics.median(ms))
    return found
