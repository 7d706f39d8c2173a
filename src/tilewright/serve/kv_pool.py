"""The pages of a KV cache for one sequence: one pair of page arrays for each layer, one page table.

The arrays that kernels read (`kv_len`, and a token's `page` and `slot`) stay at their addresses; a
recorded step sees a longer sequence because their contents change.
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
    """Room for `tokens` tokens (`capacity`) of one sequence, float32; `length` of them are in
    use."""

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
        """Makes room for the next tokens: their positions, pages and slots, int32 (tokens,).

        Raises ModelError[M105] when they do not fit."""
        if self.length + tokens > self.capacity:
            raise ModelError(
                "M105",
                f"{self.length + tokens} tokens do not fit into a context of {self.capacity}",
                where="prompt",
                hint="shorten the prompt, or ask for fewer tokens",
            )
        positions = np.arange(self.length, self.length + tokens, dtype=np.int32)
        self.truncate(self.length + tokens)
        return positions, positions // PAGE_SIZE, positions % PAGE_SIZE

    def truncate(self, length: int) -> None:
        """Sets the length of the sequence; what lies beyond it is forgotten."""
        self.length = length
        self.memory.write(self.kv_len, length)
