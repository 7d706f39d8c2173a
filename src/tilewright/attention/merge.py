"""States of attention, and how two of them over disjoint keys become one.

A state is the output over some keys and the logarithm of their weights' sum. States merge in any
grouping to the same result, up to rounding; no keys at all is o = 0, lse = −inf.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError, MissingExtra


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """`o` (tokens, qo_heads, head_dim) and `lse` (tokens, qo_heads), float32; `lse` in natural log.

    Arrays are of the framework that the queries came from.
    """

    o: Any
    lse: Any

    def merge(self, *others: State) -> State:
        """The state over the keys of this one and of the others. Raises describe `merge` raises."""
        return merge((self, *others))

    def __repr__(self) -> str:
        return f"State(o {tuple(self.o.shape)}, lse {tuple(self.lse.shape)})"


def empty(tokens: int, qo_heads: int, head_dim: int) -> State:
    """The state over no keys: merging with it changes nothing."""
    o = np.zeros((tokens, qo_heads, head_dim), np.float32)
    return State(o, np.full((tokens, qo_heads), -np.inf, np.float32))


def merge(states: Sequence[State]) -> State:
    """One state from states over disjoint keys (all NumPy or all torch, of one dtype and shape).

    Σ oᵢ·exp(lseᵢ − m) / Σ exp(lseᵢ − m) with m the largest lse; in order, so repeatable. Where
    lseᵢ = −inf, oᵢ is not read: it may hold anything.
    Raises ArgumentError[A101, A102, A103, A105, A107], MissingExtra[E101].
    """
    for s in states if isinstance(states, Sequence) else (states,):
        if not isinstance(s, State):
            raise ArgumentError("A107", f"{type(s).__name__} is no State", where="states")
    if not states:
        raise ArgumentError("A101", "no states to merge", where="states", hint="merge.empty(…)")
    lib = _library(states)
    for n, s in enumerate(states):
        _check_like_first(n, s, states[0], lib)
    if lib is np:
        with np.errstate(invalid="ignore"):  # NaN where nothing is read
            return _merged(states, np, np.where)
    return _merged(states, lib, lambda c, a, b: lib.where(c, a, lib.full_like(a, b)))


def _library(states: Sequence[State]) -> Any:
    """numpy or torch: whose arrays the states are. Raises ArgumentError[A107], MissingExtra."""
    arrays = [x for s in states for x in (s.o, s.lse)]
    if all(isinstance(x, np.ndarray) for x in arrays):
        return np
    torch = sys.modules.get("torch")
    if torch is not None and all(isinstance(x, torch.Tensor) for x in arrays):
        return torch
    kinds = ", ".join(sorted({type(x).__name__ for x in arrays}))
    if not any(isinstance(x, np.ndarray) for x in arrays) and find_spec("torch") is None:
        raise MissingExtra(
            "E101",
            f"merging states of {kinds} needs torch",
            where="states",
            hint="pip install tilewright[torch], and give q and the cache as torch tensors",
        )
    raise ArgumentError(
        "A107", f"states of {kinds}", where="states", hint="all NumPy arrays, or all torch tensors"
    )


def _check_like_first(n: int, s: State, first: State, lib: Any) -> None:
    describe = f"state {n} has o {{}}, lse {{}}; the first has o {{}}, lse {{}}".format
    arrays = (s.o, s.lse, first.o, first.lse)
    if s.o.shape != first.o.shape or s.lse.shape != s.o.shape[:-1]:
        shapes = describe(*(tuple(x.shape) for x in arrays))
        raise ArgumentError("A103", shapes, where="states")
    floats = all(
        x.dtype.kind == "f" if lib is np else x.dtype.is_floating_point for x in (s.o, s.lse)
    )
    if not floats or (s.o.dtype, s.lse.dtype) != (first.o.dtype, first.lse.dtype):
        raise ArgumentError(
            "A102",
            describe(*(x.dtype for x in arrays)),
            where="states",
            hint="the same float types in all states",
        )
    if lib is not np and len({x.device for x in arrays}) > 1:
        raise ArgumentError("A105", describe(*(x.device for x in arrays)), where="states")


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
        total = total + where((s.lse != -np.inf)[..., None], s.o, 0.0) * w[..., None]
    safe = where(some, weight, 1.0)
    return State(total / safe[..., None], where(some, base + lib.log(safe), -np.inf))
