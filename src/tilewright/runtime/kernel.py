"""A built program: checks the arguments of a call, fills the parameter block, launches.

`Manifest` is all that a call needs to know of a program; it is plain data, so that a cached kernel
starts without tracing or lowering anything. Sparse arguments are anything with `.structure`,
`.values`, `.dtype` and `.fill` (`sparse.pack.Packed`).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, InternalError
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import View, allocate, overlaps, view


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
        f'static_assert(sizeof(Params) == {_rows_at(params) + n * row.size}, "Params: size");\n'
    )


def _rows_at(params: Struct) -> int:
    return -(-params.size // 8) * 8


class Launcher:
    """What a target does with a prepared call."""

    def launch(self, kernel: Kernel, call: Call) -> None:
        """Run it once."""
        raise NotImplementedError

    def bind(self, kernel: Kernel, call: Call) -> Callable[[], None]:
        """A function that runs it, with all work that can be done beforehand done."""
        raise NotImplementedError


class Kernel:
    """A built program. Call it with its parameters in order; outputs are allocated by the framework
    of the first dense argument, or given as `out=`.

    Raises ArgumentError (A codes) before anything is written. `source` is the generated text,
    `report()` what the compiler said of it.
    """

    def __init__(self, manifest: Manifest, launcher: Launcher, source: str, resources: Any = None) -> None:
        self.manifest, self.launcher, self.source, self.resources = manifest, launcher, source, resources
        self.row, self.params = structs(manifest)
        self.inputs = [t for t in manifest.tensors if t.role == "input" or t.role == "update"]
        self.results = [t for t in manifest.tensors if t.role == "output"]
        self.temps = [t for t in manifest.tensors if t.role == "temp"]
        self._dtypes = {t.name: dtypes.ALL[t.dtype] for t in manifest.tensors}
        self._fixed = dict(manifest.sizes)
        self._formats = dict(manifest.formats)

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        call = self._prepare(args, named, out)
        if call.total:
            self.launcher.launch(self, call)
        return call.returned

    def bind(self, *args: Any, out: Any = None, **named: Any) -> Bound:
        """A call with everything fixed: running it again costs one native call. The arrays must stay
        where they are; their contents may change."""
        return Bound(self, self._prepare(args, named, out))

    def report(self) -> str:
        """Entries, threads, and registers, shared memory and spills where the compiler tells them."""
        lines = [f"{self.manifest.name} for {self.manifest.target}"]
        for s in self.manifest.stages:
            r = (self.resources or {}).get(s.entry)
            lines.append(f"  {s.entry}: {len(s.units)} bodies, {s.threads[0]}×{s.threads[1]} threads" + (f", {r}" if r else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        args = ", ".join(t.name for t in self.inputs)
        return f"<kernel {self.manifest.name}({args}) for {self.manifest.target}>"

    # -- checking --------------------------------------------------------------------------------

    def _prepare(self, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> Call:
        if named or len(args) != len(self.inputs):
            args = self._matched(args, named)
        call = Call(self, dict(self._fixed))
        for spec, arg in zip(self.inputs, args, strict=True):
            if spec.structure:
                self._take_sparse(call, spec, arg)
            elif spec.dims:
                self._take_dense(call, spec, arg)
            else:
                self._take_scalar(call, spec, arg)
        self._take_outputs(call, out)
        for spec in self.temps:
            made = allocate(call.like, tuple(call.size(d) for d in spec.dims), self._dtypes[spec.name])
            self._take_dense(call, spec, made)
        call.fill()
        return call

    def _matched(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        names = [t.name for t in self.inputs]
        for name in named:
            if name not in names:
                raise ArgumentError("A101", f"{self.manifest.name} has no argument {name!r}", where=name, hint=f"arguments: {', '.join(names)}")
        if len(args) > len(names):
            raise ArgumentError("A101", f"{self.manifest.name} takes {len(names)} arguments, not {len(args)}", hint=", ".join(names))
        given = dict(zip(names, args, strict=False))
        both = given.keys() & named.keys()
        missing = [n for n in names if n not in given and n not in named]
        if both or missing:
            which = f"{sorted(both)} given twice" if both else f"missing: {', '.join(missing)}"
            raise ArgumentError("A101", f"{self.manifest.name}: {which}", hint=f"arguments: {', '.join(names)}")
        return tuple(given.get(n, named.get(n)) for n in names)

    def _take_dense(self, call: Call, spec: TensorSpec, arg: Any, *, written: bool = False) -> None:
        name = spec.name
        try:
            v = view(arg)
        except ArgumentError as e:
            raise ArgumentError(e.code, e.message, where=f"argument {name}", hint=e.hint) from None
        if v.dtype is not self._dtypes[name] and v.dtype != self._dtypes[name] and not _same_bits(v, self._dtypes[name]):
            raise ArgumentError(
                "A102", f"{name} is {v.dtype}, the kernel was built for {self._dtypes[name]}", where=f"argument {name}",
                hint=f'convert it, or build with .typed({name}="{v.dtype}")',
            )  # fmt: skip
        shape = v.shape
        if len(shape) != len(spec.dims):
            raise ArgumentError("A103", f"{name} has {len(shape)} dimensions, expected ({_spell(spec.dims)})", where=f"argument {name}")
        sizes = call.sizes
        for dim, n in zip(spec.dims, shape, strict=True):
            if sizes.setdefault(dim, n) != n if type(dim) is str else dim != n:
                raise ArgumentError(
                    "A103", f"{name} has {n} where {dim!r} is {sizes.get(dim, dim)}; its shape is {shape}",
                    where=f"argument {name}", hint=f"expected ({_spell(spec.dims)})",
                )  # fmt: skip
        strides = v.strides
        if not spec.strided and strides and strides[-1] != 1 and shape[-1] > 1:
            raise ArgumentError(
                "A104", f"the last dimension of {name} has stride {strides[-1]}", where=f"argument {name}",
                hint="make it contiguous (np.ascontiguousarray, .contiguous())",
            )  # fmt: skip
        if call.device and v.device != call.device:
            raise ArgumentError(
                "A105", f"{name} is on {v.device}, other arguments on {call.device}", where=f"argument {name}",
                hint="move it with .to()",
            )  # fmt: skip
        if not call.device:
            call.set_device(v.device, arg, name)
        if (written or spec.role == "update") and v.readonly:
            raise ArgumentError("A104", f"{name} is written to but its memory is read-only", where=f"argument {name}")
        call.views[name] = v

    def _take_scalar(self, call: Call, spec: TensorSpec, arg: Any) -> None:
        kind = self._dtypes[spec.name]
        try:
            value = float(arg) if kind.is_float else int(arg)
        except (TypeError, ValueError):
            raise ArgumentError("A107", f"{spec.name} is a number, not {type(arg).__name__}", where=f"argument {spec.name}") from None
        call.scalars[spec.name] = int(dtypes.bfloat16_bits(_array(value))) if kind.name == "bfloat16" else value

    def _take_sparse(self, call: Call, spec: TensorSpec, arg: Any) -> None:
        s = getattr(arg, "structure", None)
        if s is None:
            raise ArgumentError(
                "A106", f"{spec.name} is sparse but a {type(arg).__name__} was given", where=f"argument {spec.name}",
                hint="pack it: fmt.pack(matrix)",
            )  # fmt: skip
        if repr(s.format) != self._formats[spec.structure]:
            raise ArgumentError(
                "A106", f"{spec.name} is packed as {s.format}, the kernel was built for {self._formats[spec.structure].splitlines()[0]}",
                where=f"argument {spec.name}", hint="decompose() with that format, or pack with this one",
            )  # fmt: skip
        if call.structures.setdefault(spec.structure, s) is not s:
            raise ArgumentError("A106", f"{spec.name} must share the structure of {spec.structure}", where=f"argument {spec.name}", hint="A.with_values(…)")
        if s.index_dtype.name != self.manifest.index:
            raise ArgumentError(
                "A102", f"{spec.name} has {s.index_dtype} coordinates, the kernel was built for {self.manifest.index}",
                where=f"argument {spec.name}", hint=f'build with .typed(index="{s.index_dtype}")',
            )  # fmt: skip
        if arg.dtype != self._dtypes[spec.name]:
            raise ArgumentError("A102", f"{spec.name} is {arg.dtype}, the kernel was built for {self._dtypes[spec.name]}", where=f"argument {spec.name}")
        for dim, n in zip(spec.dims, s.shape, strict=True):
            if call.sizes.setdefault(dim, n) != n if type(dim) is str else dim != n:
                raise ArgumentError("A103", f"{spec.name} has {n} where {dim!r} is {call.sizes.get(dim, dim)}", where=f"argument {spec.name}")
        if call.device and _device(s.device) != call.device:
            raise ArgumentError("A105", f"{spec.name} is on {s.device}, other arguments on {call.device}", where=f"argument {spec.name}", hint=".to()")
        if not call.device:
            call.set_device(_device(s.device), None, spec.name)
        call.packed[spec.name] = arg

    def _take_outputs(self, call: Call, out: Any) -> None:
        given = (out if isinstance(out, tuple) else (out,)) if out is not None else (None,) * len(self.results)
        if len(given) != len(self.results):
            raise ArgumentError("A101", f"{len(given)} outputs given, {len(self.results)} expected", where="out")
        made = []
        for spec, array in zip(self.results, given, strict=True):
            if spec.structure:
                array = self._sparse_output(call, spec, array)
            else:
                fresh = array is None
                if fresh:
                    array = allocate(call.like_array(), tuple(call.size(d) for d in spec.dims), self._dtypes[spec.name])
                self._take_dense(call, spec, array, written=True)
                if not fresh:
                    self._check_apart(call, spec)
            made.append(array)
        made += [call.given[t.name] for t in self.inputs if t.role == "update" and t.name in call.given]
        call.returned = made[0] if len(made) == 1 else tuple(made)

    def _sparse_output(self, call: Call, spec: TensorSpec, array: Any) -> Any:
        if array is not None:
            self._take_sparse(call, spec, array)
            return array
        like = next(call.packed[t.name] for t in self.inputs if t.structure == spec.structure)
        kind = self._dtypes[spec.name]
        values = tuple(allocate(v, (p.size,), kind) for v, p in zip(like.values, like.structure.parts, strict=True))
        made = dataclasses.replace(like, values=values, dtype=kind)
        call.packed[spec.name] = made
        return made

    def _check_apart(self, call: Call, spec: TensorSpec) -> None:
        mine = call.views[spec.name]
        for t in self.inputs:
            other = call.views.get(t.name)
            if other is not None and overlaps(mine, other):
                raise ArgumentError("A108", f"the output {spec.name} overlaps the input {t.name}", where="out", hint="give memory of its own")

    @cached_property
    def unit_counts(self) -> tuple[tuple[Callable[..., int], ...], ...]:
        """For each stage, for each of its bodies: sizes and counts → number of units."""
        return tuple(tuple(eval(f"lambda v: {text}", {}) for text in s.units) for s in self.manifest.stages)  # noqa: S307


class Call:
    """One call being prepared: what is known of its sizes and arrays, and the filled block."""

    __slots__ = ("blocks", "device", "given", "kernel", "like", "packed", "returned", "scalars", "sizes", "structures", "total", "units", "views")

    def __init__(self, kernel: Kernel, sizes: dict[Any, int]) -> None:
        self.kernel, self.sizes = kernel, sizes
        self.views: dict[str, View] = {}
        self.scalars: dict[str, Any] = {}
        self.packed: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.structures: dict[str, Any] = {}
        self.device, self.like, self.returned = "", None, None
        self.blocks: list[Any] = []
        self.units: list[int] = []
        self.total = 0

    def set_device(self, device: str, arg: Any, name: str) -> None:
        self.device = device
        if arg is not None:
            self.like = arg
        wants = "cuda" if self.kernel.manifest.target.startswith("cuda") else "cpu"
        if device.partition(":")[0] != wants:
            raise ArgumentError(
                "A105", f"{name} is on {device}, the kernel was built for {self.kernel.manifest.target}", where=f"argument {name}",
                hint=f'build("{device.partition(":")[0]}") or move the arrays',
            )  # fmt: skip

    def like_array(self) -> Any:
        if self.like is None:
            first = next(iter(self.packed.values()))
            self.like = first.values[0]
        return self.like

    def size(self, dim: str | int) -> int:
        return dim if isinstance(dim, int) else self.sizes[dim]

    def fill(self) -> None:
        """Writes the parameter block of each stage and counts its units."""
        kernel = self.kernel
        manifest = kernel.manifest
        values = [self._field(f) for f in kernel.params.fields]
        rows = [self._row(i) for i in range(len(manifest.part_cases))]
        at = _rows_at(kernel.params)
        for stage, counts in zip(manifest.stages, kernel.unit_counts, strict=True):
            block = ctypes.create_string_buffer(at + len(rows) * kernel.row.size)
            kernel.params._packer.pack_into(block, 0, *values)
            total = 0
            for i, (row, env) in enumerate(rows):
                units = 0
                if stage.parts[0] < 0:
                    units = counts[0](env) if i == 0 else 0
                elif manifest.part_cases[i] in stage.parts:
                    units = counts[stage.parts.index(manifest.part_cases[i])](env)
                kernel.row._packer.pack_into(block, at + i * kernel.row.size, total, units, manifest.part_cases[i], *row)
                total += units
            self.blocks.append(block)
            self.units.append(total)
            self.total += total

    def _field(self, f: Any) -> Any:
        name = f.name
        if name == "row_count":
            return len(self.kernel.manifest.part_cases)
        return _resolve_field(self, name)

    def _row(self, part: int) -> tuple[list[Any], dict[str, int]]:
        """The values of one row of the work table, and the names its unit counts may read."""
        env: dict[str, int] = {f"n_{k}": v for k, v in self.sizes.items() if isinstance(k, str)}
        values: list[Any] = []
        for f in self.kernel.row.fields[len(ROW_HEAD) :]:
            value = _resolve_part(self, f.name, part)
            values.append(value)
        for structure, s in self.structures.items():
            for level, count in enumerate(s.parts[min(part, len(s.parts) - 1)].counts):
                env[f"{structure}_count{level}"] = count
        return values, env


def _resolve_field(call: Call, name: str) -> Any:
    """A field of the parameter block by its name: a pointer, a stride, a size or a scalar."""
    if name in call.views:
        return call.views[name].pointer
    if name in call.scalars:
        return call.scalars[name]
    if name.startswith("n_"):
        return call.sizes[name[2:]]
    tensor, _, dim = name.rpartition("_stride")
    if tensor in call.views:
        v = call.views[tensor]
        return v.strides[int(dim)]
    for known, v in call.views.items():  # names that are no C identifiers
        if _c(known) == name:
            return v.pointer
        if _c(known) == tensor:
            return v.strides[int(dim)]
    raise InternalError("I101", f"nothing fills the field {name}")


def _resolve_part(call: Call, name: str, part: int) -> Any:
    """A field of a row: an array of the structure's part, the values of a tensor, or a count."""
    for tensor, packed in call.packed.items():
        if name == f"{_c(tensor)}_values":
            return view(packed.values[part]).pointer
    for structure, s in call.structures.items():
        p = s.parts[part if len(s.parts) > part else 0]
        prefix = f"{_c(structure)}_"
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            kind, level = rest.rstrip("0123456789"), int(rest[len(rest.rstrip("0123456789")) :])
            if kind == "count":
                return p.counts[level] if level < len(p.counts) else 0
            has = level < len(p.arrays) and kind in p.arrays[level]
            return view(p.arrays[level][kind]).pointer if has else 0  # another part's format has it
    raise InternalError("I101", f"nothing fills the field {name}")


def _c(name: str) -> str:
    return "".join(ch if ch.isalnum() or ch == "_" else "_" for ch in name)


def _same_bits(v: View, wanted: DType) -> bool:
    """NumPy has no bfloat16: its bits in uint16 pass as one."""
    return v.dtype.kind == "u" and v.dtype.bits == wanted.bits and wanted.numpy.kind == "u"


def _device(device: str) -> str:
    return f"{device}:0" if device == "cuda" else device


def _spell(dims: tuple[str | int, ...]) -> str:
    return " × ".join(map(str, dims))


def _array(value: float) -> Any:
    import numpy as np

    return np.array(value, np.float32)


class Bound:
    """A call with its arguments fixed. `outputs` is what it writes; calling it returns that."""

    __slots__ = ("_run", "call", "kernel", "outputs")

    def __init__(self, kernel: Kernel, call: Call) -> None:
        self.kernel, self.call, self.outputs = kernel, call, call.returned
        self._run = kernel.launcher.bind(kernel, call)

    def __call__(self) -> Any:
        self._run()
        return self.outputs

    def __repr__(self) -> str:
        return f"<bound {self.kernel!r}, {self.call.total} units>"

