"""Weights as a model file stores them, and their conversion to float32.

A row of numbers is stored as blocks, one after another. `gguf.quants` knows the layouts of the
quantised kinds; `ops/linear.py` computes with those of `linear.KINDS` as they are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import MissingExtra

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
except ImportError as missing:
    rule, hint = f"model files need {missing.name}", "pip install 'tilewright[models]'"
    raise MissingExtra("E101", rule, hint=hint) from None

_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
KINDS = (*_DTYPES, "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of a model, not copied from its file.

    `shape` is (rows, cols) as in y = W x, or (n,) for the scale of a normalisation. `data` is
    read-only and C contiguous: `shape` in float32, float16 or uint16 (the bits of bfloat16), or,
    for quantised kinds, uint8 of (rows, bytes of the blocks of a row).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {self.kind}, {self.shape}, {self.nbytes} bytes)"


def block_size(kind: str) -> tuple[int, int]:
    """The numbers in a block of a kind, and its bytes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]


def view(name: str, kind: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Weight:
    """A weight over the bytes of `buffer` from `offset` on; the caller has checked the bounds."""
    elements, nbytes = block_size(kind)
    dtype = np.dtype(_DTYPES.get(kind, "u1"))
    stored = (*shape[:-1], shape[-1] // elements * nbytes // dtype.itemsize)
    data = np.frombuffer(buffer, dtype, math.prod(stored), offset).reshape(stored)
    return Weight(name, kind, shape, data)


def dequantize(weight: Weight) -> np.ndarray:
    """The numbers of a weight, float32 of `weight.shape`; float32 weights are not copied.

    A scale that is infinite or NaN gives such values, without a warning.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = quants.dequantize(
            weight.data.view(np.uint8), GGMLQuantizationType[weight.kind.upper()]
        )
    return numbers.reshape(weight.shape)
