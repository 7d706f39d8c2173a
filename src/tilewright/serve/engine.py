"""`LLM`: answers prompts from a model file; `Engine`: the loop of steps below it.

    llm = LLM("SmolLM2-135M-Instruct.gguf")
    for piece in llm.stream("What is the capital of France?"): print(piece, end="")
    answers = llm.generate(["Name a river.", "Name a city."])        # together, in one batch

What an earlier prompt or answer has in common with a new prompt is not read again, in full pages.
"""

import itertools
import os
import secrets
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from tilewright.errors import ModelError
from tilewright.serve.chat import Messages, Prompts
from tilewright.serve.cost import HOW_TO_TUNE, CostModel, Work, cost_key
from tilewright.serve.kv_pool import PAGE_SIZE, layer_groups
from tilewright.serve.models.config import ModelConfig
from tilewright.serve.models.llama import Llama
from tilewright.serve.policy import SAFETY
from tilewright.serve.request import Request, Sampling, check_fields, check_tokens, is_count
from tilewright.serve.runner import Logits, Runner
from tilewright.serve.sampler import NO_MEMORY, Sampled, native, sample
from tilewright.serve.scheduler import PENDING, Batch, Limits, Scheduler, work_of
from tilewright.serve.tokenizer import AnswerText, load_tokenizer
from tilewright.serve.weights import ModelFile, open_model
from tilewright.target import Target
from tilewright.toolchain import compilers

