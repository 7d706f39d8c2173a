"""`python3 dev.py bench decode_variants`: decode rows that differ from plain decode in one thing.

Plain is `bench decode`'s: bfloat16, 32/8 heads × 128, pages of 16 in random order, one query of
each of 64 requests with 4096 keys; caches, graphs, rounds in turns and the time to read are those
of that suite. Each row has another page size, head_dim, group of query heads, mask or score, and
about as many bytes; its `ratio` is plain's time for each byte over its own, so 0.93 is 8 % slower.
Rows of 4 and 8 queries (16 requests) are compared with one query: 0.87 is 1.15 times the time.
Every result is compared with float64, whose masks and scores are written here again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tilewright as tw
from bench.decode import graph_of, read_us, replayed
from bench.harness import Row, base_row, note, or_inf, require_torch
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table

_COLD_BYTES, _BOUND = 256_000_000, 8e-3


@tw.variant
class Sink(tw.Causal):
    """A logit of each query head that takes weight and has no value."""

    logit = tw.per_head("float32")

    def sink(self, at: Any) -> Any:
        return self.logit[at.qo_head]


@dataclass(frozen=True)
class Kind:
    """A row: what differs from plain decode. `seen`: keys of a request that a query sees, when not
    all; `score`: (scores, head, distance to the key) → scores, for the oracle."""

    name: str
    requests: int = 64
    keys: int = 4096
    queries: int = 1
    page: int = 16
    head_dim: int = 128
    qo_heads: int = 32
    kv_heads: int = 8
    variant: Any = field(default_factory=tw.Causal)
    values: tuple[str, ...] = ()
    seen: int = 0
    cap: float = 0.0
    beside: str = "plain"

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that some query sees."""
        seen = min(self.keys, self.seen + self.queries - 1) if self.seen else self.keys
        return self.requests * seen * self.kv_heads * self.head_dim * 2 * 2


KINDS = (
    Kind("plain"),
    Kind("page 1", page=1), Kind("page 64", page=64), Kind("page 256", page=256),
    Kind("head_dim 64", requests=128, head_dim=64), Kind("head_dim 96", requests=85, head_dim=96),
    Kind("head_dim 256", requests=32, head_dim=256),
    Kind("group 1", qo_heads=8), Kind("group 2", qo_heads=16), Kind("group 8", qo_heads=64),
    Kind("group 16", qo_heads=128),
    Kind("softcap", variant=tw.Softcap(soft_cap=30.0), cap=30.0),
    Kind("window 1024 of 4096", variant=tw.SlidingWindow(window=1024), seen=1024,
         beside="64 x 1024"),
    Kind("64 x 1024", keys=1024),
    Kind("sink", variant=Sink(), values=("logit",)),
    Kind("alibi", variant=tw.Alibi(), values=("slopes",)),
    Kind("1 query", requests=16), Kind("4 queries", requests=16, queries=4, beside="1 query"),
    Kind("8 queries", requests=16, queries=8, beside="1 query"),
)  # fmt: skip


def decode_variants_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="*", help="names of rows (those beside them run too)")


