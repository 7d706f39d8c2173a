"""The sampler: the next token of a request from its logits.

A token depends on the logits, the request's seed and its position in the answer, not on the batch.
"""

from __future__ import annotations

import numpy as np

from tilewright.serve.request import Request, Sampling, TokenLogprob

COLDEST = 1e-6  # a lower temperature samples as this one does, and overflows nothing
FIRST = 1024  # candidates of top_p that are sorted before all others


def sample(request: Request, logits: np.ndarray) -> int:
    """The next token of a request by its logits (vocab,)."""
    sampling = request.sampling
    scores = penalized(request, logits)
    token = int(scores.argmax())
    if sampling.temperature:
        uniform = np.random.default_rng((request.seed, request.answered)).random()
        token = draw(scores, sampling, uniform)
    if request.grammar is not None:
        request.grammar.consume_token(token)
    if sampling.logprobs is not None:
        request.logprobs.append(logprobs(logits, token, sampling.logprobs))
    return token


def penalized(request: Request, logits: np.ndarray) -> np.ndarray:
    """The logits after penalties and biases, float64 (vocab,)."""
    s, scores = request.sampling, logits.astype(np.float64)
    if s.repetition_penalty != 1:
        seen = np.unique(request.tokens)
        x = scores[seen]
        scores[seen] = np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
    if request.counts and (s.presence_penalty or s.frequency_penalty):
        tokens, counts = np.array([*request.counts.items()]).T
        scores[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if request.grammar is not None:
        mask = np.frombuffer(request.grammar.compute_bitmask(), np.uint8)
        scores[np.unpackbits(mask, bitorder="little", count=len(scores)) == 0] = -np.inf
    return scores


def draw(scores: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """A token by the inverse of the cumulative distribution, at a number of [0, 1)."""
    with np.errstate(under="ignore", over="ignore"):
        weights = np.exp((scores - scores.max()) / max(sampling.temperature, COLDEST))
    tokens = candidates(weights, sampling)
    sums = np.cumsum(weights if tokens is None else weights[tokens])
    choice = min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(sums) - 1)
    return choice if tokens is None else int(tokens[choice])


def candidates(weights: np.ndarray, s: Sampling) -> np.ndarray | None:
    """The tokens that top_k, top_p and min_p leave; None for all. `weights`: probabilities over
    that of the likeliest."""
    tokens = _largest(weights, s.top_k) if 0 < s.top_k < len(weights) else None
    if s.top_p < 1:
        wanted = s.top_p * (weights if tokens is None else weights[tokens]).sum()
        first = _largest(weights, FIRST) if tokens is None else tokens
        sums = np.cumsum(weights[first])
        if sums[-1] < wanted and tokens is None:
            first = _largest(weights, len(weights))
            sums = np.cumsum(weights[first])
        tokens = first[: int(np.searchsorted(sums, wanted)) + 1]
    if s.min_p and tokens is None:
        return np.flatnonzero(weights >= s.min_p)
    return tokens if tokens is None else tokens[weights[tokens] >= s.min_p]


def _largest(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, descending; ties go to the smaller index."""
    part = np.argpartition(-weights, min(count, len(weights)) - 1)[:count]
    return part[np.lexsort((part, -weights[part]))]


def logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """The log-probabilities of a token and of the `count` likeliest, by the model's own logits."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    top = _largest(x, count) if count else np.empty(0, int)
    return TokenLogprob(token, float(x[token]), tuple((int(i), float(x[i])) for i in top))
