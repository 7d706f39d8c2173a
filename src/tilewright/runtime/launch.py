"""Launch frames on the thread pool or on a GPU's stream.

The launches of a frame are plain data (`launches`, `parts`), so that a recorded step can put those
of many kernels into one native call.
"""

import ctypes
from collections.abc import Callable

from tilewright.ir.body import Body
from tilewright.runtime import cuda
from tilewright.runtime import pool as pools
from tilewright.runtime.frame import Frame
from tilewright.runtime.kernel import Kernel, Launcher
from tilewright.runtime.view import ordinal_of

CHUNKS_PER_THREAD = 8  # enough for units of uneven size to even out, few enough to cost nothing

Macros = tuple[str, ...]
"""What code is compiled with for the arrays of a call: `Frame.variants`."""


class CpuLauncher(Launcher):
    """Runs entries of a shared library on the thread pool. `load(macros)` compiles and loads the
    library; the one without macros is loaded by the constructor."""

    def __init__(self, load: Callable[[Macros], ctypes.CDLL], entries: tuple[str, ...]) -> None:
        self._load, self._entries = load, entries
        self._bodies: dict[Macros, list[int]] = {}
        self.bodies(())

    def bodies(self, variants: Macros) -> list[int]:
        """The addresses of the entries."""
        if variants not in self._bodies:
            library = self._load(variants)
            functions = (getattr(library, entry) for entry in self._entries)
            self._bodies[variants] = [pools.address_of(f) for f in functions]
        return self._bodies[variants]

    def launches(self, kernel: Kernel, frame: Frame) -> list[pools.Launch]:
        """The launches of a call: one for each stage that has units."""
        chunks = pools.pool().threads * CHUNKS_PER_THREAD  # a build alone needs no pool
        guided = not kernel.manifest.formats  # rows of a sparse matrix are of unequal length
        bodies, stages = self.bodies(frame.variants), kernel.manifest.stages
        launches: list[pools.Launch] = []
        rows = zip(bodies, frame.blocks, frame.units, stages, strict=True)
        for body, block, units, stage in rows:
            if units:
                grain = units if stage.ordered else max(1, units // chunks)
                launches.append((body, ctypes.addressof(block), units, grain, guided))
        return launches

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        return pools.pool().prepare(self.launches(kernel, frame))


CompileStep = Callable[[tuple[Body, ...], Macros], bytes]
"""From the bodies of one launch of a step and macros to the cubin of their function `step`."""


class CudaLauncher(Launcher):
    """Launches the functions of a cubin, which is loaded on a GPU at the first launch there.
    `image(macros)` compiles it when it is first needed: macros turn off wide loads for arrays that
    are not aligned to 16 bytes, and constant strides for arrays with gaps. `bodies` are the bodies
    of its stages; `compile_step` compiles bodies of several kernels into one launch."""

    def __init__(
        self, image: Callable[[Macros], bytes], bodies: tuple[Body, ...], compile_step: CompileStep
    ) -> None:
        self.image, self.bodies, self.compile_step = image, bodies, compile_step
        self._functions: dict[tuple[int, Macros], list[cuda.Function]] = {}

    def functions(self, kernel: Kernel, frame: Frame) -> list[cuda.Function]:
        key = ordinal_of(frame.device), frame.variants
        if key not in self._functions:
            module = cuda.Module(self.image(frame.variants), key[0])
            self._functions[key] = [module.function(s.entry) for s in kernel.manifest.stages]
        return self._functions[key]

    def launches(self, kernel: Kernel, frame: Frame) -> list[cuda.Launch]:
        stages = kernel.manifest.stages
        rows = zip(self.functions(kernel, frame), stages, frame.blocks, frame.units, strict=True)
        return [
            f.prepare((units, 1, 1), (*s.threads, 1), s.smem_bytes, block)
            for f, s, block, units in rows
            if units
        ]

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        """Loads the functions at the first run: a recorded step has none of its own."""
        launches: list[Callable[[int], None]] = []
        ordinal = ordinal_of(frame.device)
        activate, current_stream = cuda.device(ordinal).activate, cuda.current_stream

        def run() -> None:
            activate()
            if not launches:
                launches.extend(one.run_active for one in self.launches(kernel, frame))
            stream = current_stream(ordinal)
            for launch in launches:
                launch(stream)

        return run
