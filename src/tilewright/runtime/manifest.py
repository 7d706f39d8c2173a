"""The result of building a program: its manifest, plain data for its calls, with the C structs of
their blocks, and its source text, in memory and on disk."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from tilewright.errors import InternalError
from tilewright.ir.body import Body
from tilewright.ir.nodes import COMPARISON
from tilewright.ir.rewrite import FOLD
from tilewright.runtime.layout import Struct


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dims: tuple[str | int, ...]
    dtype: str
    role: str
    structure: str = ""
    strided: bool = False
    fill: float = 0.0


# A number of units: an integer, the name of a size or count, or (operator, Count, Count).
Count = int | str | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One launch. `entry`: the name of its function; `units`: the number of units of each body;
    `rows`: the body that runs each row of its work table. `structure`: the sparse operand whose
    parts are these rows, or "". Units of an `ordered` launch run one after the other."""

    entry: str
    units: tuple[Count, ...]
    rows: tuple[int, ...] = (0,)
    structure: str = ""
    ordered: bool = False
    threads: tuple[int, int] = (1, 1)
    smem_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The tensors, stages and parameters of a built program. `params` and `row` are the fields of
    the two structs, each behind its name in the IR; `formats` are the texts of the formats by
    structure. `packed` names the arrays that the code assumes to have no gaps; `costs` are the
    rows of the tables of a `Report`, in order."""

    name: str
    target: str
    tensors: tuple[TensorSpec, ...]
    params: tuple[tuple[str, ...], ...]
    row: tuple[tuple[str, ...], ...]
    stages: tuple[StageSpec, ...]
    formats: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    index: str = "int32"
    packed: tuple[str, ...] = ()
    costs: tuple[tuple[Any, ...], ...] = ((), (), (), ())

    @property
    def max_rows(self) -> int:
        """Rows of the largest work table. The parameter block of every stage has so many."""
        return max(len(s.rows) for s in self.stages)


ROW_HEAD = (("first", "int64"), ("units", "int64"), ("body", "int64"))


@cache
def structs(manifest: Manifest) -> tuple[Struct, Struct]:
    """The row of the work table, and the parameter block that precedes the table in memory; both
    have 64-bit fields, so that the table begins at the block's end."""
    row = Struct("Row", (*ROW_HEAD, *(field[1:] for field in manifest.row)))
    params = (field[1:] for field in manifest.params)
    return row, Struct("Params0", (*params, ("row_count", "int64")))


def declarations(manifest: Manifest) -> str:
    """The C text of both structs, and of `Params`: the block with its rows behind it."""
    row, params = structs(manifest)
    fields = "\n".join(f"  {f.c_type} {f.name};" for f in params.fields)
    n = manifest.max_rows
    return (
        f"{row.c_decl}\n{params.c_decl}\n"
        f"struct Params {{\n{fields}\n  Row rows[{n}];\n}};\n"
        f'static_assert(sizeof(Params) == {params.size + n * row.size}, "Params: size");\n'
    )


@dataclass(frozen=True, slots=True)
class Built:
    """The result of lowering and rendering: enough to compile, load and call a kernel. `bodies`:
    of each launch on a GPU, all with one text, which is part of `source`."""

    manifest: Manifest
    source: str
    bodies: tuple[Body, ...] = ()

    def to_bytes(self) -> bytes:
        """One line of JSON, then the source as it is (escaping it in JSON took 0.1 ms to undo)."""
        text = self.bodies[0].text if self.bodies else ""
        begin = self.source.index(text)
        head = {
            "manifest": asdict(self.manifest),
            "bodies": [asdict(replace(b, text="")) for b in self.bodies],
            "text": (begin, begin + len(text)),
        }  # fmt: skip
        return f"{json.dumps(head)}\n{self.source}".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Built | None":
        """The value that `to_bytes` wrote; None for bytes of any other form."""
        try:
            head, _, rest = data.partition(b"\n")
            fields, source = json.loads(head), rest.decode()
            begin, end = fields["text"]
            bodies = [Body(**tuples(b) | {"text": source[begin:end]}) for b in fields["bodies"]]
            return cls(manifest_from(fields["manifest"]), source, tuple(bodies))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def manifest_from(fields: dict[str, Any]) -> Manifest:
    """The manifest whose `dataclasses.asdict` JSON holds, equal to it."""
    tensors = tuple(TensorSpec(**tuples(t)) for t in fields["tensors"])
    stages = tuple(StageSpec(**tuples(s)) for s in fields["stages"])
    return Manifest(**tuples(fields) | {"tensors": tensors, "stages": stages})


def tuples(x: Any) -> Any:
    """A value read from JSON, with tuples in place of lists at every depth."""
    if isinstance(x, dict):
        return {name: tuples(v) for name, v in x.items()}
    return tuple(tuples(v) for v in x) if isinstance(x, list) else x


def unit_count(count: Count, values: Mapping[str, int]) -> int:
    """The value of a `Count`; `values` are sizes and counts by name. Raises InternalError[I101] for
    any other object, as a damaged cache file may hold."""
    if type(count) is int:
        return count
    if type(count) is str and count in values:
        return values[count]
    if type(count) is tuple and len(count) == 3 and str(count[0]) in FOLD.keys() - COMPARISON:
        name, a, b = count
        return FOLD[name](unit_count(a, values), unit_count(b, values))
    raise InternalError("I101", f"{count!r} is no unit count", hint="run tilewright cache clear")
