"""A Llama model on Tilewright's kernels: its weights, and one forward pass over packed rows.

The operators are those of `ops` and `attention`; this file has their order. Buffers, the KV cache
and the batch belong to `runner.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilewright.attention.batch import Attention
from tilewright.ops.activation import silu_mul_kernel
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.linear import (
    TOGETHER,
    After,
    can_interleave,
    check_kind,
    interleave,
    linear_kernel,
    weight_views,
)
from tilewright.ops.rmsnorm import rmsnorm_kernel
from tilewright.ops.rope import append_kernel, rope_append_kernel, rope_kernel, rope_tables
from tilewright.ops.sampling import argmax_kernel
from tilewright.serve.memory import Memory
from tilewright.serve.weights import ModelFile, Weight, dequantize
from tilewright.target import Target, target

Do = Callable[..., None]
"""`do(kernel, *args, out=…)` runs one call, or binds it for a recorded step."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: its weight in the layout of the target, and its shape."""

    kind: str
    arrays: tuple[Any, ...]
    rows: int
    cols: int
    interleaved: bool

    def kernel(self, many: bool, where: str, after: After = "") -> Any:
        return linear_kernel(self.kind, many, self.rows, self.cols, where, self.interleaved, after)

    def is_stored_like(self, other: Linear) -> bool:
        """Whether one kernel can take both weights."""
        return (self.kind, self.rows, self.cols) == (other.kind, other.rows, other.cols)

    def as_written(self, out: Any) -> Any:
        """Views an array (t, rows) in the shape of the kernel's output."""
        return out.reshape(out.shape[0], -1, TOGETHER) if self.interleaved else out


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: Any
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    ffn_norm: Any
    gate: Linear
    up: Linear
    down: Linear


WIDTHS = (
    "x", "y", "normed", "q", "k", "v", "rotated", "attended", "gate", "up", "mixed",
)  # fmt: skip
"""The activations of a token, in the order of `Llama.widths`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The packed rows of a step: where the model reads tokens and writes activations.

    `single`: the first rows, whose linear layers take the kernel of one row; the others take that
    of many rows. Each of the two kernels gives a row the same bits for any number of rows.
    `ids`, `position`, `page`, `slot`: int32 (tokens,). `a`: the arrays of `WIDTHS`.
    """

    tokens: int
    single: int
    ids: Any
    position: Any
    page: Any
    slot: Any
    a: dict[str, Any]


class LayerInput(NamedTuple):
    """The rows that linear layers read: `x`, but of the first `raw_rows` of `raw` the RMSNorm,
    which the layers compute themselves from `norm` (weight, epsilon)."""

    x: Any
    raw: Any = None
    raw_rows: int = 0
    norm: tuple[Any, ...] = ()


