"""`python3 dev.py bench attention`: attention beside its peers.

With `--target cuda`, where torch has a GPU the default: all rows of the suites `prefill` (dense,
ragged, paged, variants, append, mixed), `decode`, `decode_variants` and `cascade`, one after the
other, beside the peers that are named. With `--target cpp`: attention on the CPU beside torch's, in
milliseconds a call. 32 query heads over 8 KV heads of dimension 128. Ours reads a paged cache
(pages of 16, random order) as a server does; torch's `scaled_dot_product_attention` gets one dense,
contiguous batch, with `enable_gqa` and, as a second peer, with keys and values repeated for each
query head before the clock starts. Both sides use the same number of threads. A result is compared
with float64.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import Contender, Row, base_row, compare
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.errors import ArgumentError, MissingExtra
from tilewright.runtime import pool as threads

QO_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
DECODE = ((1, 512), (1, 4096), (4, 2048), (16, 512), (16, 2048))  # requests, keys of each
PREFILL = ((1, 128), (1, 512), (1, 2048), (4, 512))  # requests, queries and keys of each
SUITES_OF_A_GPU = ("prefill", "decode", "decode_variants", "cascade")
LIMITS = {"float32": 1e-5, "bfloat16": 8e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """One row: `queries` of each request are the last of its `keys`."""

    op: str
    dtype: str
    requests: int
    queries: int
    keys: int

    @property
    def flops(self) -> float:
        pairs = self.queries * (2 * self.keys - self.queries + 1) / 2
        return 4.0 * HEAD_DIM * QO_HEADS * pairs * self.requests


def attention_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=("cpp", "cuda"), help="default: cuda where it runs")
    parser.add_argument(
        "--peers", nargs="*", default=["all"], metavar="PEER",
        help="of a GPU's suites (default: all that can be imported)",
    )  # fmt: skip
    parser.add_argument("--op", choices=("decode", "prefill"), help="on the CPU; default: both")
    parser.add_argument("--dtype", choices=tuple(LIMITS), help="on the CPU; default: both")


def attention(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of both sides; the ratio is the best peer's time over ours."""
    if args.target == "cuda" or (args.target is None and _has_gpu()):
        yield from on_gpu(args.peers)
        return
    for case in cases():
        if args.op in (None, case.op) and args.dtype in (None, case.dtype):
            yield from measured(case)


def on_gpu(peers: list[str]) -> Iterator[Row]:
    """The rows of all suites of a GPU; each has those of the peers that it knows. Raises
    ArgumentError[A109] for a name that none of them knows."""
    modules = {name: importlib.import_module(f"bench.{name}") for name in SUITES_OF_A_GPU}
    known = {name: set(getattr(module, "PEERS", ())) for name, module in modules.items()}
    if unknown := set(peers) - {"all"}.union(*known.values()):
        hint = f"all, {', '.join(sorted(set().union(*known.values())))}"
        raise ArgumentError("A109", f"no peer {unknown.pop()}", where="--peers", hint=hint)
    for name, module in modules.items():
        parser = argparse.ArgumentParser()
        getattr(module, f"{name}_arguments")(parser)
        args = parser.parse_args([])
        if known[name]:
            args.peers = [peer for peer in peers if peer in {"all", *known[name]}]
        yield from getattr(module, name)(args)


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def cases() -> Iterator[Case]:
    for dtype in LIMITS:
        for requests, keys in DECODE:
            yield Case("decode", dtype, requests, 1, keys)
        for requests, keys in PREFILL:
            yield Case("prefill", dtype, requests, keys, keys)


def measured(case: Case) -> list[Row]:
    """The rows of a case. Raises MissingExtra[E101] without torch."""
    try:
        import torch
    except ImportError:
        raise MissingExtra(
            "E101", "the peer is torch", hint="pip install 'tilewright[torch]'"
        ) from None
    torch.set_num_threads(threads.wanted_threads())
    kind = getattr(torch, case.dtype)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(case.requests, case.queries, QO_HEADS, HEAD_DIM, generator=rng).to(kind)
    k, v = torch.randn(2, case.requests, case.keys, KV_HEADS, HEAD_DIM, generator=rng).to(kind)
    right = _oracle(q, k, v)

    def check(o: Any) -> str:
        error = float(np.linalg.norm(o - right) / np.linalg.norm(right))
        return "" if error <= LIMITS[case.dtype] else f"relative error {error:.2g}"

    base = base_row("attention", f"attention.{case.op}", "cpp") | {
        "input": f"{case.op} {case.requests} x {case.keys}", "width": HEAD_DIM,
        "dtype": case.dtype,
    }  # fmt: skip
    contenders = [*_peers(torch, case, q, k, v), _ours(torch, case, q, k, v)]
    return compare(base, contenders, check, case.flops)


def _peers(torch: Any, case: Case, q: Any, k: Any, v: Any) -> Iterator[Contender]:
    by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    repeated = [by_head[0], *(x.repeat_interleave(QO_HEADS // KV_HEADS, 1) for x in by_head[1:])]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    causal = case.queries > 1

    def to_host(o: Any) -> np.ndarray:
        return o.transpose(1, 2).double().numpy()

    yield Contender(
        "torch sdpa, gqa", lambda: sdpa(*by_head, is_causal=causal, enable_gqa=True), to_host
    )
    yield Contender("torch sdpa, repeated", lambda: sdpa(*repeated, is_causal=causal), to_host)


def _ours(torch: Any, case: Case, q: Any, k: Any, v: Any) -> Contender:
    pages = -(-case.keys // PAGE)
    order = torch.randperm(case.requests * pages, generator=torch.Generator().manual_seed(1))
    shape = (case.requests * pages, PAGE, KV_HEADS, HEAD_DIM)
    cache = torch.full((2, *shape), float("nan")).to(k.dtype)
    for part, x in zip(cache, (k, v), strict=True):
        padded = torch.full((case.requests, pages * PAGE, KV_HEADS, HEAD_DIM), float("nan"))
        padded[:, : case.keys] = x
        part[order] = padded.view(shape).to(k.dtype)
    table = Table(
        torch.full((case.requests,), case.keys, dtype=torch.int32),
        order.int().view(case.requests, pages),
    )
    attn = Attention(QO_HEADS, KV_HEADS, HEAD_DIM)
    kv = KV(table, Pool(cache[0], cache[1]))
    rows = q.view(-1, QO_HEADS, HEAD_DIM)
    plan = attn.plan(np.arange(case.requests + 1, dtype=np.int32) * case.queries, kv)
    run = attn.bind(rows, kv, plan=plan)

    def call() -> Any:
        run()
        return run.state.o

    return Contender("tilewright", call, lambda o: o.view(q.shape).double().numpy(), True, True)


def _oracle(q: Any, k: Any, v: Any) -> np.ndarray:
    """float64, (requests, queries, heads, head_dim); causal, the last query at the last key."""
    out = np.empty(q.shape)
    keys, queries = k.shape[1], q.shape[1]
    visible = np.arange(keys) <= np.arange(keys - queries, keys)[:, None]
    for r in range(q.shape[0]):
        for h in range(QO_HEADS):
            kv_head = h // (QO_HEADS // KV_HEADS)
            s = q[r, :, h].double().numpy() @ k[r, :, kv_head].double().numpy().T
            s = np.where(visible, s * HEAD_DIM**-0.5, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            out[r, :, h] = p @ v[r, :, kv_head].double().numpy() / p.sum(-1, keepdims=True)
    return out
