"""Peers of `bench decode`: each generator yields the calls of one library, by name.

A call takes the number of a cache and returns o as (requests, heads, head_dim). Plans and metadata
are made beforehand. Caches are read as (pages, 2, tokens, heads, head_dim); where a name ends in
HND the same bytes are read as (pages, 2, heads, tokens, head_dim). A library that is not there, or
that refuses a batch, yields nothing and is named on the terminal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import note, require_torch
from bench.prefill_peers import imported

Calls = Iterator[tuple[str, Callable[[int], Any]]]
HND = ", HND"
WORKSPACE_BYTES, BATCH_ATTENTION_BYTES, SEMAPHORES = 512 << 20, 1536 << 20, 2 << 20


@dataclass(frozen=True, eq=False)
class Batch:
    """One query of each request over a paged cache. `table`: indptr, indices, lengths, int32."""

    heads: tuple[int, int]
    page_size: int
    q: Any  # (calls, requests, heads, head_dim)
    caches: list[Any]
    table: list[Any]

    @functools.cached_property
    def block_table(self) -> Any:
        """Pages of each request in a row of their own, padded with page 0."""
        indptr, indices = (t.cpu().numpy() for t in self.table[:2])
        counts = np.diff(indptr)
        padded = np.zeros((len(counts), int(counts.max())), np.int32)
        for r, count in enumerate(counts):
            padded[r, :count] = indices[indptr[r] : indptr[r] + count]
        return require_torch().from_numpy(padded).cuda()

    @functools.cached_property
    def out(self) -> Any:
        return require_torch().empty_like(self.q)

    def cache(self, i: int, layout: str) -> Any:
        return seen_as(self.caches[i], layout)

    def sizes(self) -> tuple[int, int, int, int]:
        return *self.heads, self.q.shape[3], self.page_size


def seen_as(cache: Any, layout: str) -> Any:
    """The bytes of a cache as pages of another layout."""
    pages, two, tokens, heads, head_dim = cache.shape
    return cache.view(pages, two, heads, tokens, head_dim) if layout == "HND" else cache


def flash_attention_3(batch: Batch) -> Calls:
    """With metadata of its scheduler and four bounds of its splits."""
    fa, torch = imported("flash_attn_interface", "FlashAttention-3"), require_torch()
    if fa is None:
        return
    pages, lengths = batch.block_table, batch.table[2]
    for splits in (0, 1, 8, 32):
        metadata = fa.get_scheduler_metadata(
            len(pages), 1, pages.shape[1] * batch.page_size, *batch.heads, batch.q.shape[3],
            lengths, qkv_dtype=torch.bfloat16, page_size=batch.page_size, causal=False,
            num_splits=splits,
        )  # fmt: skip

        def call(i: int, metadata: Any = metadata, splits: int = splits) -> Any:
            k, v = batch.caches[i][:, 0], batch.caches[i][:, 1]
            return fa.flash_attn_with_kvcache(
                batch.q[i].unsqueeze(1), k, v, cache_seqlens=lengths, page_table=pages,
                scheduler_metadata=metadata, num_splits=splits,
            )[:, 0]  # fmt: skip

        yield f"fa3, splits {splits or 'auto'}", call


def flashinfer(batch: Batch) -> Calls:
    """Its decode wrapper, with and without tensor cores, planned for graphs and for this batch
    alone."""
    for is_tensor in (True, False):
        for layout, in_graphs in (("NHD", True), ("NHD", False), ("HND", True)):
            how = f"flashinfer, {'tensor' if is_tensor else 'cuda'} cores"
            how += ("" if in_graphs else ", exact plan") + HND * (layout == "HND")
            yield from _wrapped(batch, how, layout, in_graphs, use_tensor_cores=is_tensor)


def cudnn(batch: Batch) -> Calls:
    """cuDNN's paged decode, by way of FlashInfer's wrapper."""
    if imported("cudnn", "cuDNN") is not None:
        for layout in ("NHD", "HND"):
            name = "cudnn" + HND * (layout == "HND")
            yield from _wrapped(batch, name, layout, True, backend="cudnn")


def _wrapped(batch: Batch, name: str, layout: str, in_graphs: bool, **how: Any) -> Calls:
    fi, torch = imported("flashinfer", "FlashInfer"), require_torch()
    if fi is None:
        return
    indptr, indices, lengths = batch.table
    last = (lengths - 1) % batch.page_size + 1
    if in_graphs:
        how |= {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": torch.empty_like(indptr),
            "paged_kv_indices_buffer": torch.empty_like(indices),
            "paged_kv_last_page_len_buffer": torch.empty_like(last),
        }
    w = fi.BatchDecodeWithPagedKVCacheWrapper(_workspace(WORKSPACE_BYTES), layout, **how)
    more = {"block_tables": batch.block_table} if "backend" in how else {}
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    w.plan(indptr.cpu(), indices, last.cpu(), *batch.sizes(), **kinds, **more)
    yield name, lambda i: w.run(batch.q[i], batch.cache(i, layout), out=batch.out[i])


def batch_attention(batch: Batch) -> Calls:
    """FlashInfer's BatchAttention, one persistent kernel."""
    fi, torch = imported("flashinfer", "FlashInfer"), require_torch()
    if fi is None:
        return
    (indptr, indices, lengths), (qo_heads, kv_heads, d, page_size) = batch.table, batch.sizes()
    lse = torch.empty(batch.q.shape[1:3], dtype=torch.float32, device="cuda")
    each = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    for layout in ("NHD", "HND"):
        w = fi.BatchAttention(kv_layout=layout)
        if kv_heads > 8:  # its own workspace is too small
            w.float_workspace_buffer = _workspace(BATCH_ATTENTION_BYTES)
        sizes = qo_heads, kv_heads, d, d, page_size
        w.plan(each, indptr, indices, lengths, *sizes, causal=True, **kinds)

        def call(i: int, w: Any = w, layout: str = layout) -> Any:
            return w.run(batch.q[i], batch.cache(i, layout), out=batch.out[i], lse=lse)[0]

        yield "batch attention" + HND * (layout == "HND"), call


