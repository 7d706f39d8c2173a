"""The engine's thread: many callers at once, cancels at random, steps that fail."""

from __future__ import annotations

import queue
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Sampling
from tilewright.serve.weights import open_model
from tilewright.serve.worker import Piece, Worker

PATIENCE_S = 60


@pytest.fixture
def worker(runnable_path: Path) -> Any:
    """Few pages and seats, so that requests wait and are preempted."""
    options = Options(context=128, kv_tokens=256, running=5, step_tokens=30)
    one = Worker(Engine(open_model(runnable_path), "cpp", options))
    yield one
    one.stop()
    assert one.engine.scheduler.pages.held == 0


def job(number: int) -> tuple[list[int], Sampling]:
    rng = random.Random(number % 40)
    prompt = [3 + n % 250 for n in range(rng.randrange(40))] + [5, rng.randrange(3, 260)]
    options: dict[str, Any] = {
        "max_tokens": rng.randrange(1, 40),
        "temperature": rng.choice([0, 1]),
    }
    return prompt, Sampling(seed=number % 40, ignore_end=True, **options)


def read(pieces: queue.Queue[Piece]) -> tuple[str, str, int]:
    """Text, reason of the end, tokens."""
    text = ""
    while True:
        piece = pieces.get(timeout=PATIENCE_S)
        text += piece.text
        if piece.finish:
            return text, piece.finish, piece.answered


def test_many_callers_and_cancels(worker: Worker):
    """Every answer is complete, in order, and the one that the request has alone."""
    alone = Engine(worker.engine.model.file, "cpp", Options(context=128, share=False))
    wanted = {}
    for number in range(40):
        request = alone.submit(*job(number))
        while not request.finish:
            alone.step()
        wanted[number] = "".join(request.pieces), "length", request.answered
    wrong: list[Any] = []

    def call(caller: int) -> None:
        rng = random.Random(caller)
        for _ in range(25):
            number = rng.randrange(40)
            pieces: queue.Queue[Piece] = queue.Queue()
            ticket = worker.submit(*job(number), pieces.put, priority=rng.choice([0, 0, 3]))
            if rng.random() < 0.3:
                for _ in range(rng.randrange(3)):
                    if pieces.get(timeout=PATIENCE_S).finish:
                        break
                worker.cancel(ticket)
                continue
            found = read(pieces)
            if found != wanted[number] or not pieces.empty():
                wrong.append((number, found, wanted[number]))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(PATIENCE_S)
    assert not any(t.is_alive() for t in callers) and not wrong
    assert worker.requests == 200


def test_steps_that_fail(worker: Worker):
    """Each request has an answer or an error, never a wrong answer; the thread goes on."""
    run, steps = worker.engine.runner.run, [0]

    def failing(chunks: Any) -> Any:
        steps[0] += 1
        if steps[0] % 7 == 0:
            raise RuntimeError("broken")
        return run(chunks)

    worker.engine.runner.run = failing
    queues: list[queue.Queue[Piece]] = [queue.Queue() for _ in range(30)]
    for number, pieces in enumerate(queues):
        worker.submit(*job(number), pieces.put)
    ended = [read(pieces) for pieces in queues]
    worker.engine.runner.run = run
    assert {reason for _, reason, _ in ended} == {"length", "error"}
    for number, (text, reason, _) in enumerate(ended):
        pieces = queue.Queue()
        worker.submit(*job(number), pieces.put)
        again = read(pieces)
        assert again[1] == "length"
        assert again[0] == text if reason == "length" else again[0].startswith(text)


def test_stop_ends_what_runs(runnable_path: Path):
    worker = Worker(Engine(open_model(runnable_path), "cpp", Options(context=128)))
    pieces: queue.Queue[Piece] = queue.Queue()
    worker.submit([5, 6], Sampling(max_tokens=120, ignore_end=True), pieces.put)
    pieces.get(timeout=PATIENCE_S)
    worker.stop()
    assert read(pieces)[1] in ("cancel", "length")
    assert worker.engine.scheduler.pages.held == 0
