"""Lesson 7: a server's decode step, written with FlashInfer's calls.

    python examples/07_from_flashinfer.py        # needs PyTorch; a GPU is used where there is one

Only the import differs from a server on FlashInfer. Each step appends a key and a value to every
request's pages, plans once, and runs once a layer. Options, and the same in Tilewright's own nouns:
docs/coming-from-flashinfer.md.
"""

import numpy as np

try:
    import torch
except ImportError:
    raise SystemExit("this lesson needs PyTorch: pip install 'tilewright[torch]'") from None

from tilewright.ext import compat as flashinfer

LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 2, 8, 2, 64, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attend(q, k, v):
    """One query (heads, dim) over all keys (keys, kv_heads, dim), as the definition says."""
    k, v = (np.repeat(x, QO_HEADS // KV_HEADS, 1) for x in (k, v))
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), v)


if __name__ == "__main__":
    torch.manual_seed(0)
    lengths, steps, width = torch.tensor([30, 1, 15]), 20, 4
    requests = len(lengths)
    pool = [torch.zeros(16, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=DEVICE) for _ in range(LAYERS)]
    table = torch.randperm(16)[: requests * width].reshape(requests, width)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1, device=DEVICE), "NHD")
    seen = [[[np.zeros((0, KV_HEADS, HEAD_DIM))] * 2 for _ in lengths] for _ in range(LAYERS)]
    error = 0.0
    for step in range(steps):
        # The first step is the prompt, whose rows are appended together; then one row a request.
        new = lengths if step == 0 else torch.ones(requests, dtype=torch.int64)
        lengths = new if step == 0 else lengths + 1
        counts = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
        indptr = torch.cat([counts[:1] * 0, counts.cumsum(0)]).int()
        indices = torch.cat([table[r, :n] for r, n in enumerate(counts.tolist())]).int()
        last_page_len = ((lengths - 1) % PAGE_SIZE + 1).int()
        pages = [x.to(DEVICE) for x in (indices, indptr, last_page_len)]
        append_indptr = torch.cat([new[:1] * 0, new.cumsum(0)]).int().to(DEVICE)
        rows = int(new.sum())
        where = flashinfer.get_batch_indices_positions(
            append_indptr, lengths.int().to(DEVICE), rows
        )
        wrapper.plan(indptr, pages[0], last_page_len, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
        for layer in range(LAYERS):
            k, v = torch.randn(2, rows, KV_HEADS, HEAD_DIM, device=DEVICE)
            flashinfer.append_paged_kv_cache(k, v, *where, pool[layer], *pages)
            q = torch.randn(requests, QO_HEADS, HEAD_DIM, device=DEVICE)
            o = wrapper.run(q, pool[layer])
            for r, part in enumerate(seen[layer]):
                own = (where[0] == r).cpu().numpy()
                part[:] = (
                    np.concatenate([part[i], x.cpu().numpy()[own]]) for i, x in enumerate((k, v))
                )
                expected = attend(q[r].cpu().numpy(), *part)
                error = max(error, np.abs(o[r].cpu().numpy() - expected).max())
    print(f"{steps} steps of {requests} requests, farthest from NumPy: {error:.1e}")
