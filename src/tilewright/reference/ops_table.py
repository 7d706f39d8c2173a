"""The operations of the IR on scalars as NumPy functions: those of programs on coordinates.

They take arrays and NumPy scalars, under `np.errstate(all="ignore")`. Every result is defined:
NumPy's integers wrap, `//` and `%` by 0 give 0, and a shift beyond the width gives 0, or all bits
the sign. bfloat16 is computed in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.errors import InternalError
from tilewright.ir import nodes as ir
from tilewright.ir.levels.stored import BINARY

UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": np.negative, "not": np.logical_not, "exp": np.exp, "exp2": np.exp2, "log": np.log,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh, "sin": np.sin,
    "cos": np.cos, "abs": np.abs, "floor": np.floor,
}  # fmt: skip


def operation(e: Any, exact: bool = False) -> Callable[..., Any]:
    """The function of the values of an expression's operands that gives its value."""
    if isinstance(e, ir.Binary):
        return BINARY[e.op]
    if isinstance(e, ir.Unary):
        return UNARY[e.op]
    if isinstance(e, ir.Select):
        return np.where
    if isinstance(e, ir.Cast):
        return lambda x: cast(x, e.dtype, exact)
    raise InternalError("I101", f"{type(e).__name__} has no operation on values")


def computed(dtype: dtypes.DType, exact: bool = False) -> np.dtype:
    """The NumPy type in which values of a dtype are computed; `exact`: all floats in float64."""
    if dtype.is_float and (exact or dtype.name == "bfloat16"):
        return np.dtype(np.float64 if exact else np.float32)
    return dtype.numpy


def cast(x: Any, to: dtypes.DType, exact: bool = False) -> Any:
    """Values as another dtype has them."""
    if to.is_int and x.dtype.kind == "f":
        return to_integer(x, to)
    if to.name == "bfloat16" and not exact:
        return decode(encode(x, to, to.numpy), to)
    if to.name == "float16" and not exact:
        x = x.astype(np.float32)
    return x.astype(computed(to, exact), copy=False)


def to_integer(x: Any, to: dtypes.DType) -> Any:
    """Floats as integers: the fraction is cut off, what is out of range becomes the nearest
    integer of the type, NaN becomes 0."""
    truncated = np.trunc(x, dtype=np.float64)
    least, most = np.array(to.least, to.numpy), np.array(to.most, to.numpy)
    low, high = truncated <= float(to.least), truncated >= float(to.most + 1)
    inside = np.where(low | high | np.isnan(truncated), 0, truncated).astype(to.numpy)
    return np.where(low, least, np.where(high, most, inside))[()]


def decode(raw: Any, dtype: dtypes.DType) -> Any:
    """Values as an array holds them, as numbers: bits of bfloat16 become float32."""
    if dtype.name != "bfloat16":
        return raw
    return dtypes.bfloat16_values(raw) if raw.dtype == np.uint16 else raw.astype(np.float32)


def encode(values: Any, dtype: dtypes.DType, to: np.dtype) -> Any:
    """Numbers as an array in the storage type of `to`, rounded to nearest even."""
    if dtype.name == "bfloat16" and to == np.uint16:
        return dtypes.bfloat16_bits(values.astype(np.float32)).reshape(values.shape)
    return values.astype(to, copy=False)
