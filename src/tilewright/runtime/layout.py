"""One source for every struct that Python, C++ and CUDA share.

A `Struct` lays its fields out as C does and gives the same layout four times: as C text with
assertions on size and offsets, as a NumPy dtype, as a packer, and as a short hash.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from tilewright.errors import InternalError

# spelling -> (C type, struct code, bytes)
_SCALARS: dict[str, tuple[str, str, int]] = {
    "ptr": ("void*", "Q", 8),
    "float32": ("float", "f", 4),
    "float64": ("double", "d", 8),
    "uint8": ("uint8_t", "B", 1),
    "uint16": ("uint16_t", "H", 2),
    "uint32": ("uint32_t", "I", 4),
    "uint64": ("uint64_t", "Q", 8),
    "int8": ("int8_t", "b", 1),
    "int16": ("int16_t", "h", 2),
    "int32": ("int32_t", "i", 4),
    "int64": ("int64_t", "q", 8),
}
# NVRTC has no offsetof; its front end's own intrinsic is constant where a null pointer's is not.
_OFFSET_MACRO = (
    "#ifndef TW_OFFSET",
    "#ifdef __CUDACC_RTC__",
    "#define TW_OFFSET(type, field) __INTADDR__(&((type*)0)->field)",
    "#else",
    "#define TW_OFFSET(type, field) __builtin_offsetof(type, field)",
    "#endif",
    "#endif",
)
_TYPE = re.compile(r"(\w+?)(?:\[(\d+)\])?")


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `count` is 0 for a scalar, the length for a fixed array; `offset` in bytes."""

    name: str
    type: str
    count: int
    offset: int
    c_type: str

    @property
    def itemsize(self) -> int:
        return _SCALARS[self.type][2]

    @property
    def lanes(self) -> int:
        return max(self.count, 1)


class Struct:
    """A C struct described once.

    `fields` are `(name, type)` or `(name, "ptr", c_type)`; a type is `ptr`, `float32`, `float64`,
    `int8` … `uint64`, or a fixed array of one, as `int32[4]`. The C text uses the names of
    `<stdint.h>`; where that header is missing (NVRTC) the prelude defines them.
    Raises InternalError[I101] for a malformed description: layouts are ours, not the user's.
    """

    def __init__(self, name: str, fields: Sequence[tuple[str, ...]]) -> None:
        if not (name.isascii() and name.isidentifier()) or not fields:
            raise InternalError("I101", f"struct {name!r} needs a C name and at least one field")
        self.name = name
        laid, offset = [], 0
        for entry in fields:
            one = _field(name, entry, offset)
            laid.append(one)
            offset = one.offset + one.itemsize * one.lanes
        self.fields: tuple[Field, ...] = tuple(laid)
        if len({f.name for f in laid}) != len(laid):
            raise InternalError("I101", f"struct {name} names a field twice")
        self.align = max(f.itemsize for f in laid)
        self.size = -(-offset // self.align) * self.align
        self._offsets = {f.name: f.offset for f in laid}
        self._packer = struct.Struct(_packer_format(self.fields, self.size))

    def offset(self, name: str) -> int:
        """Bytes from the start of the struct to a field."""
        return self._offsets[name]

    @cached_property
    def c_decl(self) -> str:
        """The declaration for C++ and CUDA, with its assertions."""
        lines = [*_OFFSET_MACRO, f"struct {self.name} {{"]
        for f in self.fields:
            lines.append(f"  {f.c_type} {f.name}{f'[{f.count}]' if f.count else ''};")
        lines.append("};")
        lines.append(f'static_assert(sizeof({self.name}) == {self.size}, "{self.name}: size");')
        for f in self.fields:
            place = f"TW_OFFSET({self.name}, {f.name})"
            lines.append(f'static_assert({place} == {f.offset}, "{self.name}.{f.name}");')
        return "\n".join(lines) + "\n"

    @cached_property
    def numpy(self) -> np.dtype:
        """The same layout as a NumPy dtype; pointers are `uint64`."""
        kinds = ["uint64" if f.type == "ptr" else f.type for f in self.fields]
        return np.dtype(
            {
                "names": [f.name for f in self.fields],
                "formats": [
                    (kind, (f.count,)) if f.count else kind
                    for kind, f in zip(kinds, self.fields, strict=True)
                ],
                "offsets": [f.offset for f in self.fields],
                "itemsize": self.size,
            }
        )

    @cached_property
    def version(self) -> str:
        """16 hex digits that change with the layout."""
        return hashlib.sha256(self.c_decl.encode()).hexdigest()[:16]

    def pack(self, /, **values: Any) -> ctypes.Array[ctypes.c_char]:
        """A new buffer with every field set; a fixed array takes a sequence of its length."""
        buffer = ctypes.create_string_buffer(self.size)
        self.pack_into(buffer, **values)
        return buffer

    def pack_into(self, buffer: ctypes.Array[ctypes.c_char], /, **values: Any) -> None:
        """Overwrite `buffer` (at least `size` bytes) with these values."""
        if values.keys() != self._offsets.keys():
            wrong = sorted(values.keys() ^ self._offsets.keys())
            raise InternalError("I101", f"struct {self.name}: fields {wrong} missing or unknown")
        flat: list[Any] = []
        for f in self.fields:
            value = values[f.name]
            if not f.count:
                flat.append(value)
            elif len(value) == f.count:
                flat.extend(value)
            else:
                raise InternalError(
                    "I101", f"struct {self.name}.{f.name} holds {f.count} values, not {len(value)}"
                )
        try:
            self._packer.pack_into(buffer, 0, *flat)
        except struct.error as error:
            raise InternalError("I101", f"struct {self.name}: {error}") from None

    def __repr__(self) -> str:
        return f"Struct({self.name}, {self.size} bytes, {len(self.fields)} fields)"


@cache
def _spelled(text: str) -> tuple[str, int] | None:
    """A type and the length of its array, -1 for none."""
    match = _TYPE.fullmatch(text)
    if not match or match[1] not in _SCALARS:
        return None
    return match[1], int(match[2]) if match[2] is not None else -1


def _field(struct_name: str, entry: tuple[str, ...], end: int) -> Field:
    """Place one described field at the next aligned offset after `end`."""
    name, spelled, *c_type = entry
    known = _spelled(spelled)
    if known is None or not (name.isascii() and name.isidentifier()):
        raise InternalError("I101", f"struct {struct_name}: bad field {name!r} of type {spelled!r}")
    kind, count = known
    if count == 0 or (c_type and kind != "ptr"):
        raise InternalError("I101", f"struct {struct_name}.{name}: bad type {spelled!r}")
    size = _SCALARS[kind][2]
    offset = -(-end // size) * size
    return Field(name, kind, max(count, 0), offset, c_type[0] if c_type else _SCALARS[kind][0])


def _packer_format(fields: Sequence[Field], size: int) -> str:
    """The format of `struct`, with the padding written out."""
    text, at = "<", 0
    for f in fields:
        text += "x" * (f.offset - at) + f"{f.lanes}{_SCALARS[f.type][1]}"
        at = f.offset + f.itemsize * f.lanes
    return text + "x" * (size - at)
