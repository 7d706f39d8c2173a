"""Answers that follow a JSON schema or a grammar, by the library llguidance (extra `grammar`)."""

import functools
from typing import Any

from tilewright.errors import ModelError, needed_for
from tilewright.serve.tokenizer import Tokenizer

with needed_for("response_format", "grammar"):
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_CHARS = 1 << 16  # of a schema, or of a grammar


def matcher(tokenizer: Tokenizer, schema: str, lark: str = "") -> LLMatcher:
    """Returns the matcher of an answer that follows a JSON schema or, without one, a grammar in
    the notation of Lark. It takes each token, and masks those that may come next (an end token once
    the text is complete). Raises ModelError[M106] for one that cannot be used."""
    name, where = ("JSON schema", "response_format") if schema else ("grammar", "grammar")
    grammar, wrong = "", "" if len(schema or lark) <= MAX_CHARS else "it is too long"
    try:
        if not wrong:
            read = LLMatcher.grammar_from_json_schema if schema else LLMatcher.grammar_from_lark
            grammar = read(schema or lark)
            wrong = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        wrong = str(error)
    if not tokenizer.ends:
        wrong = "the model has no end token"
    if wrong:
        raise ModelError("M106", f"the {name} cannot be used: {wrong[:200]}", where=where)
    return LLMatcher(_vocabulary(tokenizer), grammar)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokens in the library's form. Control and end tokens are no text to it."""

    class Wrapped:
        eos_token_id, bos_token_id = min(tokenizer.ends), tokenizer.bos
        tokens = tuple(map(tokenizer.piece, range(len(tokenizer.pieces))))
        special_token_ids = tuple(sorted(tokenizer.control | tokenizer.ends))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text, special=False, bos=False)

    return LLTokenizer(TokenizerWrapper(Wrapped()), eos_token=sorted(tokenizer.ends))
