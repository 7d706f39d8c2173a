"""One sequence over a runner, without scheduler and engine: what the tests of the model drive."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.serve.engine import Options
from tilewright.serve.models.llama import Llama
from tilewright.serve.request import Request
from tilewright.serve.runner import Runner
from tilewright.serve.scheduler import Chunk
from tilewright.serve.weights import ModelFile


class Sequence:
    """Reads prompts in chunks and single tokens, from the first pages of the pool on."""

    def __init__(
        self, file: ModelFile, target: str = "cpp", context: int | None = None, **options: Any
    ) -> None:
        self.context, limits = Options(context=context, **options).resolved(file.config)
        self.config = file.config
        self.chunk = limits.step_tokens
        self.runner = Runner(Llama(file, target, self.context), limits, self.context)
        self.request = Request(0, [])
        self.reset()

    @property
    def length(self) -> int:
        return self.request.computed

    def reset(self, length: int = 0) -> None:
        """Forgets all but the first tokens."""
        kept = self.request.tokens[:length]
        self.request = Request(0, kept)
        pages = range(self.runner.table.shape[1])
        self.request.computed, self.request.pages = len(kept), [*pages]

    def prefill(self, tokens: Any) -> np.ndarray:
        """Reads tokens as a prompt; the logits after the last one."""
        request = self.request
        request.tokens += [int(t) for t in tokens]
        request.prompt_tokens = request.in_chunks = len(request.tokens)
        while request.left:
            self._run(min(request.left, self.chunk))
        return self.logits()

    def decode(self, token: int) -> int:
        """Reads one token as one of an answer; the likeliest next one."""
        self.request.tokens.append(int(token))
        self._run(1)
        return self.greedy()

    def logits(self) -> np.ndarray:
        return self.last.row(0).copy()

    def greedy(self) -> int:
        return self.last.tokens[0]

    def _run(self, count: int) -> None:
        start = self.request.computed
        self.last = self.runner.run([Chunk(self.request, start, start + count)])
        self.last.wait()
        self.request.computed += count
