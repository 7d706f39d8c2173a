"""The parameter blocks of a call, built once for a layout of arguments and filled at each call."""

import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.ir import names
from tilewright.runtime.arguments import Arguments
from tilewright.runtime.manifest import ROW_HEAD, StageSpec, TensorSpec, structs, unit_count
from tilewright.runtime.view import View, address, allocate, allocator, byte_range

Slot = tuple[Any, int]
"""A field of a parameter block that takes an address or a number, and the part of the format whose
values it points to (0 for dense arrays and numbers)."""


@dataclass(slots=True)
class Output:
    """An output of a frame: `allocate(inputs[like])` makes it in the framework of that input."""

    spec: TensorSpec
    slots: Sequence[Slot]
    like: int
    allocate: Callable[[Any], Any]

    def write(self, array: Any, pointer: int = 0) -> None:
        """Write the address of `array`, or `pointer` if it is not 0, into the output's fields."""
        for slot, part in self.slots:
            slot.value = pointer or address(array.values[part] if self.spec.structure else array)


@dataclass(slots=True)
class Frame:
    """The parameter blocks of a call, one a stage, ready to be launched again.

    `slots` are the fields that each argument fills, by name; `addresses`, `values` and `numbers`
    list those of dense, sparse and scalar inputs with the number of the input. `spans` are the
    first and last byte of each dense input and output relative to its address. A frame owns none of
    the caller's arrays and refers to structures weakly, so that an idle kernel keeps nothing alive;
    `keep` is the frame's own memory (a bound call adds its arguments).
    """

    blocks: list[Any]
    units: list[int]
    device: str
    variants: tuple[str, ...]  # macros that the code must be compiled with for these arrays
    slots: dict[str, list[Slot]]
    outputs: list[Output]
    structures: dict[str, weakref.ref[Any]]
    keep: list[Any]
    views: dict[str, View]
    sizes: dict[Any, int]
    addresses: list[tuple[Any, int]]
    values: list[tuple[Any, int, int]]  # and the part
    numbers: list[tuple[int, list[Any]]]
    spans: dict[str, tuple[int, int]]
    run: Callable[[], None] = dataclasses.field(init=False)  # set by the launcher


def build_frame(arguments: Arguments) -> Frame:
    """The frame of a layout: counts units of each stage, fills in all that is no argument."""
    manifest, inputs = arguments.manifest, arguments.inputs
    slots: dict[str, list[Slot]] = {}
    stages = [_block(arguments, stage, slots) for stage in manifest.stages]
    blocks = [block for block, _ in stages]
    specs = [t for t in manifest.tensors if t.role in ("output", "temp")]
    outputs = [_output(t, slots.get(t.name, ()), arguments) for t in specs]
    temps = []
    for output in outputs:
        if output.spec.role == "temp":
            temps.append(output.allocate(inputs[output.like][1]))
            output.write(temps[-1])
    filled = [(t, n, slot) for n, (t, _) in enumerate(inputs) for slot in slots.get(t.name, ())]
    return Frame(
        blocks=blocks,
        units=[units for _, units in stages],
        device=arguments.device,
        variants=_variants(arguments),
        slots=slots,
        outputs=[o for o in outputs if o.spec.role == "output"],
        structures={name: weakref.ref(s) for name, s in arguments.structures.items()},
        keep=temps,
        views={name: dataclasses.replace(v, owner=None) for name, v in arguments.views.items()},
        sizes=arguments.sizes,
        addresses=[(slot, n) for t, n, (slot, _) in filled if t.dims and not t.structure],
        values=[(slot, n, part) for t, n, (slot, part) in filled if t.structure],
        numbers=[  # one without a slot is checked all the same
            (n, [slot for slot, _ in slots.get(t.name, ())])
            for n, (t, _) in enumerate(inputs)
            if not t.dims and not t.structure
        ],
        spans={name: byte_range(v) for name, v in arguments.views.items()},
    )


