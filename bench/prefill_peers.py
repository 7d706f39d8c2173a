"""Peers of `bench prefill`: each generator yields the calls of one library that take a batch.

A call is (name, function); the function returns o as (tokens, heads, head_dim_vo), (requests,
queries, heads, …) or, wrapped in `ByHead`, (requests, heads, queries, …). A library that cannot be
imported yields nothing, and is named once on the terminal.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.harness import note, require_torch

Calls = Iterator[tuple[str, Callable[[], Any]]]
WORKSPACE_BYTES = 384 << 20
LIBRARY_VARIANTS = ("causal", "full", "window", "softcap")


@dataclass(frozen=True, slots=True)
class ByHead:
    """A result with the heads before the queries."""

    o: Any

    def reshape(self, *shape: int) -> Any:
        return self.o.transpose(1, 2).reshape(*shape)


@functools.cache
def imported(module: str, name: str) -> Any:
    """A peer's module; None, said once, where it is not installed or does not load."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        note(f"without {name}: {str(error).splitlines()[0]}")
        return None


def first(o: Any) -> Any:
    return o[0] if isinstance(o, tuple) else o


def flash_attention_3(batch: Any) -> Calls:
    """Its dense, its ragged and its paged form."""
    fa = imported("flash_attn_interface", "FlashAttention-3")
    case = batch.case
    if fa is None or case.variant not in LIBRARY_VARIANTS:
        return
    how = {"causal": case.variant != "full"} | _options(batch)
    if not case.page_size:
        yield from _dense_and_ragged("fa3", batch, fa, how)
        return
    q = batch.by_request(batch.q) if case.is_even else batch.q
    if not case.is_even:
        how |= {"cu_seqlens_q": batch.indptr(), "max_seqlen_q": max(case.queries)}
    lengths, table = batch.lengths(), batch.block_table()  # on the GPU before the clock runs
    for splits in (0, 1):
        yield f"fa3 paged, splits {splits or 'auto'}", lambda splits=splits: first(
            fa.flash_attn_with_kvcache(
                q, *batch.pages, cache_seqlens=lengths, page_table=table, num_splits=splits, **how
            )
        )  # fmt: skip


def flash_attention_4(batch: Any) -> Calls:
    """Its dense, its ragged and its paged form (CuTe DSL)."""
    fa = imported("flash_attn.cute", "FlashAttention-4")
    case = batch.case
    if fa is None or case.variant not in LIBRARY_VARIANTS:
        return
    how = {"causal": case.variant != "full"} | _options(batch)
    if not case.page_size:
        yield from _dense_and_ragged("fa4", batch, fa, how)
        return
    indptr, longest, most = batch.indptr(), max(case.queries), max(case.keys)
    lengths, table = batch.lengths(), batch.block_table()
    yield (
        "fa4 paged",
        lambda: first(
            fa.flash_attn_varlen_func(
                batch.q, *batch.pages, cu_seqlens_q=indptr, max_seqlen_q=longest, max_seqlen_k=most,
                seqused_k=lengths, page_table=table, **how,
            )
        ),
    )  # fmt: skip


def _options(batch: Any) -> dict[str, Any]:
    if batch.case.variant == "window":
        return {"window_size": (batch.window - 1, 0)}
    return {"softcap": batch.soft_cap} if batch.case.variant == "softcap" else {}


def _dense_and_ragged(name: str, batch: Any, fa: Any, how: dict[str, Any]) -> Calls:
    if batch.case.is_even:
        dense = [batch.by_request(x) for x in (batch.q, batch.k, batch.v)]
        yield name, lambda: first(fa.flash_attn_func(*dense, **how))
    indptr, longest = batch.indptr(), max(batch.case.queries)
    yield (
        f"{name} varlen",
        lambda: first(
            fa.flash_attn_varlen_func(
                batch.q,
                batch.k,
                batch.v,
                cu_seqlens_q=indptr,
                cu_seqlens_k=indptr,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                **how,
            )
        ),
    )


def sdpa(batch: Any) -> Calls:
    """torch's scaled_dot_product_attention with cuDNN and with FlashAttention-2."""
    torch, case = require_torch(), batch.case
    if case.page_size or not case.is_square or case.variant not in ("causal", "full"):
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = batch.by_head()
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        q, k, v, is_causal=case.variant == "causal", enable_gqa=True,
    )  # fmt: skip

    def call(backend: Any) -> ByHead:
        with sdpa_kernel(backend):
            return ByHead(attend())

    yield "cudnn", lambda: call(SDPBackend.CUDNN_ATTENTION)
    yield "fa2", lambda: call(SDPBackend.FLASH_ATTENTION)


def flex(batch: Any) -> Calls:
    """FlexAttention, compiled for this batch, with a block mask made beforehand."""
    torch, case = require_torch(), batch.case
    if case.page_size or not case.is_square:
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    window, slopes, cap = batch.window, batch.slopes, batch.soft_cap
    documents = batch.documents
    masks: dict[str, Any] = {
        "window": lambda b, h, i, j: (i >= j) & (i - j < window),
        "document": lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
    }
    scores: dict[str, Any] = {
        "softcap": lambda s, b, h, i, j: cap * torch.tanh(s / cap),
        "alibi": lambda s, b, h, i, j: s + slopes[h] * (j - i),
    }
    n, requests = case.queries[0], len(case.queries) if case.variant == "document" else None
    mask = None
    if case.variant != "full":
        keep = masks.get(case.variant, lambda b, h, i, j: i >= j)
        mask = create_block_mask(keep, requests, None, n, n, device=batch.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = batch.by_head()
    change = scores.get(case.variant)
    yield (
        "flex",
        lambda: ByHead(compiled(q, k, v, score_mod=change, block_mask=mask, enable_gqa=True)),
    )


def flashinfer(batch: Any) -> Calls:
    """FlashInfer's ragged or paged wrapper, planned beforehand, with its Hopper and its older
    kernels."""
    torch, case = require_torch(), batch.case
    fi = imported("flashinfer", "FlashInfer")
    if fi is None or case.variant not in LIBRARY_VARIANTS:
        return
    how: dict[str, Any] = {"causal": case.variant != "full", "q_data_type": batch.q.dtype}
    if case.variant == "window":
        how["window_left"] = batch.window - 1
    if case.variant == "softcap":
        how["logits_soft_cap"] = batch.soft_cap
    heads, (d, d_vo) = (batch.q.shape[1], batch.k.shape[1]), case.dims
    for backend in ("fa3", "fa2"):
        space = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.q.device)
        if case.page_size:
            last = torch.full_like(batch.lengths(), case.page_size)
            counts = torch.tensor([0, *case.keys]).cumsum(0) // case.page_size
            names, counts = batch.names, counts.int().to(batch.q.device)
            paged = fi.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=backend)
            paged.plan(
                batch.indptr(),
                counts.int().to(batch.q.device),
                names,
                last,
                *heads,
                d,
                case.page_size,
                **how,
            )
            pages = tuple(batch.pages)
            yield (
                f"flashinfer paged, {backend}",
                lambda w=paged, pages=pages: w.run(batch.q, pages),
            )
        else:
            ragged = fi.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD", backend=backend)
            ragged.plan(batch.indptr(), batch.key_indptr(), *heads, d, d_vo, **how)
            yield (
                f"flashinfer ragged, {backend}",
                lambda w=ragged: w.run(batch.q, batch.k, batch.v),
            )


PEERS: dict[str, Callable[[Any], Calls]] = {
    "fa3": flash_attention_3, "fa4": flash_attention_4, "sdpa": sdpa, "flex": flex,
    "flashinfer": flashinfer,
}  # fmt: skip
