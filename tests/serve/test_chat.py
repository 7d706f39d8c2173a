"""Chat: messages are checked, templates render as meant, hostile ones end in an error."""

from __future__ import annotations

import gc
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tests.serve.tiny import render

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve import chat as chat_module
from tilewright.serve.chat import MAX_MESSAGES, ChatTemplate, Prompts, check_messages, template_of
from tilewright.serve.tokenizer import from_metadata, load_tokenizer
from tilewright.serve.weights import ModelFile, open_model

HELLO = [{"role": "user", "content": "Hello"}]
PLAIN: Any = SimpleNamespace(any_special=re.compile(r"(?!)"), special={}, control=(), named={})


def template(source: str) -> ChatTemplate:
    """With a tokenizer that has no special tokens."""
    return ChatTemplate(source, PLAIN)


def test_smollm_prompt(smollm: ModelFile):
    chat = template(template_of(smollm.metadata))
    talk = [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert render(chat, talk) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(chat, [{"role": "system", "content": "Be brief."}, *HELLO]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_names_of_a_template(tiny_path: Path):
    model = open_model(tiny_path)
    chat = ChatTemplate("{{ bos_token }}|{{ eos_token }}", load_tokenizer(model))
    assert render(chat, HELLO) == "<|im_start|>|<|im_end|>"


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
    assert render(template(source), talk) == 'a, b 2 2 {"a": "<é>"}'
    with pytest.raises(ModelError, match="refuses") as error:
        render(template(source), talk[1:])
    assert error.value.code == "M106"


def test_what_transformers_offers():
    """Filters, globals and blocks of its environment, with the results written by hand."""
    talk = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
    ]
    cases = {
        "{{ messages | map(attribute='content') | join('+') }}": "a+b",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
        "{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | first }}":
            "assistant",
        "{{ [1, 2, 3, 4] | select('even') | list }}{{ [1, 2, 3] | reject('odd') | list }}":
            "[2, 4][2]",
        "{{ {'k': 'é<'} | tojson }}": '{"k": "é<"}',
        "{{ {'k': 'é<'} | tojson(ensure_ascii=True) }}": '{"k": "\\u00e9<"}',
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}": '{"a":2,"b":1}',
        "{{ [1] | tojson(indent=2) }}": "[\n  1\n]",
        "{% set j = joiner(', ') %}{% for i in range(3) %}{{ j() }}{{ i }}{% endfor %}": "0, 1, 2",
        "{{ 'a\nb' | indent(2) }}": "a\n  b",
        "{{ dict(a=1)['a'] }}{{ cycler('x', 'y').next() }}": "1x",
        "{% generation %}{% set x = 1 %}{{ messages[1].content }}{% endgeneration %}{{ x }}": "b",
        "{{ tools is none }}{{ documents is none }}{{ tools is defined }}": "TrueTrueTrue",
        "{{ '%s-%d' % ('a', 3) }}{{ 'ab' * 2 }}{{ '{}!'.format(1) }}": "a-3abab1!",
        "{{ messages[0].name }}{{ messages[1].reasoning_content }}{{ messages[1].name }}": "Annwhy",
        "{% for m in messages %}{% if loop.index0 %}{% continue %}{% endif %}x{% endfor %}": "x",
        "{{ strftime_now('%Y') | int > 2000 }}": "True",
        "  {% if true %}\nx\n  {% endif %}\n": "x\n",
    }  # fmt: skip
    for source, expected in cases.items():
        assert render(template(source), talk) == expected, source


def test_tool_calls_reach_the_template():
    function = {"name": "f", "arguments": {"x": [1, {"y": None}], "z": 1.5}}
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "7", "function": function}]},
        {"role": "tool", "content": "3", "tool_call_id": "7", "name": None},
    ]
    source = "{{ messages | tojson }}"
    del talk[2]["name"]
    assert json.loads(render(template(source), talk)) == talk


def test_the_names_of_the_file(tiny_path: Path):
    model = open_model(tiny_path)
    held = {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2}
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
    tokenizer = from_metadata({**model.metadata, **held})
    shown = "<|im_start|>|<|im_end|>|<|endoftext|>|<|im_end|>"
    assert render(ChatTemplate(source, tokenizer), HELLO) == shown
    assert render(template(source), HELLO) == "|||"


def test_a_process_that_died_is_started_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_module, "MAX_SECONDS", 0.5)
    chat = template("{{ messages[0].content }}{% if messages[1] %}" + TWICE + "{% endif %}")
    for _ in range(2):
        assert render(chat, HELLO) == "Hello"
        with pytest.raises(ModelError, match=r"M107.*processor time"):
            render(chat, HELLO * 2)
    process = chat._worker._process
    assert process is None
    assert render(chat, HELLO) == "Hello"
    process = chat._worker._process
    assert process is not None and process.poll() is None
    process.kill()
    process.wait()
    assert render(chat, HELLO) == "Hello"
    process = chat._worker._process
    del chat
    gc.collect()
    assert process is not None and process.poll() is not None, "the process outlives its template"


