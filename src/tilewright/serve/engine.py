"""`LLM`: answers prompts from a model file; `Engine`: the loop of steps below it.

    llm = LLM("SmolLM2-135M-Instruct.gguf")
    for piece in llm.stream("What is the capital of France?"): print(piece, end="")
    answers = llm.generate(["Name a river.", "Name a city."])        # together, in one batch

What an earlier prompt or answer has in common with a new prompt is not read again, in full pages.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from tilewright.errors import ModelError
from tilewright.serve.chat import ChatTemplate, template_of
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.models.llama import Llama
from tilewright.serve.request import Request, Sampling, check_tokens, is_count
from tilewright.serve.runner import Logits, Runner
from tilewright.serve.sampler import sample
from tilewright.serve.scheduler import Limits, Scheduler
from tilewright.serve.text import AnswerText
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import ModelFile, open_model
from tilewright.target import Target

ANSWER_ROOM = 64  # tokens
LONGEST = 2048  # tokens of a sequence, where the caller names no context

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sizes of an engine. `context`: tokens of prompt and answer together (None: the model's, at
    most 2048); `running`: requests at once; `step_tokens`: tokens of a step; `kv_tokens`: tokens of
    the KV cache (None: four contexts); `share`: pages of equal prefixes are shared; `invariant`:
    the bits of an answer do not depend on what runs beside it, at the cost of speed from eight
    answers on. Raises ModelError: M105 for the context, M106."""

    context: int | None = None
    running: int = 16
    step_tokens: int = 512
    kv_tokens: int | None = None
    share: bool = True
    invariant: bool = True

    def resolved(self, longest: int) -> tuple[int, Limits]:
        """The context, and the limits of the scheduler. `longest`: of the model."""
        context = min(longest, LONGEST) if self.context is None else self.context
        if not is_count(context, 1) or context > longest:
            rule = f"context={context!r} is no integer from 1 to {longest} (tokens)"
            hint = "the model allows no more"
            raise ModelError("M105", rule, where="context", hint=hint)
        kv_tokens = 4 * context if self.kv_tokens is None else self.kv_tokens
        least = {"running": 1, "step_tokens": 2, "kv_tokens": context}
        for name, value in (("running", self.running), ("step_tokens", self.step_tokens),
                            ("kv_tokens", kv_tokens)):  # fmt: skip
            if not is_count(value, least[name]):
                rule, hint = f"{name}={value!r}", f"an integer from {least[name]}"
                raise ModelError("M106", rule, where=name, hint=hint)
        if self.step_tokens <= self.running:
            rule = f"{self.running} running requests leave no prompt tokens in {self.step_tokens}"
            raise ModelError("M106", rule, where="step_tokens", hint="more than running=")
        # A request that fills the context is admitted again with room for one more token.
        pages = max(-(-int(kv_tokens) // PAGE_SIZE), context // PAGE_SIZE + 1)
        sizes = int(self.running), int(self.step_tokens)
        return int(context), Limits(pages, *sizes, self.share, self.invariant)


class Engine:
    """A model, its scheduler and its runner. One thread calls it, except `check` and `request`."""

    def __init__(self, file: ModelFile, target: Target | str, options: Options) -> None:
        self.context, limits = options.resolved(file.config.context)
        self.tokenizer = load_tokenizer(file)
        self.model = Llama(file, target, self.context + 1)
        self.scheduler = Scheduler(limits)
        self.runner = Runner(self.model, limits, self.context)
        self._ids = itertools.count()

    def check(self, tokens: Any, sampling: Sampling) -> list[int]:
        """The tokens of a prompt, checked. Raises ModelError (M105, M106)."""
        vocab = self.model.config.vocab
        if sampling.logit_bias and max(sampling.logit_bias) >= vocab:
            rule = f"logit_bias names token {max(sampling.logit_bias)} of {vocab}"
            raise ModelError("M106", rule, where="logit_bias")
        return check_tokens(tokens, vocab, self.context)

    def request(self, tokens: Any, sampling: Sampling, priority: int = 0) -> Request:
        """A request that the scheduler does not know yet; any thread may call this. Raises
        ModelError (M105, M106)."""
        request = Request(next(self._ids), self.check(tokens, sampling), sampling, priority)
        request.seed = secrets.randbits(63) if sampling.seed is None else int(sampling.seed)
        request.text = AnswerText(self.tokenizer, sampling.stop)
        return request

    def submit(self, tokens: Any, sampling: Sampling, priority: int = 0) -> Request:
        """A new request, which later steps answer. Raises ModelError (M105, M106)."""
        request = self.request(tokens, sampling, priority)
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        self.scheduler.finish(request, "cancel")

    def step(self) -> list[Request]:
        """Runs one step. Returns the requests that got a token or ended."""
        decision = self.scheduler.schedule()
        if not decision.chunks:
            return []
        logits = self.runner.run(decision.chunks)
        ready = self.scheduler.commit(decision)
        for i, request in enumerate(ready):
            self._answer(request, logits, i)
        return ready

    def _answer(self, request: Request, logits: Logits, i: int) -> None:
        """Adds the next token, by row i of the logits, and ends the request where it ends."""
        first = request.answered == 0  # checked once: not to slow each token
        if first and not np.isfinite(logits.row(i)).all():
            rule = "the model computes no numbers: its logits are NaN or infinite"
            hint = "fetch the file again and compare its checksum"
            where = str(self.model.file.path)
            request.error = ModelError("M101", rule, where=where, hint=hint)
            return self.scheduler.finish(request, "error")
        plain = request.sampling.is_plain_greedy
        token = logits.likeliest[i] if plain else sample(request, logits.row(i))
        if token in self.tokenizer.ends and not request.sampling.ignore_end:
            return self._end(request, "stop")
        request.tokens.append(token)
        request.counts[token] += 1
        piece = request.text.push(token)
        if piece:
            request.pieces.append(piece)
        if request.text.stopped:
            self._end(request, "stop")
        elif request.answered == request.sampling.max_tokens or len(request.tokens) > self.context:
            self._end(request, "length")
        return None

    def _end(self, request: Request, reason: str) -> None:
        rest = request.text.finish()
        if rest:
            request.pieces.append(rest)
        self.scheduler.finish(request, reason)


@dataclass(slots=True)
class Counts:
    """Tokens and seconds of a prompt and its answer; the prompt's time includes the first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_s: float = 0.0
    answer_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def note(self, request: Request) -> None:
        """The counts of a request after a step."""
        now = time.perf_counter()
        if request.answered or request.finish:
            if not self.prompt_s:
                self.prompt_s, self.cached_tokens = now - self.began, request.cached
                self.prompt_tokens = request.prompt_tokens - request.cached
            self.answer_tokens = request.answered
            self.answer_s = now - self.began - self.prompt_s

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

    `target`: cpp or cuda; `context`: tokens of prompt and answer together; `sizes`: of `Options`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: Target | str = "cpp",
        context: int | None = None,
        **sizes: Any,
    ) -> None:
        file = open_model(path)
        self.engine = Engine(file, target, _named(Options, {"context": context, **sizes}))
        self.model, self.tokenizer = self.engine.model, self.engine.tokenizer
        source = template_of(file.metadata)
        self.template = ChatTemplate(source, self.tokenizer) if source else None
        self.counts = Counts()

    def stream(self, prompt: str | Messages, **sampling: Any) -> Generator[str, None, None]:
        """The answer, piece by piece. `prompt`: a question, or messages of a chat; a model
        without a chat template that compiles continues the text. `sampling`: of `Sampling`.

        Several streams may be read in turns: their answers are computed together. Raises
        ModelError: M105 for a prompt longer than the context, M106 for bad arguments, M101 for a
        model whose logits are not finite."""
        how = _named(Sampling, sampling)
        tokens = self.engine.check(self.prompt(prompt), how)
        return self._stream(tokens, how)

    @overload
    def generate(self, prompt: str | Messages, **sampling: Any) -> str: ...

    @overload
    def generate(
        self, prompt: list[str] | list[Messages] | list[str | Messages], **sampling: Any
    ) -> list[str]: ...

    def generate(self, prompt: Any, **sampling: Any) -> str | list[str]:
        """The answer as one text; for several prompts, a list of texts or of chats, theirs, which
        are computed together. `sampling`, errors: see `stream`."""
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], dict)
        if not several:
            return "".join(self.stream(prompt, **sampling))
        how = _named(Sampling, sampling)
        checked = [self.engine.check(self.prompt(one), how) for one in prompt]
        requests = [self.engine.submit(tokens, how) for tokens in checked]
        try:
            while not all(r.finish for r in requests):
                self.engine.step()
        finally:
            self._leave(*requests)
        return ["".join(r.pieces) for r in requests]

    def prompt(self, prompt: str | Messages) -> list[int]:
        """The tokens of a question, of a chat, or of a text to continue; no text of a user becomes
        a control token. Raises ModelError."""
        template = self.template
        if isinstance(prompt, str) and (template is None or not template.compiles()):
            return self.tokenizer.encode(prompt, special=False)
        if template is None:
            rule, hint = "this model has no chat template", "pass a text to continue"
            raise ModelError("M107", rule, where="prompt", hint=hint)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return template.tokens(messages)

    def too_many(self, messages: Messages) -> int:
        """How many of the oldest messages to leave out, so that `ANSWER_ROOM` tokens (at most half
        of the context) remain for an answer. Raises ModelError[M105] when even the last message is
        too long."""
        assert self.template is not None
        context = self.engine.context
        return self.template.fit(messages, context - min(ANSWER_ROOM, context // 2))[1]

    # -- inside ----------------------------------------------------------------------------------

    def _stream(self, tokens: list[int], how: Sampling) -> Generator[str, None, None]:
        counts = self.counts = Counts()
        request = self.engine.submit(tokens, how)
        try:
            while not request.finish:
                self.engine.step()
                counts.note(request)
                while request.pieces:
                    yield request.pieces.popleft()
            while request.pieces:  # another stream's step may have ended it
                yield request.pieces.popleft()
        finally:
            self._leave(request)

    def _leave(self, *requests: Request) -> None:
        """Ends requests that nobody reads any more. Raises what ended one."""
        for request in requests:
            self.engine.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error


def _named(kind: Any, values: dict[str, Any]) -> Any:
    """A value of a class by names. Raises ModelError[M106] for a name that it does not have."""
    known = kind.__dataclass_fields__
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        hint = f"names: {', '.join(known)}"
        raise ModelError("M106", f"unknown argument {unknown[0]!r}", where=unknown[0], hint=hint)
    return kind(**values)
