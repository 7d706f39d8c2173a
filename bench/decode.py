"""`python3 dev.py bench decode`: decode attention over a paged KV cache on a GPU, in µs a call.

bfloat16, head_dim 128, pages of 16 in random order, one query a request. Each row is a CUDA graph
of calls on caches of their own, so that the L2 is cold; beside it the time of a kernel that only
reads the same bytes: the floor. A result is compared with float64 before it counts. No peer is
measured here yet: the rows have no ratio.
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

HEAD_DIM, PAGE = 128, 16
HEADS = ((32, 8), (64, 8), (32, 32))
BATCHES = (  # requests, average length, distribution of lengths
    (1, 1024, "const"), (1, 32768, "const"), (16, 1024, "const"), (16, 1024, "uniform"),
    (16, 1024, "skew"), (64, 4096, "const"), (64, 4096, "skew"), (256, 1024, "const"),
    (256, 2048, "skew"),
)  # fmt: skip
_COLD_BYTES, _CALLS, _ROUNDS = 256_000_000, 16, 20


@dataclass(frozen=True, slots=True)
class Case:
    """One row: heads, and the keys of each request."""

    qo_heads: int
    kv_heads: int
    name: str
    lengths: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that a call must read."""
        return int(self.lengths.sum()) * self.kv_heads * HEAD_DIM * 2 * 2


def decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=24.0, help="GiB of keys and values in all")
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")


def decode(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel, in microseconds a call."""
    torch = require_torch()
    torch.manual_seed(0)
    memory = torch.empty(int(args.gib * 2**29), dtype=torch.bfloat16, device="cuda")
    for part in memory.split(1 << 28):
        part.normal_()
    for number, case in enumerate(cases()):
        if args.rows and number not in args.rows:
            continue
        yield measured(case, memory) | base_row("decode", "attention.decode", "cuda")


def cases() -> Iterator[Case]:
    """All rows; lengths are drawn from one generator in their order."""
    rng = np.random.default_rng(0)
    for qo_heads, kv_heads in HEADS:
        for requests, average, kind in BATCHES:
            if kv_heads == 32 and requests * average > 64 * 4096:
                continue
            lengths = _lengths(kind, requests, average, rng)
            yield Case(qo_heads, kv_heads, f"{requests} x {average} {kind}", lengths)


def _lengths(kind: str, requests: int, average: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "const":
        return np.full(requests, average)
    if kind == "uniform":
        return rng.integers(average // 2, average + 1, requests)
    drawn = np.minimum(rng.zipf(1.5, requests).astype(float), 200)
    return np.maximum(16, drawn / drawn.mean() * average).astype(int)


def measured(case: Case, memory: Any) -> Row:
    """The row of a case; `wrong` returns the fault of a result."""
    torch = require_torch()
    pages = -(-case.lengths // PAGE)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    total = int(indptr[-1])
    size = total * 2 * PAGE * case.kv_heads * HEAD_DIM
    pitch = -(-size // (1 << 20)) * (1 << 20)
    calls = max(1, min(max(_CALLS, -(-_COLD_BYTES // case.nbytes)), memory.numel() // pitch))
    caches = [
        memory[i * pitch : i * pitch + size].view(total, 2, PAGE, case.kv_heads, HEAD_DIM)
        for i in range(calls)
    ]
    table = [
        torch.from_numpy(x).cuda()
        for x in (
            indptr,
            np.random.default_rng(1).permutation(total).astype(np.int32),
            case.lengths.astype(np.int32),
        )
    ]
    attn = Attention(case.qo_heads, case.kv_heads, HEAD_DIM)
    shape = (calls, len(pages), case.qo_heads, HEAD_DIM)
    q = torch.randn(*shape, device="cuda").bfloat16()
    kvs = [KV(Table.csr(table[2], *table[:2]), Pool(c)) for c in caches]
    plan = attn.plan(np.arange(len(pages) + 1, dtype=np.int32), kvs[0])
    bound = [attn.bind(q[i], kvs[i], plan=plan) for i in range(calls)]
    us = _graph_us([b.launch.run for b in bound])
    error = _error(case, q[0], caches[0], bound[0].state.o, [t.cpu().numpy() for t in table])
    row: Row = {
        "input": case.name, "width": case.qo_heads, "dtype": "bfloat16", "impl": "tilewright",
        "heads": f"{case.qo_heads}/{case.kv_heads}", "ms": us / 1e3, "metric": "us", "value": us,
        "ratio": None, "bytes": case.nbytes, "read_us": _read_us(caches), "error": error,
    }  # fmt: skip
    note(f"{row['heads']:6} {row['input']:20} read {row['read_us']:8.2f} us, ours {us:8.2f} us")
    return row | ({"wrong": f"relative error {error:.2g}"} if error > 8e-3 else {})


def _graph_us(launches: list[Callable[[int], None]]) -> float:
    """Microseconds a launch, replayed from one graph: the median of rounds."""
    torch = require_torch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            launch(stream)
    times = []
    for turn in range(_ROUNDS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(600_000)  # the host is ahead: its time is not measured
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def _read_us(caches: list[Any]) -> float:
    """Microseconds to read the bytes of a cache once: the fastest of a few block sizes."""
    torch = require_torch()
    from bench.read_kernel import launcher

    out = torch.empty(1 << 22, dtype=torch.int32, device="cuda")
    words = [c.flatten().view(torch.int32) for c in caches]
    best = float("inf")
    for block, warps in ((2048, 4), (4096, 4), (8192, 8), (16384, 16)):
        if words[0].numel() % block:
            continue
        run = [launcher(w, out, block, warps) for w in words]
        run[0](0)  # Triton compiles at the first launch
        best = min(best, _graph_us(run))
    return best


def _error(case: Case, q: Any, cache: Any, o: Any, table: list[np.ndarray]) -> float:
    """The largest relative error of three requests, against float64."""
    torch = require_torch()
    indptr, indices, _ = table
    worst, group = 0.0, case.qo_heads // case.kv_heads
    for r in {0, len(case.lengths) - 1, int(np.argmax(case.lengths))}:
        rows = torch.from_numpy(indices[indptr[r] : indptr[r + 1]]).long().cuda()
        n = int(case.lengths[r])
        k, v = (cache[rows, j].reshape(-1, case.kv_heads, HEAD_DIM)[:n].double() for j in range(2))
        s = torch.einsum("hgd,lhd->hgl", q[r].double().view(-1, group, HEAD_DIM), k)
        right = torch.einsum("hgl,lhd->hgd", (s * HEAD_DIM**-0.5).softmax(-1), v)
        difference = o[r].double().view_as(right) - right
        worst = max(worst, (difference.norm() / right.norm()).item())
    return worst
