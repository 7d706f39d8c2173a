"""Data types, spelled as NumPy spells them (plus `bfloat16`).

A `DType` with `lanes > 1` is a vector register; only the loop level of the IR knows those.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class DType:
    """A data type. `kind`: `f` float, `i` signed, `u` unsigned or `b` bool; `bits`: the width of a
    lane; `lanes`: above 1 in a vector register."""

    name: str
    kind: str
    bits: int
    lanes: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of one lane in memory."""
        return max(self.bits // 8, 1)

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_int(self) -> bool:
        return self.kind in "iu"

    @property
    def scalar(self) -> "DType":
        return self if self.lanes == 1 else replace(self, lanes=1)

    @property
    def accumulator(self) -> "DType":
        """What sums of this type are kept in: 32 bits for narrower numbers, itself otherwise."""
        if self.bits >= 32 or self.kind == "b":
            return self.scalar
        return float32 if self.is_float else int32

    @property
    def numpy(self) -> np.dtype:
        """The NumPy type that stores it; bfloat16, which NumPy lacks, is stored as its bits."""
        return np.dtype("uint16" if self.name == "bfloat16" else self.name)

    @property
    def least(self) -> int:
        """The smallest integer of an integer type; 0 for other types."""
        return -(1 << (self.bits - 1)) if self.kind == "i" else 0

    @property
    def most(self) -> int:
        """The largest integer of an integer type; 1 for bool."""
        return 1 if self.kind == "b" else (1 << (self.bits - (self.kind == "i"))) - 1

    def wrapped(self, value: int) -> int:
        """The integer that a variable of this type holds once `value` is assigned to it: one that
        does not fit wraps around. A bool holds 0 or 1."""
        if self.kind == "b":
            return int(bool(value))
        return (value - self.least) % (1 << self.bits) + self.least

    def vector(self, lanes: int) -> "DType":
        return replace(self, lanes=lanes)

    def __str__(self) -> str:
        return self.name if self.lanes == 1 else f"{self.name}x{self.lanes}"

    __repr__ = __str__


bool_ = DType("bool", "b", 8)
int8, int16, int32, int64 = (DType(f"int{b}", "i", b) for b in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DType(f"uint{b}", "u", b) for b in (8, 16, 32, 64))
float16, float32, float64 = (DType(f"float{b}", "f", b) for b in (16, 32, 64))
bfloat16 = DType("bfloat16", "f", 16)

ALL: dict[str, DType] = {
    t.name: t
    for t in (
        bool_, int8, int16, int32, int64, uint8, uint16, uint32, uint64,
        float16, bfloat16, float32, float64,
    )
}  # fmt: skip
_FROM_NUMPY = {t.numpy: t for t in ALL.values() if t != bfloat16}


def dtype(of: Any) -> DType:
    """The DType of a name, a dtype of NumPy or torch, or a scalar type of NumPy. Raises
    ArgumentError[A102]."""
    if isinstance(of, DType):
        return of
    name = str(of).removeprefix("torch.")
    if name in ALL:
        return ALL[name]
    try:
        return from_numpy(np.dtype(of))
    except (TypeError, ValueError, ArgumentError):  # ValueError: of tensors
        hint = f"one of {', '.join(ALL)}"
        raise ArgumentError("A102", f"{of!r} is not a dtype", hint=hint) from None


def real(name: str, x: Any) -> float:
    """A number of Python, NumPy or torch as a float. Raises ArgumentError[A107] for others."""
    try:
        return float(x + 0)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError("A107", f"{name} is {x!r}, not a number", where=name) from None


def from_numpy(kind: np.dtype) -> DType:
    """The DType of a dtype of NumPy or ml_dtypes. Raises ArgumentError[A102]."""
    known = bfloat16 if kind.name == "bfloat16" else _FROM_NUMPY.get(kind)
    if not kind.isnative:
        hint = "x.astype(x.dtype.newbyteorder('='))"
        raise ArgumentError("A102", f"byte order of {kind.str} is not this machine's", hint=hint)
    if known is None:
        hint = f"one of {', '.join(ALL)}"
        raise ArgumentError("A102", f"arrays of {kind} cannot be used", hint=hint)
    return known


def promote(a: DType, b: DType) -> DType:
    """The type of `a op b`.

    Two floats: the wider one (float32 for two formats of one width). A float and an integer: the
    float. Two integers: as NumPy's `result_type`, the narrowest integer that holds the values of
    both (int8 and uint8: int16); float64 for uint64 and a signed one, as no integer holds both."""
    if a == b:
        return a
    if a.is_float or b.is_float:
        if a.is_float and b.is_float:
            return max(a, b, key=lambda t: t.bits) if a.bits != b.bits else float32
        return a if a.is_float else b
    least, most = min(a.least, b.least), max(a.most, b.most)
    holding = (t for t in (a, b, int16, int32, int64) if t.least <= least and most <= t.most)
    return next(holding, float64)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 bits (uint16), rounded to nearest even, NaN kept quiet."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) → float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
