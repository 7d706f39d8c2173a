"""Tokenizers: against slow ones written here, against the tokenizers library, and round trips."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.stories import tokens as stories_pieces

from tilewright.errors import ModelError
from tilewright.serve.tokenizer import (
    AnswerText,
    Tokenizer,
    byte_level,
    from_metadata,
    load_tokenizer,
    scored,
)
from tilewright.serve.weights import ModelFile, open_model

TEXTS = [
    "What is the capital of France?",
    "I'm sure we'll see: it's 1999, isn't it? 'tis",
    "  two spaces,   three \n\n\t tabs \r\n end  ",
    "prices: 12.50€ and 1/3 ½ Ⅷ ٣ 10",
    "naïve Ünïcode λόγος кириллица 中文 かな 한국어",
    "👩\u200d👩\u200d👧 🙂 \u00a0\u2003\u3000x\u0085\u2028y\u200bz \x1c\x1f",
    "def f(x):\n    return x**2  # 4 spaces\n",
    "",
    " ",
    "\n",
]


def random_text(rng: np.random.Generator) -> str:
    pools = [
        "abcdefst'remlvd",
        "  \n\t\r",
        "0123456789",
        "!?.,-_'\"",
        "äßéλж中か한²½Ⅷ٣",
        "🙂\u00a0\u3000\u0085\u200b",
    ]
    words = ["the", " The", "'s", "1999", "\n\n", "isn't", "     ", "<|im_end|>"]
    out = []
    for _ in range(rng.integers(1, 30)):
        pool = words if rng.random() < 0.3 else pools[rng.integers(len(pools))]
        out.append(pool[rng.integers(len(pool))])
    return "".join(out)


def slow_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as it is defined: join the best pair, the leftmost of equals; repeat."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def slow_words(text: str) -> list[str]:
    """SmolLM2's words, by hand: digits alone; then contractions, letters, others, white space."""

    def kind(c: str) -> str:
        if c in "\t\n\v\f\r \x85\u2028\u2029" or unicodedata.category(c) == "Zs":
            return "space"
        return {"L": "letter", "N": "digit"}.get(unicodedata.category(c)[0], "other")

    def run(i: int, wanted: str) -> int:
        while i < len(text) and kind(text[i]) == wanted:
            i += 1
        return i

    words, i = [], 0
    while i < len(text):
        short = next(
            (s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), ""
        )
        ahead = i + 1 if text[i] == " " and i + 1 < len(text) else i
        if kind(text[i]) == "digit":
            end = i + 1
        elif short:
            end = i + len(short)
        elif kind(text[ahead]) in ("letter", "other"):
            end = run(ahead, kind(text[ahead]))
        else:
            end = run(i, "space")
            if end < len(text) and kind(text[end]) != "digit" and end - i > 1:
                end -= 1  # the last one goes with the next word
        words.append(text[i:end])
        i = end
    return words


class SlowTokenizer:
    def __init__(self, model: ModelFile) -> None:
        tokens, merges = (
            model.metadata["tokenizer.ggml.tokens"],
            model.metadata["tokenizer.ggml.merges"],
        )
        assert isinstance(tokens, list) and isinstance(merges, list)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {}
        for rank, pair in enumerate(merges):
            left, right = pair.split(" ")
            self.ranks[left, right] = rank
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in visible]
        self.spelling = {b: chr(b) for b in visible} | {
            b: chr(256 + i) for i, b in enumerate(hidden)
        }

    def encode(self, text: str) -> list[int]:
        out = []
        for word in slow_words(text):
            symbols = slow_merge([self.spelling[b] for b in word.encode()], self.ranks)
            out += [self.ids[symbol] for symbol in symbols]
        return out


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> ModelFile:
    return open_model(tiny_path)


