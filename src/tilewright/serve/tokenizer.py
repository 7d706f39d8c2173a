"""Converts text to tokens and back: byte-level BPE from a GGUF file, and llama2.c's scored merges.

    tokenizer = load_tokenizer(open_model(path))
    ids = tokenizer.encode("What is the capital of France?")
    stream = tokenizer.stream()
    for token in generated: print(stream.push(token), end="")
    print(stream.finish())

Encoding is exact for valid Unicode. Bytes that a byte-level vocabulary does not have are dropped,
as by the `tokenizers` library. Sources: the tokenizers of GPT-2 and of llama2.c, and the GGUF keys
`tokenizer.ggml.*`.
"""

from __future__ import annotations

import codecs
import heapq
import math
import os
import re
import struct
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import AnyStr

import numpy as np

from tilewright.errors import ModelError
from tilewright.serve.gguf import Metadata, Value, short
from tilewright.serve.weights import ModelFile

MAX_TOKEN_BYTES = 4096
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_NAMED = {  # name to tokenizer.ggml.*_token_id
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom",
}  # fmt: skip
# Spellings of tokens that end an answer: a file names at most one of them (llama.cpp).
END_SPELLINGS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|end|>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip


class Tokenizer(ABC):
    """A vocabulary. `pieces[id]` is the bytes of a token; `control`: the ids of control tokens."""

    def __init__(
        self, pieces: Sequence[bytes], special: Mapping[str, int], control: Iterable[int]
    ) -> None:
        self.pieces = tuple(pieces)
        self.special = dict(special)  # ids of the tokens recognised in text, by spelling
        self.control = frozenset(control)
        self.bos: int | None = None
        self.eos: int | None = None
        self.named: dict[str, int] = {}  # "bos", "eos", "unk", ... as chat templates call them
        self.ends = {self.special[text] for text in END_SPELLINGS if text in self.special}
        self.add_bos = False
        self.any_special = _any_of(self.special)
        self._user_defined = _any_of(t for t, i in self.special.items() if i not in self.control)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, special: bool = True, *, bos: bool | None = None) -> list[int]:
        """The tokens of `text`.

        With `special`, spellings of control tokens such as `<|im_end|>` become that token; without
        it they are plain text. User-defined tokens are always recognised. `bos`: whether the
        beginning token comes first (default: the rule of the model). Raises ModelError[M106] for
        text that is not Unicode.
        """
        if not isinstance(text, str):
            raise ModelError("M106", f"the text is a {type(text).__name__}", hint="pass a str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ModelError("M106", f"the text holds a lone surrogate at {error.start}") from None
        add_bos = self.add_bos if bos is None else bos
        out = [self.bos] if add_bos and self.bos is not None else []
        start = 0
        for match in (self.any_special if special else self._user_defined).finditer(text):
            out += self._encode(text[start : match.start()])
            out.append(self.special[match[0]])
            start = match.end()
        return out + self._encode(text[start:])

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The tokens of a text that contains no special token."""

    def piece(self, token: int) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary (padding)."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """The text of `ids`, U+FFFD for invalid UTF-8; without `special`, no control tokens."""
        keep = () if special else self.control
        return b"".join(self.piece(i) for i in ids if i not in keep).decode("utf-8", "replace")

    def stream(self, special: bool = False) -> Stream:
        return Stream(self, special)

    def _read_id(self, keys: Metadata, key: str) -> int | None:
        """The id of a token, None if the file does not name one."""
        if key not in keys.values:
            return None
        value = keys.integer(key)
        if not 0 <= value < len(self.pieces):
            raise _unusable(f"{value} is outside the vocabulary of {len(self.pieces)}", key)
        return value


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of these texts, the longest first; none if there are no texts."""
    longest_first = sorted(spellings, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class Stream:
    """Decodes token by token; keeps the bytes of an incomplete character back."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        if not self._special and token in self._tokenizer.control:
            return ""
        return self._decoder.decode(self._tokenizer.piece(token))

    def finish(self) -> str:
        """The rest: U+FFFD for an incomplete character. Resets the stream."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def load_tokenizer(model: ModelFile, path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a model: from its GGUF metadata, or from llama2.c's file at `path`.

    Without `path`, the file of a llama2.c model is `tok<vocab>.bin` or `tokenizer.bin` in the same
    folder. Raises ModelError[M107] for a missing or damaged tokenizer.
    """
    if path is None and model.metadata:
        tokenizer: Tokenizer = BpeTokenizer.from_metadata(model.metadata)
        if len(tokenizer) > model.config.vocab:
            rows = model.config.vocab
            raise _unusable(f"{len(tokenizer)} tokens for an embedding of {rows} rows")
        return tokenizer
    names = (f"tok{model.config.vocab}.bin", "tokenizer.bin")
    for file in map(model.path.with_name, names) if path is None else [Path(path)]:
        if file.is_file():
            return ScoredTokenizer.from_file(file, model.config.vocab)
    raise _unusable(f"no tokenizer file: {path or ' or '.join(names)}")


def _unusable(rule: str, where: str = "", hint: str = "") -> ModelError:
    return ModelError("M107", f"the tokenizer cannot be used: {rule}", where=where, hint=hint)


def merge(
    symbols: Sequence[AnyStr], rank: Callable[[AnyStr, AnyStr], float | None]
) -> list[AnyStr]:
    """Joins neighbours, the lowest `rank(left, right)` first and of equals the leftmost.

    A heap over a linked list: n symbols cost O(n log n) at worst.
    """
    parts: list[AnyStr | None] = list(symbols)
    end = len(parts)
    after, before = list(range(1, end + 1)), list(range(-1, end - 1))
    heap: list[tuple[float, int, AnyStr, AnyStr]] = []

    def offer(i: int) -> None:
        if i < 0 or after[i] == end:
            return
        left, right = parts[i], parts[after[i]]
        assert left is not None and right is not None, "the linked list holds a joined symbol"
        order = rank(left, right)
        if order is not None:
            heapq.heappush(heap, (order, i, left, right))

    for i in range(end):
        offer(i)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        if parts[i] != left or after[i] == end or parts[after[i]] != right:
            continue  # one of the two was joined to something else since
        joined = after[i]
        parts[i], parts[joined] = left + right, None
        after[i] = after[joined]
        if after[i] < end:
            before[after[i]] = i
        offer(before[i])
        offer(i)
    return [part for part in parts if part is not None]


# Byte-level BPE


def _byte_spellings() -> list[str]:
    """The character by which GPT-2 spells each byte: itself if visible, else from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) if b in visible else chr(0x100 + hidden.index(b)) for b in range(256)]


