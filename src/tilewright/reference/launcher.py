"""The `interp` target: runs the evaluator on the arrays of a prepared call."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tilewright.dtypes import DType
from tilewright.ir.nodes import Program
from tilewright.reference.evaluate import Stored, run
from tilewright.runtime.kernel import Kernel, Launcher


class InterpLauncher(Launcher):
    """The program at the coordinate level, evaluated with NumPy: no compiler, and slow."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def prepare(self, kernel: Kernel, frame: Any) -> Callable[[], None]:
        return lambda: run_frame(self.program, frame)


def run_frame(program: Program, frame: Any) -> None:
    """Run a program at the coordinate level on the arrays whose addresses a frame holds."""
    data: dict[str, np.ndarray] = {}
    stored: dict[str, Stored] = {}
    written: list[tuple[Any, ...]] = []
    for t in program.tensors:
        slots = frame.slots.get(t.name, ())
        if t.role == "temp":
            continue
        if t.is_sparse:
            structure = frame.structures[t.structure]()
            coords, order = structure.stored()
            stored[t.structure] = Stored(tuple(structure.shape), coords)
            parts = [p.size for p in structure.parts]
            pointers = {part: slot.value for slot, part in slots}
            inner = tuple(frame.sizes.get(d, d) for d in t.dims[len(structure.shape) :])
            arrays = [
                _array_at(p, t.dtype, (parts[n], *inner)) for n, p in sorted(pointers.items())
            ]
            shape = (sum(parts), *inner)
            flat = np.concatenate(arrays) if slots else np.zeros(shape, t.dtype.numpy)
            data[t.name] = values = flat[order]
            if t.role == "output":
                written.append((flat, order, values, arrays))
        elif not t.dims and t.role == "input":
            value, is_bits = slots[0][0].value if slots else 0, t.dtype.name == "float16"
            number = np.array(value, np.uint16 if is_bits else t.dtype.numpy)  # as its slot has it
            data[t.name] = number.view(t.dtype.numpy)
        else:
            v = frame.views[t.name]
            pointer = slots[0][0].value if slots else v.pointer
            data[t.name] = _array_at(pointer, t.dtype, v.shape, v.strides)
    run(program, data, stored, {d: n for d, n in frame.sizes.items() if isinstance(d, str)})
    for flat, order, values, arrays in written:
        flat[order] = values  # the other positions, padding, keep what they had
        ends = np.cumsum([len(array) for array in arrays])
        for array, piece in zip(arrays, np.split(flat, ends[:-1]), strict=True):
            array[:] = piece


def _array_at(
    pointer: int, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """The array at an address; `strides` count elements (None: row-major without gaps)."""
    kind = dtype.numpy
    described = {
        "data": (pointer, False), "shape": shape, "typestr": kind.str, "version": 3,
        "strides": strides and tuple(s * kind.itemsize for s in strides),
    }  # fmt: skip
    return np.asarray(SimpleNamespace(__array_interface__=described))
