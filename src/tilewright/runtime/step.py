"""Recorded steps: the launches of many bound calls as one native call (DESIGN 15).

On the CPU a list of launches that the pool runs with a barrier after each. On a GPU a graph: what
each launch reads and writes says which must follow which; launches of kernels that depend on none
of each other become one, and each may start before the one in front has ended (programmatic
dependent launch), whose end it waits for itself.
"""

import ctypes
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError
from tilewright.ir.body import Body
from tilewright.runtime import cuda
from tilewright.runtime import pool as pools
from tilewright.runtime.kernel import Bound
from tilewright.runtime.launch import CompileStep, CpuLauncher, CudaLauncher
from tilewright.runtime.view import ordinal_of
from tilewright.target import Target

Box = tuple[int, int]
"""The first address of a range of memory, and the one behind its last."""

ANY: tuple[Box, ...] = ((0, 2**63 - 1),)  # what a launch touches that says nothing of its memory
PARAMS_BYTES = 4000  # of the parameters that launches together have: a kernel takes 4096 bytes
RESERVED = 1 << 10  # bytes of an SM's shared memory that each CTA takes beside its own
Edge = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A launch that a step may put beside others: `units` CTAs of a body with its parameters, and
    the macros that its code is compiled with, on GPU `ordinal`. `launch`: what runs it alone, if
    that is loaded."""

    body: Body
    params: Any
    units: int
    macros: tuple[str, ...]
    compile_step: CompileStep
    ordinal: int = 0
    launch: cuda.Launch | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One launch of a step with the memory that it reads and writes. `launch`: a `Part`, or a
    `runtime.cuda.Launch`."""

    name: str
    launch: Any
    reads: tuple[Box, ...]
    writes: tuple[Box, ...]


def hazards(nodes: Sequence[Node]) -> np.ndarray:
    """bool (n, n), true at (i, j) where node j follows node i in the list and both touch the same
    memory, which at least one of them writes."""
    ordered = np.zeros((len(nodes), len(nodes)), bool)
    reads, writes = _boxes([n.reads for n in nodes]), _boxes([n.writes for n in nodes])
    for a, b in ((writes, writes), (writes, reads), (reads, writes)):
        overlaps = (a[:, None, 0] < b[None, :, 1]) & (b[None, :, 0] < a[:, None, 1])
        i, j = overlaps.nonzero()
        ordered[a[i, 2], b[j, 2]] = True
    return np.triu(ordered, 1)


def _boxes(of_nodes: Sequence[tuple[Box, ...]]) -> np.ndarray:
    """Rows of (begin, end, number of the node); empty ranges are left out."""
    rows = [(*box, n) for n, boxes in enumerate(of_nodes) for box in boxes if box[0] < box[1]]
    return np.array(rows, np.int64).reshape(-1, 3)


def dependencies(nodes: Sequence[Node]) -> tuple[Edge, ...]:
    """The fewest edges (i, j), meaning that j waits for i, that order every hazard of the nodes."""
    ordered, before, edges = hazards(nodes), [0] * len(nodes), []
    for j in range(len(nodes)):
        for i in ordered[:, j].nonzero()[0].tolist()[::-1]:
            if not before[j] >> i & 1:  # not after i by another edge
                edges.append((i, j))
                before[j] |= before[i] | 1 << i
    return tuple(edges)


def levels(count: int, edges: Iterable[Edge]) -> list[int]:
    """The level of each node: one above the highest that it must follow."""
    level = [0] * count
    for i, j in sorted(edges, key=lambda edge: edge[1]):
        level[j] = max(level[j], level[i] + 1)
    return level


class Step:
    """A recorded step: calling it runs all of `bounds`, which belong to one device.

    Each of `bounds` is a `Bound`, a launch (`runtime.pool.Launch` or `runtime.cuda.Launch`), or an
    object with a launch, of ours or of a library, as `.launch` and the memory it reads and writes
    as `.boxes`. Without a C++
    compiler they are called one after the other. `overlaps`: a launch on a GPU may start before
    the one in front has ended. `count`: the number of launches of a run.
    """

    def __init__(self, bounds: Iterable[Any], overlaps: bool = True) -> None:
        self.keep: list[Any] = list(bounds) if hasattr(bounds, "__iter__") else [bounds]
        self.nodes: list[Node] = []
        self.edges: tuple[Edge, ...] = ()
        recorded = [_launches(b) for b in self.keep]
        flat = [launch for of_bound in recorded for launch in of_bound or ()]
        if None in recorded:
            self.count = len(self.keep)
            self._run = lambda: [bound() for bound in self.keep]
        elif any(isinstance(launch, tuple) for launch in flat) or not flat:
            self.count = len(flat)
            self._run = pools.pool().prepare(flat)
        else:
            self.nodes = flat
            self.edges = dependencies(flat)
            launches = self._launches(overlaps)
            self.count = len(launches)
            graph = cuda.Graph(launches)
            self._run = lambda: graph.launch(cuda.current_stream())

    def _launches(self, overlaps: bool) -> list[cuda.Launch]:
        """The launches of the graph, level by level."""
        level = levels(len(self.nodes), self.edges)
        launches: list[cuda.Launch] = []
        for of_level in range(max(level) + 1):
            nodes = [n.launch for n, at in zip(self.nodes, level, strict=True) if at == of_level]
            parts = [one for one in nodes if isinstance(one, Part) and not one.body.alone]
            launches += [getattr(one, "launch", one) for one in nodes if one not in parts]
            parts.sort(key=lambda part: part.launch is not None)  # programs first
            for begin, end in itertools.pairwise(_cuts(parts)):
                own = parts[begin].launch if end - begin == 1 else None
                launches.append(own or _together(tuple(parts[begin:end]), overlaps))
        return launches

    def __call__(self) -> None:
        """Run all launches; on a GPU on the current stream."""
        self._run()

    def __repr__(self) -> str:
        return f"<step of {self.count} launches>"


