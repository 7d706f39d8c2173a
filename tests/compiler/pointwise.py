"""A second reading of coordinate-level programs: one point after the other, in Python's numbers.

It shares no code with `tilewright.reference`, and is only for small programs of floats.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tilewright.ir.nodes import (
    Access,
    Binary,
    Cast,
    Const,
    Index,
    Program,
    Reduce,
    Select,
    Stored,
    Unary,
    Var,
)  # fmt: skip

Env = dict[str, int]

_BINARY: dict[str, Any] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan, "min": min, "max": max,
    "<": lambda a, b: a < b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip
_UNARY: dict[str, Any] = {
    "-": lambda a: -a,
    "exp": math.exp,
    "log": lambda a: math.log(a) if a else -math.inf,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
}
_FOLD: dict[str, Any] = {
    "sum": sum, "prod": math.prod,
    "max": lambda xs: max(xs, default=-math.inf), "min": lambda xs: min(xs, default=math.inf),
}  # fmt: skip


def pointwise(program: Program, args: dict[str, Any]) -> dict[str, np.ndarray]:
    """The outputs of a program, as `evaluate` returns them."""
    reader = _Reader(program, args)
    for s in program.body:
        t, names = s.out.tensor, [c.name for c in s.out.coords if isinstance(c, Index)]
        points = (
            reader.stored[t.structure]
            if t.is_sparse
            else list(itertools.product(*(range(reader.size(d)) for d in t.dims)))
        )
        reader.values[t.name] = {
            p: reader.value(s.value, dict(zip(names, p, strict=True))) for p in points
        }
    out = {}
    for t in program.outputs:
        values = list(reader.values[t.name].values())
        shape = (-1,) if t.is_sparse else tuple(reader.size(d) for d in t.dims)
        out[t.name] = np.array(values, float).reshape(shape)
    return out


class _Reader:
    def __init__(self, program: Program, args: dict[str, Any]) -> None:
        self.values: dict[str, dict[tuple[int, ...], float]] = {}
        self.stored: dict[str, list[tuple[int, ...]]] = {}
        self.sizes: dict[Any, int] = {}
        for t in program.inputs:
            x = args[t.name]
            if t.is_sparse:
                coords, values = x.unpack()
                points = list(zip(*(c.tolist() for c in coords), strict=True))
                self.stored.setdefault(t.structure, points)
                self.values[t.name] = dict(zip(points, values.tolist(), strict=True))
            else:
                self.values[t.name] = {p: v.item() for p, v in np.ndenumerate(np.asarray(x))}
            self.sizes |= dict(zip(t.dims, np.shape(x), strict=True))

    def size(self, dim: str | int) -> int:
        return self.sizes[dim] if isinstance(dim, str) else dim

    def value(self, e: Any, env: Env) -> Any:
        if isinstance(e, Const):
            return e.value
        if isinstance(e, Index):
            return env[e.name]
        if isinstance(e, Var):
            return self.sizes[e.name.removesuffix(".size")]
        if isinstance(e, Access):
            at = tuple(self.value(c, env) for c in e.coords)
            return self.values[e.tensor.name].get(at, e.tensor.fill if e.tensor.is_sparse else 0)
        if isinstance(e, Stored):
            at = tuple(self.value(c, env) for c in e.access.coords)
            return at in self.values[e.access.tensor.name]
        if isinstance(e, Binary):
            return _BINARY[e.op](self.value(e.a, env), self.value(e.b, env))
        if isinstance(e, Unary):
            return _UNARY[e.op](self.value(e.a, env))
        if isinstance(e, Select):
            return self.value(e.a if self.value(e.cond, env) else e.b, env)
        if isinstance(e, Cast):
            assert e.dtype.is_float or e.a.dtype.is_int
            return self.value(e.a, env)
        assert isinstance(e, Reduce)
        return _FOLD[e.op]([self.value(e.body, env | at) for at in self.range_of(e, env)])

    def range_of(self, e: Reduce, env: Env) -> list[Env]:
        """What the axes of a reduction are at one point."""
        own = [a.name for a in e.axes]
        driving = {(x.tensor.structure, x.coords): x for x in _accesses(e.body) if _drives(x, own)}
        found: list[Env] = [{}]
        if len(driving) == 1:  # of several none decides: all coordinates
            sparse = next(iter(driving.values()))
            names = [c.name for c in sparse.coords if isinstance(c, Index)]
            rows = [dict(zip(names, p, strict=True)) for p in self.stored[sparse.tensor.structure]]
            outer = [n for n in names if n not in own]
            found = [row for row in rows if all(row[n] == env[n] for n in outer)]
            own = [n for n in own if n not in names]
        sizes = {a.name: self.size(a.dim) for a in e.axes if isinstance(a, Index)}
        for name in own:
            found = [row | {name: c} for row in found for c in range(sizes[name])]
        return found


def _drives(x: Access, own: list[str]) -> bool:
    names = [c.name for c in x.coords if isinstance(c, Index)]
    plain = len(set(names)) == len(x.coords)
    return x.tensor.is_sparse and plain and any(n in own for n in names)


def _accesses(e: Any) -> list[Access]:
    """Accesses in reading order, without those of inner reductions."""
    if isinstance(e, Access):
        return [e, *(x for c in e.coords for x in _accesses(c))]
    if isinstance(e, Stored):
        return _accesses(e.access)
    parts = {Binary: "ab", Unary: "a", Cast: "a"}.get(type(e), "")
    found = [x for name in parts for x in _accesses(getattr(e, name))]
    if isinstance(e, Select):
        found = [x for part in (e.cond, e.a, e.b) for x in _accesses(part)]
    return found
