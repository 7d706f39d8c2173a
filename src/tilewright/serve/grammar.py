"""Answers that follow a JSON schema or a grammar, by the library llguidance (extra `grammar`)."""

import functools
import json
import subprocess
import sys
from typing import Any

from tilewright.errors import ModelError, needed_for
from tilewright.serve.tokenizer import Tokenizer

with needed_for("response_format", "grammar"):
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_CHARS = 1 << 16  # of a schema, or of a grammar
MAX_SECONDS, MAX_BYTES = 1, 1 << 30  # of processor time and memory, for a matcher
_TRIAL = """import json, resource, sys
sys.path[:], schema, seconds, size = json.load(sys.stdin)
for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size)):
    resource.setrlimit(kind, (most, most))
from llguidance import LLMatcher, LLTokenizer
kind = "json_schema" if schema.lstrip().startswith("{") else "lark"
LLMatcher(LLTokenizer("byte"), getattr(LLMatcher, f"grammar_from_{kind}")(schema))"""


@functools.lru_cache(maxsize=256)
def check_effort(schema: str) -> None:
    """Makes a matcher in a process of its own: the library does not limit all of its work, and
    multiples of a large prime take minutes. Raises ModelError[M106] where that process fails."""
    given = json.dumps([sys.path, schema, MAX_SECONDS, MAX_BYTES]).encode()
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    if subprocess.run(command, check=False, input=given, capture_output=True).returncode:
        rule = f"its matcher fails, or takes more than {MAX_SECONDS} s or {MAX_BYTES >> 20} MiB"
        raise ModelError("M106", rule, where="response_format")


def matcher(tokenizer: Tokenizer, schema: str) -> LLMatcher:
    """Returns the matcher of an answer that follows a JSON schema, or a grammar in the notation of
    Lark, which begins with no brace. It takes each token, and masks those that may come next (an
    end token once the text is complete). Raises ModelError[M106] for one that cannot be used."""
    is_json = schema.lstrip().startswith("{")
    name, grammar, wrong = "JSON schema" if is_json else "grammar", "", "it is too long"
    try:
        if len(schema) <= MAX_CHARS:
            read = LLMatcher.grammar_from_json_schema if is_json else LLMatcher.grammar_from_lark
            grammar = read(schema)
            wrong = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        wrong = str(error)
    if not tokenizer.ends:
        wrong = "the model has no end token"
    if wrong:
        rule = f"the {name} cannot be used: {wrong[:200]}"
        raise ModelError("M106", rule, where="response_format")
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
