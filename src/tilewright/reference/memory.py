"""What the interpreter runs on: arrays by the names of the IR, part by part, every access checked.

Memory that nobody wrote is poisoned, and shows when it is read. Numbers are kept as kernels keep
them: bfloat16 is its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir.names import Given, count_name, size_name, values_name
from tilewright.ir.nodes import Const, Program, Tensor
from tilewright.reference.ops_table import decode, encode, to_integer


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

    Sparse tensors are objects with `structure` and `values` (`sparse.pack.Packed`); those that are
    computed must be given too. Dense outputs and temporaries that are not given are made, all NaN.
    """
    sizes = dict(program.sizes)
    buffers: dict[str, np.ndarray] = {}
    count = max(
        (len(arrays[t.name].values) for t in program.tensors if _is_packed(t, arrays)), default=0
    )
    parts = [Part() for _ in range(count)]
    for t in program.tensors:
        given = arrays.get(t.name)
        if given is None:
            continue
        shape = given.shape if t.is_sparse else np.shape(given)
        sizes |= {d: n for d, n in zip(t.dims, shape, strict=True) if isinstance(d, str)}
        if t.is_sparse:
            _take_parts(t, given, parts)
        else:
            buffers[t.name] = np.asarray(given)
    for t in program.tensors:
        if t.role in ("output", "temp") and not t.is_sparse and t.name not in buffers:
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in t.dims)
            buffers[t.name] = poisoned(shape, t.dtype)
    return buffers, {size_name(d): n for d, n in sizes.items() if isinstance(d, str)}, parts


def _is_packed(t: Tensor, arrays: Mapping[str, Any]) -> bool:
    return t.is_sparse and arrays.get(t.name) is not None


def _take_parts(t: Tensor, packed: Any, rows: list[Part]) -> None:
    """The arrays of each part; a tensor that is not composed stands in every row."""
    made, cases = packed.structure.parts, packed.structure.format.formats
    for number, row in enumerate(rows):
        at = number if number < len(made) else 0
        part = made[at]
        row.buffers[values_name(t.name)] = packed.values[at]
        row.case = max(row.case, cases.index(part.format))
        for depth, level in enumerate(part.arrays):
            row.variables[count_name(t.structure, depth)] = part.counts[depth]
            for kind, array in level.items():
                row.buffers[Given(t.structure, kind, depth).name] = array


def poisoned(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """An array that shows when it is read before it is written: NaN, or the least integer."""
    kind = dtype.numpy
    if dtype.name == "bfloat16":
        return np.full(shape, 0x7FC0, kind)
    value = np.nan if kind.kind == "f" else 0 if kind.kind == "b" else np.iinfo(kind).min
    return np.full(shape, value, kind)


@dataclass(slots=True)
class Array:
    """The memory of an array as one row of elements, from its first to its last."""

    name: str
    flat: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, name: str, a: np.ndarray) -> Array:
        strides = tuple(s // a.itemsize for s in a.strides)
        reach = 1 + sum((n - 1) * s for n, s in zip(a.shape, strides, strict=True)) if a.size else 0
        flat = np.lib.stride_tricks.as_strided(a, (reach,), (a.itemsize,))
        return cls(name, flat, a.shape, strides)

    def offset(self, index: Sequence[int]) -> int:
        """The offset of an element by its index in each dimension, checked."""
        at = 0
        for i, n, stride in zip(index, self.shape, self.strides, strict=True):
            if not 0 <= i < n:
                raise InternalError("I101", f"{self.name}{list(index)} is outside {self.shape}")
            at += i * stride
        return at

    def put(self, offset: Any, value: Any) -> None:
        self.flat[self.at(offset)] = value

    def at(self, offset: Any) -> Any:
        """An offset, or an array of them, checked."""
        low, high = (offset, offset) if isinstance(offset, int) else (offset.min(), offset.max())
        if low < 0 or high >= len(self.flat):
            raise InternalError("I101", f"{self.name}[{offset}] is outside 0…{len(self.flat) - 1}")
        return offset


def constant(e: Const) -> Any:
    if e.dtype.is_int:
        return convert(e.dtype.numpy.type(e.value), e.dtype, e.dtype)
    return convert(np.float64(e.value), dtypes.float64, e.dtype)


def convert(x: Any, source: DType, to: DType) -> Any:
    """A value (or one for each lane) of one dtype as another; bfloat16 is its bits, int32, int64
    and bool are Python's."""
    if isinstance(x, int) and to.name in ("int32", "int64"):
        return int(x) if to.least <= x <= to.most else to.wrapped(x)
    x = decode(np.asarray(x), source)
    if to.is_int and x.dtype.kind == "f":
        made = to_integer(x, to)
    else:
        made = x != 0 if to.kind == "b" else encode(x, to, to.numpy)
    plain = to.kind == "b" or to.name in ("int32", "int64")
    return made if made.ndim else made.item() if plain else made[()]
