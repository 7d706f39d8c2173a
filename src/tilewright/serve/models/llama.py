"""A Llama model, or one of its family, on Tilewright's kernels: its weights, and one forward pass
over packed rows. What differs between models is data of `ModelConfig`.

The operators are those of `ops` and `attention`; this file has their order. Buffers, the KV cache
and the batch belong to `runner.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tilewright.attention.batch import Attention
from tilewright.attention.variant import Causal, SlidingWindow, Softcap
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.linear import (
    KINDS,
    STORED,
    TOGETHER,
    After,
    can_interleave,
    interleave,
    linear_kernel,
    weight_views,
)
from tilewright.ops.rope import append_kernel, rope_append_kernel, rope_kernel
from tilewright.ops.rowwise import (
    argmax_kernel,
    gelu_mul_kernel,
    rmsnorm_add_kernel,
    rmsnorm_kernel,
    scaled_kernel,
    silu_mul_kernel,
)
from tilewright.serve.memory import Memory
from tilewright.serve.weights import ModelFile, Weight, dequantize
from tilewright.target import Target, target

Do = Callable[..., None]
"""`do(kernel, *args, out=…)` runs one call, or binds it for a recorded step."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: its weight in the layout of the target, its shape, and its bias."""

    kind: str
    arrays: tuple[Any, ...]
    rows: int
    cols: int
    interleaved: bool
    bias: tuple[Any, ...] = ()

    def is_stored_like(self, other: Linear) -> bool:
        """Whether one kernel can take both weights."""
        return (self.kind, self.rows, self.cols) == (other.kind, other.rows, other.cols)

    def as_written(self, out: Any) -> Any:
        """Views an array (t, rows) in the shape of the kernel's output."""
        return out.reshape(out.shape[0], -1, TOGETHER) if self.interleaved else out


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer, its attention and its angles. Norms by canonical name."""

    norms: dict[str, Any]
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    attention: Attention
    angles: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """The packed rows of a step: where the model reads tokens and writes activations.

    `single`: the first rows, whose linear layers take the kernel of one row; the others take that
    of many rows. Each of the two kernels gives a row the same bits for any number of rows.
    `ids`, `position`, `page`, `slot`: int32 (tokens,). `a`: the arrays of `Llama.widths`.
    """

    tokens: int
    single: int
    ids: Any
    position: Any
    page: Any
    slot: Any
    a: dict[str, Any]


class LayerInput(NamedTuple):
    """The input of linear layers: `x`, whose first `raw_rows` rows are not filled. For these the
    layers read `raw`, and compute its RMSNorm themselves, with `norm` (weight, epsilon)."""

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
        embed = self._tensor("embed")
        self.table_kind = embed.kind
        shares = tied and not self.head.interleaved
        self.table = self.head.arrays if shares else self._on_device(embed, weight_views)
        self.norm = self._vector("norm")
        variants = self._variants()
        ropes = self.config.rope, self.config.local_rope or self.config.rope
        angles = {
            rope: tuple(map(self.memory.put, rope.tables(positions, self.config.head_dim)))
            for rope in set(ropes)
        }
        windowed = self.config.windowed or (False,) * self.config.layers
        self.layers = [
            self._layer(f"layers.{i}.", variants[local], angles[ropes[local]])
            for i, local in enumerate(windowed)
        ]

    def _variants(self) -> tuple[Attention, Attention]:
        """The attention of layers without and with a sliding window."""
        c = self.config
        every: Any = Softcap(soft_cap=c.score_cap) if c.score_cap else Causal()
        local = every & SlidingWindow(window=c.window) if c.window else every
        sizes = c.qo_heads, c.kv_heads, c.head_dim
        return Attention(*sizes, every, c.sm_scale), Attention(*sizes, local, c.sm_scale)

    # -- weights ---------------------------------------------------------------------------------

    def _layer(self, prefix: str, attention: Attention, angles: tuple[Any, ...]) -> Layer:
        q, k, v, o = (self._linear(f"{prefix}attn.{name}") for name in "qkvo")
        gate, up, down = (self._linear(f"{prefix}ffn.{name}") for name in ("gate", "up", "down"))
        names = [n for n in self.file.tensors if n.startswith(prefix) and n.endswith("norm")]
        norms = {name.removeprefix(prefix): self._vector(name) for name in names}
        return Layer(norms, q, k, v, o, gate, up, down, attention, angles)

    def _tensor(self, name: str) -> Weight:
        """A weight; those of kinds that there are no products for become float16."""
        w = self.file.tensors[name]
        if w.kind in KINDS:
            return w
        return Weight(name, "f16", w.shape, dequantize(w).astype(np.float16))

    def _linear(self, name: str) -> Linear:
        w = self._tensor(name)
        rows, cols = w.shape
        interleaved = not self.target.is_cuda and can_interleave(w.kind, rows)
        arrays = self._on_device(w, interleave if interleaved else weight_views)
        bias: tuple[Any, ...] = ()
        if f"{name}.bias" in self.file.tensors:
            values = dequantize(self.file.tensors[f"{name}.bias"])
            bias = (self.memory.put(values.reshape(-1, TOGETHER) if interleaved else values),)
        return Linear(w.kind, arrays, rows, cols, interleaved, bias)

    def _on_device(self, w: Weight, layout: Any) -> tuple[Any, ...]:
        """The arrays of a weight in a layout, in memory of the target."""
        dtype = "bfloat16" if w.kind == "bf16" else None
        return tuple(self.memory.put(a, dtype) for a in layout(w.kind, w.data))

    def _vector(self, name: str) -> Any:
        offset = np.float32(self.config.norm_offset)
        return self.memory.put(dequantize(self.file.tensors[name]) + offset)

    # -- the layers ------------------------------------------------------------------------------

    @property
    def widths(self) -> dict[str, int]:
        """Elements of each activation of a token."""
        c = self.config
        q, kv = c.qo_heads * c.head_dim, c.kv_heads * c.head_dim
        widths = dict.fromkeys(("x", "y", "normed"), c.dim) | {"q": q, "k": kv, "v": kv}
        widths |= {"rotated": q, "attended": q} | ({"k_normed": kv} if c.qk_norm else {})
        return widths | dict.fromkeys(("gate", "up", "mixed"), c.ffn_dim)

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
        append = append_kernel(name)
        embedded = y if c.scaled_embedding else x
        if self.table_kind not in STORED:
            embedded = embedded.reshape(t, c.dim // 32, 2, 16)  # as the kernel writes it
        do(embedding_kernel(self.table_kind, name), b.ids, *self.table, out=embedded)
        if c.scaled_embedding:
            do(scaled_kernel(name), y, c.dim**0.5, out=x)
        for i, layer in enumerate(self.layers):
            angles = (*layer.angles, b.position)
            normed = self._normed(x, layer.norms["attn_norm"], a, b.single, do)
            for w, out in ((layer.q, a["q"]), (layer.k, a["k"]), (layer.v, a["v"])):
                self.linear(w, normed, out, b.single, do)
            q, k = a["q"], a["k"]
            if c.qk_norm:
                q, k = self._heads_normed(layer, a, do)
            rotated = self.pairs(a["rotated"], t, c.qo_heads)
            do(rope, self.pairs(q, t, c.qo_heads), *angles, out=rotated)
            keys, pages = self.pairs(k, t, c.kv_heads), cache[0][i]
            do(rope_append, self.pairs(pages, *pages.shape[:3]), keys, *angles, b.page, b.slot)
            do(append, cache[1][i], a["v"].reshape(t, c.kv_heads, c.head_dim), b.page, b.slot)
            heads = (t, c.qo_heads, c.head_dim)
            attend(i, a["rotated"].reshape(*heads), a["attended"].reshape(*heads))
            self._added(layer, "attn", a["attended"], (y, x), b, do)
            normed = self._normed(y, layer.norms["ffn_norm"], a, b.single, do)
            self._gated(layer, normed, a, b.single, do)
            self._added(layer, "ffn", a["mixed"], (x, y), b, do)

    def _heads_normed(self, layer: Layer, a: dict[str, Any], do: Do) -> tuple[Any, Any]:
        """The queries and keys, each head divided by its root mean square."""
        for name, source, out in (("q", "q", "attended"), ("k", "k", "k_normed")):
            heads, into = (a[n].reshape(-1, self.config.head_dim) for n in (source, out))
            norm = layer.norms[f"attn.{name}_norm"]
            do(rmsnorm_kernel(self.name), heads, norm, self.config.rms_eps, out=into)
        return a["attended"], a["k_normed"]

    def _added(self, layer: Layer, part: str, x: Any, y: tuple[Any, Any], b: Rows, do: Do) -> None:
        """out = residual + x Wᵀ with (out, residual) = y, of the last linear layer of a part; x Wᵀ
        is normalised first where the model has such norms."""
        w, (out, residual) = layer.o if part == "attn" else layer.down, y
        if not self.config.post_norms:
            return self.linear(w, LayerInput(x), out, b.single, do, residual=residual)
        self.linear(w, LayerInput(x), b.a["normed"], b.single, do)
        norm, eps = layer.norms[f"{part}_post_norm"], self.config.rms_eps
        return do(rmsnorm_add_kernel(self.name), b.a["normed"], norm, eps, residual, out=out)

    def _normed(self, x: Any, norm: Any, a: dict[str, Any], single: int, do: Do) -> LayerInput:
        """The RMSNorm of x. On GPUs the layers compute that of the first `single` rows themselves:
        no launch for it, and more arithmetic, which shows where there are many rows."""
        fused = self.target.is_cuda and not self.config.qkv_bias
        raw_rows, rows = single if fused else 0, self.memory.rows
        count, eps = x.shape[0], self.config.rms_eps
        if raw_rows < count:
            out = rows(a["normed"], raw_rows, count)
            do(rmsnorm_kernel(self.name), rows(x, raw_rows, count), norm, eps, out=out)
        return LayerInput(a["normed"], x, raw_rows, (norm, eps))

    def _gated(self, layer: Layer, x: LayerInput, a: dict[str, Any], single: int, do: Do) -> None:
        """mixed = SiLU(x Gᵀ) · (x Uᵀ): one kernel where both weights are stored alike; or GELU."""
        if layer.gate.is_stored_like(layer.up) and not self.config.gelu:
            self.linear(layer.gate, x, a["mixed"], single, do, up=layer.up)
            return
        self.linear(layer.gate, x, a["gate"], single, do)
        self.linear(layer.up, x, a["up"], single, do)
        activation = gelu_mul_kernel if self.config.gelu else silu_mul_kernel
        do(activation(self.name), a["gate"], a["up"], out=a["mixed"])

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
                plain: After = "bias" if w.bias else ""
                after: After = "gate" if up else plain if residual is None else "residual"
                if norm:
                    after = "norm_gate" if up else "norm"
                more = up.arrays if up else w.bias
                if residual is not None:
                    more = (w.as_written(rows(residual, begin, end)),)
                shape = w.rows, w.cols
                kernel = linear_kernel(self.name, w.kind, many, *shape, w.interleaved, after)
                piece = w.as_written(rows(out, begin, end))
                do(kernel, rows(array, begin, end), *w.arrays, *norm, *more, out=piece)

    def finish(self, a: dict[str, Any], single: int, do: Do) -> None:
        """The `logits` of the rows of `x`, and the `token` of the largest of each."""
        normed = self._normed(a["x"], self.norm, a, single, do)
        self.linear(self.head, normed, a["logits"], single, do)
        do(argmax_kernel(self.name), a["logits"], out=a["token"])