def test_threads_share_a_template():
    chat = template("{{ messages[0].content }}")
    texts = [str(n) * 100 for n in range(60)]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda text: render(chat, [{"role": "user", "content": text}]), texts)
        assert list(found) == texts


def test_an_interrupted_rendering_answers_nothing_later(monkeypatch: pytest.MonkeyPatch):
    chat = template("{{ messages[0].content }}")
    assert render(chat, HELLO) == "Hello"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_module.json, "loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(chat, [{"role": "user", "content": "lost"}])
    assert render(chat, HELLO) == "Hello"


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
        render(template(HOSTILE[what]), [{"role": "user", "content": "x" * 1000}])
    assert error.value.code == "M107"


def test_filters_of_many_messages():
    """What templates do for each message does not use up the budget."""
    text = (
        "{% for m in messages %}{% if loop.index0 == messages|length - 1 or 'x' in m.content "
        "and m.role in ('user', 'tool') %}{{ (m.content|trim).split('x')|last }}{% endif %}"
        "{% endfor %}{{ range(3)|sum }}{{ 5 in range(9) }}"
    )
    messages = [{"role": "user", "content": f" {n}x{n} "} for n in range(MAX_MESSAGES)]
    assert render(template(text), messages).endswith(f"{MAX_MESSAGES - 1}3True")


@pytest.mark.parametrize("found", [None, "", 7, True, ["a"], np.arange(3)], ids=repr)
def test_model_without_a_template(found: Any, tiny_path: Path):
    model = open_model(tiny_path)
    metadata = {k: v for k, v in model.metadata.items() if k != "tokenizer.chat_template"}
    metadata |= {} if found is None else {"tokenizer.chat_template": found}
    with pytest.raises(ModelError) as error:
        Prompts(replace(model, metadata=metadata), 64).prompt(HELLO)
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
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": "a\ud800"}], "messages"),
        ([{**HELLO[0], "name": 5}], r"messages\[0\]\.name"),
        ([{**HELLO[0], "reasoning_content": ["x"]}], "reasoning_content"),
        ([{**HELLO[0], "tool_calls": "x"}], "tool_calls"),
        ([{**HELLO[0], "tool_calls": ["x"]}], "tool_calls"),
        ([{**HELLO[0], "tool_calls": [{"x": {1, 2}}]}], "messages"),
        ([{**HELLO[0], "tool_calls": [{"x": "\udc00"}]}], "messages"),
    ],
)
def test_malformed_messages(messages: Any, where: str):
    with pytest.raises(ModelError, match=where) as error:
        check_messages(messages)
    assert error.value.code == "M106"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert check_messages([{"role": "user", "content": parts, "other": 1}]) == HELLO


def test_the_oldest_messages_are_left_out(tiny_path: Path):
    model = open_model(tiny_path)
    tokenizer = load_tokenizer(model)
    prompts = Prompts(model, 64, tokenizer)
    assert prompts.template is not None
    system = {"role": "system", "content": "be brief"}
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(9)]
    for first in ([], [system]):
        sizes = {}
        for left_out in range(0, 9, 2):
            text = render(prompts.template, [*first, *talk[left_out:]])
            sizes[left_out] = len(tokenizer.encode(text))
        for limit in range(sizes[8], sizes[0] + 2):
            prompts.context = limit + min(64, limit)
            wanted = next(n for n in range(0, 9, 2) if sizes[n] <= limit)
            assert prompts.too_many([*first, *talk]) == wanted
        prompts.context = 2 * (sizes[8] - 1)
        with pytest.raises(ModelError) as error:
            prompts.too_many([*first, *talk])
        assert error.value.code == "M105"


def test_the_constructor_starts_the_process(monkeypatch: pytest.MonkeyPatch):
    """The first prompt uses the process that the constructor starts, which reports no error."""
    chat = template("{{ messages[0].content }}")
    process = chat._worker._process
    assert process is not None
    assert render(chat, HELLO) == "Hello" and chat._worker._process is process
    for source in (HOSTILE["does not parse"], HOSTILE["is too long"]):
        damaged = template(source)
        with pytest.raises(ModelError) as error:
            render(damaged, HELLO)
        assert error.value.code == "M107"
    monkeypatch.setattr(chat_module, "find_spec", lambda name: None)
    absent = template("x")
    with pytest.raises(MissingExtra, match="jinja2"):
        render(absent, HELLO)
