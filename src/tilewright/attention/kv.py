"""Views of KV caches: pages of keys and values, and which of them belong to which request.

Request r has the keys of pages `kv_indices[kv_indptr[r] … kv_indptr[r+1]-1]`; all pages are full
but its last, which holds `last_page_len[r]` keys. The arrays stay the caller's: kernels read them
where they lie, so a length that grows in memory is seen by the next run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright import dtypes
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime.transfer import to_host
from tilewright.runtime.view import View, view

KV_TYPES = (dtypes.float32, dtypes.float16, dtypes.bfloat16)
MAX_KEYS = 2**31 - 128
"""The most keys of a request: positions are int32, and so is the end of the last tile."""


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """A block-sparse KV cache; make one with `KV.paged` or `KV.ragged`.

    `k` and `v` are views (pages, page_size, kv_heads, head_dim). `indices` None: page i is page i;
    `last` None: every page is full.
    """

    k: View
    v: View
    indptr: View
    indices: View | None
    last: View | None
    arrays: tuple[Any, ...] = field(repr=False)

    @staticmethod
    def paged(
        k_pages: Any, v_pages: Any, kv_indptr: Any, kv_indices: Any, last_page_len: Any
    ) -> KV:
        """A paged cache.

        `k_pages`, `v_pages`: (pages, page_size, kv_heads, head_dim), float32, float16 or bfloat16,
        any strides but head_dim contiguous. `kv_indptr` (requests + 1) counts pages, `kv_indices`
        names them (entries from `kv_indptr[-1]` on are never read), `last_page_len` (requests)
        counts the keys of each request's last page, 0 to page_size; all int32, contiguous, on the
        device of the pages.
        Raises ArgumentError (A102 … A109); contents of device arrays are not looked at: kernels
        clamp them.
        """
        k, v = _pages("k_pages", k_pages), _pages("v_pages", v_pages)
        _alike(k, v, "v_pages", "k_pages")
        indptr = _integers("kv_indptr", kv_indptr, k.device)
        indices = _integers("kv_indices", kv_indices, k.device)
        last = _integers("last_page_len", last_page_len, k.device)
        requests = _requests(indptr)
        if last.shape != (requests,):
            raise ArgumentError(
                "A103",
                f"last_page_len has shape {last.shape}, kv_indptr is of {requests} requests",
                where="last_page_len",
            )
        if k.device == "cpu":
            used = _check_indptr(np.asarray(kv_indptr), indices.size, "kv_indices")
            _check_range("kv_indices", np.asarray(kv_indices)[:used], k.shape[0] - 1)
            _check_range("last_page_len", np.asarray(last_page_len), k.shape[1])
        arrays = (k_pages, v_pages, kv_indptr, kv_indices, last_page_len)
        return KV(k, v, indptr, indices, last, arrays)._with_checked_lengths()

    @staticmethod
    def ragged(k: Any, v: Any, kv_indptr: Any) -> KV:
        """Keys and values of one request after the other: `k`, `v` (tokens, kv_heads, head_dim),
        `kv_indptr` (requests + 1) int32, in tokens. Raises ArgumentError (A102 … A109)."""
        views = []
        for name, array in (("k", k), ("v", v)):
            flat = _heads(name, array, 3)
            shape = (flat.shape[0], 1, *flat.shape[1:])
            strides = (flat.strides[0], flat.strides[0], *flat.strides[1:])
            views.append(
                View(flat.pointer, flat.dtype, shape, strides, flat.device, flat.owner, True)
            )
        _alike(views[0], views[1], "v", "k")
        indptr = _integers("kv_indptr", kv_indptr, views[0].device)
        _requests(indptr)
        if indptr.device == "cpu":
            _check_indptr(np.asarray(kv_indptr), views[0].shape[0], "k")
        kv = KV(views[0], views[1], indptr, None, None, (k, v, kv_indptr))
        return kv._with_checked_lengths()

    def _with_checked_lengths(self) -> KV:
        if self.device == "cpu" and self.listed * self.page_size > MAX_KEYS:
            longest = int(self._lengths().max(initial=0))
            if longest > MAX_KEYS:
                raise ArgumentError(
                    "A109",
                    f"a request has {longest} keys, more than {MAX_KEYS}",
                    where="kv_indptr",
                )
        return self

    @property
    def dtype(self) -> DType:
        return self.k.dtype

    @property
    def device(self) -> str:
        return self.k.device

    @property
    def requests(self) -> int:
        return self.indptr.size - 1

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def listed(self) -> int:
        """Entries of `kv_indptr`'s range: pages that may be named."""
        return self.k.shape[0] if self.indices is None else self.indices.size

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """First entry and number of entries of each request (requests,), int64, as the arrays now
        say, clamped as the kernels clamp them (`pages_of` in flash_cpu.h)."""
        indptr = np.asarray(to_host(self.arrays[2])).astype(np.int64)
        first = np.maximum(indptr[:-1], 0)
        count = np.minimum(indptr[1:], self.listed) - first
        return first, np.maximum(count, 0) * (self.k.shape[0] > 0)

    def lengths(self) -> np.ndarray:
        """Keys of each request (requests,), int64, as the arrays now say, clamped as the kernels
        clamp them; copies from a device."""
        return np.minimum(self._lengths(), MAX_KEYS)

    def _lengths(self) -> np.ndarray:
        _, count = self.ranges()
        if self.last is None:
            return count * self.page_size
        last = np.asarray(to_host(self.arrays[4])).astype(np.int64).clip(0, self.page_size)
        return np.where(count > 0, (count - 1) * self.page_size + last, 0)

    def capacity(self) -> np.ndarray:
        """Keys that the pages of each request can hold (requests,), int64."""
        return np.minimum(self.ranges()[1] * self.page_size, MAX_KEYS)

    def __repr__(self) -> str:
        kind = "ragged" if self.last is None else f"paged, page_size {self.page_size}"
        return (
            f"KV({kind}, {self.requests} requests, {self.k.shape[0]} pages, "
            f"{self.kv_heads} heads × {self.head_dim}, {self.dtype}, {self.device})"
        )


