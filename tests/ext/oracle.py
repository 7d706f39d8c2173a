"""A float64 oracle of attention in FlashInfer's words, for the tests of the doors: plain NumPy,
one request and one head at a time. It shares no code with the package."""

from __future__ import annotations

import numpy as np
import torch


def as64(x):
    return x.detach().to("cpu", torch.float64).numpy()


def slopes(heads):
    n = 2 ** int(np.floor(np.log2(heads)))
    first = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    double = [2 ** (-8 * (i + 1) / (2 * n)) for i in range(2 * n)]
    return np.array(first + double[::2][: heads - n])


def attend(q, k, v, **options):
    """o and lse to base 2 of one request: `q` (rows, qo_heads, d), `k`, `v` (keys, kv_heads, d).

    `options`: causal, window_left, soft_cap, sm_scale, alibi, mask (rows, keys), sinks (qo_heads).
    """
    rows, heads, dim = q.shape
    keys, group = len(k), heads // k.shape[1]
    sm_scale = options.get("sm_scale") or dim**-0.5
    o, lse = np.zeros((rows, heads, v.shape[2])), np.full((rows, heads), -np.inf)
    row, key = np.arange(rows)[:, None], np.arange(keys)[None]
    place = row + keys - rows
    seen = np.ones((rows, keys), bool)
    if options.get("mask") is not None:
        seen &= options["mask"]
    elif options.get("causal"):
        seen &= key <= place
    if options.get("window_left", -1) >= 0:
        seen &= key >= place - options["window_left"]
    for head in range(heads):
        some = np.isfinite(k[:, head // group]).all(1)
        clean = np.where(some[:, None], k[:, head // group], 0)
        s = q[:, head] @ clean.T * sm_scale
        if options.get("soft_cap"):
            s = options["soft_cap"] * np.tanh(s / options["soft_cap"])
        if options.get("alibi"):
            s = s + slopes(heads)[head] * (key - row)
        s = np.where(seen, s, -np.inf)
        if options.get("sinks") is not None:
            s = np.concatenate([s, np.full((rows, 1), options["sinks"][head])], 1)
        for r in range(rows):
            top = s[r].max(initial=-np.inf)
            if top > -np.inf:
                w = np.exp(s[r] - top)
                lse[r, head] = (top + np.log(w.sum())) / np.log(2)
                o[r, head] = w[:keys] / w.sum() @ np.where(seen[r][:, None], v[:, head // group], 0)
    return o, lse


class Batch:
    """A random paged batch with NaN wherever no key is; pages in disorder."""

    def __init__(self, rng, kv_lens, qo_lens, shape, dtype=torch.float32, layout="NHD"):
        page_size, self.qo_heads, self.kv_heads, self.dim = shape
        self.page_size, self.layout, self.kv_lens, self.qo_lens = (
            page_size,
            layout,
            kv_lens,
            qo_lens,
        )
        counts = [-(-n // page_size) for n in kv_lens]
        total = sum(counts) + 3
        pages = torch.full(
            (total, 2, page_size, self.kv_heads, self.dim), float("nan"), dtype=dtype
        )
        names = rng.permutation(total)[: sum(counts)]
        self.indptr = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        self.indices = torch.tensor(names, dtype=torch.int32)
        last = [(n - 1) % page_size + 1 if n else 0 for n in kv_lens]
        self.last = torch.tensor(last, dtype=torch.int32)
        self.qo_indptr = torch.tensor(np.cumsum([0, *qo_lens]), dtype=torch.int32)
        self.keys, self.values = [], []
        for r, n in enumerate(kv_lens):
            both = torch.tensor(rng.standard_normal((2, n, self.kv_heads, self.dim))).to(dtype)
            for t in range(n):
                pages[names[int(self.indptr[r]) + t // page_size], :, t % page_size] = both[:, t]
            self.keys.append(as64(both[0]))
            self.values.append(as64(both[1]))
        self.pages = pages if layout == "NHD" else pages.transpose(2, 3).contiguous()
        q = rng.standard_normal((sum(qo_lens), self.qo_heads, self.dim))
        self.q = torch.tensor(q).to(dtype)

    def arrays(self):
        return self.indptr, self.indices, self.last

    def heads(self):
        return self.qo_heads, self.kv_heads, self.dim

    def expected(self, **options):
        """o and lse of all requests; masks: a list, one a request."""
        masks = options.pop("masks", [None] * len(self.kv_lens))
        parts, first = [], 0
        for r, n in enumerate(self.qo_lens):
            q = as64(self.q)[first : first + n]
            parts.append(attend(q, self.keys[r], self.values[r], mask=masks[r], **options))
            first += n
        nothing = (np.zeros((0, self.qo_heads, self.dim)), np.zeros((0, self.qo_heads)))
        return tuple(np.concatenate(x) for x in zip(nothing, *parts, strict=True))


def close(found, expected, tolerance=2e-5):
    """o and lse agree; −inf where −inf is expected."""
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(as64(x), y, rtol=tolerance, atol=tolerance)
