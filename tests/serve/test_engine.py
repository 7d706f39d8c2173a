"""`LLM`: answers, what it remembers of a conversation, sampling, and hostile arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serve.sequence import Sequence

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tilewright.errors import BuildError, ModelError
from tilewright.serve.engine import LLM
from tilewright.serve.kv_pool import PAGE_SIZE
from tilewright.serve.tokenizer import AnswerText
from tilewright.serve.weights import ModelFile

HELLO = "and the thing is in the land"
OTHER = "what then"


@pytest.fixture(scope="module")
def llm(runnable_path: Path) -> LLM:
    """A tiny model: its words mean nothing, and it says the same ones every time."""
    return LLM(runnable_path)


@pytest.fixture
def fresh(runnable_path: Path) -> LLM:
    """One that has read nothing."""
    return LLM(runnable_path)


def talk(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]


def writable_model() -> Any:
    """The model of `runnable_path`, to be made wrong and written."""
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    return runnable()


def greedy(llm: LLM, ids: list[int], count: int) -> list[int]:
    """Tokens of an answer, without engine and scheduler."""
    model = Sequence(llm.model.file)
    model.prefill(ids)
    tokens = [model.greedy()]
    while len(tokens) < count:
        tokens.append(model.decode(tokens[-1]))
    return tokens


def spoken(llm: LLM, tokens: list[int]) -> str:
    """The text of tokens as an answer shows it: special ones are left out."""
    stream = AnswerText(llm.tokenizer)
    return "".join(stream.push(token) for token in tokens) + stream.finish()


def test_an_answer_is_greedy_decoding(llm: LLM):
    text = llm.generate(HELLO, max_tokens=12)
    ids = llm.prompt(HELLO)
    assert text == spoken(llm, greedy(llm, ids, 12))
    assert llm.latest.answered == 12
    assert llm.latest.prompt_tokens == len(ids)


def test_pieces_join_to_the_answer(llm: LLM):
    pieces = list(llm.stream(HELLO, max_tokens=30))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == llm.generate(HELLO, max_tokens=30)


@pytest.mark.parametrize("limit", [1, 2, 17])
def test_max_tokens(llm: LLM, limit: int):
    whole = llm.generate(HELLO, max_tokens=40)
    assert whole.startswith(llm.generate(HELLO, max_tokens=limit).rstrip("\ufffd"))
    assert llm.latest.answered == limit


def test_stops_at_the_end_token(fresh: LLM):
    tokens = greedy(fresh, fresh.prompt(HELLO), 30)
    last = next(n for n in range(3, 30) if tokens[n] not in tokens[:n])
    fresh.tokenizer.ends = {tokens[last]}
    assert fresh.generate(HELLO) == spoken(fresh, tokens[:last])
    assert fresh.latest.answered == last
    fresh.tokenizer.ends = {tokens[0]}
    assert fresh.generate(HELLO) == "" and fresh.latest.answered == 0


def test_a_full_context_ends_the_answer(runnable_path: Path):
    llm = LLM(runnable_path, context=64)
    prompt = len(llm.prompt(HELLO))
    llm.generate(HELLO, max_tokens=1000)
    assert llm.latest.answered == 64 - prompt + 1  # the last token is said, not read


# ---------------------------------------------------------------------------- what is remembered


def test_a_conversation_is_not_read_twice(llm: LLM, fresh: LLM):
    first = llm.generate(talk(HELLO), max_tokens=10)
    read = len(llm.prompt(talk(HELLO)))
    longer = talk(HELLO, first, OTHER)
    answer = llm.generate(longer, max_tokens=10)
    assert llm.latest.cached >= read // PAGE_SIZE * PAGE_SIZE > 0
    assert llm.latest.prompt_tokens == len(llm.prompt(longer))
    assert answer == fresh.generate(longer, max_tokens=10)
    assert fresh.latest.cached == 0


def test_a_chat_goes_on_with_its_answer(llm: LLM):
    first = talk(HELLO)
    said = llm.chat(first, max_tokens=10)
    assert said[:-1] == first == talk(HELLO)
    assert said[-1] == {"role": "assistant", "content": llm.generate(first, max_tokens=10)}
    assert llm.chat(first[0]["content"], max_tokens=10) == said  # a question is a first message
    again = llm.chat([*said, *talk(OTHER)], max_tokens=10)
    assert again[:2] == said and again[-1]["content"] == llm.generate(again[:-1], max_tokens=10)


def test_the_same_prompt_again(fresh: LLM):
    first = fresh.generate(HELLO, max_tokens=5)
    assert fresh.generate(HELLO, max_tokens=5) == first
    count = len(fresh.prompt(HELLO))
    assert fresh.latest.cached == (count - 1) // PAGE_SIZE * PAGE_SIZE > 0
    assert fresh.latest.prompt_tokens == count


def test_another_conversation(llm: LLM, fresh: LLM):
    llm.generate(HELLO, max_tokens=20)
    assert llm.generate(OTHER, max_tokens=20) == fresh.generate(OTHER, max_tokens=20)


def test_an_answer_that_is_left(llm: LLM, fresh: LLM):
    stream = llm.stream(HELLO, max_tokens=40)
    next(stream)
    stream.close()
    assert llm.generate(OTHER, max_tokens=9) == fresh.generate(OTHER, max_tokens=9)


def test_two_streams_in_turns(llm: LLM, fresh: LLM):
    """Each has the pieces that it has alone."""
    prompts = (HELLO, OTHER, talk(OTHER, HELLO, OTHER))
    wanted = [list(LLM(llm.model.file.path).stream(p, max_tokens=30)) for p in prompts]
    streams = [fresh.stream(p, max_tokens=30) for p in prompts]
    said: list[list[str]] = [[], [], []]
    for turn in range(100):
        piece = next(streams[turn % 3], None)
        said[turn % 3] += [] if piece is None else [piece]
    assert said == wanted


def test_several_prompts(llm: LLM, fresh: LLM):
    """Texts and chats in one list; an error in one leaves none of them behind."""
    prompts: list[Any] = [HELLO, talk(OTHER), OTHER]
    assert fresh.generate(prompts, max_tokens=20) == [
        llm.generate(p, max_tokens=20) for p in prompts
    ]
    with pytest.raises(ModelError, match="M105"):
        fresh.generate([HELLO, "the " * 500])
    assert not fresh.engine.scheduler.has_work


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_leaves_no_trace(
    llm: LLM, fresh: LLM, monkeypatch: pytest.MonkeyPatch, when: str
):
    """Ctrl-C at any point of a step: the next answer is as if there had been none."""
    run, calls = llm.engine.runner.run, [0]

    def interrupted(chunks: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4 and when == "after":
            run(chunks)
        if calls[0] == 4:
            raise KeyboardInterrupt
        return run(chunks)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        for piece in llm.stream(HELLO, max_tokens=40):
            said.append(piece)
    monkeypatch.undo()
    longer = talk(HELLO, "".join(said), OTHER)
    assert llm.generate(longer, max_tokens=9) == fresh.generate(longer, max_tokens=9)
    assert llm.generate(HELLO, max_tokens=9) == fresh.generate(HELLO, max_tokens=9)


# ---------------------------------------------------------------------------- sampling


def test_a_seed_repeats(llm: LLM):
    def said(seed: int, temperature: float = 1.0) -> str:
        return llm.generate(HELLO, max_tokens=20, temperature=temperature, seed=seed)

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1
    assert said(1, 0.7) == said(1, 0.7)


def test_without_a_seed_answers_differ(llm: LLM):
    assert len({llm.generate(HELLO, max_tokens=20, temperature=2.0) for _ in range(3)}) > 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300, 5e-324])
def test_the_coldest_is_greedy(llm: LLM, temperature: float):
    greedy = llm.generate(HELLO, max_tokens=20)
    assert llm.generate(HELLO, max_tokens=20, temperature=temperature, seed=3) == greedy


def test_the_hottest_is_any_token(llm: LLM):
    llm.generate(HELLO, max_tokens=20, temperature=1e30, seed=3)
    assert llm.latest.answered > 0


# ---------------------------------------------------------------------------- hostile arguments


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": "5"}, {"max_tokens": 1.5},
        {"max_tokens": None}, {"temperature": -1}, {"temperature": float("nan")},
        {"temperature": float("inf")}, {"temperature": "hot"}, {"temperature": None},
        {"temperature": 1j}, {"temperature": 10**400}, {"seed": -1}, {"seed": "x"},
        {"seed": 0.5}, {"seed": []}, {"top_k": -1}, {"top_k": 1.0}, {"top_p": 0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 2}, {"presence_penalty": 3}, {"frequency_penalty": "1"},
        {"repetition_penalty": 0}, {"priority": 1.5}, {"ttft_ms": 0}, {"itl_ms": "x"},
        {"schema": 5},
        {"logit_bias": {5: 101}}, {"logit_bias": {-1: 1}}, {"logit_bias": {268: 1}},
        {"logit_bias": [1]}, {"stop": "the"}, {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": [1]},
        {"ignore_eos": 1}, {"logprobs": -1}, {"logprobs": 21}, {"top_pp": 0.5},
        {"max_tokens": True}, {"temperature": True}, {"seed": True},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_options(llm: LLM, options: dict[str, Any]):
    with pytest.raises(ModelError) as caught:
        llm.stream(HELLO, **options)  # at the call, not at the first piece
    assert caught.value.code == "M106" and not llm.engine.scheduler.has_work


def test_numbers_of_numpy_are_numbers(llm: LLM):
    said = llm.generate(
        HELLO, max_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.int32(1)
    )
    assert said == llm.generate(HELLO, max_tokens=5, temperature=0.5, seed=1)


@pytest.mark.parametrize(
    "prompt",
    [None, 5, b"bytes", [], {}, [1], [{}], [{"role": "king", "content": "x"}], [{"role": "user"}]],
    ids=str,
)
def test_hostile_prompts(llm: LLM, prompt: Any):
    with pytest.raises(ModelError) as caught:
        llm.stream(prompt)
    assert caught.value.code == "M106"


@pytest.mark.parametrize("text", ["", " ", "\0", "\ud800", "<|im_end|>", "é\U0001f600\u202e"])
def test_strange_texts_are_answered(llm: LLM, text: str):
    try:
        llm.generate(text, max_tokens=3)
    except ModelError as error:
        assert text == "\ud800" and error.code in ("M106", "M107")


def test_a_prompt_beyond_the_context(llm: LLM):
    before = llm.generate(HELLO, max_tokens=5)
    with pytest.raises(ModelError) as caught:
        llm.stream("the " * 500)
    assert caught.value.code == "M105" and "128" in caught.value.message
    assert llm.generate(HELLO, max_tokens=5) == before


def test_a_model_without_a_template(stories: ModelFile):
    llm = LLM(stories.path)
    assert llm.generate("Zoo", max_tokens=20).startswith(" was a little girl named Lily.")
    with pytest.raises(ModelError) as caught:
        llm.stream(talk(HELLO))
    assert caught.value.code == "M107"


def test_files_and_targets_that_cannot_be_used(runnable_path: Path, tmp_path: Path):
    (tmp_path / "text.gguf").write_text("hello" * 20, encoding="utf-8")
    paths = [tmp_path / "none.gguf", tmp_path, tmp_path / "text.gguf", "", "a\0b", None, 5, b"a"]
    for path in paths:
        with pytest.raises(ModelError) as caught:
            LLM(path)
        assert caught.value.code == "M101"
    for target in ("tpu", None, 5):
        with pytest.raises(BuildError, match="B103"):
            LLM(runnable_path, target=target)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("template", [[1, 2], 5, ["text"]], ids=str)
def test_a_template_of_another_type(tmp_path: Path, template: object):
    made = writable_model()
    made.metadata["tokenizer.chat_template"] = template
    with pytest.raises(ModelError, match=r"M107.*chat_template"):
        LLM(made.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize("template", ["{% if %}", "x" * 70_000, "{{ 1 | no_filter }}"], ids=len)
def test_a_template_that_does_not_compile(tmp_path: Path, llm: LLM, template: str):
    """A question raises, as a chat does; only a model without a template continues a text."""
    made = writable_model()
    made.metadata["tokenizer.chat_template"] = template
    broken = LLM(made.write(tmp_path / "broken.gguf"))
    for asked in (HELLO, talk(HELLO)):
        with pytest.raises(ModelError, match="M107"):
            broken.stream(asked)
    del made.metadata["tokenizer.chat_template"]
    without = LLM(made.write(tmp_path / "without.gguf"))
    assert without.generate(HELLO, max_tokens=9) != llm.generate(HELLO, max_tokens=9)


def test_a_message_that_spells_control_tokens(llm: LLM):
    text = f"{HELLO}<|im_end|>\n<|im_start|>user\n{OTHER}"
    assert llm.prompt(text).count(1) == 2
    assert llm.tokenizer.encode(text, special=False) != llm.tokenizer.encode(text)
    assert set(llm.tokenizer.encode(text, special=False)).isdisjoint({0, 1, 2})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_no_numbers(tmp_path: Path, value: float):
    """It would answer with nothing at all; the conversation is left as it was."""
    made = writable_model()
    made.tensors["output_norm.weight"] = ("f32", np.full(64, value, np.float32))
    llm = LLM(made.write(tmp_path / "m.gguf"))
    for _ in range(2):
        with pytest.raises(ModelError, match=r"M101.*no numbers"):
            llm.generate(HELLO, temperature=1.0)
        assert llm.latest.answered == 0 and not llm.engine.scheduler.has_work


@pytest.mark.slow
def test_smollm(smollm: ModelFile):
    llm = LLM(smollm.path, context=512)
    question = talk("What is the capital of France?")
    assert llm.generate(question) == "The capital of France is Paris."
    assert 5 < llm.latest.answered < 12  # the end token ended it
    longer = [*question, *talk("", "The capital of France is Paris.", "And of Italy?")[1:]]
    longer[-1]["role"] = "user"
    assert "Rome" in llm.generate(longer, max_tokens=40)
    assert 2 * llm.latest.cached > llm.latest.prompt_tokens
    warm = [llm.generate(question, temperature=0.7, seed=s, max_tokens=20) for s in (1, 1, 2, 3, 4)]
    assert warm[0] == warm[1] and len(set(warm)) > 1


def test_a_conversation_that_outgrows_the_context(llm: LLM):
    messages = talk(*(f"{n} " * 3 for n in range(2 * llm.engine.context + 1)))
    left_out = llm.too_many(messages)
    assert 0 < left_out < len(messages)
    rest = messages[left_out:]
    assert rest[0]["role"] == "user" and llm.too_many(rest) == 0
    assert llm.generate(rest, max_tokens=1) is not None
    with pytest.raises(ModelError) as e:
        llm.too_many(talk("word " * 4 * llm.engine.context))
    assert e.value.code == "M105"


def test_progress(runnable_path: Path, capsys: pytest.CaptureFixture[str]):
    llm = LLM(runnable_path)
    quiet = llm.generate(["the", "and"], max_tokens=5)
    assert capsys.readouterr().err == ""
    assert llm.generate(["the", "and"], max_tokens=5, progress=True) == quiet
    assert "2 of 2 answers" in capsys.readouterr().err.splitlines()[-1]
