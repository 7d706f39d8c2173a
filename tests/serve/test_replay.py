"""`bench serve`: a small trace, replayed; its measures against hand-worked numbers."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import pytest

from bench import serve as bench_serve
from tilewright.errors import ArgumentError

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
    found = bench_serve.measures([first, second], 2.0, 4.0)
    assert found["requests/s"] == 0.5 and found["prompt tokens/s"] == 10
    assert found["answer tokens/s"] == 1
    assert found["ms first token p50"] == pytest.approx((500 + 250) / 2)
    assert found["ms gap p50"] == pytest.approx(150) and found["ms gap max"] == pytest.approx(200)


def test_a_replay(runnable_path: Path, tmp_path: Path):
    trace = tmp_path / "trace.csv.gz"
    trace.write_bytes(gzip.compress(TRACE.encode()))
    parser = argparse.ArgumentParser()
    bench_serve.serve_arguments(parser)
    options = ["--model", str(runnable_path), "--trace", str(trace), "--requests", "3",
               "--lengths", "0.5", "--step-tokens", "20"]  # fmt: skip
    rows = list(bench_serve.serve(parser.parse_args(options)))
    assert {row["op"] for row in rows} == {"serve.replay"} and rows[0]["width"] == 3
    values = {row["metric"]: row["value"] for row in rows}
    written, read = 2 + 3 + 2, 20 + 50 + 126
    assert values["answer tokens/s"] / values["prompt tokens/s"] == pytest.approx(written / read)
    assert values["ms gap max"] >= values["ms gap p99"] >= values["ms gap p50"] > 0


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", TRACE.replace(",40,", ",x,")], ids=len)
def test_files_that_are_no_trace(tmp_path: Path, text: str):
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match="A109"):
        bench_serve.read_trace(path, 5, 1.0, (128, 268))
    with pytest.raises(ArgumentError, match="A109"):
        bench_serve.read_trace(tmp_path / "none.csv", 5, 1.0, (128, 268))
