"""llama.cpp as a peer of `bench serve`: each seat is a sequence of one cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.serve_loop import Row


@llama_cpp.llama_log_callback
def _quietly(level: int, text: bytes, data: Any) -> None:
    """Takes what llama.cpp logs."""


class LlamaCpp:
    """A model file over `seats` requests of at most `context` tokens, `chunk` tokens a step."""

    def __init__(self, path: Path, seats: int, context: int, chunk: int, threads: int) -> None:
        llama_cpp.llama_log_set(_quietly, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = seats * context, seats, True
        params.n_batch = params.n_ubatch = most = max(chunk, seats)
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(most, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def step(self, rows: Sequence[Row]) -> list[int]:
        """The token after the last of each row."""
        ends, n, batch = [], 0, self.batch
        for row in rows:
            if row.start == 0:  # the seat's request before this one
                memory = llama_cpp.llama_get_memory(self.context)
                llama_cpp.llama_memory_seq_rm(memory, row.seat, -1, -1)
            for i, token in enumerate(row.tokens):
                batch.token[n], batch.pos[n] = token, row.start + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row.seat
                batch.logits[n] = i == len(row.tokens) - 1
                n += 1
            ends.append(n - 1)
        batch.n_tokens = n
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}")
        return [int(self._logits(n).argmax()) for n in ends]

    def _logits(self, n: int) -> Any:
        pointer = llama_cpp.llama_get_logits_ith(self.context, n)
        return np.ctypeslib.as_array(pointer, (self.vocab,))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