# ---------------------------------------------------------------------------- checks


def named_view(name: str, array: Any) -> View:
    """The view of an argument, with its name in the error."""
    try:
        return view(array)
    except ArgumentError as e:
        raise ArgumentError(e.code, e.message, where=name, hint=e.hint) from None


def _heads(name: str, array: Any, ndim: int) -> View:
    view = named_view(name, array)
    if view.dtype not in KV_TYPES:
        raise ArgumentError(
            "A102",
            f"{name} is {view.dtype}",
            where=name,
            hint=f"one of {', '.join(map(str, KV_TYPES))} (bfloat16 in NumPy: ml_dtypes)",
        )
    if view.ndim != ndim:
        form = {3: "(tokens, kv_heads, head_dim)", 4: "(pages, page_size, kv_heads, head_dim)"}
        raise ArgumentError("A103", f"{name} has shape {view.shape}, not {form[ndim]}", where=name)
    if 0 in view.shape[1:]:
        axis = ("head_dim", "kv_heads", "page_size")[view.shape[::-1].index(0)]
        raise ArgumentError("A103", f"{name} of shape {view.shape} has {axis} 0", where=name)
    if view.size and view.shape[-1] > 1 and view.strides[-1] != 1:
        raise ArgumentError(
            "A104",
            f"head_dim of {name} has stride {view.strides[-1]}",
            where=name,
            hint="the last dimension must be contiguous",
        )
    return view


def _pages(name: str, array: Any) -> View:
    return _heads(name, array, 4)


def _alike(a: View, b: View, name: str, other: str) -> None:
    if a.dtype != b.dtype:
        raise ArgumentError("A102", f"{name} is {b.dtype}, {other} is {a.dtype}", where=name)
    if a.shape != b.shape:
        raise ArgumentError("A103", f"{name} is {b.shape}, {other} is {a.shape}", where=name)
    if a.device != b.device:
        raise ArgumentError("A105", f"{name} is on {b.device}, {other} on {a.device}", where=name)


def _integers(name: str, array: Any, device: str) -> View:
    view = named_view(name, array)
    if view.dtype != dtypes.int32:
        raise ArgumentError("A102", f"{name} is {view.dtype}, not int32", where=name)
    if view.ndim != 1:
        raise ArgumentError("A103", f"{name} has {view.ndim} dimensions, not 1", where=name)
    if not view.is_contiguous:
        raise ArgumentError("A104", f"{name} is not contiguous", where=name)
    if view.device != device:
        raise ArgumentError("A105", f"{name} is on {view.device}, not {device}", where=name)
    return view


def _requests(indptr: View) -> int:
    if indptr.size < 1:
        raise ArgumentError("A103", "kv_indptr is empty", where="kv_indptr", hint="[0] for none")
    return indptr.size - 1


def rises(indptr: np.ndarray) -> bool:
    """Whether no number is below the one before it. Differences would wrap around in int32."""
    return not bool((indptr[1:] < indptr[:-1]).any())


def _check_indptr(indptr: np.ndarray, limit: int, of: str) -> int:
    """The number of entries that `indptr` ranges over. Raises ArgumentError[A109]."""
    if indptr[0] != 0 or indptr[-1] > limit or not rises(indptr):
        raise ArgumentError(
            "A109",
            f"kv_indptr must rise from 0 to at most {limit}, the length of {of}; "
            f"it goes from {indptr[0]} to {indptr[-1]}",
            where="kv_indptr",
        )
    return int(indptr[-1])


def _check_range(name: str, values: np.ndarray, highest: int) -> None:
    if values.size and (values.min() < 0 or values.max() > highest):
        bad = values[(values < 0) | (values > highest)][0]
        raise ArgumentError("A109", f"{name} holds {bad}, outside 0..{highest}", where=name)
