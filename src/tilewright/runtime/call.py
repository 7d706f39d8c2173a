"""One call being prepared: every argument checked, every size known, the parameter block filled.

Sparse arguments are anything with `.structure`, `.values`, `.dtype` (`sparse.pack.Packed`). What is
checked here is checked once: a later call with arguments of the same layout reuses the frame.
"""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError, InternalError
from tilewright.runtime.layout import Struct
from tilewright.runtime.manifest import ROW_HEAD, Manifest, TensorSpec, rows_at
from tilewright.runtime.view import View, allocate, allocator, byte_range, overlaps, view


@dataclass(slots=True)
class Result:
    """One output of a frame. `make(like)` allocates it in the framework of the argument that call
    number `like` has (None: the output is sparse, or only values can say); `reach` are its first
    and last byte relative to its address."""

    spec: TensorSpec
    shape: tuple[int, ...]
    slots: Sequence[Any]
    like: int | None
    make: Callable[[Any], Any]
    reach: tuple[int, int]


@dataclass(slots=True)
class Frame:
    """The parameter blocks of a call, one a stage, ready to be launched again.

    `slots[name]` are the places that hold the address (or the value) of an argument: writing them
    is all that another call with the same layout has to do. A frame owns none of the caller's
    arrays and sees structures through weak references: a kernel that waits for its next call keeps
    nothing alive. `keep` is the frame's own memory (a bound call adds its arguments).
    """

    blocks: list[Any]
    units: list[int]
    device: str
    lacks: tuple[str, ...]  # what generated code takes for granted and these arrays do not have
    slots: dict[str, list[Any]]
    results: list[Result]
    structures: dict[str, weakref.ref[Any]]
    keep: list[Any]
    views: dict[str, View]
    sizes: dict[Any, int]
    fills: list[Sequence[Any]]  # the slots of each input
    reach: list[tuple[int, int]]  # of each input: first and last byte relative to its address
    run: Callable[[], None] | None = None


