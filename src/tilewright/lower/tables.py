"""Statements taken apart, and the buffers that tensors become: what nests are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import nodes as ir
from tilewright.ir.levels import Level, Storage
from tilewright.ir.names import Given, count_name, stride_name, values_name
from tilewright.ir.rewrite import add, ceil_div, walk

Driver = tuple[str, tuple[str, ...]]
"""A structure, and the names of the indices that it is read at."""


@dataclass(frozen=True, slots=True)
class Statement:
    """An assignment taken apart: `out op= value over axes`."""

    out: ir.Access
    op: str
    axes: tuple[ir.Index, ...]
    value: ir.Expr
    wrap: Callable[[ir.Expr], ir.Expr]

    @classmethod
    def of(cls, a: ir.Assign) -> Statement:
        value, to = a.value, a.out.dtype
        inner = value.a if isinstance(value, ir.Cast) else value
        if a.op:  # an update in place of its own: over no axes
            return cls(a.out, a.op, (), value, lambda e: e)
        if isinstance(inner, ir.Reduce):
            return cls(a.out, inner.op, inner.axes, inner.body, lambda e: ir.cast(e, to))  # type: ignore[arg-type]
        return cls(a.out, "", (), value, lambda e: e)


def drivers(st: Statement) -> dict[Driver, ir.Tensor]:
    """The structures that could drive a reduction, in reading order: those read at plain indices,
    one of them reduced."""
    reduced = {a.name for a in st.axes}
    found: dict[Driver, ir.Tensor] = {}
    for x in walk(st.value):
        if isinstance(x, ir.Access) and x.tensor.is_sparse:
            names = tuple(c.name if isinstance(c, ir.Index) else "" for c in x.coords)
            if "" not in names and len(set(names)) == len(names) and reduced & set(names):
                found.setdefault((x.tensor.structure, names), x.tensor)
    return found


class Tables:
    """What the nests of one program share: its tensors, their formats in the nest that is being
    built, and the buffers they are stored in."""

    def __init__(self, program: ir.Program) -> None:
        self.program = program
        self.tensors = {t.name: t for t in program.tensors}
        self.index = program.index
        self.sizes = dict(program.sizes)
        self.format: dict[str, Any] = {}  # structure -> the format it has in the nest being built
        self.names: set[str] = set()

    def driver(self, st: Statement) -> tuple[str, tuple[str, ...]] | None:
        """The structure whose stored coordinates the statement follows, and its index names."""
        if st.out.tensor.is_sparse:
            return st.out.tensor.structure, tuple(c.name for c in st.out.coords)  # type: ignore[attr-defined]
        return next(iter(drivers(st)), None)

    def borrowable(self, t: Statement) -> tuple[str, tuple[str, ...]] | None:
        """The driver of a reduction as the loops around it can follow it: its own indices are none
        of theirs, though they have the same names."""
        found = self.driver(t)
        own = {a.name for a in t.axes}
        return found and (found[0], tuple("" if n in own else n for n in found[1]))

    # -- buffers -----------------------------------------------------------------------------

    def size(self, dim: str | int) -> ir.Expr:
        if isinstance(dim, str) and dim in self.sizes:
            return ir.Const(self.sizes[dim], self.index)
        return ir.size_var(dim, self.index)

    def storage(self, structure: str, depth: int) -> tuple[Level, Storage]:
        level = self.format[structure].levels[depth]
        size = self.size(self.tensors[structure].dims[level.dim])
        if level.inner:
            size = ir.Const(level.block, self.index)
        elif level.block:
            size = ceil_div(size, level.block)
        count = ir.Var(count_name(structure, depth), self.index)
        made = {
            name: ir.Buffer(
                Given(structure, name, depth).name,
                self.index,
                (add(count, 1) if name == "indptr" else count,),
                "part",
            )
            for name in level.arrays
        }
        return level, Storage(size, count, made.get("indptr"), made.get("indices"))

    def values(self, tensor: ir.Tensor) -> ir.Buffer:
        last = len(self.format[tensor.structure].levels) - 1
        return ir.Buffer(
            values_name(tensor.name),
            tensor.dtype,
            (ir.Var(count_name(tensor.structure, last), self.index),),
            "part",
        )

    def buffer(self, tensor: ir.Tensor) -> ir.Buffer:
        shape = tuple(self.size(d) for d in tensor.dims)
        if tensor.role == "inline":
            return ir.Buffer(tensor.name, tensor.dtype, shape, "register")
        strides: list[ir.Expr] = [
            ir.Var(stride_name(tensor.name, d), dtypes.int64) for d in range(len(shape))
        ]
        if strides and not tensor.strided:
            strides[-1] = ir.Const(1, dtypes.int64)
        kind = "state" if tensor.role == "temp" else tensor.kind
        return ir.Buffer(tensor.name, tensor.dtype, shape, "global", tuple(strides), kind)


def shares_rows(name: str, fmt: Any) -> ProgramError:
    return ProgramError(
        "P107",
        f"{name} is more than one sum (or max, min) and {fmt} shares its rows",
        hint="use a format that keeps rows whole: csr, or hyb with col_parts=1 and long_rows='csr'",
    )


def unsearchable(name: str, fmt: Any) -> ProgramError:
    return ProgramError(
        "P107", f"{name} is read where its entries are not followed, and {fmt} cannot be searched",
        hint="store it as csr, or let the loops follow it",
    )  # fmt: skip


def indices_in(coords: tuple[ir.Expr, ...]) -> list[ir.Index]:
    """The indices in output coordinates, in order, once each."""
    found = [x for c in coords for x in walk(c) if isinstance(x, ir.Index)]
    return list({x.name: x for x in found}.values())
