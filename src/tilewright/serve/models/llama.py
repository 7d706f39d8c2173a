"""A Llama model, or one of its family, on Tilewright's kernels: its weights, and one forward pass
over packed rows. What differs between models is data of `ModelConfig`.

The operators are those of `ops` and `attention`; this file has their order. Buffers, the KV cache
and the batch belong to `runner.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tilewright.attention.batch import Attention
from tilewright.attention.variant import Causal, SlidingWindow, Softcap
from tilewright.ops import linear, rowwise
from tilewright.ops.embedding import embedding_kernel
from tilewright.ops.rope import append_kernel, rope_append_kernel, rope_kernel
from tilewright.runtime.view import view
from tilewright.serve.gguf import Weight, dequantize
from tilewright.serve.memory import Memory
from tilewright.serve.products import products_of
from tilewright.serve.weights import ModelFile
from tilewright.target import Target, target

Do = Callable[..., Any]
"""`do(kernel, *args, out=…)` runs one call, or binds it for a recorded step."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: its weight in the layout of the target, its shape, its bias, and the matrix
    that a library reads: the same memory, or what a quantised weight stands for."""

    kind: str
    arrays: tuple[Any, ...]
    rows: int
    cols: int
    interleaved: bool
    bias: tuple[Any, ...] = ()
    wide: Any = None

    def as_written(self, out: Any) -> Any:
        """Views an array (t, rows) in the shape of the kernel's output."""
        return out.reshape(out.shape[0], -1, linear.TOGETHER) if self.interleaved else out


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer by canonical name, its attention and its angles. Where a library
    computes products, `linear` has those of `JOINED` too."""

    linear: dict[str, Linear]
    norms: dict[str, Any]
    attention: Attention
    angles: tuple[Any, ...]


JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "ffn.gate_up": ("ffn.gate", "ffn.up")}
"""Linear layers of one input, by the name of the one that has the rows of all."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The packed rows of a step: where the model reads tokens and writes activations.

    `few`: linear layers take the kernel of one row, not that of many rows or the products of a
    library. Of the two kernels, not of a library, a row has the same bits for any number of rows.
    `ids` (by first row), `position`, `slot`, `page` (by layer): int32 (tokens,). `a`:
    `Llama.activations`.
    """

    tokens: int
    few: bool
    ids: dict[int, Any]
    position: Any
    slot: Any
    page: list[Any]
    a: dict[str, Any]


class LayerInput(NamedTuple):
    """The rows that linear layers read: `x`, or its RMSNorm, which the layers compute themselves,
    where there is a `norm` (weight, epsilon)."""

    x: Any
    norm: tuple[Any, ...] = ()


class Llama:
    """The weights of a model in memory of a target, and its kernels.

    `positions`: the longest sequence. Raises ModelError, BuildError.
    """

    def __init__(self, file: ModelFile, where: Target | str, positions: int) -> None:
        self.target = target(where)
        self.name = str(self.target)
        self.kv_dtype = "bfloat16" if self.target.is_cuda else "float32"
        self.file, self.config = file, file.config
        self.memory = Memory(self.target)
        self.products: Any = products_of(file, self.target)
        self.products_by = self.products.name if self.products else "our own layers"
        tied = self.config.tied_embedding
        self.head = self._linear("embed" if tied else "lm_head")
        embed = self._tensor("embed")
        self.table_kind = embed.kind
        shares = tied and not self.head.interleaved
        self.table = self.head.arrays if shares else self._on_device(embed, linear.weight_views)
        self.norm = self._vector("norm")
        variants = self._variants()
        ropes = self.config.rope, self.config.local_rope or self.config.rope
        angles = {
            rope: tuple(map(self.memory.put, rope.tables(positions, self.config.head_dim)))
            for rope in set(ropes)
        }
        self.layers = [
            self._layer(f"layers.{i}.", variants[local], angles[ropes[local]])
            for i, local in enumerate(self.config.has_window)
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
        tensors = {n: w for n, w in self.file.tensors.items() if n.startswith(prefix)}
        names = {n.removeprefix(prefix): len(w.shape) for n, w in tensors.items()}
        norms = {n: self._vector(prefix + n) for n in names if n.endswith("norm")}
        weights = {n: self._linear(prefix + n) for n, ndim in names.items() if ndim == 2}
        for name, parts in JOINED.items() if self.products else ():
            weights |= self._joined(name, {n: weights[n] for n in parts})
        return Layer(weights, norms, attention, angles)

    def _joined(self, name: str, parts: dict[str, Linear]) -> dict[str, Linear]:
        """Layers of one input, and the one of all their rows, in whose memory they then are."""
        tensor, cat, of = self.products.tensor, self.products.torch.cat, [*parts.values()]
        joined = cat([p.wide for p in of])
        bias = (cat([tensor(p.bias[0]).flatten() for p in of]),) if of[0].bias else ()
        rows = zip(parts, of, joined.split([p.rows for p in of]), strict=True)
        views = {
            n: replace(p, wide=r, arrays=(r,) if p.arrays[0] is p.wide else p.arrays)
            for n, p, r in rows
        }
        return views | {name: replace(of[0], arrays=(), bias=bias, wide=joined)}

    def _tensor(self, name: str) -> Weight:
        """A weight; those of kinds that there are no products for become float16."""
        w = self.file.tensors[name]
        if w.kind in linear.KINDS:
            return w
        return Weight(name, "f16", w.shape, dequantize(w).astype(np.float16))

    def _linear(self, name: str) -> Linear:
        w = self._tensor(name)
        rows, cols = w.shape
        interleaved = not self.target.is_cuda and linear.can_interleave(w.kind, rows)
        arrays = self._on_device(w, linear.interleave if interleaved else linear.weight_views)
        bias: tuple[Any, ...] = ()
        if f"{name}.bias" in self.file.tensors:
            values = dequantize(self.file.tensors[f"{name}.bias"])
            values = values.reshape(-1, linear.TOGETHER) if interleaved else values
            bias = (self.memory.put(values),)
        wide: Any = None
        if self.products and linear.STORED.get(w.kind) == self.products.dtype:
            wide = self.products.tensor(arrays[0])
            arrays = (wide,)
        elif self.products:
            wide = self.products.tensor(self.memory.put(dequantize(w)))
            wide = wide.to(getattr(self.products.torch, self.products.dtype))
        return Linear(w.kind, arrays, rows, cols, interleaved, bias, wide)

    def _on_device(self, w: Weight, layout: Any) -> tuple[Any, ...]:
        """The arrays of a weight in a layout, in memory of the target."""
        dtype = "bfloat16" if w.kind == "bf16" else None
        return tuple(self.memory.put(a, dtype) for a in layout(w.kind, w.data))

    def _vector(self, name: str) -> Any:
        return self.memory.put(dequantize(self.file.tensors[name]) + self.config.norm_offset)

    # -- the layers ------------------------------------------------------------------------------

    def activations(self, rows: int, wide: bool = False) -> dict[str, Any]:
        """Arrays for the activations of rows; `wide`: where a library computes products, whose
        inputs and most results are of the weights' dtype."""
        c, of, ffn = self.config, self.products if wide else None, self.config.ffn_dim
        q, kv = c.qo_heads * c.head_dim, c.kv_heads * c.head_dim
        widths = dict.fromkeys(("x", "y", "normed"), c.dim) | {"rotated": q, "attended": q}
        widths |= {"mixed": ffn} | ({"k_normed": kv} if c.qk_norm else {})
        joined = {"qkv": q + 2 * kv, "gate_up": 2 * ffn, "added": c.dim}
        widths |= joined if of else {"q": q, "k": kv, "v": kv, "gate": ffn, "up": ffn}
        new, kind = (of.empty, of.dtype) if of else (self.memory.empty, "float32")
        kinds = {"x": "float32", "y": "float32", "rotated": self.kv_dtype}
        kinds["added"] = "float32" if c.post_norms else kind
        return {n: new(rows, w, dtype=kinds.get(n, kind)) for n, w in widths.items()}

    def is_wide(self, few: bool) -> bool:
        """Whether a library computes the products of such rows."""
        return self.products is not None and not few

    def pairs(self, array: Any, *outer: int) -> Any:
        """A projection, or pages of keys, as pairs that are rotated: (*outer, half, 2) or
        (*outer, 2, half)."""
        half = self.config.head_dim // 2
        return array.reshape(*outer, *((half, 2) if self.config.rope_interleaved else (2, half)))

    def forward(self, b: Rows, cache: Any, attend: Do, do: Do) -> LayerInput:
        """All layers over the rows of a step, up to `x`; what the head reads of it.

        `cache`: lists of keys and of values, (pages, page_size, kv_heads, head_dim) a layer;
        `attend(layer, q, out)` is the attention of a layer."""
        c, name, t, a = self.config, self.name, b.tokens, b.a
        x, y = a["x"], a["y"]
        rotations = rope_kernel, rope_append_kernel
        kinds = self.kv_dtype, self.products.dtype if self.is_wide(b.few) else "float32"
        fixed = c.head_dim if self.target.is_cuda else 0
        rope, rope_append = (f(c.rope_interleaved, name, *kinds, fixed) for f in rotations)
        append = append_kernel(name, *kinds, fixed)
        embedded = y if c.scaled_embedding else x
        if self.table_kind not in linear.STORED:
            embedded = embedded.reshape(t, c.dim // 32, 2, 16)  # as the kernel writes it
        for at, ids in b.ids.items():
            part = self.memory.rows(embedded, at, at + ids.shape[0])
            do(embedding_kernel(self.table_kind, name), ids, *self.table, out=part)
        if c.scaled_embedding:
            do(rowwise.scaled_kernel(name), y, c.dim**0.5, out=x)
        norms = [layer.norms["attn_norm"] for layer in self.layers]
        normed = self._normed(x, norms[0], a, b.few, do)
        for i, (layer, then) in enumerate(zip(self.layers, [*norms[1:], self.norm], strict=True)):
            angles = (*layer.angles, b.position)
            qkv = [layer.linear[name] for name in JOINED["attn.qkv"]]
            if self.is_wide(b.few):
                self.linear(layer.linear["attn.qkv"], normed, a["qkv"], b.few, do)
                q, k, v = a["qkv"].split([w.rows for w in qkv], 1)
            else:
                q, k, v = a["q"], a["k"], a["v"]
                for w, out in zip(qkv, (q, k, v), strict=True):
                    self.linear(w, normed, out, b.few, do)
            if c.qk_norm:  # each head divided by its root mean square
                for part, heads, out in (("q", q, a["attended"]), ("k", k, a["k_normed"])):
                    self._rmsnorm(heads, layer.norms[f"attn.{part}_norm"], out, c.head_dim, do)
                q, k = a["attended"], a["k_normed"]
            rotated = self.pairs(a["rotated"], t, c.qo_heads)
            do(rope, self.pairs(q, t, c.qo_heads), *angles, out=rotated)
            keys, pages = self.pairs(k, t, c.kv_heads), cache[0][i]
            slots = b.page[i], b.slot
            do(rope_append, self.pairs(pages, *pages.shape[:3]), keys, *angles, *slots)
            do(append, cache[1][i], v.reshape(t, c.kv_heads, c.head_dim), *slots)
            heads = (t, c.qo_heads, c.head_dim)
            attend(i, a["rotated"].reshape(*heads), a["attended"].reshape(*heads))
            normed = self._added(layer, "attn", (y, x), layer.norms["ffn_norm"], b, do)
            self._gated(layer, normed, a, b.few, do)
            normed = self._added(layer, "ffn", (x, y), then, b, do)
        return normed

    def _rmsnorm(self, x: Any, norm: Any, out: Any, width: int, do: Do) -> None:
        """The RMSNorm of every `width` elements of rows."""
        kinds, shape = (view(a).dtype.name for a in (x, out)), (x.shape[0], -1, width)
        kernel = rowwise.heads_norm_kernel(width, *kinds, self.name)
        do(kernel, x.reshape(*shape), norm, self.config.rms_eps, out=out.reshape(*shape))

    def _added(self, layer: Layer, part: str, y: Any, then: Any, b: Rows, do: Do) -> LayerInput:
        """out = residual + x Wᵀ with (out, residual) = y, of the last linear layer of a part; x Wᵀ
        is normalised first where the model has such norms. The RMSNorm of `out` by `then`."""
        a, (out, residual), eps = b.a, y, self.config.rms_eps
        name, of = {"attn": ("attn.o", "attended"), "ffn": ("ffn.down", "mixed")}[part]
        w, x = layer.linear[name], a[of]
        wide, added = self.is_wide(b.few), a["added" if self.is_wide(b.few) else "normed"]
        if not (wide or self.config.post_norms):
            self.linear(w, LayerInput(x), out, b.few, do, residual=residual)
            return self._normed(out, then, a, b.few, do)
        self.linear(w, LayerInput(x), added, b.few, do)
        if self.config.post_norms:
            norm = layer.norms[f"{part}_post_norm"]
            do(rowwise.rmsnorm_add_kernel(self.name), added, norm, eps, residual, out=out)
            return self._normed(out, then, a, b.few, do)
        kernel = rowwise.added_norm_kernel(self.config.dim, self.products.dtype, self.name)
        do(kernel, residual, added, then, eps, out=(out, a["normed"]))
        return LayerInput(a["normed"])

    def _normed(self, x: Any, norm: Any, a: dict[str, Any], few: bool, do: Do) -> LayerInput:
        """The RMSNorm of x. On GPUs the layers compute that of few rows themselves: no launch for
        it, and more arithmetic, which shows where there are many rows."""
        weight = norm, self.config.rms_eps
        if few and self.target.is_cuda and not self.config.qkv_bias:
            return LayerInput(x, weight)
        self._rmsnorm(x, norm, a["normed"], self.config.dim, do)
        return LayerInput(a["normed"])

    def _gated(self, layer: Layer, x: LayerInput, a: dict[str, Any], few: bool, do: Do) -> None:
        """mixed = SiLU(x Gᵀ) · (x Uᵀ): one kernel where both weights are stored alike; or GELU."""
        gate, up = (layer.linear[name] for name in JOINED["ffn.gate_up"])
        if self.is_wide(few):
            self.linear(layer.linear["ffn.gate_up"], x, a["gate_up"], few, do)
            sizes = self.products.dtype, self.config.ffn_dim
            kernel = rowwise.gated_kernel(self.name, self.config.gelu, *sizes)
            return do(kernel, *a["gate_up"].chunk(2, 1), out=a["mixed"])
        if gate.kind == up.kind and not self.config.gelu:
            return self.linear(gate, x, a["mixed"], few, do, up=up)
        self.linear(gate, x, a["gate"], few, do)
        self.linear(up, x, a["up"], few, do)
        do(rowwise.gated_kernel(self.name, self.config.gelu), a["gate"], a["up"], out=a["mixed"])

    def linear(
        self, w: Linear, x: LayerInput, out: Any, few: bool, do: Do, *,
        residual: Any = None, up: Linear | None = None,
    ) -> None:  # fmt: skip
        """out = x Wᵀ, or residual + x Wᵀ, or SiLU(x Wᵀ) · (x Uᵀ). GPUs have one kernel for few rows
        and many, and a library for the first."""
        if self.is_wide(few):
            return do(self.products, x.x, w.wide, *w.bias, out=out)
        plain: linear.After = "bias" if w.bias else ""
        after: linear.After = "gate" if up else plain if residual is None else "residual"
        if x.norm:
            after = "norm_gate" if up else "norm"
        more = up.arrays if up else w.bias
        if residual is not None:
            more = (w.as_written(residual),)
        many, shape = self.target.is_cuda or not few, (w.rows, w.cols)
        kernel = linear.linear_kernel(self.name, w.kind, many, *shape, w.interleaved, after)
        do(kernel, x.x, *w.arrays, *x.norm, *more, out=w.as_written(out))

    def finish(self, a: dict[str, Any], few: bool, do: Do, normed: Any = None) -> None:
        """The `logits` of the rows of `x`, or of `normed`, and the `token` of each's largest."""
        normed = normed or self._normed(a["x"], self.norm, a, few, do)
        self.linear(self.head, normed, a["logits"], few, do)
        do(rowwise.argmax_kernel(self.name), a["logits"], out=a["token"])
