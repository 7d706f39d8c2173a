"""The stored coordinates of a sparse structure: search, and join with the points of a box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def keys_of(shape: Sequence[int], coords: Sequence[Any]) -> np.ndarray:
    """Coordinates as single numbers, in row-major order."""
    key = np.zeros((), np.int64)
    for n, c in zip(shape, coords, strict=True):
        key = key * n + c
    return key


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The stored coordinates of a sparse structure, one int64 array a dimension: distinct, in
    row-major order."""

    shape: tuple[int, ...]
    coords: tuple[np.ndarray, ...]
    keys: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", keys_of(self.shape, self.coords))

    @property
    def count(self) -> int:
        return len(self.coords[0])

    def find(self, coords: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(index of the entry at each coordinate, whether it exists). At least one is stored."""
        inside = np.ones((), bool)
        for c, n in zip(coords, self.shape, strict=True):
            inside = inside & (c >= 0) & (c < n)
        wanted = keys_of(self.shape, [np.where(inside, c, 0).astype(np.int64) for c in coords])
        at = np.searchsorted(self.keys[:-1], wanted)  # the last one if no other
        return at, inside & (self.keys[at] == wanted)

    def below(self, bound: Mapping[int, np.ndarray], points: int) -> tuple[np.ndarray, np.ndarray]:
        """(point, entry) of all pairs in which an entry has the coordinates of a point. `bound`:
        these coordinates, (points,) by dimension; every entry where it is empty. Points ascend,
        then entries."""
        shape = [self.shape[d] for d in bound]
        keys = np.broadcast_to(keys_of(shape, [self.coords[d] for d in bound]), self.count)
        order = np.argsort(keys, kind="stable")
        wanted = np.broadcast_to(keys_of(shape, list(bound.values())), points)
        low, high = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
        point = np.repeat(np.arange(len(wanted)), high - low)
        rank = np.arange(len(point)) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
        return point, order[np.repeat(low, high - low) + rank]
