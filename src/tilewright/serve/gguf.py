"""Weights as model files store them, and the header of a GGUF file.

A row of a weight is stored as blocks, one after another. The library `gguf` knows the layouts of
the quantised kinds, and the format of the file; `ops/linear.py` computes with the kinds of
`linear.KINDS` as they are stored. The library is not made for damaged files, and reads an array
string by string with several NumPy arrays each: `Header` checks every count, length and offset
against the size of the file before memory is allocated or read, and reads an array at once.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from tilewright.errors import ModelError, needed_for
from tilewright.serve.models.config import Value

with needed_for("model files", "models"):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, quants

VERSIONS = (2, 3)
MAX_ITEMS = 1 << 16  # metadata keys, and tensors
MAX_ELEMENTS = 1 << 40
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


class Header(GGUFReader):
    """The part of a GGUF file before the tensors: `metadata`, whose arrays of numbers are views of
    the file, and `weights` in the order of their offsets. `data`: all bytes, mapped.

    Raises ModelError: M101 for a damaged file, M104 for a tensor of a type that is not supported.
    Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.where, self.position = where, 4
        version, *counts = struct.unpack_from("<IQQ", file.read(24), 4)
        if version not in VERSIONS:
            raise self.damaged(f"version {version} is not supported, or the file is big-endian")
        if max(counts) > MAX_ITEMS:
            raise self.damaged(f"{counts[0]} tensors, {counts[1]} metadata keys: above {MAX_ITEMS}")
        self.weights: list[Weight] = []
        self._entries: list[tuple[int, str, str, tuple[int, ...]]] = []
        try:
            super().__init__(file)  # pyright: ignore[reportArgumentType]
            self.metadata: dict[str, Value] = {
                name: field.parts[-1] if len(field.types) > 1 else field.contents()
                for name, field in self.fields.items()
                if not name.startswith("GGUF.")  # the library's own
            }
        except ModelError:
            raise
        except UnicodeDecodeError:
            raise self.damaged("a text is not UTF-8") from None
        except (ValueError, KeyError, OSError) as error:  # the library's words
            raise self.damaged(str(error)) from None

    def damaged(self, rule: str, code: str = "M101", hint: str = "") -> ModelError:
        hint = hint or "fetch the file again and compare its checksum"
        return ModelError(code, rule, where=f"{self.where} at byte {self.position}", hint=hint)

    # -- what the library calls ------------------------------------------------------------------

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.position = offset
        needed = np.dtype(dtype).itemsize * int(count)
        if needed > len(self.data) - offset:
            raise self.damaged(f"{needed} bytes needed, the file ends at {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        if raw_type == GGUFValueType.BOOL and self._get(orig_offs, np.uint8)[0] > 1:
            raise self.damaged("a bool is neither 0 nor 1")
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        number, start = int(self._get(orig_offs, np.uint32)[0]), orig_offs + 12
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        types = [GGUFValueType.ARRAY, GGUFValueType(number)]
        if types[1] == GGUFValueType.STRING:
            end, value = self._strings(start, length)
        elif types[1] in self.gguf_scalar_to_np:
            dtype = np.dtype(self.gguf_scalar_to_np[types[1]])
            value = self._get(start, np.uint8 if dtype.kind == "b" else dtype, length)
            end, value = start + value.nbytes, value.view(np.ndarray)
        else:
            raise self.damaged(f"an array of type {number} is not read")
        return end - orig_offs, [value], [0], types

    def _strings(self, position: int, length: int) -> tuple[int, list[str]]:
        """The end of an array of strings, and the array: most of the time to open a model."""
        self.position, buffer, end = position, self.data.data, len(self.data)
        unpack, out = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(length):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                if position > end:
                    break
                out.append(str(buffer[start:position], "utf-8"))
        except struct.error:
            pass  # the file ends inside a length: an error below
        if len(out) < length:
            raise self.damaged(f"the file ends inside string {len(out)} of {length} of an array")
        return position, out

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        """The entry of one tensor; its offset counts from the end of the header."""
        field = super()._get_tensor_info_field(orig_offs)
        name, (*_, dims, number, offset) = field.name, field.parts
        shape = tuple(dims.tolist())[::-1]
        if not 1 <= len(shape) <= 4 or not 1 <= math.prod(shape) <= MAX_ELEMENTS:
            raise self.damaged(f"tensor {name!r} has the shape {shape}: empty or too large")
        try:
            type_name = GGMLQuantizationType(number[0]).name
        except ValueError:
            type_name = f"of the unknown number {number[0]}"
        kind = type_name.lower()
        if kind not in KINDS:
            hint = f"supported: {', '.join(KINDS)}; requantise the model to one of them"
            raise self.damaged(f"tensor {name!r} has the weight type {type_name}", "M104", hint)
        if shape[-1] % block_size(kind)[0]:
            raise self.damaged(f"tensor {name!r}: rows of {shape[-1]} are not whole {kind} blocks")
        self._entries.append((int(offset[0]), name, kind, shape))
        return field

    def _build_tensors(self, start_offs: int, fields: list) -> None:
        """Resolves and checks the offsets; the library would not check where a tensor ends."""
        if not 8 <= self.alignment <= 1 << 20:
            raise self.damaged(f"general.alignment is {self.alignment}")
        start_offs = last = int(start_offs)
        before, names = "the header", set()
        for offset, name, kind, shape in sorted(self._entries):
            elements, size = block_size(kind)
            begin = start_offs + offset
            end = begin + math.prod(shape) // elements * size
            if offset % self.alignment:
                rule = f"tensor {name!r} starts at {offset}, not a multiple of {self.alignment}"
                raise self.damaged(rule)
            if name in names or begin < last:
                raise self.damaged(f"tensor {name!r} occurs twice or overlaps {before}")
            if end > len(self.data):
                raise self.damaged(f"tensor {name!r} ends at byte {end}, behind the file's end")
            names.add(name)
            self.weights.append(view(name, kind, shape, self.data, begin))
            last, before = end, f"tensor {name!r}"
