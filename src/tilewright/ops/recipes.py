"""Schedules that several operators share: rows in parallel, elements in vectors or threads."""

from __future__ import annotations

from typing import Any

from tilewright.build import named_recipe
from tilewright.schedule import Schedule
from tilewright.toolchain import compilers

THREADS_X, THREADS_Y = 32, 8  # a CTA that works on one row: a warp for the sums, eight of them


def cpu_lanes() -> int:
    """float32 lanes of this CPU's vectors."""
    return compilers.vector_bits() // 32


@named_recipe
def rows(s: Schedule, row: str, elements: tuple[str, ...]) -> Schedule:
    """Each row a unit; the loops over its elements (sums too) in vectors on a CPU, threads on a
    GPU."""
    if s.target.is_cuda:
        s = s.bind(row, "cta.x")
        for e in elements:
            s = s.split(e, THREADS_X * THREADS_Y, into=(f"{e}_o", f"{e}_r"))
            s = s.split(f"{e}_r", THREADS_X, into=(f"{e}_y", f"{e}_x"))
            s = s.bind(f"{e}_y", "thread.y").bind(f"{e}_x", "thread.x")
        return s
    s = s.parallel(row)
    for e in elements:
        s = vectors(s, e)
    return s


def vectors(s: Schedule, loop: str) -> Schedule:
    """A loop in vectors, what is left over one by one."""
    return s.split(loop, cpu_lanes(), tail="cut", into=(f"{loop}_o", f"{loop}_v")).vectorize(
        f"{loop}_v"
    )


def fixed_width(width: int, device: str) -> int:
    """The width that a kernel is made for; 0 for one that takes any."""
    if device != "cpu":
        return width
    return width if width % 16 == 0 and 0 < width <= 1024 else 0


def dtype_name(array: Any) -> str:
    """The name of an array's dtype in any framework; float32 for what is no array."""
    return str(getattr(array, "dtype", "float32")).rpartition(".")[2]