_SPELLINGS = _byte_spellings()
_TO_SPELLING = dict(enumerate(_SPELLINGS))
# From a spelling to the byte's Latin-1 character. Latin-1 characters that spell no byte become
# U+FFFF, which is not Latin-1.
_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {
    ord(spelling): b for b, spelling in enumerate(_SPELLINGS)
}


_WHITE_SPACE = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


class _Classes(dict[int, int]):
    """Maps a character to an ASCII one of its class, since `re` has no Unicode categories.

    ASCII stays; other letters become `A`, numbers `0`, white space a vertical tab, the rest `!`.
    """

    def __missing__(self, code: int) -> int:
        if code < 128:
            ascii_code = code
        elif code in _WHITE_SPACE:
            ascii_code = 0x0B
        else:
            ascii_code = ord({"L": "A", "N": "0"}.get(unicodedata.category(chr(code))[0], "!"))
        self[code] = ascii_code
        return ascii_code


_CLASSES = _Classes()
_CONTRACTIONS = "'(?:[stmd]|re|ve|ll)"
# The pattern of a word over the classes of its characters, by tokenizer.ggml.pre. smollm splits at
# each digit first, so that white space before a digit counts as trailing.
_WORDS = {
    "gpt-2": _CONTRACTIONS + r"| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    "smollm": r"[0-9]|" + _CONTRACTIONS + r"| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+",
}


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: splits text into words and merges the bytes of a word by rank."""

    def __init__(
        self, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
    ) -> None:
        """`tokens` in GPT-2's spelling, `types` as in GGUF, `merges` "left right", best first."""
        if pre not in _WORDS:
            hint = f"supported: {', '.join(_WORDS)}"
            raise _unusable(f"the pre-tokenizer {pre!r} is not known", "tokenizer.ggml.pre", hint)
        marked = {i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
        pieces = [
            token.encode() if i in marked else self._spelled(token, i)
            for i, token in enumerate(tokens)
        ]
        special = {tokens[i]: i for i in sorted(marked, reverse=True) if tokens[i]}
        control = {i for i in marked if types[i] == _CONTROL}
        super().__init__(pieces, special, control)
        # Of equal spellings the first counts; no merge results in a special token.
        ordinary = [(token, i) for i, token in enumerate(tokens) if i not in marked]
        self._ids = dict(reversed(ordinary))
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        for rank, pair in enumerate(merges):
            if pair.count(" ") != 1 or pair.replace(" ", "") not in self._ids:
                rule = f"merge {rank} ({pair[:40]!r}) makes no token"
                raise _unusable(rule, "tokenizer.ggml.merges")
        if len(self._ranks) < len(merges):
            raise _unusable("a merge occurs twice", "tokenizer.ggml.merges")
        self._words = re.compile(_WORDS[pre], re.ASCII)
        self._word = lru_cache(maxsize=1 << 14)(self._merge_word)

    @staticmethod
    def _spelled(token: str, number: int) -> bytes:
        try:
            return token.translate(_TO_BYTE).encode("latin-1")
        except UnicodeEncodeError:
            raise _unusable(f"token {number} ({token[:40]!r}) is not in byte spelling") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Value]) -> BpeTokenizer:
        """From the keys `tokenizer.ggml.*` of a GGUF file. Raises ModelError[M107]."""
        keys = Metadata(metadata, code="M107")
        kind = keys.text("tokenizer.ggml.model")
        if kind != "gpt2":
            hint = "byte-level BPE (gpt2) is supported"
            raise _unusable(f"model {short(kind)}", "tokenizer.ggml.model", hint)
        tokens, merges = (keys.strings(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
        if not tokens:
            raise _unusable("it has no tokens", "tokenizer.ggml.tokens")
        longest = max(map(len, tokens))
        if longest > MAX_TOKEN_BYTES:
            raise _unusable(f"a token of {longest} characters (limit {MAX_TOKEN_BYTES})")
        types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL))
        if (
            not isinstance(types, np.ndarray)
            or types.dtype.kind not in "iu"
            or len(types) != len(tokens)
        ):
            raise _unusable("there is not one type for each token", "tokenizer.ggml.token_type")
        out = cls(tokens, types.tolist(), merges, keys.text("tokenizer.ggml.pre", "gpt-2"))
        ids = {
            name: out._read_id(keys, f"tokenizer.ggml.{key}_token_id")
            for name, key in _NAMED.items()
        }
        out.named = {name: i for name, i in ids.items() if i is not None}
        out.ends |= {i for name, i in out.named.items() if name in ("eos", "eot", "eom")}
        out.bos, out.eos = ids["bos"], ids["eos"]
        out.add_bos = keys.flag("tokenizer.ggml.add_bos_token", False) and out.bos is not None
        return out

    def _encode(self, text: str) -> list[int]:
        classes = text if text.isascii() else text.translate(_CLASSES)
        out: list[int] = []
        for match in self._words.finditer(classes):
            word = text[match.start() : match.end()]
            # Long words are rare and are not cached.
            out += self._word(word) if len(word) <= 64 else self._merge_word(word)
        return out

    def _merge_word(self, word: str) -> tuple[int, ...]:
        ranks, ids = self._ranks, self._ids
        spelled = word.encode().decode("latin-1").translate(_TO_SPELLING)
        known = [symbol for symbol in spelled if symbol in ids]
        return tuple(ids[s] for s in merge(known, lambda left, right: ranks.get(f"{left} {right}")))


