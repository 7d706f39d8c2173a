"""`python3 dev.py bench cascade`: decode attention of requests that share a prefix, in µs a call.

bfloat16, 32/8 heads × 128, pages of 16 in random order, one query a request; graphs, cold caches
and errors as `bench decode` has them. Beside ours over the shared keys: ours over a flat table, in
which each request names the pages of the prefix again, and FlashAttention-3 over that, where it can
be imported. `read_us`: the bytes of the prefix once and of the suffixes, read once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from bench.decode import HEAD_DIM, PAGE, Case, error_of, graph_of, read_us, replayed
from bench.decode_peers import Batch, flash_attention_3
from bench.harness import Row, base_row, note, require_torch
from tilewright.attention.batch import Attention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table

HEADS = (32, 8)
BATCHES = ((16, 2048, 256), (64, 8192, 256), (256, 8192, 256), (64, 32768, 512))
_COLD_BYTES = 200_000_000


def cascade_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")
    parser.add_argument(
        "--batch", type=int, nargs=3, action="append", help="requests prefix suffix"
    )


def cascade(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel over shared keys, in microseconds a call."""
    batches = args.batch or [b for n, b in enumerate(BATCHES) if not args.rows or n in args.rows]
    for batch in batches:
        yield measured(*batch) | base_row("cascade", "attention.cascade", "cuda")


def measured(requests: int, prefix: int, suffix: int) -> Row:
    """The row of a batch; `wrong` returns the fault of a result."""
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
    attn = Attention(qo_heads, kv_heads, HEAD_DIM)
    q = torch.randn(calls, requests, qo_heads, HEAD_DIM, device="cuda").bfloat16()
    graphs, outputs, plans, kept = {}, {}, {}, []  # what graphs use stays alive
    for impl, table in tables.items():
        room = attn.reserve(requests, shared=table.form.shared)
        room.plan(table)
        bound = [attn.bind(q[i], KV(table, Pool(c)), plan=room) for i, c in enumerate(caches)]
        graphs[impl] = graph_of([lambda b=b: b() for b in bound]), calls
        outputs[impl] = bound[0].state.o
        kept += [room, bound]
        plans[impl] = graph_of([lambda r=room, t=table: r.plan(t)] * 32), 32
    for impl, call in flash_attention_3(Batch(HEADS, PAGE, q, caches, flat)):
        outputs[impl] = call(0)
        kept.append(call)
        graphs[impl] = graph_of([lambda i=i, call=call: call(i) for i in range(calls)]), calls
    times, plan = replayed(graphs), replayed(plans)["tilewright"]
    host = [t.cpu().numpy() for t in flat]
    error = {n: error_of(case, q[0], caches[0], o, host) for n, o in outputs.items()}
    right = {n: us for n, us in times.items() if error[n] <= 8e-3 and n != "tilewright"}
    best = min(right, key=right.__getitem__) if right else ""
    us = times["tilewright"]
    row: Row = {
        "input": name, "width": qo_heads, "dtype": "bfloat16", "impl": "tilewright",
        "heads": f"{qo_heads}/{kv_heads}", "ms": us / 1e3, "metric": "us", "value": us,
        "ratio": right[best] / us if best else None, "bytes": size * 2,
        "read_us": read_us(caches), "plan_us": plan, "error": error["tilewright"],
        "peer": best, "peer_us": right.get(best), "peers_us": right,
    }  # fmt: skip
    beside = ", ".join(f"{n} {t:.1f} us" for n, t in right.items())
    note(
        f"{name:22} read {row['read_us']:7.1f} us, ours {us:7.1f} us, plan {plan:.1f} us, {beside}"
    )
    wrong = not error["tilewright"] <= 8e-3
    return row | ({"wrong": f"relative error {error['tilewright']:.2g}"} if wrong else {})
