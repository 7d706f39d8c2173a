"""OpenAI's HTTP API over an engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`,
`/health`, `/metrics`. Needs the extra `serve` (FastAPI, uvicorn).

The text of a request never becomes a control token; a prompt of token ids is taken as it is.
Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from tilewright.errors import ModelError, TilewrightError
from tilewright.serve.engine import LLM
from tilewright.serve.protocol import (
    Body,
    Chat,
    Completion,
    Shape,
    described,
    event,
    failure,
    usage,
)
from tilewright.serve.request import Request as Answer
from tilewright.serve.request import Sampling
from tilewright.serve.worker import Piece, Worker


@dataclass(frozen=True, slots=True)
class Limits:
    """`waiting`: requests that wait or run; `body_bytes`: of a request; `api_key`: "" for none."""

    waiting: int = 256
    body_bytes: int = 1 << 20
    api_key: str = ""


class Server:
    """The endpoints' common work: from checked prompts to answers."""

    def __init__(self, llm: LLM, name: str, limits: Limits) -> None:
        self.llm, self.name, self.limits = llm, name, limits
        self.worker = Worker(llm.engine)
        self.began = int(time.time())

    def check_model(self, model: str) -> None:
        if model not in ("", self.name):
            raise HTTPException(404, f"there is no model {model[:80]!r}, only {self.name!r}")

    async def answer(
        self, http: Request, body: Body, prompts: list[list[int]], how: Sampling, shape: Shape
    ) -> Response:
        """Answers `body.n` times to each prompt, together."""
        for tokens in prompts:
            self.llm.engine.check(tokens, how)
        if self.worker.pending + len(prompts) * body.n > self.limits.waiting:
            raise HTTPException(429, f"{self.limits.waiting} requests wait or run: try again later")
        read = sum(map(len, prompts))
        pieces = self._pieces(body, [p for p in prompts for _ in range(body.n)], how)
        if body.stream:
            lines = self._lines(body, pieces, shape, read)
            return StreamingResponse(lines, media_type="text/event-stream")
        joined = [Piece()] * (len(prompts) * body.n)
        async with contextlib.aclosing(pieces):
            async for index, piece in pieces:
                joined[index] += piece
                if await http.is_disconnected():
                    return Response(status_code=499)
        choices = [shape.choice(i, j.text, j.logprobs, j.finish) for i, j in enumerate(joined)]
        head = shape.head(self.name, shape.kind)
        return JSONResponse(head | {"choices": choices, "usage": usage(read, joined)})

    async def _pieces(
        self, body: Body, prompts: list[list[int]], how: Sampling
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all answers as they come. Leaving ends the answers."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def listener(index: int) -> Callable[[Piece], None]:
            def put(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

            return put

        answers: list[Answer] = []
        try:
            for i, tokens in enumerate(prompts):
                seed = None if how.seed is None else how.seed + i % body.n
                own = replace(how, seed=seed)
                answers.append(self.worker.submit(tokens, own, listener(i), body.priority))
            left = len(answers)
            while left:
                index, piece = await queue.get()
                left -= bool(piece.finish)
                if piece.error is not None:
                    raise piece.error
                yield index, piece
        finally:
            for request in answers:
                self.worker.cancel(request)

    async def _lines(
        self, body: Body, pieces: AsyncGenerator[tuple[int, Piece]], shape: Shape, read: int
    ) -> AsyncIterator[str]:
        """Server-sent events."""
        head, last = shape.head(self.name, shape.chunk_kind), {}
        try:
            async with contextlib.aclosing(pieces):
                async for index, piece in pieces:
                    if index not in last and shape.is_chat:
                        yield event(head | {"choices": [shape.first(index)]})
                    last[index] = piece
                    if piece.text or piece.logprobs or piece.finish:
                        part = shape.part(index, piece.text, piece.logprobs, piece.finish)
                        yield event(head | {"choices": [part]})
            if body.stream_options and body.stream_options.include_usage:
                yield event(head | {"choices": [], "usage": usage(read, [*last.values()])})
        except Exception as error:  # the status line has been sent
            yield event(failure(*described(error))[0])
        yield "data: [DONE]\n\n"

    def metrics(self) -> str:
        """In Prometheus' text format."""
        scheduler, worker = self.llm.engine.scheduler, self.worker
        values = {
            "requests_total": worker.requests, "tokens_total": worker.tokens,
            "preemptions_total": scheduler.preemptions, "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting), "pages_held": scheduler.pages.held,
            "pages": scheduler.pages.count,
        }  # fmt: skip
        kinds = {n: "counter" if n.endswith("_total") else "gauge" for n in values}
        lines = (f"# TYPE tilewright_{n} {kinds[n]}\ntilewright_{n} {v}" for n, v in values.items())
        return "\n".join(lines) + "\n"


class Gate:
    """ASGI middleware: refuses requests without the key, and bodies that are too large."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        wanted = f"Bearer {self.limits.api_key}".encode()
        is_open = not self.limits.api_key or scope["path"] == "/health"
        if not is_open and not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
            return await _refuse(401, "the API key is wrong or missing")(scope, receive, send)
        messages, size, more = [], 0, True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            if size > self.limits.body_bytes:
                rule = f"the body has more than {self.limits.body_bytes} bytes"
                return await _refuse(413, rule)(scope, receive, send)
        stored = iter(messages)

        async def replay() -> Any:
            return next(stored, None) or await receive()

        return await self.app(scope, replay, send)


def _refuse(status: int, message: str) -> JSONResponse:
    content, status = failure(status, message)
    return JSONResponse(content, status)


def build_app(llm: LLM, name: str, limits: Limits | None = None) -> FastAPI:
    """The application that serves a model under a name. Its engine stops when it shuts down."""
    server = Server(llm, name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.worker.stop)

    app = FastAPI(title="Tilewright", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(Gate, limits=server.limits)

    async def failed(_: Request, error: Exception) -> JSONResponse:
        content, status = failure(*described(error))
        return JSONResponse(content, status)

    for kind in (HTTPException, RequestValidationError, TilewrightError, Exception):
        app.add_exception_handler(kind, failed)

    model = {"id": name, "object": "model", "created": server.began, "owned_by": "tilewright"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        server.check_model(wanted)
        return model

    @app.post("/v1/completions")
    async def completions(body: Completion, http: Request) -> Response:
        server.check_model(body.model)
        prompt = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        prompts = await asyncio.to_thread(_encoded, llm, prompt)
        how = body.sampling(16, body.logprobs)
        return await server.answer(
            http, body, prompts, how, Shape(llm, False, body.logprobs is not None)
        )

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, http: Request) -> Response:
        server.check_model(body.model)
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        how = body.sampling(llm.engine.context, body.top_logprobs if body.logprobs else None)
        prompt = await asyncio.to_thread(llm.prompt, body.messages)
        return await server.answer(http, body, [prompt], how, Shape(llm, True, body.logprobs))

    return app


def _encoded(llm: LLM, prompts: Any) -> list[list[int]]:
    """Texts as tokens, none of them control tokens; ids as they are. Raises ModelError[M106]."""
    if not 0 < len(prompts) <= 64:
        raise ModelError("M106", f"{len(prompts)} prompts, 1 to 64 are answered", where="prompt")
    encode = llm.tokenizer.encode
    return [encode(p, special=False) if isinstance(p, str) else list(p) for p in prompts]
