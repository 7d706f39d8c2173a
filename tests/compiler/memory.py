"""The memory of the interpreters: arrays by the names of the IR, part by part, with checked bounds.

Memory that nobody wrote is poisoned: it holds NaN, or the least integer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.dtypes import DType
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.names import stride_name
from tilewright.ir.rewrite import walk
from tilewright.reference.evaluate import cast, computed, decode


@dataclass(slots=True)
class Part:
    """One row of the work table: the arrays and counts of a part, and the nests that serve it."""

    case: int = 0
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    variables: dict[str, int] = field(default_factory=dict)


def constant(value: Any, dtype: DType) -> Any:
    """A number as a NumPy scalar."""
    return cast(computed(dtype).type(value), dtype)


def launches(
    program: ir.Program,
    buffers: Mapping[str, np.ndarray],
    variables: Mapping[str, int],
    parts: Sequence[Part],
) -> Iterator[list[tuple[ir.Nest, dict[str, Array], dict[str, Any]]]]:
    """For each stage its nests, each under every part that it serves, with the arrays and the
    variables that it sees. Strides are those of the arrays."""
    memory = {name: Array.of(name, a) for name, a in buffers.items()}
    strides = {
        stride_name(name, d): s for name, a in memory.items() for d, s in enumerate(a.strides)
    }
    for stage in program.stages:
        nests = []
        for nest, (number, part) in itertools.product(stage, enumerate(parts or (Part(),))):
            if part.case == nest.part or (nest.part < 0 and number == 0):
                own = {name: Array.of(name, a) for name, a in part.buffers.items()}
                nodes = (x for e in (nest.body, *nest.grid) for x in walk(e))
                types = {x.name: x.dtype for x in nodes if isinstance(x, ir.Var)}
                env = {**variables, **strides, **part.variables}
                known = {n: constant(x, types[n]) for n, x in env.items() if n in types}
                nests.append((nest, memory | own, known))
        yield nests


def lane_dimensions(body: ir.Stmt) -> dict[str, int]:
    """Which dimension of an accumulator belongs to the lanes of a loop that is not yet a vector."""
    return {
        s.buffer.name: d
        for loop in walk(body)
        if isinstance(loop, ir.For) and loop.kind == "vector"
        for s in walk(loop)
        if isinstance(s, ir.Store) and s.buffer.scope == "register"
        for d, i in enumerate(s.index)
        if isinstance(i, ir.Var) and i.name == loop.name
    }


def poisoned(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """An array that shows when it is read before it is written: NaN, or the least integer."""
    kind = dtype.numpy
    if dtype.name == "bfloat16":
        return np.full(shape, 0x7FC0, kind)
    value = np.nan if kind.kind == "f" else 0 if kind.kind == "b" else np.iinfo(kind).min
    return np.full(shape, value, kind)


def as_operand(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Elements of an operand of a tile operation as it multiplies them: float32 is rounded to tf32,
    to the nearest, ties away from zero."""
    if dtype.name != "float32":
        return x.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


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

    def checked(self, offset: Any) -> Any:
        """An offset, or an array of them. Raises InternalError[I101] for one out of bounds."""
        many = isinstance(offset, np.ndarray)
        low, high = (offset.min(), offset.max()) if many else (offset, offset)
        if low < 0 or high >= len(self.flat):
            wrong = low if low < 0 else high
            raise InternalError("I101", f"{self.name}[{wrong}] is outside 0…{len(self.flat) - 1}")
        return offset

    def read(self, offset: Any, dtype: DType) -> Any:
        return decode(self.flat[self.checked(offset)], dtype)
