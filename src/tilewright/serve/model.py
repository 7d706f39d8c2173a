"""A Llama model on Tilewright's kernels: `prefill` reads a prompt, `decode` one token.

The operators are those of `ops` and `attention`; this file has their order and their buffers. A
decode step is recorded once and replayed as one native call.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from tilewright.attention.batch import Attention
from tilewright.errors import ModelError
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
from tilewright.runtime.launch import Step
from tilewright.serve.kv_pool import KVPool
from tilewright.serve.memory import Memory
from tilewright.serve.weights import ModelFile, Weight, dequantize
from tilewright.target import Target, target

PREFILL_CHUNK = 512  # tokens of a prompt that run together


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
        return out.reshape(len(out), -1, TOGETHER) if self.interleaved else out


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


@dataclass(slots=True)
class Buffers:
    """The activations of `tokens` tokens."""

    tokens: int
    ids: Any
    position: Any
    page: Any
    slot: Any
    x: list[Any]
    normed: Any
    q: Any
    k: Any
    v: Any
    rotated: Any
    attended: Any
    gate: Any
    up: Any
    mixed: Any
    logits: Any
    token: Any


def is_count(value: Any, least: int) -> bool:
    """Whether an argument is an integer of Python or NumPy, and at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


class Llama:
    """A model with its kernels for a target, and a KV cache for one sequence.

    `context`: tokens the cache holds (None: the model's, at most 2048). Raises ModelError,
    BuildError.
    """

    def __init__(
        self, file: ModelFile, where: Target | str = "cpp", context: int | None = None
    ) -> None:
        self.target = target(where)
        self.name = str(self.target)
        self.file, self.config = file, file.config
        self.memory = Memory(self.target)
        wanted = min(self.config.context, 2048) if context is None else context
        if not is_count(wanted, 1) or wanted > self.config.context:
            rule = f"context={wanted!r} is no integer from 1 to {self.config.context} (tokens)"
            hint = "the model allows no more"
            raise ModelError("M105", rule, where="context", hint=hint)
        self.cache = KVPool(self.config, int(wanted), self.memory)
        tied = self.config.tied_embedding
        self.head = self._linear("embed" if tied else "lm_head")
        self.table_kind = self.file.tensors["embed"].kind
        shares = tied and not self.head.interleaved
        self.table = self.head.arrays if shares else self._on_device("embed", weight_views)
        self.norm = self._vector("norm")
        self.layers = [self._layer(f"layers.{i}.") for i in range(self.config.layers)]
        c = self.config
        self.attention = Attention(qo_heads=c.qo_heads, kv_heads=c.kv_heads, head_dim=c.head_dim)
        tables = rope_tables(self.cache.capacity, c.head_dim, c.rope_base, c.rope_scale)
        self.cosines, self.sines = (self.memory.put(t) for t in tables)
        self._one = self._buffers(1)
        self._step: Step | None = None

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

    # -- buffers ---------------------------------------------------------------------------------

    def _buffers(self, t: int) -> Buffers:
        c, new = self.config, self.memory.empty
        q, kv = c.qo_heads * c.head_dim, c.kv_heads * c.head_dim
        return Buffers(
            tokens=t,
            ids=new(t, dtype="int32"),
            position=new(t, dtype="int32"),
            page=new(t, dtype="int32"),
            slot=new(t, dtype="int32"),
            x=[new(t, c.dim), new(t, c.dim)],
            normed=new(t, c.dim),
            q=new(t, q),
            k=new(t, kv),
            v=new(t, kv),
            rotated=new(t, q),
            attended=new(t, c.qo_heads, c.head_dim),
            gate=new(t, c.ffn_dim),
            up=new(t, c.ffn_dim),
            mixed=new(t, c.ffn_dim),
            logits=new(1, c.vocab),
            token=new(1, dtype="int32"),
        )

    def _pairs(self, array: Any, *outer: int) -> Any:
        """A projection, or pages of keys, as pairs that are rotated: (*outer, half, 2) or
        (*outer, 2, half)."""
        half = self.config.head_dim // 2
        return array.reshape(*outer, *((half, 2) if self.config.rope_interleaved else (2, half)))

    # -- the layers ------------------------------------------------------------------------------

    def _run(self, b: Buffers, attend: Any, do: Any) -> None:
        """All layers over the tokens of `b`, and the logits of the last one.

        `do(kernel, *args, out)` runs or binds one call; `attend(layer)` the attention of a
        layer."""
        c, name, t = self.config, self.name, b.tokens
        norm, silu = rmsnorm_kernel(name), silu_mul_kernel(name)
        rope, rope_append = (f(c.rope_interleaved, name) for f in (rope_kernel, rope_append_kernel))
        angles = self.cosines, self.sines, b.position
        append = append_kernel(name)

        def linear(w: Linear, x: Any, out: Any, residual: Any = None) -> None:
            added = () if residual is None else (w.as_written(residual),)
            kernel = w.kernel(t > 1, name, "residual" if added else "")
            do(kernel, x, *w.arrays, *added, out=w.as_written(out))

        def gated(gate: Linear, up: Linear, x: Any, out: Any) -> None:
            """SiLU(gate x) · (up x): one kernel where both weights are stored alike."""
            if gate.is_stored_like(up):
                kernel = gate.kernel(t > 1, name, "gate")
                do(kernel, x, *gate.arrays, *up.arrays, out=gate.as_written(out))
                return
            linear(gate, x, b.gate)
            linear(up, x, b.up)
            do(silu, b.gate, b.up, out=out)

        embedded = b.x[0].reshape(t, *self._embedded_shape())
        do(embedding_kernel(self.table_kind, name), b.ids, *self.table, out=embedded)
        for i, layer in enumerate(self.layers):
            do(norm, b.x[0], layer.attn_norm, c.rms_eps, out=b.normed)
            linear(layer.q, b.normed, b.q)
            linear(layer.k, b.normed, b.k)
            linear(layer.v, b.normed, b.v)
            rotated = self._pairs(b.rotated, t, c.qo_heads)
            do(rope, self._pairs(b.q, t, c.qo_heads), *angles, out=rotated)
            keys, pages = self._pairs(b.k, t, c.kv_heads), self.cache.keys[i]
            do(rope_append, self._pairs(pages, *pages.shape[:3]), keys, *angles, b.page, b.slot)
            do(append, self.cache.values[i], b.v.reshape(t, c.kv_heads, c.head_dim), b.page, b.slot)
            attend(i, b.rotated.reshape(t, c.qo_heads, c.head_dim), b.attended)
            attended = b.attended.reshape(t, c.qo_heads * c.head_dim)
            linear(layer.o, attended, b.x[1], residual=b.x[0])
            do(norm, b.x[1], layer.ffn_norm, c.rms_eps, out=b.normed)
            gated(layer.gate, layer.up, b.normed, b.mixed)
            linear(layer.down, b.mixed, b.x[0], residual=b.x[1])

    def _embedded_shape(self) -> tuple[int, ...]:
        blocks = self.config.dim // 32
        quantised = {"q8_0": (blocks, 32), "q4_0": (blocks, 2, 16), "q4_1": (blocks, 2, 16)}
        return quantised.get(self.table_kind, (self.config.dim,))

    def _finish(self, x: Any, b: Buffers, do: Any) -> None:
        """The logits of one row, and the token of the largest."""
        one = self._one
        do(rmsnorm_kernel(self.name), x, self.norm, self.config.rms_eps, out=one.normed)
        logits = self.head.as_written(b.logits)
        do(self.head.kernel(False, self.name), one.normed, *self.head.arrays, out=logits)
        do(argmax_kernel(self.name), b.logits, out=b.token)

    # -- prompts ---------------------------------------------------------------------------------

    def prefill(self, tokens: list[int] | np.ndarray) -> np.ndarray:
        """Reads the next tokens; returns the logits after the last one, float32 (vocab,).

        Raises ModelError: M105 when they do not fit, M106 for no tokens or one out of range."""
        ids = self._checked(tokens)
        if self.cache.length + len(ids) > self.cache.capacity:
            self.cache.grow(len(ids))  # raises the error
        for start in range(0, len(ids), PREFILL_CHUNK):
            self._chunk(ids[start : start + PREFILL_CHUNK].astype(np.int32))
        return self.logits()

    def _checked(self, tokens: Any) -> np.ndarray:
        """Tokens as an array of indices into the embedding, checked."""
        try:
            ids = np.asarray(tokens)
        except ValueError:
            ids = np.empty(0)
        if (
            ids.ndim != 1
            or not len(ids)
            or ids.dtype.kind not in "iu"
            or ids.min() < 0
            or ids.max() >= self.config.vocab
        ):
            rule = f"tokens must be 1 or more integers from 0 to {self.config.vocab - 1}"
            raise ModelError("M106", rule, where="tokens")
        return ids

    def _chunk(self, ids: np.ndarray) -> None:
        b = self._buffers(len(ids))
        position, page, slot = self.cache.grow(len(ids))
        for array, values in ((b.ids, ids), (b.position, position), (b.page, page), (b.slot, slot)):
            self.memory.write(array, values)
        plan = self.attention.plan(np.array([0, len(ids)], np.int32), self.cache.views[0])

        def attend(i: int, q: Any, out: Any) -> None:
            self.attention.run(q, self.cache.views[i], plan, out=out)

        def do(kernel: Any, *args: Any, out: Any = None) -> None:
            kernel(*args, out=out)

        self._run(b, attend, do)
        last = self.memory.row(b.x[0], len(ids) - 1)
        self._finish(last, self._one, do)

    # -- one token -------------------------------------------------------------------------------

    def decode(self, token: int) -> int:
        """Reads one token; returns the one with the largest logit. `logits()` has all of them.

        Raises ModelError: M105 when the context is full, M106 for a token out of range."""
        self._checked([token])
        position, page, slot = self.cache.grow(1)
        b = self._one
        written = (b.ids, token), (b.position, position), (b.page, page), (b.slot, slot)
        for array, value in written:
            self.memory.write(array, value)
        if self._step is None:
            self._step = self._record()
        self._step()
        return int(self.memory.read(b.token)[0])

    def logits(self) -> np.ndarray:
        """The logits after the last token: a new array, float32 (vocab,)."""
        return self.memory.read(self._one.logits)[0].copy()

    @property
    def logits_on_device(self) -> Any:
        """The logits after the last token, (1, vocab), in memory of the target."""
        return self._one.logits

    def greedy(self) -> int:
        """The token with the largest logit."""
        return int(self.memory.read(self._one.token)[0])

    def _record(self) -> Step:
        b, length = self._one, self.cache.length
        self.cache.truncate(self.cache.capacity)  # attention is cut for the longest sequence
        bounds: list[Any] = []

        def attend(i: int, q: Any, out: Any) -> None:
            bounds.append(self.attention.bind(q, self.cache.views[i], out))

        def do(kernel: Any, *args: Any, out: Any = None) -> None:
            bounds.append(kernel.bind(*args, out=out))

        self._run(b, attend, do)
        self._finish(b.x[0], b, do)
        self.cache.truncate(length)
        return Step(bounds)

    def reset(self, length: int = 0) -> None:
        """Forgets all but the first `length` tokens."""
        self.cache.truncate(min(length, self.cache.length))
