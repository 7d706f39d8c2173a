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
    """What a step added to an answer. `finish`: as in `Request`; `answered`, `cached`: its tokens
    so far, and those of the prompt that were not read again."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: str
    answered: int
    cached: int
    error: Exception | None = None


Listener = Callable[[Piece], None]


class Ticket:
    """A request on its way to the engine. `listener` is called in the thread of the engine."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.request: Request | None = None

    def tell(self, request: Request) -> None:
        """Hands on what the last step added."""
        text, logprobs = "".join(request.pieces), tuple(request.logprobs)
        request.pieces.clear()
        request.logprobs.clear()
        counts = request.finish, request.answered, request.cached
        self.listener(Piece(text, logprobs, *counts, request.error))


class Worker:
    """Runs the steps of an engine while there is work. Commands of other threads are run between
    two steps, in their order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = self.tokens = 0  # counted since the start
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[Request, Ticket] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tilewright-engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return len(self._tickets) + self._commands.qsize()

    def submit(
        self, tokens: list[int], sampling: Sampling, listener: Listener, priority: int = 0
    ) -> Ticket:
        """Begins an answer, of which each step tells the listener. `tokens` are checked."""
        ticket = Ticket(listener)

        def begin() -> None:
            ticket.request = self.engine.submit(tokens, sampling, priority)
            self._tickets[ticket.request] = ticket
            self.requests += 1

        self._commands.put(begin)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends an answer that nobody waits for any more; nothing is told."""

        def end() -> None:
            if ticket.request is not None and self._tickets.pop(ticket.request, None):
                self.engine.cancel(ticket.request)

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
        for request in list(self._tickets):
            self.engine.cancel(request)
        self._tell(list(self._tickets))

    def _tell(self, requests: list[Request]) -> None:
        for request in requests:
            self._tickets[request].tell(request)
            if request.finish:
                del self._tickets[request]

    def _fail(self, error: Exception) -> list[Request]:
        """Ends the running requests, whose step failed; those that wait go on."""
        failed = list(self.engine.scheduler.running)
        for request in failed:
            request.error = error
            self.engine.scheduler.finish(request, "error")
        return failed
