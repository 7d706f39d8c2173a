"""FlashInfer's calls for one request, and its wrapper for prefixes that requests share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tilewright.errors import ArgumentError
from tilewright.ext.compat.pages import merge_states
from tilewright.ext.compat.signatures import accepts
from tilewright.ext.compat.wrappers import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)

_PLAN = "custom_mask packed_custom_mask causal pos_encoding_mode sm_scale window_left "
_SHARED = _PLAN + "logits_soft_cap"


@accepts("single_decode")
def single_decode_with_kv_cache(g: SimpleNamespace) -> Any:
    """o (heads, head_dim) of one query `q` (heads, head_dim), with return_lse also lse (heads,)."""
    g.q, g.backend, g.o_dtype = g.q[None], "auto", None
    found = _single(g)
    return (found[0][0], found[1][0]) if g.return_lse else found[0]


@accepts("single_prefill")
def single_prefill_with_kv_cache(g: SimpleNamespace) -> Any:
    """o (tokens, heads, head_dim_vo) of the queries of one request, with return_lse also lse."""
    return _single(g)


def single_prefill_with_kv_cache_return_lse(*args: Any, **kwargs: Any) -> Any:
    """`single_prefill_with_kv_cache` with return_lse=True."""
    return single_prefill_with_kv_cache(*args, **kwargs, return_lse=True)


def _single(g: SimpleNamespace) -> Any:
    options, kv_len = vars(g), g.k.shape[0 if g.kv_layout == "NHD" else 1]
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(g.q, g.kv_layout, backend=g.backend)
    rows, keys = (torch.tensor([0, n], dtype=torch.int32) for n in (len(g.q), kv_len))
    wrapper.plan(
        rows, keys, g.q.shape[1], g.k.shape[1 if g.kv_layout == "NHD" else 0], g.k.shape[-1],
        head_dim_vo=g.v.shape[-1], q_data_type=g.q.dtype, kv_data_type=g.k.dtype,
        o_data_type=g.o_dtype, **{n: options[n] for n in _SHARED.split() if n in options},
    )  # fmt: skip
    scales = {n: options[n] for n in ("q_scale", "k_scale", "v_scale") if n in options}
    return wrapper.run(g.q, g.k, g.v, **scales, return_lse=g.return_lse)


class MultiLevelCascadeAttentionWrapper:
    """Prefixes of any depth: level i holds the keys that the rows of each of its groups share, the
    last level those of single requests. One run a level, and a merge."""

    @accepts("cascade")
    def __init__(self, g: SimpleNamespace) -> None:
        if not isinstance(g.num_levels, int) or g.num_levels < 1:
            raise ArgumentError("A103", f"num_levels={g.num_levels!r}", where="num_levels")
        names = ["qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"]
        arrays = [getattr(g, f"{n}_buf_arr") or [None] * g.num_levels for n in names]
        self.is_cuda_graph_enabled = bool(g.use_cuda_graph)
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                g.float_workspace_buffer, g.kv_layout, g.use_cuda_graph, *(a[i] for a in arrays)
            )
            for i in range(g.num_levels)
        ]

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffers: Any
    ) -> None:
        """Nothing: plans own their memory."""

    @accepts("cascade.plan")
    def plan(self, g: SimpleNamespace) -> None:
        """Plan each level; only the last one is causal. Raises ArgumentError: A101 also for options
        that need positions across levels, which FlashInfer counts anew in each."""
        names = "qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr paged_kv_last_page_len"
        arrays = [getattr(g, name) for name in names.split()]
        several = len(self._levels) > 1
        for name, array in zip(names.split(), arrays, strict=True):
            if len(array) != len(self._levels):
                text = f"{name} holds {len(array)} arrays for {len(self._levels)} levels"
                raise ArgumentError("A103", text, where=name)
        if several and (g.window_left >= 0 or g.pos_encoding_mode != "NONE"):
            name = "window_left" if g.window_left >= 0 else "pos_encoding_mode"
            raise ArgumentError("A101", f"{name} with {len(self._levels)} levels", where=name)
        for i, level in enumerate(self._levels):
            level.plan(
                *(a[i] for a in arrays), g.num_qo_heads, g.num_kv_heads, g.head_dim, g.page_size,
                causal=g.causal and i == len(self._levels) - 1, sm_scale=g.sm_scale,
                pos_encoding_mode=g.pos_encoding_mode, window_left=g.window_left,
                logits_soft_cap=g.logits_soft_cap, q_data_type=g.q_data_type,
                kv_data_type=g.kv_data_type,
            )  # fmt: skip

    def run(self, q: torch.Tensor, paged_kv_cache: Any) -> torch.Tensor:
        """o (tokens, heads, head_dim). Raises ArgumentError."""
        states = [level.run(q, paged_kv_cache, return_lse=True) for level in self._levels]
        v, s = (torch.stack(parts, 1) for parts in zip(*states, strict=True))
        return merge_states(v, s)[0]

    begin_forward, forward = plan, run

    def end_forward(self) -> None:
        """Nothing: the next plan replaces this one."""
