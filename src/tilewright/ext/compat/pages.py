"""FlashInfer's functions for pages and states, on tensors of a CPU or a GPU."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.attention.merge import State, merge
from tilewright.errors import ArgumentError
from tilewright.ext.compat.problem import LOG2_E
from tilewright.ext.compat.signatures import accepts


def get_seq_lens(
    kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Keys of each request (batch,): full pages and the last one; 0 where it has no page."""
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0).to(torch.int32)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each appended row (nnz,) int32: the last rows of `seq_lens` keys.

    Rows from append_indptr[-1] on belong to no request: −1 and 0.
    """
    row = torch.arange(nnz, dtype=torch.int32, device=append_indptr.device)
    request = torch.searchsorted(append_indptr.contiguous(), row, right=True) - 1
    inside = row < append_indptr[-1]
    position = (seq_lens - append_indptr[1:])[torch.where(inside, request, 0)] + row
    found = torch.where(inside, request, -1), torch.where(inside, position, 0)
    outs = []
    for name, out, value in zip(
        ("batch_indices", "positions"), (batch_indices, positions), found, strict=True
    ):
        if out is not None and (out.shape != (nnz,) or out.dtype != torch.int32):
            text = f"{name} is {out.dtype} of shape {tuple(out.shape)}"
            raise ArgumentError("A103", text, where=name, hint=f"int32 of shape ({nnz},)")
        outs.append(value.to(torch.int32) if out is None else out.copy_(value))
    return outs[0], outs[1]


@accepts("append")
def append_paged_kv_cache(g: Any) -> None:
    """Write rows of keys and values into the pages of their requests, in place.

    Row i goes to position positions[i] of request batch_indices[i]; a negative request is skipped.
    No host work: usable while a CUDA graph is captured. Raises ArgumentError (A102, A103, A107).
    """
    from tilewright.ext import torch_ops

    k, v = halves(g.paged_kv_cache, g.kv_layout)
    table = [g.kv_indptr, g.kv_indices]
    torch_ops.append(k, v, g.append_key, g.append_value, g.batch_indices, g.positions, table)


def halves(cache: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a paged cache as views (pages, page_size, heads, head_dim). Raises A103, A107."""
    if layout not in ("NHD", "HND"):
        raise ArgumentError("A107", f"kv_layout={layout!r}", where="kv_layout", hint="NHD or HND")
    if isinstance(cache, (tuple, list)) and len(cache) == 2:
        k, v = cache
    elif isinstance(cache, torch.Tensor) and cache.ndim == 5 and cache.shape[1] == 2:
        k, v = cache.unbind(1)
    else:
        text = f"paged_kv_cache is a {type(cache).__name__} of shape {getattr(cache, 'shape', '')}"
        hint = "(k, v), or one tensor (pages, 2, …)"
        raise ArgumentError("A103", text, where="paged_kv_cache", hint=hint)
    return (k, v) if layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


# ---------------------------------------------------------------------------- states


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the keys of both; lse to base 2. Raises ArgumentError (A102 … A107)."""
    return _merged([v_a, v_b], [s_a, s_b])


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Merge another state into (v, s), for the rows where `mask` (rows,) is true or absent."""
    o, lse = _merged([v, v_other], [s, s_other], mask)
    v.copy_(o)
    s.copy_(lse if mask is None else torch.where(mask[:, None], lse, s))


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the keys of all: `v` (rows, states, heads, head_dim), `s` (rows, states,
    heads) to base 2."""
    if v.ndim != 4 or s.shape != v.shape[:3]:
        text = f"v is {tuple(v.shape)}, s {tuple(s.shape)}"
        raise ArgumentError("A103", text, where="v", hint="(rows, states, heads, head_dim)")
    return _merged(list(v.unbind(1)), list(s.unbind(1)))


def _merged(v: list[Any], s: list[Any], mask: Any = None) -> tuple[Any, Any]:
    """Merge by `tilewright.merge`, with its natural logarithms in between."""
    merged = merge(
        [State(o.contiguous(), lse.contiguous() / LOG2_E) for o, lse in zip(v, s, strict=True)],
        mask=mask,
    )
    return merged.o, merged.lse.mul_(LOG2_E)