def _launches(bound: Any) -> Sequence[Any] | None:
    """The launches of a bound call: nodes on a GPU, plain launches on the CPU; None for one without
    native code. Raises ArgumentError."""
    if isinstance(bound, Bound):
        launcher = bound.kernel.launcher
        if isinstance(launcher, CudaLauncher):
            return _nodes(bound, launcher)
        if isinstance(launcher, CpuLauncher):
            return launcher.launches(bound.kernel, bound.frame)
        return None
    is_launch = isinstance(bound, cuda.Launch) or (isinstance(bound, tuple) and len(bound) == 5)
    if not is_launch and not hasattr(bound, "launch"):
        text = f"a step records bound calls, not {type(bound).__name__}"
        raise ArgumentError("A107", text, where="bounds", hint="kernel.bind(…)")
    launch = getattr(bound, "part", None) or getattr(bound, "launch", bound)
    if launch is None or isinstance(launch, tuple):
        return None if launch is None else (launch,)
    reads, writes = getattr(bound, "boxes", None) or (ANY, ANY)
    own = launch.launch if isinstance(launch, Part) else launch
    name = own.function.name if isinstance(own, cuda.Launch) else type(own).__name__
    return (Node(name, launch, reads, writes),)


def _nodes(bound: Bound, launcher: CudaLauncher) -> list[Node]:
    """A node for each launch of a kernel that has units."""
    boxes, frame, nodes = bound.boxes(), bound.frame, []
    for body, params, units in zip(launcher.bodies, frame.blocks, frame.units, strict=True):
        how = frame.variants, launcher.compile_step, ordinal_of(frame.device)
        part = Part(body, params, units, *how)
        reads, writes = (
            tuple(box for name in names for box in boxes.get(name, boxes[""]))
            for names in (body.reads, body.writes)
        )
        nodes += [Node(bound.kernel.manifest.name, part, reads, writes)] * (units > 0)
    return nodes


def _cuts(parts: Sequence[Part]) -> list[int]:
    """Divides launches into ranges that can become one launch: the parameters of a range fit a
    kernel, no body gets fewer registers because another one has more threads, and threads allow
    each the CTAs of an SM that its work is divided for; shared memory, what a body had alone."""
    cuts, used, last = [0], 0, ()
    sm = Target("cuda", cuda.device(parts[0].ordinal).arch).shared_bytes + RESERVED if parts else 0
    for i, part in enumerate(parts):
        size, bodies = len(part.params) + 8, (*last, part.body)
        ctas = min(b.resident for b in bodies) // max(b.threads for b in bodies)
        smem = max(b.smem_bytes for b in bodies) + RESERVED
        alone = (min(b.ctas, sm // (b.smem_bytes + RESERVED)) for b in bodies)
        fits = used + size <= PARAMS_BYTES and ctas >= max(1, *(b.ctas for b in bodies))
        fits = fits and sm >= smem * max(alone)
        if last and not fits:
            cuts.append(i)
            used, bodies = 0, (part.body,)
        used, last = used + size, bodies
    return [*cuts, len(parts)] if parts else []


def parameters(parts: Sequence[Part]) -> Any:
    """The bytes of the struct `Step` of `shell.beside`."""
    first = [0, *itertools.accumulate(p.units for p in parts)][:-1]
    data = b"".join(bytes(p.params) for p in parts) + np.array(first, np.int64).tobytes()
    return ctypes.create_string_buffer(data, len(data))


def _together(parts: tuple[Part, ...], overlaps: bool) -> cuda.Launch:
    """One launch of several parts, each on its own CTAs."""
    bodies = tuple(p.body for p in parts)
    macros = tuple(sorted({m for p in parts for m in p.macros}))
    function = _function(parts[0].compile_step, bodies, macros, parts[0].ordinal)
    return function.prepare(
        (sum(p.units for p in parts), 1, 1), (max(b.threads for b in bodies), 1, 1),
        max(b.smem_bytes for b in bodies), parameters(parts), overlaps,
    )  # fmt: skip


@functools.lru_cache(256)
def _function(compile_step: Any, bodies: Any, macros: tuple[str, ...], ordinal: int) -> Any:
    """Loads one function that runs several bodies side by side. Raises BuildError."""
    return cuda.Module(compile_step(bodies, macros), ordinal).function("step")
