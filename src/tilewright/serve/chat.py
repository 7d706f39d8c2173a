"""Prompts as tokens: questions and texts, and conversations by the model's own chat template.

A template is a program from a model file. It runs in Jinja's immutable sandbox, in a process with
limits of time and memory (`template_worker.py`).

Only the template writes control tokens; the text of a message never becomes one:

1. Each control token in the source of the template is replaced by a marker, a lone surrogate, which
   no message may contain. Markers in the rendered text become the control tokens.
2. If the rendered text still spells a control token, a message contains it, or the template joined
   it from pieces, such as `'<|' + role + '|>'`. The template is then rendered again, with the
   punctuation of control tokens in the messages replaced by other surrogates. A control token
   spelled in that text comes from the template.
"""

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

from tilewright.errors import MissingExtra, ModelError, TilewrightError
from tilewright.serve.models.config import Metadata, Value
from tilewright.serve.tokenizer import Tokenizer, load_tokenizer
from tilewright.serve.weights import ModelFile

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 16
MAX_MESSAGES = 1 << 12
MAX_PROMPT_BYTES = 1 << 26  # of a rendered prompt as JSON
MAX_SECONDS = 2.0  # of processor time, in one rendering
MAX_BYTES = 1 << 29  # of memory, in the process that renders

ANSWER_ROOM = 64  # tokens

Message = dict[str, Any]
Messages = list[Message]
TEXT_FIELDS = ("content", "name", "reasoning_content", "tool_call_id")


def check_messages(messages: Any) -> list[Message]:
    """Returns the messages with the fields that templates know, without those that are None.

    `content` is a str, or the parts `{"type": "text", "text": ...}` of the OpenAI API, which are
    joined; it may be None beside `tool_calls`, a list of objects. `name`, `reasoning_content` and
    `tool_call_id` are str. A system message may only come first. Raises ModelError[M106].
    """
    if not isinstance(messages, list | tuple) or not 0 < len(messages) <= MAX_MESSAGES:
        raise _malformed(f"messages is not a list of 1 to {MAX_MESSAGES} messages", "messages")
    checked = [_check_message(message, i) for i, message in enumerate(messages)]
    _check_json(checked, "messages")
    return checked


def _check_message(message: Any, i: int) -> Message:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        raise _malformed(f"a message is a {type(message).__name__}, not an object", where)
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in ROLES or (role == "system" and i > 0):
        rule = f"role is {str(role)[:40]!r}, not one of {', '.join(ROLES)}, and system only first"
        raise _malformed(rule, f"{where}.role")
    checked: Message = {"role": str(role), "content": None}
    checked |= {key: message[key] for key in TEXT_FIELDS if message.get(key) is not None}
    if isinstance(checked["content"], list):
        parts = enumerate(checked["content"])
        checked["content"] = "".join([_part_text(x, f"{where}.content[{j}]") for j, x in parts])
    for key, value in checked.items():
        if not isinstance(value, str) and not (value is None and calls):
            raise _malformed(f"{key} is a {type(value).__name__}, not text", f"{where}.{key}")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise _malformed("tool_calls is not a list of objects", f"{where}.tool_calls")
        checked["tool_calls"] = calls
    return checked


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _malformed('a part is not {"type": "text", "text": ...}', where)
    return text


