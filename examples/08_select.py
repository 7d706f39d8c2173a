"""Lesson 8: attention over the pages that matter, other pages for each KV head.

    python examples/08_select.py

Four programs that score the pages of a request, a few lines each. `chosen.run` computes the scores
and takes the best pages into a page table; the usual kernels attend to those. Nothing is copied.
With a budget of all pages the result is the dense one. On a GPU the same calls are recorded in a
CUDA graph (docs/attention/select.md).
"""

import numpy as np

import tilewright as tw


@tw.select
def quest(q=tw.dense("r h g d"), ends=tw.sparse("r p h e d")):
    """The most that a product with a key of the page can be (Quest, Tang et al. 2024). `ends`: the
    greatest and the least of its keys in each dimension, which positive and negative elements of
    the query meet."""
    r, h, p, g, e, d = tw.indices("r h p g e d")
    x = q[r, h, g, d]
    part = tw.where(tw.equal(e, 0), tw.maximum(x, 0.0), tw.minimum(x, 0.0))
    part = tw.temp.typed(q.dtype)[r, h, g, e, d](part)
    most = tw.sum(part[r, h, g, e, d] * ends[r, p, h, e, d], over=(e, d))
    return tw.out.typed("float32")[r, h, p](tw.max(most, over=g))


@tw.select
def block_mean(q=tw.dense("r h g d"), mean=tw.sparse("r p h d")):
    """Products with the mean key of the page (MoBA, Lu et al. 2025), added up over a group."""
    r, h, p, g, d = tw.indices("r h p g d")
    return tw.out.typed("float32")[r, h, p](tw.sum(q[r, h, g, d] * mean[r, p, h, d], over=(g, d)))


@tw.select
def block_weight(q=tw.dense("r h g d"), mean=tw.sparse("r p h d")):
    """The weights of pages in a softmax, added up over a group (NSA, Yuan et al. 2025)."""
    r, h, p, g, d = tw.indices("r h p g d")
    s = tw.temp.named("s")[r, h, p, g](tw.sum(q[r, h, g, d] * mean[r, p, h, d], over=d))
    kept = tw.stored(mean[r, p, h, 0])
    top = tw.temp.named("top")[r, h, g](tw.max(s[r, h, p, g], over=p, where=kept))
    weight = tw.exp(s[r, h, p, g] - top[r, h, g])
    total = tw.temp.named("total")[r, h, g](tw.sum(weight, over=p, where=kept))
    return tw.out.typed("float32")[r, h, p](tw.sum(weight / total[r, h, g], over=g))


@tw.select
def indexer(q=tw.dense("r i d"), w=tw.dense("r i"), k=tw.sparse("r p s d")):
    """Σ w·relu(q·k) over small heads of an indexer, the best key of a page (DeepSeek-V3.2, where a
    page is one key). All KV heads have the same pages."""
    r, p, s, i, d = tw.indices("r p s i d")
    product = tw.sum(q[r, i, d] * k[r, p, s, d], over=d)
    score = tw.sum(w[r, i] * tw.maximum(product, 0.0), over=i)
    return tw.out.typed("float32")[r, p](tw.max(score, over=s))


def by_hand(q, keys, values):
    """One head's query over keys and values, as the definition says."""
    scores = keys.astype(np.float64) @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    requests, kv_heads, group, d, page_size, width, budget = 3, 2, 4, 64, 16, 24, 6
    kv_len = np.array([380, 17, 261], np.int32)
    pages = rng.standard_normal((80, 2, page_size, kv_heads, d), np.float32)
    table = rng.permutation(80)[: requests * width].reshape(requests, width).astype(np.int32)
    q = rng.standard_normal((requests, kv_heads * group, d), np.float32)
    one_each = np.arange(requests + 1)

    attn = tw.Attention(kv_heads * group, kv_heads, d)
    kv = tw.KV(tw.Table(kv_len, table), tw.Pool(pages))
    dense = attn.run(q, kv, attn.plan(one_each, kv)).o

    keys, grouped = pages[:, 0], q.reshape(requests, kv_heads, group, d)
    arguments = {
        quest: {"q": grouped, "ends": np.stack((keys.max(1), keys.min(1)), 2)},
        block_mean: {"q": grouped, "mean": keys.mean(1)},
        block_weight: {"q": grouped * d**-0.5, "mean": keys.mean(1)},
        indexer: {
            "q": rng.standard_normal((requests, 4, 8), np.float32),
            "w": rng.random((requests, 4), np.float32),
            "k": rng.standard_normal((80, page_size, 8), np.float32),
        },
    }
    for scores, named in arguments.items():
        for count in (width, budget):
            chosen = scores(attn, kv, pages=count)
            few = tw.KV(chosen.run(**named), tw.Pool(pages))
            o = attn.run(q, few, attn.plan(one_each, few)).o
            if count == width:
                assert np.array_equal(o, dense)
        error = 0.0
        for r, head in np.ndindex(requests, kv_heads * group):
            n, own = chosen.table.arrays["kv_len"][r], chosen.table.arrays["table_entries"][r]
            own = own[head // group] if own.ndim == 2 else own
            own = own[: -(-n // page_size)]
            k, v = pages[own, :, :, head // group].transpose(1, 0, 2, 3).reshape(2, -1, d)[:, :n]
            error = max(error, np.abs(by_hand(q[r, head], k, v) - o[r, head]).max())
        share = few.lengths().sum() / kv_len.sum()
        name = scores.args[0].name
        print(f"{name:12} {100 * share:3.0f} % of keys, farthest from NumPy: {error:.1e}")
