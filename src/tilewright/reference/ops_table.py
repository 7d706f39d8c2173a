"""The operators of the IR as NumPy functions: integers wrap, and every result is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType

UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}


def divided(act: np.ufunc) -> Callable[[Any, Any], Any]:
    """`//` or `%`: rounded towards minus infinity; 0 where an integer is divided by 0."""

    def apply(a: Any, b: Any) -> Any:
        if np.asarray(b).dtype.kind == "f":
            return act(a, b)
        none = np.equal(b, 0)
        return act(a, b + none) * ~none

    return apply


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide,
    "//": divided(np.floor_divide), "%": divided(np.remainder),
    "min": np.minimum, "max": np.maximum,
    "&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor,
    "<<": np.left_shift, ">>": np.right_shift,  # beyond the width: 0, or all bits the sign
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal,
    "!=": np.not_equal,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": np.negative, "not": np.logical_not, "exp": np.exp, "log": np.log, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "abs": np.abs, "floor": np.floor,
}  # fmt: skip


def to_integer(x: np.ndarray, to: DType) -> np.ndarray:
    """Floats as integers: the fraction is cut off, what is out of range becomes the nearest
    integer of the type, NaN becomes 0."""
    whole = np.trunc(x, dtype=np.float64)
    least, most = np.array(to.least, to.numpy), np.array(to.most, to.numpy)
    low, high = whole <= float(to.least), whole >= float(to.most + 1)
    inside = np.where(low | high | np.isnan(whole), 0, whole).astype(to.numpy)
    return np.where(low, least, np.where(high, most, inside))


def decode(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Values as an array holds them, as numbers: bits of bfloat16 become float32."""
    if dtype.name != "bfloat16":
        return raw
    return dtypes.bfloat16_values(raw) if raw.dtype == np.uint16 else raw.astype(np.float32)


def encode(values: np.ndarray, dtype: DType, to: np.dtype) -> np.ndarray:
    """Numbers as an array of the NumPy type `to` holds them, rounded to nearest even."""
    if dtype.name == "bfloat16" and to == np.uint16:
        return dtypes.bfloat16_bits(values.astype(np.float32)).reshape(values.shape)
    return values.astype(to, copy=False)
