"""The text of an answer, token by token: complete characters, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.serve.tokenizer import Stream, Tokenizer


class AnswerText:
    """Decodes the tokens of an answer. Text that may be the beginning of a stop text is kept back
    until the next tokens decide; a stop text may begin and end anywhere in a token."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream, self._stop = Stream(tokenizer), tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token. Sets `stopped` behind a stop text."""
        return self._certain(self._stream.push(token))

    def finish(self) -> str:
        """The rest of an answer that ends now."""
        if self.stopped:
            return ""
        text = self._certain(self._stream.finish())
        text, self._held = text + self._held, ""
        return text

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        starts = [at for at in map(text.find, self._stop) if at >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
