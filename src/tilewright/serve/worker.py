"""The engine as a process of its own, started again when it dies.

`Worker` is the server's side, in its event loop. `run` is the engine's side, the loop of its
steps. A pipe is between them.
"""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tilewright.errors import ModelError, TilewrightError
from tilewright.serve.engine import Engine, Options
from tilewright.serve.request import Request, Sampling, TokenLogprob
from tilewright.serve.weights import open_model

LOG = logging.getLogger("tilewright.serve")
HANG_S = 120.0  # without a word while requests wait: the process is killed
END_S = 10.0  # for a process to end by itself
PAUSES_S = (0.0, 1.0, 4.0, 15.0, 60.0)  # before each start in a row that led to no answer


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that a step added to an answer; `+` joins consecutive pieces. `finish`: as in
    `Request`; `answered`: tokens of the answer so far; `cached`: prompt tokens from the cache."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str = ""
    answered: int = 0
    cached: int = 0
    error: Exception | None = None

    def __add__(self, later: "Piece") -> "Piece":
        text, logprobs = self.text + later.text, self.logprobs + later.logprobs
        return Piece(text, logprobs, later.finish, later.answered, later.cached, later.error)


Listener = Callable[[Piece], None]


def ended() -> ModelError:
    """The error of requests whose engine has ended."""
    return ModelError("M109", "the engine has ended", hint="try again in a few seconds")