# llama2.c

_UNKNOWN, _BOS, _EOS, _FIRST_BYTE = 0, 1, 2, 3


class ScoredTokenizer(Tokenizer):
    """llama2.c's tokenizer: characters merge by the best score; unknown ones become byte tokens.

    Tokens 0, 1, 2 are unknown, begin and end, 3 to 258 the bytes. `encode` puts the begin token and
    a space before a text, `decode` removes them.
    """

    def __init__(self, tokens: Sequence[bytes], scores: Sequence[float]) -> None:
        first = _FIRST_BYTE + 256
        if len(tokens) < first:
            raise _unusable(f"{len(tokens)} tokens do not hold the {first} fixed ones")
        fixed = [b"", b"", b"", *(bytes([b]) for b in range(256))]
        super().__init__([*fixed, *tokens[first:]], {}, (_UNKNOWN, _BOS, _EOS))
        self.bos, self.eos, self.add_bos = _BOS, _EOS, True
        self.ends = {_EOS}
        self._ids = {tokens[i]: i for i in range(len(tokens) - 1, first - 1, -1)}
        self._scores = {token: scores[i] for token, i in self._ids.items()}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], vocab: int) -> ScoredTokenizer:
        """Reads an int32, then `vocab` tokens: float32 score, int32 length, bytes.

        Raises ModelError[M107] for a file that is damaged or of another vocabulary.
        """
        where = str(path)
        try:
            with open(path, "rb") as file:
                data = file.read(vocab * (8 + MAX_TOKEN_BYTES) + 5)
        except OSError as error:
            raise _unusable(str(error.strerror), where) from None
        tokens: list[bytes] = []
        scores: list[float] = []
        position = 4
        for number in range(vocab):
            if position + 8 > len(data):
                raise _unusable(f"the file ends before token {number} of {vocab}", where)
            score, length = struct.unpack_from("<fi", data, position)
            position += 8
            if not 0 <= length <= min(MAX_TOKEN_BYTES, len(data) - position) or math.isnan(score):
                raise _unusable(f"token {number} has length {length} and score {score}", where)
            tokens.append(data[position : position + length])
            scores.append(score)
            position += length
        if position != len(data):
            excess = len(data) - position
            raise _unusable(f"{excess} bytes follow the last of {vocab} tokens", where)
        return cls(tokens, scores)

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        ids = list(ids)
        text = super().decode(ids, special)
        return text[1:] if ids[:1] == [_BOS] and text.startswith(" ") else text

    def _encode(self, text: str) -> list[int]:
        out: list[int] = []
        known: list[bytes] = []
        for character in f" {text}" if text else "":
            spelled = character.encode()
            if spelled in self._ids:
                known.append(spelled)
                continue
            out += self._merged(known)
            out += [_FIRST_BYTE + byte for byte in spelled]
            known = []
        return out + self._merged(known)

    def _merged(self, symbols: list[bytes]) -> list[int]:
        return [self._ids[symbol] for symbol in merge(symbols, self._rank)]

    def _rank(self, left: bytes, right: bytes) -> float | None:
        score = self._scores.get(left + right)
        return None if score is None else -score
