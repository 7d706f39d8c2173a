"""Chat: messages are checked, templates render as meant, hostile ones end in an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tilewright.errors import ModelError
from tilewright.serve import chat as chat_module
from tilewright.serve.chat import MAX_MESSAGES, ChatTemplate, check_messages
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import ModelFile, open_model

HELLO = [{"role": "user", "content": "Hello"}]


def test_smollm_prompt(smollm: ModelFile):
    chat = ChatTemplate.from_metadata(smollm.metadata)
    talk = [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert chat.render(talk) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    named = chat.render(
        [{"role": "system", "content": "Be brief."}, *HELLO], add_generation_prompt=False
    )
    assert named == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


def test_names_of_a_template(tiny_path: Path):
    model = open_model(tiny_path)
    metadata = {**model.metadata, "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}"}
    chat = ChatTemplate.from_metadata(metadata, load_tokenizer(model))
    assert chat.render(HELLO) == "<|im_start|>|<|im_end|>"


def test_what_templates_rely_on():
    source = """
    {%- set ns = namespace(n=0) %}
    {%- for message in messages if message.role != 'system' %}
        {%- if loop.first and message['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}
        {%- set ns.n = ns.n + 1 %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
        {{- message.content | trim }}{{ ', ' if not loop.last }}
    {%- endfor %} {{ ns.n }} {{ (7 * 6) % 5 }} {{ {'a': '<é>'} | tojson }}
    {%- if tools is defined and tools %}tools{% endif %}"""
    talk = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    assert ChatTemplate(source).render(talk) == 'a, b 2 2 {"a": "<é>"}'
    with pytest.raises(ModelError, match="refuses") as error:
        ChatTemplate(source).render(talk[1:])
    assert error.value.code == "M106"


TWICE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "does not parse": "{% if %}",
    "does not end": TWICE,
    "recurses": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "recurses for ever": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "multiplies text": "{{ 'a' * 10 ** 9 }}",
    "makes a huge number": "{{ 10 ** (10 ** 9) }}",
    "formats with a width": "{{ '%1000000000d' % 1 }}",
    "pads by a method": "{{ 'a'.ljust(1000000000) }}",
    "pads by format": "{{ '{:1000000000}'.format(1) }}",
    "pads by a filter": "{{ 'a' | center(1000000000) }}",
    "writes without end": "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "reaches into Python": "{{ ''.__class__.__mro__ }}",
    "reaches globals": "{{ raise_exception.__globals__.os }}",
    "changes the messages": "{{ messages.append(1) }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "divides by zero": "{{ 1 // 0 }}",
    "reads what is not there": "{{ a.b.c }}",
    "sums without end": "{{ range(10**15)|sum }}",
    "sums beyond the machine": "{{ range(10**16 * 10**3)|sum }}",
    "looks for the largest": "{{ range(10**15)|max }}",
    "joins without end": "{{ range(10**15)|join }}",
    "selects without end": "{{ range(10**15)|select('gt', 10**14)|first }}",
    "looks in a range": "{{ 'a' in range(10**12) }}",
    "looks outside a range": "{{ 'a' not in range(10**12) }}",
    "tests in a range": "{{ 'a' is in range(10**12) }}",
    "spreads a range": "{{ raise_exception(*range(10**12)) }}",
    "sums again and again": "{% set r = range(99999)|list %}"
    "{% for i in r %}{{ r|sum }}{% endfor %}",
    "looks again and again": "{% set r = range(99999) %}{% for i in r %}{{ 'a' in r }}{% endfor %}",
    "counts again and again": "{% set r = range(99999)|list %}"
    "{% for i in r %}{{ r.count('a') }}{% endfor %}",
    "cuts into slices": "{{ [1]|slice(10**15)|list }}",
    "cuts into batches": "{{ [1]|batch(10**9, 'a')|list }}",
    "nests": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "is too long": "a" * 70_000,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_template(what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_module, "MAX_SECONDS", 0.5)
    with pytest.raises(ModelError) as error:
        ChatTemplate(HOSTILE[what]).render([{"role": "user", "content": "x" * 1000}])
    assert error.value.code == "M107"


def test_filters_of_many_messages():
    """What templates do for each message does not use up the budget."""
    text = (
        "{% for m in messages %}{% if loop.index0 == messages|length - 1 or 'x' in m.content "
        "and m.role in ('user', 'tool') %}{{ (m.content|trim).split('x')|last }}{% endif %}"
        "{% endfor %}{{ range(3)|sum }}{{ 5 in range(9) }}"
    )
    messages = [{"role": "user", "content": f" {n}x{n} "} for n in range(MAX_MESSAGES)]
    assert ChatTemplate(text).render(messages).endswith(f"{MAX_MESSAGES - 1}3True")


@pytest.mark.parametrize("template", [None, "", 7, True, ["a"], np.arange(3)], ids=repr)
def test_model_without_a_template(template: Any):
    found = {} if template is None else {"tokenizer.chat_template": template}
    with pytest.raises(ModelError) as error:
        ChatTemplate.from_metadata(found)
    assert error.value.code == "M107"


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hello", "messages"),
        (["Hello"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"content": "Hello"}], r"messages\[0\]\.role"),
        ([*HELLO, {"role": "root", "content": ""}], r"messages\[1\]\.role"),
        ([{"role": ["user"], "content": ""}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\]"),
        ([*HELLO, {"role": "system", "content": ""}], r"messages\[1\]"),
        (HELLO * 5000, "messages"),
    ],
)
def test_malformed_messages(messages: Any, where: str):
    with pytest.raises(ModelError, match=where) as error:
        check_messages(messages)
    assert error.value.code == "M106"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert check_messages([{"role": "user", "content": parts, "other": 1}]) == HELLO


def test_fit_leaves_out_the_oldest(tiny_path: Path):
    model = open_model(tiny_path)
    tokenizer = load_tokenizer(model)
    chat = ChatTemplate.from_metadata(model.metadata, tokenizer)
    system = {"role": "system", "content": "be brief"}
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(9)]
    for first in ([], [system]):
        sizes = {}
        for left_out in range(0, 9, 2):
            sizes[left_out] = len(tokenizer.encode(chat.render([*first, *talk[left_out:]])))
        for limit in range(sizes[8], sizes[0] + 2):
            ids, left_out = chat.fit([*first, *talk], limit)
            assert left_out == next(n for n in range(0, 9, 2) if sizes[n] <= limit)
            assert ids == tokenizer.encode(chat.render([*first, *talk[left_out:]]))
        with pytest.raises(ModelError) as error:
            chat.fit([*first, *talk], sizes[8] - 1)
        assert error.value.code == "M105"
