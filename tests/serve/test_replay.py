"""`bench serve`: a small trace, replayed; its measures against hand-worked numbers."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers compute with PyTorch")
pytest.importorskip("transformers", reason="a peer")
from tests.serve.test_families import SIZES  # noqa: E402

from bench import peer_models, serve_long, serve_loop, serve_peers, serve_steps  # noqa: E402
from bench import serve as bench_serve  # noqa: E402
from tilewright.errors import ArgumentError  # noqa: E402

TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.0000000,40,5\n"
    "2023-11-16 18:15:46.1000000,100,7\n"
    "2023-11-16 18:15:46.3000000,4000,400\n"
    "2023-11-16 18:16:46.3000000,8,8\n"
)


def test_measures():
    first = bench_serve.Job(0.0, [1] * 10, 3, times_s=[0.5, 0.6, 0.8])
    second = bench_serve.Job(2.0, [1] * 30, 1, times_s=[1.25])
    found = bench_serve.measures([first, second], bench_serve.Pace(2.0), 4.0)
    assert found["requests/s"] == 0.5 and found["prompt tokens/s"] == 10
    assert found["answer tokens/s"] == 1
    assert found["ms first token p50"] == pytest.approx((500 + 250) / 2)
    assert found["ms gap p50"] == pytest.approx(150) and found["ms gap max"] == pytest.approx(200)


def rows_of(folder: Path, *options: str) -> list[bench_serve.Row]:
    """The rows of three requests of half the lengths."""
    trace, parser = folder / "trace.csv.gz", argparse.ArgumentParser()
    trace.write_bytes(gzip.compress(TRACE.encode()))
    bench_serve.serve_arguments(parser)
    sizes = "--trace", str(trace), "--requests", "3", "--lengths", "0.5", "--step-tokens", "20"
    return list(bench_serve.serve(parser.parse_args([*sizes, *options])))


def test_goodput_worked_by_hand():
    """Gaps of 20 and 40 ms behind a first token after 500 ms, one after 1.25 s, one not done."""
    jobs = [
        bench_serve.Job(0.0, [1] * 10, 3, times_s=[0.5, 0.52, 0.56], cached=4),
        bench_serve.Job(2.0, [1] * 30, 1, times_s=[2.25]),
        bench_serve.Job(0.0, [1] * 10, 3, times_s=[0.5]),
    ]
    found = bench_serve.goodput(jobs, bench_serve.Pace(2.0), 4.0, 1000.0, [10.0, 41.0])
    wanted = {"goodput requests/s, 10 ms": 0.0, "goodput requests/s, 41 ms": 0.25}
    assert found == wanted
    late = bench_serve.goodput(jobs, bench_serve.Pace(2.0), 4.0, 2000.0, [10.0, 41.0])
    assert late == {"goodput requests/s, 10 ms": 0.25, "goodput requests/s, 41 ms": 0.5}
    assert bench_serve.measures(jobs, bench_serve.Pace(2.0), 4.0)["hit rate"] == 4 / 50


def test_a_replay(runnable_path: Path, tmp_path: Path):
    line = tmp_path / "line.json"
    rows = rows_of(tmp_path, "--model", str(runnable_path), "--timeline", str(line))
    events = json.loads(line.read_text(encoding="utf-8"))["traceEvents"]
    steps = [e for e in events if e["pid"] == 0]
    assert {e["name"] for e in steps} >= {"prefill", "decode"} and len(events) == len(steps) + 6
    assert all(e["dur"] > 0 for e in steps) and all(e["ts"] >= 0 for e in steps)
    assert sum(str(e["args"]["decision"]).count("+") for e in steps) == 3, "each is admitted once"
    assert {row["op"] for row in rows} == {"serve.replay"} and rows[0]["width"] == 3
    assert all(list(row["peers_missing"]) == [*bench_serve.PEERS] for row in rows)
    values = {row["metric"]: row["value"] for row in rows}
    written, read = 2 + 3 + 2, 20 + 50 + 126
    assert values["answer tokens/s"] / values["prompt tokens/s"] == pytest.approx(written / read)
    assert values["ms gap max"] >= values["ms gap p99"] >= values["ms gap p50"] > 0


def test_the_parts_of_a_step_worked_by_hand():
    """A layer and the head, twice: q, k, v · rotation · attention in two launches · o · a sum in
    two parts · gate and up · SiLU · down · head · the largest."""
    names = ["step", "nvjet", "step", "decode", "Memset", "prefill", "nvjet_splitK", "splitKreduce",
             "step", "gemm", "step", "nvjet", "step", "nvjet", "step"]  # fmt: skip
    took = [5, 100, 7, 30, 1, 40, 20, 3, 9, 200, 11, 90, 9, 50, 4]
    launches, at = list[serve_steps.Launch](), 0.0
    for _ in range(2):
        at += 1000.0  # between two runs
        for name, us in zip(names, took, strict=True):
            launches.append((at, at + us, name))
            at += us + (2.0 if name == "gemm" else 0.0)
    found = serve_steps.parts(launches, 2, 1)
    assert found == pytest.approx(
        {"products_ms": 0.463, "attention_ms": 0.070, "between_ms": 0.046, "idle_ms": 0.002}
    )
    own = [
        (a, b, "own head" if name == "nvjet" and b - a == 50 else name) for a, b, name in launches
    ]
    found = serve_steps.parts(own, 2, 1)  # a head that no library reads
    assert found["attention_ms"] == pytest.approx(0.070)
    assert found["products_ms"] == pytest.approx(0.413)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", TRACE.replace(",40,", ",x,")], ids=len)
def test_files_that_are_no_trace(tmp_path: Path, text: str):
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match="A109"):
        bench_serve.read_trace(path, 5, 1.0, (128, 268))
    with pytest.raises(ArgumentError, match="A109"):
        bench_serve.read_trace(tmp_path / "none.csv", 5, 1.0, (128, 268))


def test_measures_of_a_replay_that_ended_early():
    """Of three requests one has ended, one has begun, one has not."""
    ended = bench_serve.Job(0.0, [1] * 10, 2, times_s=[0.5, 0.6])
    begun = bench_serve.Job(0.0, [1] * 20, 2, times_s=[0.7])
    jobs = [ended, begun, bench_serve.Job(0.0, [1], 9)]
    found = bench_serve.measures(jobs, bench_serve.Pace(), 2.0)
    assert found["done"] == 1 and found["requests/s"] == 0.5
    assert found["answer tokens/s"] == 1.5 and found["prompt tokens/s"] == 15
    assert found["ms first token p50"] == pytest.approx(600)
    assert found["ms gap max"] == pytest.approx(100)


# ---------------------------------------------------------------------------- peers


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """The sizes of other tests, whose kernels are built already."""
    keys = {k: v for k, v in SIZES.items() if not k.endswith("token_id")}
    monkeypatch.setitem(peer_models.SHAPES, "tiny", peer_models.SHAPES["tiny"] | keys)
    monkeypatch.setattr(serve_peers, "FIT_S", 1e-3)


def setting(jobs: list[bench_serve.Job]) -> serve_peers.Setting:
    """Two seats of 64 tokens, and 20 tokens a step."""
    return serve_peers.Setting(
        serve_peers.random_model("tiny", "cpu"), tuple(jobs), bench_serve.Pace(1e6),
        seats=2, chunk=20, context=64, ttft_ms=1e6, itl_ms=(1e6,), cost=None,
        fixed=(20, 40),
    )  # fmt: skip


def test_fixed_chunks_worked_by_hand():
    """Two seats and 20 tokens a step: answers first, then prompts by arrival; a seat is taken again
    as soon as its answer has ended."""
    jobs = [bench_serve.Job(0.0, [1] * 15, 2), bench_serve.Job(1e-9, [2] * 12, 1),
            bench_serve.Job(2e-9, [3] * 4, 1)]  # fmt: skip
    steps = []

    def step(rows: Sequence[serve_loop.Row]) -> list[int]:
        steps.append([(row.seat, row.start, len(row.tokens)) for row in rows])
        return [10 * row.tokens[-1] for row in rows]

    serve_peers.in_chunks(jobs, step, setting(jobs), bench_serve.Pace())
    assert steps == [[(1, 0, 15), (0, 0, 5)], [(1, 15, 1), (0, 5, 7)], [(0, 0, 4)]]
    assert [job.tokens for job in jobs] == [[10, 100], [20], [30]]
    assert all(job.is_done for job in jobs)


def test_peers_give_equal_tokens():
    """Each peer serves the same requests of the same weights: greedy tokens are equal."""
    rng = np.random.default_rng(0)
    jobs = [bench_serve.Job(0.01 * n, rng.integers(3, 112, size).tolist(), answer)
            for n, (size, answer) in enumerate(((30, 6), (9, 8), (1, 3), (41, 2)))]  # fmt: skip
    given = setting(jobs)
    served = [
        x
        for name in ("loop", "transformers", "generate", "ours")
        for x in serve_peers.PEERS[name](given)
    ]
    assert len(served) == 1 + 2 + 4
    for one in served:
        assert [job.tokens for job in one.jobs] == [job.tokens for job in served[0].jobs], one.impl
        assert all(job.is_done and np.all(np.diff(job.times_s) >= 0) for job in one.jobs)
        assert serve_peers.goodput(one, given, 1e6)["goodput 1e+06 ms"] > 0


def test_peers_that_are_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Each row says which did not run, and why."""
    rows = rows_of(tmp_path, "--shape", "tiny", "--speed", "1e6", "--peers", "loop", "llama.cpp")
    assert [row["impl"] for row in rows] == ["loop over torch"]
    missing = rows[0]["peers_missing"]
    assert missing.pop("llama.cpp").startswith("it takes a GGUF file")
    assert missing == dict.fromkeys(("transformers", "generate"), "not asked for")
    assert "without llama.cpp: it takes" in capsys.readouterr().err


