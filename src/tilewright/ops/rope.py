"""Rotary position embedding, and writing keys and values into the pages of a KV cache.

The elements of a head are pairs; pair p of the token at position s rotates by s · base^(-2p/d). The
elements of a pair are neighbours (`interleaved`), or half a head from each other. Tables of cosines
and sines are computed once, in float64. Source: Su et al., RoFormer (2021), §3.4.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from tilewright.build import Definition, named_recipe, program, program_of
from tilewright.ir.nodes import equal
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse.trace import dense, indices, out, update, where

_SLOTS = {"page": dense("t", "int32"), "slot": dense("t", "int32")}


def _program(halves: bool, append: bool, dtype: str = "float32") -> Definition:
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
            return out.typed(dtype)[t, h, *pair](x)
        return update(K)[page[t], slot[t], h, *pair](x)

    name = f"{'append' if append else 'rope'}_{'halves' if halves else 'pairs'}"
    return program_of(name, parameters, rotated)


@program
def append_plain(
    V=dense("g f h d", kind="kv"), X=dense("t h d"), page=_SLOTS["page"], slot=_SLOTS["slot"]
):
    t, h, d = indices("t:t h:h d:d")
    return update(V)[page[t], slot[t], h, d](X[t, h, d])


HEADS = 4  # of one CTA


@named_recipe
def by_token(s: Schedule, width: int = 0) -> Schedule:
    """Tokens in parallel; on a GPU heads too. `width`: of the neighbours in memory of a head, of
    which a thread takes four, if it is a multiple; 0: any."""
    if not s.target.is_cuda:
        return s.parallel("t")
    inner, width = "d" if s.has("d") else "p", 0 if width % 4 else width
    s = s.specialize(inner, width) if width else s
    s = s.reorder("t", "h", "e", inner) if s.has("e") else s
    s = s.bind("t", "cta.y").split("h", 2 * HEADS if width else HEADS, into=("h_o", "h_y"))
    s = s.bind("h_o", "cta.x").bind("h_y", "thread.y")
    if width:
        s = s.split(inner, 4, into=("x_i", "x_v")).vectorize("x_v")
    else:
        s = s.split(inner, 32, into=("x_o", "x_i"))
    return s.bind("x_i", "thread.x")


@cache
def rope_kernel(
    interleaved: bool, target: str = "cpp", dtype: str = "float32", stored: str = "float32",
    head_dim: int = 0, append: bool = False,
) -> Kernel:  # fmt: skip
    """X (t, h, p, 2) or (t, h, 2, p) in `stored`, C and S (positions, p), P (t,) → X rotated, in
    `dtype`; with `append` that of token t goes to K[page[t], slot[t]] of the pages. `head_dim`: of
    the kernel (0: any)."""
    made = _program(not interleaved, append, "float32" if append else dtype).typed(X=stored)
    made = made.typed(K=dtype) if append else made
    return made.schedule(by_token.of(width=0 if interleaved else head_dim // 2)).build(target)


rope_append_kernel = partial(rope_kernel, append=True)


@cache
def append_kernel(
    target: str = "cpp", dtype: str = "float32", stored: str = "float32", head_dim: int = 0
) -> Kernel:
    """Builds the kernel that writes values to `page[t], slot[t]` of the pages (g, f, h, d)."""
    return append_plain.schedule(by_token.of(width=head_dim)).typed(V=dtype, X=stored).build(target)


@dataclass(frozen=True, slots=True)
class Rope:
    """The angles of a rotary embedding: position · base^(-2i/d) for pair i of a head of d.

    `kind`: frequencies may be scaled for contexts longer than the `original` one, in tokens.
    `linear` divides each by `factor`. `llama3` keeps those that turn more than `high` times in the
    original context, divides those that turn less than `low` times, and interpolates between them
    in the number of turns. `yarn` has the same two limits, but interpolates in the index of the
    pair; it multiplies cosines and sines by `gain` (0: 1 + ln(factor) / 10). Sources: Peng et al.,
    YaRN (2023), §3; the Llama 3.1 models.
    """

    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: float = 8192.0
    gain: float = 0.0
    KINDS: ClassVar = ("default", "linear", "llama3", "yarn")

    @property
    def is_usable(self) -> bool:
        """Whether the numbers are finite and give frequencies."""
        numbers = self.base, self.factor, self.low, self.high, self.original
        sensible = all(0 < x < 1e30 for x in numbers) and 0 <= self.gain < 1e30
        return sensible and (self.kind != "yarn" or self.base > 1) and self.low < self.high

    def tables(self, positions: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 (positions, head_dim / 2)."""
        frequencies = self.base ** (-np.arange(0, head_dim, 2) / head_dim)
        gain, kept = 1.0, np.float64(self.kind != "linear")
        if self.kind == "llama3":
            turns = self.original * frequencies / (2 * np.pi)
            kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        elif self.kind == "yarn":
            first, last = (  # the pairs that turn so often in the original context
                head_dim * math.log(self.original / (turns * 2 * math.pi), self.base) / 2
                for turns in (self.high, self.low)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
            ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
            kept = 1 - np.clip(ramp, 0, 1)
            gain = self.gain or 0.1 * math.log(max(self.factor, 1.0)) + 1
        angles = np.arange(positions)[:, None] * (frequencies * (kept + (1 - kept) / self.factor))
        cosines, sines = gain * np.cos(angles), gain * np.sin(angles)
        return cosines.astype(np.float32), sines.astype(np.float32)
