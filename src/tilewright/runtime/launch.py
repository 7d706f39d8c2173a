"""Launch frames on the thread pool or on a GPU's stream, and recorded steps of many launches.

The launches of a frame are plain data (`launches`), so that a recorded step can put those of many
kernels into one native call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
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

    @property
    def pool(self) -> pools.Pool:
        """The thread pool, compiled or loaded by the first call, not by a build."""
        return pools.pool()

    def bodies(self, variants: tuple[str, ...]) -> list[int]:
        """The addresses of the entries."""
        if variants not in self._bodies:
            library = self._load(variants)
            self._bodies[variants] = [
                pools.address_of(getattr(library, entry)) for entry in self._entries
            ]
        return self._bodies[variants]

    def launches(self, kernel: Kernel, frame: Frame) -> list[pools.Launch]:
        """The launch of each stage that has units."""
        chunks = self.pool.threads * CHUNKS_PER_THREAD
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
        listed = self.launches(kernel, frame)
        array = pools.launch_array(listed)
        frame.keep.append(array)
        run, address, count = self.pool.run, ctypes.addressof(array), len(listed)
        return lambda: run(address, count)


class CudaLauncher(Launcher):
    """Functions of a cubin, loaded on the device of the call at its first launch there. `image`
    compiles the cubin of a variant when it is first needed: without wide loads for arrays that are
    not aligned to 16 bytes, with strides read at run time for arrays with gaps."""

    def __init__(self, image: Callable[[tuple[str, ...]], bytes]) -> None:
        self.image = image
        self._functions: dict[tuple[int, tuple[str, ...]], list[cuda.Function]] = {}

    def functions(self, kernel: Kernel, frame: Frame) -> list[cuda.Function]:
        ordinal = int(frame.device.partition(":")[2] or 0)
        functions = self._functions.get((ordinal, frame.variants))
        if functions is None:
            module = cuda.load_cubin(self.image(frame.variants), ordinal)
            functions = [module.function(s.entry) for s in kernel.manifest.stages]
            for f, s in zip(functions, kernel.manifest.stages, strict=True):
                if s.smem_bytes > 48 * 1024:
                    f.allow_smem(s.smem_bytes)
            self._functions[ordinal, frame.variants] = functions
        return functions

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
        listed = self.launches(kernel, frame)
        gpu = cuda.device(int(frame.device.partition(":")[2] or 0))
        ordinal, activate, current = gpu.ordinal, gpu.activate, cuda.current_stream
        launches = [one.run_active for one in listed]

        def run() -> None:
            activate()
            stream = current(ordinal)
            for launch in launches:
                launch(stream)

        return run


def _is_interpreted(b: Any) -> bool:
    """Whether a bound call has no native code, so that it cannot join a list of launches."""
    if isinstance(b, Bound):
        return not isinstance(b.kernel.launcher, (CpuLauncher, CudaLauncher))
    return hasattr(b, "launch") and b.launch is None


class Step:
    """A recorded step: the launches of many bound calls as one native call (DESIGN 14).

    On the CPU a list of launches that the pool runs with a barrier after each; on a GPU a graph.
    `bounds` are `Bound`s, launches (a `runtime.pool.Launch` on the CPU, a `runtime.cuda.Launch` on
    a GPU), or anything with one as `.launch`. All of one device. Where there is no C++ compiler
    they are called one after the other.
    """

    def __init__(self, bounds: Iterable[Any]) -> None:
        self.keep = list(bounds)
        listed: list[Any] = []
        for b in self.keep:
            if not (isinstance(b, (Bound, tuple, cuda.Launch)) or hasattr(b, "launch")):
                raise ArgumentError(
                    "A107", f"a step records bound calls, not {type(b).__name__}", where="bounds",
                    hint="kernel.bind(…)",
                )  # fmt: skip
        if any(map(_is_interpreted, self.keep)):
            self.count = len(self.keep)
            self._go = self._one_by_one
            return
        for b in self.keep:
            listed += (
                b.kernel.launcher.launches(b.kernel, b.frame)
                if isinstance(b, Bound)
                else [getattr(b, "launch", b)]
            )
        self.count = len(listed)
        if listed and not isinstance(listed[0], tuple):
            graph = cuda.Graph.of(listed)
            self._go = lambda: graph.launch(cuda.current_stream())
            return
        array = pools.launch_array(listed)
        self.keep.append(array)
        run, address, count = pools.pool().run, ctypes.addressof(array), len(listed)
        self._go = lambda: run(address, count)

    def _one_by_one(self) -> None:
        for bound in self.keep:
            bound()

    def __call__(self) -> None:
        self._go()

    def __repr__(self) -> str:
        return f"<step of {self.count} launches>"
