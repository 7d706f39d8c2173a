"""OpenAI's JSON: bodies of requests, answers, pieces of streams, errors. Needs extra `serve`."""

import json
import secrets
import time
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from starlette.exceptions import HTTPException

from tilewright.errors import TilewrightError
from tilewright.serve.request import Sampling, TokenLogprob
from tilewright.serve.tokenizer import Tokenizer
from tilewright.serve.worker import Piece

MAX_MESSAGE = 500  # characters of an error
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
BAD_REQUEST = ("E101", "M105", "M106", "M107", "M110")
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # else a million wrong ones are as many errors


class Strict(BaseModel):
    """Unknown fields are refused, at every depth, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """`include_usage`: a stream ends with the counts of tokens."""

    include_usage: bool = False


class Schema(Strict):
    """A JSON schema that an answer keeps to."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str = ""
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Strict):
    """What an answer is: any text, an object of JSON, what a schema or a grammar says."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: Schema | None = None
    grammar: str = ""

    @model_validator(mode="after")
    def _has_its_grammar(self) -> "ResponseFormat":
        if (self.type == "grammar") != bool(self.grammar):
            raise ValueError("grammar= goes with type grammar, which needs one")
        return self

    def schema_text(self) -> str:
        """The JSON schema or the grammar of an answer, "" for none."""
        if self.type in ("text", "grammar"):
            return self.grammar
        asked = self.json_schema.schema_ if self.json_schema else None
        return json.dumps({"type": "object"} if self.type == "json_object" else asked)


_HINTS, _OTHERS = get_type_hints(Sampling), ("logprobs", "schema", "logit_bias")
_KINDS = {f.name: (_HINTS[f.name], f.default) for f in fields(Sampling) if f.name not in _OTHERS}
_OfSampling = create_model("OfSampling", __base__=Strict, **cast("Any", _KINDS))


class Body(_OfSampling):
    """The fields that both endpoints share: those of a Sampling, some of another kind here, and
    more. Those of accounting are taken and not used."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Items[str] | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None  # keys are texts
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling(self, max_tokens: int, logprobs: int | None, schema: str = "") -> Sampling:
        """How the answer is chosen; `max_tokens` where the client names none. Raises
        ModelError[M106]."""
        names = set(Sampling.__dataclass_fields__) - {"logprobs"}
        chosen: dict[str, Any] = {"max_tokens": max_tokens}
        chosen |= self.model_dump(include=names, exclude_none=True)
        if isinstance(self.stop, str):
            chosen["stop"] = [self.stop]
        return Sampling(**chosen, logprobs=logprobs, schema=schema)


class Completion(Body):
    """A request to continue texts; lists of integers are tokens."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = None
    echo: Literal[False] = False


class Chat(Body):
    """A request to answer the messages of a chat; `top_logprobs` need `logprobs`."""

    messages: Items[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: ResponseFormat | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class Tokenize(Strict):
    """A prompt or messages, one of them, whose tokens are wanted."""

    model: str = ""
    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None


_TEXT: Any = (str, ...)
_OPTIONAL: Any = (str | None, ...)
Error = create_model("Error", message=_TEXT, type=_TEXT, param=_OPTIONAL, code=_OPTIONAL)
Failure = create_model("Failure", error=(Error, ...))  # the shape of what `failure` returns


class Shape:
    """The JSON of the answers to a body."""

    def __init__(self, body: Body, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.is_chat = tokenizer, isinstance(body, Chat)
        shown = getattr(body, "logprobs", None)  # 0 of a completion: those of its tokens alone
        self.with_logprobs = shown is not None and shown is not False
        kind = "chat.completion" if self.is_chat else "text_completion"
        number = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.head = {"id": number, "object": kind, "created": int(time.time()), "model": model}

    def answer(self, prompt_tokens: int, pieces: list[Piece]) -> dict[str, Any]:
        """The whole body: a choice for each piece, and the counts of tokens."""
        choices = [self._choice(i, piece, "message") for i, piece in enumerate(pieces)]
        return self.head | {"choices": choices, "usage": usage(prompt_tokens, pieces)}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return event(self.head | {"object": kind, "choices": choices} | more)

    def part(self, index: int, piece: Piece, is_first: bool) -> dict[str, Any]:
        """What a step added to an answer."""
        choice = self._choice(index, piece, "delta")
        if self.is_chat and not is_first:
            del choice["delta"]["role"]
        return choice

    def _choice(self, index: int, piece: Piece, key: str) -> dict[str, Any]:
        content: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            content = {key: {"role": "assistant", "content": piece.text}}
        ends = {"": None, "cancel": "stop"}.get(piece.finish, piece.finish)
        shown = self._logprobs(piece.logprobs) if self.with_logprobs else None
        return {"index": index, **content, "logprobs": shown, "finish_reason": ends}

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        if self.is_chat:
            rows = [
                self._token(x.token, x.logprob)
                | {"top_logprobs": [self._token(t, p) for t, p in x.top]}
                for x in logprobs
            ]
            return {"content": rows}
        tokens = [self._text(x.token) for x in logprobs]
        top = [{self._text(t): p for t, p in x.top} for x in logprobs]
        values = [x.logprob for x in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}

    def _text(self, token: int) -> str:
        return self.tokenizer.piece(token).decode("utf-8", "replace")

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self.tokenizer.piece(token))
        return {"token": self._text(token), "logprob": logprob, "bytes": spelled}


def usage(prompt_tokens: int, answers: list[Piece]) -> dict[str, Any]:
    """Counts of tokens: of the prompt, of all answers, and those read from the prefix cache."""
    written, cached = sum(a.answered for a in answers), sum(a.cached for a in answers)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": written,
        "total_tokens": prompt_tokens + written, "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def event(value: Any) -> str:
    """A server-sent event with a value as JSON."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def failure(error: Exception) -> tuple[dict[str, Any], int]:
    """An error in OpenAI's shape, and its status. What went wrong inside is not told."""
    status, message, param = 500, "the server failed to answer this request", None
    code = error.code if isinstance(error, TilewrightError) else None
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(ascii(part).strip("'")[:80] for part in first["loc"][1:]) or "body"
        status, message = 400, f"{param}: {first['msg']}"
    elif isinstance(error, TilewrightError) and (code == "M109" or code in BAD_REQUEST):
        status, param = 503 if code == "M109" else 400, error.where or None
        message = f"{error.message}. {error.hint}".removesuffix(". ")
        code = "context_length_exceeded" if code == "M105" else code
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = message[:MAX_MESSAGE].encode(errors="replace").decode()  # it may quote the request
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status
