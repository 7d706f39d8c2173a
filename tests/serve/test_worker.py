"""The engine's process: many callers at once, cancels at random, steps that fail."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from tests.serve.threaded import threaded

from tilewright.errors import ModelError
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Sampling
from tilewright.serve.weights import open_model
from tilewright.serve.worker import Piece, Worker, main

PATIENCE_S = 300  # a step that compiles, on a machine that is busy with other work


@asynccontextmanager
async def worker_of(path: Path, **options: Any) -> AsyncIterator[tuple[Engine, Worker]]:
    """An engine in a thread. By default few pages and seats: requests wait and are preempted."""
    options = options or {"kv_tokens": 256, "running": 5, "step_tokens": 30}
    engine = Engine(open_model(path), "cpp", Options(context=128, **options))
    worker = threaded(engine)
    async with worker.running():
        yield engine, worker


def job(number: int) -> tuple[list[int], Sampling]:
    rng = random.Random(number % 40)
    prompt = [3 + n % 250 for n in range(rng.randrange(40))] + [5, rng.randrange(3, 260)]
    options: dict[str, Any] = {
        "max_tokens": rng.randrange(1, 40),
        "temperature": rng.choice([0, 1]),
    }
    return prompt, Sampling(seed=number % 40, ignore_eos=True, **options)


Answer = tuple[str, str, int]


async def read(pieces: asyncio.Queue[Piece]) -> Answer:
    """Text, reason of the end, tokens."""
    text = ""
    while True:
        piece = await asyncio.wait_for(pieces.get(), PATIENCE_S)
        text += piece.text
        if piece.finish:
            return text, piece.finish, piece.answered


async def ask(worker: Worker, number: int) -> Answer:
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    worker.submit(*job(number), pieces.put_nowait)
    return await read(pieces)


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_many_callers_and_cancels(runnable_path: Path):
    """Every answer is complete, in order, and the one that the request has alone."""
    alone = Engine(open_model(runnable_path), "cpp", Options(context=128, share=False))
    wanted = {}
    for number in range(40):
        request = alone.submit(*job(number))
        while not request.finish:
            alone.step()
        wanted[number] = "".join(request.pieces), "length", request.answered
    wrong: list[Any] = []

    async def call(worker: Worker, caller: int) -> None:
        rng = random.Random(caller)
        for _ in range(8):
            number = rng.randrange(40)
            pieces: asyncio.Queue[Piece] = asyncio.Queue()
            tokens, how = job(number)
            how = replace(how, priority=rng.choice([0, 0, 3]))
            ticket = worker.submit(tokens, how, pieces.put_nowait)
            if rng.random() < 0.3:
                for _ in range(rng.randrange(3)):
                    if (await asyncio.wait_for(pieces.get(), PATIENCE_S)).finish:
                        break
                worker.cancel(ticket)
                continue
            found = await read(pieces)
            if found != wanted[number] or not pieces.empty():
                wrong.append((number, found, wanted[number]))

    async def body() -> None:
        async with worker_of(runnable_path) as (engine, worker):
            await asyncio.gather(*(call(worker, n) for n in range(8)))
            await until(lambda: engine.scheduler.pages.held == 0)
            assert worker.counts["requests_total"] == 64 and worker.pending == 0

    asyncio.run(body())
    assert not wrong


def test_steps_that_fail(runnable_path: Path):
    """Each request has an answer or an error, never a wrong answer; the engine goes on."""

    async def body() -> None:
        async with worker_of(runnable_path) as (engine, worker):
            run, steps = engine.runner.run, itertools.count(1)

            def failing(chunks: Any) -> Any:
                if next(steps) % 7 == 0:
                    raise RuntimeError("broken")
                return run(chunks)

            engine.runner.run = failing
            ended = await asyncio.gather(*(ask(worker, n) for n in range(30)))
            engine.runner.run = run
            assert {reason for _, reason, _ in ended} == {"length", "error"}
            for number, (text, reason, _) in enumerate(ended):
                again = await ask(worker, number)
                assert again[1] == "length"
                assert again[0] == text if reason == "length" else again[0].startswith(text)
            assert engine.scheduler.pages.held == 0

    asyncio.run(body())


def test_a_request_that_cannot_begin(runnable_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Any exception of `submit` ends that request alone."""

    async def body() -> None:
        async with worker_of(runnable_path) as (engine, worker):
            with monkeypatch.context() as patch:
                patch.setattr(engine, "submit", lambda *_: min(()))
                assert (await ask(worker, 1))[1] == "error"
            assert (await ask(worker, 1))[1] == "length" and worker.restarts == 0

    asyncio.run(body())


def test_leaving_ends_what_runs(runnable_path: Path):
    async def body() -> None:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        async with worker_of(runnable_path, running=16) as (_, worker):
            worker.submit([5, 6], Sampling(max_tokens=120, ignore_eos=True), pieces.put_nowait)
            await asyncio.wait_for(pieces.get(), PATIENCE_S)
        assert (await read(pieces))[1] in ("error", "length")

    asyncio.run(body())


