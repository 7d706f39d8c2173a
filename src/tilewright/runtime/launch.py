"""How a prepared call runs: on the thread pool, on a GPU's stream, or on the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tilewright.ir.nodes import Program
from tilewright.runtime import cuda, native
from tilewright.runtime import pool as pools
from tilewright.runtime.kernel import Call, Kernel, Launcher

CHUNKS_PER_THREAD = 8  # enough for units of uneven size to even out, few enough to cost nothing


class CpuLauncher(Launcher):
    """Entries of a shared library, run by the thread pool."""

    def __init__(self, library: ctypes.CDLL, entries: tuple[str, ...]) -> None:
        self.bodies = [pools.address_of(getattr(library, e)) for e in entries]
        self.pool = pools.pool()
        self._run = self.pool.run

    def launches(self, call: Call) -> ctypes.Array[ctypes.c_char]:
        """The call as an array of `tw_launch`, empty stages left out."""
        threads = self.pool.threads
        return pools.launch_array(
            [
                (body, ctypes.addressof(block), units, max(1, units // (threads * CHUNKS_PER_THREAD)))
                for body, block, units in zip(self.bodies, call.blocks, call.units, strict=True)
                if units
            ]
        )

    def launch(self, kernel: Kernel, call: Call) -> None:
        array = self.launches(call)
        self._run(ctypes.addressof(array), sum(1 for u in call.units if u))

    def bind(self, kernel: Kernel, call: Call) -> Callable[[], None]:
        array = self.launches(call)
        count = sum(1 for u in call.units if u)
        run, address = self._run, ctypes.addressof(array)

        def go(_keep: Any = (array, call)) -> None:
            run(address, count)

        return go


class CudaLauncher(Launcher):
    """Functions of a cubin, loaded on the device of the call at its first launch there."""

    def __init__(self, image: bytes, unaligned: Callable[[], bytes]) -> None:
        self._images = {True: lambda: image, False: unaligned}
        self._functions: dict[tuple[int, bool], list[cuda.Function]] = {}

    def functions(self, kernel: Kernel, call: Call) -> list[cuda.Function]:
        ordinal = int(call.device.partition(":")[2] or 0)
        aligned = all(v.pointer % 16 == 0 and _rows_aligned(v) for v in call.views.values())
        found = self._functions.get((ordinal, aligned))
        if found is None:
            module = cuda.load_cubin(self._images[aligned](), ordinal)
            found = [module.function(s.entry) for s in kernel.manifest.stages]
            for f, s in zip(found, kernel.manifest.stages, strict=True):
                if s.smem_bytes > 48 * 1024:
                    f.allow_smem(s.smem_bytes)
            self._functions[ordinal, aligned] = found
        return found

    def launch(self, kernel: Kernel, call: Call) -> None:
        stream = cuda.current_stream()
        for f, s, block, units in zip(self.functions(kernel, call), kernel.manifest.stages, call.blocks, call.units, strict=True):
            if units:
                f.launch((units, 1, 1), (*s.threads, 1), s.smem_bytes, stream, block)

    def bind(self, kernel: Kernel, call: Call) -> Callable[[], None]:
        prepared = [
            f.prepare((units, 1, 1), (*s.threads, 1), s.smem_bytes, block)
            for f, s, block, units in zip(self.functions(kernel, call), kernel.manifest.stages, call.blocks, call.units, strict=True)
            if units
        ]
        current = cuda.current_stream

        def go(_keep: Any = call) -> None:
            stream = current()
            for p in prepared:
                p.run(stream)

        go.prepared = prepared  # type: ignore[attr-defined]
        return go


def _rows_aligned(v: Any) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    item = v.dtype.itemsize
    return all(s * item % 16 == 0 or n <= 1 for s, n in zip(v.strides[:-1], v.shape[:-1], strict=True))


class InterpLauncher(Launcher):
    """The NumPy interpreter: slow, and right."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def launch(self, kernel: Kernel, call: Call) -> None:
        from tilewright.runtime.interpreter import run_call

        run_call(self.program, kernel, call)

    def bind(self, kernel: Kernel, call: Call) -> Callable[[], None]:
        return lambda: self.launch(kernel, call)


def load_cpu(path: Any, entries: tuple[str, ...]) -> CpuLauncher:
    return CpuLauncher(native.load(path), entries)
