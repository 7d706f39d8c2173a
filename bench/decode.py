"""`python3 dev.py bench decode`: decode attention over a paged KV cache on a GPU, in µs a call.

bfloat16, head_dim 128, pages of 16 in random order, one query a request. Each implementation is a
CUDA graph of calls on caches of their own, so that the L2 is cold; the graphs of a row are replayed
in turns. Beside them the time of a kernel that only reads the same bytes: the floor. Results are
compared with float64 before they count. Ours runs on a workspace, as a server would; its plan is a
kernel of its own, measured alone. Peers, where they can be imported, each in several configurations
of which the fastest right one counts (bench/decode_peers.py): FlashAttention-3, FlashInfer's decode
wrapper and BatchAttention, XQA and cuDNN. A ratio is one against the peers that a row names in
`peers_us`; those that did not run are named on the terminal.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.decode_peers import HND, PEERS, Batch, calls_of, seen_as
from bench.harness import Row, base_row, note, or_inf, require_torch
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
TOLERANCE = 8e-3  # of the relative error


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
    parser.add_argument(
        "--peers", nargs="*", choices=("all", *PEERS), default=["all"],
        help="default: all that can be imported",
    )  # fmt: skip
    parser.add_argument("--random", type=int, default=0, help="random batches, beside predictions")


def decode(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel, in microseconds a call."""
    torch = require_torch()
    torch.manual_seed(0)
    memory = torch.empty(int(args.gib * 2**29), dtype=torch.bfloat16, device="cuda")
    for part in memory.split(1 << 28):
        part.normal_()
    if args.random:
        yield predicted(args.random, memory) | base_row("decode", "attention.decode", "cuda")
        return
    peers = tuple(PEERS) if "all" in args.peers else tuple(args.peers)
    for number, case in enumerate(cases()):
        if args.rows and number not in args.rows:
            continue
        yield measured(case, memory, peers) | base_row("decode", "attention.decode", "cuda")


def cases() -> Iterator[Case]:
    """All rows; lengths are drawn from one generator in their order."""
    rng = np.random.default_rng(0)
    for qo_heads, kv_heads in HEADS:
        for requests, average, kind in BATCHES:
            if kv_heads == 32 and requests * average > 64 * 4096:
                continue
            lengths = _lengths(kind, requests, average, rng)
            yield Case(qo_heads, kv_heads, f"{requests} x {average} {kind}", lengths)


def random_case(rng: np.random.Generator) -> Case:
    """A batch of 1 … 256 requests of 128 … 32768 keys on average, at most 8 GiB."""
    qo_heads, kv_heads = ((32, 8), (64, 8), (32, 32), (16, 2), (8, 4))[rng.integers(5)]
    requests, average = int(2 ** rng.uniform(0, 8)), int(2 ** rng.uniform(7, 15))
    while requests * average * kv_heads > 256 * 2048 * 8:
        average //= 2
    kind = ("const", "uniform", "skew")[rng.integers(3)]
    lengths = _lengths(kind, requests, max(average, 16), rng)
    return Case(qo_heads, kv_heads, f"{requests} x {average} {kind}", lengths)


