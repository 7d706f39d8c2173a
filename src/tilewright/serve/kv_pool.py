"""The KV cache of one sequence: a pair of page arrays for each layer, and one page table.

The arrays of the page table stay at their addresses and only their contents change, so that a
recorded step serves a longer sequence.
"""

from __future__ import annotations

import numpy as np

from tilewright.attention.kv import KV
from tilewright.attention.pool import Pool
from tilewright.attention.table import Table
from tilewright.errors import ModelError
from tilewright.serve.memory import Memory
from tilewright.serve.weights import LlamaConfig

PAGE_SIZE = 16


class KVPool:
    """A cache for `capacity` tokens of one sequence, float32; `length` of them are in use."""

    def __init__(self, config: LlamaConfig, tokens: int, memory: Memory) -> None:
        self.memory, self.capacity = memory, tokens
        self.pages = -(-tokens // PAGE_SIZE)
        self.length = 0
        shape = (self.pages, PAGE_SIZE, config.kv_heads, config.head_dim)
        self.keys = [memory.empty(*shape) for _ in range(config.layers)]
        self.values = [memory.empty(*shape) for _ in range(config.layers)]
        self.kv_len = memory.put(np.full(1, tokens, np.int32))
        pages = memory.put(np.arange(self.pages, dtype=np.int32).reshape(1, -1))
        self.table = Table(self.kv_len, pages)
        self.views = [
            KV(self.table, Pool(k, v)) for k, v in zip(self.keys, self.values, strict=True)
        ]

    def grow(self, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Adds tokens to the sequence; returns their positions, pages and slots, int32 (tokens,).

        Raises ModelError[M105] when they do not fit."""
        if self.length + tokens > self.capacity:
            rule = f"{self.length + tokens} tokens do not fit into a context of {self.capacity}"
            hint = "shorten the prompt, or ask for fewer tokens"
            raise ModelError("M105", rule, where="prompt", hint=hint)
        positions = np.arange(self.length, self.length + tokens, dtype=np.int32)
        self.truncate(self.length + tokens)
        return positions, positions // PAGE_SIZE, positions % PAGE_SIZE

    def truncate(self, length: int) -> None:
        """Sets the length of the sequence."""
        self.length = length
        self.memory.write(self.kv_len, length)
