"""Layouts of quantised weights in a model file, and their conversion to float32.

A row of `cols` numbers is stored as `cols / elements` blocks, one after another. All numbers are
little-endian. With `h = elements / 2`, element `i` of a 4-bit block is the low nibble of quant byte
`i` for `i < h` and the high nibble of byte `i - h` otherwise.

    kind    bytes  elements  scale  minimum  quants        value of element i
    f32         4         1      -        -  float32       itself
    f16         2         1      -        -  float16       itself
    bf16        2         1      -        -  bfloat16      itself
    q8_0       34        32    0:2        -  2:34  int8    scale * q[i]
    q4_0       18        32    0:2        -  2:18  nibble  scale * (q[i] - 8)
    q4_1       20        32    0:2      2:4  4:20  nibble  scale * q[i] + minimum

Scale and minimum are float16. Source: the block structures of ggml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One kind of storage: `nbytes` per block of `elements` numbers; the rest are byte offsets.

    `scale` and `minimum` are -1 where a block has none. `gguf` is the type number in a GGUF file.
    """

    kind: str
    gguf: int
    elements: int
    nbytes: int
    scale: int = -1
    minimum: int = -1
    quants: int = 0


LAYOUTS: dict[str, BlockLayout] = {
    layout.kind: layout
    for layout in (
        BlockLayout("f32", gguf=0, elements=1, nbytes=4),
        BlockLayout("f16", gguf=1, elements=1, nbytes=2),
        BlockLayout("bf16", gguf=30, elements=1, nbytes=2),
        BlockLayout("q8_0", gguf=8, elements=32, nbytes=34, scale=0, quants=2),
        BlockLayout("q4_0", gguf=2, elements=32, nbytes=18, scale=0, quants=2),
        BlockLayout("q4_1", gguf=3, elements=32, nbytes=20, scale=0, minimum=2, quants=4),
    )
}
_VIEWS = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of a model, not copied from its file.

    `shape` is (rows, cols) as in y = W x, or (n,) for the scale of a normalisation. `data` is
    read-only and C contiguous: `shape` in float32, float16 or uint16 (the bits of bfloat16), or,
    for quantised kinds, uint8 of (rows, cols / elements * nbytes), laid out as the table at the top
    of this file says.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def layout(self) -> BlockLayout:
        return LAYOUTS[self.kind]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {self.kind}, {self.shape}, {self.nbytes} bytes)"


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; its last dimension is a multiple of the block's elements."""
    layout = LAYOUTS[kind]
    assert shape[-1] % layout.elements == 0, "a row is not a multiple of the block"
    return math.prod(shape) // layout.elements * layout.nbytes


def view(name: str, kind: str, shape: tuple[int, ...], buffer: memoryview, offset: int) -> Weight:
    """A weight over the bytes of `buffer` from `offset` on; the caller has checked the bounds."""
    if kind in _VIEWS:
        data = np.frombuffer(buffer, _VIEWS[kind], math.prod(shape), offset).reshape(shape)
    else:
        nbytes = stored_bytes(kind, shape)
        data = np.frombuffer(buffer, np.uint8, nbytes, offset).reshape(*shape[:-1], -1)
    return Weight(name, kind, shape, data)


def dequantize(weight: Weight) -> np.ndarray:
    """The numbers of a weight: a new float32 array of `weight.shape`.

    A scale that is infinite or NaN gives such values, without a warning.
    """
    layout, data = weight.layout, weight.data
    if weight.kind in ("f32", "f16"):
        with np.errstate(invalid="ignore"):
            return data.astype(np.float32)
    if weight.kind == "bf16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, layout.nbytes)
    quants = blocks[:, layout.quants :]
    if weight.kind == "q8_0":
        values = quants.view(np.int8).astype(np.float32)
    else:
        values = np.concatenate([quants & 15, quants >> 4], axis=1).astype(np.float32)
    if weight.kind == "q4_0":
        values -= 8
    with np.errstate(invalid="ignore"):
        values *= _float16_at(blocks, layout.scale)
        if layout.minimum >= 0:
            values += _float16_at(blocks, layout.minimum)
    return values.reshape(weight.shape)


def _float16_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at a byte offset of each block, as a float32 column."""
    return blocks[:, offset : offset + 2].copy().view("<f2").astype(np.float32)
