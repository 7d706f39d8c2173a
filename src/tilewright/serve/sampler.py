"""The sampler: the next tokens of requests from their logits, in one native call.

A token depends on the logits, the request's seed and its position in the answer, not on the batch.
`kernels/sample.h` has the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime import pool
from tilewright.runtime.layout import Struct
from tilewright.serve.request import MAX_LOGPROBS, Request, TokenLogprob
from tilewright.toolchain import compilers, cxx

KERNELS = Path(__file__).parent / "kernels"
COLDEST = 1e-6  # a lower temperature samples as this one does, and overflows nothing
ONE = 1 << 30  # the weight of the likeliest token
EDIT = Struct("SampleEdit", [
    ("token", "int32"), ("count", "int32"), ("is_seen", "int32"), ("bias", "float32"),
])  # fmt: skip
ROW = Struct("SampleRow", [
    ("logits", "ptr", "const float*"), ("edit", "ptr", "const SampleEdit*"),
    ("mask", "ptr", "const uint32_t*"), ("keys", "ptr", "int32_t*"),
    ("weights", "ptr", "uint32_t*"), ("seed", "uint64"), ("position", "uint64"),
    ("top_p", "float64"), ("sum", "float64"), ("largest", "float32"), ("scale", "float32"),
    ("repetition", "float32"), ("presence", "float32"), ("frequency", "float32"),
    *((name, "int32") for name in ("lightest", "top_k", "size", "edits", "top", "token")),
    ("likeliest", f"int32[{MAX_LOGPROBS}]"),
])  # fmt: skip


@functools.cache
def native() -> tuple[int, Any]:
    """The address of the native sampler, and its library. Raises BuildError[B102]."""
    files = ((KERNELS / name).read_text(encoding="utf-8") for name in ("sample.h", "sample_cpu.h"))
    source = "\n".join(("#include <stdint.h>", EDIT.c_decl, ROW.c_decl, *files))
    library = cxx.load_cpp(source, name="sampler", isa=compilers.resolve_isa().name)
    return pool.address_of(library.stage0), library


class Sampler:
    """Draws tokens of a vocabulary; has the memory for that."""

    def __init__(self, vocab: int) -> None:
        self._vocab, self._scratch = vocab, np.empty((0, 2, vocab), np.int32)

    def __call__(self, requests: Sequence[Request], logits: Sequence[np.ndarray]) -> list[int]:
        """The next token of each request by its logits, float32 (vocab,); -1 where one of these is
        NaN, or the largest infinite. Raises BuildError[B102]."""
        count = len(requests)
        if len(self._scratch) < count:
            self._scratch = np.empty((count, 2, self._vocab), np.int32)
        buffer = ctypes.create_string_buffer(ROW.size * count)
        keep = [self._pack(buffer, i, r, logits[i]) for i, r in enumerate(requests)]
        at, grain = ctypes.addressof(buffer), -(-count // pool.wanted_threads())
        launch = pool.launch_array([(native()[0], at, count, grain, False)])
        pool.pool().run(ctypes.addressof(launch), 1)
        del keep
        rows = np.frombuffer(buffer, ROW.numpy)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for request, row, x in zip(requests, rows, logits, strict=True):
            if row["token"] >= 0 and request.grammar is not None:
                request.grammar.consume_token(int(row["token"]))
            if row["token"] >= 0 and request.sampling.logprobs is not None:
                request.logprobs.append(_logprob(row, x))
        return rows["token"].tolist()

    def _pack(self, buffer: Any, i: int, request: Request, logits: np.ndarray) -> tuple[Any, ...]:
        """Writes the row of a request; the arrays that it points to."""
        s, mask, edits = (
            request.sampling,
            np.zeros(-(-self._vocab // 32), np.uint32),
            _edits(request),
        )
        logits = np.ascontiguousarray(logits, np.float32)
        if request.grammar is not None:
            allowed = np.frombuffer(request.grammar.compute_bitmask(), np.uint8)[: mask.nbytes]
            mask.view(np.uint8)[: len(allowed)] = allowed
        keys, weights = self._scratch[i]
        ROW.pack_into(
            buffer, i * ROW.size, logits=logits.ctypes.data, size=self._vocab,
            edit=edits.ctypes.data, edits=len(edits),
            mask=0 if request.grammar is None else mask.ctypes.data,
            keys=keys.ctypes.data, weights=weights.ctypes.data,
            seed=request.seed % 2**64, position=request.answered,
            scale=math.log2(math.e) * 2**24 / max(s.temperature, COLDEST) if s.temperature else 0,
            top_k=min(s.top_k, self._vocab), top_p=s.top_p, lightest=round(s.min_p * ONE),
            repetition=s.repetition_penalty, presence=s.presence_penalty,
            frequency=s.frequency_penalty, top=-1 if s.logprobs is None else min(s.logprobs, self._vocab),
            token=0, sum=0, largest=0, likeliest=(0,) * MAX_LOGPROBS,
        )  # fmt: skip
        return logits, mask, edits


def _edits(request: Request) -> np.ndarray:
    """What is done to the logits of tokens: each token once."""
    s = request.sampling
    counts = request.counts if s.presence_penalty or s.frequency_penalty else {}
    seen = set(request.tokens) if s.repetition_penalty != 1 else set[int]()
    tokens = {*counts, *seen, *s.logit_bias}
    edits = [(t, counts.get(t, 0), t in seen, s.logit_bias.get(t, 0)) for t in tokens]
    return np.array(edits, EDIT.numpy)


def _logprob(row: Any, logits: np.ndarray) -> TokenLogprob:
    """The log-probabilities of the token of a row and of the likeliest, by the model's own logits;
    exact to 4e-5."""
    shift = float(row["largest"]) + math.log(row["sum"])
    tokens = (int(row["token"]), *row["likeliest"][: max(row["top"], 0)].tolist())
    token, *top = [(t, float(logits[t]) - shift) for t in tokens]
    return TokenLogprob(*token, tuple(sorted(top, key=lambda one: (-one[1], one[0]))))
