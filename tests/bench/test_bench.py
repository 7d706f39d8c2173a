"""Benchmarks: wrong results are caught, ratios are of the best right peer, rows are complete."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.harness import Contender
from tests.compiler.bsr_spmm import bsr_spmm

import tilewright as tw
from bench import (
    attention,
    blocks,
    cascade,
    gemm,
    graphs,
    harness,
    host,
    host_attention,
    model,
    peers,
    plot,
    sparse,
)
from tilewright import ops
from tilewright.errors import ArgumentError
from tilewright.toolchain import compilers

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("suite", "op", "input", "width", "dtype", "target", "impl", "ms", "metric", "value")
FIELDS += ("ratio", "device", "commit", "versions", "nnz")


def random_graph(rng: np.random.Generator, rows=300, cols=200) -> graphs.Graph:
    stored = rng.random((rows, cols)) < rng.random((rows, 1)) ** 3
    stored[::7] = False
    indptr = np.concatenate([[0], np.cumsum(stored.sum(1))]).astype(np.int32)
    indices = np.nonzero(stored)[1].astype(np.int32)
    values = rng.standard_normal(len(indices), np.float32)
    return graphs.Graph("random", indptr, indices, values, (rows, cols))


def dense_of(graph: graphs.Graph) -> np.ndarray:
    dense = np.zeros(graph.shape, np.float32)
    dense[np.repeat(np.arange(graph.shape[0]), graph.lengths), graph.indices] = graph.values
    return dense


# ---- the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_oracle_accepts_rounding_and_nothing_else(rng, dtype, sampled, monkeypatch):
    if sampled:  # the rows it looks at in full are few; one projection covers the others
        monkeypatch.setattr(sparse, "_SAMPLED_ROWS", 16)
    graph = random_graph(rng)
    values = sparse.rounded_to(graph.values, dtype).astype(np.float64)
    x = sparse.rounded_to(rng.standard_normal((200, 24), np.float32), dtype)
    x = x.astype(np.float64)
    oracle = sparse.SpmmOracle(graph, values, x, dtype)
    whole = dense_of(graph).astype(np.float64)
    whole[whole != 0] = values[values != 0]
    kind = np.float64 if dtype == "float64" else np.float32
    y = sparse.rounded_to((whole @ x).astype(kind), dtype)
    assert oracle.wrong(y) == ""
    assert "wrong shape" in oracle.wrong(y[1:])
    # A row that the projection sees well: of one near its kernel it may take 1.5 y for y.
    full = int(np.argmax(np.abs(y.astype(np.float64) @ oracle.vector)))
    for spoil in (lambda a: a * 1.5, np.zeros_like, lambda a: a + np.nan):
        bad = y.copy()
        bad[full] = spoil(bad[full])
        assert "WRONG" in oracle.wrong(bad)
    empty = int(np.argmin(graph.lengths))
    bad = y.copy()
    bad[empty, 3] = 1  # a row that is empty must be zero
    assert "WRONG" in oracle.wrong(bad)


def test_the_oracle_sees_one_entry_left_out(rng):
    graph = random_graph(rng)
    x = rng.standard_normal((200, 8))
    oracle = sparse.SpmmOracle(graph, graph.values.astype(np.float64), x, "float32")
    dense = dense_of(graph).astype(np.float64)
    at = int(np.argmax(np.abs(graph.values)))
    row = int(np.searchsorted(graph.indptr, at, side="right") - 1)
    dense[row, graph.indices[at]] = 0
    assert "WRONG" in oracle.wrong((dense @ x).astype(np.float32))


def test_the_sddmm_oracle(rng):
    graph = random_graph(rng)
    p, q = rng.standard_normal((300, 24)), rng.standard_normal((200, 24))
    oracle = sparse.SddmmOracle(graph, graph.values.astype(np.float64), (p, q), "float32")
    full = dense_of(graph) * (p @ q.T)
    right = full[np.repeat(np.arange(300), graph.lengths), graph.indices].astype(np.float32)
    assert oracle.wrong(right) == ""
    assert "WRONG" in oracle.wrong(np.roll(right, 1))
    bad = right.copy()
    bad[5] = np.inf
    assert oracle.wrong(bad) == "not finite"


# ---- comparing --------------------------------------------------------------------------------


def test_the_ratio_is_that_of_the_best_right_peer():
    def sleeper(seconds: float):
        return lambda: time.sleep(seconds) or np.array([seconds])

    def contender(name: str, seconds: float, ours=False):
        return Contender(name, sleeper(seconds), np.asarray, is_ours=ours, is_default=ours)

    wrong = contender("hasty", 0.0)
    slow, fast = contender("slow", 0.02), contender("fast", 0.004)
    ours = contender("tilewright", 0.002, ours=True)

    def check(result: np.ndarray) -> str:
        return "WRONG" if result[0] == 0 else ""

    rows = harness.compare({"target": "cpp"}, [wrong, slow, fast, ours], check, 1e6)
    by_name = {r["impl"]: r for r in rows}
    assert rows[-1]["impl"] == "tilewright"
    assert by_name["hasty"]["wrong"] == "WRONG" and by_name["hasty"]["ms"] is None
    best = min(by_name[name]["ms"] for name in ("slow", "fast"))  # as measured on a busy machine
    expected = best / by_name["tilewright"]["ms"]
    assert by_name["tilewright"]["ratio"] == pytest.approx(expected)
    assert [r["impl"] for r in rows if r["ratio"] is not None] == ["tilewright"]


def test_summary_has_the_mean_and_the_worst():
    rows = [
        {"input": "a", "width": 32, "ratio": 4.0},
        {"input": "b", "width": 32, "ratio": 1.0},
        {"input": "c", "width": 64, "ratio": None},
    ]
    text = harness.summary(rows)
    assert "geometric mean  2.00 of 2" in text and "worst  1.00 (b, 32)" in text
    assert "64" not in text


def test_a_device_name_becomes_a_folder_name():
    assert harness.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert (
        harness.slug("Intel(R) Xeon(R) CPU @ 2.70GHz, 2 threads") == "intel-xeon-2-70ghz-2-threads"
    )


# ---- the command line -------------------------------------------------------------------------


def test_the_module_lists_its_suites():
    command = [sys.executable, "-m", "bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and all(name in done.stdout for name in harness.SUITES)


@pytest.fixture
def brief(monkeypatch):
    """Timings nobody will read."""
    monkeypatch.setattr(harness, "MAX_ROUNDS", 1)
    monkeypatch.setattr(harness, "MIN_ROUNDS", 1)


@pytest.fixture
def folder(tmp_path, rng):
    graph = random_graph(rng)
    path = tmp_path / "data"
    path.mkdir()
    arrays: dict[str, Any] = {
        "indptr": graph.indptr,
        "indices": graph.indices,
        "shape": np.array(graph.shape),
    }
    np.savez(path / "mine.npz", **arrays)
    return path


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bench_spmm_prints_and_keeps_complete_rows(brief, folder, tmp_path, capsys, dtype):
    pytest.importorskip("scipy")
    command = ["spmm", "--data", str(folder), "--width", "16", "20", "--dtype", dtype]
    assert harness.main([*command, "--json", "--keep", str(tmp_path / "kept")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert all(field in row for row in rows for field in FIELDS)
    assert {r["width"] for r in rows} == {16, 20} and {r["input"] for r in rows} == {"mine"}
    assert not any(r.get("wrong") for r in rows)
    default = [r for r in rows if r["ratio"] is not None]
    assert [r["impl"] for r in default] == ["tilewright"] * 2
    assert all(r["pack_ms"] >= 0 for r in default)
    (kept,) = (tmp_path / "kept").glob("*/*.jsonl")
    assert kept.name == f"spmm-{dtype}.jsonl"
    assert rows_of(kept.read_text(encoding="utf-8")) == rows


def test_bench_draws_a_picture(brief, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    picture = tmp_path / "ratios.png"
    command = ["spmm", "--data", str(folder), "--width", "16", "--plot", str(picture)]
    assert harness.main(command) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "geometric mean" in capsys.readouterr().out


def test_bench_sddmm(brief, folder, capsys):

    command = ["sddmm", "--data", str(folder), "--width", "24", "--json"]
    assert harness.main(command) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[-1]["impl"] == "tilewright" and rows[-1]["ratio"] > 0
    assert not any(r.get("wrong") for r in rows)


def test_bench_spgemm(brief, tmp_path, rng, capsys, monkeypatch):
    pytest.importorskip("scipy")
    mask = np.triu(rng.random((40, 40)) < 0.1, 1)
    rows, cols = np.nonzero(mask)
    indptr = np.searchsorted(rows, np.arange(41))
    np.savez(tmp_path / "square.npz", indptr=indptr, indices=cols, shape=np.array([40, 40]))
    command = ["spgemm", "--data", str(tmp_path), "--json"]
    assert harness.main(command) == 0
    found = rows_of(capsys.readouterr().out)
    assert [r["op"] for r in found if r["ratio"]] == ["spgemm", "add", "multiply"]
    assert not any(r.get("wrong") for r in found)

    right = ops.spgemm

    def wrong(a, b):
        c = right(a, b)
        return c.with_values(c.entry_values() * np.float32(1.01))

    monkeypatch.setattr(ops, "spgemm", wrong)
    wrong.__name__ = "spgemm"
    assert harness.main(command) == 1
    assert harness.main([*command, "--dtype", "float16"]) == 2


def test_peers_of_sddmm_agree_with_the_oracle(brief, rng):
    graph = random_graph(rng)
    pq = sparse.operands([(300, 24), (200, 24)], "float32", "cpp")
    oracle = sparse.SddmmOracle(graph, graph.values.astype(float), pq.exact, "float32")
    found = list(peers.sddmm_peers(graph, graph.values, pq.arrays, "float32", "cpp"))
    assert "numpy gather" in [c.impl for c in found]
    assert [oracle.wrong(c.to_host(c.run())) for c in found] == [""] * len(found)


def test_a_wrong_result_of_ours_fails_the_run(brief, folder, capsys, monkeypatch):

    right = ops.spmm
    monkeypatch.setattr(ops, "spmm", lambda a, x, out=None: right(a, x, out=out) * np.float32(1.01))
    assert harness.main(["spmm", "--data", str(folder), "--width", "16", "--json"]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert any(r["impl"] == "tilewright" and "WRONG" in r["wrong"] for r in rows)


def test_bench_graphs_reports_the_fit(capsys):
    command = ["graphs", "--graphs", "cora", "--f", "0", "--json"]
    assert harness.main(command) == 0
    found = {r["impl"]: r["value"] for r in rows_of(capsys.readouterr().out)}
    assert found["entries"] == 10_556 and found["longest row"] == 168


def test_bench_host_measures_calls_and_builds(capsys, monkeypatch):
    monkeypatch.setattr(host, "_CALLS", 100)
    monkeypatch.setattr(host, "_REPEATS", 1)
    monkeypatch.setattr(host, "_IMPORTS", 1)
    monkeypatch.setattr(host, "_BUILDS", 1)
    monkeypatch.setattr(host, "_TILES", {})  # a second a build
    monkeypatch.setattr(host_attention, "_REPEATS", 1)
    monkeypatch.setattr(host_attention, "_BUILDS", 1)
    assert harness.main(["host", "--json"]) == 0
    printed = capsys.readouterr()
    rows = rows_of(printed.out)
    ops = {r["op"] for r in rows}
    assert {"import", "host.call", "build.csr", "build.hyb", "build.hyb.any"} <= ops
    assert {"attention.host", "attention.llama"} <= ops
    assert all(r["value"] > 0 for r in rows if r["metric"] != "bytes")
    assert [r["value"] for r in rows if r["metric"] == "bytes"] == [0]  # a bound run keeps nothing
    assert len([r for r in rows if r["op"].startswith("build")]) in (9, 18)
    assert "another kind of cache" not in printed.err


def test_bench_model_times_prompts_and_answers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    monkeypatch.setattr(model, "_ROUNDS", 1)
    path = str(runnable().write(tmp_path / "runnable.gguf"))
    args = ["model", "--model", path, "--prompt", "30", "--tokens", "4", "--json"]
    assert harness.main(args) == 0
    found = rows_of(capsys.readouterr().out)
    ours = {(r["op"], r["width"]) for r in found if r["impl"] == "tilewright"}
    rates = {(f"model.{op}", n) for op in ("prompt", "decode") for n in (20, 30)}
    assert ours == rates | {("model.launches", 1)} | {("model.streams", n) for n in (1, 2, 4)}
    metrics = {"model.launches": "launches a step", "model.streams": "tokens/s of all"}
    assert all(r["value"] > 0 for r in found)
    assert all(r["metric"] == metrics.get(r["op"], "tokens/s") for r in found)
    assert not any(r["ratio"] for r in found if r["op"] == "model.streams")  # beside no peer


@pytest.mark.parametrize(
    "given",
    [
        ("--plot", "/nonexistent/x.png"), ("--plot", "/"), ("--plot", "x.nonsense"),
        ("--keep", "/proc/x"), ("--keep", os.devnull),
    ],
    ids=" ".join,
)  # fmt: skip
def test_results_that_cannot_be_kept_are_told_before(given, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sparse, "graphs", lambda args: pytest.fail("it measured"))
    assert harness.main(["graphs", *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ArgumentError[A109]")


def test_nothing_to_draw_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ArgumentError, match="A109"):
        plot.draw([{"ratio": None}], tmp_path / "x.png")


def test_rows_without_a_peer_are_drawn_by_their_values(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"suite": "model", "input": "m", "width": 20, "impl": "tilewright", "device": "x"}
    metrics = ("tokens/s", 200.0), ("tokens/s", 100.0), ("launches a step", 369)
    rows = [row | {"metric": m, "value": x, "ratio": None} for m, x in metrics]
    plot.draw([*rows, row | {"metric": "GFLOP/s", "value": None}], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["spmm", "sddmm"])
def test_bench_on_a_gpu(brief, suite, folder, capsys):
    pytest.importorskip("torch")
    command = [suite, "--data", str(folder), "--target", "cuda", "--width", "32"]
    assert harness.main([*command, "--json"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert not any(r.get("wrong") for r in rows)
    assert any(r["impl"].startswith("cusparse") for r in rows)
    ours = next(r for r in rows if r["impl"] == "tilewright")
    assert ours["ratio"] > 0 and ours["graph_ratio"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "command",
    ["gemm --relu --size 256 512 256", "gemm --weights 3 --size 16 512 256", "blocks --size 512"],
)
def test_benches_of_tile_operations(brief, command, capsys):
    pytest.importorskip("torch")
    assert harness.main([*command.split(), "--json"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert not any(r.get("wrong") for r in rows)
    assert all(r["ratio"] > 0 for r in rows if r["impl"].startswith("tilewright"))
    assert ("longer" in rows[-1]) == ("--relu" in command)


def test_the_oracle_of_products(rng, monkeypatch):
    """That of GEMM with bias and ReLU, and of a matrix in blocks, by kernels of the CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(gemm, "require_torch", lambda: torch)
    a, b, bias = (torch.from_numpy(rng.standard_normal(s)).half() for s in ((9, 32), (32, 24), 24))
    exact = a.double() @ b.double()
    assert gemm.check(a, b)(exact.half()) == ""
    right = (exact + bias.double()).relu()
    wrong = gemm.check(a, b, bias)
    assert wrong(right.half()) == "" and "wrong" in wrong(exact.half())
    right[3, 2] = torch.nan
    assert wrong(right).startswith("1 of 216")
    x = torch.from_numpy(rng.standard_normal((128, 16))).half()
    matrix = blocks.random_blocks(128, (32, 32), 0.75)
    assert 0.25 - (matrix != 0).mean() < 1e-3
    assert np.count_nonzero(blocks.random_blocks(128, (8, 1), 0.5, 0.5).any(1)) == 64
    assert (matrix.reshape(4, 32, 4, 32).any((1, 3))).sum() == 4
    if compilers.has_compiler():
        arrays = (y.numpy() for y in (a, b, bias))
        got = gemm.relu_definition("float16", 9, 24, 32).build()(*arrays)
        assert wrong(torch.from_numpy(got)) == ""
        y = bsr_spmm(tw.bsr(32).pack(matrix, dtype="float16"), x.numpy())
        assert gemm.check(torch.from_numpy(matrix).half(), x)(torch.from_numpy(y)) == ""