def test_a_long_prompt_among_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gaps count from the last token in front of the prompt: one is as long as its steps."""
    monkeypatch.setattr(serve_long, "PROMPT", 9)
    monkeypatch.setattr(serve_long, "ANSWERED", 100)
    monkeypatch.setattr(serve_long, "LAST", 3)
    long = "--long-prompt", "40", "--running", "3", "--itl-ms", "1e6", "--shape", "tiny"
    monkeypatch.setattr(serve_long, "FIT_S", 1e-3)
    rows = rows_of(tmp_path, *long)
    found = {row["metric"]: row["value"] for row in rows}
    assert 0 < found["ms gap p99"] <= found["ms longest gap"]
    assert [row["ratio"] for row in rows].count(None) == 3


def test_prompts_of_mooncake_begin_alike(tmp_path: Path):
    """Equal blocks are equal tokens, in every request; lengths are cut to fit."""
    blocks = (2000, 10, [0, 1, 2, 3]), (1030, 20, [0, 1, 9]), (40, 5000, [7])
    rows = [
        {"timestamp": 1000 * i, "input_length": n, "output_length": m, "hash_ids": ids}
        for i, (n, m, ids) in enumerate(blocks)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second, third = bench_serve.read_trace(trace, 3, 1.0, (4096, 300))
    assert [len(job.prompt) for job in (first, second, third)] == [2000, 1030, 40]
    assert [job.answer for job in (first, second, third)] == [10, 20, 4096 - 40]
    assert first.prompt[:1024] == second.prompt[:1024] and first.prompt[:40] != third.prompt
    assert first.prompt[1024:1030] != second.prompt[1024:]
    halves = bench_serve.read_trace(trace, 3, 0.5, (4096, 300))
    assert [len(job.prompt) for job in halves] == [1000, 515, 20]
    assert len(set(first.prompt)) > 200 and 3 <= min(first.prompt) <= max(first.prompt) < 300
    assert [job.arrival_s for job in (first, second, third)] == [0.0, 1.0, 2.0]
