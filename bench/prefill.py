"""`python3 dev.py bench prefill`: prefill and append attention on a GPU, in TFLOP/s.

bfloat16, 32 query heads over 8 KV heads. Prefill: 16 384 tokens in all, in requests of one length
or of many; keys ragged, or in pages in random order. Append: a few new tokens of each of 16
requests over a long paged cache. Mixed: prompts and single tokens in one batch, which one of our
calls and one of a peer's answers; `parts_ms` has the prompts alone and the single tokens alone.
FLOPs are 2 · (head_dim + head_dim_vo) for each pair of query and key that the mask keeps, so half
the pairs where causal. Each run starts with a cold L2; a row's implementations run in turns. A
result is compared with float64 before it counts. `roofline`: the least time of the row by the data
sheet of the GPU (`roofline.py`), over ours. Peers (`prefill_peers.py`), those that can be
imported: FlashAttention-3 and -4, cuDNN and FlashAttention-2 through torch, FlexAttention,
FlashInfer, each in every form that takes the row; the fastest right one counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tilewright as tw
from bench import prefill_trace, roofline
from bench.harness import Row, base_row, note, or_inf, require_torch
from bench.prefill_peers import PEERS
from tilewright.attention.batch import Attention, BoundAttention
from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.attention.variant import Alibi, Causal, Full, SlidingWindow, Softcap

DEVICE = "cuda"
TOKENS, QO_HEADS, KV_HEADS, WINDOW, SOFT_CAP = 16384, 32, 8, 1024, 30.0
DOCUMENT = 512  # keys of a document
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@tw.variant
class Document(Causal):
    """Causal inside the document of the query."""

    document = tw.per_key("int32")

    def mask(self, at: Any) -> Any:
        return super().mask(at) & tw.equal(self.document[at.key], self.document[at.qo])


@tw.variant
class Tree:
    """Drafts see all keys before them and their ancestors, by the bits of their row."""

    tree = tw.bit_mask()

    def mask(self, at: Any) -> Any:
        first = at.kv_len - at.qo_len
        return (at.key < first) | self.tree[at.key - first]


VARIANTS = {
    "causal": Causal(), "full": Full(), "window": SlidingWindow(window=WINDOW),
    "softcap": Softcap(soft_cap=SOFT_CAP), "alibi": Alibi(), "document": Document(),
    "tree": Tree(),
}  # fmt: skip
DRAFTS = 64  # of a request with a tree; two of each earlier draft
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
    def is_even(self) -> bool:
        """Whether all requests have as many queries and as many keys."""
        return len(set(self.queries)) == 1 and len(set(self.keys)) == 1

    @property
    def is_square(self) -> bool:
        """Whether it is even with as many queries as keys."""
        return self.is_even and self.queries == self.keys

    @property
    def flops(self) -> float:
        return 2.0 * sum(self.dims) * QO_HEADS * sum(map(self.pairs, self.queries, self.keys))

    @property
    def nbytes(self) -> int:
        """Bytes that a call moves once: q, o, and the keys and values of each request."""
        rows = QO_HEADS * sum(self.queries) + KV_HEADS * sum(self.keys)
        return 2 * sum(self.dims) * rows

    def pairs(self, queries: int, keys: int) -> int:
        """Pairs that the mask keeps in a request."""
        if self.variant == "full":
            return queries * keys
        if self.variant == "tree":
            return queries * (keys - queries) + int(ancestors(queries).sum())
        last = np.arange(keys - queries + 1, keys + 1)  # keys up to each query's own
        if self.variant == "document":
            last = (last - 1) % DOCUMENT + 1
        return int((np.minimum(last, WINDOW) if self.variant == "window" else last).sum())


def ancestors(drafts: int) -> np.ndarray:
    """Which drafts each sees of a binary tree: itself, and (n - 1) // 2 upwards."""
    seen = np.eye(drafts, dtype=bool)
    for n in range(1, drafts):
        seen[n] |= seen[(n - 1) // 2]
    return seen


def prefill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")
    parser.add_argument("--only", metavar="TEXT", help="rows whose input begins so")
    parser.add_argument(
        "--peers", nargs="*", choices=("all", *PEERS), default=["all"],
        help="default: all that can be imported",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json",
        help="instead of rows: what each warp of a CTA does in the first row (Perfetto), and a "
        "picture of it beside the file",
    )  # fmt: skip


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
    for variant in ("window", "softcap", "alibi", "document"):
        yield even(variant, 128, 4096)
    for keys in (4096, 32768):
        for new in (16, 64, 256):
            name = f"append {new} on {keys}"
            yield Case(name, "causal", 128, (new,) * 16, (keys,) * 16, 16)
    yield Case("append 64 on 32768, one request", "causal", 128, (64,), (32768,), 16)
    for new, keys, singles, of in ((8192, 8192, 64, 8192), (2048, 16384, 64, 4096)):
        name = f"mixed {new} on {keys} + {singles} x 1 on {of}"
        yield Case(name, "causal", 128, (new, *(1,) * singles), (keys, *(of,) * singles), 16)
    for keys in (4096, 32768):
        yield Case(f"tree {DRAFTS} on {keys}", "tree", 128, (DRAFTS,) * 16, (keys,) * 16, 16)


def prefill(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of our kernel beside the peers, in TFLOP/s: medians of three interleaved rounds."""
    torch = require_torch()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    for number, case in enumerate(cases()):
        if args.rows and number not in args.rows:
            continue
        if args.only and not case.name.startswith(args.only):
            continue
        if args.trace:
            torch.manual_seed(0)
            prefill_trace.trace(Batch(case), args.trace)
            return
        wanted = [name for name in PEERS if {name, "all"} & set(args.peers)]
        row = measured(case, flush, wanted) | base_row("prefill", "attention.prefill", "cuda")
        yield row | {"roofline": roofline.share(row["device"], case.flops, case.nbytes, row["ms"])}


def measured(case: Case, flush: Any, peer_names: list[str]) -> Row:
    """The row of a case; `wrong` returns the fault of our result."""
    torch = require_torch()
    torch.manual_seed(0)
    batch = Batch(case)
    calls, error = {"tilewright": batch.ours()}, {}
    calls |= {name: call for peer in peer_names for name, call in batch.peer(peer)}
    for name, call in list(calls.items()):
        try:
            error[name] = batch.error(call)
        except Exception as refusal:  # a peer that takes the call and then not this shape
            if name == "tilewright":
                raise
            note(f"{name} does not run {case.name}: {reason(refusal)}")
            del calls[name]
    parts = batch.parts() if case.name.startswith("mixed") else {}
    rounds = _rounds(calls | parts, flush)
    times = {name: statistics.median(ms) for name, ms in rounds.items()}
    peers = {n: times[n] for n in calls if n != "tilewright" and error[n] < 8e-3}
    best = min(peers, key=peers.__getitem__) if peers else ""
    ms = times["tilewright"]
    row: Row = {
        "input": case.name, "width": case.head_dim, "dtype": "bfloat16", "impl": "tilewright",
        "heads": f"{QO_HEADS}/{KV_HEADS}", "ms": ms, "metric": "TFLOP/s",
        "value": case.flops / ms / 1e9, "ratio": peers[best] / ms if best else None,
        "rounds": rounds["tilewright"], "error": error["tilewright"],
        "peer": best, "peers_ms": peers, "parts_ms": {name: times[name] for name in parts},
    }  # fmt: skip
    beside = f", {best} {case.flops / peers[best] / 1e9:6.1f} ({row['ratio']:.2f})" if best else ""
    note(f"{case.name:32} {case.head_dim:4} {ms:8.4f} ms {row['value']:7.1f} TFLOP/s{beside}")
    wrong = not error["tilewright"] < 8e-3
    return row | ({"wrong": f"relative error {error['tilewright']:.2g}"} if wrong else {})


def reason(refusal: Exception) -> str:
    """The first line of what a peer says. Libraries refuse by errors of every kind: assertions, the
    errors of their own compilers."""
    return f"{type(refusal).__name__} {refusal}".splitlines()[0].strip()


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
            return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

        self.q = drawn(tokens, QO_HEADS, case.head_dim)
        self.k, self.v = (drawn(keys, KV_HEADS, dim) for dim in case.dims)
        self.slopes = torch.logspace(-1, -8, QO_HEADS, 2.0, device=DEVICE)
        self.documents = torch.arange(max(case.keys), dtype=torch.int32, device=DEVICE) // DOCUMENT
        self.documents = self.documents.expand(len(case.keys), -1).contiguous()
        bits = np.packbits(ancestors(DRAFTS), axis=1, bitorder="little").view(np.int32)
        self.tree = torch.from_numpy(np.tile(bits, (len(case.keys), 1))).to(DEVICE)
        if case.page_size:  # lengths are multiples of it
            self.names = torch.randperm(keys // case.page_size, device=DEVICE).int()
            self.pages = []
            for x in (self.k, self.v):
                paged = torch.empty_like(x).view(-1, case.page_size, *x.shape[1:])
                paged[self.names.long()] = x.view(paged.shape)
                self.pages.append(paged)

    window, soft_cap = WINDOW, SOFT_CAP

    def ours(self) -> Callable[[], Any]:
        return self._call(range(len(self.case.queries)))

    def _call(self, requests: Sequence[int]) -> Callable[[], Any]:
        bound = self.bound(requests)
        return lambda: bound().o

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Our calls of a mixed batch's prompts alone and of its single tokens alone."""
        single = [r for r, n in enumerate(self.case.queries) if n == 1]
        longer = [r for r, n in enumerate(self.case.queries) if n > 1]
        return {"prompts alone": self._call(longer), "singles alone": self._call(single)}

    def bound(self, requests: Sequence[int]) -> BoundAttention:
        """Our call for consecutive requests of the batch."""
        torch, case = require_torch(), self.case
        first, last = requests[0], requests[-1] + 1
        attn = Attention(
            QO_HEADS, KV_HEADS, case.head_dim, VARIANTS[case.variant], head_dim_vo=case.dims[1]
        )
        if case.page_size:
            lengths, names = self.lengths()[first:last], self.block_table()[first:last]
            kv = KV(Table(lengths, names), Pool(*self.pages))
        else:
            kv = KV(Table.ragged(self.key_indptr()), Pool(self.k, self.v))
        q = self.q[self.qo_indptr[first] : self.qo_indptr[last]]
        out = torch.full((*q.shape[:2], case.dims[1]), torch.nan, device=DEVICE).bfloat16()
        plan = attn.plan(self.qo_indptr[first : last + 1] - self.qo_indptr[first], kv)
        tensors = {
            "alibi": {"slopes": self.slopes}, "document": {"document": self.documents},
            "tree": {"tree": self.tree},
        }  # fmt: skip
        return attn.bind(q, kv, out, plan=plan, **tensors.get(case.variant, {}))

    def peer(self, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The calls of a peer; none, and a note, where it refuses to set the batch up."""
        try:
            yield from PEERS[name](self)
        except Exception as refusal:
            note(f"{name} does not take {self.case.name}: {reason(refusal)}")

    # -- the batch as peers want it --------------------------------------------------------------

    def lengths(self) -> Any:
        return require_torch().tensor(self.case.keys, dtype=require_torch().int32, device=DEVICE)

    def block_table(self) -> Any:
        """The pages of each request, a row each; those behind its last are page 0."""
        torch, counts = require_torch(), [n // self.case.page_size for n in self.case.keys]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=DEVICE)
        for row, names in zip(table, self.names.split(counts), strict=True):
            row[: len(names)] = names
        return table

    def indptr(self) -> Any:
        return require_torch().from_numpy(self.qo_indptr).to(DEVICE)

    def key_indptr(self) -> Any:
        return require_torch().from_numpy(self.kv_indptr).to(DEVICE)

    def by_request(self, x: Any) -> Any:
        """Rows as (requests, rows, heads, head_dim); the batch is even."""
        return x.view(len(self.case.queries), -1, *x.shape[1:])

    def by_head(self) -> list[Any]:
        """q, k and v as (requests, heads, rows, head_dim), contiguous; the batch is even."""
        return [self.by_request(x).transpose(1, 2).contiguous() for x in (self.q, self.k, self.v)]

    def error(self, call: Callable[[], Any]) -> float:
        """The largest relative error of a few rows of the first, the last and the longest request,
        in float64; inf where the call fails."""
        torch, case = require_torch(), self.case
        o = call().reshape(len(self.q), QO_HEADS, case.dims[1])
        worst, group = 0.0, QO_HEADS // KV_HEADS
        for r in {0, len(case.queries) - 1, int(np.argmax(case.queries))}:
            rows, keys = (slice(x[r], x[r + 1]) for x in (self.qo_indptr, self.kv_indptr))
            n, m = case.queries[r], case.keys[r]
            at = torch.tensor([0, n // 3, n // 2, n - 1], device=DEVICE)
            last = at + (m - n)
            key = torch.arange(m, device=DEVICE)
            for head in (0, QO_HEADS - 1):
                k, v = (x[keys, head // group].double() for x in (self.k, self.v))
                s = self.q[rows][at, head].double() @ k.T * case.head_dim**-0.5
                if case.variant == "softcap":
                    s = SOFT_CAP * (s / SOFT_CAP).tanh()
                if case.variant == "alibi":
                    s = s + self.slopes[head].double() * (key - last[:, None])
                if case.variant == "document":
                    s = s.masked_fill(key // DOCUMENT != last[:, None] // DOCUMENT, -torch.inf)
                if case.variant == "tree":
                    seen = torch.from_numpy(ancestors(n)).to(DEVICE)[at]
                    seen = torch.nn.functional.pad(seen, (m - n, 0), value=True)
                    s = s.masked_fill(~seen, -torch.inf)
                elif case.variant != "full":
                    s = s.masked_fill(key > last[:, None], -torch.inf)
                if case.variant == "window":
                    s = s.masked_fill(key <= last[:, None] - WINDOW, -torch.inf)
                right = s.softmax(-1) @ v
                difference = o[rows][at, head].double() - right
                each = difference.norm(dim=-1) / right.norm(dim=-1)
                worst = max(worst, or_inf(each.max().item()))
        return worst


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
