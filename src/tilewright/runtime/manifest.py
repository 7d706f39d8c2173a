"""What a call needs to know of a built program: plain data, and the C structs made from it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tilewright.errors import InternalError
from tilewright.runtime.layout import Struct


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a program."""

    name: str
    dims: tuple[str | int, ...]
    dtype: str
    role: str
    structure: str = ""
    strided: bool = False
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One launch: its entry, how many units each of its bodies has (host expressions), which body
    serves each row of its work table, its threads. The rows are the parts of `structure`, if it
    follows a composed format. Units of an `ordered` launch run one after the other."""

    entry: str
    units: tuple[str, ...]
    rows: tuple[int, ...] = (0,)
    structure: str = ""
    ordered: bool = False
    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a call needs to know of a built program. `param_names` and `row_names` say what the
    fields of the two structs hold, in the IR's words; `formats` are the texts of the formats by
    structure. `packed` names the arrays of which the code takes for granted that they have no
    gaps."""

    name: str
    target: str
    tensors: tuple[TensorSpec, ...]
    params: tuple[tuple[str, ...], ...]
    row: tuple[tuple[str, ...], ...]
    param_names: tuple[str, ...]
    row_names: tuple[str, ...]
    stages: tuple[StageSpec, ...]
    formats: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    index: str = "int32"
    packed: tuple[str, ...] = ()


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
    n = most_rows(manifest)
    return (
        f"{row.c_decl}\n{params.c_decl}\n"
        f"struct Params {{\n{fields}\n  Row rows[{n}];\n}};\n"
        f'static_assert(sizeof(Params) == {rows_at(params) + n * row.size}, "Params: size");\n'
    )


def most_rows(manifest: Manifest) -> int:
    """Rows of the largest work table: each launch has a parameter block of this size."""
    return max(len(s.rows) for s in manifest.stages)


def rows_at(params: Struct) -> int:
    return -(-params.size // 8) * 8


# ---------------------------------------------------------------------------- on disk


def manifest_text(manifest: Manifest) -> dict[str, Any]:
    """A manifest as JSON holds it; `manifest_from` reads it back."""
    return asdict(manifest)


def manifest_from(held: dict[str, Any]) -> Manifest:
    """The manifest that `manifest_text` wrote, equal to it."""
    tensors = tuple(TensorSpec(**_tuples(t)) for t in held["tensors"])
    stages = tuple(StageSpec(**_tuples(s)) for s in held["stages"])
    return Manifest(**_tuples(held) | {"tensors": tensors, "stages": stages})


def _tuples(x: Any) -> Any:
    """JSON's lists as tuples, but for the fields of the dictionary at the top."""
    if isinstance(x, dict):
        return {name: _tuples(v) for name, v in x.items()}
    return tuple(_tuples(v) for v in x) if isinstance(x, list) else x


# ---------------------------------------------------------------------------- units

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def unit_count(text: str) -> Callable[[Mapping[str, int]], int]:
    """A host expression (`StageSpec.units`) as a function of sizes and counts by name.

    Integers, `v["name"]`, + - * // %, min(…) and max(…) only. Raises InternalError[I101]."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        tree = None
    if tree is None or not _is_count(tree.body):
        raise InternalError(
            "I101", f"{text!r} is no number of units", hint="run tilewright cache clear"
        )
    return eval(f"lambda v: {ast.unparse(tree)}", {"__builtins__": {"min": min, "max": max}})


def _is_count(e: ast.expr) -> bool:
    if isinstance(e, ast.Constant):
        return type(e.value) is int
    if isinstance(e, ast.Subscript):
        named = isinstance(e.value, ast.Name) and e.value.id == "v"
        return named and isinstance(e.slice, ast.Constant) and type(e.slice.value) is str
    if isinstance(e, ast.BinOp):
        return isinstance(e.op, _OPERATORS) and _is_count(e.left) and _is_count(e.right)
    if isinstance(e, ast.UnaryOp):
        return isinstance(e.op, ast.USub) and _is_count(e.operand)
    if isinstance(e, ast.Call):
        known = isinstance(e.func, ast.Name) and e.func.id in ("min", "max") and not e.keywords
        return known and len(e.args) > 1 and all(_is_count(a) for a in e.args)
    return False
