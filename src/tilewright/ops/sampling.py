"""Choosing the next token: argmax, and sampling at a temperature by the Gumbel-max trick.

argmax(x / T + g) with g Gumbel noise is a sample of softmax(x / T) (Gumbel, 1954): no sum, no sort.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tilewright.build import named_recipe, program
from tilewright.ops import recipes
from tilewright.runtime.kernel import Kernel
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out, scalar, where

NONE = 2**31 - 1


@program
def argmax(X=dense("t v")):
    t, v = indices("t:t v:v")
    peak = trace.max_(X[t, v], over=v)
    # `<`, not `>=`: at least one element is not below the peak, also if a logit is NaN.
    return out[t](trace.min_(where(X[t, v] < peak, NONE, v), over=v))


@program
def sample(X=dense("t v"), G=dense("t v"), warmth=scalar()):
    t, v = indices("t:t v:v")
    score = X[t, v] * warmth[()] + G[t, v]
    peak = trace.max_(score, over=v)
    return out[t](trace.min_(where(score < peak, NONE, v), over=v))


@named_recipe
def by_row(s: Schedule) -> Schedule:
    """A row is read by one CTA of a GPU: as many threads as it can have, each with several loads
    under way."""
    s = recipes.rows.of(row="t", elements=("v", "v2"), threads_y=32)(s)
    return s.unroll("v_o", 8).unroll("v2_o", 8) if s.target.is_cuda else s


ARGMAX = argmax.schedule(by_row)
SAMPLE = sample.schedule(by_row)


@cache
def argmax_kernel(target: str = "cpp") -> Kernel:
    """X (t, v) → the smallest index of the largest value of each row, int32 (t,). A row with NaN
    gives some index of it."""
    return ARGMAX.build(target)


@cache
def sample_kernel(target: str = "cpp") -> Kernel:
    """X (t, v), Gumbel noise (t, v), 1 / temperature → tokens int32 (t,)."""
    return SAMPLE.build(target)


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gumbel noise, float32."""
    return rng.gumbel(size=shape).astype(np.float32)