Several = list[str] | list[Messages] | list[str | Messages]
LONGEST = 2048  # tokens of a sequence, where the caller names no context


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sizes of an engine. `context`: tokens of prompt and answer together (None: the model's, at
    most 2048); `running`: requests at once; `step_tokens`: tokens of a step; `kv_tokens`: tokens of
    the KV cache (None: four contexts); `share`: pages of equal prefixes are shared; `invariant`:
    the bits of an answer behind equal keys do not depend on what runs beside it (up to 16 answers
    where torch computes products), at a tenth of the speed there; `cost`: a file of measured costs,
    which promised times need. Raises ModelError: M105 for the context, M106."""

    context: int | None = None
    running: int = 16
    step_tokens: int = 512
    kv_tokens: int | None = None
    share: bool = True
    invariant: bool = True
    cost: str | os.PathLike[str] | None = None

    def resolved(self, model: ModelConfig) -> tuple[int, Limits]:
        """The context, and the limits of the scheduler."""
        longest, of = model.context, model.has_window
        windows = {g: model.window * w for g, w in zip(layer_groups(of), of, strict=True)}
        context = min(longest, LONGEST) if self.context is None else self.context
        if not is_count(context, 1, longest):
            rule = f"context={context!r} is no integer from 1 to {longest} (tokens)"
            raise ModelError("M105", rule, where="context", hint="the model allows no more")
        kv_tokens = 4 * context if self.kv_tokens is None else self.kv_tokens
        check_fields(self, {"running": (is_count(self.running, 1), "an integer from 1")})
        check_fields(self, {
            "step_tokens": (is_count(self.step_tokens, self.running + 1), "more than running="),
            "kv_tokens": (is_count(kv_tokens, context), f"an integer from {context}"),
        })  # fmt: skip
        # A request that fills the context is admitted again with room for one more token.
        pages = max(-(-int(kv_tokens) // PAGE_SIZE), context // PAGE_SIZE + 1) * len(windows)
        sizes = int(self.running), int(self.step_tokens)
        by_group = tuple([windows[group] for group in sorted(windows)])
        return int(context), Limits(pages, *sizes, self.share, self.invariant, windows=by_group)


class Engine:
    """A model, its scheduler and its runner. `runs_ahead`: a step may be launched before the tokens
    of the one in front are read."""

    def __init__(self, file: ModelFile, target: Target | str, options: Options) -> None:
        self.context, limits = options.resolved(file.config)
        self.tokenizer = load_tokenizer(file)
        self.model = Llama(file, target, self.context + 1)
        key = cost_key(file, self.model.target, limits.invariant, self.model.products_by)
        cost = CostModel.load(options.cost, key) if options.cost else CostModel(key=key)
        self.scheduler = Scheduler(limits, cost)
        self.runner = Runner(self.model, limits, self.context)
        self.runs_ahead = self.model.target.is_cuda
        if compilers.has_compiler():
            native()  # compiled here, not while answers wait
        self._flight: tuple[Batch, Logits] | None = None  # a step whose tokens are not read
        self._began = 0.0  # when it was launched, or the tokens in front were read, seconds
        self._ids = itertools.count()
        self.best_effort = 0  # promises that were dropped

    def submit(self, tokens: Any, sampling: Sampling, arrived: float = 0.0) -> Request:
        """A new request, which later steps answer. `arrived`: when it came, of `time.perf_counter`
        (0: now). Raises ModelError: M105, M106, M110 for a promise that no step can keep, or where
        no cost of a step is fitted; BuildError[B102] for sampling without a C++ compiler."""
        tokens = check_tokens(tokens, sampling, self.model.config.vocab, self.context)
        if not sampling.is_plain_greedy:
            native()  # compiled here, not in a step
        how = self._promised(sampling, len(tokens))
        request = Request(next(self._ids), tokens, how, arrived or time.perf_counter())
        request.seed = secrets.randbits(63) if how.seed is None else int(how.seed)
        request.text = AnswerText(self.tokenizer, how.stop)
        if how.schema:
            from tilewright.serve.grammar import matcher

            request.grammar = matcher(self.tokenizer, how.schema)
        self.scheduler.add(request)
        return request

    def _promised(self, how: Sampling, tokens: int) -> Sampling:
        """What a request is promised. What no step can keep, even for the request alone, of which
        all but the last page is known, is refused, or dropped with `best_effort`."""
        if how.ttft_ms is None and how.itl_ms is None:
            return how
        model, limits = self.scheduler.model, self.scheduler.limits
        if not model.is_fitted:
            rule = "promised times need the cost of a step"
            raise ModelError("M110", rule, where="cost", hint=HOW_TO_TUNE)
        read = (tokens - 1) % limits.page_size + 1 if limits.share else tokens
        first = model.seconds(Work().plus(tokens - read, read)) + self.scheduler.pause
        for name, seconds in ("ttft_ms", first), ("itl_ms", model.seconds(Work(1, tokens))):
            asked, floor = getattr(how, name), 1e3 * seconds / SAFETY
            if asked is not None and asked < floor:
                if not how.best_effort:
                    rule = f"{name}={asked:g} cannot be kept: {floor:.1f} ms is the least"
                    raise ModelError("M110", rule, where=name, hint="ask for more, or best_effort")
                self.best_effort += 1
                how = replace(how, **{name: None})
        return how

    def cancel(self, request: Request) -> None:
        """Ends a request with finish "cancel", wherever it is; one that has ended stays so."""
        self.scheduler.finish(request, "cancel")

    def step(self) -> list[Request]:
        """Runs one step. Returns the requests that got a token or ended.

        On a GPU the next step, if it has the same answers, is launched before the tokens of this
        one are read: they are where it needs them. Behind one that ends an answer a token is then
        computed in vain."""
        flight, self._flight = self._flight or self._launch(None), None
        if flight is None:
            return []
        batch, logits = flight
        ready, behind = self._commit(batch, logits)
        for request, sampled in self._tokens(batch, logits):
            self._answer(request, *sampled)
        self._flight = behind  # forgotten after an exception: the tokens are computed again
        return ready

    def _launch(self, behind: list[Request] | None) -> tuple[Batch, Logits] | None:
        """Launches the next step, if there is one. `behind`: who gets a token of the step in front,
        which is not read; then if it answers just these, whose tokens are PENDING meanwhile."""
        for request in behind or ():
            request.tokens.append(PENDING)
        try:
            now = time.perf_counter()
            batch = self.scheduler.schedule(now, behind is not None)
            answers = [c.request for c in batch.chunks if not c.is_prompt]
            if not batch.chunks or (behind is not None and answers != behind):
                return None
            self._began = now if behind is None else self._began
            return batch, self.runner.run(batch.chunks)
        finally:
            for request in behind or ():
                request.tokens.pop()

    def _commit(self, batch: Batch, logits: Logits) -> tuple[list[Request], Any]:
        """Notes that a step was run. The requests that get a token, and the next step if it was
        launched already: where this one chooses its tokens, and no prompt ends. Else it waits."""
        known = [c.is_prompt != c.wants_token for c in batch.chunks]  # what the next begins with
        leads = self.runs_ahead and all(known) and not logits.left
        if not leads:
            logits.wait()
        ready = self.scheduler.commit(batch, time.perf_counter())
        return ready, self._launch(ready) if leads and ready == logits.requests else None

    def _tokens(self, batch: Batch, logits: Logits) -> list[tuple[Request, Sampled]]:
        """Waits for a step. The requests that go on, with their next tokens, -1 where the logits
        are NaN or infinite."""
        logits.wait()
        began, self._began = self._began, time.perf_counter()
        # A cancelled step ended perhaps long ago; of cascaded ones no cost is fitted.
        if not (logits.groups.nodes or all(c.request.finish for c in batch.chunks)):
            self._compare(work_of(batch.chunks), self._began - began, batch.ahead)
        rows = {r: i for i, r in enumerate(logits.requests) if not r.finish}
        tokens: dict[Request, Sampled] = {r: (logits.tokens[i], None) for r, i in rows.items()}
        for request, i in rows.items():
            if request.answered == 0 and not np.isfinite(logits.row(i)).all():
                tokens[request] = -1, None  # looked for once: not to slow each token
        if left := [r for r in logits.left if r in rows and tokens[r][0] >= 0]:
            tokens |= zip(left, sample(left, [logits.row(rows[r]) for r in left]), strict=True)
        return [*tokens.items()]

    def _compare(self, work: Work, seconds: float, ahead: bool) -> None:
        """Corrects the cost by a step, or the pause by one of a GPU that was not launched ahead."""
        s, predicted = self.scheduler, self.scheduler.model.seconds(work)
        if ahead or not self.runs_ahead:
            s.model = s.model.corrected(work, seconds)
        else:
            s.pause = max(0.0, s.pause + (min(seconds - predicted, predicted) - s.pause) / 16)

    def counts(self) -> dict[str, int]:
        """What `/metrics` shows of the scheduler, and of reads that answers shared."""
        s, cascade = self.scheduler, self.runner.cascade
        rows, pages = cascade.totals.tolist()
        return {
            "preemptions_total": s.preemptions, "late_tokens_total": s.late,
            "best_effort_total": self.best_effort, "requests_running": len(s.running),
            "requests_waiting": len(s.waiting), "pages_held": s.pages.held, "pages": s.pages.count,
            "cascaded_rows_total": rows,
            "cascade_saved_bytes_total": pages * cascade.page_bytes * len(cascade.pools),
        }  # fmt: skip

    def _answer(self, request: Request, token: int, logprob: Any) -> None:
        """Adds the next token, and ends the request where it ends."""
        if token < 0:
            rule = "the model computes no numbers: its logits are NaN or infinite"
            hint = "fetch the file again and compare its checksum"
            request.error = ModelError("M101", rule, where=str(self.model.file.path), hint=hint)
            if token == NO_MEMORY:
                request.error = ModelError("M111", "no memory is left to sample a token")
            return self.scheduler.finish(request, "error")
        now = self._began
        self.scheduler.late += request.answered > 0 and now > request.last + request.gap
        request.due = now + request.gap  # that of `commit` is of its launch where it led
        request.first, request.last = request.first if request.answered else now, now
        if request.grammar is not None:
            request.grammar.consume_token(token)
        if request.grammar is not None and (wrong := request.grammar.get_error()):
            rule = f"no answer can follow the schema or grammar: {wrong.splitlines()[0][:200]}"
            request.error = ModelError("M106", rule, where="response_format")
            return self.scheduler.finish(request, "error")
        if token in self.tokenizer.ends and not request.sampling.ignore_eos:
            return self._end(request, "stop")  # the end token is not part of the answer
        if logprob is not None:
            request.logprobs.append(logprob)
        request.tokens.append(token)
        request.counts[token] += 1
        request.pieces.append(request.text.push(token))
        if request.text.stopped:
            self._end(request, "stop")
        elif request.answered == request.sampling.max_tokens or len(request.tokens) > self.context:
            self._end(request, "length")
        return None

    def _end(self, request: Request, reason: str) -> None:
        request.pieces.append(request.text.finish())
        self.scheduler.finish(request, reason)


class LLM(Prompts):
    """A model, its tokenizer and its chat template. Raises ModelError, BuildError.

    `target`: cpp or cuda; `sizes`: of `Options`. `latest`: the request of the latest stream, with
    its counts and rates.
    """

    latest: Request

    def __init__(
        self, path: str | os.PathLike[str], *, target: Target | str = "cpp", **sizes: Any
    ) -> None:
        file = open_model(path)
        self.engine = Engine(file, target, _named(Options, sizes))
        super().__init__(file, self.engine.context, self.engine.tokenizer)
        self.model = self.engine.model

    def stream(self, prompt: str | Messages, **sampling: Any) -> Generator[str, None, None]:
        """The answer, piece by piece. `prompt`: a question, or messages of a chat; a model
        without a chat template continues the text. `sampling`: of `Sampling`.

        Several streams may be read in turns: their answers are computed together. Raises
        ModelError: M105 for a prompt longer than the context, M106 for bad arguments, M101 for a
        model whose logits are not finite."""
        how = _named(Sampling, sampling)
        return self._stream(check_tokens(self.prompt(prompt), how, self.vocab, self.context), how)

    @overload
    def generate(self, prompt: str | Messages, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Several, **options: Any) -> list[str]: ...
    def generate(self, prompt: Any, *, progress: bool = False, **sampling: Any) -> str | list[str]:
        """The answer as one text; for a list of prompts (texts or chats), a list of their answers,
        computed together. `progress`: a line on the standard error counts the answers.
        `sampling`, errors: see `stream`."""
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], dict)
        if not several:
            return "".join(self.stream(prompt, **sampling))
        how, requests = _named(Sampling, sampling), []
        done, tokens, began = 0, 0, time.perf_counter()
        try:
            for one in prompt:
                requests.append(self.engine.submit(self.prompt(one), how))
            while done < len(requests):
                tokens += len(self.engine.step())
                done = sum([bool(r.finish) for r in requests])
                if progress:
                    rate = tokens / (time.perf_counter() - began)
                    line = f"\r{done} of {len(requests)} answers, {rate:.0f} tokens/s   "
                    end = "\n" if done == len(requests) else ""
                    print(line, end=end, file=sys.stderr, flush=True)
        finally:
            self._leave(*requests)
        return ["".join(r.pieces) for r in requests]

    def chat(self, messages: str | Messages, **sampling: Any) -> Messages:
        """The messages, or a first question, with the answer behind them, as the next question
        needs them; they stay as they are. `sampling`, errors: see `stream`."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return [*asked, {"role": "assistant", "content": self.generate(asked, **sampling)}]

    def _stream(self, tokens: list[int], how: Sampling) -> Generator[str, None, None]:
        self.latest = request = self.engine.submit(tokens, how)
        try:
            while not request.finish or request.pieces:  # another stream's step may have ended it
                if not request.pieces:
                    self.engine.step()
                elif piece := request.pieces.popleft():
                    yield piece
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