class Llama:
    """The weights of a model in memory of a target, and its kernels.

    `positions`: the longest sequence. Raises ModelError, BuildError.
    """

    def __init__(self, file: ModelFile, where: Target | str, positions: int) -> None:
        self.target = target(where)
        self.name = str(self.target)
        self.file, self.config = file, file.config
        self.memory = Memory(self.target)
        tied = self.config.tied_embedding
        self.head = self._linear("embed" if tied else "lm_head")
        self.table_kind = self.file.tensors["embed"].kind
        shares = tied and not self.head.interleaved
        self.table = self.head.arrays if shares else self._on_device("embed", weight_views)
        self.norm = self._vector("norm")
        self.layers = [self._layer(f"layers.{i}.") for i in range(self.config.layers)]
        c = self.config
        self.attention = Attention(qo_heads=c.qo_heads, kv_heads=c.kv_heads, head_dim=c.head_dim)
        tables = rope_tables(positions, c.head_dim, c.rope_base, c.rope_scale)
        self.angles = tuple(self.memory.put(t) for t in tables)

    # -- weights ---------------------------------------------------------------------------------

    def _layer(self, prefix: str) -> Layer:
        q, k, v, o = (self._linear(f"{prefix}attn.{name}") for name in "qkvo")
        gate, up, down = (self._linear(f"{prefix}ffn.{name}") for name in ("gate", "up", "down"))
        norms = self._vector(prefix + "attn_norm"), self._vector(prefix + "ffn_norm")
        return Layer(norms[0], q, k, v, o, norms[1], gate, up, down)

    def _linear(self, name: str) -> Linear:
        w = self.file.tensors[name]
        rows, cols = w.shape
        interleaved = not self.target.is_cuda and can_interleave(w.kind, rows)
        arrays = self._on_device(name, interleave if interleaved else weight_views)
        return Linear(w.kind, arrays, rows, cols, interleaved)

    def _on_device(self, name: str, layout: Any) -> tuple[Any, ...]:
        """The arrays of a weight in a layout, in memory of the target."""
        w: Weight = self.file.tensors[name]
        check_kind(w.kind, name)
        dtype = "bfloat16" if w.kind == "bf16" else None
        return tuple(self.memory.put(a, dtype) for a in layout(w.kind, w.data))

    def _vector(self, name: str) -> Any:
        return self.memory.put(dequantize(self.file.tensors[name]))

    # -- the layers ------------------------------------------------------------------------------

    @property
    def widths(self) -> dict[str, int]:
        """Elements of each activation of a token."""
        c = self.config
        q, kv = c.qo_heads * c.head_dim, c.kv_heads * c.head_dim
        sizes = (c.dim, c.dim, c.dim, q, kv, kv, q, q, *(c.ffn_dim,) * 3)
        return dict(zip(WIDTHS, sizes, strict=True))

    def pairs(self, array: Any, *outer: int) -> Any:
        """A projection, or pages of keys, as pairs that are rotated: (*outer, half, 2) or
        (*outer, 2, half)."""
        half = self.config.head_dim // 2
        return array.reshape(*outer, *((half, 2) if self.config.rope_interleaved else (2, half)))

    def forward(self, b: Rows, cache: tuple[list[Any], list[Any]], attend: Do, do: Do) -> None:
        """All layers over the rows of a step; the last activations are in `x`.

        `cache`: keys and values, (pages, page_size, kv_heads, head_dim) a layer; `attend(layer, q,
        out)` is the attention of a layer."""
        c, name, t, a = self.config, self.name, b.tokens, b.a
        x, y = a["x"], a["y"]
        rope, rope_append = (f(c.rope_interleaved, name) for f in (rope_kernel, rope_append_kernel))
        angles, append = (*self.angles, b.position), append_kernel(name)
        do(embedding_kernel(self.table_kind, name), b.ids, *self.table, out=self._embedded(x))
        for i, layer in enumerate(self.layers):
            normed = self._normed(x, layer.attn_norm, a, b.single, do)
            for w, out in ((layer.q, a["q"]), (layer.k, a["k"]), (layer.v, a["v"])):
                self.linear(w, normed, out, b.single, do)
            rotated = self.pairs(a["rotated"], t, c.qo_heads)
            do(rope, self.pairs(a["q"], t, c.qo_heads), *angles, out=rotated)
            keys, pages = self.pairs(a["k"], t, c.kv_heads), cache[0][i]
            do(rope_append, self.pairs(pages, *pages.shape[:3]), keys, *angles, b.page, b.slot)
            do(append, cache[1][i], a["v"].reshape(t, c.kv_heads, c.head_dim), b.page, b.slot)
            heads = (t, c.qo_heads, c.head_dim)
            attend(i, a["rotated"].reshape(*heads), a["attended"].reshape(*heads))
            self.linear(layer.o, LayerInput(a["attended"]), y, b.single, do, residual=x)
            normed = self._normed(y, layer.ffn_norm, a, b.single, do)
            self._gated(layer, normed, a, b.single, do)
            self.linear(layer.down, LayerInput(a["mixed"]), x, b.single, do, residual=y)

    def _normed(self, x: Any, norm: Any, a: dict[str, Any], single: int, do: Do) -> LayerInput:
        """The RMSNorm of x. On GPUs the layers compute that of the first `single` rows themselves:
        no launch for it, and more arithmetic, which shows where there are many rows."""
        raw_rows, rows = single if self.target.is_cuda else 0, self.memory.rows
        count, eps = x.shape[0], self.config.rms_eps
        if raw_rows < count:
            out = rows(a["normed"], raw_rows, count)
            do(rmsnorm_kernel(self.name), rows(x, raw_rows, count), norm, eps, out=out)
        return LayerInput(a["normed"], x, raw_rows, (norm, eps))

    def _gated(self, layer: Layer, x: LayerInput, a: dict[str, Any], single: int, do: Do) -> None:
        """mixed = SiLU(x Gᵀ) · (x Uᵀ): one kernel where both weights are stored alike."""
        if layer.gate.is_stored_like(layer.up):
            self.linear(layer.gate, x, a["mixed"], single, do, up=layer.up)
            return
        self.linear(layer.gate, x, a["gate"], single, do)
        self.linear(layer.up, x, a["up"], single, do)
        do(silu_mul_kernel(self.name), a["gate"], a["up"], out=a["mixed"])

    def linear(
        self, w: Linear, x: LayerInput, out: Any, single: int, do: Do, *,
        residual: Any = None, up: Linear | None = None,
    ) -> None:  # fmt: skip
        """out = x Wᵀ, or residual + x Wᵀ, or SiLU(x Wᵀ) · (x Uᵀ): the first `single` rows by the
        kernel of one row, the rest by the other. GPUs have the same kernel for both but for
        rows whose norm is computed here."""
        rows, count = self.memory.rows, x.x.shape[0]
        single = x.raw_rows if self.target.is_cuda else single
        for begin, end, many in ((0, single, False), (single, count, True)):
            if begin < end:
                array, norm = (x.raw, x.norm) if begin < x.raw_rows else (x.x, ())
                after: After = "gate" if up else "" if residual is None else "residual"
                if norm:
                    after = "norm_gate" if up else "norm"
                more = up.arrays if up else ()
                if residual is not None:
                    more = (w.as_written(rows(residual, begin, end)),)
                kernel = w.kernel(many, self.name, after)
                piece = w.as_written(rows(out, begin, end))
                do(kernel, rows(array, begin, end), *w.arrays, *norm, *more, out=piece)

    def _embedded(self, x: Any) -> Any:
        blocks = self.config.dim // 32
        quantised = {"q8_0": (blocks, 32), "q4_0": (blocks, 2, 16), "q4_1": (blocks, 2, 16)}
        return x.reshape(x.shape[0], *quantised.get(self.table_kind, (self.config.dim,)))

    def finish(self, a: dict[str, Any], single: int, do: Do) -> None:
        """The `logits` of the rows of `x`, and the `token` of the largest of each."""
        normed = self._normed(a["x"], self.norm, a, single, do)
        self.linear(self.head, normed, a["logits"], single, do)
        do(argmax_kernel(self.name), a["logits"], out=a["token"])
