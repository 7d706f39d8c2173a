"""Texts of prompts and of tokens, as tests compare them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tilewright.serve.chat import ChatTemplate
from tilewright.serve.tokenizer import Tokenizer


def rendered(template: ChatTemplate, messages: Any, tools: Any = None) -> str:
    """The prompt of a conversation as text."""
    return template._rendered(messages, tools).translate(template._originals)


def decoded(tokenizer: Tokenizer, ids: Iterable[int], special: bool = True) -> str:
    """The text of tokens, U+FFFD for invalid UTF-8; without `special`, no control tokens."""
    hidden = () if special else tokenizer.control
    return b"".join(tokenizer.piece(i) for i in ids if i not in hidden).decode("utf-8", "replace")
