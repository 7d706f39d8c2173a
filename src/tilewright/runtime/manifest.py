"""What a call needs to know of a built program: plain data, and the C structs made from it."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.runtime.layout import Struct


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a program. `fields` are its stride fields by dimension (empty: unused or 1)."""

    name: str
    dims: tuple[str | int, ...]
    dtype: str
    role: str
    structure: str = ""
    strided: bool = False
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One launch: its entry, how many units each part has (host expressions), its threads."""

    entry: str
    units: tuple[str, ...]
    parts: tuple[int, ...]
    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a call needs to know of a built program. `part_formats` gives, for each part of the
    composed format, the case of the kernel that serves it; `format` is its text."""

    name: str
    target: str
    tensors: tuple[TensorSpec, ...]
    params: tuple[tuple[str, ...], ...]
    row: tuple[tuple[str, ...], ...]
    stages: tuple[StageSpec, ...]
    formats: tuple[tuple[str, str], ...] = ()
    part_cases: tuple[int, ...] = (0,)
    sizes: tuple[tuple[str, int], ...] = ()
    index: str = "int32"


ROW_HEAD = (("first", "int64"), ("units", "int64"), ("body", "int64"))


def structs(manifest: Manifest) -> tuple[Struct, Struct]:
    """The row of the work table, and the parameter block that precedes the table in memory."""
    row = Struct("Row", (*ROW_HEAD, *manifest.row))
    params = Struct("Params0", (*manifest.params, ("row_count", "int64")))
    return row, params


def declarations(manifest: Manifest) -> str:
    """The C text of both structs, and of `Params`: the block with its rows behind it."""
    row, params = structs(manifest)
    fields = "\n".join(f"  {f.c_type} {f.name};" for f in params.fields)
    n = len(manifest.part_cases)
    return (
        f"{row.c_decl}\n{params.c_decl}\n"
        f"struct Params {{\n{fields}\n  Row rows[{n}];\n}};\n"
        f'static_assert(sizeof(Params) == {rows_at(params) + n * row.size}, "Params: size");\n'
    )


def rows_at(params: Struct) -> int:
    return -(-params.size // 8) * 8
