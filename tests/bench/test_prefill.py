"""The batches of `bench prefill`, made small and run on the CPU: inputs, oracle and parts."""

from __future__ import annotations

import pytest
from bench.prefill import Batch, Case

from bench import prefill
from tilewright.attention.variant import SlidingWindow
from tilewright.toolchain import compilers

torch = pytest.importorskip("torch")

LIMIT = 8e-3  # of bfloat16, as the benchmark's own
CASES = [
    *(Case(variant, variant, 32, (64, 64), (64, 64)) for variant in prefill.VARIANTS),
    Case("pages", "causal", 32, (32, 32), (32, 32), 16),
    Case("append", "causal", 32, (4, 4), (48, 48), 16),
    Case("uneven", "causal", 32, (5, 1, 20), (5, 1, 20)),
    Case("mixed", "causal", 32, (32, 1, 1), (64, 48, 16), 16),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """On the CPU, by the NumPy reference; windows and documents shorter than a request."""
    monkeypatch.setattr(compilers, "has_compiler", lambda: False)
    monkeypatch.setattr(compilers, "warn_of_interpreter", lambda: None)
    monkeypatch.setattr(prefill, "require_torch", lambda: torch)
    for name, value in {"DEVICE": "cpu", "QO_HEADS": 4, "KV_HEADS": 2, "DOCUMENT": 16}.items():
        monkeypatch.setattr(prefill, name, value)
    monkeypatch.setattr(prefill, "WINDOW", 20)
    monkeypatch.setitem(prefill.VARIANTS, "window", SlidingWindow(window=20))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_our_result_agrees_with_the_oracle_and_a_wrong_one_does_not(case):
    batch = Batch(case)
    ours = batch.ours()
    assert batch.error(ours) < LIMIT
    assert batch.error(lambda: ours() + 0.05) > LIMIT
    for name, call in batch.peer("sdpa"):
        if name == "fa2":  # cuDNN has no CPU
            assert batch.error(call) < LIMIT


def test_parts_of_a_mixed_batch_are_its_rows():
    batch = Batch(CASES[-1])
    both, parts = batch.ours()(), batch.parts()
    assert torch.equal(torch.cat([call() for call in parts.values()]), both)


def test_pairs_are_those_that_the_mask_keeps():
    for case in CASES:
        for n, m in zip(case.queries, case.keys, strict=True):
            i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
            keep = torch.ones(n, m, dtype=torch.bool) if case.variant == "full" else j <= i
            if case.variant == "window":
                keep &= i - j < 20
            if case.variant == "document":
                keep &= i // 16 == j // 16
            assert case.pairs(n, m) == int(keep.sum())
