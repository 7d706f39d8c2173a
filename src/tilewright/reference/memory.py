"""The memory of the interpreter: arrays by the names of the IR, part by part, with checked bounds.

Memory that nobody wrote is poisoned: it holds NaN, or the least integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir.names import GeneratedName, count_name, size_name, values_name
from tilewright.ir.nodes import Program, Tensor
from tilewright.reference.ops_table import decode, encode


@dataclass(slots=True)
class Part:
    """One row of the work table: the arrays and counts of a part, and the nests that serve it."""

    case: int = 0
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    variables: dict[str, int] = field(default_factory=dict)


def memory_of(
    program: Program, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, int], list[Part]]:
    """(buffers, variables, parts) for `execute` from arrays by tensor name.

    Sparse tensors are objects with `structure` and `values` (`sparse.pack.Packed`), also those
    that are computed. Dense outputs and temporaries that `arrays` lacks are allocated, poisoned.
    """
    sizes = dict(program.sizes)
    buffers: dict[str, np.ndarray] = {}
    passed = [(t, arrays[t.name]) for t in program.tensors if arrays.get(t.name) is not None]
    parts = [
        Part() for _ in range(max((len(x.values) for t, x in passed if t.is_sparse), default=0))
    ]
    for t, x in passed:
        sizes |= {d: n for d, n in zip(t.dims, np.shape(x), strict=True) if isinstance(d, str)}
        if t.is_sparse:
            _add_to_parts(t, x, parts)
        else:
            buffers[t.name] = np.asarray(x)
    for t in program.tensors:
        if t.role in ("output", "temp") and not t.is_sparse and t.name not in buffers:
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in t.dims)
            buffers[t.name] = poisoned(shape, t.dtype)
    return buffers, {size_name(d): n for d, n in sizes.items() if isinstance(d, str)}, parts


def _add_to_parts(t: Tensor, packed: Any, rows: list[Part]) -> None:
    """Adds the arrays of each part of a tensor; one that is not composed is in every row."""
    parts, cases = packed.structure.parts, packed.structure.format.formats
    for number, row in enumerate(rows):
        at = number if number < len(parts) else 0
        row.buffers[values_name(t.name)] = packed.values[at]
        row.case = max(row.case, cases.index(parts[at].format))
        for depth, level in enumerate(parts[at].arrays):
            row.variables[count_name(t.structure, depth)] = parts[at].counts[depth]
            for kind, array in level.items():
                row.buffers[GeneratedName(t.structure, kind, depth).name] = array


def poisoned(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """An array that shows when it is read before it is written: NaN, or the least integer."""
    kind = dtype.numpy
    if dtype.name == "bfloat16":
        return np.full(shape, 0x7FC0, kind)
    value = np.nan if kind.kind == "f" else 0 if kind.kind == "b" else np.iinfo(kind).min
    return np.full(shape, value, kind)


@dataclass(slots=True)
class Array:
    """An array, and its memory as one row of elements, from the first to the last."""

    name: str
    view: np.ndarray
    flat: np.ndarray
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, a: np.ndarray) -> Array:
        strides = tuple(s // a.itemsize for s in a.strides)
        span = 1 + sum((n - 1) * s for n, s in zip(a.shape, strides, strict=True)) if a.size else 0
        return cls(name, a, np.lib.stride_tricks.as_strided(a, (span,), (a.itemsize,)), strides)

    def offset(self, index: Sequence[Any]) -> int:
        """The offset of an element by its index in each dimension, checked."""
        for i, n in zip(index, self.view.shape, strict=True):
            if not 0 <= i < n:
                raise InternalError("I101", f"{self.name}{[*index]} is outside {self.view.shape}")
        return sum(int(i) * s for i, s in zip(index, self.strides, strict=True))

    def checked(self, offset: Any) -> Any:
        """An offset, or an array of them. Raises InternalError[I101] for one out of bounds."""
        many = isinstance(offset, np.ndarray)
        low, high = (offset.min(), offset.max()) if many else (offset, offset)
        if low < 0 or high >= len(self.flat):
            raise InternalError("I101", f"{self.name}[{offset}] is outside 0…{len(self.flat) - 1}")
        return offset

    def read(self, offset: Any, dtype: DType) -> Any:
        return decode(self.flat[self.checked(offset)], dtype)

    def write(self, offset: Any, value: Any, dtype: DType) -> None:
        self.flat[self.checked(offset)] = encode(value, dtype, self.flat.dtype)