def test_tiny_vocabulary(tiny: ModelFile, rng: np.random.Generator):
    tokenizer, slow = load_tokenizer(tiny), SlowTokenizer(tiny)
    for text in [*TEXTS, *(random_text(rng) for _ in range(300))]:
        assert tokenizer.encode(text, special=False) == slow.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_unicode_comes_back(tiny: ModelFile, rng: np.random.Generator):
    tokenizer = load_tokenizer(tiny)
    for _ in range(300):
        codes = rng.integers(0, 0x110000, rng.integers(0, 20))
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tiny: ModelFile):
    tokenizer = load_tokenizer(tiny)
    assert (tokenizer.bos, tokenizer.named["eos"], tokenizer.add_bos) == (1, 2, False)
    ids = tokenizer.encode("<|im_start|>the<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 3
    plain = tokenizer.encode("<|im_start|>the", special=False)
    assert 1 not in plain and tokenizer.decode(plain) == "<|im_start|>the"
    assert tokenizer.decode(ids, special=False) == "the"
    assert tokenizer.encode("the", bos=True) == [1, ids[1]]


def test_words_of_llama_3(tiny: ModelFile, rng: np.random.Generator):
    """Worked by hand; a word that is a token needs no merges, part of a word does."""
    metadata: dict[str, Any] = {**tiny.metadata, "tokenizer.ggml.pre": "llama-bpe"}
    tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    metadata["tokenizer.ggml.tokens"] = [*tokens, "zqz", "123", "12"]
    metadata["tokenizer.ggml.token_type"] = np.append(types, [1, 1, 1])
    tokenizer, count = from_metadata(metadata), len(tokens)
    for text, words in (
        ("I'LL say 12345 (now)\n\n  yes", "I|'LL| say| |123|45| (|now|)\n\n| | yes"),
        ("a\tb  c'red'x\r\n", "a|\tb| | c|'re|d|'x|\r\n"),
        ("(über+1.50€  ", "(über|+|1|.|50|€|  "),
        ("\n \n\u4f60\u0967\u0968\u0969\u096a!?", "\n \n|\u4f60|\u0967\u0968\u0969|\u096a|!?"),
    ):
        found = tokenizer.library.pre_tokenizer.pre_tokenize_str(text)
        assert [text[a:b] for _, (a, b) in found] == words.split("|")
    assert tokenizer.encode("zqz") == [count]
    assert tokenizer.encode("123") == [count + 1] and len(tokenizer.encode("zqzz")) == 4
    assert tokenizer.encode("12345") == [count + 1, *tokenizer.encode("45")]
    assert tokenizer.encode("the and") == load_tokenizer(tiny).encode("the and")
    for _ in range(200):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_stream_holds_back_part_of_a_character(tiny: ModelFile):
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode("<|im_start|>a🙂é<|im_end|>")
    stream = AnswerText(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert pieces == ["", "a", "", "", "", "🙂", "", "é", "", ""]
    for i in tokenizer.encode("🙂")[:3]:
        assert stream.push(i) == ""
    assert stream.finish() == "\ufffd" and stream.finish() == ""
    assert stream.push(len(tokenizer.pieces) + 5) == ""  # a padded vocabulary has ids without text


def test_stream_joins_to_decode(tiny: ModelFile, rng: np.random.Generator):
    """Also for tokens in any order, which are rarely UTF-8."""
    tokenizer = load_tokenizer(tiny)
    for _ in range(100):
        ids = rng.integers(0, len(tokenizer.pieces), 40).tolist()
        stream, text = AnswerText(tokenizer), tokenizer.decode(ids, special=False)
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_long_words_are_quick(tiny: ModelFile):
    """A word of 200 000 letters: quadratic merging would not come back."""
    tokenizer = load_tokenizer(tiny)
    text = "thethell" * 25_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def code_of(error: pytest.ExceptionInfo[ModelError]) -> str:
    return error.value.code


def test_text_that_cannot_be_encoded(tiny: ModelFile):
    tokenizer = load_tokenizer(tiny)
    for text in ("a\ud800", b"bytes", None):
        with pytest.raises(ModelError) as error:
            tokenizer.encode(text)  # pyright: ignore[reportArgumentType]
        assert code_of(error) == "M106"
    without = byte_level(["a", "b"], [1, 1], [], "smollm")
    assert without.encode("abba") == [0, 1, 1, 0]
    assert without.encode("acb\u00e9a") == [0, 1, 0]  # what the vocabulary lacks is dropped
    merging = byte_level(["a", "b", "ab"], [1, 1, 1], ["a b"], "gpt-2")
    assert merging.encode("acb") == [2]  # dropped before the merges, as `tokenizers` does


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "llama"),
        ("model", np.arange(3)),
        ("model", ["gpt2"]),
        ("pre", np.arange(3)),
        ("pre", 5),
        ("merges", np.arange(3)),
        ("add_bos_token", np.arange(3)),
        ("bos_token_id", np.arange(3)),
        ("bos_token_id", True),
        ("token_type", "normal"),
        ("pre", "deepseek"),
        ("tokens", ["a"] * 3),
        ("tokens", 7),
        ("merges", ["t h", "th"]),
        ("merges", ["t h", "t h"]),
        ("merges", ["zz zz"]),
        ("token_type", np.ones(3, np.int32)),
        ("token_type", np.ones(268, np.float32)),
        ("bos_token_id", 268),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        *(
            (f"{name}_token_id", bad)
            for name in ("eot", "eom", "unknown", "padding")
            for bad in (268, -1, "2", True, 1.5, ["2"], np.arange(3))
        ),
    ],
)
def test_wrong_metadata(tiny: ModelFile, key: str, value: object):
    with pytest.raises(ModelError) as error:
        from_metadata({**tiny.metadata, f"tokenizer.ggml.{key}": value})  # pyright: ignore[reportArgumentType]
    assert code_of(error) == "M107"


