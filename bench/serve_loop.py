"""A minimal serving loop of torch, the peer that a page of code is: pages of keys and values,
torch's matrix products, FlashAttention-3 (on a CPU torch's attention), answers from CUDA graphs.

Each seat owns the pages of a whole context, so that there is nothing to allocate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench.peer_models import PeerModel

PAGE = 256  # tokens


class Row(NamedTuple):
    """Tokens of a request that a step reads, from position `start` on; its seat."""

    seat: int
    tokens: Sequence[int]
    start: int


class Batch(NamedTuple):
    """The rows of a step, one after the other. Of each token: `ids`, `position`, and `slot` in the
    cache; of each row: its `last` token, `lengths` in keys, `table` of pages; `indptr` of rows."""

    ids: Any
    position: Any
    slot: Any
    last: Any
    lengths: Any
    table: Any
    indptr: Any
    longest: int


class Loop:
    """A Llama or Qwen3 over `seats` requests of at most `context` tokens."""

    def __init__(self, model: PeerModel, seats: int, context: int) -> None:
        c, w, device = model.config, model.weights, model.device
        self.config, self.device, self.on_gpu = c, device, device != "cpu"
        self.weights = w
        dtype = w["embed"].dtype
        self.layers = [
            {
                "qkv": torch.cat([w[f"layers.{i}.attn.{x}"] for x in "qkv"]),
                "gate_up": torch.cat([w[f"layers.{i}.ffn.{x}"] for x in ("gate", "up")]),
            }
            for i in range(c.layers)
        ]
        pages = -(-context // PAGE)
        shape = (c.layers, seats * pages, PAGE, c.kv_heads, c.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        owned = torch.arange(seats * pages, dtype=torch.int32, device=device)
        self.table = owned.view(seats, pages)
        self.ends = torch.arange(seats + 1, dtype=torch.int32, device=device)  # graphs read it
        tables = c.rope.tables(context, c.head_dim)
        self.cos, self.sin = (torch.from_numpy(t).to(device, dtype) for t in tables)
        self.attend: Callable[..., Any] = _flash_attention if self.on_gpu else _torch_attention
        parts: list[Callable[..., Any]] = [_norm, _rotate, _gate]
        if self.on_gpu:
            parts = [torch.compile(part, dynamic=True) for part in parts]
        self.norm, self.rotate, self.gate = parts
        self.graphs: dict[int, tuple[Any, Any, Any]] = {}
        if self.on_gpu:
            self._capture(seats)

    def step(self, rows: Sequence[Row]) -> list[int]:
        """The token after the last of each row."""
        if self.on_gpu and all(len(row.tokens) == 1 for row in rows):
            size = next(n for n in self.graphs if n >= len(rows))
            # Rows that fill the graph up repeat the first one, and write what it writes.
            ints = self._ints([*rows, *[rows[0]] * (size - len(rows))])
            graph, into, tokens = self.graphs[size]
            into.copy_(ints)
            graph.replay()
            return tokens[: len(rows)].tolist()
        return self._forward(self._batch(self._ints(rows), rows)).tolist()

    def _ints(self, rows: Sequence[Row]) -> Any:
        """Token, position and seat of each token, int64 (3, tokens) on the device."""
        columns = [(t, row.start + i, row.seat) for row in rows for i, t in enumerate(row.tokens)]
        return torch.from_numpy(np.array(columns, np.int64).T.copy()).to(self.device)

    def _batch(self, ints: Any, rows: Sequence[Row]) -> Batch:
        ids, position, seat = ints
        sizes = [len(row.tokens) for row in rows]
        indptr = torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)).to(self.device)
        last = (indptr[1:] - 1).long()
        slot = seat * (self.table.shape[1] * PAGE) + position
        lengths = (position[last] + 1).int()
        return Batch(ids, position, slot, last, lengths, self.table[seat[last]], indptr, max(sizes))

    def _forward(self, b: Batch) -> Any:
        """The likeliest token after each row."""
        c, w = self.config, self.weights
        q_heads, kv_heads, dim = c.qo_heads, c.kv_heads, c.head_dim
        x = F.embedding(b.ids, w["embed"])
        cos, sin = self.cos[b.position, None], self.sin[b.position, None]
        for i, layer in enumerate(self.layers):
            name = f"layers.{i}."
            h = self.norm(x, w[f"{name}attn_norm"], c.rms_eps)
            qkv = (h @ layer["qkv"].T).view(-1, q_heads + 2 * kv_heads, dim)
            q, k, v = qkv.split((q_heads, kv_heads, kv_heads), 1)
            if c.qk_norm:
                q = self.norm(q, w[f"{name}attn.q_norm"], c.rms_eps)
                k = self.norm(k, w[f"{name}attn.k_norm"], c.rms_eps)
            q = self.rotate(q, cos, sin)
            self.keys[i].view(-1, kv_heads, dim)[b.slot] = self.rotate(k, cos, sin)
            self.values[i].view(-1, kv_heads, dim)[b.slot] = v
            o = self.attend(q, self.keys[i], self.values[i], b)
            x = torch.addmm(x, o.reshape(len(x), -1), w[f"{name}attn.o"].T)
            h = self.norm(x, w[f"{name}ffn_norm"], c.rms_eps)
            x = torch.addmm(x, self.gate(h @ layer["gate_up"].T), w[f"{name}ffn.down"].T)
        head = w.get("lm_head", w["embed"])
        return (self.norm(x[b.last], w["norm"], c.rms_eps) @ head.T).argmax(-1)

    def _capture(self, seats: int) -> None:
        """A CUDA graph for each number of answers: up to 8 the powers of two, then sixteens."""
        for size in sorted({n for n in (1, 2, 4, 8, *range(16, seats, 16)) if n < seats} | {seats}):
            rows = [Row(seat, [0], 0) for seat in range(size)]
            ints = self._ints(rows)

            def run(ints: Any = ints, fixed: Any = self.ends[: size + 1]) -> Any:
                ids, position, seat = ints
                slot = seat * (self.table.shape[1] * PAGE) + position
                lengths = (position + 1).int()
                last = fixed[:-1].long()
                return self._forward(
                    Batch(ids, position, slot, last, lengths, self.table[seat], fixed, 1)
                )

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles, and makes what libraries make at first
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                tokens = run()
            self.graphs[size] = graph, ints, tokens


def _norm(x: Any, weight: Any, eps: float) -> Any:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _gate(x: Any) -> Any:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _flash_attention(q: Any, keys: Any, values: Any, b: Batch) -> Any:
    attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    if b.longest == 1:
        q, ragged = q[:, None], {}
    else:
        ragged = {"cu_seqlens_q": b.indptr, "max_seqlen_q": b.longest}
    o = attend(q, keys, values, cache_seqlens=b.lengths, page_table=b.table, causal=True, **ragged)
    return o[0] if isinstance(o, tuple) else o


def _torch_attention(q: Any, keys: Any, values: Any, b: Batch) -> Any:
    """Row by row, over the keys of its pages."""
    parts = []
    for n, (begin, end) in enumerate(
        zip(b.indptr[:-1].tolist(), b.indptr[1:].tolist(), strict=True)
    ):
        length, pages = int(b.lengths[n]), b.table[n].long()
        k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (keys, values))
        mask = torch.ones(end - begin, length, dtype=torch.bool).tril(length - (end - begin))
        rows = q[begin:end].transpose(0, 1)
        o = F.scaled_dot_product_attention(rows[None], k[None], v[None], mask, enable_gqa=True)
        parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)
