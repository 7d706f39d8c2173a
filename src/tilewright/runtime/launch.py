"""Launch frames on the thread pool or on a GPU's stream, and recorded steps of many launches.

The launches of a frame are plain data (`launches`), so that a recorded step can put those of many
kernels into one native call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tilewright.errors import ArgumentError
from tilewright.runtime import cuda
from tilewright.runtime import pool as pools
from tilewright.runtime.frame import Frame
from tilewright.runtime.kernel import Bound, Kernel, Launcher

CHUNKS_PER_THREAD = 8  # enough for units of uneven size to even out, few enough to cost nothing


class CpuLauncher(Launcher):
    """Entries of a shared library, run by the thread pool. `load` compiles and loads the library
    of a variant; the one without macros is loaded at once."""

    def __init__(
        self, load: Callable[[tuple[str, ...]], ctypes.CDLL], entries: tuple[str, ...]
    ) -> None:
        self._load, self._entries = load, entries
        self._bodies: dict[tuple[str, ...], list[int]] = {}
        self.bodies(())

    def bodies(self, variants: tuple[str, ...]) -> list[int]:
        """The addresses of the entries."""
        if variants not in self._bodies:
            library = self._load(variants)
            self._bodies[variants] = [
                pools.address_of(getattr(library, entry)) for entry in self._entries
            ]
        return self._bodies[variants]

    def launches(self, kernel: Kernel, frame: Frame) -> list[pools.Launch]:
        """The launches of a call: one for each stage that has units."""
        chunks = pools.pool().threads * CHUNKS_PER_THREAD  # a build alone needs no pool
        return [
            (
                body,
                ctypes.addressof(block),
                units,
                units if stage.ordered else max(1, units // chunks),
                not kernel.manifest.formats,  # rows of a sparse matrix are of unequal length
            )
            for body, block, units, stage in zip(
                self.bodies(frame.variants),
                frame.blocks,
                frame.units,
                kernel.manifest.stages,
                strict=True,
            )
            if units
        ]

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        return pools.pool().prepare(self.launches(kernel, frame))


class CudaLauncher(Launcher):
    """Functions of a cubin, loaded on the device of the call at its first launch there. `image`
    compiles the cubin of a variant when it is first needed: without wide loads for arrays that are
    not aligned to 16 bytes, with strides read at run time for arrays with gaps."""

    def __init__(self, image: Callable[[tuple[str, ...]], bytes]) -> None:
        self.image = image
        self._functions: dict[tuple[int, tuple[str, ...]], list[cuda.Function]] = {}

    def functions(self, kernel: Kernel, frame: Frame) -> list[cuda.Function]:
        key = _ordinal(frame), frame.variants
        if key not in self._functions:
            module = cuda.Module(self.image(frame.variants), key[0])
            self._functions[key] = [module.function(s.entry) for s in kernel.manifest.stages]
        return self._functions[key]

    def launches(self, kernel: Kernel, frame: Frame) -> list[cuda.Launch]:
        stages = kernel.manifest.stages
        return [
            f.prepare((units, 1, 1), (*s.threads, 1), s.smem_bytes, block)
            for f, s, block, units in zip(
                self.functions(kernel, frame), stages, frame.blocks, frame.units, strict=True
            )
            if units
        ]

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        launches = [one.run_active for one in self.launches(kernel, frame)]
        ordinal = _ordinal(frame)
        activate, current_stream = cuda.device(ordinal).activate, cuda.current_stream

        def run() -> None:
            activate()
            stream = current_stream(ordinal)
            for launch in launches:
                launch(stream)

        return run


def _ordinal(frame: Frame) -> int:
    return int(frame.device.partition(":")[2] or 0)


def _recorded(bound: Any) -> Sequence[Any] | None:
    """The launches of a bound call; None for one without native code. Raises ArgumentError."""
    if isinstance(bound, Bound):
        native = isinstance(bound.kernel.launcher, (CpuLauncher, CudaLauncher))
        return bound.kernel.launcher.launches(bound.kernel, bound.frame) if native else None
    if isinstance(bound, (tuple, cuda.Launch)):
        return (bound,)
    if not hasattr(bound, "launch"):
        text = f"a step records bound calls, not {type(bound).__name__}"
        raise ArgumentError("A107", text, where="bounds", hint="kernel.bind(…)")
    return None if bound.launch is None else (bound.launch,)


class Step:
    """A recorded step: the launches of many bound calls as one native call (DESIGN 14).

    On the CPU a list of launches that the pool runs with a barrier after each; on a GPU a graph.
    `bounds` are `Bound`s, launches (a `runtime.pool.Launch` on the CPU, a `runtime.cuda.Launch` on
    a GPU), or anything with one as `.launch`. All of one device. Where there is no C++ compiler
    they are called one after the other.
    """

    def __init__(self, bounds: Iterable[Any]) -> None:
        self.keep = list(bounds)
        recorded = [_recorded(b) for b in self.keep]
        launches = [launch for of_bound in recorded for launch in of_bound or ()]
        self.count = len(launches)
        if None in recorded:
            self.count = len(self.keep)
            self._run = self._call_each
        elif launches and not isinstance(launches[0], tuple):
            graph = cuda.Graph(launches)
            self._run = lambda: graph.launch(cuda.current_stream())
        else:
            self._run = pools.pool().prepare(launches)

    def _call_each(self) -> None:
        for bound in self.keep:
            bound()

    def __call__(self) -> None:
        self._run()

    def __repr__(self) -> str:
        return f"<step of {self.count} launches>"