def test_an_engine_that_ends_is_started_again(runnable_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An exception of the scheduler ends the engine: requests that wait or run get M109, none is
    taken until it runs again."""
    monkeypatch.setattr("tilewright.serve.worker.PAUSES_S", (1.0,))

    async def body() -> None:
        async with worker_of(runnable_path) as (engine, worker):
            schedule, calls = engine.scheduler.schedule, itertools.count(1)

            def failing(now: float = 0.0, ahead: bool = False) -> Any:
                if next(calls) >= 4:
                    raise RuntimeError("broken")
                return schedule(now, ahead)

            engine.scheduler.schedule = failing
            ended: list[Piece] = []
            for number in range(9):
                worker.submit(*job(number), lambda p: ended.append(p) if p.finish else None)
            await until(lambda: len(ended) == 9)
            codes = {(p.finish, getattr(p.error, "code", "")) for p in ended}
            assert ("error", "M109") in codes  # of those that waited; others ran in a step
            assert codes <= {("error", "M109"), ("error", ""), ("length", "")}
            with pytest.raises(ModelError, match="M109"):
                worker.submit(*job(3), ended.append)
            engine.scheduler.schedule = schedule
            await until(lambda: worker.is_ready)
            assert (await ask(worker, 3))[1] == "length"
            assert worker.restarts >= 1 and worker.pending == 0

    asyncio.run(body())


def test_a_process_that_is_killed(runnable_path: Path):
    """Its request gets an error; the next process answers the same prompt, with the same tokens."""
    worker = Worker.process(str(runnable_path), "cpp", Options(context=128))

    async def body() -> None:
        texts = []
        async with worker.running():
            for _ in range(2):
                await until(lambda: worker.is_ready)
                texts.append(await ask(worker, 1))
                pieces: asyncio.Queue[Piece] = asyncio.Queue()
                worker.submit([5, 6], Sampling(max_tokens=120, ignore_eos=True), pieces.put_nowait)
                worker._engine.kill()
                text, finish, _ = await read(pieces)
                assert finish == "error" or (finish == "length" and text)
            assert texts[0] == texts[1] and texts[0][1] == "length"
            await until(lambda: worker.restarts == 2)

    asyncio.run(body())
    assert not worker._engine.is_alive()


def test_an_engine_that_says_nothing_is_killed(
    runnable_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """While requests wait, not while there are none; they get M109, the next engine answers."""
    monkeypatch.setattr("tilewright.serve.worker.HANG_S", 1.5)
    monkeypatch.setattr("tilewright.serve.worker.PAUSES_S", (0.0,))
    engine = Engine(open_model(runnable_path), "cpp", Options(context=128))
    worker, silent = threaded(engine), []
    start = worker._start

    class Silent:
        """A process that takes requests and says nothing until it is killed."""

        def __init__(self, connection: Any) -> None:
            self.connection = connection
            connection.send(({}, {}))  # it is ready

        def kill(self) -> None:
            self.connection.close()

        join = staticmethod(lambda _: None)
        is_alive = staticmethod(lambda: False)

    def starting(connection: Any) -> Any:
        if silent:
            return start(connection)
        silent.append(Silent(connection))
        return silent[0]

    async def body() -> None:
        async with worker.running():
            worker._start = starting
            worker._send(-1, None)  # ends the first engine
            await until(lambda: bool(silent) and worker.is_ready)
            await asyncio.sleep(2.5)  # nobody waits
            assert worker.restarts == 1
            pieces: asyncio.Queue[Piece] = asyncio.Queue()
            worker.submit(*job(1), pieces.put_nowait)
            ended = await asyncio.wait_for(pieces.get(), PATIENCE_S)
            assert getattr(ended.error, "code", "") == "M109"
            await until(lambda: worker.is_ready and worker.restarts == 2)
            monkeypatch.setattr("tilewright.serve.worker.HANG_S", PATIENCE_S)
            assert (await ask(worker, 1))[1] == "length"

    asyncio.run(body())
    assert "hangs and is killed" in caplog.text


def test_starts_that_fail(
    runnable_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """No process, an engine that says why it cannot start, one that never ends: all are logged, and
    the next start is tried."""
    monkeypatch.setattr("tilewright.serve.worker.PAUSES_S", (0.0,))
    monkeypatch.setattr("tilewright.serve.worker.END_S", 0.01)
    engine = Engine(open_model(runnable_path), "cpp", Options(context=128))
    worker, killed = threaded(engine), []
    starts, start = [], worker._start

    class Stuck:
        join = staticmethod(lambda _: None)
        is_alive = staticmethod(lambda: True)
        kill = staticmethod(lambda: killed.append(True))

    def failing(connection: Any) -> Any:
        starts.append(connection)
        if len(starts) == 1:
            raise OSError("no process")
        if len(starts) == 2:
            connection.send(ModelError("M101", "half a file"))
            return Stuck
        return start(connection)

    async def body() -> None:
        async with worker.running():
            worker._start = failing
            worker._send(-1, None)  # ends the first engine
            await until(lambda: len(starts) > 2 and worker.is_ready)
            assert (await ask(worker, 1))[1] == "length"

    asyncio.run(body())
    assert killed and "no process" in caplog.text and "half a file" in caplog.text


def test_any_exception_of_a_start_is_told(monkeypatch: pytest.MonkeyPatch):
    def broken(_: str) -> Any:
        raise MemoryError("too large")

    monkeypatch.setattr("tilewright.serve.worker.open_model", broken)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    ours, theirs = Pipe()
    main(theirs, "", "cpp", Options())
    with pytest.raises(ModelError, match=r"M109.*MemoryError\('too large'\)"):
        raise ours.recv()


def test_a_model_that_is_no_model(tmp_path: Path):
    with pytest.raises(ModelError, match="M101"):
        Worker.process(str(tmp_path / "none.gguf"), "cpp", Options())
