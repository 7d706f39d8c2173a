"""One call being prepared: every argument checked, every size known, the parameter block filled.

Sparse arguments are anything with `.structure`, `.values`, `.dtype` (`sparse.pack.Packed`). What is
checked here is checked once: a later call with arguments of the same layout reuses the frame.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.ir.names import COUNT, SIZE, VALUES, count_name, parse_name, size_name
from tilewright.runtime.layout import Struct
from tilewright.runtime.manifest import (
    ROW_HEAD,
    Manifest,
    TensorSpec,
    most_rows,
    rows_at,
    unit_count,
)
from tilewright.runtime.view import View, address, allocate, allocator, byte_range, view

Slot = tuple[Any, int]
"""A place in a parameter block that takes an address or a number, and the part of the format whose
values it is for (0 for what is not sparse)."""


@dataclass(slots=True)
class Result:
    """One output of a frame. `make(like)` allocates it in the framework of the argument that call
    number `like` has (None: the output is sparse, or only values can say); `reach` are its first
    and last byte relative to its address."""

    spec: TensorSpec
    shape: tuple[int, ...]
    slots: Sequence[Slot]
    like: int | None
    make: Callable[[Any], Any]
    reach: tuple[int, int]


@dataclass(slots=True)
class Frame:
    """The parameter blocks of a call, one a stage, ready to be launched again.

    `slots` are the places of each argument, by name: writing them is all that another call with the
    same layout has to do. `addresses`, `values` and `numbers` list those of dense, sparse and
    scalar inputs with the input's number. A frame owns none of the caller's
    arrays and sees structures through weak references: a kernel that waits for its next call keeps
    nothing alive. `keep` is the frame's own memory (a bound call adds its arguments).
    """

    blocks: list[Any]
    units: list[int]
    device: str
    lacks: tuple[str, ...]  # what generated code takes for granted and these arrays do not have
    slots: dict[str, list[Slot]]
    results: list[Result]
    structures: dict[str, weakref.ref[Any]]
    keep: list[Any]
    views: dict[str, View]
    sizes: dict[Any, int]
    addresses: list[tuple[Any, int]]
    values: list[tuple[Any, int, int]]  # and the part
    numbers: list[tuple[int, list[Any]]]
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
            _check_fill(spec, arg)
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
            raise _wrong_dtype(spec, kind, v.dtype)
        if len(v.shape) != len(spec.dims):
            raise ArgumentError(
                "A103",
                f"{name} has {len(v.shape)} dimensions, expected {_spell(spec)}",
                where=where,
            )
        self._take_sizes(spec, v.shape)
        if spec.dims and not spec.strided and v.strides[-1] != 1 and v.shape[-1] > 1 and v.size:
            raise ArgumentError(
                "A104", f"the last dimension of {name} has stride {v.strides[-1]}", where=where,
                hint="make it contiguous (np.ascontiguousarray, .contiguous())",
            )  # fmt: skip
        if written and v.readonly:
            raise ArgumentError("A104", f"{name} is written to but is read-only", where=where)
        if written and _meets_itself(v):
            raise ArgumentError(
                "A104", f"elements of {name} share memory: strides {v.strides}", where=where,
                hint="written arrays are not broadcast views: make a copy",
            )  # fmt: skip
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
            raise _wrong_dtype(spec, self.kinds[name], arg.dtype)
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

    def take_output(self, spec: TensorSpec, array: Any) -> None:
        """An output that the caller gave: checked like an input, and writable."""
        if spec.structure:
            self._take_sparse(spec, array)
            if any(view(v).readonly for v in array.values):
                raise ArgumentError("A104", f"the values of {spec.name} are read-only", where="out")
        else:
            self.take_dense(spec, array, written=True)

    def spans(self, specs: list[TensorSpec]) -> list[Span]:
        """The bytes of arguments and outputs."""
        found: list[Span] = []
        for t in specs:
            if t.structure:
                found += value_spans(t.name, self.packed[t.name])
            elif t.name in self.views:
                v = self.views[t.name]
                low, high = byte_range(v)
                found.append((t.name, v.pointer + low, v.pointer + high))
        return found

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

    def frame(self, row: Struct, params: Struct, outputs: list[TensorSpec]) -> Frame:
        """Fills the block of each stage and counts its units."""
        manifest = self.manifest
        names = (*manifest.param_names, "")  # the last field counts the rows
        at = rows_at(params)
        blocks, units = [], []
        for stage in manifest.stages:
            block = ctypes.create_string_buffer(at + most_rows(manifest) * row.size)
            values = [self._field(name) if name else len(stage.rows) for name in names]
            params.pack_into(
                block, **dict(zip((f.name for f in params.fields), values, strict=True))
            )
            total = 0
            for i, body in enumerate(stage.rows):
                n = unit_count(stage.units[body], self._counts(stage.structure, i))
                fields = self._row(row, stage.structure, i)
                one = row.pack(first=total, units=n, body=body, **fields)
                ctypes.memmove(ctypes.addressof(block) + at + i * row.size, one, row.size)
                total += n
            blocks.append(block)
            units.append(total)
        slots = self._slots(blocks, row, params)
        inputs = [t for t in manifest.tensors if t.role in ("input", "update")]
        filled = [(t, n, slot) for n, t in enumerate(inputs) for slot in slots.get(t.name, ())]
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
            addresses=[(at, n) for t, n, (at, _) in filled if t.dims and not t.structure],
            values=[(at, n, part) for t, n, (at, part) in filled if t.structure],
            numbers=[
                (n, [at for at, _ in slots.get(t.name, ())])  # none: checked all the same
                for n, t in enumerate(inputs)
                if not t.dims and not t.structure
            ],
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

    def _result(self, spec: TensorSpec, slots: Sequence[Slot]) -> Result:
        kind = self.kinds[spec.name]
        if spec.structure:
            return Result(spec, (), slots, None, lambda like: sparse_output(like, kind), (0, 0))
        shape, reach = self.shape_of(spec), byte_range(self.views[spec.name])
        if self.like_number is None:
            return Result(spec, shape, slots, None, lambda v: allocate(v, shape, kind), reach)
        return Result(
            spec, shape, slots, self.like_number, allocator(self.like, shape, kind), reach
        )

    def _slots(self, blocks: list[Any], row: Struct, params: Struct) -> dict[str, list[Slot]]:
        """Where the address of each dense array, the values of each sparse one (part after part)
        and each number go."""
        found: dict[str, list[Slot]] = {}
        number = {"float32": ctypes.c_float, "float64": ctypes.c_double}
        for block, stage in zip(blocks, self.manifest.stages, strict=True):
            for f, name in zip(params.fields, self.manifest.param_names, strict=False):
                if name in self.views or name in self.scalars:
                    place = (
                        ctypes.c_uint64
                        if f.type == "ptr"
                        else number.get(f.type) or getattr(ctypes, f"c_{f.type}")
                    )
                    found.setdefault(name, []).append((place.from_buffer(block, f.offset), 0))
            for i in range(len(stage.rows)):
                base = rows_at(params) + i * row.size
                for f, name in zip(
                    row.fields[len(ROW_HEAD) :], self.manifest.row_names, strict=True
                ):
                    what = _given(name)
                    if what.kind == VALUES:
                        part = i if self._structure(what.owner) == stage.structure else 0
                        slot = ctypes.c_uint64.from_buffer(block, base + f.offset)
                        found.setdefault(what.owner, []).append((slot, part))
        return found

    def _field(self, name: str) -> Any:
        """What a field of the block holds: an address, a number, a size or a stride."""
        if name in self.views:
            return self.views[name].pointer
        if name in self.scalars:
            return self.scalars[name]
        what = _given(name)
        if what.kind == SIZE:
            return self.sizes[what.owner]
        return self.views[what.owner].strides[what.number]

    def _counts(self, followed: str, i: int) -> dict[str, int]:
        """Sizes, and the counts of the structures as row i of a work table sees them."""
        found = {size_name(d): n for d, n in self.sizes.items() if isinstance(d, str)}
        for structure, s in self.structures.items():
            for level, count in enumerate(s.parts[i if structure == followed else 0].counts):
                found[count_name(structure, level)] = count
        return found

    def _row(self, row: Struct, followed: str, i: int) -> dict[str, int]:
        """The fields of row i of the work table over the parts of a structure."""
        fields = row.fields[len(ROW_HEAD) :]
        names = self.manifest.row_names
        return {
            f.name: self._row_field(_given(name), followed, i)
            for f, name in zip(fields, names, strict=True)
        }

    def _row_field(self, what: tuple[str, str, int], followed: str, i: int) -> int:
        """An array of a structure's part, the values of a tensor, or a count; 0 for what only the
        formats of other parts have."""
        owner, kind, level = what
        if kind == VALUES:
            part = i if self._structure(owner) == followed else 0
            return view(self.packed[owner].values[part]).pointer
        p = self.structures[owner].parts[i if owner == followed else 0]
        if kind == COUNT:
            return p.counts[level] if level < len(p.counts) else 0
        has = level < len(p.arrays) and kind in p.arrays[level]
        return view(p.arrays[level][kind]).pointer if has else 0

    def _structure(self, tensor: str) -> str:
        return next(t.structure for t in self.manifest.tensors if t.name == tensor)


def _wrong_dtype(spec: TensorSpec, kind: DType, given: DType) -> ArgumentError:
    hint = f'convert it, or build with .typed({spec.name}="{given}")'
    if spec.role == "output":  # which has the dtype of its expression
        hint = f'make it {kind}, or write tw.out.typed("{given}")[…](…) in the program'
    return ArgumentError(
        "A102", f"{spec.name} is {given}, the kernel was built for {kind}",
        where=f"argument {spec.name}", hint=hint,
    )  # fmt: skip


def _given(name: str):
    what = parse_name(name)
    assert what is not None, f"{name} is no argument, nor a name that the compiler gives"
    return what


def scalar_value(spec: TensorSpec, kind: DType, arg: Any) -> float | int:
    """A number for a scalar parameter."""
    value: float | int | None = None
    if not isinstance(arg, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = float(arg) if kind.is_float else int(arg)
    if value is None or not (kind.is_float or _fits(kind, value, arg)):
        raise ArgumentError(
            "A107", f"{spec.name} is a number of type {kind}, not {arg!r}",
            where=f"argument {spec.name}",
        )  # fmt: skip
    if kind.name == "bfloat16":
        return int(dtypes.bfloat16_bits(np.array(value, np.float32)))
    if kind.name == "float16":
        return int(np.array(value, np.float16).view(np.uint16))
    return float(np.float32(value)) if kind.name == "float32" else value


def _fits(kind: DType, value: float | int, arg: Any) -> bool:
    """Whether a whole number was given that the type holds."""
    return value == arg and kind.least <= value <= kind.most


def _check_fill(spec: TensorSpec, arg: Any) -> None:
    """Formats that store more than entries hold the fill there: the one of the program."""
    same = arg.fill == spec.fill or (arg.fill != arg.fill and spec.fill != spec.fill)
    if same or all(f.is_exact for f in arg.structure.format.formats):
        return
    raise ArgumentError(
        "A106",
        f"{spec.name} is packed as {arg.structure.format} with fill={arg.fill:g}, the program "
        f"declares fill={spec.fill:g}",
        where=f"argument {spec.name}",
        hint=f'pack(matrix, fill={spec.fill:g}), in Python float("{spec.fill:g}")',
    )


def sparse_output(like: Any, kind: DType) -> Any:
    """A tensor of the structure of `like` with new values; padding is zero, entries are not set."""
    values = tuple(
        _as_stored(allocate(v, (p.size,), kind), kind)
        for v, p in zip(like.values, like.structure.parts, strict=True)
    )
    return dataclasses.replace(like, values=values, dtype=kind, fill=0.0)


Span = tuple[str, int, int]
"""A name, and the first byte and the one after the last that it has in memory."""


def value_spans(name: str, packed: Any) -> list[Span]:
    """The bytes of the values of a sparse tensor, part by part."""
    size = packed.dtype.itemsize
    places = (
        (address(v), p.size) for v, p in zip(packed.values, packed.structure.parts, strict=True)
    )
    return [(name, at, at + n * size) for at, n in places]


def check_apart(written: Sequence[Span], read: Sequence[Span]) -> None:
    """Refuses memory that is written and meets memory of another argument. Raises
    ArgumentError[A108]."""
    for n, (name, low, high) in enumerate(written):
        for other, first, last in (*written[:n], *read):
            if low < last and first < high and low < high and first < last:
                what = "output" if (other, first, last) in written else "input"
                raise ArgumentError(
                    "A108", f"the output {name} overlaps the {what} {other}", where="out",
                    hint="give it memory of its own",
                )  # fmt: skip


def _meets_itself(v: View) -> bool:
    """Whether two elements may lie at one place."""
    reach = 1
    for step, n in sorted((abs(s), n) for s, n in zip(v.strides, v.shape, strict=True) if n > 1):
        if step < reach:
            return v.size > 0
        reach += (n - 1) * step
    return False


def _as_stored(values: Any, kind: DType) -> Any:
    """Values of a packed tensor on the host are bits where NumPy lacks the dtype, whatever other
    packages teach it."""
    return values.view(kind.numpy) if isinstance(values, np.ndarray) else values


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