def test_the_oracle_of_flash_attention():
    torch = pytest.importorskip("torch")
    from bench.flash import check

    q, k, v = (torch.randn(n, h, 16).half() for n, h in ((70, 4), (90, 2), (90, 2)))
    seen = torch.arange(90) - 90 <= torch.arange(70)[:, None] - 70
    attend = torch.nn.functional.scaled_dot_product_attention
    rows = (x.transpose(0, 1)[None].float() for x in (q, k, v))
    right = attend(*rows, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
    wrong = check(q, k, v, True)
    assert wrong(right.half()) == ""
    assert "wrong" in wrong(right.roll(1, 0))
    right[3, 2, 1] = torch.nan
    assert wrong(right).startswith("1 of")


def test_the_regret_of_a_server_is_that_of_its_groups():
    """Random batches that it shares, and that it reads by the flat table."""
    assert cascade.pays(64, 512) and cascade.pays(11, 141)
    assert not cascade.pays(2, 16) and not cascade.pays(57, 10)


def test_attention_on_a_gpu_is_all_of_its_suites(monkeypatch):
    """Each suite gets the peers that it knows, and its own defaults."""
    seen: dict[str, Any] = {}

    def rows_of(name: str) -> Any:
        def rows(args: Any) -> Any:
            seen[name] = args
            yield {"suite": name}

        return rows

    for name in attention.SUITES_OF_A_GPU:
        monkeypatch.setattr(importlib.import_module(f"bench.{name}"), name, rows_of(name))
    args = argparse.Namespace(target="cuda", peers=["fa3", "xqa"])
    assert [row["suite"] for row in attention.attention(args)] == list(attention.SUITES_OF_A_GPU)
    assert seen["prefill"].peers == ["fa3"] and seen["decode"].peers == ["fa3", "xqa"]
    assert seen["decode"].gib == 24.0 and not hasattr(seen["cascade"], "peers")
    args.peers = ["all"]
    list(attention.attention(args))
    assert seen["prefill"].peers == seen["decode"].peers == ["all"]
    args.peers = ["fa5"]
    with pytest.raises(ArgumentError, match=r"A109.*no peer fa5"):
        list(attention.attention(args))


def test_kept_rows_are_drawn(tmp_path, monkeypatch):
    """Of each input the last row, by the beginning of its name and its width."""
    pytest.importorskip("matplotlib")
    path, drawn = tmp_path / "rows.jsonl", []
    row = {"impl": "tilewright", "op": "o", "dtype": "d", "device": "x"}
    kept = [("a 1", 8, 2.0), ("b 1", 8, 3.0), ("a 1", 8, 1.5), ("a 2", 16, 1.0)]
    rows = [row | {"input": name, "width": n, "ratio": ratio} for name, n, ratio in kept]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert plot.main([str(path), str(tmp_path / "x.png"), "--only", "a"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 1000
    monkeypatch.setattr(plot, "draw", lambda rows, path: drawn.append(rows))
    plot.main([str(path), str(tmp_path / "x.png"), "--only", "a", "--width", "8"])
    assert [(r["input"], r["ratio"]) for r in drawn[0]] == [("a 1", 1.5)]
    with pytest.raises(ArgumentError, match="A109"):
        plot.main([str(path), str(tmp_path / "missing" / "x.png")])
