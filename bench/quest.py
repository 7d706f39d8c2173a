"""`python3 dev.py bench quest`: selection, plan and attention in one CUDA graph, in µs a step.

bfloat16, 32/8 heads × 128, pages of 16 in random order, one query a request; graphs, cold caches
and errors as `bench decode` has them. A step of ours computes the scores of Quest for all pages,
chooses some for each KV head, plans, and attends to those. Beside it: the decode kernel over all
keys of the same batch, plan included, and the parts of the step alone. `ratio`: the dense step's
time over ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import tilewright as tw
from bench.decode import HEAD_DIM, PAGE, graph_of, read_us, replayed
from bench.harness import Row, base_row, note, or_inf, require_torch

HEADS = (32, 8)
BATCHES = ((64, 32768, 2048), (16, 32768, 2048), (64, 8192, 1024))  # requests, keys, budget
_CALLS = 2  # caches in turns


@tw.select
def bounds(q: Any = tw.dense("r h g d"), ends: Any = tw.sparse("r p h e d")):  # noqa: ANN201
    """`ends`: the greatest and the least of a page's keys in each dimension."""
    r, h, p, g, e, d = tw.indices("r h p g e d")
    x = q[r, h, g, d]
    part = tw.where(tw.equal(e, 0), tw.maximum(x, 0.0), tw.minimum(x, 0.0))
    part = tw.temp.typed(q.dtype)[r, h, g, e, d](part)
    most = tw.sum(part[r, h, g, e, d] * ends[r, p, h, e, d], over=(e, d))
    return tw.out.typed("float32")[r, h, p](tw.max(most, over=g))


def quest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")


def quest(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our step, in microseconds."""
    for number, batch in enumerate(BATCHES):
        if not args.rows or number in args.rows:
            yield measured(*batch) | base_row("quest", "attention.select", "cuda")


def measured(requests: int, keys: int, budget: int) -> Row:
    """The row of a batch; `wrong` returns the fault of a result."""
    torch = require_torch()
    torch.manual_seed(0)
    qo_heads, kv_heads = HEADS
    width = keys // PAGE
    shape = (requests * width, 2, PAGE, kv_heads, HEAD_DIM)
    names = torch.randperm(shape[0], dtype=torch.int32, device="cuda").view(requests, width)
    table = tw.Table(torch.full((requests,), keys - 5, dtype=torch.int32, device="cuda"), names)
    attn = tw.Attention(qo_heads, kv_heads, HEAD_DIM)
    q = torch.randn(_CALLS, requests, qo_heads, HEAD_DIM, device="cuda").bfloat16()
    caches = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(_CALLS)]
    for part in (p for cache in caches for p in cache.view(-1).split(1 << 28)):
        part.normal_()
    kvs = [tw.KV(table, tw.Pool(cache)) for cache in caches]
    ends = [torch.stack((c[:, 0].amax(1), c[:, 0].amin(1)), 2) for c in caches]
    chosen = bounds(attn, kvs[0], pages=budget // PAGE)
    rooms = attn.reserve(requests), attn.reserve(requests)

    def choose(i: int) -> None:
        chosen.run(q=q[i].view(requests, kv_heads, -1, HEAD_DIM), ends=ends[i])

    def attend(i: int) -> Any:
        return attn.run(q[i], tw.KV(chosen.table, kvs[i].pool), rooms[0]).o

    def step(i: int) -> Any:
        choose(i)
        rooms[0].plan(chosen.table)
        return attend(i)

    def dense(i: int) -> Any:
        rooms[1].plan(table)
        return attn.run(q[i], kvs[i], rooms[1]).o

    error = error_of(step(0), chosen.table, q[0], caches[0])
    error = max(error, error_of(dense(0), table, q[0], caches[0]))
    parts = {"step": step, "dense": dense, "choose": choose, "attend": attend}
    graphs = {
        name: (graph_of([lambda i=i, f=f: f(i) for i in range(_CALLS)]), _CALLS)
        for name, f in parts.items()
    }
    times = replayed(graphs)
    us = times["step"]
    row: Row = {
        "input": f"{requests} x {keys}, budget {budget}", "width": qo_heads, "dtype": "bfloat16",
        "impl": "tilewright", "heads": f"{qo_heads}/{kv_heads}", "ms": us / 1e3, "metric": "us",
        "value": us, "ratio": times["dense"] / us, "peer": "tilewright, all keys",
        "peer_us": times["dense"], "choose_us": times["choose"], "attend_us": times["attend"],
        "read_us": read_us(caches), "of_dense": us / times["dense"], "error": error,
    }  # fmt: skip
    note(
        f"{row['input']:28} dense {times['dense']:7.1f} us, step {us:7.1f} us "
        f"({us / times['dense']:.3f}), choose {times['choose']:.1f}, attend {times['attend']:.1f}"
    )
    return row | ({"wrong": f"relative error {error:.2g}"} if not error <= 8e-3 else {})


def error_of(o: Any, table: tw.Table, q: Any, cache: Any) -> float:
    """The largest relative error of the first and the last request, against float64, over the pages
    that a table names."""
    entries, lengths = table.arrays["table_entries"], table.arrays["kv_len"]
    worst, kv_heads = 0.0, cache.shape[3]
    for r in (0, len(lengths) - 1):
        for head in range(kv_heads):
            own = entries[r, head] if entries.ndim == 3 else entries[r]
            n = int(lengths[r])
            k, v = (
                cache[own.long(), j, :, head].reshape(-1, HEAD_DIM)[:n].double() for j in range(2)
            )
            own_q = q[r].view(kv_heads, -1, HEAD_DIM)[head].double()
            right = ((own_q @ k.T) * HEAD_DIM**-0.5).softmax(-1) @ v
            difference = o[r].view(kv_heads, -1, HEAD_DIM)[head].double() - right
            worst = max(worst, or_inf((difference.norm() / right.norm()).item()))
    return worst