def _block(arguments: Arguments, stage: StageSpec, slots: dict[str, list[Slot]]) -> tuple[Any, int]:
    """The parameter block of a stage without addresses, and its units. The work table follows the
    parameters: a row for each part of the structure that the stage follows. Adds the fields that
    arguments fill to `slots`: addresses of dense arrays, numbers, and values of sparse tensors."""
    manifest, structures = arguments.manifest, arguments.structures
    row, params = structs(manifest)
    block = ctypes.create_string_buffer(params.size + manifest.max_rows * row.size)
    structure_of = {t.name: t.structure for t in manifest.tensors}
    *fields, row_count = (f.in_buffer(block) for f in params.fields)
    row_count.value = len(stage.rows)
    for field, (name, *_) in zip(fields, manifest.params, strict=True):
        if name in structure_of:  # also a temporary, whose name the compiler has given
            slots.setdefault(name, []).append((field, 0))
        else:
            field.value = _parameter(name, arguments)
    total = 0
    for i, body in enumerate(stage.rows):
        numbers = {name: i if name == stage.structure else 0 for name in structures}
        parts = {name: s.parts[numbers[name]] for name, s in structures.items()}
        counts = {names.size_name(d): k for d, k in arguments.sizes.items() if isinstance(d, str)}
        for name, part in parts.items():
            for level, count in enumerate(part.counts):
                counts[names.count_name(name, level)] = count
        units, at = unit_count(stage.units[body], counts), params.size + i * row.size
        values = {"first": total, "units": units, "body": body}
        for f, (name, *_) in zip(row.fields[len(ROW_HEAD) :], manifest.row, strict=True):
            parsed = names.parse_name(name)
            assert parsed is not None, f"{name} is not a name that the compiler gives"
            values[f.name] = _row_value(parsed, parts)
            if parsed.kind == names.VALUES:
                slot = f.in_buffer(block, at), numbers[structure_of[parsed.owner]]
                slots.setdefault(parsed.owner, []).append(slot)
        row.pack_into(block, at, **values)
        total += units
    return block, total


def _parameter(name: str, arguments: Arguments) -> int:
    """A size or a stride."""
    parsed = names.parse_name(name)
    assert parsed is not None and parsed.kind in (names.SIZE, names.STRIDE), name
    if parsed.kind == names.SIZE:
        return arguments.sizes[parsed.owner]
    return arguments.views[parsed.owner].strides[parsed.number]


def _row_value(parsed: names.GeneratedName, parts: dict[str, Any]) -> int:
    """A count, or the address of a coordinate array; 0 for a level that only other parts have, and
    for values, which each call fills in."""
    if parsed.kind == names.VALUES:
        return 0
    part, level = parts[parsed.owner], parsed.number
    if parsed.kind == names.COUNT:
        return part.counts[level] if level < len(part.counts) else 0
    if level >= len(part.arrays) or parsed.kind not in part.arrays[level]:
        return 0
    return address(part.arrays[level][parsed.kind])


def _output(spec: TensorSpec, slots: Sequence[Slot], arguments: Arguments) -> Output:
    """An output or a temporary, and how to allocate it."""
    dtype, inputs = arguments.dtypes[spec.name], arguments.inputs
    sparse = [n for n, (t, _) in enumerate(inputs) if t.structure]
    if spec.structure:
        like = next((n for n in sparse if inputs[n][0].structure == spec.structure), 0)
        inner = arguments.inner(spec)
        return Output(spec, slots, like, lambda packed: sparse_output(packed, dtype, inner))
    v = arguments.views[spec.name]
    shape = v.shape
    dense = [n for n, (t, _) in enumerate(inputs) if t.dims and not t.structure]
    if dense:
        return Output(spec, slots, dense[0], allocator(inputs[dense[0]][1], shape, dtype))
    if not sparse and not v.pointer and v.size:
        text = f"{spec.name} cannot be allocated: no argument is an array"
        raise ArgumentError("A101", text, where="out", hint="pass out=")
    like = sparse[0] if sparse else 0
    return Output(spec, slots, like, lambda packed: allocate(packed.values[0], shape, dtype))


def sparse_output(like: Any, dtype: DType, inner: tuple[int, ...] = ()) -> Any:
    """A tensor of the structure of `like` with new values, or arrays of shape `inner`; padding is
    zero, entries are not set."""
    values = []
    for v, part in zip(like.values, like.structure.parts, strict=True):
        array = allocate(v, (part.size, *inner), dtype)
        # On the host, packed values are bits where NumPy itself lacks the dtype.
        values.append(array.view(dtype.numpy) if isinstance(array, np.ndarray) else array)
    return dataclasses.replace(like, values=tuple(values), dtype=dtype, fill=0.0, inner=inner)


def _variants(arguments: Arguments) -> tuple[str, ...]:
    """The macros for arrays that break an assumption of the code: that GPU rows are aligned to 16
    bytes, and that arrays with constant strides have no gaps."""
    views = arguments.views
    unaligned = arguments.device != "cpu" and not all(map(_rows_aligned, views.values()))
    strided = not all(views[name].is_contiguous for name in arguments.manifest.packed)
    return ("TW_UNALIGNED",) * unaligned + ("TW_STRIDED",) * strided


def _rows_aligned(v: View) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    steps = [s for s, n in zip(v.strides[:-1], v.shape[:-1], strict=True) if n > 1]
    return not any(n % 16 for n in (v.pointer, *(s * v.dtype.itemsize for s in steps)))