def predicted(count: int, memory: Any) -> Row:
    """The error of `plan.report()` over random batches; the value is its 90th percentile."""
    torch = require_torch()
    rng, errors = np.random.default_rng(7), []
    while len(errors) < count:
        case = random_case(rng)
        pages = -(-case.lengths // PAGE)
        total = int(pages.sum())
        size = total * 2 * PAGE * case.kv_heads * HEAD_DIM
        calls = max(2, min(_CALLS // 2, memory.numel() // size))
        if size * calls > memory.numel():
            continue
        shape = (total, 2, PAGE, case.kv_heads, HEAD_DIM)
        caches = [memory[i * size : (i + 1) * size].view(shape) for i in range(calls)]
        indptr = np.concatenate([[0], np.cumsum(pages)])
        arrays = (case.lengths, indptr, np.random.default_rng(1).permutation(total))
        table = Table.csr(*(torch.from_numpy(x.astype(np.int32)).cuda() for x in arrays))
        attn = Attention(case.qo_heads, case.kv_heads, HEAD_DIM)
        requests = len(pages)
        q = torch.randn(calls, requests, case.qo_heads, HEAD_DIM, device="cuda").bfloat16()
        plan = attn.plan(np.arange(requests + 1), KV(table, Pool(caches[0])))
        bound = [attn.bind(q[i], KV(table, Pool(c)), plan=plan) for i, c in enumerate(caches)]
        graph = graph_of([lambda b=b: b() for b in bound])
        us, guess = replayed({"": (graph, calls)})[""], plan.report().microseconds
        if guess is None:
            raise SystemExit(f"no costs are known of {torch.cuda.get_device_name()}")
        errors.append(guess / us - 1)
        note(f"{case.qo_heads}/{case.kv_heads} {case.name:20} {us:8.1f} us, predicted {guess:8.1f}")
    size = np.abs(errors)
    return {
        "input": f"{count} random batches", "width": 0, "dtype": "bfloat16", "impl": "tilewright",
        "ms": None, "metric": "p90 error of the predicted time", "ratio": None,
        "value": float(np.quantile(size, 0.9)), "mean": float(size.mean()),
    }  # fmt: skip


def _lengths(kind: str, requests: int, average: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "const":
        return np.full(requests, average)
    if kind == "uniform":
        return rng.integers(average // 2, average + 1, requests)
    drawn = np.minimum(rng.zipf(1.5, requests).astype(float), 200)
    return np.maximum(16, drawn / drawn.mean() * average).astype(int)


def measured(case: Case, memory: Any, peers: tuple[str, ...] = ()) -> Row:
    """The row of a case beside these peers; `wrong` returns the fault of a result."""
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
    table_of = Table.csr(table[2], *table[:2])
    kvs = [KV(table_of, Pool(c)) for c in caches]
    room = attn.reserve(len(pages))
    room.plan(table_of)
    bound = [attn.bind(q[i], kvs[i], plan=room) for i in range(calls)]
    batch = Batch((case.qo_heads, case.kv_heads), PAGE, q, caches, table)
    functions = {"tilewright": lambda i: bound[i]().o} | dict(calls_of(batch, peers))
    graphs, error, host = {}, {}, [t.cpu().numpy() for t in table]
    for name, call in functions.items():  # the functions are kept: graphs use their memory
        graphs[name], o = recorded(call, calls)
        cache = seen_as(caches[0], "HND").transpose(2, 3) if name.endswith(HND) else caches[0]
        error[name] = error_of(case, q[0], cache, o, host)
    times = replayed({n: (g, calls) for n, g in graphs.items()})
    for name in (n for n, e in error.items() if not e <= TOLERANCE):
        note(f"{name} is wrong: relative error {error[name]:.2g}")
    beside = {n: us for n, us in times.items() if n != "tilewright" and error[n] <= TOLERANCE}
    best = min(beside, key=beside.__getitem__) if beside else ""
    us = times["tilewright"]
    plan = replayed({"plan": (graph_of([lambda: room.plan(table_of)] * 32), 32)})["plan"]
    row: Row = {
        "input": case.name, "width": case.qo_heads, "dtype": "bfloat16", "impl": "tilewright",
        "heads": f"{case.qo_heads}/{case.kv_heads}", "ms": us / 1e3, "metric": "us", "value": us,
        "ratio": beside[best] / us if best else None, "bytes": case.nbytes,
        "read_us": read_us(caches), "plan_us": plan, "error": error["tilewright"],
        "peer": best, "peer_us": beside.get(best), "peers_us": beside,
    }  # fmt: skip
    ahead = f", {best} {beside[best]:8.2f} us ({beside[best] / us:.3f})" if best else ""
    note(
        f"{row['heads']:6} {row['input']:20} read {row['read_us']:8.2f} us, ours {us:8.2f} us, "
        f"plan {plan:.1f} us{ahead}"
    )
    wrong = not error["tilewright"] <= TOLERANCE
    return row | ({"wrong": f"relative error {error['tilewright']:.2g}"} if wrong else {})


def recorded(call: Callable[[int], Any], calls: int) -> tuple[Any, Any]:
    """A CUDA graph of `calls` calls, and what the first one computes when it is replayed."""
    torch = require_torch()
    results: list[Any] = []
    graph = graph_of([lambda i=i: results.append(call(i)) for i in range(calls)])
    o = results[-calls]
    o.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return graph, o.clone()


def graph_of(calls: list[Callable[[], Any]]) -> Any:
    """The calls as a CUDA graph; each ran once before."""
    torch = require_torch()
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graphs: dict[str, tuple[Any, int]]) -> dict[str, float]:
    """Microseconds a call of each graph (with how many it holds), the median of rounds in turns."""
    torch = require_torch()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(_ROUNDS + 2):
        for name, (graph, calls) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(600_000)  # the host is ahead: its time is not measured
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def read_us(caches: list[Any]) -> float:
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
        calls = [lambda r=r: r(torch.cuda.current_stream().cuda_stream) for r in run]
        best = min(best, replayed({"read": (graph_of(calls), len(calls))})["read"])
    return best


def error_of(case: Case, q: Any, cache: Any, o: Any, table: list[np.ndarray]) -> float:
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
        worst = max(worst, or_inf((difference.norm() / right.norm()).item()))
    return worst
