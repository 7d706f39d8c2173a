"""`python3 dev.py bench cascade`: decode attention of requests that share a prefix, in µs a call.

bfloat16, 32/8 heads × 128, pages of 16 in random order, one query a request; graphs, cold caches
and errors as `bench decode` has them. Beside ours over the shared keys: ours over a flat table, in
which each request names the pages of the prefix again, and FlashAttention-3 over that, where it can
be imported. `read_us`: the bytes of the prefix once and of the suffixes, read once. `--random N`:
the regret of the plan's choice over random batches, its time over the best of what it chooses from
(shared keys read by a launch in front, or walked by their requests) and of the flat table; and that
of a server, which has recorded both tables and takes the flat one where sharing does not pay.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.decode import HEAD_DIM, PAGE, Case, error_of, graph_of, read_us, replayed
from bench.decode_peers import Batch as Peers
from bench.decode_peers import flash_attention_3
from bench.harness import Row, base_row, note, require_torch
from tilewright.attention import planner, ranges
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.serve.cascade import group

HEADS = (32, 8)
BATCHES = ((16, 2048, 256), (64, 8192, 256), (256, 8192, 256), (64, 32768, 512))
_COLD_BYTES = 200_000_000


def cascade_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")
    parser.add_argument(
        "--batch", type=int, nargs=3, action="append", help="requests prefix suffix"
    )
    parser.add_argument("--random", type=int, default=0, help="random batches: regret of choices")


def cascade(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel over shared keys, in microseconds a call."""
    if args.random:
        yield regret(args.random) | base_row("cascade", "attention.cascade", "cuda")
        return
    batches = args.batch or [b for n, b in enumerate(BATCHES) if not args.rows or n in args.rows]
    for batch in batches:
        yield measured(*batch) | base_row("cascade", "attention.cascade", "cuda")


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests that share a prefix, over caches of their own for each call, so that the L2 is cold.

    `tables`: with shared keys and flat; `flat`: indptr, pages, lengths of the flat table."""

    case: Case
    nbytes: int
    caches: list[Any]
    flat: list[Any]
    tables: dict[str, Table]
    q: Any

    def graph(self, table: Table, kept: list[Any]) -> tuple[tuple[Any, int], Any, Any]:
        """A graph of a call over each cache, the first one's o, and the plan's graph. What they use
        is added to `kept`."""
        attn = Attention(*HEADS, HEAD_DIM)
        room = attn.reserve(len(self.case.lengths), shared=table.form.shared)
        room.plan(table)
        kvs = [KV(table, Pool(c)) for c in self.caches]
        bound = [attn.bind(self.q[i], kv, plan=room) for i, kv in enumerate(kvs)]
        kept += [room, bound]
        graph = graph_of([lambda b=b: b() for b in bound]), len(bound)
        return graph, bound[0].state.o, (graph_of([lambda: room.plan(table)] * 32), 32)


def batch_of(requests: int, prefix: int, suffix: int) -> Batch:
    """Random caches of `requests` with `prefix` shared keys and `suffix` of their own each."""
    torch = require_torch()
    torch.manual_seed(0)
    qo_heads, kv_heads = HEADS
    own = -(-suffix // PAGE)
    shared_pages = prefix // PAGE
    total = shared_pages + requests * own
    name = f"{requests} x ({prefix} + {suffix})"
    case = Case(qo_heads, kv_heads, name, np.full(requests, prefix + suffix))
    size = total * 2 * PAGE * kv_heads * HEAD_DIM
    calls = max(2, -(-_COLD_BYTES // (2 * size)))
    caches = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16).view(
            total, 2, PAGE, kv_heads, HEAD_DIM
        )
        for _ in range(calls)
    ]
    pages = np.random.default_rng(1).permutation(total).astype(np.int32)
    first, rest = pages[:shared_pages], pages[shared_pages:].reshape(requests, own)
    flat_pages = np.concatenate([np.tile(first, (requests, 1)), rest], 1)
    flat = [
        torch.from_numpy(x.astype(np.int32)).cuda()
        for x in (np.arange(requests + 1) * flat_pages.shape[1], flat_pages.ravel(), case.lengths)
    ]
    node_len = np.array([prefix, *[suffix] * requests], np.int32)
    node_indptr = np.concatenate([[0], np.cumsum(-(-node_len // PAGE))]).astype(np.int32)
    nodes = [torch.from_numpy(x).cuda() for x in (node_len, node_indptr, pages)]
    level = torch.tensor([0, requests], dtype=torch.int32, device="cuda")
    tables = {
        "tilewright": Table.csr(*nodes, shared=[level]),
        "tilewright, flat": Table.csr(flat[2], *flat[:2]),
    }
    q = torch.randn(calls, requests, qo_heads, HEAD_DIM, device="cuda").bfloat16()
    return Batch(case, size * 2, caches, flat, tables, q)


def measured(requests: int, prefix: int, suffix: int) -> Row:
    """The row of a batch; `wrong` returns the fault of a result."""
    batch = batch_of(requests, prefix, suffix)
    case, caches, q = batch.case, batch.caches, batch.q
    graphs, outputs, plans, kept = {}, {}, {}, []  # what graphs use stays alive
    for impl, table in batch.tables.items():
        graphs[impl], outputs[impl], plans[impl] = batch.graph(table, kept)
    for impl, call in flash_attention_3(Peers(HEADS, PAGE, q, caches, batch.flat)):
        outputs[impl] = call(0)
        kept.append(call)
        graphs[impl] = graph_of([lambda i=i, call=call: call(i) for i in range(len(q))]), len(q)
    times, plan = replayed(graphs), replayed(plans)["tilewright"]
    host = [t.cpu().numpy() for t in batch.flat]
    error = {n: error_of(case, q[0], caches[0], o, host) for n, o in outputs.items()}
    right = {n: us for n, us in times.items() if error[n] <= 8e-3 and n != "tilewright"}
    best = min(right, key=right.__getitem__) if right else ""
    us, name = times["tilewright"], case.name
    row: Row = {
        "input": name, "width": HEADS[0], "dtype": "bfloat16", "impl": "tilewright",
        "heads": "{}/{}".format(*HEADS), "ms": us / 1e3, "metric": "us", "value": us,
        "ratio": right[best] / us if best else None, "bytes": batch.nbytes,
        "read_us": read_us(caches), "plan_us": plan, "error": error["tilewright"],
        "peer": best, "peer_us": right.get(best), "peers_us": right,
    }  # fmt: skip
    beside = ", ".join(f"{n} {t:.1f} us" for n, t in right.items())
    note(
        f"{name:22} read {row['read_us']:7.1f} us, ours {us:7.1f} us, plan {plan:.1f} us, {beside}"
    )
    wrong = not error["tilewright"] <= 8e-3
    return row | ({"wrong": f"relative error {error['tilewright']:.2g}"} if wrong else {})


def regret(count: int) -> Row:
    """Over random batches, the chosen plan's time over the best of three: the shared keys read by a
    launch in front, walked by their requests, or a flat table. The value is the 90th percentile;
    `served`: the same of a server's choice between the plan and the flat table."""
    rng, over, served = np.random.default_rng(11), [], []
    costs = {"chosen": ranges.APART_COST, "in front": -(1 << 30), "walked": 1 << 30}
    for _ in range(count):
        requests, prefix, suffix = (2 ** rng.uniform(*x) for x in ((1, 8), (7, 14), (4, 9)))
        batch = batch_of(int(requests), PAGE * int(prefix / PAGE), int(suffix))
        graphs, kept = {}, []
        for name, cost in costs.items():
            ranges.APART_COST = cost
            planner.body.cache_clear()
            try:
                graphs[name] = batch.graph(batch.tables["tilewright"], kept)[0]
            finally:
                ranges.APART_COST = costs["chosen"]
        graphs["flat"] = batch.graph(batch.tables["tilewright, flat"], kept)[0]
        planner.body.cache_clear()
        times = replayed(graphs)
        over.append(times["chosen"] / min(times.values()) - 1)
        form = "chosen" if pays(int(requests), int(prefix / PAGE)) else "flat"
        served.append(times[form] / min(times.values()) - 1)
        beside = ", ".join(f"{n} {t:.1f}" for n, t in times.items())
        note(f"{batch.case.name:22} {beside} us: {over[-1]:.1%}")
    return {
        "input": f"{count} random batches", "width": 0, "dtype": "bfloat16", "impl": "tilewright",
        "ms": None, "metric": "p90 regret of the plan's choice", "ratio": None,
        "value": float(np.quantile(over, 0.9)), "mean": float(np.mean(over)),
        "worst": float(np.max(over)), "served": float(np.quantile(served, 0.9)),
    }  # fmt: skip


def pays(requests: int, pages: int) -> bool:
    """Whether a server shares so many full pages of as many requests."""
    page_bytes = 2 * PAGE * HEADS[1] * HEAD_DIM * 2
    return bool(group([[*range(pages)]] * requests, [pages] * requests, page_bytes).nodes)
