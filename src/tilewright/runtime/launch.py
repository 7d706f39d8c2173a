"""How a filled frame runs: on the thread pool, on a GPU's stream, or on the interpreter.

A frame knows its launches as plain data (`frame_launches`), so that a recorded step can put the
launches of many kernels into one native call.
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
    """Entries of a shared library, run by the thread pool. `loaded` compiles and loads the library
    for the variants of a frame; the one for frames that lack nothing is loaded at once."""

    def __init__(
        self, loaded: Callable[[tuple[str, ...]], ctypes.CDLL], entries: tuple[str, ...]
    ) -> None:
        self._loaded, self._entries = loaded, entries
        self._bodies: dict[tuple[str, ...], list[int]] = {}
        self.bodies(())

    @property
    def pool(self) -> pools.Pool:
        """What a call needs, and a build does not: compiled or loaded at the first one."""
        return pools.pool()

    def bodies(self, variants: tuple[str, ...]) -> list[int]:
        """The addresses of the entries."""
        found = self._bodies.get(variants)
        if found is None:
            library = self._loaded(variants)
            found = [pools.address_of(getattr(library, e)) for e in self._entries]
            self._bodies[variants] = found
        return found

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
        found = self._functions.get((ordinal, frame.variants))
        if found is None:
            module = cuda.load_cubin(self.image(frame.variants), ordinal)
            found = [module.function(s.entry) for s in kernel.manifest.stages]
            for f, s in zip(found, kernel.manifest.stages, strict=True):
                if s.smem_bytes > 48 * 1024:
                    f.allow_smem(s.smem_bytes)
            self._functions[ordinal, frame.variants] = found
        return found

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
    """Whether there is no native code to put into a list of launches."""
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
