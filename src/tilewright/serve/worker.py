"""The thread that runs an engine, for callers in other threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tilewright.serve.engine import Engine
from tilewright.serve.request import Request, Sampling, TokenLogprob


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

    def __add__(self, later: Piece) -> Piece:
        text, logprobs = self.text + later.text, self.logprobs + later.logprobs
        return Piece(text, logprobs, later.finish, later.answered, later.cached, later.error)


Listener = Callable[[Piece], None]


class Worker:
    """Runs the steps of an engine while there is work. Commands of other threads are run between
    two steps, in their order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = self.tokens = 0  # counted since the start
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[Request, Listener] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tilewright-engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return len(self._listeners) + self._commands.qsize()

    def submit(
        self, tokens: list[int], sampling: Sampling, listener: Listener, priority: int = 0
    ) -> Request:
        """Begins an answer; the listener is called after each step of it, in the engine's thread.
        Raises ModelError (M105, M106)."""
        request = self.engine.request(tokens, sampling, priority)

        def begin() -> None:
            self._listeners[request] = listener
            self.engine.scheduler.add(request)
            self.requests += 1

        self._commands.put(begin)
        return request

    def cancel(self, request: Request) -> None:
        """Ends an answer that nobody waits for any more; nothing is told."""

        def end() -> None:
            self._listeners.pop(request, None)
            self.engine.cancel(request)

        self._commands.put(end)

    def stop(self) -> None:
        """Ends all answers and the thread."""

        def end() -> None:
            self._stopping = True

        self._commands.put(end)
        self._thread.join()

    # -- inside ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            idle = not self.engine.scheduler.has_work
            while idle or not self._commands.empty():
                self._commands.get()()
                idle = False
            try:
                ready = self.engine.step()
            except Exception as error:
                ready = self._fail(error)
            self.tokens += len(ready)
            self._tell(ready)
        for request in list(self._listeners):
            self.engine.cancel(request)
        self._tell(list(self._listeners))

    def _tell(self, requests: list[Request]) -> None:
        for request in requests:
            text, logprobs = "".join(request.pieces), tuple(request.logprobs)
            request.pieces.clear()
            request.logprobs.clear()
            counts = request.finish, request.answered, request.cached
            self._listeners[request](Piece(text, logprobs, *counts, request.error))
            if request.finish:
                del self._listeners[request]

    def _fail(self, error: Exception) -> list[Request]:
        """Ends the running requests, whose step failed; those that wait go on."""
        failed = list(self.engine.scheduler.running)
        for request in failed:
            request.error = error
            self.engine.scheduler.finish(request, "error")
        return failed