class Call:
    """Checks arguments against a manifest and collects what they say. Raises ArgumentError."""

    def __init__(self, manifest: Manifest, kinds: dict[str, DType]) -> None:
        self.manifest, self.kinds = manifest, kinds
        self.sizes: dict[Any, int] = dict(manifest.sizes)
        self.views: dict[str, View] = {}
        self.scalars: dict[str, Any] = {}
        self.packed: dict[str, Any] = {}
        self.structures: dict[str, Any] = {}
        self.device = ""
        self.like: Any = None
        self.like_number: int | None = None  # among the inputs
        self._taken = 0

    # -- arguments -------------------------------------------------------------------------------

    def take(self, spec: TensorSpec, arg: Any) -> None:
        """One input."""
        if spec.structure:
            self._take_sparse(spec, arg)
        elif spec.dims:
            self.take_dense(spec, arg, written=spec.role == "update")
            if self.like is None:
                self.like, self.like_number = arg, self._taken
        else:
            self.scalars[spec.name] = scalar_value(spec, self.kinds[spec.name], arg)
        self._taken += 1

    def take_dense(self, spec: TensorSpec, arg: Any, *, written: bool = False) -> None:
        """A dense array: dtype, rank, sizes, strides, device, and that it may be written."""
        name, where = spec.name, f"argument {spec.name}"
        try:
            v = view(arg)
        except ArgumentError as e:
            raise ArgumentError(e.code, e.message, where=where, hint=e.hint) from None
        kind = self.kinds[name]
        if v.dtype != kind and not _same_bits(v, kind):
            raise ArgumentError(
                "A102", f"{name} is {v.dtype}, the kernel was built for {kind}", where=where,
                hint=f'convert it, or build with .typed({name}="{v.dtype}")',
            )  # fmt: skip
        if len(v.shape) != len(spec.dims):
            raise ArgumentError(
                "A103",
                f"{name} has {len(v.shape)} dimensions, expected {_spell(spec)}",
                where=where,
            )
        self._take_sizes(spec, v.shape)
        if not spec.strided and v.strides[-1] != 1 and v.shape[-1] > 1 and v.size:
            raise ArgumentError(
                "A104", f"the last dimension of {name} has stride {v.strides[-1]}", where=where,
                hint="make it contiguous (np.ascontiguousarray, .contiguous())",
            )  # fmt: skip
        if written and v.readonly:
            raise ArgumentError("A104", f"{name} is written to but is read-only", where=where)
        self._take_device(v.device, name)
        self.views[name] = v

    def _take_sparse(self, spec: TensorSpec, arg: Any) -> None:
        name, where = spec.name, f"argument {spec.name}"
        s = getattr(arg, "structure", None)
        if s is None:
            raise ArgumentError(
                "A106", f"{name} is sparse but a {type(arg).__name__} was given", where=where,
                hint="pack it: fmt.pack(matrix)",
            )  # fmt: skip
        built_for = dict(self.manifest.formats)[spec.structure]
        if repr(s.format) != built_for:
            raise ArgumentError(
                "A106",
                f"{name} is packed as {s.format}, the kernel was built for {built_for}",
                where=where,
                hint="decompose() with that format, or pack with this one",
            )
        if self.structures.setdefault(spec.structure, s) is not s:
            raise ArgumentError(
                "A106", f"{name} must share the structure of {spec.structure}", where=where,
                hint="make it with A.with_values(…)",
            )  # fmt: skip
        if s.index_dtype.name != self.manifest.index:
            raise ArgumentError(
                "A102",
                f"{name} has {s.index_dtype} coordinates, "
                f"the kernel was built for {self.manifest.index}",
                where=where,
                hint=f'build with .typed(index="{s.index_dtype}")',
            )
        if arg.dtype != self.kinds[name]:
            raise ArgumentError(
                "A102",
                f"{name} is {arg.dtype}, the kernel was built for {self.kinds[name]}",
                where=where,
                hint=f'build with .typed({name}="{arg.dtype}")',
            )
        self._take_sizes(spec, s.shape)
        self._take_device(f"{s.device}:0" if s.device == "cuda" else s.device, name)
        self.packed[name] = arg

    def _take_sizes(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        for dim, n in zip(spec.dims, shape, strict=True):
            wanted = dim if isinstance(dim, int) else self.sizes.setdefault(dim, n)
            if wanted != n:
                raise ArgumentError(
                    "A103",
                    f"{spec.name} has {n} where {dim!r} is {wanted}; its shape is {tuple(shape)}",
                    where=f"argument {spec.name}",
                    hint=f"expected {_spell(spec)}",
                )

    def _take_device(self, device: str, name: str) -> None:
        if self.device and device != self.device:
            raise ArgumentError(
                "A105",
                f"{name} is on {device}, other arguments on {self.device}",
                where=f"argument {name}",
                hint="move it with .to()",
            )
        wants = "cuda" if self.manifest.target.startswith("cuda") else "cpu"
        if device.partition(":")[0] != wants:
            raise ArgumentError(
                "A105",
                f"{name} is on {device}, the kernel was built for {self.manifest.target}",
                where=f"argument {name}",
                hint=f'build("{device.partition(":")[0]}"), or move the arrays',
            )
        self.device = device

    # -- outputs ---------------------------------------------------------------------------------

    def shape_of(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else self.sizes[d] for d in spec.dims)

    def take_output(self, spec: TensorSpec, array: Any, inputs: list[TensorSpec]) -> None:
        """An output that the caller gave: checked like an input, writable, apart from all
        inputs."""
        if spec.structure:
            given = dict(self.packed)
            self._take_sparse(spec, array)
            check_values_apart(array, spec.name, given)
            return
        self.take_dense(spec, array, written=True)
        for t in inputs:
            other = self.views.get(t.name)
            if other is not None and overlaps(self.views[spec.name], other):
                raise ArgumentError(
                    "A108",
                    f"the output {spec.name} overlaps the input {t.name}",
                    where="out",
                    hint="give it memory of its own",
                )

    def make_output(self, spec: TensorSpec) -> Any:
        """A new output in the framework of the first dense argument, or of the values it
        resembles."""
        kind = self.kinds[spec.name]
        if spec.structure:
            made = sparse_output(
                next(
                    p
                    for p in self.packed.values()
                    if p.structure is self.structures[spec.structure]
                ),
                kind,
            )
            self.packed[spec.name] = made
            return made
        like = self.like
        if like is None:
            like = next(iter(self.packed.values())).values[0]
        made = allocate(like, self.shape_of(spec), kind)
        self.take_dense(spec, made, written=True)
        return made

    # -- the parameter block ---------------------------------------------------------------------

    def frame(self, row: Struct, params: Struct, counts: Any, outputs: list[TensorSpec]) -> Frame:
        """Fills the block of each stage and counts its units."""
        manifest = self.manifest
        values = [self._field(f.name) for f in params.fields]
        rows = [self._row(row, i) for i in range(len(manifest.part_cases))]
        at = rows_at(params)
        blocks, units = [], []
        for stage, of_case in zip(manifest.stages, counts, strict=True):
            block = ctypes.create_string_buffer(at + len(rows) * row.size)
            params.pack_into(
                block, **dict(zip((f.name for f in params.fields), values, strict=True))
            )
            total = 0
            for i, (fields, env) in enumerate(rows):
                case = manifest.part_cases[i]
                n = 0
                if stage.parts[0] < 0:
                    n = of_case[0](env) if i == 0 else 0
                elif case in stage.parts:
                    n = of_case[stage.parts.index(case)](env)
                one = row.pack(first=total, units=n, body=case, **fields)
                ctypes.memmove(ctypes.addressof(block) + at + i * row.size, one, row.size)
                total += n
            blocks.append(block)
            units.append(total)
        slots = self._slots(blocks, row, params)
        inputs = [t for t in manifest.tensors if t.role in ("input", "update")]
        return Frame(
            blocks=blocks,
            units=units,
            device=self.device,
            lacks=self._lacks(),
            slots=slots,
            results=[self._result(t, slots.get(t.name, ())) for t in outputs],
            structures={n: weakref.ref(s) for n, s in self.structures.items()},
            keep=[],
            views={n: dataclasses.replace(v, owner=None) for n, v in self.views.items()},
            sizes=dict(self.sizes),
            fills=[slots.get(t.name, ()) for t in inputs],
            reach=[
                byte_range(self.views[t.name]) if t.dims and not t.structure else (0, 0)
                for t in inputs
            ],
        )

    def _lacks(self) -> tuple[str, ...]:
        found = []
        if self.device != "cpu" and not all(
            v.pointer % 16 == 0 and _rows_aligned(v) for v in self.views.values()
        ):
            found.append("TW_UNALIGNED")
        if not all(self.views[name].is_contiguous for name in self.manifest.packed):
            found.append("TW_STRIDED")
        return tuple(found)

    def _result(self, spec: TensorSpec, slots: Sequence[Any]) -> Result:
        kind = self.kinds[spec.name]
        if spec.structure:
            return Result(spec, (), slots, None, lambda like: sparse_output(like, kind), (0, 0))
        shape, reach = self.shape_of(spec), byte_range(self.views[spec.name])
        if self.like_number is None:
            return Result(spec, shape, slots, None, lambda v: allocate(v, shape, kind), reach)
        return Result(
            spec, shape, slots, self.like_number, allocator(self.like, shape, kind), reach
        )

    def _slots(self, blocks: list[Any], row: Struct, params: Struct) -> dict[str, list[Any]]:
        """Where the address of each dense array, the values of each sparse one and each number
        go."""
        found: dict[str, list[Any]] = {}
        known = {c_name(n): n for n in (*self.views, *self.scalars)}
        number = {"float32": ctypes.c_float, "float64": ctypes.c_double}
        for block in blocks:
            for f in params.fields:
                if f.name in known:
                    place = (
                        ctypes.c_uint64
                        if f.type == "ptr"
                        else number.get(f.type) or getattr(ctypes, f"c_{f.type}")
                    )
                    found.setdefault(known[f.name], []).append(place.from_buffer(block, f.offset))
            for part in range(len(self.manifest.part_cases)):
                base = rows_at(params) + part * row.size
                for name in self.packed:
                    field = f"{c_name(name)}_values"
                    if any(f.name == field for f in row.fields):
                        found.setdefault(name, []).append(
                            ctypes.c_uint64.from_buffer(block, base + row.offset(field))
                        )
        return found

    def _field(self, name: str) -> Any:
        """A field of the block by its name: an address, a stride, a size or a number."""
        if name == "row_count":
            return len(self.manifest.part_cases)
        for known, v in self.views.items():
            plain = c_name(known)
            if name == plain:
                return v.pointer
            if name.startswith(f"{plain}_stride") and name[len(plain) + 7 :].isdigit():
                return v.strides[int(name[len(plain) + 7 :])]
        for known, value in self.scalars.items():
            if name == c_name(known):
                return value
        if name.startswith("size_"):
            return self.sizes[name[5:]]
        raise InternalError("I101", f"nothing fills the field {name}")

    def _row(self, row: Struct, part: int) -> tuple[dict[str, Any], dict[str, int]]:
        """The fields of one row of the work table, and the names its unit count may read."""
        env = {f"size_{k}": v for k, v in self.sizes.items() if isinstance(k, str)}
        for structure, s in self.structures.items():
            counts = s.parts[part if part < len(s.parts) else 0].counts
            env |= {f"{structure}_count{level}": count for level, count in enumerate(counts)}
        fields = {f.name: self._row_field(f.name, part) for f in row.fields[len(ROW_HEAD) :]}
        return fields, env

    def _row_field(self, name: str, part: int) -> int:
        """An array of the structure's part, the values of a tensor, or a count; 0 for what only the
        formats of other parts have."""
        for tensor, packed in self.packed.items():
            if name == f"{c_name(tensor)}_values":
                return view(packed.values[part if part < len(packed.values) else 0]).pointer
        for structure, s in self.structures.items():
            prefix = f"{c_name(structure)}_"
            if name.startswith(prefix):
                p = s.parts[part if part < len(s.parts) else 0]
                kind = name[len(prefix) :].rstrip("0123456789")
                level = int(name[len(prefix) + len(kind) :])
                if kind == "count":
                    return p.counts[level] if level < len(p.counts) else 0
                has = level < len(p.arrays) and kind in p.arrays[level]
                return view(p.arrays[level][kind]).pointer if has else 0
        raise InternalError("I101", f"nothing fills the field {name}")


def scalar_value(spec: TensorSpec, kind: DType, arg: Any) -> float | int:
    """A number for a scalar parameter."""
    try:
        value = float(arg) if kind.is_float else int(arg)
    except (TypeError, ValueError):
        raise ArgumentError(
            "A107",
            f"{spec.name} is a number, not {type(arg).__name__}",
            where=f"argument {spec.name}",
        ) from None
    if kind.name == "bfloat16":
        return int(dtypes.bfloat16_bits(np.array(value, np.float32)))
    if kind.name == "float16":
        return int(np.array(value, np.float16).view(np.uint16))
    return value


def sparse_output(like: Any, kind: DType) -> Any:
    """A tensor of the structure of `like` with new values; padding is zero, entries are not set."""
    values = tuple(
        _as_stored(allocate(v, (p.size,), kind), kind)
        for v, p in zip(like.values, like.structure.parts, strict=True)
    )
    return dataclasses.replace(like, values=values, dtype=kind)


def check_values_apart(mine: Any, name: str, inputs: Mapping[str, Any]) -> None:
    """Refuses a sparse output whose values overlap those of a sparse input."""
    for other, packed in inputs.items():
        pairs = ((view(a), view(b)) for a in mine.values for b in packed.values)
        if any(overlaps(a, b) for a, b in pairs):
            raise ArgumentError(
                "A108", f"the output {name} overlaps the input {other}", where="out",
                hint="give it memory of its own",
            )  # fmt: skip


def _as_stored(values: Any, kind: DType) -> Any:
    """Values of a packed tensor on the host are bits where NumPy lacks the dtype, whatever other
    packages teach it."""
    return values.view(kind.numpy) if isinstance(values, np.ndarray) else values


def c_name(name: str) -> str:
    return "".join(ch if ch.isalnum() or ch == "_" else "_" for ch in name)


def _rows_aligned(v: View) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    item = v.dtype.itemsize
    return all(
        s * item % 16 == 0 or n <= 1 for s, n in zip(v.strides[:-1], v.shape[:-1], strict=True)
    )


def _same_bits(v: View, wanted: DType) -> bool:
    """NumPy has no bfloat16: its bits in uint16 pass as one."""
    return v.dtype.kind == "u" and v.dtype.bits == wanted.bits and wanted.numpy.kind == "u"


def _spell(spec: TensorSpec) -> str:
    return f"({' × '.join(map(str, spec.dims))})"
