"""Messages to a prompt: checks a conversation and renders it by the model's own chat template.

    chat = ChatTemplate.from_metadata(model.metadata)
    prompt = chat.render([{"role": "user", "content": "What is the capital of France?"}])

A template comes out of a model file, so it runs in Jinja's immutable sandbox, with budgets on its
loops, calls and output, and on the lengths of what its filters go through. The sandbox keeps a
template away from the machine; the budgets stop one that loops by mistake or for spite. They are no
bound on memory: one that builds huge values on purpose needs a process of its own. Special tokens
spelled in a message are read as such.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from functools import wraps
from typing import Any, NoReturn

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.gguf import Metadata, Value
from tilewright.serve.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 16
MAX_MESSAGES = 1 << 12
MAX_PROMPT_CHARS = 1 << 24
MAX_STEPS = 1 << 18  # turns of loops, calls and elements that filters see, in one rendering
CHARS_A_STEP = 1 << 10  # text goes by faster

Message = dict[str, str]


def check_messages(messages: Any) -> list[Message]:
    """The messages as plain `{"role": ..., "content": ...}`.

    `content` is a str, or the parts `{"type": "text", "text": ...}` of the OpenAI API, which are
    joined. A system message may only stand first. Raises ModelError[M106].
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise _malformed("messages is not a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise _malformed(f"{len(messages)} messages (limit {MAX_MESSAGES})", "messages")
    out: list[Message] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _malformed(f"a message is a {type(message).__name__}, not an object", where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _malformed(
                f"role is {str(role)[:40]!r}, not one of {', '.join(ROLES)}", f"{where}.role"
            )
        if role == "system" and i > 0:
            raise _malformed("a system message stands behind others", where)
        if isinstance(content, list):
            content = "".join(
                _text_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)
            )
        if not isinstance(content, str):
            raise _malformed(f"content is a {type(content).__name__}, not text", f"{where}.content")
        out.append({"role": str(role), "content": content})
    return out


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
    """A compiled chat template. `render` is pure and may be called from several threads."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises ModelError[M107] for a template that does not compile, MissingExtra[E101]."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise _unusable(f"{len(source)} characters (limit {MAX_TEMPLATE_CHARS})")
        self.source = source
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except MissingExtra:
            raise
        except Exception as error:  # the parser of a hostile template may fail in any way
            raise _unusable(_brief(error)) from None

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
        names: dict[str, str] = {}
        if tokenizer is not None:
            for name, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
                names[name] = (
                    "" if token is None else tokenizer.piece(token).decode("utf-8", "replace")
                )
        return cls(source, **names)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, up to where the assistant begins to speak.

        Without `add_generation_prompt` it ends behind the last message. Raises ModelError: M106 for
        messages that are not well formed or that the template refuses, M107 for a template that
        fails or does not end.
        """
        checked = check_messages(messages)
        token = _steps_left.set([MAX_STEPS])
        pieces: list[str] = []
        room = MAX_PROMPT_CHARS
        try:
            for piece in self._template.generate(
                messages=checked, add_generation_prompt=add_generation_prompt, **self._names
            ):
                room -= len(piece)
                if room < 0:
                    raise _unusable(f"the prompt is longer than {MAX_PROMPT_CHARS} characters")
                pieces.append(piece)
        except ModelError:
            raise
        except Exception as error:  # the template's own code fails in any way
            raise _unusable(_brief(error)) from None
        finally:
            _steps_left.reset(token)
        return "".join(pieces)

    def fit(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, limit: int
    ) -> tuple[list[int], int]:
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
            return tokenizer.encode(self.render([*checked[:first], *checked[start:]]))

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


def template_of(metadata: Mapping[str, Value]) -> str:
    """The chat template of a model, empty where it has none. Raises ModelError[M107]."""
    return Metadata(metadata, code="M107").text("tokenizer.chat_template", "")


def _unusable(rule: str, hint: str = "") -> ModelError:
    return ModelError("M107", f"the chat template cannot be used: {rule}", hint=hint)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


# The sandbox

# Methods and filters that make much out of little; no template needs them.
_PADDING = {
    "batch",
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "format",
    "format_map",
    "indent",
    "slice",
    "wordwrap",
}
# Filters that look at no more than an element.
_CONSTANT_TIME = {"attr", "count", "d", "default", "first", "last", "length", "random"}
_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


def _count(steps: int) -> None:
    left = _steps_left.get()
    left[0] -= steps
    if left[0] < 0:
        raise _unusable(f"it takes more than {MAX_STEPS} steps")


def _charged(value: Any) -> Any:
    """The value, its length charged to the budget: something is about to go through it."""
    if isinstance(value, str):
        _count(len(value) // CHARS_A_STEP)
    elif isinstance(value, Sized):
        _count(len(value))
    return value


def _charging(function: Any) -> Any:
    """A filter or a test that pays for its arguments."""

    @wraps(function)  # Jinja's marks on it, too
    def paying(*args: Any, **kwargs: Any) -> Any:
        for value in (args, *args, *kwargs.values()):
            _charged(value)
        return function(*args, **kwargs)

    return paying


def _range(*bounds: int) -> range:
    return _charged(range(*bounds))


def _counted(items: Iterable[Any]) -> list[Any]:
    """What a loop runs over, charged to the rendering's budget. (A mapping loops over its keys.)"""
    out: list[Any] = []
    for item in items:
        _count(1)
        out.append(item)
    return out


def _raise_exception(message: str) -> NoReturn:
    """How a template refuses a conversation, for example one whose roles do not alternate."""
    raise ModelError("M106", f"the chat template refuses these messages: {str(message)[:200]}")


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the templates expect it: not escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> Any:
    """A Jinja environment with the names that chat templates rely on."""
    try:
        from jinja2 import nodes
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtra(
            "E101", "chat templates need jinja2", hint="pip install 'tilewright[models]'"
        ) from None

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%", "<<"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted_", [], [], None, None)
            for compared in tree.find_all(nodes.Operand):
                if compared.op in ("in", "notin"):
                    found = nodes.Filter(compared.expr, "charged_", [], [], None, None)
                    compared.expr = found
            return tree

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            _count(1)
            for value in (getattr(function, "__self__", None), args, *args):
                _charged(value)
            return super().call(context, function, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            small = all(
                isinstance(side, int | float) and abs(side) < 1 << 31 for side in (left, right)
            )
            if (operator != "%" and not small) or (operator == "**" and abs(right) > 16):
                raise _unusable(f"{operator} of large values or of text")
            if operator == "%" and not isinstance(left, int | float):
                raise _unusable("% of text")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            return None  # str.format falls under the rule above

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    for name in _PADDING & environment.filters.keys():
        del environment.filters[name]
    environment.filters["tojson"] = _to_json
    for name in environment.filters.keys() - _CONSTANT_TIME:
        environment.filters[name] = _charging(environment.filters[name])
    environment.tests["in"] = _charging(environment.tests["in"])
    environment.filters |= {"counted_": _counted, "charged_": _charged}
    environment.globals.clear()
    environment.globals |= {
        "namespace": _namespace(),
        "range": _range,
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment


def _namespace() -> Any:
    from jinja2.utils import Namespace

    return Namespace
