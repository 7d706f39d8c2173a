"""The batches of `bench prefill`, made small and run on the CPU: inputs, oracle and parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.prefill import Batch, Case

from bench import prefill, prefill_trace, roofline
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
            if case.variant == "tree":
                keep = torch.from_numpy(prefill.ancestors(n))
            if case.variant == "document":
                keep &= i // 16 == j // 16
            assert case.pairs(n, m) == int(keep.sum())


def _marks(steps: int) -> list[list[tuple[int, int]]]:
    """What a CTA leaves whose consumers do two items of `steps` steps."""
    state = {name: n for n, name in enumerate(prefill_trace.states())}
    step = ("WAIT_TILE", "ISSUE", "WAIT_SCORES", "MAXIMA", "WEIGHTS", "WAIT_OUTPUTS")
    item = ["WAIT_ITEM", "ISSUE", "WRITE", *step * steps]
    lines = [["SORT_TILES", "WAIT_STAGE", "END"]] + [["WAIT_STAGE", "LOAD", "END"]] * 3
    lines += [[*item, *item, "END"]] * 8
    start = 2**31 - 40  # the counter of cycles turns negative on the way
    return [
        [((start + 10 * i + warp + 2**31) % 2**32 - 2**31, state[name]) for i, name in enumerate(x)]
        + [(0, 0)] * 5
        for warp, x in enumerate(lines)
    ]


def test_a_trace_is_written_read_and_drawn(tmp_path):
    marks = _marks(9)
    found = prefill_trace.spans(marks, prefill_trace.warp_names(12, 2))
    assert {s.warp for s in found} == {"scheduler", "loader K", "loader V", "loader Q"} | {
        f"consumer {group}.{warp}" for group in range(2) for warp in range(4)
    }
    assert {s.end - s.begin for s in found} == {10}
    assert min(s.begin for s in found) == 0
    line = [s.state for s in found if s.warp == "consumer 1.3"]
    assert line[:5] == ["WAIT_ITEM", "ISSUE", "WRITE", "WAIT_TILE", "ISSUE"]
    assert len(line) == 2 * (3 + 6 * 9)
    file = tmp_path / "trace.json"
    prefill_trace.write(file, found)
    assert prefill_trace.read(file) == found
    begin, end = prefill_trace.window(found)
    second = [s.begin for s in found if s.warp == "consumer 0.0" and s.state == "WRITE"][1]
    assert begin < second < end
    prefill_trace.draw(found, tmp_path / "trace.svg")
    text = (tmp_path / "trace.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("loader K", "consumer 1", "cycles", "weights"))
    assert len(text) < 60_000


def test_each_state_is_drawn_in_a_colour_or_is_a_wait():
    for name in prefill_trace.states():
        assert name in prefill_trace.COLOURS or name.startswith("WAIT") or name == "END"


def test_the_roofline_of_a_row():
    """By hand: 8 requests of 2048 tokens, causal, are products; 16 tokens on 32768 keys are bytes;
    a device that nobody knows has none."""
    products = next(c for c in prefill.cases() if c.name == "causal 2048" and c.head_dim == 128)
    flops = 8 * 4 * 128 * 4 * (2048 * 2049 // 2)  # 4 query heads here
    assert products.flops == flops
    assert roofline.least_ms("NVIDIA H200", flops, products.nbytes) == pytest.approx(
        flops / 989.4e9
    )
    few = next(c for c in prefill.cases() if c.name == "append 16 on 32768")
    nbytes = 2 * 2 * 128 * (4 * 16 * 16 + 2 * 16 * 32768)  # q and o; K and V of 2 KV heads
    assert few.nbytes == nbytes
    assert roofline.share("NVIDIA H200", few.flops, nbytes, 1.0) == pytest.approx(nbytes / 4.8e9)
    assert roofline.share("a CPU", few.flops, nbytes, 1.0) is None


def test_kept_rows_have_their_roofline(monkeypatch):
    """Those of an H200: 32 query heads, 8 KV heads."""
    monkeypatch.undo()
    by_name = {(c.name, c.head_dim): c for c in prefill.cases()}
    path = Path(__file__).parents[2] / "bench/results/h200/prefill.jsonl"
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    kept = [row for row in rows if "roofline" in row]
    assert kept
    for row in kept:
        case = by_name[row["input"], row["width"]]
        wanted = roofline.share(row["device"], case.flops, case.nbytes, row["ms"])
        assert row["roofline"] == pytest.approx(wanted) and 0 < row["roofline"] < 1
