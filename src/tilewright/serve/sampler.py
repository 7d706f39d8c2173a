"""The sampler: the next tokens of requests from their logits, in one native call.

A token depends on the logits, the request's seed and its position in the answer, not on the batch.
`kernels/sample.h` has the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime import pool
from tilewright.runtime.layout import Struct
from tilewright.serve.request import MAX_LOGPROBS, Request, TokenLogprob
from tilewright.toolchain import compilers, cxx

PENALTIES = "presence_penalty", "frequency_penalty", "repetition_penalty"
NUMBERS = "temperature", "top_p", "min_p", *PENALTIES
EDIT = Struct("SampleEdit", [
    ("token", "int32"), ("count", "int32"), ("is_seen", "int32"), ("bias", "float32"),
])  # fmt: skip
ROW = Struct("SampleRow", [
    ("logits", "ptr", "const float*"), ("edit", "ptr", "const SampleEdit*"),
    ("mask", "ptr", "const uint8_t*"), ("seed", "uint64"), ("position", "uint64"),
    *((name, "float64") for name in (*NUMBERS, "logprob")),
    ("logprobs", f"float64[{MAX_LOGPROBS}]"), ("likeliest", f"int32[{MAX_LOGPROBS}]"),
    *((name, "int32") for name in ("top_k", "size", "edits", "top", "token")),
])  # fmt: skip
"""A row of logits, how it is sampled, and what comes of it: `sample` of kernels/sample.h."""


Sampled = tuple[int, TokenLogprob | None]
"""A token, and its log-probability where the request asks for it."""


@functools.cache
def native() -> ctypes.CDLL:
    """The library of the sampler. Raises BuildError[B102]."""
    kernels = Path(__file__).with_name("kernels")
    files = [(kernels / n).read_text(encoding="utf-8") for n in ("sample.h", "sample_cpu.h")]
    source = "\n".join(("#include <stdint.h>", EDIT.c_decl, ROW.c_decl, *files))
    return cxx.load_cpp(source, name="sampler", isa=compilers.resolve_isa().name)


def sample(requests: Sequence[Request], logits: Sequence[np.ndarray]) -> list[Sampled]:
    """The next token of each request by its logits, float32 (vocab,); -1 where one of these is NaN,
    or the largest infinite. The requests do not change. Raises BuildError[B102]."""
    count = len(requests)
    buffer = ctypes.create_string_buffer(ROW.size * count)
    keep = [_pack(buffer, i, r, logits[i]) for i, r in enumerate(requests)]
    body, grain = pool.address_of(native().stage0), -(-count // pool.wanted_threads())
    pool.pool().prepare([(body, ctypes.addressof(buffer), count, grain, False)])()
    rows = np.frombuffer(memoryview(buffer), ROW.numpy)
    out: list[Sampled] = []
    for request, row, _ in zip(requests, rows, keep, strict=True):
        token, logprob = int(row["token"]), None
        if token >= 0 and request.sampling.logprobs is not None:
            likeliest, logprobs = (row[n][: row["top"]].tolist() for n in ("likeliest", "logprobs"))
            top = tuple(zip(likeliest, logprobs, strict=True))
            logprob = TokenLogprob(token, float(row["logprob"]), top)
        out.append((token, logprob))
    return out


def _pack(buffer: Any, i: int, request: Request, logits: np.ndarray) -> tuple[np.ndarray, ...]:
    """Writes row i, of a request; the arrays that it points to."""
    s, mask = request.sampling, b""
    counts = request.counts if s.presence_penalty or s.frequency_penalty else {}
    seen = set(request.tokens) if s.repetition_penalty != 1 else set[int]()
    tokens = {*counts, *seen, *s.logit_bias}
    edits = [(t, counts.get(t, 0), t in seen, s.logit_bias.get(t, 0)) for t in tokens]
    edits = np.array(edits, EDIT.numpy)
    logits = np.ascontiguousarray(logits, np.float32)
    if request.grammar is not None:
        mask = request.grammar.compute_bitmask().ljust(len(logits) // 8 + 4, b"\0")
    allowed = np.frombuffer(mask, np.uint8)
    ROW.pack_into(
        buffer, i * ROW.size, logits=logits.ctypes.data, size=len(logits),
        edit=edits.ctypes.data, edits=len(edits),
        mask=allowed.ctypes.data if mask else 0,
        seed=request.seed % 2**64, position=request.answered, top_k=min(s.top_k, len(logits)),
        top=-1 if s.logprobs is None else min(s.logprobs, len(logits)),
        token=-1, logprob=0, logprobs=(0,) * MAX_LOGPROBS, likeliest=(0,) * MAX_LOGPROBS,
        **{name: getattr(s, name) for name in NUMBERS},
    )  # fmt: skip
    return logits, allowed, edits
