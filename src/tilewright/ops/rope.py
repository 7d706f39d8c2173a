"""Rotary position embedding, and writing keys and values into the pages of a KV cache.

The elements of a head are pairs; pair p of the token at position s rotates by s · base^(-2p/d). The
elements of a pair are neighbours (`interleaved`), or half a head from each other. Tables of cosines
and sines are computed once, in float64. Source: Su et al., RoFormer (2021), §3.4.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tilewright.build import Definition, named_recipe, program, program_of
from tilewright.ir.nodes import equal
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out, update, where

_SLOTS = {"page": dense("t", "int32"), "slot": dense("t", "int32")}


def _program(halves: bool, append: bool) -> Definition:
    """Pair (x0, x1) → (x0 cos − x1 sin, x0 sin + x1 cos); with `append` into the pages K."""
    head = "2 p" if halves else "p 2"
    table, positions = dense("s p", kind="weight"), dense("t", "int32")
    parameters = {"X": dense(f"t h {head}"), "C": table, "S": table, "P": positions}
    if append:
        parameters = {"K": dense(f"g f h {head}", kind="kv"), **parameters, **_SLOTS}

    def rotated(X, C, S, P, K: Any = None, page: Any = None, slot: Any = None):
        t, h, *pair = indices("t:t h:h e:2 p:p" if halves else "t:t h:h p:p e:2")
        e, p = pair if halves else reversed(pair)
        partner = (1 - e, p) if halves else (p, 1 - e)
        sign = where(equal(e, 0), -1.0, 1.0)
        x = X[t, h, *pair] * C[P[t], p] + sign * X[t, h, *partner] * S[P[t], p]
        if not append:
            return out[t, h, *pair](x)
        return update(K)[page[t], slot[t], h, *pair](x)

    name = f"{'append' if append else 'rope'}_{'halves' if halves else 'pairs'}"
    return program_of(name, parameters, rotated)


@program
def append_plain(
    V=dense("g f h d", kind="kv"), X=dense("t h d"), page=_SLOTS["page"], slot=_SLOTS["slot"]
):
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


ROPE_PAIRS, ROPE_HALVES, APPEND_PAIRS, APPEND_HALVES = (
    _program(halves, append).schedule(by_token)
    for append in (False, True)
    for halves in (False, True)
)
APPEND = append_plain.schedule(by_token)


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
