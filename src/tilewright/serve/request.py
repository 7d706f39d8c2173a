"""A request: its tokens, how its answer is sampled, and how far it has come."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from tilewright.attention.checks import is_integer, is_number
from tilewright.errors import ModelError
from tilewright.serve.kv_pool import Node, Walk

RANGES = {
    "temperature": (0, 1e30), "min_p": (0, 1), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
    "ttft_ms": (0.001, 1e9), "itl_ms": (0.001, 1e9),
}  # fmt: skip
LARGEST = 1000  # of priorities
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024


def is_count(value: Any, least: int, most: float = inf) -> bool:
    """Whether an argument is an integer of Python or NumPy in a range."""
    return is_integer(value) and least <= int(value) <= most


def is_within(value: Any, least: float, most: float) -> bool:
    """Whether an argument is a real number in a range."""
    return is_number(value) and least <= value <= most


def check_fields(value: Any, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ModelError[M106] for the first field that is not right. `rules`: by the name of a
    field whether it is, and what is allowed."""
    for name, (is_right, allowed) in rules.items():
        if not is_right:
            rule = f"{name}={repr(getattr(value, name))[:80]}"
            raise ModelError("M106", rule, where=name, hint=f"{name}: {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is chosen and served. Raises ModelError[M106] for values out of range.

    `temperature` 0 takes the likeliest token. Then the tokens are cut to the `top_k` likeliest (0:
    all), to the fewest that have the probability `top_p`, and to those with at least `min_p` times
    the probability of the likeliest. Penalties: those of presence and frequency are subtracted from
    the logits of tokens of the answer, once and for each occurrence; that of repetition divides
    positive logits of tokens of prompt and answer, and multiplies negative ones. `logit_bias`:
    token to a number that is added. `seed` None: another answer each time. `stop`: texts that end
    the answer and are not part of it; `ignore_eos`: end tokens do not end it. `logprobs`: how many
    likeliest tokens are reported with each token; None reports nothing. `schema`: a JSON schema
    that the answer follows, or a grammar in the notation of Lark ("": none).

    `priority`: a higher one is served first. `ttft_ms`: the first token is promised so many
    milliseconds after the arrival; `itl_ms`: each later one so many after the one before.
    `best_effort`: promises that cannot be kept are dropped, instead of an error.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    schema: str = ""
    priority: int = 0
    ttft_ms: float | None = None
    itl_ms: float | None = None
    best_effort: bool = False

    def __post_init__(self) -> None:
        top, seed = self.logprobs, self.seed
        rules = {
            "max_tokens": (is_count(self.max_tokens, 1), "an integer from 1"),
            "top_k": (is_count(self.top_k, 0), "an integer from 0"),
            "top_p": (is_within(self.top_p, 0, 1) and self.top_p > 0, "above 0, at most 1"),
            "logit_bias": (_is_bias(self.logit_bias), "tokens to numbers of -100…100"),
            "seed": (seed is None or is_count(seed, 0), "an integer from 0"),
            "stop": (_are_stops(self.stop), f"at most {MAX_STOPS} texts, none of them empty"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "logprobs": (top is None or is_count(top, 0, MAX_LOGPROBS), f"0…{MAX_LOGPROBS}"),
            "schema": (isinstance(self.schema, str), "a JSON schema as text, or a grammar"),
            "priority": (is_count(self.priority, -LARGEST, LARGEST), f"-{LARGEST}…{LARGEST}"),
        }
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            is_absent = value is None and name.endswith("_ms")
            rules[name] = is_absent or is_within(value, least, most), f"{least:g}…{most:g}"
        check_fields(self, rules)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the one of the largest logit, and nothing else is asked for."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        is_changed = self.temperature or penalties or self.logit_bias or self.schema
        return not is_changed and self.logprobs is None


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASES
        and all(is_count(k, 0) and is_within(v, -100, 100) for k, v in value.items())
    )


def _are_stops(value: Any) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > MAX_STOPS:
        return False
    return all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in value)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token of an answer, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its answer.

    `tokens`: prompt and answer; keys and values of the first `computed` are in `pages` (of each
    block one for each group of layers), the first `cached` of them were when it was admitted; of
    groups with a sliding window it holds those of blocks `unseen` … `ahead` - 1; the first
    `in_chunks` tokens are read many at once, later ones one a step. `rank`: its priority, grown by
    waiting. `finish`: "" while it runs, then stop, length, cancel or error. `pieces`: text that
    its client has not read. `since`: the step at which it began to wait, for a seat or for its next
    tokens. Seconds: `arrived`; `due`: the next token is promised; `first`, `last`: its first and
    its latest token came.
    """

    id: int
    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    arrived: float = 0.0
    seed: int = 0
    prompt_tokens: int = 0
    in_chunks: int = 0
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    unseen: int = 0
    ahead: int = 0
    node: Node | None = None
    walk: Walk = field(default_factory=Walk)
    rank: int = 0
    since: int = 0
    due: float = field(default=inf, init=False)
    first: float = 0.0
    last: float = 0.0
    finish: str = ""
    error: Exception | None = None
    counts: Counter[int] = field(default_factory=Counter)
    pieces: deque[str] = field(default_factory=deque)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: Any = None
    grammar: Any = None
    gap: float = field(default=inf, init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.in_chunks = len(self.tokens)
        self.rank, how = self.sampling.priority, self.sampling
        self.due = inf if how.ttft_ms is None else self.arrived + how.ttft_ms / 1e3
        self.gap = inf if how.itl_ms is None else how.itl_ms / 1e3

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens that the model has not read. One that is being answered has 1."""
        return len(self.tokens) - self.computed

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second: of the prompt, without known ones and up to the first token of the
        answer; of the answer, after it."""
        read_s, written_s = self.first - self.arrived, self.last - self.first
        read, written = self.prompt_tokens - self.cached, self.answered - 1
        return read / read_s if read_s > 0 else 0.0, written / written_s if written_s > 0 else 0.0


def check_tokens(tokens: Any, sampling: Sampling, vocab: int, context: int) -> list[int]:
    """The tokens of a prompt. Raises ModelError: M106 for none or one out of range, here or in
    `logit_bias`, M105 for more than fit into the context."""
    if sampling.logit_bias and max(sampling.logit_bias) >= vocab:
        rule = f"logit_bias names token {max(sampling.logit_bias)} of {vocab}"
        raise ModelError("M106", rule, where="logit_bias")
    try:
        ids = np.asarray(tokens)
    except ValueError:
        ids = np.empty(0)
    is_list = ids.ndim == 1 and len(ids) > 0 and ids.dtype.kind in "iu"
    if not is_list or ids.min() < 0 or ids.max() >= vocab:
        rule = f"tokens must be 1 or more integers from 0 to {vocab - 1}"
        raise ModelError("M106", rule, where="tokens")
    if len(ids) >= context:
        rule = f"the prompt has {len(ids)} tokens, the context {context}"
        hint = "shorten it, or open the model with a larger context="
        raise ModelError("M105", rule, where="prompt", hint=hint)
    return [int(i) for i in ids]