def test_end_tokens(tiny: ModelFile):
    """All that the file names, and those whose spelling says it."""
    key = "tokenizer.ggml."
    assert load_tokenizer(tiny).ends == {0, 2}  # <|endoftext|>, <|im_end|>
    more = {f"{key}eot_token_id": 20, f"{key}eom_token_id": 21, f"{key}eos_token_id": 22}
    assert from_metadata({**tiny.metadata, **more}).ends == {0, 2, 20, 21, 22}
    without = {k: v for k, v in tiny.metadata.items() if k != f"{key}eos_token_id"}
    assert from_metadata(without).ends == {0, 2}
    for spelling in ("<|eot_id|>", "<|eom_id|>", "<end_of_turn>"):
        made = byte_level(["a", spelling, "b"], [1, 3, 1], [], "gpt-2")
        assert made.ends == {1}


def test_user_defined_tokens_are_always_recognised():
    tokenizer = byte_level(
        ["<s>", "<t>", "a", "<", "s", "t", ">"], [3, 4, 1, 1, 1, 1, 1], [], "gpt-2"
    )
    assert tokenizer.encode("<s>a<t>") == [0, 2, 1]
    assert tokenizer.encode("<s>a<t>", special=False) == [3, 4, 6, 2, 1]


def test_tokens_must_be_in_byte_spelling():
    for token in ("with space", "ł\u0400", "\u0085"):
        with pytest.raises(ModelError) as error:
            byte_level(["a", token], [1, 1], [], "gpt-2")
        assert code_of(error) == "M107"


# SmolLM2


def test_smollm_known_encodings(smollm: ModelFile, rng: np.random.Generator):
    tokenizer, slow = load_tokenizer(smollm), SlowTokenizer(smollm)
    question = tokenizer.encode(TEXTS[0])
    assert question == [1780, 314, 260, 3575, 282, 4649, 47]
    assert [tokenizer.piece(i) for i in question] == [
        b"What", b" is", b" the", b" capital", b" of", b" France", b"?",
    ]  # fmt: skip
    assert len(tokenizer.encode("2024")) == 4  # digits stand alone
    for text in [*TEXTS, *(random_text(rng) for _ in range(300))]:
        assert tokenizer.encode(text, special=False) == slow.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # SmolLM2 has no token for this byte.
    assert tokenizer.decode(tokenizer.encode("a\x1db")) == "ab"


