"""One source for every struct that Python, C++ and CUDA share.

A `Struct` lays its fields out as C does and gives the same layout four times: as C text with
assertions on size and offsets, as a NumPy dtype, as a packer, and as a short hash.
"""

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tilewright.errors import InternalError

# spelling -> (C type, type of ctypes)
_SCALARS: dict[str, tuple[str, Any]] = {
    "ptr": ("void*", ctypes.c_uint64), "float32": ("float", ctypes.c_float),
    "float64": ("double", ctypes.c_double),
} | {
    f"{kind}{bits}": (f"{kind}{bits}_t", getattr(ctypes, f"c_{kind}{bits}"))
    for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class Field:
    """One field; `count` is 0 for a scalar, the length of an array; `offset` in bytes."""

    name: str
    type: str
    count: int
    c_type: str
    offset: int

    def in_buffer(self, buffer: Any, start: int = 0) -> Any:
        """The scalar field of the struct at byte `start` of a buffer, to read and to assign."""
        return _SCALARS[self.type][1].from_buffer(buffer, start + self.offset)


class Struct:
    """A C struct described once.

    The fields are `(name, type)` or `(name, "ptr", c_type)`; a type is `ptr`, `float32`,
    `float64` or `int8` … `uint64`, or an array of one, as `uint64[16]`. The C text uses the names
    of `<stdint.h>`; where that header is missing (NVRTC) the prelude defines them. Raises
    InternalError[I101] for a bad description. `align`: what its addresses are multiples of, where
    that is more than its fields ask for; it divides the size.
    """

    def __init__(
        self, name: str, described_fields: Sequence[tuple[str, ...]], align: int = 0
    ) -> None:
        if not (name.isascii() and name.isidentifier()) or not described_fields:
            raise InternalError("I101", f"struct {name!r} needs a C name and at least one field")
        described = [_parsed(name, d) for d in described_fields]
        self.name, self._aligned = name, f"alignas({align}) " if align else ""
        self._names = {field for field, *_ in described}
        if len(self._names) != len(described):
            raise InternalError("I101", f"struct {name} names a field twice")
        columns = [(n, _SCALARS[kind][1], (k,) if k else ()) for n, kind, k, _ in described]
        self.numpy = np.dtype(columns, align=True)
        """The layout as a NumPy dtype, which aligns as C does; pointers are `uint64`."""
        layout: Any = self.numpy.fields
        self.fields = tuple(Field(*d, layout[d[0]][1]) for d in described)
        codes = (f"{max(f.count, 1)}{_SCALARS[f.type][1]._type_}" for f in self.fields)
        self._packer = struct.Struct("".join(codes))
        self.size = self.numpy.itemsize

    @cached_property
    def c_decl(self) -> str:
        """The declaration for C++ and CUDA, with its assertions."""
        lengths = [f"[{f.count}]" if f.count else "" for f in self.fields]
        fields = [f"  {f.c_type} {f.name}{n};" for f, n in zip(self.fields, lengths, strict=True)]
        size = f'static_assert(sizeof({self.name}) == {self.size}, "{self.name}: size");'
        offsets = [
            f"static_assert(TW_OFFSET({self.name}, {f.name}) == {f.offset}, "
            f'"{self.name}.{f.name}");'
            for f in self.fields
        ]
        head = f"struct {self._aligned}{self.name} {{"
        return "\n".join([*_OFFSET_MACRO, head, *fields, "};", size, *offsets]) + "\n"

    @cached_property
    def buffers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of its pointers to constants, and those of the others."""
        pointers = [f for f in self.fields if f.type == "ptr"]
        constant = tuple(f.name for f in pointers if f.c_type.startswith("const "))
        return constant, tuple(f.name for f in pointers if f.name not in constant)

    @cached_property
    def version(self) -> str:
        """16 hex digits that change with the layout."""
        return hashlib.sha256(self.c_decl.encode()).hexdigest()[:16]

    def pack(self, /, **values: Any) -> ctypes.Array[ctypes.c_char]:
        """A new buffer with every field set; an array takes a sequence of its length."""
        buffer = ctypes.create_string_buffer(self.size)
        self.pack_into(buffer, **values)
        return buffer

    def pack_into(
        self, buffer: ctypes.Array[ctypes.c_char], offset: int = 0, /, **values: Any
    ) -> None:
        """Overwrite `size` bytes of `buffer` from `offset` on with these values."""
        if wrong := sorted(values.keys() ^ self._names):
            raise InternalError("I101", f"struct {self.name}: fields {wrong} missing or unknown")
        flat: list[Any] = []
        for f in self.fields:
            value = values[f.name] if f.count else (values[f.name],)
            if f.count and len(value) != f.count:
                text = f"struct {self.name}.{f.name} holds {f.count} values, not {len(value)}"
                raise InternalError("I101", text)
            flat += value
        try:
            self._packer.pack_into(buffer, offset, *flat)
        except struct.error as error:
            raise InternalError("I101", f"struct {self.name}: {error}") from None

    def __repr__(self) -> str:
        return f"Struct({self.name}, {self.size} bytes, {len(self.fields)} fields)"


def _parsed(struct_name: str, description: tuple[str, ...]) -> tuple[str, str, int, str]:
    """Name, type, count and C type of a described field."""
    name, spelled, *c_type = description
    kind, _, length = spelled.partition("[")
    count = length.removesuffix("]")
    if length and not (count.isdecimal() and int(count)):
        raise InternalError("I101", f"struct {struct_name}: bad length of {name}: {spelled!r}")
    if kind not in _SCALARS or not (name.isascii() and name.isidentifier()):
        raise InternalError("I101", f"struct {struct_name}: bad field {name!r} of type {kind!r}")
    if c_type and kind != "ptr":
        raise InternalError("I101", f"struct {struct_name}.{name}: a {kind} has no other C type")
    return name, kind, int(count or 0), c_type[0] if c_type else _SCALARS[kind][0]
