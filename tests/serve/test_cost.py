"""The cost of a step: what is fitted, what is refused, what follows the steps; the simulator."""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serve.test_scheduler import span

from bench import harness, simulate
from bench import serve as bench_serve
from tilewright.errors import ArgumentError, ModelError
from tilewright.serve import tune
from tilewright.serve.cost import CostModel, Work, filled
from tilewright.serve.engine import Engine, Options
from tilewright.serve.policy import decide
from tilewright.serve.request import Sampling
from tilewright.serve.scheduler import Limits
from tilewright.serve.weights import open_model
from tilewright.tools import cli

TRUE = CostModel(
    step=6e-3, mixed=1e-3, answer=2e-5, context=4e-8, prompt=1e-6, reads=2e-9, tail=2e-4,
    beside=5e-4, over=3e-5, knee=192,
)  # fmt: skip


def random_works(count: int, seed: int) -> list[Work]:
    rng = np.random.default_rng(seed)
    works = []
    for _ in range(count):
        answers = int(rng.integers(0, 200))
        work = Work(answers, int(rng.integers(0, 2000)) * answers)
        for _ in range(int(rng.integers(0, 4))):
            work = work.plus(int(rng.integers(0, 4000)), int(rng.integers(1, 700)))
        works.append(work if work.answers or work.prompt else Work(1, 5))
    return works


def written_out(work: Work, knee: int = 192) -> float:
    """The formula of the module's docstring, for `TRUE`; a CPU has a `knee` of 0."""
    answers, context, prompt, reads, span = work
    total = 6e-3 + 2e-5 * answers + 4e-8 * (context + span if knee else context + 2.5 * span)
    total += 3e-5 * max(0, answers + prompt - knee)
    total += 2e-4 * (f"{answers % 4:b}".count("1") + f"{prompt % 8:b}".count("1"))
    if prompt:
        total += 1e-3 + 1e-6 * prompt + 2e-9 * reads + (5e-4 if answers else 0)
    return total


def test_work():
    """Two chunks: 3 tokens from position 10 read 11 + 12 + 13 keys, 2 from 0 read 1 + 2."""
    assert Work(2, 30).plus(10, 3).plus(0, 2) == Work(2, 30, prompt=5, reads=39, span=15)


@pytest.mark.parametrize("knee", [0, 192])
def test_a_fit_of_exact_times(knee: int):
    works = random_works(200, 0)
    found = tune.fit([(work, written_out(work, knee)) for work in works], "here")
    assert found.knee == knee and found.key == "here"
    for work in [*works, *random_works(100, 1)]:
        assert found.seconds(work) == pytest.approx(written_out(work, knee), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "computed"),
    [
        (1, 64),
        (64, 64),
        (65, 128),
        (256, 256),
        (257, 320),
        (384, 384),
        (385, 512),
        (448, 512),
        (512, 512),
        (2100, 2176),
    ],
)
def test_rows_that_a_recorded_step_computes(rows: int, computed: int):
    assert filled(rows) == computed


def test_a_fit_where_steps_are_filled_up():
    """63 answers are 64 rows; with 385 tokens of a prompt there are 449, and 512 are computed."""
    true = replace(TRUE, is_filled=1)
    work = Work(63, 6300).plus(0, 385)
    more = 3e-5 * (512 - 448)
    assert true.seconds(work) == pytest.approx(written_out(work) + more, rel=1e-9)
    assert true.seconds(Work(63, 6300)) == TRUE.seconds(Work(63, 6300))
    works = random_works(300, 5)
    samples = [(work, true.seconds(work)) for work in works]
    assert max(tune.errors(tune.fit(samples), samples)) > 0.01  # where none are
    found = tune.fit(samples, "", True)
    assert found.is_filled == 1 and found.knee == 192
    assert [found.seconds(w) for w in works] == pytest.approx([true.seconds(w) for w in works])


def test_a_fit_of_noisy_times():
    """10 % of noise: the constants stay at or above zero, and the mean is right to 2 %."""
    rng = np.random.default_rng(0)
    works = random_works(300, 2)
    found = tune.fit([(w, written_out(w) * rng.uniform(0.9, 1.1)) for w in works])
    assert min(getattr(found, n) for n in ("step", "mixed", "answer", "prompt", "over")) >= 0
    ratios = [found.seconds(w) / written_out(w) for w in random_works(300, 3)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)
    assert np.percentile(np.abs(np.array(ratios) - 1), 90) < 0.05


@pytest.mark.parametrize("name", tune.CONSTANTS)
def test_each_constant_of_an_answer_makes_a_fit(name: str):
    """Noise may leave one constant alone above zero; those of prompts alone are no cost."""
    alone = {"mixed", "prompt", "reads", "beside"}
    assert replace(CostModel(), **{name: 1e-3}).is_fitted == (name not in alone)
    assert not CostModel().is_fitted


