"""Checks of the arguments of `Attention.run` and `bind`: queries, outputs, values of variants."""

import functools
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.checks import check_view, float_view, is_number, named_view
from tilewright.attention.kv import KV
from tilewright.attention.variant import Value, check_number, traced_of
from tilewright.errors import ArgumentError
from tilewright.runtime.transfer import to_device
from tilewright.runtime.view import View, allocate


def check_kv(kv: Any, kv_heads: int, head_dim: int, head_dim_vo: int) -> None:
    """`kv` is a KV of these heads. Raises ArgumentError[A103, A107]."""
    if not isinstance(kv, KV):
        text = f"{type(kv).__name__} is no KV"
        raise ArgumentError("A107", text, where="kv", hint="tw.KV(table, pool)")
    pool = kv.pool
    shape = (pool.kv_heads, pool.head_dim, pool.head_dim_vo)
    if shape != (kv_heads, head_dim, head_dim_vo):
        swapped = (pool.page_size, pool.head_dim) == (kv_heads, head_dim)
        text = f"kv has {shape[0]} heads × {shape[1]} (v: {shape[2]})"
        text = f"{text}, the attention {kv_heads} × {head_dim} (v: {head_dim_vo})"
        hint = 'tw.Pool(k, v, layout="HND") where heads come before slots' if swapped else ""
        raise ArgumentError("A103", text, where="kv", hint=hint)


def check_q(q: Any, kv: KV, shape: tuple[int, int, int]) -> View:
    """The view of the queries. Raises ArgumentError (A102 … A107)."""
    seen = float_view("q", q)
    check_view("q", seen, shape=shape, hint="(tokens, qo_heads, head_dim) of the plan")
    if seen.size and shape[2] > 1 and seen.strides[-1] != 1:
        raise ArgumentError("A104", "head_dim of q is not contiguous", where="q")
    check_view("q", seen, device=kv.pool.device)
    return seen


def outputs(q: Any, queries: View, kv: KV, out: Any, softmax: bool) -> tuple[Any, Any]:
    """o (tokens, qo_heads, head_dim_vo), of q's dtype or the caller's, and lse, float32, None
    without a softmax."""
    shape = (*queries.shape[:2], kv.pool.head_dim_vo)
    lse = allocate(q, shape[:2], dtypes.float32) if softmax else None
    if out is None:
        return allocate(q, shape, queries.dtype), lse
    seen = named_view("out", out)
    check_view("out", seen, (queries.dtype, dtypes.float32))
    if seen.shape != shape or not seen.is_contiguous:
        raise ArgumentError("A103", f"out is no contiguous array of shape {shape}", where="out")
    check_view("out", seen, device=kv.pool.device)
    if seen.readonly:
        raise ArgumentError("A105", "out is read-only", where="out")
    return out, lse


def check_names(variant: Any, arguments: dict[str, Any]) -> None:
    """Each name is a value of the variant; numbers fit it. Raises ArgumentError."""
    traced = traced_of(variant)
    known = {v.name: v for v in traced.values}
    for name, value in arguments.items():
        if name not in known:
            text = f"{traced.name} has no value {name!r}"
            hint = f"values: {', '.join(known) or 'none'}"
            raise ArgumentError("A101", text, where=name, hint=hint)
        if _is_number_of(known[name], value):
            check_number(known[name], value)


def _is_number_of(v: Value, argument: Any) -> bool:
    """Whether the argument of a value is a number of its own, not an array."""
    return not v.by and (is_number(argument) or not hasattr(argument, "shape"))


def values_of(
    variant: Any, arguments: dict[str, Any], sizes: dict[str, int], device: str
) -> dict[str, tuple[Any, View]]:
    """The array of each value of the variant, and its view; `sizes`: how many qo_head, kv_head,
    request and q_token there are. Raises ArgumentError (A101 … A109)."""
    check_names(variant, arguments)
    traced, fixed = traced_of(variant), dict(variant.fixed)
    arrays = {}
    for v in traced.values:
        if v.name not in arguments and v.name not in fixed:
            text = f"{traced.name} needs {v.name}"
            raise ArgumentError("A101", text, where=v.name, hint=f"{v.name}=…")
        argument = arguments.get(v.name, fixed.get(v.name))
        if v.name not in arguments and device != "cpu":
            argument = _constant(v.dtype, fixed[v.name], device)
        arrays[v.name] = _value(v, argument, sizes, device)
    return arrays


@functools.cache
def _constant(dtype: dtypes.DType, number: float, device: str) -> Any:
    """A number that a variant fixes, on a GPU: one array for the process, so that no call copies it
    and a recorded graph can read it as long as it likes."""
    return to_device(np.full(1, number, dtype.numpy), device)


def _value(v: Value, argument: Any, sizes: dict[str, int], device: str) -> tuple[Any, View]:
    """The array that a kernel reads a value from: the caller's, or a new one for a number."""
    if _is_number_of(v, argument):
        check_number(v, argument)
        argument = np.full(1, argument, v.dtype.numpy)
        argument = argument if device == "cpu" else to_device(argument, device)
    seen = named_view(v.name, argument)
    check_view(v.name, seen, (v.dtype, dtypes.uint32) if v.by == "bit" else (v.dtype,))
    _check_shape(v, seen, sizes)
    if not seen.is_contiguous:
        raise ArgumentError("A104", f"{v.name} is not contiguous", where=v.name)
    check_view(v.name, seen, device=device)
    return argument, seen


def _check_shape(v: Value, seen: View, sizes: dict[str, int]) -> None:
    """A value has one row for each of what it is read by. Raises ArgumentError[A103]."""
    rows_are = {"key": "request", "bit": "q_token"}.get(v.by, v.by)
    shape = seen.shape or (1,)
    rows = shape[0] if v.by == "dim" else sizes[rows_are] if rows_are else 1
    if len(shape) != 1 + (v.by in ("key", "bit")) or shape[0] != rows:
        columns = {"key": " keys", "bit": " words"}.get(v.by, "")
        count = f"one for each {rows_are}" if rows_are else "one number"
        text = f"{v.name} has shape {seen.shape}, not ({rows},{columns}): {count}"
        raise ArgumentError("A103", text, where=v.name)
    if seen.size >= 2**31:
        raise ArgumentError("A103", f"{v.name} has {seen.size} elements", where=v.name)
