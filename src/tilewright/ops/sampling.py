"""The likeliest next token: argmax of each row."""

from __future__ import annotations

from functools import cache

from tilewright.build import named_recipe, program
from tilewright.ops import recipes
from tilewright.schedule import Schedule
from tilewright.sparse import trace
from tilewright.sparse.trace import dense, indices, out, where

NONE = 2**31 - 1


@program
def argmax(X=dense("t v")):
    t, v = indices("t:t v:v")
    peak = trace.max_(X[t, v], over=v)
    # `<`, not `>=`: at least one element is not below the peak, also if a logit is NaN.
    return out[t](trace.min_(where(X[t, v] < peak, NONE, v), over=v))


@named_recipe
def by_row(s: Schedule) -> Schedule:
    """A row is read by one CTA of a GPU: as many threads as it can have, each with several loads
    under way."""
    s = recipes.rows.of(row="t", elements=("v", "v2"), threads_y=32)(s)
    return s.unroll("v_o", 8).unroll("v2_o", 8) if s.target.is_cuda else s


ARGMAX = argmax.schedule(by_row)

# X (t, v) → the smallest index of the largest value of each row, int32 (t,). A row with NaN gives
# some index of it.
argmax_kernel = cache(ARGMAX.build)