def _check_json(value: Any, where: str) -> None:
    """Refuses what is not JSON, and lone surrogates, which would pass for markers."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        rule = f"{where} is not JSON, or holds a lone surrogate: {ascii(str(error))[:80]}"
        raise _malformed(rule, where) from None


def _malformed(rule: str, where: str) -> ModelError:
    hint = '[{"role": "user", "content": "Hello"}] is a conversation'
    return ModelError("M106", rule, where=where, hint=hint)


class Prompts:
    """The tokenizer and the chat template of a model. `context`: tokens of prompt and answer;
    `tokenizer`: of the file, where it is loaded already."""

    def __init__(self, file: ModelFile, context: int, tokenizer: Tokenizer | None = None) -> None:
        self.context, self.vocab = context, file.config.vocab
        self.tokenizer = load_tokenizer(file) if tokenizer is None else tokenizer
        source = template_of(file.metadata)
        self.template = ChatTemplate(source, self.tokenizer) if source else None

    def prompt(self, prompt: str | Messages, tools: Any = None) -> list[int]:
        """The tokens of a question, of a chat, or of a text to continue; no text of a user becomes
        a control token. Raises the errors of `ChatTemplate.tokens`."""
        if self.template is None:
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt, special=False)
            raise _unusable("the model has none", "pass a text to continue")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.template.tokens(messages, tools)

    def too_many(self, messages: Messages) -> int:
        """How many of the oldest messages to leave out behind a leading system message, which
        remains, so that the rest begins with a question and `ANSWER_ROOM` tokens (at most half of
        the context) are left for an answer. Raises ModelError[M105] where the last question is too
        long."""
        room, size = self.context - min(ANSWER_ROOM, self.context // 2), 0
        system = [m for m in messages[:1] if m["role"] == "system"]
        for start, message in enumerate(messages):
            if message["role"] == "user":
                size = len(self.prompt([*system, *messages[start:]]))
                if size <= room:
                    return start - len(system)
        rule = f"the prompt takes {size} tokens, {room} fit"
        raise ModelError("M105", rule, hint="shorten the last message or the system message")


class ChatTemplate:
    """A chat template and the tokenizer of its model. May be used from several threads.

    The constructor starts the process that compiles the source, and does not wait for it. Errors
    are raised by the first use.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._any_special, special = tokenizer.any_special, tokenizer.special.items()
        self._control = {text: i for text, i in special if i in tokenizer.control}
        names = {"bos_token": "", "eos_token": ""}
        for name, token in tokenizer.named.items():
            names[f"{name}_token"] = tokenizer.piece(token).decode("utf-8", "replace")
        surrogates = map(chr, range(0xDC00, 0xE000))
        used = set("".join(self._control))
        punctuation = sorted(ord(c) for c in used if not (c.isalnum() or c in "_ \t\n"))
        self._substitutes = dict(zip(punctuation, surrogates, strict=False))
        text = "\n".join([source, *names.values()])
        self._markers = dict(zip((t for t in self._control if t in text), surrogates, strict=False))
        self._originals = {ord(marker): text for text, marker in self._markers.items()}
        self._originals |= {ord(s): chr(c) for c, s in self._substitutes.items()}
        self._special = re.compile("|".join([*self._markers.values(), self._any_special.pattern]))
        self._names = {name: self._marked(text) for name, text in names.items()}
        self._worker = _Worker(self._marked(source))

    def tokens(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """Returns the prompt of a conversation, up to the answer of the assistant, as ids of
        tokens. Text of a message never becomes a control token. `tools`: functions that the
        template shows to the model.

        The beginning-of-sequence token comes exactly once, also where both the template and the
        model's file ask for it. Raises ModelError: M106 for messages that are not well formed or
        that the template refuses, M107 for a template that does not compile, fails or takes too
        much time or memory.
        """
        tokenizer = self.tokenizer
        text = self._rendered(messages, tools)
        pieces, start = [], 0  # text and control token in turn
        for match in self._special.finditer(text):
            spelling = match[0].translate(self._originals)
            # A message may spell a token without punctuation, EOT say: then only a marker counts.
            written = match[0] != spelling or spelling != spelling.translate(self._substitutes)
            if written and spelling in self._control:
                pieces.append((text[start : match.start()], [self._control[spelling]]))
                start = match.end()
        ids: list[int] = []
        for plain, control in [*pieces, (text[start:], [])]:
            plain = plain.translate(self._originals)
            ids += [*tokenizer.encode(plain, special=False, bos=False), *control]
        bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
        return ids if ids[:1] == bos else bos + ids

    def _marked(self, text: str) -> str:
        return self._any_special.sub(lambda m: self._markers.get(m[0], m[0]), text)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        """The prompt with markers for control tokens, and perhaps substitutes in the messages."""
        checked = check_messages(messages)
        _check_json(tools, "tools")
        variables = {"messages": checked, "tools": tools, "documents": None, **self._names}
        variables["add_generation_prompt"] = True
        text = self._worker.render(variables)
        if self._control.keys().isdisjoint(self._any_special.findall(text)):
            return text
        try:
            protected = [self._substituted(m) | {"role": m["role"]} for m in checked]
            variables["tools"] = self._substituted(tools)
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


def template_of(metadata: Mapping[str, Value]) -> str:
    """Returns the chat template of a model, empty without one. Raises ModelError[M107]."""
    return Metadata(metadata, code="M107").get("tokenizer.chat_template", str, "")


def _unusable(rule: str, hint: str = "") -> ModelError:
    return ModelError("M107", f"the chat template cannot be used: {rule}", hint=hint)


class _Worker:
    """The process that renders a template: started at once, and again by a request if it died."""

    def __init__(self, source: str) -> None:
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError, TilewrightError):  # a request raises them again
            self._launch()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Returns the rendered text. Raises ModelError: M106 where the template refuses the
        messages, M107; MissingExtra."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._launch()
            assert self._process is not None and self._process.stdout is not None
            try:
                self._send(variables)
                answer = json.loads(self._process.stdout.readline(MAX_PROMPT_BYTES))
            except BaseException as error:  # after an interrupt the pipe may hold an old answer
                self._process = None
                self._end()
                if not isinstance(error, OSError | ValueError):
                    raise
                limits = f"{MAX_SECONDS:g} s of processor time or {MAX_BYTES >> 20} MiB"
                written = f"writes more than {MAX_PROMPT_BYTES >> 20} MiB"
                raise _unusable(f"it takes more than {limits}, or {written}") from None
        if "refused" in answer:
            rule = f"the chat template refuses these messages: {answer['refused']}"
            raise ModelError("M106", rule)
        if "error" in answer:
            raise _unusable(answer["error"])
        return answer["text"]

    def _launch(self) -> None:
        if len(self._source) > MAX_TEMPLATE_CHARS:
            raise _unusable(f"{len(self._source)} characters (limit {MAX_TEMPLATE_CHARS})")
        if find_spec("jinja2") is None:
            hint = "pip install 'tilewright[models]'"
            raise MissingExtra("E101", "chat templates need jinja2", hint=hint)
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError), process:
        process.kill()
