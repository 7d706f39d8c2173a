"""`LLM`: answers prompts from a model file. Offline, one sequence at a time.

    llm = LLM("SmolLM2-135M-Instruct.gguf")
    for piece in llm.stream("What is the capital of France?"): print(piece, end="")

The part of a conversation that is in the KV cache is not read again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from tilewright.errors import ModelError
from tilewright.ops.sampling import gumbel, sample_kernel
from tilewright.serve.chat import ChatTemplate, template_of
from tilewright.serve.model import Llama, is_count
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import open_model
from tilewright.target import Target

COLDEST = 1e-6  # a lower temperature samples as this one does, and overflows nothing
HOTTEST = 1e30
ANSWER_ROOM = 64  # tokens


@dataclass(slots=True)
class Counts:
    """Tokens and seconds of a prompt and its answer; the prompt's time includes the first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_s: float = 0.0
    answer_s: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def answer_rate(self) -> float:
        """Answer tokens a second, without the first one."""
        later = max(self.answer_tokens - 1, 0)
        return later / self.answer_s if self.answer_s else 0.0


class LLM:
    """A model, its tokenizer and its chat template. Raises ModelError, BuildError.

    `target`: cpp or cuda; `context`: tokens of prompt and answer together."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: Target | str = "cpp",
        context: int | None = None,
    ) -> None:
        file = open_model(path)
        self.tokenizer = load_tokenizer(file)
        source = template_of(file.metadata)
        self.template = ChatTemplate(source, self.tokenizer) if source else None
        self.model = Llama(file, target, context)
        self.read: list[int] = []  # the tokens that the cache holds
        self.counts = Counts()
        self._answers = 0  # begun so far

    def stream(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """The answer, piece by piece. `prompt`: a question, or messages of a chat; a model
        without a chat template that compiles continues the text. `temperature` 0 takes the
        likeliest token.

        One answer at a time: a new one ends the one before. Raises ModelError: M105 for a prompt
        longer than the context, M106 for bad arguments or reading from an answer that has ended,
        M101 for a model whose logits are not finite."""
        check_options(max_tokens, temperature, seed)
        self._answers += 1
        ids, rng = self._tokens(prompt), np.random.default_rng(seed)
        return self._answer(self._answers, ids, max_tokens, temperature, rng)

    def generate(self, prompt: str | list[dict[str, Any]], **options: Any) -> str:
        """The answer as one text."""
        return "".join(self.stream(prompt, **options))

    def too_many(self, messages: list[dict[str, Any]]) -> int:
        """How many of the oldest messages to leave out, so that `ANSWER_ROOM` tokens (at most half
        of the context) remain for an answer. Raises ModelError[M105] when even the last message is
        too long."""
        assert self.template is not None
        capacity = self.model.cache.capacity
        limit = capacity - min(ANSWER_ROOM, capacity // 2)
        return self.template.fit(messages, limit)[1]

    # -- inside ----------------------------------------------------------------------------------

    def _tokens(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        capacity, template = self.model.cache.capacity, self.template
        if isinstance(prompt, str) and (template is None or not template.compiles()):
            ids = self.tokenizer.encode(prompt)
        elif template is None:
            rule, hint = "this model has no chat template", "pass a text to continue"
            raise ModelError("M107", rule, where="prompt", hint=hint)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = template.tokens(messages)
        if len(ids) >= capacity:
            rule = f"the prompt has {len(ids)} tokens, the context {capacity}"
            hint = "shorten it, or open the model with a larger context="
            raise ModelError("M105", rule, where="prompt", hint=hint)
        return ids

    def _answer(
        self,
        turn: int,
        ids: list[int],
        max_tokens: int,
        temperature: float,
        rng: np.random.Generator,
    ) -> Generator[str, None, None]:
        model, text = self.model, self.tokenizer.stream()
        self._check_turn(turn)
        counts = self.counts = Counts()
        token = self._prompt(ids, counts, temperature, rng)
        began = time.perf_counter()
        while token not in self.tokenizer.ends:
            counts.answer_tokens += 1
            counts.answer_s = time.perf_counter() - began
            piece = text.push(token)
            if piece:
                yield piece
                self._check_turn(turn)
            if counts.answer_tokens == max_tokens or model.cache.length == model.cache.capacity:
                break
            following = model.decode(token)
            self.read.append(token)  # after decoding: `read` is never longer than the cache
            token = following
            if temperature:
                token = self._sampled(temperature, rng)
        counts.answer_s = time.perf_counter() - began
        rest = text.finish()
        if rest:
            yield rest

    def _prompt(
        self, ids: list[int], counts: Counts, temperature: float, rng: np.random.Generator
    ) -> int:
        """Reads the tokens that are not in the cache; returns the first token of the answer."""
        began = time.perf_counter()
        same = 0
        while same < min(len(self.read), len(ids) - 1) and self.read[same] == ids[same]:
            same += 1
        self.model.reset(same)
        self.read = ids[:same]
        self._check_finite(self.model.prefill(ids[same:]))
        self.read = list(ids)
        token = self._sampled(temperature, rng) if temperature else self.model.greedy()
        counts.prompt_tokens, counts.cached_tokens = len(ids) - same, same
        counts.prompt_s = time.perf_counter() - began
        return token

    def _sampled(self, temperature: float, rng: np.random.Generator) -> int:
        model = self.model
        noise = model.memory.put(gumbel(rng, (1, model.config.vocab)))
        warmth = 1.0 / max(temperature, COLDEST)
        chosen = sample_kernel(model.name)(model.logits_on_device, noise, warmth)
        return int(model.memory.read(chosen)[0])

    def _check_finite(self, logits: np.ndarray) -> None:
        """Raises ModelError[M101] for logits that are NaN or infinite. Checked once a prompt, to
        add no cost to each token."""
        if not np.isfinite(logits).all():
            rule = "the model computes no numbers: its logits are NaN or infinite"
            hint = "fetch the file again and compare its checksum"
            raise ModelError("M101", rule, where=str(self.model.file.path), hint=hint)

    def _check_turn(self, turn: int) -> None:
        if turn != self._answers:
            rule, hint = "another answer has begun since", "read one answer at a time"
            raise ModelError("M106", rule, where="stream", hint=hint)


def check_options(max_tokens: Any, temperature: Any, seed: Any) -> None:
    """Checks the options of `LLM.stream`. Raises ModelError[M106]."""
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    in_range = number and 0 <= temperature <= HOTTEST  # type: ignore[operator]
    if not (is_count(max_tokens, 1) and in_range and (seed is None or is_count(seed, 0))):
        rule = f"max_tokens={max_tokens!r}, temperature={temperature!r}, seed={seed!r}"
        hint = f"max_tokens from 1, a temperature of 0…{HOTTEST:g}, a seed from 0"
        raise ModelError("M106", rule, where="arguments", hint=hint)