def decode_variants(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernels, in microseconds a call; those that are compared are timed in turns."""
    chosen = [k for k in KINDS if not args.only or k.name in args.only]
    for base in dict.fromkeys(k.beside for k in chosen):
        group = [k for k in KINDS if k.name == base]
        group += [k for k in chosen if k.beside == base and k.name != base]
        times, facts = {}, {}
        for kind in group[1:]:  # in turns with the plain row, whose memory is made anew
            ours, theirs = Made(kind), Made(group[0])
            pair = replayed({k.kind.name: (k.graph, k.calls) for k in (ours, theirs)})
            times[kind.name] = pair[kind.name], pair[base]
            facts[kind.name] = ours.error(), read_us(ours.caches), ours.family
            del ours, theirs
        for kind in group[1:]:
            us, plain = times[kind.name]
            error, read, family = facts[kind.name]
            ratio = plain / group[0].nbytes * kind.nbytes / us
            if kind.queries > 1:
                ratio = plain / us
            row: Row = {
                "input": kind.name, "width": kind.qo_heads, "dtype": "bfloat16",
                "impl": "tilewright", "ms": us / 1e3, "metric": "us", "value": us, "ratio": ratio,
                "bytes": kind.nbytes, "read_us": read, "error": error, "peer": base,
                "peer_us": plain, "family": family,
            }  # fmt: skip
            note(f"{kind.name:22} read {read:7.1f} us, ours {us:7.1f}, {base} {plain:7.1f} us, "
                 f"{ratio:.3f} of it, {family}, error {error:.1e}")  # fmt: skip
            wrong = {"wrong": f"relative error {error:.2g}"} if not error <= _BOUND else {}
            yield row | base_row("decode_variants", "attention.decode", "cuda") | wrong


class Made:
    """Arrays and the graph of a kind."""

    def __init__(self, kind: Kind) -> None:
        torch = require_torch()
        torch.manual_seed(0)
        self.kind = kind
        pages = -(-kind.keys // kind.page)
        total = kind.requests * pages
        shape = (total, 2, kind.page, kind.kv_heads, kind.head_dim)
        count = 2 * kind.requests * kind.keys * kind.kv_heads * kind.head_dim * 2
        self.calls = max(2, -(-_COLD_BYTES // count))
        self.caches = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(self.calls)
        ]
        order = np.random.default_rng(1).permutation(total)
        arrays = (np.full(kind.requests, kind.keys), np.arange(kind.requests + 1) * pages, order)
        table = Table.csr(*(torch.from_numpy(x.astype(np.int32)).cuda() for x in arrays))
        self.pages = torch.from_numpy(order.reshape(kind.requests, pages)).cuda()
        attn = Attention(kind.qo_heads, kind.kv_heads, kind.head_dim, variant=kind.variant)
        rows = kind.requests * kind.queries
        shape = (self.calls, rows, kind.qo_heads, kind.head_dim)
        self.q = torch.randn(shape, device="cuda").bfloat16()
        self.values = {n: torch.rand(kind.qo_heads, device="cuda") for n in kind.values}
        kvs = [KV(table, Pool(c)) for c in self.caches]
        resolved = attn.resolve(kvs[0], qo_len=kind.queries, q_dtype=self.q.dtype)
        self.family = resolved.chosen
        if kind.queries == 1 and self.family == "decode":
            self.room: Any = attn.reserve(kind.requests)
            self.room.plan(table)
        else:
            rows = np.arange(kind.requests + 1) * kind.queries
            self.room = attn.plan(rows, kvs[0], q_dtype=self.q.dtype)
        self.bound = [
            attn.bind(self.q[i], kvs[i], plan=self.room, **self.values) for i in range(self.calls)
        ]
        calls: list[Callable[[], Any]] = [lambda b=b: b() for b in self.bound]
        self.graph = graph_of(calls)

    def error(self) -> float:
        """The largest relative error of the first and the last request, against float64."""
        torch = require_torch()
        kind, worst = self.kind, 0.0
        group = kind.qo_heads // kind.kv_heads
        for r in (0, kind.requests - 1):
            k, v = (
                self.caches[0][self.pages[r], j].reshape(-1, kind.kv_heads, kind.head_dim)
                for j in range(2)
            )
            k, v = (x[: kind.keys].double().repeat_interleave(group, 1) for x in (k, v))
            rows = slice(r * kind.queries, (r + 1) * kind.queries)
            s = torch.einsum("qhd,lhd->hql", self.q[0, rows].double(), k) * kind.head_dim**-0.5
            first = kind.keys - kind.queries
            at = torch.arange(first, kind.keys, device="cuda")[:, None]
            distance = torch.arange(kind.keys, device="cuda")[None] - at
            if kind.cap:
                s = kind.cap * (s / kind.cap).tanh()
            if "slopes" in self.values:
                s = s + self.values["slopes"].double()[:, None, None] * distance
            hidden = distance > 0
            if kind.seen:
                hidden |= distance <= -kind.seen
            s = s.masked_fill(hidden, float("-inf"))
            if "logit" in self.values:
                sink = self.values["logit"].double()[:, None, None].expand(-1, s.shape[1], 1)
                s = torch.cat([s, sink], 2)
            right = torch.einsum("hql,lhd->qhd", s.softmax(-1)[..., : kind.keys], v)
            difference = self.bound[0].state.o[rows].double() - right
            worst = max(worst, or_inf((difference.norm() / right.norm()).item()))
        return worst
