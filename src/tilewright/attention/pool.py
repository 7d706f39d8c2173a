"""Pools: the pages of keys and values of one layer, as views of the caller's arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.attention.checks import check_view, float_view
from tilewright.dtypes import DType
from tilewright.errors import ArgumentError
from tilewright.runtime.view import View

LAYOUTS = ("NHD", "HND")


@dataclass(frozen=True, init=False, eq=False)
class Pool:
    """The pages of one layer. `k` is a view (pages, page_size, kv_heads, head_dim), `v` likewise
    with head_dim_vo; `rows`: the pool has no pages, `page_size` is 1."""

    k: View
    v: View
    rows: bool
    layout: str
    arrays: tuple[Any, Any]
    dtype: DType
    device: str
    pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    head_dim_vo: int

    def __init__(self, k: Any, v: Any = None, *, layout: str = "NHD") -> None:
        """Views of K and V; nothing is copied.

        `k` (pages, page_size, kv_heads, head_dim), in layout "HND" (pages, kv_heads, page_size,
        head_dim); `v` the same with a head_dim of its own, also a part of `k`'s memory. Without
        `v`: `k` (pages, 2, …) holds K and V of a page side by side. Three dimensions, (tokens,
        kv_heads, head_dim), are rows without pages, for `Table.ragged`. float32, float16 or
        bfloat16, any strides but head_dim contiguous. Raises ArgumentError (A102 … A107).
        """
        if layout not in LAYOUTS:
            text = f"layout={layout!r}"
            raise ArgumentError("A107", text, where="layout", hint=f"one of {', '.join(LAYOUTS)}")
        keys = float_view("k", k)
        keys, values = _halves(keys) if v is None else (keys, float_view("v", v))
        if keys.ndim not in (3, 4) or (keys.ndim == 3 and layout == "HND"):
            text = f"k has shape {float_view('k', k).shape}"
            hint = "(pages, page_size, kv_heads, head_dim); rows: (tokens, kv_heads, head_dim)"
            raise ArgumentError("A103", text, where="k", hint=hint)
        views = [_as_pages(name, x, keys.ndim, layout) for name, x in (("k", keys), ("v", values))]
        shape = views[0].shape[:3] + views[1].shape[3:]
        check_view("v", views[1], (views[0].dtype,), shape, views[0].device, hint="as k is")
        own = (*views, keys.ndim == 3, layout, (k, v))
        fields = (*own, keys.dtype, keys.device, *views[0].shape, views[1].shape[3])
        for name, value in zip(self.__dataclass_fields__, fields, strict=True):
            object.__setattr__(self, name, value)

    def index(self, part: int, page: Any, slot: Any) -> tuple[Any, tuple[Any, ...]]:
        """The array that holds K (part 0) or V (1), and the index of rows by page and slot in it:
        it selects (rows, kv_heads, head_dim). `page` (rows,), or (rows, kv_heads) where each head
        has pages of its own; `slot` (rows,)."""
        k, v = self.arrays
        head: Any = slice(None)
        if page.ndim == 2:
            head, slot = np.arange(self.kv_heads), slot[:, None]
        if self.rows:
            return (k, v)[part], (page, head)
        rest = (slot, head) if self.layout == "NHD" else (head, slot)
        return (k, (page, part, *rest)) if v is None else ((k, v)[part], (page, *rest))

    def params(self) -> dict[str, int]:
        """Addresses, strides in elements and sizes, as kernels take them."""
        strides = {
            f"{x}_{axis}": stride
            for x, seen in (("k", self.k), ("v", self.v))
            for axis, stride in zip(("page", "slot", "head"), seen.strides[:3], strict=True)
        }
        sizes = {"pages": self.pages, "page_size": self.page_size}
        return {"k": self.k.pointer, "v": self.v.pointer} | strides | sizes

    def __repr__(self) -> str:
        shape = f"{self.pages} rows" if self.rows else f"{self.pages} pages of {self.page_size}"
        dims = f"{self.head_dim}"
        dims += f"/{self.head_dim_vo}" if self.head_dim_vo != self.head_dim else ""
        return f"Pool({shape}, {self.kv_heads} heads × {dims}, {self.dtype}, {self.device})"


def _halves(both: View) -> tuple[View, View]:
    """The views of K and V in an array (pages, 2, …)."""
    if both.ndim != 5 or both.shape[1] != 2:
        text = f"k has shape {both.shape} and there is no v"
        hint = "without v, k is (pages, 2, page_size, kv_heads, head_dim)"
        raise ArgumentError("A103", text, where="k", hint=hint)
    shape, strides = both.shape[:1] + both.shape[2:], both.strides[:1] + both.strides[2:]
    step = both.strides[1] * both.dtype.itemsize
    return _view(both, shape, strides), _view(both, shape, strides, step)


def _view(of: View, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> View:
    return View(of.pointer + offset, of.dtype, shape, strides, of.device, of.owner, True)


def _as_pages(name: str, seen: View, ndim: int, layout: str) -> View:
    """The view (pages, page_size, kv_heads, head_dim) of an argument, checked."""
    if seen.ndim != ndim:
        text = f"{name} has shape {seen.shape}, k has {ndim} dimensions"
        raise ArgumentError("A103", text, where=name)
    shape, strides = seen.shape, seen.strides
    if ndim == 3:
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], strides[0], *strides[1:])
    elif layout == "HND":
        shape, strides = (tuple(x[axis] for axis in (0, 2, 1, 3)) for x in (shape, strides))
    if 0 in shape[1:]:
        axis = ("head_dim", "kv_heads", "page_size")[shape[::-1].index(0)]
        raise ArgumentError("A103", f"{name} of shape {seen.shape} has {axis} 0", where=name)
    if seen.size and shape[3] > 1 and strides[3] != 1:
        text = f"head_dim of {name} has stride {strides[3]}"
        raise ArgumentError("A104", text, where=name, hint="the last dimension must be contiguous")
    return _view(seen, shape, strides)
