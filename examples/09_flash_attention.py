"""Lesson 9: flash attention, causal or full, as a tile program: one program, two schedules.

    python examples/09_flash_attention.py
    tilewright show examples/09_flash_attention.py llama --target cuda:sm_90a --stages

Each temporary is computed in the loop over keys, so that no score is ever stored: the softmax is
the online one, whatever the schedule. `plain` runs a row after the other; `tiles` gives a CTA a
block of rows, copies blocks of keys ahead, and keeps scores and weights in registers.
"""

import numpy as np

import tilewright as tw


def attention(group: int, causal: bool) -> tw.Definition:
    """Q: (m, heads, d), K and V: (n, heads / group, d): `group` query heads share K and V."""

    @tw.program
    def flash(Q=tw.dense("m h d"), K=tw.dense("n e d"), V=tw.dense("n e v"), scale=tw.scalar()):
        i, h, j, k, c = tw.indices("i:m h:h j:n k:d c:v")
        x = scale * tw.sum(Q[i, h, k] * K[j, h // group, k], over=k)
        seen = j - tw.size("n") <= i - tw.size("m")  # the last query sees the last key
        score = tw.temp.named("score")[i, h, j](tw.where(seen, x, -np.inf) if causal else x)
        top = tw.temp.named("top")[i, h](tw.max(score[i, h, j], over=j))
        weight = tw.temp.named("weight")[i, h, j](tw.exp(score[i, h, j] - top[i, h]))
        total = tw.temp.named("total")[i, h](tw.sum(weight[i, h, j], over=j))
        mixed = tw.sum(weight[i, h, j] * V[j, h // group, c], over=j)
        return tw.out[i, h, c](mixed * (1.0 / total[i, h]))

    return flash


def online(s: tw.Schedule, heads: int, group: int, d: int) -> tw.Schedule:
    """Everything in the loop over keys."""
    for temporary in ("score", "top", "weight", "total"):
        s = s.compute_at(temporary, "j")
    s = s.specialize("h", heads).specialize("e", heads // group)
    return s.specialize("d", d).specialize("v", d).order_axes("out", "h", "i", "j", "c")


def plain(s: tw.Schedule, *sizes: int) -> tw.Schedule:
    """A row after the other, all of its features at once."""
    return online(s, *sizes).vectorize("c").parallel("h")


def tiles(s: tw.Schedule, *sizes: int, rows=128, warps=4, keys=48, stages=2) -> tw.Schedule:
    """`rows` of a CTA, shared out among its warps, and `keys` at a time, in `stages` buffers. The
    last rows, which see most keys, come first."""
    s = online(s, *sizes).split("i", rows, into=("i_cta", "i_r"))
    s = s.split("i_r", rows // warps, into=("i_y", "i_w")).split("j", keys, into=("j_o", "j_r"))
    for loop, inner in (("i_w", "i"), ("j_r", "j"), ("k", "k"), ("c", "c")):
        s = s.split(loop, 16, into=(f"{inner}_u", f"{inner}_v"))
    s = s.reverse("i_cta").reorder("i_cta_back", "h", "j_o", "i_y", "i_u", "i_v", "j_u", "j_v")
    s = s.unroll("i_u").unroll("j_u").unroll("c_u").unroll("k_u", 8)
    s = s.mma("i_v", "j_v", "k_v").mma("i_v", "c_v", "j_v")  # scores; weights times V
    s = s.bind("i_cta_back", "cta.x").bind("h", "cta.x").bind("i_y", "thread.y")
    s = s.cache("Q", "h", "shared").cache("K", "j_o", "shared").cache("V", "j_o", "shared")
    return s.pipeline("j_o", stages)


halves = {"Q": "bfloat16", "K": "bfloat16", "V": "bfloat16"}
llama = attention(4, causal=True).typed(**halves).schedule(lambda s: tiles(s, 32, 4, 128))

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    heads, group, d, m, n = 4, 2, 32, 100, 170
    Q, K, V = (rng.standard_normal((x, h, d)).astype(np.float16)
               for x, h in ((m, heads), (n, heads // group), (n, heads // group)))  # fmt: skip
    k, v = (np.repeat(x, group, 1).astype(np.float64) for x in (K, V))
    scores = np.einsum("ihd,jhd->hij", Q, k) * d**-0.5
    scores = np.where(np.arange(n) - n <= np.arange(m)[:, None] - m, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)
    program = attention(group, causal=True).typed(Q="float16", K="float16", V="float16")
    sizes = heads, group, d
    recipes = {
        "plain": lambda s: plain(s, *sizes),
        "tiles": lambda s: tiles(s, *sizes, rows=32, warps=2),
    }
    for name, recipe in recipes.items():
        error = np.abs(program.schedule(recipe).build()(Q, K, V, d**-0.5) - expected).max()
        print(f"{name:6} farthest from NumPy: {error:.1e}")
