"""Rotary position embedding, and writing keys and values into the pages of a KV cache.

The elements of a head are pairs; pair p of the token at position s rotates by s · base^(-2p/d). The
elements of a pair are neighbours (`interleaved`), or half a head from each other. Tables of cosines
and sines are computed once, in float64. Source: Su et al., RoFormer (2021), §3.4.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tilewright.build import named_recipe, program
from tilewright.ir.nodes import equal
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out, update, where


def _rotated(mine: Any, other: Any, e: Any, cosine: Any, sine: Any) -> Any:
    """Element e of a rotated pair (x0 cos − x1 sin, x0 sin + x1 cos), from it and its partner."""
    return mine * cosine + where(equal(e, 0), -1.0, 1.0) * other * sine


@program
def rope_pairs(
    X=dense("t h p 2"), C=dense("s p", kind="weight"), S=dense("s p", kind="weight"),
    P=dense("t", "int32"),
):  # fmt: skip
    t, h, p, e = indices("t:t h:h p:p e:2")
    return out[t, h, p, e](_rotated(X[t, h, p, e], X[t, h, p, 1 - e], e, C[P[t], p], S[P[t], p]))


@program
def rope_halves(
    X=dense("t h 2 p"), C=dense("s p", kind="weight"), S=dense("s p", kind="weight"),
    P=dense("t", "int32"),
):  # fmt: skip
    t, h, e, p = indices("t:t h:h e:2 p:p")
    return out[t, h, e, p](_rotated(X[t, h, e, p], X[t, h, 1 - e, p], e, C[P[t], p], S[P[t], p]))


@program
def append_pairs(
    K=dense("g f h p 2", kind="kv"), X=dense("t h p 2"), C=dense("s p", kind="weight"),
    S=dense("s p", kind="weight"), P=dense("t", "int32"), page=dense("t", "int32"),
    slot=dense("t", "int32"),
):  # fmt: skip
    t, h, p, e = indices("t:t h:h p:p e:2")
    return update(K)[page[t], slot[t], h, p, e](
        _rotated(X[t, h, p, e], X[t, h, p, 1 - e], e, C[P[t], p], S[P[t], p])
    )


@program
def append_halves(
    K=dense("g f h 2 p", kind="kv"), X=dense("t h 2 p"), C=dense("s p", kind="weight"),
    S=dense("s p", kind="weight"), P=dense("t", "int32"), page=dense("t", "int32"),
    slot=dense("t", "int32"),
):  # fmt: skip
    t, h, e, p = indices("t:t h:h e:2 p:p")
    return update(K)[page[t], slot[t], h, e, p](
        _rotated(X[t, h, e, p], X[t, h, 1 - e, p], e, C[P[t], p], S[P[t], p])
    )


@program
def append_plain(
    V=dense("g f h d", kind="kv"), X=dense("t h d"), page=dense("t", "int32"),
    slot=dense("t", "int32"),
):  # fmt: skip
    t, h, d = indices("t:t h:h d:d")
    return update(V)[page[t], slot[t], h, d](X[t, h, d])


@named_recipe
def by_token(s: Schedule) -> Schedule:
    if not s.target.is_cuda:
        return s.parallel("t")
    inner = "d" if s.has("d") else "p"
    s = s.reorder("t", "h", "e", inner) if s.has("e") else s
    s = s.bind("t", "cta.y").bind("h", "cta.x")
    return s.split(inner, 32, into=("x_o", "x_i")).bind("x_i", "thread.x")


ROPE_PAIRS, ROPE_HALVES, APPEND_PAIRS, APPEND_HALVES, APPEND = (
    p.schedule(by_token)
    for p in (rope_pairs, rope_halves, append_pairs, append_halves, append_plain)
)


@cache
def rope_kernel(interleaved: bool, target: str = "cpp") -> Kernel:
    """X (t, h, p, 2) or (t, h, 2, p), C and S (positions, p), P (t,) → X rotated."""
    return (ROPE_PAIRS if interleaved else ROPE_HALVES).build(target)


@cache
def rope_append_kernel(interleaved: bool, target: str = "cpp") -> Kernel:
    """Rotates keys and writes them to `page[t], slot[t]` of the pages (g, f, h, …)."""
    return (APPEND_PAIRS if interleaved else APPEND_HALVES).build(target)


@cache
def append_kernel(target: str = "cpp") -> Kernel:
    """Writes values to `page[t], slot[t]` of the pages (g, f, h, d)."""
    return APPEND.build(target)


def rope_tables(
    positions: int, head_dim: int, base: float, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 (positions, head_dim / 2). Positions are divided by `scale`."""
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(positions)[:, None] / scale * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
