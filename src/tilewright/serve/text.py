"""The text of an answer, token by token: complete characters, up to a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tilewright.serve.tokenizer import Tokenizer


class AnswerText:
    """Decodes the tokens of an answer, without control tokens. The bytes of an incomplete character
    and text that may be the beginning of a stop text are kept back until the next tokens decide; a
    stop text may begin and end anywhere in a token."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain after one more token. Sets `stopped` behind a stop text."""
        is_control = token in self._tokenizer.control
        return self._certain(b"" if is_control else self._tokenizer.piece(token))

    def finish(self) -> str:
        """The rest of an answer that ends now, with U+FFFD for an incomplete character."""
        if self.stopped:
            return ""
        text = self._certain(b"", final=True)
        text, self._held = text + self._held, ""
        return text

    def _certain(self, piece: bytes, final: bool = False) -> str:
        text = self._held + self._decoder.decode(piece, final)
        starts = [at for at in map(text.find, self._stop) if at >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
