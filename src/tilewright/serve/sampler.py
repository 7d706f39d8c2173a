"""The sampler: the next tokens of requests by their logits, seeds and positions in the answer, not
by the batch; in one native call, or on a GPU in a recorded step (`kernels/sample.h`)."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.attention.spec import loaded
from tilewright.runtime import pool
from tilewright.runtime.layout import Struct
from tilewright.runtime.view import view
from tilewright.serve.memory import Memory
from tilewright.serve.request import MAX_LOGPROBS, Request, TokenLogprob
from tilewright.toolchain import compilers, cxx

PENALTIES = "presence_penalty", "frequency_penalty", "repetition_penalty"
NUMBERS = "temperature", "top_p", "min_p", *PENALTIES
EDIT = Struct("SampleEdit", [
    ("token", "int32"), ("count", "int32"), ("is_seen", "int32"), ("bias", "float32"),
])  # fmt: skip
ROW = Struct("SampleRow", [
    ("logits", "ptr", "const float*"), ("edit", "ptr", "SampleEdit*"),
    ("mask", "ptr", "const uint8_t*"), ("seed", "uint64"), ("position", "uint64"),
    *((name, "float64") for name in (*NUMBERS, "logprob")),
    ("logprobs", f"float64[{MAX_LOGPROBS}]"), ("likeliest", f"int32[{MAX_LOGPROBS}]"),
    *((name, "int32") for name in ("top_k", "size", "edits", "top", "token", "logit_bytes")),
])  # fmt: skip
"""A row of logits, how it is sampled, and what comes of it: `sample` of kernels/sample.h."""
PARAMS = Struct("SampleParams", [
    ("rows", "ptr", "SampleRow*"),
    *((name, "ptr", "int32_t*") for name in ("scores", "tokens", "drawn")),
])  # fmt: skip
THREADS = 1024  # of a CTA, which samples a row
NO_MEMORY = -2  # in place of a token
TOP = '#if __CUDACC__\n#include "gpu.cuh"\n#include "async.cuh"\n#else\n#include <stdint.h>\n#endif'

Sampled = tuple[int, TokenLogprob | None]
"""A token, and its log-probability where the request asks for it."""


@functools.cache
def native() -> ctypes.CDLL:
    """The library of the sampler. Raises BuildError[B102]."""
    return cxx.load_cpp(source("sample_cpu.h"), name="sampler", isa=compilers.resolve_isa().name)


def source(name: str) -> str:
    """The C++ or CUDA C++ of a file of `kernels/`."""
    kernels = Path(__file__).with_name("kernels")
    numbers = f"constexpr int NO_MEMORY = {NO_MEMORY}, THREADS = {THREADS};"
    files = [(kernels / n).read_text(encoding="utf-8") for n in ("sample.h", name)]
    structs = (struct.c_decl for struct in (EDIT, ROW, PARAMS))
    return "\n".join((TOP, *structs, f"namespace sample {{ {numbers} }}", *files))


def sample(requests: Sequence[Request], logits: Sequence[np.ndarray]) -> list[Sampled]:
    """The next token of each request by its logits, float32 (vocab,); -1 where one of these is NaN,
    or the largest infinite, NO_MEMORY where no memory is left. The requests do not change. Raises
    BuildError[B102]."""
    count, keep = len(requests), []
    rows = np.zeros(count, ROW.numpy)
    for i, request in enumerate(requests):
        x, edits, mask = np.ascontiguousarray(logits[i], np.float32), _edits(request), b""
        if request.grammar is not None:
            mask = request.grammar.compute_bitmask().ljust(len(x) // 8 + 4, b"\0")
        allowed = np.frombuffer(mask, np.uint8)
        keep.append((x, edits, allowed))
        pointers = edits.ctypes.data, allowed.ctypes.data if mask else 0
        _pack(rows[i : i + 1], request, x, len(edits), *pointers)
    body, grain = pool.address_of(native().stage0), -(-count // pool.wanted_threads())
    pool.pool().prepare([(body, rows.ctypes.data, count, grain, False)])()
    out: list[Sampled] = []
    for request, row in zip(requests, rows, strict=True):
        token, logprob = int(row["token"]), None
        if token >= 0 and request.sampling.logprobs is not None:
            likeliest, logprobs = (row[n][: row["top"]].tolist() for n in ("likeliest", "logprobs"))
            top = tuple(zip(likeliest, logprobs, strict=True))
            logprob = TokenLogprob(token, float(row["logprob"]), top)
        out.append((token, logprob))
    return out


class Seats:
    """The rows of recorded steps that a GPU samples: their parameters, and keys and weights of all
    tokens, in its memory. The host writes them where requests change, the step advances them.

    `logits`: float32 or bfloat16 (rows, vocab). `tokens`: int32 (2, rows), those that the next step
    reads, and those that are drawn, -1 where a logit is NaN or the largest infinite."""

    def __init__(self, memory: Memory, logits: Any, tokens: Any) -> None:
        self._memory, self._logits, self._tokens = memory, logits, tokens
        count = logits.shape[0]
        self._rows = memory.put(np.zeros((count, ROW.size), np.uint8))
        self._scores: Any = None  # until a step samples
        if memory.on_cuda:  # compiled here, not while answers wait
            text, gpu = source("sample_gpu.cuh"), self._rows.device.ordinal
            self._kernel = loaded(text, gpu, "sample_rows", "sampler")
        self._edits: list[Any] = [None] * count
        self._held: list[Any] = [None] * count  # request and position of each row there, or None

    def take(self, chunks: Sequence[Any]) -> set[Request]:
        """Writes the rows of a step, a chunk or None each, if the one in front has not left them
        so. The requests that it samples: of those that need nothing of the host."""
        seats: list[Any] = [None] * len(self._held)
        for i, c in enumerate(chunks):
            how = c and c.request.sampling
            is_left = not c or how.is_plain_greedy or how.schema or how.logprobs is not None
            if not is_left and c.wants_token:
                seats[i] = c.request, c.request.answered
        if any(seats):  # a step without samples changes no row there
            for i in (i for i, seat in enumerate(seats) if seat != self._held[i]):
                self._write(i, seats[i])
            self._held = [seat and (seat[0], seat[1] + 1) for seat in seats]
        return {seat[0] for seat in seats if seat}

    def _write(self, i: int, seat: Any) -> None:
        memory, row, edits, held = self._memory, np.zeros((1, ROW.size), np.uint8), 0, None
        if seat:
            how, edited, logits = seat[0].sampling, _edits(seat[0]), self._logits
            # With penalties the step adds the tokens that it draws, also one computed in vain.
            counts = how.presence_penalty or how.frequency_penalty or how.repetition_penalty != 1
            room = min(how.max_tokens - seat[1], logits.shape[1]) + 2 if counts else 0
            if edits := len(edited) + room:
                held = memory.put(np.pad(edited.view(np.int32), (0, 4 * room)))
            at = view(held).pointer if edits else 0
            _pack(row[0], seat[0], memory.rows(logits, i, i + 1), len(edited), at)
        memory.write(memory.rows(self._rows, i, i + 1), row)
        self._edits[i] = held

    def bind(self, count: int) -> Any:
        """The launch that samples the first rows. Raises BuildError."""
        most, vocab = self._logits.shape
        self._scores = self._scores or self._memory.empty(most, 2 * vocab, dtype="int32")
        rows, scores, tokens = (view(x).pointer for x in (self._rows, self._scores, self._tokens))
        block = PARAMS.pack(rows=rows, scores=scores, tokens=tokens, drawn=tokens + 4 * most)
        return self._kernel.prepare((count, 1, 1), (THREADS, 1, 1), 0, block, overlaps=True)


def _edits(request: Request) -> np.ndarray:
    """What is added to the logits of tokens, each named once, before one is chosen."""
    s = request.sampling
    counts = request.counts if s.presence_penalty or s.frequency_penalty else {}
    seen = set(request.tokens) if s.repetition_penalty != 1 else set[int]()
    tokens = {*counts, *seen, *s.logit_bias}
    edits = [(t, counts.get(t, 0), t in seen, s.logit_bias.get(t, 0)) for t in tokens]
    return np.array(edits, EDIT.numpy)


def _pack(row: Any, request: Request, logits: Any, edits: int, edit: int, mask: int = 0) -> None:
    """Writes the row of a request. `edit`, `mask`: addresses."""
    s, seen = request.sampling, view(logits)
    ROW.pack_into(
        row, logits=seen.pointer, size=seen.size, logit_bytes=seen.dtype.itemsize,
        edit=edit, edits=edits, mask=mask,
        seed=request.seed % 2**64, position=request.answered, top_k=min(s.top_k, seen.size),
        top=-1 if s.logprobs is None else min(s.logprobs, seen.size),
        token=-1, logprob=0, logprobs=(0,) * MAX_LOGPROBS, likeliest=(0,) * MAX_LOGPROBS,
        **{name: getattr(s, name) for name in NUMBERS},
    )  # fmt: skip
