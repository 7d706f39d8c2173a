"""OpenAI's JSON: bodies of requests, answers, pieces of streams, errors. Needs extra `serve`."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from tilewright.errors import ModelError, TilewrightError
from tilewright.serve.engine import LLM
from tilewright.serve.request import Sampling, TokenLogprob
from tilewright.serve.worker import Piece

MAX_MESSAGE = 500  # characters of an error


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextFormat(BaseModel):
    type: Literal["text"]


class Body(BaseModel):
    """The fields that both endpoints share. Unknown ones are refused; those of accounting are
    taken and not used."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # beyond OpenAI's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    priority: int = Field(0, ge=-100, le=100)

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """Raises ModelError[M106]."""
        return Sampling(
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            presence=self.presence_penalty, frequency=self.frequency_penalty,
            repetition=self.repetition_penalty, logit_bias=self.logit_bias or {}, seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            ignore_end=self.ignore_eos, logprobs=logprobs,
        )  # fmt: skip


class Completion(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: Literal[False] = False


class Chat(Body):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: TextFormat | None = None


class Shape:
    """The JSON of one endpoint."""

    def __init__(self, llm: LLM, is_chat: bool, with_logprobs: bool) -> None:
        self.llm, self.is_chat, self.with_logprobs = llm, is_chat, with_logprobs
        self.kind = "chat.completion" if is_chat else "text_completion"
        self.chunk_kind = "chat.completion.chunk" if is_chat else self.kind
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"

    def head(self, model: str, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, logprobs: Any, finish: str) -> dict[str, Any]:
        content = (
            {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        )
        return self._choice(index, content, logprobs, finish)

    def part(self, index: int, text: str, logprobs: Any, finish: str) -> dict[str, Any]:
        content = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return self._choice(index, content, logprobs, finish)

    def first(self, index: int) -> dict[str, Any]:
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), "")

    def _choice(self, index: int, content: Any, logprobs: Any, finish: str) -> dict[str, Any]:
        ends = {"": None, "cancel": "stop"}.get(finish, finish)
        shown = self._logprobs(logprobs) if self.with_logprobs else None
        return {"index": index, **content, "logprobs": shown, "finish_reason": ends}

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        if not self.is_chat:
            tokens = [self._text(x.token) for x in logprobs]
            top = [{self._text(t): p for t, p in x.top} for x in logprobs]
            values = [x.logprob for x in logprobs]
            return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}
        return {
            "content": [
                self._token(x.token, x.logprob)
                | {"top_logprobs": [self._token(t, p) for t, p in x.top]}
                for x in logprobs
            ]
        }

    def _text(self, token: int) -> str:
        return self.llm.tokenizer.piece(token).decode("utf-8", "replace")

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self.llm.tokenizer.piece(token))
        return {"token": self._text(token), "logprob": logprob, "bytes": spelled}


def usage(read: int, answers: list[Piece]) -> dict[str, Any]:
    written, cached = sum(a.answered for a in answers), sum(a.cached for a in answers)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def event(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def described(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, message, argument and code of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None, None
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(ascii(part).strip("'")[:80] for part in first["loc"][1:])
        return 400, f"{where}: {first['msg']}", where, None
    if isinstance(error, ModelError) and error.code in ("M105", "M106", "M107"):
        message = f"{error.message}. {error.hint}".removesuffix(". ")
        code = "context_length_exceeded" if error.code == "M105" else error.code
        return 400, message, error.where or None, code
    code = error.code if isinstance(error, TilewrightError) else None
    return 500, "the server failed to answer this request", None, code


def failure(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> tuple[dict[str, Any], int]:
    """An error in OpenAI's shape, and its status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = message[:MAX_MESSAGE].encode(errors="replace").decode()  # it may quote the request
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status
