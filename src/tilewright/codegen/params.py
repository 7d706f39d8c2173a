"""The parameter blocks of a program's launches: their fields, with names and types of C."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from tilewright.errors import InternalError
from tilewright.ir import core as ir
from tilewright.ir.names import COUNT, SIZE, STRIDE, is_generated, stride_name

C_TYPES = {
    "bool": "bool", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t",
    "uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t",
    "float16": "uint16_t", "bfloat16": "uint16_t", "float32": "float", "float64": "double",
}  # fmt: skip
STORED_AS_BITS = ("float16", "bfloat16")
_WORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t
char16_t char32_t class compl concept const const_cast consteval constexpr constinit continue
co_await co_return co_yield decltype default delete do double dynamic_cast else enum explicit export
extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
nullptr operator or or_eq private protected public register reinterpret_cast requires return short
signed sizeof static static_assert static_cast struct switch template this thread_local throw true
try typedef typeid typename typeof union unsigned using virtual void volatile wchar_t while xor
xor_eq NULL p r unit raw begin end at first units body rows row_count tw tx ty thread smem Params
Params0 Row int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t"""
_RESERVED = frozenset(_WORDS.split())  # keywords of C++ and names that generated code defines


def c_name(name: str) -> str:
    """A C identifier for a name of the IR, another one for each: a dot becomes two underscores,
    which no name of a user has (`sparse.trace` checks it)."""
    text = re.sub(r"\W", "__", name)
    return f"{text}__" if text in _RESERVED else text


@dataclass(frozen=True, slots=True)
class Params:
    """The fields that a program's launches read: the name in the IR of what each holds, then its
    name and type as `runtime.layout.Struct` has them.

    `params` are common to a launch, `row` belongs to one part of a composed tensor. `written` names
    the buffers that the program stores to; `packed` are the strides of `packed_strides`, by their
    names."""

    params: tuple[tuple[str, ...], ...]
    row: tuple[tuple[str, ...], ...]
    written: frozenset[str] = frozenset()
    packed: Mapping[str, int] = field(default_factory=dict)


def collect_params(program: ir.Program) -> Params:
    """Every buffer, stride, size and count of a program as fields of its two structs."""
    params: dict[str, tuple[str, ...]] = {}
    row: dict[str, tuple[str, ...]] = {}
    nodes = [x for n in program.nests for root in (n.body, *n.grid) for x in ir.walk(root)]
    written = frozenset(x.buffer.name for x in nodes if isinstance(x, ir.Store))
    inputs = {t.name for t in program.inputs}
    for b in program.buffers:
        const = "" if b.name in written else "const "
        field_ = (b.name, c_name(b.name), "ptr", f"{const}{C_TYPES[b.dtype.name]}*")
        if b.scope == "part":
            row[b.name] = field_
        elif b.shape == () and b.name not in written and b.name in inputs:
            kind = "uint16" if b.dtype.name in STORED_AS_BITS else b.dtype.name
            params[b.name] = (b.name, c_name(b.name), kind)
        else:
            params[b.name] = field_
    for x in nodes:
        if isinstance(x, ir.Var) and is_generated(x.name, SIZE, STRIDE, COUNT):
            is_wide = is_generated(x.name, STRIDE) or x.dtype.bits == 64
            struct = row if is_generated(x.name, COUNT) else params
            struct[x.name] = (x.name, c_name(x.name), "int64" if is_wide else "int32")
    packed = {
        stride_name(t.name, d): stride
        for t in program.tensors
        for d, stride in enumerate(packed_strides(t, dict(program.sizes)))
        if stride is not None
    }
    return Params(tuple(params.values()), tuple(row.values()), written, packed)


def packed_strides(tensor: ir.Tensor, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
    """The strides that a dense tensor without gaps has, in elements; None where a size inside is
    known at run time only, and for tensors that are declared `strided`.

    Generated code has these as constants: an address is then a shift, not a product. Arrays with
    gaps run the same source compiled with `TW_STRIDED`, which reads the strides at run time."""
    if tensor.structure or tensor.strided or tensor.role == "inline":
        return ()
    strides: list[int | None] = []
    step: int | None = 1
    for dim in reversed(tensor.dims):
        strides.append(step)
        extent = dim if isinstance(dim, int) else sizes.get(dim)
        step = None if step is None or extent is None else step * extent
    return tuple(reversed(strides))


def host_count(grid: tuple[ir.Expr, ...]) -> Any:
    """The number of units of a nest as data."""
    counts = [count_of(e) for e in grid]
    return reduce(lambda a, b: ("*", a, b), counts) if counts else 1


def count_of(e: Any) -> Any:
    """An integer expression that the host evaluates, as data (`runtime.manifest.Count`)."""
    if isinstance(e, ir.Const):
        return int(e.value)
    if isinstance(e, ir.Var):
        return e.name
    if isinstance(e, ir.Cast):
        return count_of(e.a)
    if isinstance(e, ir.Binary):
        return (e.op, count_of(e.a), count_of(e.b))
    raise InternalError("I101", f"the host cannot compute {e}")