def test_corrections_are_slow_and_apart():
    """Where steps of answers take 1.5 times as long, their factor gets there in hundreds of steps,
    and that of steps with prompts stays; one step that takes a second changes little."""
    model, work = TRUE, Work(10, 1000)
    once = model.corrected(work, 1.0)
    assert 1 < once.factors[0] < 1.02
    for _ in range(600):
        model = model.corrected(work, 1.5 * written_out(work))
    assert model.factors[0] == pytest.approx(1.5, rel=0.01) and model.factors[1] == 1
    assert CostModel().corrected(work, 1.0) == CostModel()


def test_files(tmp_path: Path):
    path = tmp_path / "cost.json"
    replace(TRUE, key="a device").save(path)
    assert CostModel.load(path, "a device") == replace(TRUE, key="a device")
    with pytest.raises(ModelError, match="M108"):
        CostModel.load(path, "another")
    good = json.loads(path.read_text(encoding="utf-8"))
    bad: list[Any] = [
        {}, [], 5, good | {"step": -1}, good | {"step": "x"}, good | {"more": 1},
        good | {"factors": [1]}, good | {"factors": [0, 1]}, good | {"answer": float("nan")},
        {k: v for k, v in good.items() if k != "factors"}, good | {"key": 5},
        good | dict.fromkeys(("step", "answer", "context", "tail"), 0),
        good | {"factors": [10**400, 1]}, good | {"is_filled": "x"},
        {k: v for k, v in good.items() if k != "is_filled"},
    ]  # fmt: skip
    for text in [*map(json.dumps, bad), "[" * 100_000]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match="M108"):
            CostModel.load(path, "a device")
    with pytest.raises(ModelError, match="M108"):
        CostModel.load(tmp_path / "none.json", "a device")


def test_an_engine_with_a_cost(runnable_path: Path, tmp_path: Path):
    """Measured on the engine itself; promises are kept at the door or refused with the least."""
    file = open_model(runnable_path)
    options = Options(context=128, running=4, step_tokens=32)
    engine = Engine(file, "cpp", options)
    with pytest.raises(ModelError, match="M110"):
        engine.submit([5, 6], Sampling(itl_ms=1e6))
    runs, run = list[int](), engine.runner.run
    engine.runner.run = lambda chunks: (runs.append(id(chunks)), run(chunks))[1]
    samples = [*tune.measure(engine, 600, most=16)]
    engine.runs_ahead, firsts = True, runs[:]
    assert len([*tune.measure(engine, 0, most=4)]) == 4
    again = runs[len(firsts) :]
    assert len(set(again)) == 4 and again == [i for i in again[:8:2] for _ in range(2)] * 4
    engine.runs_ahead, runs[:], engine.runner.run = False, firsts, run
    assert len(samples) == 16 and all(s > 0 for _, s in samples)
    assert any(w.answers and w.prompt for w, _ in samples)
    assert len(set(runs)) == 16 and runs == runs[:16] * 4  # in turns
    model = tune.fit(samples, engine.scheduler.model.key)
    model.save(tmp_path / "cost.json")
    tuned = Engine(file, "cpp", replace(options, cost=tmp_path / "cost.json"))
    request = tuned.submit([5, 6], Sampling(max_tokens=4, ignore_eos=True, itl_ms=1e6))
    while not request.finish:
        tuned.step()
    assert tuned.scheduler.model.factors != (1.0, 1.0) and tuned.scheduler.late == 0
    with pytest.raises(ModelError, match="M110") as caught:
        tuned.submit([5, 6], Sampling(itl_ms=0.001))
    assert "ms is the least" in caught.value.message
    tuned.submit([5, 6], Sampling(max_tokens=1, itl_ms=0.001, best_effort=True))
    assert tuned.counts()["best_effort_total"] == 1
    with pytest.raises(ModelError, match="M108"):
        Engine(file, "cpp", replace(options, invariant=False, cost=tmp_path / "cost.json"))


# ---------------------------------------------------------------------------- the simulator

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.0000000,40,3\n"
    "2023-11-16 18:15:47.0000000,100,2\n"
)
MOONCAKE = "".join(
    json.dumps({"timestamp": t, "input_length": n, "output_length": 2, "hash_ids": ids}) + "\n"
    for t, n, ids in ((0, 1000, [0, 1]), (2000, 1024, [0, 2]))
)


def test_a_simulation(tmp_path: Path):
    """Two requests of the Azure trace, apart: the first token after a step of 40 tokens, then two
    steps of an answer. The second of Mooncake's knows 512 tokens."""
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    arrivals = simulate.read_arrivals(path, 5, 2.0, 8192)
    assert [(a.at_s, len(a.prompt), a.answer) for a in arrivals] == [(0, 40, 3), (0.5, 100, 2)]
    model = CostModel(step=0.01, prompt=0.001)
    done = simulate.simulate(arrivals, Limits(100, 4, 64), model, decide, Sampling(itl_ms=50))
    assert done.times_s[0] == pytest.approx([0.05, 0.06, 0.07])
    assert done.times_s[1] == pytest.approx([0.5 + 0.074 + 0.046, 0.5 + 0.074 + 0.046 + 0.01])
    found = simulate.measures(done, 0.06, 0.05)
    assert found["goodput requests/s"] == pytest.approx(1 / 0.63)  # the second comes after 120 ms
    assert found["ms gap p50"] == pytest.approx(10) and found["hit rate"] == 0
    names = [e["name"] for e in simulate.timeline(done)["traceEvents"] if e["pid"] == 0]
    assert names == ["prefill", "decode", "decode", "prefill", "prefill", "decode"]
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE, encoding="utf-8")
    known = simulate.simulate(
        simulate.read_arrivals(path, 5, 1.0, 8192), Limits(300, 4, 4096), model, decide, Sampling()
    )
    assert known.cached == 512


