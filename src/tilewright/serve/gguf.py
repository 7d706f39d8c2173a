"""Weights as model files store them, and the header of a GGUF file.

A row of a weight is stored as blocks, one after another. The library `gguf` knows the layouts of
the quantised kinds; `ops/linear.py` computes with those of `linear.KINDS` as they are stored.
`Header` checks every count, length and offset against the size of the file before it reads.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from tilewright.errors import ModelError, needed_for
from tilewright.serve.models.config import Value, short

with needed_for("model files", "models"):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

VERSIONS = (2, 3)
MAX_ITEMS = 1 << 16  # metadata keys, and tensors
MAX_ELEMENTS = 1 << 40
MAX_STRINGS = 1 << 22  # of an array: tokens, and merges
_FORMS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # of metadata, by type
_NUMBERS = {form: struct.Struct(f"<{form}") for form in _FORMS.values()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
KINDS = (*_DTYPES, "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of a model, not copied from its file if it is aligned there.

    `shape` is (rows, cols) as in y = W x, or (n,) for the scale of a normalisation. `data` is
    read-only and C contiguous: `shape` in float32, float16 or uint16 (the bits of bfloat16), or,
    for quantised kinds, uint8 of (rows, bytes of the blocks of a row).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


def block_size(kind: str) -> tuple[int, int]:
    """The numbers in a block of a kind, and its bytes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]


def view(name: str, kind: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Weight:
    """A weight over the bytes of `buffer` from `offset` on; the caller has checked the bounds. A
    safetensors file may begin its tensors at any byte: numbers that are not aligned are copied."""
    elements, nbytes = block_size(kind)
    dtype = np.dtype(_DTYPES.get(kind, "u1"))
    stored = (*shape[:-1], shape[-1] // elements * nbytes // dtype.itemsize)
    data = np.frombuffer(buffer, dtype, math.prod(stored), offset).reshape(stored)
    if not data.flags.aligned:
        data = np.frombuffer(data.tobytes(), dtype).reshape(stored)
    return Weight(name, kind, shape, data)


def dequantize(weight: Weight) -> np.ndarray:
    """The numbers of a weight, float32 of `weight.shape`; float32 weights are not copied.

    A scale that is infinite or NaN gives such values, without a warning.
    """
    kind = GGMLQuantizationType[weight.kind.upper()]
    with np.errstate(invalid="ignore", over="ignore"):
        return quants.dequantize(weight.data.view(np.uint8), kind).reshape(weight.shape)


class Header:
    """The part of a GGUF file before the tensors: `metadata`, whose arrays of numbers are views of
    the file, and `weights` in the order of their offsets. `data`: all bytes, mapped.

    Raises ModelError: M101 for a damaged file, M104 for a tensor of a type that is not supported.
    Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where, self.position = where, 4
        try:
            self.data = np.memmap(file, mode="r")
        except (OSError, ValueError) as error:  # no address space, or emptied since it was opened
            raise self.damaged(f"it cannot be mapped: {error}") from None
        self._buffer = self.data.data
        version, *counts = (self._number(form) for form in ("I", "Q", "Q"))
        if version not in VERSIONS:
            raise self.damaged(f"version {version} is not supported, or the file is big-endian")
        if max(counts) > MAX_ITEMS:
            raise self.damaged(f"{counts[0]} tensors, {counts[1]} metadata keys: above {MAX_ITEMS}")
        self.metadata: dict[str, Value] = {}
        try:
            for _ in range(counts[1]):
                key = self._string()
                if key in self.metadata:
                    raise self.damaged(f"the key {short(key)} occurs twice")
                self.metadata[key] = self._value(self._number("I"))
            self.weights = self._located([self._entry() for _ in range(counts[0])])
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None

    def damaged(self, rule: str, code: str = "M101", hint: str = "") -> ModelError:
        hint = hint or "fetch the file again and compare its checksum"
        return ModelError(code, rule, where=f"{self.where} at byte {self.position}", hint=hint)

    def _next(self, size: int) -> int:
        """Advances by `size` bytes; returns the position before."""
        begin, end = self.position, self.position + size
        if end > len(self._buffer):
            raise self.damaged(f"{size} bytes needed, the file ends at {len(self._buffer)}")
        self.position = end
        return begin

    def _number(self, form: str) -> Any:
        number = _NUMBERS[form]
        return number.unpack_from(self._buffer, self._next(number.size))[0]

    def _string(self) -> str:
        begin = self._next(self._number("Q"))
        return str(self._buffer[begin : self.position], "utf-8")

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            if kind == _STRING and count <= MAX_STRINGS:
                return [self._string() for _ in range(count)]
            if kind in _FORMS:
                dtype = np.dtype("u1" if kind == _BOOL else f"<{_FORMS[kind]}")
                begin = self._next(dtype.itemsize * count)
                return self.data[begin : self.position].view(np.ndarray).view(dtype)
            raise self.damaged(f"an array of {count} values of type {kind} is not read")
        if kind not in _FORMS:
            raise self.damaged(f"a value of type {kind} is not read")
        value = self._number(_FORMS[kind])
        if kind == _BOOL and self._buffer[self.position - 1] > 1:
            raise self.damaged("a bool is neither 0 nor 1")
        return value

    def _entry(self) -> tuple[int, str, str, tuple[int, ...]]:
        """The offset of a tensor, from the end of the header, its name, kind and shape."""
        name, dims = self._string(), self._number("I")
        if dims > 4:
            raise self.damaged(f"tensor {short(name)} has {dims} dimensions")
        shape = tuple([self._number("Q") for _ in range(dims)][::-1])
        number, offset = self._number("I"), self._number("Q")
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS or not shape:
            raise self.damaged(f"tensor {short(name)} has the shape {shape}: empty or too large")
        try:
            type_name = GGMLQuantizationType(number).name
        except ValueError:
            type_name = f"of the unknown number {number}"
        kind = type_name.lower()
        if kind not in KINDS:
            hint = f"supported: {', '.join(KINDS)}; requantise the model to one of them"
            rule = f"tensor {short(name)} has the weight type {type_name}"
            raise self.damaged(rule, "M104", hint)
        if shape[-1] % block_size(kind)[0]:
            rule = f"tensor {short(name)}: rows of {shape[-1]} are not whole {kind} blocks"
            raise self.damaged(rule)
        return offset, name, kind, shape

    def _located(self, entries: list[tuple[int, str, str, tuple[int, ...]]]) -> list[Weight]:
        """The weights of entries, behind the header."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= 1 << 20:
            raise self.damaged(f"general.alignment is {short(alignment)}")
        start = last = self.position + -self.position % alignment
        weights, before = dict[str, Weight](), "the header"
        for offset, name, kind, shape in sorted(entries):
            elements, size = block_size(kind)
            begin, end = start + offset, start + offset + math.prod(shape) // elements * size
            if offset % alignment:
                rule = f"tensor {short(name)} starts at {offset}, not a multiple of {alignment}"
                raise self.damaged(rule)
            if name in weights or begin < last:
                raise self.damaged(f"tensor {short(name)} occurs twice or overlaps {before}")
            if end > len(self.data):
                rule = f"tensor {short(name)} ends at byte {end}, behind the file's end"
                raise self.damaged(rule)
            weights[name] = view(name, kind, shape, self.data, begin)
            last, before = end, f"tensor {short(name)}"
        return [*weights.values()]
