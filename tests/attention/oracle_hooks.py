"""Hooks of variants written twice, as hooks and as NumPy functions, for oracle.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import tilewright as tw

HOSTILE = (0, 1, -1, 3, -7, 64, 100, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class Score:
    """Where scores of one head are: positions (qo_len, 1) and (1, kv_len), numbers, values; `token`
    (qo_len, 1) and `key` (1, kv_len): rows of q, numbers of keys; `old`: keys before the
    queries."""

    qo: np.ndarray
    kv: np.ndarray
    head: int
    kv_head: int
    request: int
    values: dict[str, Any]
    token: np.ndarray
    key: np.ndarray
    old: int


def divided(a: np.ndarray, b: int) -> np.ndarray:
    """Floor division of integers, 0 for a divisor of 0."""
    return a // b if b else np.zeros_like(a)


def remainder(a: np.ndarray, b: int) -> np.ndarray:
    """The remainder of floor division, 0 for a divisor of 0."""
    return a - divided(a, b) * b if b else np.zeros_like(a)


def element(row: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Elements of a vector, 0 outside it."""
    padded = np.append(row, row.dtype.type(0))
    return padded[np.where((at >= 0) & (at < len(row)), at, len(row))]


def bits(words: np.ndarray, token: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Bits (qo_len, kv_len) of the rows `token` of a packed mask, false outside it."""
    rows = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
    return np.array([element(rows[n], at[0]) for n in token[:, 0]], bool).reshape(
        len(token), at.shape[1]
    )


# name: (hook of the variant, the same in NumPy, values by name)
MASKS: dict[str, tuple[Any, Callable[[Score], Any], dict[str, Any]]] = {
    "full": (None, lambda t: np.True_, {}),
    "causal": (lambda self, at: at.kv <= at.qo, lambda t: t.kv <= t.qo, {}),
    "window": (
        lambda self, at: (at.kv <= at.qo) & (at.qo - at.kv < self.window),
        lambda t: (t.kv <= t.qo) & (t.qo - t.kv < t.values["window"]),
        {"window": tw.scalar("int32")},
    ),
    "first and last": (
        lambda self, at: (at.kv < self.first) | (at.qo - at.kv < self.window) & (at.kv <= at.qo),
        lambda t: (
            (t.kv < t.values["first"]) | ((t.qo - t.kv < t.values["window"]) & (t.kv <= t.qo))
        ),
        {"window": tw.scalar("int32"), "first": tw.scalar("int32")},
    ),
    "before and after": (
        lambda self, at: ~((at.kv > at.qo + 3) | (at.kv + self.window < at.qo)),
        lambda t: (t.kv <= t.qo + 3) & (t.kv + t.values["window"] >= t.qo),
        {"window": tw.scalar("int32")},
    ),
    "chunks": (
        lambda self, at: tw.equal(at.kv // self.chunk, at.qo // self.chunk),
        lambda t: divided(t.kv, t.values["chunk"]) == divided(t.qo, t.values["chunk"]),
        {"chunk": tw.scalar("int32")},
    ),
    "dilated": (
        lambda self, at: (at.kv <= at.qo) & tw.equal((at.qo - at.kv) % self.chunk, 0),
        lambda t: (t.kv <= t.qo) & (remainder(t.qo - t.kv, t.values["chunk"]) == 0),
        {"chunk": tw.scalar("int32")},
    ),
    "per head": (
        lambda self, at: (at.kv % (self.strides[at.kv_head] - 1) < 2) | (at.qo_head % 3 < 1),
        lambda t: (
            (remainder(t.kv, t.values["strides"][t.kv_head] - 1) < 2) | np.bool_(t.head % 3 < 1)
        ),
        {"strides": tw.per_head("int32")},
    ),
    "request": (
        lambda self, at: (at.kv < at.qo) ^ tw.equal(at.request % 2, 0),
        lambda t: (t.kv < t.qo) ^ np.bool_(t.request % 2 == 0),
        {},
    ),
    "documents": (
        lambda self, at: tw.equal(self.query_document[at.q_token], self.document[at.key]),
        lambda t: (
            t.values["query_document"][t.token] == element(t.values["document"][t.request], t.key)
        ),
        {"query_document": tw.per_token(), "document": tw.per_key("int32")},
    ),
    "prefix": (
        lambda self, at: (at.kv <= at.qo) | (at.kv < self.prefix[at.request]),
        lambda t: (t.kv <= t.qo) | (t.kv < t.values["prefix"][t.request]),
        {"prefix": tw.per_request()},
    ),
    "images": (
        lambda self, at: (
            (at.kv <= at.qo)
            | tw.equal(self.document[at.key], self.document[at.qo]) & (self.document[at.key] > 0)
        ),
        lambda t: (
            (t.kv <= t.qo)
            | (element(t.values["document"][t.request], t.key) > 0)
            & (
                element(t.values["document"][t.request], t.key)
                == element(t.values["document"][t.request], t.qo)
            )
        ),
        {"document": tw.per_key("int32")},
    ),
    "tree": (
        lambda self, at: (
            (at.key < at.kv_len - at.qo_len) | self.tree[at.key - (at.kv_len - at.qo_len)]
        ),
        lambda t: (t.key < t.old) | bits(t.values["tree"], t.token, t.key - t.old),
        {"tree": tw.bit_mask()},
    ),
    "nothing": (lambda self, at: at.kv < np.int64(0), lambda t: t.kv < 0, {}),
}
LOGITS: dict[str, tuple[Any, Callable[[np.ndarray, Score], Any], dict[str, Any]]] = {
    "scores": (None, lambda s, t: s, {}),
    "softcap": (
        lambda self, s, at: self.cap * tw.tanh(s / self.cap),
        lambda s, t: t.values["cap"] * np.tanh(s / t.values["cap"]),
        {"cap": tw.scalar("float32")},
    ),
    "alibi": (
        lambda self, s, at: s + self.slopes[at.qo_head] * (at.kv - at.qo),
        lambda s, t: s + float(t.values["slopes"][t.head]) * (t.kv - t.qo),
        {"slopes": tw.per_head("float32")},
    ),
    "near": (
        lambda self, s, at: tw.where(at.qo - at.kv < np.int32(8), s * np.float32(1.5), s - 0.25),
        lambda s, t: np.where(t.qo - t.kv < 8, s * 1.5, s - 0.25),
        {},
    ),
    "biases": (
        lambda self, s, at: s + self.bias[at.q_token] + self.key_bias[at.key],
        lambda s, t: (
            s + t.values["bias"][t.token] + element(t.values["key_bias"][t.request], t.key)
        ),
        {"bias": tw.per_token("float32"), "key_bias": tw.per_key("float32")},
    ),
}


SINKS: dict[str, tuple[Any, Callable[[Score], Any], dict[str, Any]]] = {
    "": (None, lambda t: -np.inf, {}),
    "per head": (
        lambda self, at: self.sinks[at.qo_head],
        lambda t: t.values["sinks"][t.head].astype(np.float64),
        {"sinks": tw.per_head("float32")},
    ),
    "by position": (
        lambda self, at: tw.where(at.qo < 40, 1.5, np.float32(0.125) * (at.qo_head + at.request)),
        lambda t: np.where(t.qo < 40, 1.5, 0.125 * (t.head + t.request)),
        {},
    ),
}


SIGMOID: dict[str, tuple[Any, Callable[[np.ndarray, Score], Any], dict[str, Any]]] = {
    "sigmoid": (  # for variants without a softmax
        lambda self, s, at: tw.sigmoid(s + self.shift),
        lambda s, t: 1 / (1 + np.exp(-s - t.values["shift"])),
        {"shift": tw.scalar("float32")},
    )
}


def turned(self: Any, row: Any, at: Any, position: Any) -> Any:
    """A row whose neighbouring elements are turned by an angle that float32 holds exactly."""
    angle = (position & 63) * self.freqs[at.dim >> 1]
    other = row[at.dim ^ 1]
    return row[at.dim] * tw.cos(angle) + tw.where(at.dim & 1 < 1, -other, other) * tw.sin(angle)


def turned_rows(rows: np.ndarray, position: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """The same of rows (n, elements) at positions (n, 1), pair by pair as complex numbers."""
    n, width = rows.shape
    padded = np.zeros((n, width + width % 2))
    padded[:, :width] = rows
    angle = (position % 64) * element(freqs.astype(np.float64), np.arange((width + 1) // 2))
    pairs = (padded[:, ::2] + 1j * padded[:, 1::2]) * np.exp(1j * angle)
    padded[:, ::2], padded[:, 1::2] = pairs.real, pairs.imag
    return padded[:, :width]


def by_channel(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return element(values, np.arange(rows.shape[1])).astype(np.float64)


# name: (hooks of rows, the same in NumPy over rows (n, elements), values by name)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Callable], dict[str, Any]]] = {
    "": ({}, {}, {}),
    "turned": (
        {
            "query": lambda self, q, at: turned(self, q, at, at.qo),
            "key": lambda self, k, at: turned(self, k, at, at.kv),
        },
        {
            "query": lambda x, t: turned_rows(x, t.qo, t.values["freqs"]),
            "key": lambda x, t: turned_rows(x, t.kv.T, t.values["freqs"]),
        },
        {"freqs": tw.per_channel()},
    ),
    "scaled": (
        {
            "query": lambda self, q, at: q[at.dim] * (self.size[at.q_token] * self.weight[at.dim]),
            "key": lambda self, k, at: k[at.dim] * self.key_size[at.key],
        },
        {
            "query": lambda x, t: (
                x * t.values["size"][t.token] * by_channel(t.values["weight"], x)
            ),
            "key": lambda x, t: x * element(t.values["key_size"][t.request], t.key.T),
        },
        {"size": tw.per_token("float32"), "weight": tw.per_channel(),
         "key_size": tw.per_key("float32")},
    ),
    "mixed": (
        {
            "query": lambda self, q, at: q[5 - at.dim] + 0.5 * q[at.dim],
            "key": lambda self, k, at: (
                tw.where(at.kv % 3 < 1, k[at.dim], 0.5) * self.key_gate[at.kv_head]
            ),
            "output": lambda self, o, at: tw.maximum(o[at.dim], o[at.dim + 1]) * 0.5,
        },
        {
            "query": lambda x, t: np.array([element(row, 5 - np.arange(len(row))) for row in x])
            .reshape(x.shape) + 0.5 * x,
            "key": lambda x, t: (
                np.where(t.kv.T % 3 < 1, x, 0.5) * float(t.values["key_gate"][t.kv_head])
            ),
            "output": lambda x, t: np.maximum(x, np.pad(x[:, 1:], ((0, 0), (0, 1)))) * 0.5,
        },
        {"key_gate": tw.per_head("float32")},
    ),
    "ends": (
        {
            "query": lambda self, q, at: turned(self, q, at, at.qo),
            "output": lambda self, o, at: o[at.dim] * self.weight[at.dim] - o[at.dim + 3],
        },
        {
            "query": lambda x, t: turned_rows(x, t.qo, t.values["freqs"]),
            "output": lambda x, t: (
                x * by_channel(t.values["weight"], x) - np.pad(x, ((0, 0), (0, 3)))[:, 3:]
            ),
        },
        {"freqs": tw.per_channel(), "weight": tw.per_channel()},
    ),
    "gated": (
        {
            "output": lambda self, o, at: (
                o[at.dim] * self.gate[at.qo_head] + self.rest[at.q_token] * o[at.dim ^ 1]
            ),
        },
        {
            "output": lambda x, t: x * float(t.values["gate"][t.head])
            + t.values["rest"][t.token]
            * np.array([element(row, np.arange(len(row)) ^ 1) for row in x]).reshape(x.shape),
        },
        {"gate": tw.per_head("float32"), "rest": tw.per_token("float32")},
    ),
}  # fmt: skip


def draw_row_values(
    rng: np.random.Generator, names: dict[str, Any], heads: tuple[int, int], sizes: tuple[int, ...]
) -> dict:
    """Values of SIGMOID and ROWS, as `draw_values`; vectors by channel of any length."""
    requests, tokens, columns = sizes
    drawn = {
        "shift": float(rng.choice([-3.0, 0.0, 0.5])),
        "freqs": (2.0 ** -rng.integers(0, 8, rng.integers(0, 70))).astype(np.float32),
        "weight": rng.choice([0.5, 1.0, -2.0], rng.integers(1, 260)).astype(np.float32),
        "size": rng.choice([0.25, 1.0, 2.0], tokens).astype(np.float32),
        "key_size": rng.choice([0.25, 1.0, -1.0], (requests, columns)).astype(np.float32),
        "key_gate": rng.choice([0.5, 1.0, -1.0], heads[1]).astype(np.float32),
        "gate": rng.choice([0.5, 2.0, -1.0], heads[0]).astype(np.float32),
        "rest": rng.choice([0.0, 0.5, -1.0], tokens).astype(np.float32),
    }
    return {name: drawn[name] for name in names}


def draw_values(
    rng: np.random.Generator, names: dict[str, Any], heads: tuple[int, int], sizes: tuple[int, ...]
) -> dict:
    """Values of a variant, numbers that float32 and int32 hold exactly; `sizes`: requests, rows of
    q, columns."""
    requests, tokens, columns = sizes
    drawn = {
        "window": int(rng.choice([0, 1, 5, 64, 300, 2000])),
        "first": int(rng.choice([0, 1, 4, 70])),
        "chunk": int(rng.choice(HOSTILE)),
        "cap": float(rng.choice([0.5, 5.0, 30.0])),
        "slopes": rng.choice([0.0, 0.125, 0.25, 1.0], heads[0]).astype(np.float32),
        "sinks": rng.choice([-np.inf, -8.0, 0.5, 3.0, 90.0], heads[0]).astype(np.float32),
        "strides": rng.choice([0, 1, 2, 5, -3], heads[1]).astype(np.int32),
        "query_document": rng.integers(0, 4, tokens).astype(np.int32),
        "document": (np.arange(requests * columns).reshape(requests, columns) // 50 % 4).astype(
            np.int32
        ),
        "prefix": rng.choice([-5, 0, 1, 70, 2000], requests).astype(np.int32),
        "tree": rng.integers(0, 2**32, (tokens, columns // 32), np.uint32),
        "bias": rng.choice([0.0, 0.5, -2.0], tokens).astype(np.float32),
        "key_bias": rng.choice([0.0, 0.5, -2.0], (requests, columns)).astype(np.float32),
    }
    return {name: drawn[name] for name in names}
