"""Converts text to tokens and back, with the BPE of the library `tokenizers`.

The library encodes plain text only: it does not know the control tokens: this module finds those.
Bytes that a byte-level vocabulary does not have are dropped. Source: the GGUF keys
`tokenizer.ggml.*`.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import ModelError, needed_for
from tilewright.serve.models.config import Metadata, Value, short
from tilewright.serve.weights import ModelFile, read_json

with needed_for("tokens of text", "models"):
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

MAX_TOKEN_CHARS = 1024
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_NAMED = {  # name to tokenizer.ggml.*_token_id
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom",
}  # fmt: skip
# Spellings of tokens that end an answer: a file names at most one of them (llama.cpp).
END_SPELLINGS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|end|>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>", "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip


class Tokenizer:
    """A vocabulary and the library's encoder of plain text.

    `pieces[id]`: the bytes of a token; `special`: ids of the tokens recognised in text, by
    spelling; `control`: those that text of a user never becomes.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, pieces: Sequence[bytes], special: Mapping[str, int],
        control: Iterable[int],
    ) -> None:  # fmt: skip
        self.library, self.pieces, self.special = library, tuple(pieces), dict(special)
        self.control = frozenset(control)
        self.bos: int | None = None
        self.named: dict[str, int] = {}  # "bos", "eos", "unk", ... as chat templates call them
        self.ends = {self.special[text] for text in END_SPELLINGS if text in self.special}
        self.add_bos = False
        self.any_special = _any_of(self.special)
        self._user_defined = _any_of(t for t, i in self.special.items() if i not in self.control)

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
            out += self._plain(text[start : match.start()])
            out.append(self.special[match[0]])
            start = match.end()
        return out + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        """The tokens of a text that contains no special token."""
        try:
            ids = self.library.encode(text, add_special_tokens=False).ids if text else []
        except Exception as error:  # a pattern that never ends, an unknown token that is none
            raise _unusable(str(error)[:200]) from None
        if not self.control.isdisjoint(ids):  # a merge of this vocabulary makes one
            raise ModelError("M106", "the text would become a control token", hint="other words")
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary (padding)."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """The text of `ids`, U+FFFD for invalid UTF-8; without `special`, no control tokens."""
        hidden = () if special else self.control
        return b"".join(self.piece(i) for i in ids if i not in hidden).decode("utf-8", "replace")


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of these texts, the longest first; none if there are no texts."""
    longest_first = sorted(spellings, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


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
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        keep = max(begun, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def load_tokenizer(model: ModelFile) -> Tokenizer:
    """The tokenizer of a model. Raises ModelError[M107] for a missing or damaged one."""
    vocab = model.config.vocab
    if model.path.is_dir():
        return from_folder(model.path, vocab)
    tokenizer = from_metadata(model.metadata)
    if len(tokenizer.pieces) > vocab:
        raise _unusable(f"{len(tokenizer.pieces)} tokens for an embedding of {vocab} rows")
    return tokenizer


def _unusable(rule: str, where: str = "", hint: str = "") -> ModelError:
    return ModelError("M107", f"the tokenizer cannot be used: {rule}", where=where, hint=hint)


def from_metadata(metadata: Mapping[str, Value]) -> Tokenizer:
    """The tokenizer in the keys `tokenizer.ggml.*` of a GGUF file. Raises ModelError[M107]."""
    keys = Metadata(metadata, code="M107")
    kind, tokens = keys.get("tokenizer.ggml.model", str), keys.get("tokenizer.ggml.tokens", list)
    longest = max(map(len, tokens), default=0)
    if not 1 <= longest <= MAX_TOKEN_CHARS:
        raise _unusable(f"the longest token has {longest} characters (limit {MAX_TOKEN_CHARS})")
    types = _numbers(metadata, "token_type", len(tokens), "iu", _NORMAL)
    if kind == "gpt2":
        pre = keys.get("tokenizer.ggml.pre", str, "gpt-2")
        out = byte_level(tokens, types, keys.get("tokenizer.ggml.merges", list), pre)
    elif kind == "llama":
        scores = _numbers(metadata, "scores", len(tokens), "f", math.nan)
        out = scored(tokens, types, scores, keys.get("tokenizer.ggml.add_space_prefix", bool, True))
    else:
        hint = "byte-level BPE (gpt2) and scored pieces (llama) are supported"
        raise _unusable(f"model {short(kind)}", "tokenizer.ggml.model", hint)
    for name, key in _NAMED.items():
        key = f"tokenizer.ggml.{key}_token_id"
        if key in metadata:
            out.named[name] = keys.get(key, int)
            if not 0 <= out.named[name] < len(tokens):
                raise _unusable(f"{out.named[name]} is outside the vocabulary", key)
    out.ends |= {i for name, i in out.named.items() if name in ("eos", "eot", "eom")}
    out.bos = out.named.get("bos")
    adds = keys.get("tokenizer.ggml.add_bos_token", bool, kind == "llama")
    out.add_bos = adds and out.bos is not None
    return out


def _numbers(metadata: Mapping[str, Value], key: str, count: int, kinds: str, default: Any) -> list:
    """An array with a number for each token."""
    key = f"tokenizer.ggml.{key}"
    values = metadata.get(key, np.full(count, default))
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or len(values) != count:
        raise _unusable("there is not one number for each token", key)
    return values.tolist()


def _tokenizer(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Any],
    spelled: Callable[[str], bytes], **options: Any,
) -> Tokenizer:  # fmt: skip
    """A tokenizer around the library's BPE of the ordinary tokens. No control token is among them,
    so that no merge can make one; of equal spellings the first counts."""
    marked = {i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
    ordinary = {t: i for i, t in reversed([*enumerate(tokens)]) if i not in marked}
    special = {tokens[i]: i for i in sorted(marked, reverse=True) if tokens[i]}
    try:
        pieces = [t.encode() if i in marked else spelled(t) for i, t in enumerate(tokens)]
        library = tokenizers.Tokenizer(models.BPE(ordinary, merges, **options))
    except Exception as error:  # the library raises plain Exceptions
        raise _unusable(str(error)[:200]) from None
    return Tokenizer(library, pieces, special, (i for i in marked if types[i] == _CONTROL))


# Byte-level BPE


def byte_spellings() -> list[str]:
    """The character by which GPT-2 spells each byte: itself if visible, else from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {ord(c) for c in alphabet if ord(c) < 256}
    hidden = iter(alphabet[len(visible) :])
    return [chr(b) if b in visible else next(hidden) for b in range(256)]


# To the byte's Latin-1 character; Latin-1 characters that spell no byte become another one.
_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {ord(c): b for b, c in enumerate(byte_spellings())}
# The words of Llama 3, as its tokenizer.json has them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What divides a text, by tokenizer.ggml.pre: before the words of GPT-2 do, or in their place.
_PRE = {
    "gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")],
}  # fmt: skip


def byte_level(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> Tokenizer:
    """Byte-level BPE. `tokens` in GPT-2's spelling, `types` as in GGUF, `merges` "left right",
    best first. Raises ModelError[M107]."""
    if pre not in _PRE:
        hint = f"supported: {', '.join(_PRE)}"
        raise _unusable(f"the pre-tokenizer {pre!r} is not known", "tokenizer.ggml.pre", hint)
    if len(set(merges)) < len(merges):
        raise _unusable("a merge occurs twice", "tokenizer.ggml.merges")
    pairs, own = [tuple(pair.split(" ")) for pair in merges], pre == "llama-bpe"
    # A word of Llama 3 that is a token is that token, also where no merges lead to it.
    out = _tokenizer(tokens, types, pairs, _from_bytes, ignore_merges=own)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    out.library.pre_tokenizer = pre_tokenizers.Sequence([*_PRE[pre], words])
    return out


def _from_bytes(token: str) -> bytes:
    try:
        return token.translate(_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"token {token[:40]!r} is not in byte spelling") from None


# Pieces with scores (SentencePiece)


def scored(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool
) -> Tokenizer:
    """BPE that merges by the best score; a character that is no token becomes tokens of its bytes.

    `tokens` with ▁ for a space; `prefix`: a space comes before a text. Each cut of a token into two
    tokens is a merge, ranked by the score of the token. Raises ModelError[M107].
    """
    if not all(map(math.isfinite, scores)):
        raise _unusable("a score is missing or not finite", "tokenizer.ggml.scores")
    normal = {t: i for i, t in reversed([*enumerate(tokens)]) if types[i] == _NORMAL}
    unknown = next((t for i, t in enumerate(tokens) if types[i] == _UNKNOWN), None)
    best = sorted(normal, key=lambda token: (-scores[normal[token]], normal[token]))
    cuts = ((token[:n], token[n:]) for token in best for n in range(1, len(token)))
    pairs = [(left, right) for left, right in cuts if left in normal and right in normal]
    options = {"unk_token": unknown, "byte_fallback": True, "fuse_unk": True}
    out = _tokenizer(tokens, types, pairs, _from_piece, **options)
    parts: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    out.library.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    return out


def _from_piece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


# tokenizer.json

_NORMALIZERS, _PRE_TOKENIZERS = ("NFC", "NFKC", "Prepend", "Replace"), ("ByteLevel", "Metaspace")
_PARTS = ("Sequence", "Split", "Digits", *_NORMALIZERS, *_PRE_TOKENIZERS)
_CONFIGS = "config.json", "generation_config.json"


def from_folder(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer in a folder's tokenizer.json. Its other files name the end tokens, `bos` and
    `eos`; names beyond the vocabulary are left out. Raises ModelError[M107], also
    for ids from `vocab` on."""
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    data = read_json(path, "M107")
    try:
        for part in filter(None, (data.get("normalizer"), data.get("pre_tokenizer"))):
            _check_part(part)
        library = tokenizers.Tokenizer.from_str(json.dumps(data))
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # as plain text: this module finds them
        ids, added = library.get_vocab(), library.get_added_tokens_decoder()
        if not isinstance(library.model, models.BPE) or max(ids.values()) >= vocab:
            raise ValueError(f"no BPE of at most {vocab} tokens")
        spelled = _from_bytes if '"ByteLevel"' in json.dumps(data.get("decoder")) else _from_piece
        pieces = [b""] * (max(ids.values()) + 1)
        for token, i in ids.items():
            pieces[i] = token.encode() if i in added else spelled(token)
        special = {token.content: i for i, token in added.items()}
        out = Tokenizer(library, pieces, special, (i for i in added if added[i].special))
        files = filter(Path.is_file, map(folder.joinpath, _CONFIGS))
        named = [read_json(file).get("eos_token_id", []) for file in files]
        ends = {i for x in named for i in (x if isinstance(x, list) else [x])}
        first = next((i for i in library.encode("").ids[:1] if i in out.control), None)
        options = read_json(config, "M107") if config.is_file() else {}
        for name in ("bos", "eos"):
            text = options.get(f"{name}_token")
            text = text["content"] if isinstance(text, dict) else text
            if text in ids:
                out.named[name] = ids[text]
    except (ModelError, KeyboardInterrupt):
        raise
    except BaseException as error:  # anything may be missing; a panic of Rust is no Exception
        raise _unusable(f"{type(error).__name__}: {error}"[:200], str(path)) from None
    out.ends |= {i for i in ids.values() if i in ends or i == out.named.get("eos")}
    guesses = {"bos": first, "eos": min(out.ends, default=None)}
    out.named = {k: i for k, i in (guesses | out.named).items() if i is not None}
    out.bos = out.named.get("bos") if first is None else first  # what comes before a text
    out.add_bos = first is not None
    return out


def _check_part(part: Any) -> None:
    """Refuses parts that other models have, or that make a text much longer. Raises ValueError."""
    if json.dumps(part).count('"ByteLevel"') > 1:
        raise ValueError("ByteLevel occurs twice")
    for inner in part.get("normalizers", part.get("pretokenizers", [])):
        _check_part(inner)
    kind, content = part["type"], part.get("prepend", part.get("content", ""))
    by_text = kind != "Replace" or part["pattern"].get("String")
    if kind not in _PARTS or len(content) > 1 or not by_text:
        raise ValueError(f"this {kind} is not supported")
