"""Iteration spaces as products of groups of points, and sums of products over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.ir.nodes import Expr, Index

UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "//": np.floor_divide,
    "%": np.remainder, "min": np.minimum, "max": np.maximum, "&": np.bitwise_and,
    "|": np.bitwise_or, "^": np.bitwise_xor, "<<": np.left_shift, ">>": np.right_shift,
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal,
    "!=": np.not_equal,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": np.negative, "not": np.logical_not, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "abs": np.abs, "floor": np.floor,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The stored coordinates of a structure, in row-major order, one array a dimension."""

    shape: tuple[int, ...]
    coords: tuple[np.ndarray, ...]

    def keys(self, dims: Iterable[int], coords: Iterable[np.ndarray]) -> np.ndarray:
        """Coordinates of some dimensions as single numbers, ordered as the coordinates are."""
        key: Any = np.zeros((), np.int64)
        for d, c in zip(dims, coords, strict=True):
            key = key * max(self.shape[d], 1) + c
        return key


def decode(raw: np.ndarray, dtype: DType, *, exact: bool) -> np.ndarray:
    """Stored values as numbers: bfloat16 bits become float32; everything float64 if `exact`."""
    if dtype.name == "bfloat16" and raw.dtype == np.uint16:
        raw = dtypes.bfloat16_values(raw)
    elif raw.dtype.kind == "V" or raw.dtype.name == "bfloat16":
        raw = raw.astype(np.float32)
    return raw.astype(np.float64) if exact and dtype.is_float else raw


def encode(values: np.ndarray, dtype: DType, to: np.dtype) -> np.ndarray:
    """Numbers as they are stored in an array of NumPy type `to`."""
    if dtype.name == "bfloat16" and to == np.uint16:
        return dtypes.bfloat16_bits(values.astype(np.float32)).reshape(values.shape)
    return values.astype(to)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One dimension of an iteration space: the coordinates of its indices, point by point.

    `first` is set for a dense range first … first+length-1; `entries` (structure, index names,
    numbers of the stored entries) where the points are stored coordinates.
    """

    length: int
    index: dict[str, np.ndarray]
    first: int | None = None
    entries: tuple[str, tuple[str, ...], np.ndarray] | None = None

    @classmethod
    def dense(cls, name: str, extent: int) -> Group:
        return cls(extent, {name: np.arange(extent)}, 0)

    def cut(self, a: int, b: int) -> Group:
        """The points a … b-1."""
        entries = self.entries and (*self.entries[:2], self.entries[2][a:b])
        first = None if self.first is None else self.first + a
        return Group(b - a, {n: c[a:b] for n, c in self.index.items()}, first, entries)


Space = tuple[Group, ...]


def shape_of(space: Space) -> tuple[int, ...]:
    return tuple(g.length for g in space)


def pieces(space: Space, limit: int) -> Iterator[tuple[tuple[slice, ...], Space]]:
    """The space cut along its longest group until a piece has at most `limit` points."""

    def cut(at: tuple[slice, ...], s: Space) -> Iterator[tuple[tuple[slice, ...], Space]]:
        if prod(shape_of(s)) <= limit or max(shape_of(s), default=0) <= 1:
            yield at, s
            return
        d = int(np.argmax(shape_of(s)))
        half = s[d].length // 2
        for a, b in ((0, half), (half, s[d].length)):
            where = slice(at[d].start + a, at[d].start + b)
            yield from cut((*at[:d], where, *at[d + 1 :]), (*s[:d], s[d].cut(a, b), *s[d + 1 :]))

    yield from cut(tuple(slice(0, g.length) for g in space), space)


def flattened(groups: Space) -> Group:
    """Several groups as one, the last running fastest."""
    length, index = prod(shape_of(groups)), {}
    inner = length
    outer = 1
    for g in groups:
        inner = inner // max(g.length, 1) if length else 0
        for name, c in g.index.items():
            index[name] = np.tile(np.repeat(c, inner), outer)
        outer *= g.length
    return Group(length, index)


def single(ndim: int, d: int, length: int) -> tuple[int, ...]:
    return tuple(length if n == d else 1 for n in range(ndim))


def slice_of(g: Group) -> slice:
    assert g.first is not None
    return slice(g.first, g.first + g.length)


def range_of(c: Expr, space: Space) -> int | None:
    """The group of a plain index over a dense range."""
    if isinstance(c, Index):
        for d, g in enumerate(space):
            if c.name in g.index:
                return d if g.first is not None else None
    return None


def contract(factors: list[np.ndarray], shape: tuple[int, ...], keep: int) -> np.ndarray:
    """The product of the factors, summed over the dimensions from `keep` on."""
    ndim = len(shape)
    varies = [{d for d in range(ndim) if f.shape[d] > 1} for f in factors]
    scale = prod(n for d, n in enumerate(shape) if d >= keep and not any(d in v for v in varies))
    out = [d for d in range(keep) if any(d in v for v in varies)]
    if not any(d >= keep for v in varies for d in v):
        value = factors[0]
        for f in factors[1:]:
            value = value * f
        value = value.reshape(value.shape[:keep])
    elif len(factors) == 2:
        value = _matmul(factors, varies, out, keep)
    else:
        letters = [[*v] for v in map(sorted, varies)]
        flat = [f.reshape([n for n in f.shape if n > 1]) for f in factors]
        operands = [x for pair in zip(flat, letters, strict=True) for x in pair]
        value = np.einsum(*operands, out, optimize="greedy")
        value = value.reshape([shape[d] if d in out else 1 for d in range(keep)])
    return np.broadcast_to(value if scale == 1 else value * scale, shape[:keep])


def _matmul(
    factors: list[np.ndarray], varies: list[set[int]], out: list[int], keep: int
) -> np.ndarray:
    """Two factors as one (batched) matrix product."""
    a, b = factors
    for f in range(2):  # what only one of them has is summed first
        lone = tuple(d for d in varies[f] - varies[1 - f] if d >= keep)
        if lone:
            summed = factors[f].sum(axis=lone, keepdims=True)
            a, b = (summed, b) if f == 0 else (a, summed)
    both = varies[0] & varies[1]
    batch = [d for d in out if d in both]
    inner = sorted(d for d in both if d >= keep)
    left = [d for d in out if d in varies[0] and d not in both]
    right = [d for d in out if d in varies[1] and d not in both]
    size = {d: max(a.shape[d], b.shape[d]) for d in range(a.ndim)}
    b_size, i_size, l_size, r_size = (prod(size[d] for d in x) for x in (batch, inner, left, right))
    rest_a = [d for d in range(a.ndim) if d not in (*batch, *left, *inner)]
    rest_b = [d for d in range(b.ndim) if d not in (*batch, *inner, *right)]
    x = a.transpose(*batch, *left, *inner, *rest_a).reshape(b_size, l_size, i_size)
    y = b.transpose(*batch, *inner, *right, *rest_b).reshape(b_size, i_size, r_size)
    if l_size == r_size == 1:
        value = np.einsum("bi,bi->b", x[:, 0], y[..., 0])
    elif b_size == 1:  # NumPy hands two dimensions to BLAS as they are, three it may copy
        value = x[0] @ y[0]
    else:
        value = x @ y
    order = [*batch, *left, *right]
    value = value.reshape([size[d] for d in order]).transpose(np.argsort(order))
    return value.reshape([size[d] if d in out else 1 for d in range(keep)])
