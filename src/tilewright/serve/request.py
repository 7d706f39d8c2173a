"""A request: its tokens, how its answer is sampled, and how far it has come."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.errors import ModelError

if TYPE_CHECKING:
    from tilewright.serve.prefix import Node

HOTTEST = 1e30
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024


def is_count(value: Any, least: int) -> bool:
    """Whether an argument is an integer of Python or NumPy, and at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether an argument is a real number in a range."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and least <= value <= most  # pyright: ignore[reportOperatorIssue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is chosen. Raises ModelError[M106] for values out of range.

    `temperature` 0 takes the likeliest token. Then the tokens are cut to the `top_k` likeliest (0:
    all), to the fewest that have the probability `top_p`, and to those with at least `min_p` times
    the probability of the likeliest. Penalties: `presence` and `frequency` are subtracted from the
    logits of tokens of the answer, once and for each occurrence; `repetition` divides positive
    logits of tokens of prompt and answer, and multiplies negative ones. `logit_bias`: token to a
    number that is added. `seed` None: another answer each time. `stop`: texts that end the answer
    and are not part of it; `ignore_end`: end tokens do not end it. `logprobs`: how many likeliest
    tokens are reported with each token; None reports nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_end: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        tests = {
            "max_tokens": (is_count(self.max_tokens, 1), "an integer from 1"),
            "temperature": (is_number(self.temperature, 0, HOTTEST), f"0…{HOTTEST:g}"),
            "top_k": (is_count(self.top_k, 0), "an integer from 0"),
            "top_p": (is_number(self.top_p, 0, 1) and self.top_p > 0, "above 0, at most 1"),
            "min_p": (is_number(self.min_p, 0, 1), "0…1"),
            "presence": (is_number(self.presence, -2, 2), "-2…2"),
            "frequency": (is_number(self.frequency, -2, 2), "-2…2"),
            "repetition": (is_number(self.repetition, 0.01, 100), "0.01…100"),
            "logit_bias": (_is_bias(self.logit_bias), "tokens to numbers of -100…100"),
            "seed": (self.seed is None or is_count(self.seed, 0), "an integer from 0"),
            "stop": (_are_stops(self.stop), f"at most {MAX_STOPS} texts, none of them empty"),
            "ignore_end": (isinstance(self.ignore_end, bool), "True or False"),
            "logprobs": (
                self.logprobs is None
                or (is_count(self.logprobs, 0) and self.logprobs <= MAX_LOGPROBS),
                f"an integer of 0…{MAX_LOGPROBS}",
            ),
        }
        for name, (is_right, allowed) in tests.items():
            if not is_right:
                rule = f"{name}={repr(getattr(self, name))[:80]}"
                raise ModelError("M106", rule, where=name, hint=f"{name}: {allowed}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the one of the largest logit, and nothing else is asked for."""
        changed = self.presence or self.frequency or self.repetition != 1 or self.logit_bias
        return self.temperature == 0 and self.logprobs is None and not changed


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASES
        and all(is_count(k, 0) and is_number(v, -100, 100) for k, v in value.items())
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

    `tokens`: prompt and answer; keys and values of the first `computed` are in `pages`, the first
    `cached` of them were when it was admitted; the first `in_chunks` are read many at once, later
    ones one a step. `rank`: its priority, grown by waiting. `finish`: "" while it runs, then stop,
    length, cancel or error. `pieces`: text that nobody has read yet.
    """

    id: int
    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    seed: int = 0
    prompt_tokens: int = 0
    in_chunks: int = 0
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    node: Node | None = None
    rank: int = 0
    since: int = 0
    finish: str = ""
    error: Exception | None = None
    counts: Counter[int] = field(default_factory=Counter)
    pieces: deque[str] = field(default_factory=deque)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: Any = None

    def __post_init__(self) -> None:
        self.prompt_tokens = self.in_chunks = len(self.tokens)
        self.rank = self.priority

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens that the model has not read. One that is being answered has 1."""
        return len(self.tokens) - self.computed


def check_tokens(tokens: Any, vocab: int, context: int) -> list[int]:
    """The tokens of a prompt. Raises ModelError: M106 for none or one out of range, M105 for more
    than fit into the context."""
    try:
        ids = np.asarray(tokens)
    except ValueError:
        ids = np.empty(0)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0:
        ids = np.empty(0)
    if not len(ids) or ids.max() >= vocab:
        rule = f"tokens must be 1 or more integers from 0 to {vocab - 1}"
        raise ModelError("M106", rule, where="tokens")
    if len(ids) >= context:
        rule = f"the prompt has {len(ids)} tokens, the context {context}"
        hint = "shorten it, or open the model with a larger context="
        raise ModelError("M105", rule, where="prompt", hint=hint)
    return [int(i) for i in ids]