def xqa(batch: Batch) -> Calls:
    """TensorRT-LLM's XQA, as FlashInfer has it, with its own number of splits and twice that."""
    module, torch = imported("flashinfer.xqa", "XQA"), require_torch()
    if module is None:
        return
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    semaphores = torch.zeros(SEMAPHORES, dtype=torch.int32, device="cuda").view(torch.uint32)
    lengths, kv_heads = batch.table[2].view(torch.uint32).unsqueeze(1), batch.heads[1]
    scratch = _workspace(WORKSPACE_BYTES)
    for layout in ("NHD", "HND"):
        for times in (1, 2):

            def call(i: int, layout: str = layout, times: int = times) -> Any:
                cache = batch.cache(i, layout)
                module.xqa(
                    batch.q[i].unsqueeze(1), cache[:, 0], cache[:, 1], batch.block_table, lengths,
                    batch.out[i].unsqueeze(1), scratch, semaphores, kv_heads, batch.page_size,
                    kv_layout=layout, sm_count=sms * times,
                )  # fmt: skip
                return batch.out[i]

            yield f"xqa, {times} × SMs" + HND * (layout == "HND"), call


@functools.cache
def _workspace(nbytes: int) -> Any:
    """Memory that the calls of a library share: they run one after the other."""
    torch = require_torch()
    return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")


PEERS: dict[str, Callable[[Batch], Calls]] = {
    "fa3": flash_attention_3, "flashinfer": flashinfer, "batch_attention": batch_attention,
    "xqa": xqa, "cudnn": cudnn,
}  # fmt: skip


def calls_of(batch: Batch, peers: Any) -> Calls:
    """The calls of these peers that a first call does not refuse."""
    for peer in peers:
        calls = PEERS[peer](batch)
        while True:
            try:
                name, call = next(calls)
            except StopIteration:
                break
            except Exception as error:
                note(f"without {peer}: {_first_line(error)}")
                break
            try:
                call(0)
                require_torch().cuda.synchronize()
            except Exception as error:
                note(f"without {name}: {_first_line(error)}")
            else:
                yield name, call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