def test_simulated_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, line = tmp_path / "trace.csv", tmp_path / "line.json"
    path.write_text(AZURE, encoding="utf-8")
    parser = argparse.ArgumentParser()
    bench_serve.serve_arguments(parser)
    args = parser.parse_args(
        ["--simulate", "--trace", str(path), "--itl-ms", "20", "--timeline", str(line)]
    )
    rows = list(bench_serve.serve(args))
    assert {r["impl"] for r in rows} >= {"tilewright", "fixed chunk 256", "prefill first"}
    assert all(np.isfinite(r["value"]) for r in rows)
    assert json.loads((tmp_path / "line-20ms.json").read_text(encoding="utf-8"))["traceEvents"]
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(ArgumentError, match="A109"):
        list(bench_serve.serve(args))


@pytest.mark.data
@pytest.mark.parametrize("noise", [0.0, 0.043, 0.06])
def test_goodput_of_a_served_trace(data_dir: Path, noise: float):
    """150 requests of the Azure trace, nine times as fast as they came: ours keeps more promises
    than every fixed chunk, and than prompts first, where steps take what is predicted and where
    they are as far from it as those of a GPU."""
    arrivals = simulate.read_arrivals(data_dir / "traces" / bench_serve.TRACE.split("/")[-1],
                                      150, 9.0, 8192)  # fmt: skip
    cost = Path(bench_serve.__file__).with_name("costs") / "h100-llama-8b.json"
    model, promise = CostModel.load(cost, None), Sampling(ttft_ms=1000, itl_ms=30)

    def goodput(policy: simulate.Policy, step_tokens: int) -> float:
        limits = Limits(25_000, 128, step_tokens)
        done = simulate.simulate(arrivals, limits, model, policy, promise, noise)
        return simulate.measures(done, 1.0, 0.03)["goodput requests/s"]

    ours = goodput(decide, 2048)
    others = [goodput(simulate.fixed, c) for c in simulate.CHUNKS]
    assert ours >= max(*others, goodput(simulate.prefill_first, 2048))


COSTS = Path(bench_serve.__file__).with_name("costs")


def test_a_long_prompt_among_answers():
    """32k tokens come while 64 answers are promised 30 ms: no gap beyond, and the prompt's first
    token comes within 1.5 times what it takes alone."""
    model = CostModel.load(COSTS / "h200-llama-8b-derived.json", None)
    answers = [simulate.Arrival(0.01 * n, span(500, 1000 * n), 400) for n in range(64)]
    long = simulate.Arrival(0.8, span(32768, 10**6), 20)

    def served(arrivals: list[simulate.Arrival]) -> simulate.Replay:
        promise = Sampling(ttft_ms=1000, itl_ms=30)
        return simulate.simulate(arrivals, Limits(60_000, 128, 2048), model, decide, promise)

    beside, alone = served([*answers, long]), served([long])
    assert min(beside.times_s[n][-1] for n in range(64)) > beside.times_s[64][0], "all beside it"
    gaps = np.concatenate([np.diff(times) for times in beside.times_s.values()])
    assert gaps.max() <= 0.030
    first = beside.times_s[64][0] - 0.8, alone.times_s[0][0] - 0.8
    assert 1.0 < first[0] / first[1] <= 1.5


def test_the_verb_that_measures(runnable_path: Path, tmp_path: Path, capsys):
    """`tilewright tune serve` shows its progress and writes what the engine then takes."""
    out, sizes = tmp_path / "cost.json", ["--context", "128", "--running", "4"]
    command = ["tune", "serve", str(runnable_path), *sizes, "--step-tokens", "32"]
    assert cli.main([*command, "--seconds", "0.5", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert " steps" in told.err and int(told.out.split()[1]) >= tune.FEWEST
    options = Options(context=128, running=4, step_tokens=32, cost=out)
    Engine(open_model(runnable_path), "cpp", options).submit([5, 6], Sampling(itl_ms=1e6))
    for wrong in (
        ["--seconds", "nan"], ["--seconds", "0"], ["--out", str(tmp_path / "no" / "x")],
        ["--context", "1"],
    ):  # fmt: skip
        assert cli.main([*command, *wrong]) == 2
        assert "A109" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="A109"):
        tune.fit([(Work(1), 0.1)] * 3)
    few = ["serve", "--simulate", "--kv-tokens", "1000", "--context", "5000", "--requests", "2"]
    trace = tmp_path / "trace.csv"
    trace.write_text(AZURE, encoding="utf-8")
    assert harness.main([*few, "--trace", str(trace)]) == 2
