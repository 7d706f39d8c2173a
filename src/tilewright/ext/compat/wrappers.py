"""FlashInfer's wrappers of batches: `plan` once a step, `run` for each layer."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.errors import ArgumentError
from tilewright.ext.compat.pages import get_seq_lens, halves
from tilewright.ext.compat.problem import Problem, packed_bits, results
from tilewright.ext.compat.signatures import accepts

_BACKENDS = ("auto", "fa2", "fa3")  # each means Tilewright's own kernels
_GRAPH_ROWS = 16  # packed rows of a request that a workspace plans for


class Wrapper:
    """What the wrappers share. Of `float_workspace_buffer` only the device is used.

    With `use_cuda_graph` each plan copies its arrays into the caller's buffers and plans on the GPU
    into a workspace, so that a captured `run` can be replayed after another `plan`.
    """

    _problem: Problem | None = None

    def _set_up(self, g: SimpleNamespace, **buffers: Any) -> None:
        workspace = g.float_workspace_buffer
        if not isinstance(workspace, torch.Tensor):
            name = "float_workspace_buffer"
            raise ArgumentError("A107", f"{name} is a {type(workspace).__name__}", where=name)
        if g.backend not in _BACKENDS:
            hint = f"one of {', '.join(_BACKENDS)}"
            raise ArgumentError("A101", f"backend={g.backend!r}", where="backend", hint=hint)
        self.device, self.kv_layout = workspace.device, g.kv_layout
        self.is_cuda_graph_enabled, self._buffers = bool(g.use_cuda_graph), buffers
        self._room: Any = None
        missing = [n for n, b in buffers.items() if not isinstance(b, torch.Tensor)]
        if self.is_cuda_graph_enabled and missing:
            text = f"use_cuda_graph needs buffers for {', '.join(missing)}"
            raise ArgumentError("A101", text, where=missing[0])

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffer: Any
    ) -> None:
        """Nothing: plans own their memory."""

    def end_forward(self) -> None:
        """Nothing: the next plan replaces this one."""

    def _keep(self, name: str, array: Any) -> torch.Tensor:
        """An array of a batch on the device, in its buffer where graphs are used."""
        if not isinstance(array, torch.Tensor) or array.dtype not in (torch.int32, torch.int64):
            kind = getattr(array, "dtype", type(array).__name__)
            raise ArgumentError("A102", f"{name} is {kind}", where=name, hint="an int32 tensor")
        if not self.is_cuda_graph_enabled:
            return array.to(self.device)
        buffer = self._buffers.setdefault(name, torch.empty_like(array, device=self.device))
        if array.numel() > buffer.numel() or (name != "indices" and array.shape != buffer.shape):
            text = f"{name} has shape {tuple(array.shape)}, its buffer {tuple(buffer.shape)}"
            hint = "a wrapper with use_cuda_graph keeps its batch size"
            raise ArgumentError("A103", text, where=name, hint=hint)
        buffer[: array.numel()].copy_(array)
        return buffer

    def _paged(self, indptr: Any, indices: Any, last_page_len: Any, page_size: int) -> Table:
        first, pages = self._keep("indptr", indptr), self._keep("indices", indices)
        last = self._keep("last_page_len", last_page_len)
        if last.shape != first.diff().shape:
            text = f"last_page_len has shape {tuple(last.shape)}, indptr {tuple(first.shape)}"
            raise ArgumentError("A103", text, where="last_page_len", hint="(batch_size,)")
        used = last[first.diff() > 0] if self.device.type == "cpu" else last[:0]
        if ((used < 1) | (used > page_size)).any():
            text = f"last_page_len holds {used.tolist()}, not all in 1..{page_size}"
            raise ArgumentError("A109", text, where="last_page_len")
        lengths = self._keep("kv_len", get_seq_lens(first, last, page_size))
        return Table.csr(lengths, first, pages)

    def _prefill(self, g: SimpleNamespace, table: Table, page_size: int) -> None:
        qo, bits = torch.as_tensor(g.qo_indptr).cpu(), None
        if g.custom_mask is not None or g.packed_custom_mask is not None:
            if self.is_cuda_graph_enabled:
                raise ArgumentError("A110", "a custom mask in a CUDA graph", where="custom_mask")
            bits = packed_bits(g, qo.diff(), torch.from_numpy(table.lengths()))
        vo = g.head_dim_qk if g.head_dim_vo is None else g.head_dim_vo
        heads = (g.num_qo_heads, g.num_kv_heads, g.head_dim_qk, vo)
        self._plan(Problem.of(heads, g, bits), table, qo, page_size, g)

    def _plan(
        self, problem: Problem, table: Table, qo_indptr: Any, page_size: int, g: SimpleNamespace
    ) -> None:
        """Plan a batch; `page_size` 0: rows without pages."""
        kinds = [g.q_data_type if x is None else x for x in (g.kv_data_type, g.o_data_type)]
        self._dtypes = [_dtype(x) for x in (g.q_data_type, *kinds)]
        attn, _ = problem.attention(self.device)
        if self.is_cuda_graph_enabled and self.device.type == "cuda":
            self._planned = self._plan_in_room(attn, table, qo_indptr)
        else:
            over: Any = table
            if self.device.type == "cuda":  # kernels are chosen by a pool's dtype and alignment
                shape = (1, page_size, problem.kv_heads) if page_size else (1, problem.kv_heads)
                kind = {"dtype": self._dtypes[1], "device": self.device}
                dims = (problem.head_dim, problem.head_dim_vo)
                over = KV(table, Pool(*(torch.empty(*shape, d, **kind) for d in dims)))
            self._planned = attn.plan(qo_indptr, over)
        self._problem, self._table = problem, table

    def _plan_in_room(self, attn: Any, table: Table, qo_indptr: Any) -> Any:
        host = np.asarray(qo_indptr)
        longest, tokens = int(np.diff(host).max(initial=0)), int(host[-1])
        if longest * attn.group > _GRAPH_ROWS:
            text = f"{longest} queries a request × {attn.group} heads in a CUDA graph"
            hint = f"at most {_GRAPH_ROWS} together; plan longer ones without use_cuda_graph"
            raise ArgumentError("A110", text, where="qo_indptr", hint=hint)
        if self._room is None:
            several = longest > 1 or "qo_indptr" in self._buffers
            sizes = {"max_tokens": tokens if several else None}
            device = f"cuda:{self.device.index or 0}"
            self._room = attn.reserve(table.requests, device=device, **sizes)
        rows = torch.as_tensor(host.astype(np.int32)) if self._room.max_tokens else None
        kept = None if rows is None else self._keep("qo_indptr", rows)
        self._room.plan(table, kept, tokens=tokens)
        return self._room

    def _run(self, g: SimpleNamespace, pool: Pool) -> Any:
        problem, options = self._problem, vars(g)
        if problem is None:
            raise ArgumentError("A101", "run before plan", hint="plan the batch first")
        if options.get("window_left") not in (None, problem.window_left):
            text = f"window_left={g.window_left}, planned with {problem.window_left}"
            raise ArgumentError("A101", text, where="window_left")
        for name, tensor, kind in zip(
            ("q", "k"), (g.q, pool.arrays[0]), self._dtypes, strict=False
        ):
            if tensor.dtype != kind:
                text, hint = f"{name} is {tensor.dtype}, planned as {kind}", "q_data_type=…"
                raise ArgumentError("A102", text, where=name, hint=hint)
        attn, values = problem.attention(self.device, options)
        out = options.get("out")
        if out is None and self._dtypes[2] != self._dtypes[0]:
            shape = (*g.q.shape[:2], problem.head_dim_vo)
            out = torch.empty(shape, dtype=self._dtypes[2], device=g.q.device)
        state = attn.run(g.q, KV(self._table, pool), self._planned, out=out, **values)
        return results(state, options)

    def _forward(self, g: SimpleNamespace, pool: Pool) -> Any:
        """The old form of `run`, whose options replace those of the plan."""
        if self._problem is None:
            raise ArgumentError("A101", "forward before begin_forward")
        old = self._problem
        heads = (old.qo_heads, old.kv_heads, old.head_dim, old.head_dim_vo)
        self._problem = Problem.of(heads, g, old.bits)
        return self._run(g, pool)

    def _pages(self, g: SimpleNamespace) -> Pool:
        return Pool(*halves(g.paged_kv_cache, self.kv_layout))


def _dtype(kind: Any) -> torch.dtype:
    found = getattr(torch, kind, None) if isinstance(kind, str) else kind
    if not isinstance(found, torch.dtype):
        raise ArgumentError("A102", f"{kind!r} is no dtype", where="q_data_type")
    return found


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Decode: one query a request, or `q_len_per_req`; keys in pages."""

    @accepts("decode")
    def __init__(self, g: SimpleNamespace) -> None:
        names = ("indptr", "indices", "last_page_len")
        self._set_up(g, **{n: getattr(g, f"paged_kv_{n}_buffer") for n in names})

    @accepts("decode.plan")
    def plan(self, g: SimpleNamespace) -> None:
        """Plan a batch; FlashInfer documents the parameters. Raises ArgumentError."""
        g.causal = g.q_len_per_req > 1
        g.kv_data_type = g.data_type if g.kv_data_type is None else g.kv_data_type
        problem = Problem.of((g.num_qo_heads, g.num_kv_heads, g.head_dim, g.head_dim), g)
        table = self._paged(g.indptr, g.indices, g.last_page_len, g.page_size)
        rows = torch.arange(table.requests + 1, dtype=torch.int32) * g.q_len_per_req
        self._plan(problem, table, rows, g.page_size, g)

    @accepts("decode.run")
    def run(self, g: SimpleNamespace) -> Any:
        """o (batch, heads, head_dim), with return_lse also lse to base 2. Raises ArgumentError."""
        return self._run(g, self._pages(g))

    @accepts("decode.forward")
    def forward(self, g: SimpleNamespace) -> Any:
        """`run` with options of its own."""
        return self._forward(g, self._pages(g))

    begin_forward = plan
    run_return_lse = functools.partialmethod(run, return_lse=True)
    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    """Prefill and append: any number of queries a request, keys in pages."""

    @accepts("prefill")
    def __init__(self, g: SimpleNamespace) -> None:
        names = ("indptr", "indices", "last_page_len")
        paged = {n: getattr(g, f"paged_kv_{n}_buf") for n in names}
        self._set_up(g, qo_indptr=g.qo_indptr_buf, **paged)

    @accepts("prefill.plan")
    def plan(self, g: SimpleNamespace) -> None:
        """Plan a batch; FlashInfer documents the parameters. Raises ArgumentError."""
        arrays = (g.paged_kv_indptr, g.paged_kv_indices, g.paged_kv_last_page_len)
        self._prefill(g, self._paged(*arrays, g.page_size), g.page_size)

    @accepts("prefill.run")
    def run(self, g: SimpleNamespace) -> Any:
        """o (tokens, heads, head_dim_vo), with return_lse also lse to base 2."""
        return self._run(g, self._pages(g))

    @accepts("prefill.forward")
    def forward(self, g: SimpleNamespace) -> Any:
        """`run` with options of its own."""
        return self._forward(g, self._pages(g))

    begin_forward = plan
    run_return_lse = functools.partialmethod(run, return_lse=True)
    forward_return_lse = functools.partialmethod(forward, return_lse=True)


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Prefill over keys and values without pages, one request after the other."""

    @accepts("ragged")
    def __init__(self, g: SimpleNamespace) -> None:
        self._set_up(g, qo_indptr=g.qo_indptr_buf, kv_indptr=g.kv_indptr_buf)

    @accepts("ragged.plan")
    def plan(self, g: SimpleNamespace) -> None:
        """Plan a batch; FlashInfer documents the parameters. Raises ArgumentError."""
        self._prefill(g, Table.ragged(self._keep("kv_indptr", g.kv_indptr)), 0)

    def _rows(self, g: SimpleNamespace) -> Pool:
        flip = self.kv_layout == "HND"
        return Pool(*(x.transpose(0, 1) if flip else x for x in (g.k, g.v)))

    @accepts("ragged.run")
    def run(self, g: SimpleNamespace) -> Any:
        """o (tokens, heads, head_dim_vo), with return_lse also lse to base 2."""
        return self._run(g, self._rows(g))

    @accepts("ragged.forward")
    def forward(self, g: SimpleNamespace) -> Any:
        """`run` with options of its own."""
        return self._forward(g, self._rows(g))

    begin_forward = plan
    run_return_lse = functools.partialmethod(run, return_lse=True)
    forward_return_lse = functools.partialmethod(forward, return_lse=True)
