"""Asynchronous copies of a launch that are under way: their groups, and what they will write."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Copy = tuple[np.ndarray, np.ndarray, np.ndarray]  # elements and values, (threads, n); their threads


class Flights:
    """Copies from the moment when threads start them until these threads wait for their groups."""

    def __init__(self, lanes: int) -> None:
        self.commits = np.zeros(lanes, np.int64)  # groups of each thread so far
        self.copies: list[tuple[str, np.ndarray, Copy]] = []  # array, group of each thread
        self.under_way: dict[str, np.ndarray] = {}  # for each element of an array

    def start(self, name: str, size: int, copy: Copy) -> None:
        at, _, lane = copy
        self.under_way.setdefault(name, np.zeros(size, bool))[at] = True
        self.copies.append((name, self.commits[lane], copy))

    def commit(self, running: np.ndarray) -> None:
        self.commits[running] += 1

    def landed(
        self, running: np.ndarray, pending: int
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        """(array, elements, values, threads) of the copies that the running threads wait for: all
        of their groups but the latest `pending`."""
        left = []
        for name, group, (at, value, lane) in self.copies:
            done = running[lane] & (group < self.commits[lane] - pending)
            if done.any():
                self.under_way[name][at[done]] = False
                yield name, at[done], value[done], lane[done]
            if not done.all():
                left.append((name, group[~done], (at[~done], value[~done], lane[~done])))
        self.copies = left

    def touches(self, name: str, at: np.ndarray) -> bool:
        """Whether a copy to one of these elements is under way."""
        return name in self.under_way and bool(self.under_way[name][at].any())
