"""States of attention, and how two of them over disjoint keys become one.

A state is the output over some keys and the logarithm of their weights' sum. States merge in any
grouping to the same result, up to rounding; no keys at all is o = 0, lse = −inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """`o` (tokens, qo_heads, head_dim) and `lse` (tokens, qo_heads), float32; `lse` in natural log.

    Arrays are of the framework that the queries came from.
    """

    o: Any
    lse: Any

    def merge(self, *others: State) -> State:
        """The state over the keys of this one and of the others. Raises what `merge` raises."""
        return merge((self, *others))

    def __repr__(self) -> str:
        return f"State(o {tuple(self.o.shape)}, lse {tuple(self.lse.shape)})"


def empty(tokens: int, qo_heads: int, head_dim: int) -> State:
    """The state over no keys: merging with it changes nothing."""
    o = np.zeros((tokens, qo_heads, head_dim), np.float32)
    return State(o, np.full((tokens, qo_heads), -np.inf, np.float32))


def merge(states: Sequence[State]) -> State:
    """One state from states over disjoint keys (NumPy or torch arrays).

    Σ oᵢ·exp(lseᵢ − m) / Σ exp(lseᵢ − m) with m the largest lse; in order, so repeatable.
    Raises ArgumentError[A101, A103, A107].
    """
    for s in states if isinstance(states, Sequence) else (states,):
        if not isinstance(s, State):
            raise ArgumentError("A107", f"{type(s).__name__} is no State", where="states")
    if not states:
        raise ArgumentError("A101", "no states to merge", where="states", hint="merge.empty(…)")
    first = states[0]
    for n, s in enumerate(states):
        if s.o.shape != first.o.shape or s.lse.shape != s.o.shape[:-1]:
            raise ArgumentError(
                "A103",
                f"state {n} has o {tuple(s.o.shape)}, lse {tuple(s.lse.shape)}; "
                f"the first has o {tuple(first.o.shape)}",
                where="states",
            )
    if isinstance(first.o, np.ndarray):
        return _merged(states, np, np.where)
    import torch

    return _merged(states, torch, lambda c, a, b: torch.where(c, a, torch.full_like(a, b)))


def _merged(states: Sequence[State], lib: Any, where: Any) -> State:
    largest = states[0].lse
    for s in states[1:]:
        largest = lib.maximum(largest, s.lse)
    some = largest != -np.inf
    base = where(some, largest, 0.0)
    weight = lib.zeros_like(largest)
    total = lib.zeros_like(states[0].o)
    for s in states:
        w = lib.exp(s.lse - base)
        weight = weight + w
        total = total + s.o * w[..., None]
    safe = where(some, weight, 1.0)
    return State(total / safe[..., None], where(some, base + lib.log(safe), -np.inf))
