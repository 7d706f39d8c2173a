"""Happens-before order of memory accesses: who read, wrote and updated each element of an array,
and which asynchronous copies are under way.

Two accesses are ordered when one thread makes both, or when a barrier of their CTA is between them,
or one of their group of lanes. Threads of different CTAs of a launch are never ordered. A CTA has
an *epoch*, the number of its barriers so far, and a group of lanes a *step*, the number of its own:
accesses of two threads of a CTA are ordered exactly when their epochs differ, or when the threads
are of one group and their steps differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Copy = tuple[np.ndarray, np.ndarray, np.ndarray]  # elements and values, (threads, n); their threads
NONE, MANY = -1, -2  # in place of a lane or of a unit
_CONFLICTS = {
    "read": ("write", "update"),
    "update": ("write", "read"),  # atomic updates do not conflict with each other
    "write": ("write", "read", "update"),
}


class History:
    """The latest access of each kind to each element of a buffer: its lane (the thread's number in
    the launch), its unit (the CTA), its epoch (how many barriers of the CTA the thread had passed),
    its group of lanes and its step (how many barriers of the group).

    One access of a kind is enough: what a barrier orders after the latest is after the others."""

    def __init__(self, size: int) -> None:
        self.latest = {kind: np.full((5, size), NONE, np.int32) for kind in _CONFLICTS}

    def record(self, kind: str, at: np.ndarray, who: np.ndarray) -> tuple[int, str] | None:
        """Records accesses to the elements `at` by `who` (lane, unit, epoch, group, step of each).
        Returns the number of an access that conflicts with an unordered one, and the kind of that
        one."""
        lane, unit, epoch, group, step = who

        def unordered(seen: np.ndarray) -> np.ndarray:
            """Whether another lane of the unit made the accesses seen, and nothing is between."""
            l, u, e, g, s = seen
            return (u == unit) & (e == epoch) & (l != lane) & ((g != group) | (s == step))

        for other in _CONFLICTS[kind]:
            seen = self.latest[other].take(at, 1)
            clash = (seen[1] != NONE) & (seen[1] != unit) | unordered(seen)
            if clash.any():
                return int(clash.argmax()), other
        latest = self.latest[kind]
        before = latest.take(at, 1)
        lanes, units = unordered(before), (before[1] != NONE) & (before[1] != unit)
        latest[:, at] = who
        last = latest.take(at, 1)  # of an element that `at` lists twice: the last access
        groups = (lanes & (before[3] != group)) | (last[3] != group)
        lanes, units = lanes | (last[0] != lane), units | (last[1] != unit)
        if kind == "write" and (lanes | units).any():
            return int((lanes | units).argmax()), "write"
        for row, several in (0, lanes), (1, units), (3, groups):
            latest[row, at[several]] = MANY
        return None


class Flights:
    """Asynchronous copies, from the moment when threads start them until they wait for their
    groups."""

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
