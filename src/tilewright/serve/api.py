"""OpenAI's HTTP API over an engine: `/v1/models`, `/v1/completions`, `/v1/chat/completions`,
`/tokenize`, `/health`, `/metrics`, and a chat page at `/`. Needs the extra `serve` (FastAPI,
uvicorn, prometheus_client).

The text of a request never becomes a control token; a prompt of token ids is taken as it is.
Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException as AnyHTTPException

from tilewright.errors import ModelError, TilewrightError
from tilewright.serve import protocol
from tilewright.serve.chat import Prompts
from tilewright.serve.protocol import Body, Chat, Completion, Shape, Tokenize, event, failure, usage
from tilewright.serve.request import Sampling, check_tokens
from tilewright.serve.worker import LOG, Piece, Worker

LOOK_S = 1.0  # between looks whether a client has left

Item = tuple[int, Piece]  # of the answer with this number


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """`waiting`: requests that wait or run, of all clients, `of_client`: of one; `body_bytes`,
    `body_s`: of a request, and the time to send it; `answer_s`: of an answer. `api_keys`: one of
    them must be sent, and each is a client. Without keys an address is one."""

    waiting: int = 256
    of_client: int = 64
    body_bytes: int = 1 << 20
    body_s: float = 30.0
    answer_s: float = 600.0
    api_keys: Sequence[str] = ()


class Server:
    """The endpoints, and their way from checked prompts to answers."""

    def __init__(self, prompts: Prompts, worker: Worker, name: str, limits: ServerLimits) -> None:
        self.prompts, self.worker, self.name, self.limits = prompts, worker, name, limits
        self.busy: Counter[Any] = Counter()  # requests under way, by client
        self.card = {"id": name, "object": "model", "created": int(time.time())}
        self.card["owned_by"] = "tilewright"

    @contextlib.contextmanager
    def under_way(self, asker: Any, requests: int) -> Iterator[None]:
        """Counts requests of a client while they are under way. Raises HTTPException, 429."""
        if self.busy[asker] + requests > self.limits.of_client:
            rule = f"a client has at most {self.limits.of_client} requests under way"
            raise HTTPException(429, f"{rule}: wait for an answer")
        self.busy[asker] += requests
        try:
            yield
        finally:
            self.busy -= Counter({asker: requests})  # keeps those above zero

    async def page(self) -> FileResponse:
        """A page to chat with the model."""
        return FileResponse(Path(__file__).with_name("page.html"))

    async def health(self) -> Response:
        """200 once the engine is ready, 503 while it is being started."""
        is_ready = self.worker.is_ready
        status = {"status": "ok" if is_ready else "the engine is being started"}
        return JSONResponse(status, 200 if is_ready else 503)

    async def metrics(self) -> PlainTextResponse:
        """Counts of requests, tokens and pages, as Prometheus reads them."""
        return PlainTextResponse(generate_latest(self), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Metric]:
        """The counts of the worker, for prometheus_client."""
        values = self.worker.counts | {"engine_restarts_total": self.worker.restarts}
        for name, value in values.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"tilewright_{name}", name.replace("_", " "), value)

    async def models(self) -> dict[str, Any]:
        """A list of models: the one that is served."""
        return {"object": "list", "data": [self.card]}

    async def model(self, wanted: str) -> dict[str, Any]:
        """The card of the model; 404 for another name."""
        self._check_model(wanted)
        return self.card

    async def completions(self, body: Completion, http: Request) -> Response:
        """Continues prompts (texts, or tokens as ids): the texts, or a stream of events."""
        self._check_model(body.model)
        asked = body.prompt
        if isinstance(asked, str) or (asked and isinstance(asked[0], int)):
            asked = [asked]
        prompts = await asyncio.to_thread(self._encoded, asked)
        return await self._answer(http, body, prompts, body.sampling(16, body.logprobs))

    async def chat(self, body: Chat, http: Request) -> Response:
        """Answers a chat: `n` messages, or a stream of events."""
        self._check_model(body.model)
        if body.max_completion_tokens is not None:
            body.max_tokens = body.max_completion_tokens
        schema = body.response_format.schema_text() if body.response_format else ""
        top = body.top_logprobs if body.logprobs else None
        how = body.sampling(self.prompts.context, top, schema)
        tools = body.tools if body.tool_choice != "none" else None
        prompt = await asyncio.to_thread(self.prompts.prompt, body.messages, tools)
        if schema:
            from tilewright.serve.grammar import check_effort

            await asyncio.to_thread(check_effort, schema)
        return await self._answer(http, body, [prompt], how)

    async def tokenize(self, body: Tokenize) -> dict[str, Any]:
        """The tokens of a prompt or of messages, their count, and the longest that there may be."""
        self._check_model(body.model)
        if (body.messages is None) == (body.prompt is None):
            raise HTTPException(400, "prompt or messages, one of them")
        if body.messages is not None:
            tokens = await asyncio.to_thread(self.prompts.prompt, body.messages, body.tools)
        else:
            (tokens,) = await asyncio.to_thread(self._encoded, [body.prompt])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.prompts.context}

    def _check_model(self, model: str) -> None:
        if model not in ("", self.name):
            raise HTTPException(404, f"there is no model {model[:80]!r}, only {self.name!r}")

    def _encoded(self, asked: Any) -> list[list[int]]:
        """Texts as tokens, none of them control tokens; ids as they are."""
        encode = self.prompts.tokenizer.encode
        return [encode(p, special=False) if isinstance(p, str) else list(p) for p in asked]

    async def _answer(
        self, http: Request, body: Body, prompts: list[list[int]], how: Sampling
    ) -> Response:
        """`body.n` answers to each prompt, together. A stream has the status of its first piece."""
        jobs = [tokens for tokens in prompts for _ in range(body.n)]
        most = min(self.limits.waiting, self.limits.of_client)
        if not 0 < len(jobs) <= most:
            rule = f"{len(jobs)} answers, 1 to {most} are given at once"
            raise ModelError("M106", rule, where="n")
        for tokens in prompts:
            check_tokens(tokens, how, self.prompts.vocab, self.prompts.context)
        if self.worker.pending + len(jobs) > self.limits.waiting:
            raise HTTPException(429, f"{self.limits.waiting} requests wait or run: try again later")
        shape = Shape(body, self.name, self.prompts.tokenizer)
        pieces, prompt_tokens = self._pieces(http, body, jobs, how), sum(map(len, prompts))
        item = await anext(pieces)  # until this one nothing is awaited: the limit above holds
        if body.stream:
            stream = _stream(body, shape, item, pieces, prompt_tokens)
            return StreamingResponse(stream, media_type="text/event-stream")
        joined = [Piece()] * len(jobs)
        while item:
            joined[item[0]] += item[1]
            item = await anext(pieces, None)
        return JSONResponse(shape.answer(prompt_tokens, joined))

    async def _pieces(
        self, http: Request, body: Body, jobs: list[list[int]], how: Sampling
    ) -> AsyncGenerator[Item]:
        """The pieces of all answers as they come. Leaving ends the answers."""
        queue = asyncio.Queue[Item]()
        looked = began = time.monotonic()
        more = len(jobs) - 1  # the gate has counted one
        with self.under_way(http.scope["asker"], more), contextlib.ExitStack() as at_end:
            for i, tokens in enumerate(jobs):
                own = how if how.seed is None else replace(how, seed=how.seed + i % body.n)
                put = functools.partial(lambda i, piece: queue.put_nowait((i, piece)), i)
                at_end.callback(self.worker.cancel, self.worker.submit(tokens, own, put))
            left = len(jobs)
            while left:
                now = time.monotonic()
                if now - began > self.limits.answer_s:
                    raise HTTPException(503, f"no answer in {self.limits.answer_s:g} seconds")
                if now - looked > LOOK_S:
                    looked = now
                    if await http.is_disconnected():
                        raise HTTPException(499, "the client has left")
                try:
                    index, piece = await asyncio.wait_for(queue.get(), LOOK_S)
                except TimeoutError:
                    continue
                if piece.error is not None:
                    raise piece.error
                left -= bool(piece.finish)
                yield index, piece


async def _stream(
    body: Body, shape: Shape, item: Item | None, pieces: AsyncGenerator[Item], prompt_tokens: int
) -> AsyncIterator[str]:  # fmt: skip
    """Server-sent events of an item and the pieces behind it."""
    last: dict[int, Piece] = {}
    try:
        async with contextlib.aclosing(pieces):
            while item:
                index, piece = item
                if piece.text or piece.logprobs or piece.finish:
                    yield shape.chunk([shape.part(index, piece, index not in last)])
                    last[index] = piece
                item = await anext(pieces, None)
        if body.stream_options and body.stream_options.include_usage:
            yield shape.chunk([], usage=usage(prompt_tokens, [*last.values()]))
    except Exception as error:  # the status line has been sent
        yield event(failure(error)[0])
    yield "data: [DONE]\n\n"


class Gate:
    """ASGI middleware: refuses requests without a key, those of a client that has too many under
    way, and bodies that are too large or too slow; gives each request an id, in a header and a line
    of the log."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server, self.limits = app, server, server.limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent_key = dict(scope["headers"]).get(b"authorization", b"")
        keys = [f"Bearer {key}".encode() for key in self.limits.api_keys]
        is_known = any(hmac.compare_digest(sent_key, key) for key in keys)
        is_open = scope["path"] in ("/", "/health")  # the page asks for the key
        scope["asker"] = asker = sent_key if is_known else (scope["client"] or [""])[0]
        number, began, sent = f"req-{secrets.token_hex(8)}", time.monotonic(), {}

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            # A client that reads nothing must not keep its answers, and the end of the server.
            await asyncio.wait_for(send(message), self.limits.answer_s)

        try:
            if keys and not (is_known or is_open):
                raise HTTPException(401, "the API key is wrong or missing")
            with self.server.under_way(asker, 0 if is_open else 1):
                await self.app(scope, self._limited(receive), named)
        except HTTPException as error:  # of this gate: the application answers its own
            await JSONResponse(*failure(error))(scope, receive, named)
        except TimeoutError:
            if not sent:
                raise
            sent["status"] = 499  # of `named`: the connection is closed
        finally:
            ms = round(1e3 * (time.monotonic() - began), 1)
            line = {"id": number, "method": scope["method"], "path": scope["path"][:200], "ms": ms}
            LOG.info(json.dumps(line | sent))

    def _limited(self, receive: Any) -> Any:
        """Receives a body within the limits of bytes and time, then what comes behind it."""
        ends, left, more = time.monotonic() + self.limits.body_s, self.limits.body_bytes, True

        async def limited() -> Any:
            nonlocal left, more
            patience = ends - time.monotonic() if more else None
            try:
                message = await asyncio.wait_for(receive(), patience)
            except TimeoutError:
                raise HTTPException(408, "the body does not come") from None
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, f"the body has more than {self.limits.body_bytes} bytes")
            return message

        return limited


def build_app(
    prompts: Prompts, worker: Worker, name: str, limits: ServerLimits | None = None
) -> FastAPI:  # fmt: skip
    """The application that serves a model under a name. Its engine stops when it shuts down."""
    server = Server(prompts, worker, name, limits or ServerLimits())

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(*failure(error), getattr(error, "headers", None))

    app = FastAPI(
        title="Tilewright", lifespan=lambda _: worker.running(), docs_url=None, redoc_url=None,
        responses={"default": {"model": protocol.Failure, "description": "An error"}},
    )  # fmt: skip
    app.state.server = server
    app.add_middleware(Gate, server=server)
    for kind in (AnyHTTPException, RequestValidationError, TilewrightError, Exception):
        app.add_exception_handler(kind, failed)
    app.get("/", include_in_schema=False)(server.page)
    app.get("/health")(server.health)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{wanted:path}")(server.model)
    streamed: Any = {200: {"content": {"text/event-stream": {}}}}
    app.post("/v1/completions", responses=streamed)(server.completions)
    app.post("/v1/chat/completions", responses=streamed)(server.chat)
    app.post("/tokenize")(server.tokenize)
    return app
