"""An engine in a thread of the test, behind the same pipe as the one of a process."""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.connection import Connection
from typing import Any

from tilewright.serve.engine import Engine
from tilewright.serve.worker import Worker, run


def threaded(engine: Engine) -> Worker:
    """A worker over an engine that the test can reach. When it ends by an exception it is started
    again, as a process would be."""

    def start(connection: Connection) -> Any:
        for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
            engine.cancel(request)  # a new process would not know it

        def target() -> None:
            with contextlib.suppress(RuntimeError):  # what tests raise; its connection is closed
                run(engine, connection)

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        return thread

    return Worker(start)