def main(connection: Connection, path: str, target: str, options: Options) -> None:
    """Builds an engine and runs it; what a new process calls."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when it is over
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = Engine(open_model(path), target, options)
        if engine.model.target.is_cuda:  # 0.2 s a step, not while answers wait
            engine.runner.warm()
    except Exception as error:
        rule = f"the engine cannot start: {error!r:.200}"
        return connection.send(_told(error, ModelError("M109", rule)))
    return run(engine, connection)


def run(engine: Engine, connection: Connection) -> None:
    """Runs the steps of an engine for the requests that come through a connection, until it is
    closed. An exception of a step ends the running requests, any other one the process."""
    requests: dict[int, Request] = {}  # by the server's numbers
    counts = {"requests_total": 0, "tokens_total": 0}
    connection.send(({}, counts | engine.counts()))
    with contextlib.suppress(EOFError, OSError), connection:  # until the server has gone
        while True:
            pieces: dict[int, Piece] = {}
            patience = 0 if engine.scheduler.has_work else None
            while connection.poll(patience):
                patience = 0
                number, message = connection.recv()
                if number < 0:
                    return
                if message is None:
                    if number in requests:
                        engine.cancel(requests.pop(number))
                    continue
                counts["requests_total"] += 1
                try:
                    requests[number] = engine.submit(*message)
                except Exception as error:
                    pieces[number] = Piece(finish="error", error=_told(error))
            ready = set(_step(engine))
            counts["tokens_total"] += len(ready)
            pieces |= {n: _piece(r) for n, r in requests.items() if r in ready}
            requests = {n: r for n, r in requests.items() if not r.finish}
            connection.send((pieces, counts | engine.counts()))


def _step(engine: Engine) -> list[Request]:
    """A step of the engine. One that fails ends the running requests; those that wait go on. Raises
    where none was running: then the scheduler has failed, and would again."""
    try:
        return engine.step()
    except Exception as error:
        failed = list(engine.scheduler.running)
        if not failed:
            raise
        told = _told(error)
        for request in failed:
            request.error = told
            engine.scheduler.finish(request, "error")
        return failed


def _told(error: Exception, instead: Exception | None = None) -> Exception:
    """What the server is told of an exception: `instead` of others than ours, which are logged."""
    if isinstance(error, TilewrightError):
        return error
    LOG.error("the start, a request or a step has failed", exc_info=error)
    return instead or RuntimeError(repr(error)[:200])


def _piece(r: Request) -> Piece:
    """What nobody has read yet."""
    text, logprobs = "".join(r.pieces), tuple(r.logprobs)
    r.pieces.clear()
    r.logprobs.clear()
    return Piece(text, logprobs, r.finish, r.answered, r.cached, r.error)


class Worker:
    """Requests to an engine in another process, and the answers; of one event loop.

    `start(connection)` starts the engine's side and returns its process (or a thread, in tests).
    Requests that are under way when it ends get an error, M109. Raises what the first start raises.
    """

    def __init__(self, start: Callable[[Connection], Any]) -> None:
        self._start, self._numbers = start, itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._sender = ThreadPoolExecutor(1, "tilewright-requests")
        self.restarts, self.counts = -1, {}
        self._launch()
        first = self._receive()
        if isinstance(first, Exception):
            raise first
        _, self.counts = first

    @classmethod
    def process(cls, path: str, target: str, options: Options) -> "Worker":
        """An engine of a model file in a new process."""
        context = multiprocessing.get_context("spawn")

        def start(connection: Connection) -> Any:
            arguments = connection, path, target, options
            process = context.Process(target=main, args=arguments, daemon=True)
            process.start()
            connection.close()
            return process

        return cls(start)

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return len(self._listeners)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hands out answers inside of it. Leaving ends the engine: what runs gets an error."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            self._send(-1, None)
            await asyncio.to_thread(self._join)
            self._end_all()

    def submit(self, tokens: list[int], sampling: Sampling, listener: Listener) -> int:
        """Begins an answer and returns its number; the listener gets what each step adds. Raises
        ModelError[M109] while no engine runs."""
        if not self.is_ready:
            raise ended()
        if not self._listeners:
            self._heard = time.monotonic()
        number = next(self._numbers)
        self._listeners[number] = listener
        self._send(number, (tokens, sampling, time.perf_counter()))
        return number

    def cancel(self, number: int) -> None:
        """Ends an answer that nobody waits for any more; nothing is told."""
        if self._listeners.pop(number, None):
            self._send(number, None)

    def _launch(self) -> None:
        self.is_ready = False
        self._connection, theirs = multiprocessing.Pipe()
        self._heard = time.monotonic()
        try:
            self._engine = self._start(theirs)
        except Exception:
            theirs.close()  # so that the next look finds the end
            raise
        self.restarts += 1

    def _join(self) -> None:
        """Waits for the end of the engine. A process that takes too long is killed."""
        self._engine.join(END_S)
        if self._engine.is_alive() and hasattr(self._engine, "kill"):
            self._engine.kill()
            self._engine.join(END_S)

    def _send(self, *message: Any) -> None:
        """Sends without waiting for the engine, which may be in a step."""
        connection = self._connection

        def send() -> None:
            with contextlib.suppress(OSError):  # it has ended, and so have its requests
                connection.send(message)

        self._sender.submit(send)

    def _receive(self) -> Any:
        """Waits for the next message; returns an exception where the engine has ended."""
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            message = ended()
        self._heard, self.is_ready = time.monotonic(), not isinstance(message, Exception)
        return message

    async def _run(self) -> None:
        """Hands out what comes from the engine, and starts it again when it has ended."""
        failures = 0
        while True:
            coming = asyncio.ensure_future(asyncio.to_thread(self._receive))
            while not (await asyncio.wait([coming], timeout=1.0))[0]:
                if self._listeners and time.monotonic() - self._heard > HANG_S:
                    LOG.error("the engine hangs and is killed")
                    self._engine.kill()
            message = coming.result()
            if isinstance(message, Exception):
                LOG.error("the engine is started again: %s", message)
                self._end_all()
                await asyncio.to_thread(self._join)
                await asyncio.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
                failures += 1
                try:
                    self._launch()
                except Exception:
                    LOG.exception("the engine cannot be started")
                continue
            pieces, self.counts = message
            failures = 0 if pieces else failures
            for number, piece in pieces.items():
                take = self._listeners.pop if piece.finish else self._listeners.get
                if listener := take(number, None):
                    listener(piece)

    def _end_all(self) -> None:
        self.is_ready = False
        listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener(Piece(finish="error", error=ended()))
