"""Checks of the arguments of `Attention.run` and `bind`: queries, outputs, values of variants."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.attention.checks import float_view, is_number, named_view
from tilewright.attention.kv import KV
from tilewright.attention.variant import Value, check_number, traced_of
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime.transfer import to_device
from tilewright.runtime.view import View, allocate, overlaps


def check_kv(kv: Any, kv_heads: int, head_dim: int, head_dim_vo: int) -> None:
    """`kv` is a KV of these heads. Raises ArgumentError[A103, A107]."""
    if not isinstance(kv, KV):
        raise ArgumentError(
            "A107", f"{type(kv).__name__} is no KV", where="kv", hint="tw.KV(table, pool)"
        )
    shape = (kv.kv_heads, kv.head_dim, kv.head_dim_vo)
    if shape != (kv_heads, head_dim, head_dim_vo):
        swapped = (kv.page_size, kv.head_dim) == (kv_heads, head_dim)
        raise ArgumentError(
            "A103",
            f"kv has {shape[0]} heads × {shape[1]} (v: {shape[2]}), "
            f"the attention {kv_heads} × {head_dim} (v: {head_dim_vo})",
            where="kv",
            hint='tw.Pool(k, v, layout="HND") where heads come before slots' if swapped else "",
        )


def check_q(q: Any, kv: KV, shape: tuple[int, int, int]) -> View:
    """The view of the queries. Raises ArgumentError (A102 … A107)."""
    seen = float_view("q", q)
    if seen.shape != shape:
        raise ArgumentError(
            "A103",
            f"q has shape {seen.shape}, the plan wants {shape}",
            where="q",
            hint="(tokens, qo_heads, head_dim), tokens = qo_indptr[-1]",
        )
    if seen.size and shape[2] > 1 and seen.strides[-1] != 1:
        raise ArgumentError("A104", "head_dim of q is not contiguous", where="q")
    if seen.device != kv.device:
        raise ArgumentError("A105", f"q is on {seen.device}, kv on {kv.device}", where="q")
    return seen


def outputs(q: Any, queries: View, kv: KV, out: Any) -> tuple[Any, Any]:
    """o (tokens, qo_heads, head_dim_vo), of q's dtype or the caller's, and lse, float32."""
    shape = (*queries.shape[:2], kv.head_dim_vo)
    lse = allocate(q, shape[:2], dtypes.float32)
    if out is None:
        return allocate(q, shape, queries.dtype), lse
    seen = named_view("out", out)
    if seen.dtype not in (queries.dtype, dtypes.float32):
        raise ArgumentError(
            "A102", f"out is {seen.dtype}", where="out", hint=f"{queries.dtype} or float32"
        )
    if seen.shape != shape or not seen.is_contiguous:
        raise ArgumentError("A103", f"out is no contiguous array of shape {shape}", where="out")
    if seen.device != kv.device or seen.readonly:
        reason = "read-only" if seen.readonly else f"on {seen.device}"
        raise ArgumentError("A105", f"out is {reason}", where="out")
    for name, other in (("q", queries), ("k", kv.pool.k), ("v", kv.pool.v)):
        if overlaps(seen, other):
            raise ArgumentError("A108", f"out overlaps {name}", where="out")
    return out, lse


def check_names(variant: Any, arguments: dict[str, Any]) -> None:
    """Each name is a value of the variant; numbers fit it. Raises ArgumentError."""
    traced = traced_of(variant)
    known = {v.name: v for v in traced.values}
    for name, value in arguments.items():
        if name not in known:
            raise ArgumentError(
                "A101",
                f"{traced.name} has no value {name!r}",
                where=name,
                hint=f"values: {', '.join(known) or 'none'}",
            )
        if not known[name].by and (is_number(value) or not hasattr(value, "shape")):
            check_number(known[name], value)


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
            raise ArgumentError(
                "A101", f"{traced.name} needs {v.name}", where=v.name, hint=f"{v.name}=…"
            )
        argument = arguments.get(v.name, fixed.get(v.name))
        if v.name not in arguments and device != "cpu":
            argument = _constant(v.dtype, fixed[v.name], device)
        arrays[v.name] = _value(v, argument, sizes, device)
    return arrays


@functools.cache
def _constant(dtype: DType, number: float, device: str) -> Any:
    """A number that a variant fixes, on a GPU: one array for the process, so that no call copies it
    and a recorded graph can read it as long as it likes."""
    return to_device(np.full(1, number, dtype.numpy), device)


def _value(v: Value, argument: Any, sizes: dict[str, int], device: str) -> tuple[Any, View]:
    """The array that a kernel reads a value from: the caller's, or a new one for a number."""
    if not v.by and (is_number(argument) or not hasattr(argument, "shape")):
        check_number(v, argument)
        argument = np.full(1, argument, v.dtype.numpy)
        argument = argument if device == "cpu" else to_device(argument, device)
    seen = named_view(v.name, argument)
    kinds = (v.dtype, dtypes.uint32) if v.by == "bit" else (v.dtype,)
    if seen.dtype not in kinds:
        names = " or ".join(map(str, kinds))
        raise ArgumentError("A102", f"{v.name} is {seen.dtype}, not {names}", where=v.name)
    _check_shape(v, seen, sizes)
    if not seen.is_contiguous:
        raise ArgumentError("A104", f"{v.name} is not contiguous", where=v.name)
    if seen.device != device:
        raise ArgumentError("A105", f"{v.name} is on {seen.device}, kv on {device}", where=v.name)
    return argument, seen


def _check_shape(v: Value, seen: View, sizes: dict[str, int]) -> None:
    """A value has one row for each of what it is read by. Raises ArgumentError[A103]."""
    rows_are = {"key": "request", "bit": "q_token"}.get(v.by, v.by)
    rows = sizes[rows_are] if rows_are else 1
    shape = seen.shape or (1,)
    if len(shape) != 1 + v.is_matrix or shape[0] != rows:
        columns = {"key": " keys", "bit": " words"}.get(v.by, "")
        count = f"one for each {rows_are}" if rows_are else "one number"
        raise ArgumentError(
            "A103",
            f"{v.name} has shape {seen.shape}, not ({rows},{columns}): {count}",
            where=v.name,
        )
    if seen.size >= 2**31:
        raise ArgumentError("A103", f"{v.name} has {seen.size} elements", where=v.name)
