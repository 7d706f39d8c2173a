"""Lesson 8: attention over the pages that matter, other pages for each KV head.

    python examples/08_select.py

Three ways to score a page, a few lines each. The usual kernels attend to the pages with the highest
scores: a table with a row for each request and KV head, over a view of the same pool in which a
page has one head. Nothing is copied. With a budget of all pages the result is the dense one.
"""

import numpy as np

import tilewright as tw


def quest(q, k):
    """The most that a product with a key of the page can be, from the page's bounds in each
    dimension (Tang et al. 2024)."""
    low, high = k.min(2), k.max(2)  # (requests, pages, kv_heads, d): kept beside the cache
    q = q[:, None]  # (requests, 1, kv_heads, group, d)
    return np.maximum(q * low[..., None, :], q * high[..., None, :]).sum(-1).max(-1)


def block_mean(q, k):
    """Products with the mean key of the page (MoBA, Lu et al. 2025), as weights of a softmax that
    the heads of a group share (NSA, Yuan et al. 2025)."""
    scores = np.einsum("rhgd,rphd->rhgp", q, k.mean(2)) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).sum(2).transpose(0, 2, 1)


def indexer(q, k):
    """Σ w·relu(q·k) over a few small heads, the best key of a page (DeepSeek-V3.2). Here the first
    eight dimensions take the part of the indexer's own queries and keys."""
    w = np.ones(q.shape[1]) / q.shape[1]
    products = np.einsum("rhd,rpthd->rpth", q[:, :, 0, :8], k[..., :8])
    best = np.einsum("h,rpth->rpt", w, np.maximum(products, 0)).max(2)
    return np.repeat(best[..., None], q.shape[1], 2)


def chosen(scores, kv_len, page_size, budget):
    """The numbers of the best pages (requests, kv_heads, budget), ascending, and how many they are.
    The last page is always among them; numbers behind them belong to no page."""
    count = -(-kv_len // page_size)
    page = np.arange(scores.shape[1])[None, :, None]
    last = count[:, None, None] - 1
    scores = np.where(page == last, np.inf, np.where(page < last, scores, -np.inf))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :budget]
    best = np.where(best <= last, best, scores.shape[1])
    return np.sort(best, axis=1).transpose(0, 2, 1), np.minimum(count, budget)


def attend(q, pages, table, kv_len, best, kept):
    """o (requests, heads, d) over the chosen pages. `pages` (pages, 2, page_size, kv_heads, d)."""
    count, _, page_size, kv_heads, d = pages.shape
    # Heads of a page lie d elements apart: with pages that begin at every d-th element, page p of
    # head h is number 2·p·page_size·kv_heads + h, and holds that head alone.
    numbers = (2 * count - 1) * page_size * kv_heads - (page_size - 1) * kv_heads
    steps = np.array([d, kv_heads * d, d, 1]) * pages.itemsize
    k, v = (
        np.lib.stride_tricks.as_strided(pages[:, part], (numbers, page_size, 1, d), steps)
        for part in (0, 1)
    )
    padded = np.concatenate([table, table[:, :1]], 1)
    row = np.take_along_axis(padded[:, None], np.minimum(best, table.shape[1]), 2)
    row = row * (2 * page_size * kv_heads) + np.arange(kv_heads)[:, None]
    lengths = (kept - 1) * page_size + (kv_len - 1) % page_size + 1
    lengths = np.repeat(lengths, kv_heads).astype(np.int32)
    kv = tw.KV(tw.Table(lengths, row.reshape(len(lengths), -1).astype(np.int32)), tw.Pool(k, v))
    attn = tw.Attention(q.shape[1] // kv_heads, 1, d, variant=tw.Full())
    one_each = np.arange(len(lengths) + 1, dtype=np.int32)
    state = attn.run(q.reshape(len(lengths), -1, d), kv, attn.plan(one_each, kv))
    return state.o.reshape(q.shape)


def by_hand(q, keys, values):
    """One head's query over keys and values, as the definition says."""
    scores = keys.astype(np.float64) @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    requests, kv_heads, group, d, page_size, width = 3, 2, 4, 64, 16, 24
    kv_len = np.array([380, 17, 261], np.int32)
    pages = rng.standard_normal((80, 2, page_size, kv_heads, d), np.float32)
    table = rng.permutation(80)[: requests * width].reshape(requests, width).astype(np.int32)
    q = rng.standard_normal((requests, kv_heads * group, d), np.float32)

    attn = tw.Attention(kv_heads * group, kv_heads, d)
    kv = tw.KV(tw.Table(kv_len, table), tw.Pool(pages))
    dense = attn.run(q, kv, attn.plan(np.arange(requests + 1), kv)).o

    grouped = q.reshape(requests, kv_heads, group, d)
    for score in (quest, block_mean, indexer):
        scores = score(grouped, pages[:, 0][table])
        everything = chosen(scores, kv_len, page_size, width)
        assert np.array_equal(attend(q, pages, table, kv_len, *everything), dense)
        best, kept = chosen(scores, kv_len, page_size, budget=6)
        o = attend(q, pages, table, kv_len, best, kept)
        error = 0.0
        for r, head in np.ndindex(requests, kv_heads * group):
            own = table[r, best[r, head // group, : kept[r]]]
            keys, values = pages[own, :, :, head // group].transpose(1, 0, 2, 3).reshape(2, -1, d)
            n = (kept[r] - 1) * page_size + (kv_len[r] - 1) % page_size + 1
            error = max(error, np.abs(by_hand(q[r, head], keys[:n], values[:n]) - o[r, head]).max())
        share = kept.sum() / everything[1].sum()
        print(
            f"{score.__name__:10} {100 * share:3.0f} % of pages, farthest from NumPy: {error:.1e}"
        )
