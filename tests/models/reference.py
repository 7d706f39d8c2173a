"""A plain float32 Llama in NumPy: the oracle for tokens and logits. Every line is the mathematics.

    model = ReferenceLlama(open_model(path))
    logits = model.forward([1, 410, 469, 347])      # (4, vocab) float32; keys and values are kept
    ids = model.generate([1, 410, 469, 347], steps=60)

Sources: RMSNorm, Zhang and Sennrich 2019; rotary positions, Su et al. 2021; grouped queries,
Ainslie et al. 2023; SwiGLU, Shazeer 2020; their arrangement, Touvron et al. 2023.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tilewright.serve.gguf import dequantize
from tilewright.serve.models.config import ModelConfig
from tilewright.serve.weights import ModelFile


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x: (..., n)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rotate(x: np.ndarray, positions: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rotary positions. x: (tokens, heads, head_dim); angles in float64."""
    half = config.head_dim // 2
    frequencies = config.rope.base ** (-2.0 * np.arange(half) / config.head_dim)
    angles = positions[:, None, None] / config.rope.factor * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    out = np.empty_like(x)
    if config.rope_interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, half), slice(half, None)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Causal. q: (tokens, qo_heads, head_dim); k, v: (kv_len, kv_heads, head_dim)."""
    tokens, qo_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(tokens, kv_heads, qo_heads // kv_heads, head_dim)
    logits = np.einsum("thgd,shd->hgts", q, k, optimize=True) / np.float32(np.sqrt(head_dim))
    future = np.arange(len(k)) > positions[:, None]
    logits = np.where(future, np.float32(-np.inf), logits)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgts,shd->thgd", weights, v, optimize=True).reshape(
        tokens, qo_heads * head_dim
    )


class ReferenceLlama:
    """One sequence with its keys and values. All weights are dequantised once, to float32."""

    def __init__(self, file: ModelFile) -> None:
        self.config = file.config
        self.weights = {
            name: dequantize(w) for name, w in file.tensors.items() if name != "lm_head"
        }
        tied = file.config.tied_embedding
        self.weights["lm_head"] = (
            self.weights["embed"] if tied else dequantize(file.tensors["lm_head"])
        )
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0
        shape = (0, self.config.kv_heads, self.config.head_dim)
        self.keys = [np.empty(shape, np.float32) for _ in range(self.config.layers)]
        self.values = [np.empty(shape, np.float32) for _ in range(self.config.layers)]

    def forward(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens to the sequence; logits of each: (len(tokens), vocab) float32."""
        c, w = self.config, self.weights
        assert self.length + len(tokens) <= c.context, "the sequence is longer than the context"
        positions = np.arange(self.length, self.length + len(tokens))
        x = w["embed"][np.asarray(tokens)]
        for i in range(c.layers):
            p = f"layers.{i}."
            h = rms_norm(x, w[p + "attn_norm"], c.rms_eps)
            q = (h @ w[p + "attn.q"].T).reshape(len(tokens), c.qo_heads, c.head_dim)
            k = (h @ w[p + "attn.k"].T).reshape(len(tokens), c.kv_heads, c.head_dim)
            v = (h @ w[p + "attn.v"].T).reshape(len(tokens), c.kv_heads, c.head_dim)
            self.keys[i] = np.concatenate([self.keys[i], rotate(k, positions, c)])
            self.values[i] = np.concatenate([self.values[i], v])
            o = attention(rotate(q, positions, c), self.keys[i], self.values[i], positions)
            x = x + o @ w[p + "attn.o"].T
            h = rms_norm(x, w[p + "ffn_norm"], c.rms_eps)
            gate = h @ w[p + "ffn.gate"].T
            # exp of float32 overflows to inf below -88, where the quotient is rightly 0
            with np.errstate(over="ignore"):
                gate = gate / (1 + np.exp(-gate))
            x = x + (gate * (h @ w[p + "ffn.up"].T)) @ w[p + "ffn.down"].T
        self.length += len(tokens)
        return rms_norm(x, w["norm"], c.rms_eps) @ w["lm_head"].T

    def generate(self, prompt: Sequence[int], steps: int, stop: Collection[int] = ()) -> list[int]:
        """Greedy continuation of a new sequence: at most `steps` tokens, up to one of `stop`."""
        self.reset()
        logits = self.forward(prompt)
        out: list[int] = []
        while len(out) < steps:
            token = int(np.argmax(logits[-1]))
            if token in stop:
                break
            out.append(token)
            if len(out) < steps:
                logits = self.forward([token])
        return out
