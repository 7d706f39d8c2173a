"""Renders a conversation as the prompt of a model, by the model's own chat template.

    chat = ChatTemplate.from_metadata(model.metadata, tokenizer)
    ids = chat.tokens([{"role": "user", "content": "What is the capital of France?"}])

A template is a program from a model file: it runs in Jinja's immutable sandbox, in a process with
limits of time and memory (`template_worker.py`).

The text of a message never becomes a control token; only the template may write these. So each
control token that the source of the template spells is replaced by a marker, a lone surrogate,
which no message may contain, and markers in the rendered text become the control tokens. Where the
rendered text spells a control token nevertheless, either a message contains it or the template
joined it from pieces, such as `'<|' + role + '|>'`. Then the template is rendered again with the
punctuation of control tokens replaced in the messages: what is still spelled comes from the
template.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import subprocess
import sys
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.gguf import Metadata, Value
from tilewright.serve.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 16
MAX_MESSAGES = 1 << 12
MAX_PROMPT_BYTES = 1 << 26  # of a rendered prompt as JSON
MAX_SECONDS = 2.0  # of processor time, in one rendering
MAX_BYTES = 1 << 29  # of memory, in the process that renders

Message = dict[str, Any]


def check_messages(messages: Any) -> list[Message]:
    """Returns the messages with the fields that templates know, without those that are None.

    `content` is a str, or the parts `{"type": "text", "text": ...}` of the OpenAI API, which are
    joined; it may be None beside `tool_calls`, a list of objects. `name`, `reasoning_content` and
    `tool_call_id` are str. A system message may only come first. Raises ModelError[M106].
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise _malformed("messages is not a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise _malformed(f"{len(messages)} messages (limit {MAX_MESSAGES})", "messages")
    checked = [_check_message(message, i) for i, message in enumerate(messages)]
    try:
        json.dumps(checked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("a text holds a lone surrogate", "messages") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _malformed(f"a message is not JSON: {str(error)[:80]}", "messages") from None
    return checked


def _check_message(message: Any, i: int) -> Message:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise _malformed(f"a message is a {type(message).__name__}, not an object", where)
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role not in ROLES:
        rule = f"role is {str(role)[:40]!r}, not one of {', '.join(ROLES)}"
        raise _malformed(rule, f"{where}.role")
    if role == "system" and i > 0:
        raise _malformed("a system message comes after others", where)
    if isinstance(content, list):
        content = "".join(
            _part_text(part, f"{where}.content[{j}]") for j, part in enumerate(content)
        )
    fields = {"content": content}
    fields |= {key: message.get(key) for key in ("name", "reasoning_content", "tool_call_id")}
    for key, value in fields.items():
        if not isinstance(value, str) and not (value is None and (key != "content" or calls)):
            raise _malformed(f"{key} is a {type(value).__name__}, not text", f"{where}.{key}")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise _malformed("tool_calls is not a list of objects", f"{where}.tool_calls")
        fields["tool_calls"] = calls
    optional = {key: value for key, value in fields.items() if value is not None}
    return {"role": str(role), "content": content} | optional


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        rule = 'a part is not {"type": "text", "text": ...}; only text is supported'
        raise _malformed(rule, where)
    return text


def _malformed(rule: str, where: str) -> ModelError:
    hint = '[{"role": "user", "content": "Hello"}] is a conversation'
    return ModelError("M106", rule, where=where, hint=hint)


class ChatTemplate:
    """A chat template and the tokenizer of its model. May be used from several threads.

    The first use, or `start`, compiles the source; an error in it is raised by the first use."""

    def __init__(self, source: str, tokenizer: Tokenizer | None = None) -> None:
        self.source, self.tokenizer = source, tokenizer
        names = {"bos_token": "", "eos_token": ""}
        self._control: dict[str, int] = {}
        patterns: list[str] = []
        if tokenizer is not None:
            special = tokenizer.special.items()
            self._control = {text: i for text, i in special if i in tokenizer.control}
            for name, token in tokenizer.named.items():
                names[f"{name}_token"] = tokenizer.piece(token).decode("utf-8", "replace")
            patterns = [tokenizer.any_special.pattern]
        surrogates = map(chr, range(0xDC00, 0xE000))
        characters = sorted(
            c for c in set("".join(self._control)) if not (c.isalnum() or c in "_ \t\n")
        )
        self._substitutes = dict(zip(map(ord, characters), surrogates, strict=False))
        spelled = dict.fromkeys(self._spelled("\n".join([source, *names.values()])))
        self._markers = dict(zip(spelled, surrogates, strict=False))
        replaced = {ord(marker): text for text, marker in self._markers.items()}
        self._originals = replaced | {ord(s): chr(c) for c, s in self._substitutes.items()}
        self._special = re.compile("|".join([*self._markers.values(), *patterns]))
        self._names = {name: self._marked(text) for name, text in names.items()}
        self._worker = _Worker(self._marked(source))

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Value], tokenizer: Tokenizer | None = None
    ) -> ChatTemplate:
        """From `tokenizer.chat_template` of a GGUF file. Raises ModelError[M107] without one."""
        source = template_of(metadata)
        if not source:
            hint = "it completes text: use generate instead of chat"
            raise _unusable("the model has none", hint)
        return cls(source, tokenizer)

    def start(self) -> None:
        """Starts the process that renders and does not wait for it, so that it compiles the
        template while the caller does other work. Errors are left to the first use."""
        if len(self.source) <= MAX_TEMPLATE_CHARS:
            self._worker.start()

    def compiles(self) -> bool:
        """Returns whether the source is a template. Raises MissingExtra."""
        try:
            return len(self.source) <= MAX_TEMPLATE_CHARS and "error" not in self._worker.ask(None)
        except ModelError:
            return False

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the prompt of a conversation, up to the answer of the assistant.

        Without `add_generation_prompt` it ends behind the last message. Raises ModelError: M106 for
        messages that are not well formed or that the template refuses, M107 for a template that
        fails or takes too much time or memory.
        """
        return self._rendered(messages, add_generation_prompt).translate(self._originals)

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Returns the prompt as tokens, of which only the template writes control tokens.

        The beginning token comes once, whether the template writes it or the model asks for it.
        Raises as `render`.
        """
        tokenizer = self.tokenizer
        assert tokenizer is not None, "tokens need the tokenizer of the model"
        text = self._rendered(messages, add_generation_prompt)
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            spelling = match[0].translate(self._originals)
            # A spelling without punctuation has no substitutes, so it may come from a message.
            from_template = match[0] != spelling or spelling != spelling.translate(
                self._substitutes
            )
            if from_template and spelling in self._control:
                ids += [*self._plain(text[start : match.start()]), self._control[spelling]]
                start = match.end()
        ids += self._plain(text[start:])
        bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
        return ids if ids[:1] == bos else bos + ids

    def fit(self, messages: Sequence[Mapping[str, Any]], limit: int) -> tuple[list[int], int]:
        """Returns the longest end of a conversation that takes at most `limit` tokens, as tokens,
        and the number of messages left out.

        A leading system message and the last message always stay; of the others the oldest go
        first, down to the next user message, so that the rest begins with a question. Raises
        ModelError[M105] when even the shortest form does not fit, and as `render`.
        """
        checked = check_messages(messages)
        first = 1 if checked[0]["role"] == "system" else 0
        later = [i for i in range(first + 1, len(checked)) if checked[i]["role"] == "user"]
        starts = [first, *later]

        @functools.cache
        def tokens(start: int) -> list[int]:
            return self.tokens([*checked[:first], *checked[start:]])

        def fits(start: int) -> bool:
            return len(tokens(start)) <= limit

        if fits(first):
            return tokens(first), 0
        if not fits(starts[-1]):
            rule = f"the prompt takes {len(tokens(starts[-1]))} tokens, {limit} fit"
            hint = "shorten the last message or the system message"
            raise ModelError("M105", rule, hint=hint)
        start = starts[bisect_left(starts, True, key=fits)]
        return tokens(start), start - first

    def _spelled(self, text: str) -> Iterable[str]:
        """The control tokens that a text spells."""
        if self.tokenizer is None:
            return []
        return [s for s in self.tokenizer.any_special.findall(text) if s in self._control]

    def _marked(self, text: str) -> str:
        if self.tokenizer is None:
            return text
        return self.tokenizer.any_special.sub(lambda m: self._markers.get(m[0], m[0]), text)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt with markers for control tokens, and perhaps substitutes in the messages."""
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise _unusable(f"{len(self.source)} characters (limit {MAX_TEMPLATE_CHARS})")
        checked = check_messages(messages)
        variables = {"messages": checked, "tools": None, "documents": None, **self._names}
        variables["add_generation_prompt"] = add_generation_prompt
        text = self._worker.render(variables)
        if not self._spelled(text):
            return text
        try:
            protected = [self._substituted(m) | {"role": m["role"]} for m in checked]
        except RecursionError:
            raise _malformed("a message is nested too deeply", "messages") from None
        return self._worker.render(variables | {"messages": protected})

    def _substituted(self, value: Any) -> Any:
        """A field of a message with substitutes. Keys that a template may ask for stay."""
        if isinstance(value, str):
            return value.translate(self._substitutes)
        if isinstance(value, list | tuple):
            return [self._substituted(item) for item in value]
        if isinstance(value, dict):
            return {
                key if str(key).isidentifier() else self._substituted(key): self._substituted(item)
                for key, item in value.items()
            }
        return value

    def _plain(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.encode(text.translate(self._originals), special=False, bos=False)


def template_of(metadata: Mapping[str, Value]) -> str:
    """Returns the chat template of a model, empty without one. Raises ModelError[M107]."""
    return Metadata(metadata, code="M107").text("tokenizer.chat_template", "")


def _unusable(rule: str, hint: str = "") -> ModelError:
    return ModelError("M107", f"the chat template cannot be used: {rule}", hint=hint)


class _Worker:
    """The process that renders a template: started by the first request, and again if it died."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._compiled: dict[str, str] | None = None  # the answer to the setup, once it was read
        self._lock = threading.Lock()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises ModelError: M106 where the template refuses the messages, M107; MissingExtra."""
        answer = self.ask(variables)
        if "refused" in answer:
            rule = f"the chat template refuses these messages: {answer['refused']}"
            raise ModelError("M106", rule)
        if "error" in answer:
            raise _unusable(answer["error"])
        return answer["text"]

    def start(self) -> None:
        """Starts the process without waiting for an answer."""
        with self._lock, contextlib.suppress(OSError, MissingExtra):  # `ask` raises them again
            if self._process is None:
                self._launch()

    def ask(self, variables: Mapping[str, Any] | None) -> dict[str, str]:
        """Returns the answer to a rendering; the compiler's for None or a source that failed."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._launch()
                self._compiled = self._compiled or self._answer()
                if variables is None or "error" in self._compiled:
                    return self._compiled
                self._send(variables)
                return self._answer()
            except BaseException as error:  # after an interrupt the pipe may hold an old answer
                self._stop()
                if not isinstance(error, OSError | ValueError):
                    raise
                limits = f"{MAX_SECONDS:g} s of processor time or {MAX_BYTES >> 20} MiB"
                written = f"writes more than {MAX_PROMPT_BYTES >> 20} MiB"
                raise _unusable(f"it takes more than {limits}, or {written}") from None

    def _launch(self) -> None:
        if find_spec("jinja2") is None:
            hint = "pip install 'tilewright[models]'"
            raise MissingExtra("E101", "chat templates need jinja2", hint=hint)
        self._compiled = None
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C at a terminal is for the caller
        )
        self._end = weakref.finalize(self, _kill, self._process)
        setup = {"path": sys.path, "source": self._source}
        self._send(setup | {"seconds": MAX_SECONDS, "bytes": MAX_BYTES})

    def _send(self, request: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, str]:
        assert self._process is not None and self._process.stdout is not None
        return json.loads(self._process.stdout.readline(MAX_PROMPT_BYTES))

    def _stop(self) -> None:
        if self._process is not None:
            self._process = None
            self._end()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError), process:
        process.kill()
