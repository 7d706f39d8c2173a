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
    ("mask", "ptr", "const uint32_t*"), ("seed", "uint64"), ("position", "uint64"),
    ("top_p", "float64"), ("sum", "float64"),
    *((n, "float32") for n in ("largest", "scale", "repetition", "presence", "frequency")),
    *((n, "int32") for n in ("lightest", "top_k", "size", "edits", "top", "token")),
    ("likeliest", f"int32[{MAX_LOGPROBS}]"),
])  # fmt: skip


@functools.cache
def native() -> ctypes.CDLL:
    """The library of the sampler. Raises BuildError[B102]."""
    files = ((KERNELS / name).read_text(encoding="utf-8") for name in ("sample.h", "sample_cpu.h"))
    source = "\n".join(("#include <stdint.h>", EDIT.c_decl, ROW.c_decl, *files))
    return cxx.load_cpp(source, name="sampler", isa=compilers.resolve_isa().name)


def sample(requests: Sequence[Request], logits: Sequence[np.ndarray]) -> list[int]:
    """The next token of each request by its logits, float32 (vocab,); -1 where one of these is NaN,
    or the largest infinite. Raises BuildError[B102]."""
    count = len(requests)
    buffer = ctypes.create_string_buffer(ROW.size * count)
    arrays = [_pack(buffer, i, r, logits[i]) for i, r in enumerate(requests)]
    body, grain = pool.address_of(native().stage0), -(-count // pool.wanted_threads())
    pool.pool().prepare([(body, ctypes.addressof(buffer), count, grain, False)])()
    rows = np.frombuffer(memoryview(buffer), ROW.numpy)
    for request, row, (x, *_) in zip(requests, rows, arrays, strict=True):
        if row["token"] >= 0 and request.grammar is not None:
            request.grammar.consume_token(int(row["token"]))
        if row["token"] >= 0 and request.sampling.logprobs is not None:
            request.logprobs.append(_logprob(row, x))
    return rows["token"].tolist()


def _pack(buffer: Any, i: int, request: Request, logits: np.ndarray) -> tuple[np.ndarray, ...]:
    """Writes row i, of a request; the arrays that it points to."""
    s, edits, mask = request.sampling, _edits(request), np.zeros(-(-len(logits) // 32), np.uint32)
    logits = np.ascontiguousarray(logits, np.float32)
    if request.grammar is not None:
        allowed = np.frombuffer(request.grammar.compute_bitmask(), np.uint8)[: mask.nbytes]
        mask.view(np.uint8)[: len(allowed)] = allowed
    ROW.pack_into(
        buffer, i * ROW.size, logits=logits.ctypes.data, size=len(logits),
        edit=edits.ctypes.data, edits=len(edits),
        mask=0 if request.grammar is None else mask.ctypes.data,
        seed=request.seed % 2**64, position=request.answered,
        scale=math.log2(math.e) * 2**24 / max(s.temperature, COLDEST) if s.temperature else 0,
        top_k=min(s.top_k, len(logits)), top_p=s.top_p, lightest=round(s.min_p * ONE),
        repetition=s.repetition_penalty, presence=s.presence_penalty,
        frequency=s.frequency_penalty,
        top=-1 if s.logprobs is None else min(s.logprobs, len(logits)),
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
