"""A model in float64 by NumPy, one sequence at once: the oracle of logits, and what rounding to
bfloat16 leaves of them. Shares no code with the engine but the readers of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.serve.gguf import dequantize
from tilewright.serve.weights import ModelFile

Note = Callable[[str, np.ndarray], None]


class Rounding:
    """A draw of what a GPU rounds to bfloat16: half a unit in the last place at most, at random,
    since which way a value is rounded depends on the order of sums. Of all rows queries, keys,
    values and weights of attention are rounded; of `wide` ones, bool (rows,), whose products a
    library computes, also the matrices and all that products read and write."""

    def __init__(self, seed: int, wide: np.ndarray) -> None:
        self.rng, self.wide = np.random.default_rng(seed), wide

    def __call__(self, x: np.ndarray, only_wide: bool = False) -> np.ndarray:
        _, exponent = np.frexp(x)  # |x| < 2^exponent, and a significand has 8 bits
        moved = x + np.ldexp(self.rng.uniform(-0.5, 0.5, x.shape), exponent - 8)
        moved = np.where(nearest(x) == x, x, moved)
        return np.where(self.wide[:, None], moved, x) if only_wide else moved


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each."""
    _, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(x, 8 - exponent)), exponent - 8)


def logits_of(
    file: ModelFile, tokens: list[int], rounding: Rounding | None = None, note: Note | None = None
) -> np.ndarray:
    """The logits behind each token, float64 (tokens, vocab). `note` gets what each part of each
    layer computes."""
    c, t, note = file.config, len(tokens), note or (lambda name, x: None)
    heads, kv_heads, d = c.qo_heads, c.kv_heads, c.head_dim
    w = {n: dequantize(x).astype(np.float64) for n, x in file.tensors.items()}
    ends = np.arange(t)
    cosines, sines = (x[:t, None].astype(np.float64) for x in c.rope.tables(t, d))

    def every(x: Any) -> Any:
        return x if rounding is None else rounding(x)

    def wide(x: Any) -> Any:
        return x if rounding is None else rounding(x, only_wide=True)

    def times(x: Any, name: str) -> Any:
        """A linear layer, before its result is rounded."""
        y, bias = x @ w[name].T, w.get(f"{name}.bias", 0.0)
        if rounding is not None:
            y = np.where(rounding.wide[:, None], x @ nearest(w[name]).T, y)
        return y + bias

    def rms(x: Any, name: str) -> Any:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_eps)
        return x / scale * (w[name] + c.norm_offset)

    def rotated(x: Any) -> Any:
        a, b = (x[..., ::2], x[..., 1::2]) if c.rope_interleaved else np.split(x, 2, -1)
        pair = a * cosines - b * sines, a * sines + b * cosines
        joined = np.stack(pair, -1) if c.rope_interleaved else np.concatenate(pair, -1)
        return joined.reshape(x.shape)

    def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
        sees = ends[:, None] >= ends
        if c.windowed and c.windowed[layer]:
            sees &= ends[:, None] - ends < c.window
        out = np.empty(q.shape)
        for h in range(heads):
            of = h // (heads // kv_heads)
            s = q[:, h] @ k[:, of].T * (c.sm_scale or d**-0.5)
            s = c.score_cap * np.tanh(s / c.score_cap) if c.score_cap else s
            p = np.exp(s - np.where(sees, s, -np.inf).max(1, keepdims=True)) * sees
            out[:, h] = every(p) @ v[:, of] / p.sum(1, keepdims=True)
        return out.reshape(t, -1)

    def added(layer: str, part: str, x: Any, y: Any) -> Any:
        if c.post_norms:
            return x + rms(y, f"{layer}{part}_post_norm")
        return x + wide(y)

    x = w["embed"][tokens] * (c.dim**0.5 if c.scaled_embedding else 1.0)
    for i in range(c.layers):
        of = f"layers.{i}."
        normed = wide(rms(x, f"{of}attn_norm"))
        q, k, v = (wide(times(normed, f"{of}attn.{n}")) for n in "qkv")
        q, k, v = (a.reshape(t, -1, d) for a in (q, k, v))
        for name, a in (("q", q), ("k", k), ("v", v)):
            note(f"{i} {name}", a)
        if c.qk_norm:
            q, k = (_rows(wide, rms(a, f"{of}attn.{n}_norm")) for a, n in ((q, "q"), (k, "k")))
            note(f"{i} q of a norm", q)
            note(f"{i} k of a norm", k)
        q, k = every(rotated(q)), every(rotated(k))
        if rounding is not None:  # those of wide rows are rounded by their product
            v = np.where(rounding.wide[:, None, None], v, every(v))
        note(f"{i} q rotated", q)
        attended = wide(attention(i, q, k, v))
        note(f"{i} attention", attended)
        x = added(of, "attn", x, times(attended, f"{of}attn.o"))
        note(f"{i} x behind attention", x)
        normed = wide(rms(x, f"{of}ffn_norm"))
        gate, up = (wide(times(normed, f"{of}ffn.{n}")) for n in ("gate", "up"))
        bent = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        acted = 0.5 * gate * (1 + np.tanh(bent)) if c.gelu else gate / (1 + np.exp(-gate))
        mixed = wide(acted * up)
        note(f"{i} gate times up", mixed)
        x = added(of, "ffn", x, times(mixed, f"{of}ffn.down"))
        note(f"{i} x", x)
    return times(wide(rms(x, "norm")), "embed" if c.tied_embedding else "lm_head")


def _rows(wide: Any, x: Any) -> Any:
    return wide(x.reshape(len(x), -1)).reshape(x.shape)
