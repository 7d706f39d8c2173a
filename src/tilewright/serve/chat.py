"""Messages to a prompt: checks a conversation and renders it by the model's own chat template.

    chat = ChatTemplate.from_metadata(model.metadata, tokenizer)
    ids = chat.tokens([{"role": "user", "content": "What is the capital of France?"}])

A template comes out of a model file, so it runs in Jinja's immutable sandbox, in a process with
limits of time and memory (`template_worker.py`).

Text of a message never becomes a control token: only the template may write these. In the source
of the template, and in the variables `bos_token` and so on, each spelling of a control token is
replaced by a mark (a lone surrogate, which no text may hold); marks in the rendered text are the
control tokens. Messages reach the template as they are, so it may cut and compare them. Where the
rendered text still spells a control token, either a message does or the template has put the
spelling together, such as `'<|' + role + '|>'`. The template is then rendered again with the
punctuation of control tokens in the messages replaced by substitutes: what still spells a control
token is the template's.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.gguf import Metadata, Value
from tilewright.serve.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 16
MAX_MESSAGES = 1 << 12
MAX_PROMPT_CHARS = 1 << 24
MAX_SECONDS = 2.0  # of processor time, in one rendering
MAX_BYTES = 1 << 29  # of memory, in the process that renders

Message = dict[str, Any]


def check_messages(messages: Any) -> list[Message]:
    """The messages with the fields that templates know; fields that are None are left out.

    `content` is a str, or the parts `{"type": "text", "text": ...}` of the OpenAI API, which are
    joined; it may be None beside `tool_calls`, a list of objects. `name`, `reasoning_content` and
    `tool_call_id` are str. A system message may only come first. Raises ModelError[M106].
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise _malformed("messages is not a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise _malformed(f"{len(messages)} messages (limit {MAX_MESSAGES})", "messages")
    out = [_checked(message, i) for i, message in enumerate(messages)]
    try:
        json.dumps(out, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("a text holds a lone surrogate", "messages") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _malformed(f"a message is not JSON: {str(error)[:80]}", "messages") from None
    return out


def _checked(message: Any, i: int) -> Message:
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
        parts = (_text_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
        content = "".join(parts)
    if not isinstance(content, str) and not (content is None and calls):
        raise _malformed(f"content is a {type(content).__name__}, not text", f"{where}.content")
    out: Message = {"role": str(role), "content": content}
    for key in ("name", "reasoning_content", "tool_call_id"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise _malformed(f"{key} is a {type(value).__name__}, not text", f"{where}.{key}")
        out |= {} if value is None else {key: value}
    if calls is None:
        return out
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _malformed("tool_calls is not a list of objects", f"{where}.tool_calls")
    return out | {"tool_calls": calls}


def _text_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _malformed(
            'a part is not {"type": "text", "text": ...}; only text is supported', where
        )
    return text


def _malformed(rule: str, where: str) -> ModelError:
    hint = '[{"role": "user", "content": "Hello"}] is a conversation'
    return ModelError("M106", rule, where=where, hint=hint)


class ChatTemplate:
    """A chat template and the tokenizer of its model. May be used from several threads.

    The first use compiles it, so a template that is damaged fails there and not here."""

    def __init__(self, source: str, tokenizer: Tokenizer | None = None) -> None:
        self.source, self.tokenizer = source, tokenizer
        names = {"bos_token": "", "eos_token": ""}
        control: dict[str, int] = {}
        if tokenizer is not None:
            control = {t: i for t, i in tokenizer.special.items() if i in tokenizer.control}
            for name, token in tokenizer.named.items():
                names[f"{name}_token"] = tokenizer.piece(token).decode("utf-8", "replace")
        self._control = control
        surrogates = map(chr, range(0xDC00, 0xE000))
        characters = sorted(c for c in set().union(*control) if not (c.isalnum() or c in "_ \t\n"))
        self._substitutes = dict(zip(map(ord, characters), surrogates, strict=False))
        spelled = self._spelled("\n".join([source, *names.values()]))
        self._marks = dict(zip(spelled, surrogates, strict=False))
        self._originals = {ord(mark): text for text, mark in self._marks.items()}
        self._originals |= {ord(sub): chr(c) for c, sub in self._substitutes.items()}
        special = [*self._marks.values(), *([tokenizer.any_special.pattern] if tokenizer else [])]
        self._special = re.compile("|".join(special))
        self._names = {name: self._marked(text) for name, text in names.items()}
        self._worker = _Worker(self._marked(source))

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Value], tokenizer: Tokenizer | None = None
    ) -> ChatTemplate:
        """From `tokenizer.chat_template` of a GGUF file. Raises ModelError[M107] without one."""
        source = template_of(metadata)
        if not source:
            raise _unusable(
                "the model has none", hint="it completes text: use generate instead of chat"
            )
        return cls(source, tokenizer)

    def compiles(self) -> bool:
        """Whether the source is a template. Raises MissingExtra."""
        try:
            return len(self.source) <= MAX_TEMPLATE_CHARS and "error" not in self._worker.ask(None)
        except ModelError:
            return False

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, up to where the assistant begins to speak.

        Without `add_generation_prompt` it ends behind the last message. Raises ModelError: M106 for
        messages that are not well formed or that the template refuses, M107 for a template that
        fails or takes too much time or memory.
        """
        return self._rendered(messages, add_generation_prompt).translate(self._originals)

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt as tokens, where only the template writes control tokens. Raises as `render`.

        The beginning token comes once, whether the template writes it or the model asks for it.
        """
        tokenizer = self.tokenizer
        assert tokenizer is not None, "tokens need the tokenizer of the model"
        text = self._rendered(messages, add_generation_prompt)
        out: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            spelling = match[0].translate(self._originals)
            # A spelling without punctuation has no substitutes, so it may come from a message.
            written = match[0] != spelling or spelling != spelling.translate(self._substitutes)
            if written and spelling in self._control:
                out += self._plain(text[start : match.start()])
                out.append(self._control[spelling])
                start = match.end()
        out += self._plain(text[start:])
        bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
        return out if out[:1] == bos else bos + out

    def fit(self, messages: Sequence[Mapping[str, Any]], limit: int) -> tuple[list[int], int]:
        """The longest end of a conversation that takes at most `limit` tokens, as tokens.

        A leading system message and the last message always stay; of the others the oldest go
        first, down to the next user message, so that the rest begins with a question. The second
        value is the number of messages left out. Raises ModelError[M105] when even the shortest
        form does not fit, and what `render` raises.
        """
        checked = check_messages(messages)
        first = 1 if checked[0]["role"] == "system" else 0
        starts = [
            first,
            *(i for i in range(first + 1, len(checked)) if checked[i]["role"] == "user"),
        ]

        def tokens(start: int) -> list[int]:
            return self.tokens([*checked[:first], *checked[start:]])

        ids, best = tokens(starts[0]), 0
        if len(ids) > limit:
            # The prompt only shrinks as more is left out: halve the interval (too_long, best].
            too_long, best = 0, len(starts) - 1
            ids = tokens(starts[best])
            if len(ids) > limit:
                hint = "shorten the last message or the system message"
                raise ModelError(
                    "M105", f"the prompt takes {len(ids)} tokens, {limit} fit", hint=hint
                )
            while best - too_long > 1:
                middle = (too_long + best) // 2
                shorter = tokens(starts[middle])
                if len(shorter) <= limit:
                    ids, best = shorter, middle
                else:
                    too_long = middle
        return ids, starts[best] - first

    # -- marks -----------------------------------------------------------------------------------

    def _spelled(self, text: str) -> dict[str, None]:
        """The control tokens that a text spells, once each."""
        if self.tokenizer is None:
            return {}
        found = (match[0] for match in self.tokenizer.any_special.finditer(text))
        return dict.fromkeys(spelling for spelling in found if spelling in self._control)

    def _marked(self, text: str) -> str:
        if self.tokenizer is None:
            return text
        return self.tokenizer.any_special.sub(lambda m: self._marks.get(m[0], m[0]), text)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt with marks for control tokens, perhaps with substitutes in the messages."""
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise _unusable(f"{len(self.source)} characters (limit {MAX_TEMPLATE_CHARS})")
        variables = {
            "messages": check_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._names,
        }
        text = self._worker.render(variables)
        if not self._spelled(text):
            return text
        try:
            variables["messages"] = [
                {key: v if key == "role" else self._substituted(v) for key, v in message.items()}
                for message in variables["messages"]
            ]
        except RecursionError:
            raise _malformed("a message is nested too deeply", "messages") from None
        return self._worker.render(variables)

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
    """The chat template of a model, empty where it has none. Raises ModelError[M107]."""
    return Metadata(metadata, code="M107").text("tokenizer.chat_template", "")


def _unusable(rule: str, hint: str = "") -> ModelError:
    return ModelError("M107", f"the chat template cannot be used: {rule}", hint=hint)


class _Worker:
    """The process that renders a template: started at the first request, and after one died."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._compiled: dict[str, str] = {}  # the answer to the setup
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

    def ask(self, variables: Mapping[str, Any] | None) -> dict[str, str]:
        """The answer to a rendering, or of the compiler: for None, and where it failed."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._compiled = self._start()
                if variables is None or "error" in self._compiled:
                    return self._compiled
                return self._exchange(self._process, variables)
            except (OSError, ValueError):  # the pipe is closed, or the answer breaks off
                self._stop()
                limits = f"{MAX_SECONDS:g} s of processor time or {MAX_BYTES >> 20} MiB"
                raise _unusable(f"it takes more than {limits}") from None
            except BaseException:  # an interrupt: the answer would be taken for the next one's
                self._stop()
                raise

    def _start(self) -> dict[str, str]:
        if find_spec("jinja2") is None:
            raise MissingExtra(
                "E101", "chat templates need jinja2", hint="pip install 'tilewright[models]'"
            )
        process = self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C at a terminal is for the caller
        )
        self._end = weakref.finalize(self, _end, process)
        setup = {
            "path": [str(folder) for folder in sys.path],
            "source": self._source,
            "seconds": MAX_SECONDS,
            "bytes": MAX_BYTES,
            "chars": MAX_PROMPT_CHARS,
        }
        return self._exchange(process, setup)

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes] | None, request: Any) -> dict[str, str]:
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline(16 * MAX_PROMPT_CHARS))

    def _stop(self) -> None:
        if self._process is not None:
            self._process = None
            self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError), process:
        process.kill()