def test_smollm_is_the_tokenizers_library_s(smollm: ModelFile, rng: np.random.Generator):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library is the reference")
    tokens, merges = (
        smollm.metadata["tokenizer.ggml.tokens"],
        smollm.metadata["tokenizer.ggml.merges"],
    )
    assert isinstance(tokens, list) and isinstance(merges, list)
    pairs = [tuple(pair.split(" ")) for pair in merges]
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, pairs)
    )
    split = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = split.Sequence(
        [split.Digits(True), split.ByteLevel(add_prefix_space=False)]
    )
    theirs.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in tokens[:17]])
    ours = load_tokenizer(smollm)
    for text in [*TEXTS, *(random_text(rng) for _ in range(1000))]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


# Pieces with scores


@pytest.fixture(scope="module")
def stories_tokenizer(stories: ModelFile) -> Tokenizer:
    return load_tokenizer(stories)


def test_stories_known_encoding(stories_tokenizer: Tokenizer):
    assert stories_tokenizer.encode("Zoo") == [1, 410, 469, 347]
    assert stories_tokenizer.encode("") == [1]
    assert stories_tokenizer.encode("Zoo", bos=False) == [410, 469, 347]


def test_stories_round_trip(stories_tokenizer: Tokenizer, rng: np.random.Generator):
    for text in [*TEXTS, *(random_text(rng) for _ in range(200))]:
        for spelled in (text, f"<s>{text}"):
            ids = stories_tokenizer.encode(spelled, special=False)
            prefix = " " if spelled else ""
            assert stories_tokenizer.decode(ids, special=False) == prefix + spelled
            assert ids.count(1) == 1


def test_stories_merges_the_best_score_first(data_dir: Path, stories_tokenizer: Tokenizer):
    pieces = stories_pieces(data_dir / "llm" / "tok512.bin")
    scores = dict(pieces[259:])
    ids = {piece: i for i, (piece, _) in enumerate(pieces) if i >= 259}
    for text in ("Once upon a time, there was a little girl.", "the happy bunny hopped and played"):
        symbols = list(" " + text)
        while True:
            joined = ["".join(pair) for pair in pairwise(symbols)]
            best = max(
                (i for i, s in enumerate(joined) if s in scores),
                key=lambda i: (scores[joined[i]], -i),
                default=-1,
            )
            if best < 0:
                break
            symbols[best : best + 2] = [joined[best]]
        assert stories_tokenizer.encode(text) == [1, *(ids[symbol] for symbol in symbols)]


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * 5]


def test_characters_without_a_token_become_bytes():
    tokenizer = scored(PIECES, TYPES, [float(-i) for i in range(264)], prefix=True)
    assert tokenizer.encode("ab") == [262, 261]
    assert tokenizer.encode("é") == [259, 0xC3 + 3, 0xA9 + 3]
    assert tokenizer.encode("<s>a", special=False)[:2] == [259, ord("<") + 3]
    plain = scored(PIECES, TYPES, [float(-i) for i in range(264)], prefix=False)
    assert plain.encode("ab") == [263] and plain.encode(" ab") == [262, 261]
    without = scored(["<unk>", "a"], [2, 1], [0.0, 0.0], prefix=False)
    assert without.encode("aéa") == [1, 0, 1]


@pytest.mark.parametrize(
    "scores",
    [None, "s", np.zeros(3, "f4"), np.zeros(264, "i4")]
    + [np.full(264, bad, "f4") for bad in (np.nan, np.inf)],
    ids=str,
)
def test_wrong_scores(scores: object):
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.token_type": np.array(TYPES),
        "tokenizer.ggml.scores": np.zeros(264, "f4"),
    }
    assert from_metadata(metadata).encode("ab", bos=False)
    metadata["tokenizer.ggml.scores"] = scores
    if scores is None:
        del metadata["tokenizer.ggml.scores"]
    with pytest.raises(ModelError) as error:
        from_metadata(metadata)
    assert code_of(error) == "M107"
