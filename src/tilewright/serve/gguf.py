"""Reads the header of a GGUF file: its metadata, and kind, shape and offset of each tensor.

Every count, length and offset is checked against the size of the file before memory is allocated or
read, so that a damaged file costs at most a small multiple of its size and raises `ModelError`.
docs/design/models.md says why this is not the `gguf` library.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import ModelError
from tilewright.serve.blocks import LAYOUTS, stored_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
MAX_STRINGS = 1 << 22  # in all the arrays of a file together
MAX_ELEMENTS = 1 << 40

Value = int | float | bool | str | np.ndarray | list[str]

# Type numbers of metadata values.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {number: np.dtype(name) for number, name in _SCALARS.items()}
_KINDS = {layout.gguf: layout.kind for layout in LAYOUTS.values()}
# Names of tensor types by number (ggml), for errors: most are not read.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1",
    8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in the file: `shape` with the slowest dimension first, `offset` in bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The part of the file before the tensors. Arrays of numbers are views of the file."""

    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed reads of metadata. A key of another type, or absent without a default, raises a
    ModelError of `code` that names the key."""

    values: Mapping[str, Value]
    where: str = ""
    code: str = "M101"

    def _read(self, key: str, default: Any, kinds: tuple[type, ...], needed: str) -> Any:
        value = self.values.get(key, default)
        if isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds):
            return value
        raise ModelError(
            self.code, f"{key} is {short(value)}, {needed} is needed", where=self.where or key
        )

    def integer(self, key: str, default: int | None = None) -> int:
        return self._read(key, default, (int,), "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._read(key, default, (int, float), "a number"))

    def text(self, key: str, default: str | None = None) -> str:
        return self._read(key, default, (str,), "a text")

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._read(key, default, (bool,), "true or false")

    def strings(self, key: str) -> list[str]:
        return self._read(key, None, (list,), "an array of texts")

    def refuse(self, key: str, harmless: tuple[Value, ...]) -> None:
        """Raises ModelError[M102] for a key with another value than `harmless` ones."""
        value = self.values.get(key, harmless[0])
        if not isinstance(value, int | float | str) or value not in harmless:
            raise ModelError("M102", f"{key} = {short(value)} is not supported", where=self.where)


def short(value: Value | None) -> str:
    """A value of the metadata, for a message."""
    if value is None:
        return "missing"
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    return repr(value[:60] if isinstance(value, str) else value)


def read_header(buffer: memoryview, where: str = "") -> Header:
    """Read and check the header of a GGUF file held in `buffer` (all of the file, bytes).

    Raises ModelError: M101 for a damaged file, M104 for a tensor of a type that is not supported.
    Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
    """
    return _Reader(buffer, where).header()


class _Reader:
    """Reads from a position in the file; every read checks the bounds."""

    def __init__(self, buffer: memoryview, where: str) -> None:
        self.buffer, self.where = buffer, where
        self.position, self.end = 0, len(buffer)
        self.strings_left = MAX_STRINGS

    def damaged(self, rule: str, code: str = "M101", hint: str = "") -> ModelError:
        hint = hint or "fetch the file again and compare its checksum"
        return ModelError(code, rule, where=f"{self.where} at byte {self.position}", hint=hint)

    def take(self, nbytes: int, field: str) -> int:
        """Moves past `nbytes` and returns their start."""
        if nbytes > self.end - self.position:
            left = self.end - self.position
            raise self.damaged(f"the file ends inside {field}: {nbytes} bytes wanted, {left} left")
        start = self.position
        self.position += nbytes
        return start

    def u32(self, field: str) -> int:
        return _U32.unpack_from(self.buffer, self.take(4, field))[0]

    def u64(self, field: str) -> int:
        return _U64.unpack_from(self.buffer, self.take(8, field))[0]

    def count(self, field: str, most: int, least_bytes: int) -> int:
        """Reads a count of items that follow, of at least `least_bytes` each."""
        number = self.u64(field)
        if number > most or number * least_bytes > self.end - self.position:
            raise self.damaged(f"{field} is {number}, which the file cannot hold (limit {most})")
        return number

    def text(self, raw: memoryview, field: str) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{field} is not UTF-8") from None

    def string(self, field: str, most: int) -> str:
        length = self.count(f"the length of {field}", most, 1)
        start = self.take(length, field)
        return self.text(self.buffer[start : start + length], field)

    def header(self) -> Header:
        if bytes(self.buffer[:4]) != MAGIC:
            raise self.damaged(
                "the file does not begin with GGUF", hint="models are read from GGUF files"
            )
        self.position = 4
        version = self.u32("the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            hint = "the file is big-endian" if swapped else f"versions {VERSIONS} are read"
            raise self.damaged(f"GGUF version {version} is not supported", hint=hint)
        tensors = self.count("the number of tensors", MAX_TENSORS, 24)
        keys = self.count("the number of metadata keys", MAX_KEYS, 13)
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self.string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise self.damaged(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(key, self.u32(f"the type of {key!r}"))
        return Header(
            version, metadata, self.tensors(tensors, metadata.get("general.alignment", 32))
        )

    def value(self, key: str, number: int) -> Value:
        if number in _DTYPES:
            dtype = _DTYPES[number]
            start = self.take(dtype.itemsize, key)
            return np.frombuffer(self.buffer, dtype, 1, start)[0].item()
        if number == _BOOL:
            byte = self.buffer[self.take(1, key)]
            if byte > 1:
                raise self.damaged(f"{key!r} is {byte}, which is no bool")
            return bool(byte)
        if number == _STRING:
            return self.string(repr(key), self.end)
        if number == _ARRAY:
            return self.array(key, self.u32(f"the type of {key!r}"))
        raise self.damaged(f"{key!r} has the unknown type {number}")

    def array(self, key: str, number: int) -> Value:
        if number == _STRING:
            return self.strings(key, self.count(f"the length of {key!r}", self.strings_left, 8))
        dtype = np.dtype(np.uint8) if number == _BOOL else _DTYPES.get(number)
        if dtype is None:
            raise self.damaged(f"{key!r} is an array of type {number}, which is not read")
        length = self.count(f"the length of {key!r}", MAX_ELEMENTS, dtype.itemsize)
        start = self.take(length * dtype.itemsize, key)
        return np.frombuffer(self.buffer, dtype, length, start)

    def strings(self, key: str, length: int) -> list[str]:
        """An array of strings, without calls: it takes nine tenths of the time to open a model."""
        self.strings_left -= length
        buffer, position, end, unpack = self.buffer, self.position, self.end, _U64.unpack_from
        out: list[str] = []
        try:
            for _ in range(length):
                size = unpack(buffer, position)[0]
                start = position + 8
                position = start + size
                if position > end:
                    break
                out.append(str(buffer[start:position], "utf-8"))
        except UnicodeDecodeError:
            raise self.damaged(f"string {len(out)} of {key!r} is not UTF-8") from None
        except struct.error:
            pass  # the file ends inside a length: an error below
        if len(out) < length:
            raise self.damaged(f"the file ends inside string {len(out)} of {key!r}")
        self.position = position
        return out

    def tensors(self, number: int, alignment: Value) -> dict[str, TensorInfo]:
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= 1 << 20
            or alignment & (alignment - 1)
        ):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two from 8 on")
        relative = [self.tensor(alignment) for _ in range(number)]
        start = -(-self.position // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        last, before = start, "the header"
        for info in sorted(relative, key=lambda info: info.offset):
            offset = start + info.offset
            if info.name in infos:
                raise self.damaged(f"tensor {info.name!r} occurs twice")
            if offset + info.nbytes > self.end:
                ends = offset + info.nbytes
                raise self.damaged(
                    f"tensor {info.name!r} ends at byte {ends}, the file at {self.end}"
                )
            if offset < last:
                raise self.damaged(f"tensor {info.name!r} overlaps {before}")
            infos[info.name] = TensorInfo(info.name, info.kind, info.shape, offset, info.nbytes)
            last, before = offset + info.nbytes, f"tensor {info.name!r}"
        return infos

    def tensor(self, alignment: int) -> TensorInfo:
        """The entry of one tensor; its offset counts from the end of the header."""
        name = self.string("a tensor's name", MAX_NAME_BYTES)
        dimensions = self.u32(f"the dimensions of {name!r}")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"tensor {name!r} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.u64(f"the shape of {name!r}") for _ in range(dimensions))[::-1]
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS:
            raise self.damaged(f"tensor {name!r} has the shape {shape}: empty or too large")
        number = self.u32(f"the type of {name!r}")
        if number not in _KINDS:
            hint = f"supported: {', '.join(LAYOUTS)}; requantise the model to one of them"
            type_name = _TYPE_NAMES.get(number, f"of the unknown number {number}")
            raise self.damaged(f"tensor {name!r} has the weight type {type_name}", "M104", hint)
        kind = _KINDS[number]
        if shape[-1] % LAYOUTS[kind].elements:
            raise self.damaged(f"tensor {name!r}: rows of {shape[-1]} are not whole {kind} blocks")
        offset = self.u64(f"the offset of {name!r}")
        if offset % alignment:
            raise self.damaged(f"tensor {name!r} starts at {offset}, not a multiple of {alignment}")
        return TensorInfo(name, kind, shape, offset, stored_bytes(kind, shape))
