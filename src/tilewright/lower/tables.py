"""Statements, the structures that drive their loops, and the buffers of their tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilewright import dtypes
from tilewright.errors import ProgramError
from tilewright.ir import core as ir
from tilewright.ir.levels import Level, Storage
from tilewright.ir.names import PRIME, GeneratedName, count_name, stride_name, values_name


class Driver(NamedTuple):
    """A structure and the names of the indices that it is read at ("" where a coordinate is no
    plain index)."""

    structure: str
    indices: tuple[str, ...]

    @classmethod
    def of(cls, e: ir.Access) -> "Driver":
        names = (c.name if isinstance(c, ir.Index) else "" for c in e.stored_coords)
        return cls(e.tensor.structure, tuple(names))

    @property
    def is_plain(self) -> bool:
        return "" not in self.indices

    def __str__(self) -> str:
        return f"{self.structure}[{', '.join(name or '…' for name in self.indices)}]"


@dataclass(frozen=True, slots=True)
class Statement:
    """The parts of an assignment: `out op= value over axes`."""

    out: ir.Access
    op: str
    axes: tuple[ir.Index, ...]
    value: ir.Expr

    @classmethod
    def of(cls, a: ir.Assign) -> "Statement":
        inner = a.value.a if isinstance(a.value, ir.Cast) else a.value
        if isinstance(inner, ir.Reduce) and not a.op:
            return cls(a.out, inner.op, inner.axes, inner.body)  # type: ignore[arg-type]
        return cls(a.out, a.op, (), a.value)  # an update in place reduces over no axes

    @property
    def values(self) -> tuple[ir.Expr, ...]:
        """Every expression that it computes."""
        return (self.value,)


def drivers(st: Statement) -> dict[Driver, ir.Tensor]:
    """The structures that could drive a reduction: those read at plain indices, one of them
    reduced. The plain evaluator finds them by code of its own (`ir.driving`)."""
    reduced = {a.name for a in st.axes}
    tensors: dict[Driver, ir.Tensor] = {}
    for x in ir.walk(st.value, ir.Access):
        if x.tensor.is_sparse:
            driver = Driver.of(x)
            names = set(driver.indices)
            if driver.is_plain and len(names) == len(driver.indices) and reduced & names:
                tensors.setdefault(driver, x.tensor)
    return tensors


class Tables:
    """The arrays of one nest: the tensors of its program, the formats that the nest sees
    (of a composed format one part), their buffers, and the names that are in use.

    `followed`: the structure whose entries the outer loops follow; `shared`: other parts of its
    format hold entries of the same rows."""

    def __init__(
        self, program: ir.Program, parts: Mapping[str, Any] | None = None, followed: str = "",
        *, shared: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.followed, self.shared = program, followed, shared
        self.tensors = {t.name: t for t in program.tensors}
        self.index = program.index
        self.sizes = dict(program.sizes)
        self.formats = {t.structure: t.format for t in program.tensors if t.structure}
        self.formats.update(parts or {})
        self.names = set(self.tensors)
        self.rows: dict[str, Any] = {}  # `placed.Row` of temporaries, by name
        self.row_index: dict[str, str] = {}  # by structure, of the first access

    def unused_name(self, name: str) -> str:
        """`name` without primes, with a number where the nest uses it already."""
        name = name.replace(PRIME, "")
        chosen, n = name, 1
        while chosen in self.names:
            n += 1
            chosen = f"{name}{n}"
        self.names.add(chosen)
        return chosen

    def variable(self, name: str) -> ir.Var:
        """A coordinate or position of an unused name."""
        return ir.Var(self.unused_name(name), self.index)

    def is_composed(self, structure: str) -> bool:
        return self.tensors[structure].format.is_composed

    def check_row(self, access: Driver) -> None:
        """Raises ProgramError[P107] for a part that is read at two row indices. A nest over a part
        may read its own rows: other parts may hold the others, and some of its own where they are
        `shared`."""
        own = self.row_index.setdefault(access.structure, access.indices[0])
        is_part = access.structure == self.followed and self.is_composed(self.followed)
        if is_part and (own != access.indices[0] or self.shared):
            raise unsearchable(access, self.tensors[access.structure].format)

    def levels(self, structure: str, access: ir.Access | None = None) -> tuple[Level, ...]:
        """The levels of a structure, in this nest. Raises ProgramError[P107] that names `access`
        for a composed format of which the nest follows no part."""
        fmt = self.formats[structure]
        if fmt.is_composed:
            raise unsearchable(structure if access is None else access, fmt)
        return fmt.levels

    def size(self, dim: str | int) -> ir.Expr:
        if isinstance(dim, str) and dim in self.sizes:
            return ir.Const(self.sizes[dim], self.index)
        return ir.size_var(dim, self.index)

    def storage(
        self, structure: str, depth: int, above: Callable[[int], ir.Expr]
    ) -> tuple[Level, Storage]:
        """A level of a structure, and its arrays in the IR; `above`: see `Storage`."""
        level = self.formats[structure].levels[depth]
        size = self.size(self.tensors[structure].dims[level.dim])
        if level.inner:
            size = ir.Const(level.block, self.index)
        elif level.block:
            size = ir.ceil_div(size, level.block)
        count = ir.Var(count_name(structure, depth), self.index)
        arrays: dict[str, ir.Buffer] = {}
        for name, dtype in level.arrays.items():
            own, shape = GeneratedName(structure, name, depth).name, (level.elements(name, count),)
            arrays[name] = ir.Buffer(own, dtype or self.index, shape, "part")
        return level, Storage(size, count, arrays, above)

    def values(self, tensor: ir.Tensor) -> ir.Buffer:
        last = len(self.formats[tensor.structure].levels) - 1
        count = ir.Var(count_name(tensor.structure, last), self.index)
        inner = map(self.size, tensor.dims[len(tensor.dims) - tensor.inner :])
        return ir.Buffer(values_name(tensor.name), tensor.dtype, (count, *inner), "part")

    def buffer(self, tensor: ir.Tensor) -> ir.Buffer:
        shape = tuple(self.size(d) for d in tensor.dims)
        names = (stride_name(tensor.name, d) for d in range(len(shape)))
        strides: list[ir.Expr] = [ir.Var(name, dtypes.int64) for name in names]
        if strides and not tensor.strided:
            strides[-1] = ir.Const(1, dtypes.int64)
        kind = "state" if tensor.role == "temp" else tensor.kind
        return ir.Buffer(tensor.name, tensor.dtype, shape, "global", tuple(strides), kind)


def unmergeable(st: Statement, formats: list[Any]) -> ProgramError:
    stored = ", ".join(map(str, formats))
    rule = f"the loops of {st.out} merge several structures, and {stored} cannot be merged"
    hint = "store them as csr or dcsr; of a sum, write sum(A[i, j]) + sum(B[i, j])"
    return ProgramError("P107", rule, hint=hint)


def unsearchable(access: Any, fmt: Any) -> ProgramError:
    rule = f"{access} is read where no loop follows its entries, and {fmt} cannot be searched"
    return ProgramError("P107", rule, hint="store it as csr, or let the loops follow it")


def names_read(*values: ir.Expr) -> set[str]:
    """The tensors that expressions read."""
    return {x.tensor.name for e in values for x in ir.walk(e, ir.Access)}
