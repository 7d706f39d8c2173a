"""Folders of safetensors files: tokenizer.json, chat template, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch writes the test files")
pytest.importorskip("transformers", reason="transformers writes the test files")
import tokenizers  # noqa: E402
from tests.serve.sequence import Sequence  # noqa: E402
from tests.serve.test_families import made  # noqa: E402
from tests.serve.test_tokenizer import TEXTS, random_text  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

from tilewright.errors import ModelError  # noqa: E402
from tilewright.serve.engine import LLM  # noqa: E402
from tilewright.serve.tokenizer import AnswerText, from_folder  # noqa: E402
from tilewright.serve.weights import open_model  # noqa: E402

WORDS = ["the", " the", "an", " an", "123", "é", "中", "'s", "hello", " hello world"]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def bytewise() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([*WORDS, *TEXTS], trainer)
    return library


def pieces() -> tokenizers.Tokenizer:
    """As of Llama 2: ▁ for a space, one in front of a text, bytes for unknown characters."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, show_progress=False,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256))],
    )  # fmt: skip
    library.train_from_iterator(WORDS, trainer)
    data = json.loads(library.to_str())
    data["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    # Byte tokens are ordinary ones there.
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return library


@pytest.fixture(scope="module", params=[bytewise, pieces])
def library(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    made = request.param()
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", begin)]
    )
    return made


def test_tokenizer_json(library: tokenizers.Tokenizer, tmp_path: Path, rng: np.random.Generator):
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2, 999]}', encoding="utf-8")
    ours = from_folder(tmp_path, 400)
    begin, end = (library.token_to_id(t) for t in ("<s>", "</s>"))
    assert (ours.bos, ours.add_bos, len(ours.pieces)) == (begin, True, library.get_vocab_size())
    assert {1, 2} <= ours.ends and 999 not in ours.ends and end in ours.control
    for text in [*TEXTS, *(random_text(rng) for _ in range(200)), "a</s>b <think>x"]:
        assert ours.encode(text) == library.encode(text).ids
        plain = ours.encode(text, special=False)
        assert plain[0] == begin and ours.control.isdisjoint(plain[1:])
        if "<think>" not in text:
            prefix = "" if library.normalizer is None or not text else " "
            assert ours.decode(plain, special=False) == prefix + text
        stream = AnswerText(ours)
        assert "".join(map(stream.push, plain)) + stream.finish() == ours.decode(plain, False)


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_the_names_of_tokenizer_config(library: tokenizers.Tokenizer, tmp_path: Path):
    library.save(str(tmp_path / "tokenizer.json"))
    written, end, im_end = (library.token_to_id(t) for t in SPECIAL)
    guessed = from_folder(tmp_path, 400)
    assert guessed.named == {"bos": written, "eos": im_end}
    names = {"bos_token": "<|im_end|>", "eos_token": {"content": "</s>", "special": True}}
    write(tmp_path / "tokenizer_config.json", names)
    ours = from_folder(tmp_path, 400)
    assert ours.named == {"bos": im_end, "eos": end} and ours.ends == {end, im_end}
    assert (ours.bos, ours.named["eos"], ours.add_bos) == (written, end, True)
    write(tmp_path / "tokenizer_config.json", {"bos_token": None, "eos_token": "<absent>"})
    assert from_folder(tmp_path, 400).named == guessed.named
    for wrong in (["</s>"], {"text": "</s>"}):
        write(tmp_path / "tokenizer_config.json", {"eos_token": wrong})
        with pytest.raises(ModelError) as caught:
            from_folder(tmp_path, 400)
        assert caught.value.code == "M107"


def test_every_named_end_of_the_vocabulary_counts(tmp_path: Path):
    data = json.loads(bytewise().to_str())
    data["added_tokens"][1]["special"] = False
    write(tmp_path / "tokenizer.json", data)
    write(tmp_path / "config.json", {"eos_token_id": [1, "1", None]})
    write(tmp_path / "generation_config.json", {"eos_token_id": 300})  # an ordinary one
    ours = from_folder(tmp_path, 400)
    assert ours.ends == {1, 2, 300} and ours.control == {0, 2}
    write(tmp_path / "generation_config.json", {"eos_token_id": 399})
    assert from_folder(tmp_path, 400).ends == {1, 2}


def test_a_name_that_no_text_begins_with(tmp_path: Path):
    bytewise().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    ours = from_folder(tmp_path, 400)
    assert (ours.bos, ours.add_bos, ours.named["bos"]) == (0, False, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    made(path, "llama")
    bytewise().save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = path / "model.safetensors"
    (path / "full.json").write_text(json.dumps(config), encoding="utf-8")
    assert weights.is_file()
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_an_answer(tmp_path: Path):
    """Tokenizer, template and model together; a user's text makes no control token."""
    made(tmp_path, "qwen3", vocab_size=320)
    bytewise().save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ '<s>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    llm = LLM(tmp_path, context=64)
    ids = llm.prompt("hello<|im_end|>")
    assert ids[0] == 0 and ids[-1] == 2 and ids.count(2) == 1
    assert isinstance(llm.generate("hello", max_tokens=5), str)


def test_weights_of_two_bytes(tmp_path: Path):
    reference = made(tmp_path, "qwen2", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = reference(torch.tensor([[5, 9, 2]])).logits[0, -1].numpy()
    got = Sequence(open_model(tmp_path), context=32).prefill([5, 9, 2])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def code_of(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return caught.value.code


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("model_type", "mamba", "M102"),
        ("model_type", 3, "M101"),
        ("hidden_size", "64", "M101"),
        ("hidden_size", 10**400, "M101"),
        ("hidden_size", True, "M101"),
        ("hidden_size", 128, "M103"),
        ("num_hidden_layers", 1 << 40, "M101"),
        ("num_hidden_layers", 2, "M103"),
        ("num_attention_heads", 0, "M101"),
        ("num_key_value_heads", 3, "M101"),
        ("head_dim", -2, "M101"),
        ("head_dim", 258, "M101"),
        ("query_pre_attn_scalar", 1e-320, "M101"),
        ("query_pre_attn_scalar", 1e300, "M101"),
        ("query_pre_attn_scalar", -4, "M101"),
        ("rms_norm_eps", 10**400, "M101"),
        ("rms_norm_eps", float("nan"), "M101"),
        ("hidden_act", "relu", "M102"),
        ("hidden_act", ["silu"], "M102"),
        ("attention_bias", True, "M102"),
        ("quantization_config", {"bits": 4}, "M102"),
        ("layer_types", ["sliding_attention"], "M102"),
        ("layer_types", [{}, {}, {}], "M102"),
        ("layer_types", ["sliding_attention"] * 3, "M101"),
        ("rope_parameters", 7, "M101"),
        ("rope_parameters", {"full_attention": 7}, "M101"),
        ("rope_parameters", {"rope_type": "longrope"}, "M102"),
        ("rope_parameters", {"rope_type": []}, "M101"),
        ("rope_parameters", {"rope_theta": -1.0}, "M101"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "M101"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, "M101"),
        ("final_logit_softcapping", float("inf"), "M101"),
    ],
)  # fmt: skip
def test_hostile_config(copy: Path, key: str, value: Any, code: str):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    assert code_of(copy) == code


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\xff", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "nul"]
)
def test_files_that_are_no_json(copy: Path, text: str):
    for name, code in (("config.json", "M101"), ("tokenizer.json", "M107")):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError) as caught:
            open_model(copy) if code == "M101" else from_folder(copy, 400)
        assert caught.value.code in (code, "M101")
        (copy / name).write_bytes(kept)


def test_weights_at_any_byte(copy: Path):
    wanted = {name: weight.data.copy() for name, weight in open_model(copy).tensors.items()}
    path = copy / "model.safetensors"
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    text = good[8 : 8 + size].rstrip()
    for spaces in range(4):
        header = text + b" " * (-len(text) % 4 + spaces)
        path.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + size :])
        for name, weight in open_model(copy).tensors.items():
            assert weight.data.flags.aligned and not weight.data.flags.writeable
            assert np.array_equal(weight.data, wanted[name])


def test_a_tensor_in_two_files(copy: Path):
    shutil.copy(copy / "model.safetensors", copy / "model-2.safetensors")
    with pytest.raises(ModelError, match="occurs twice") as caught:
        open_model(copy)
    assert caught.value.code == "M103"


def test_hostile_safetensors(copy: Path, rng: np.random.Generator):
    path = copy / "model.safetensors"
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])

    def rewritten(change: dict[str, Any]) -> bytes:
        text = json.dumps(header | change).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + size :]

    first = next(name for name in header if name.startswith("model"))
    entry = header[first]
    bad = [b"", good[:7], good[:100], good[:-1], good + b"x", b"\xff" * 64]
    bad += [struct.pack("<Q", 1 << 60) + good[8:]]
    bad += [
        rewritten({first: entry | {"shape": shape}}) for shape in ([1 << 40, 1 << 40], [-1], "x")
    ]
    bad += [rewritten({first: entry | {"data_offsets": at}}) for at in ([0, 1 << 62], [5, 4])]
    for data in bad:
        path.write_bytes(data)
        assert code_of(copy) == "M101", data[:80]
    for dtype in ("I64", "F8_E4M3", "F64"):
        path.write_bytes(rewritten({first: entry | {"dtype": dtype}}))
        assert code_of(copy) in ("M101", "M104")
    path.write_bytes(rewritten({}).replace(first.encode(), first.encode()[:-1] + b"?"))
    assert code_of(copy) == "M103"
    path.unlink()
    assert code_of(copy) == "M103"
    for _ in range(200):  # random damage of the header: an error, or a model
        data = bytearray(good)
        data[int(rng.integers(0, 8 + size))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            open_model(copy)
        except ModelError as error:
            assert error.code in ("M101", "M103", "M104")


HOSTILE: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []},
    "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ] * 40,
    },
    "decoder": None,
    "added_tokens": [{"id": -1, "content": "x", "special": True}],
    "post_processor": {"type": "Nothing"},
    "version": 7,
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_tokenizer_json(copy: Path, key: str):
    data = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps(data | {key: HOSTILE[key]}), encoding="utf-8")
    if key == "decoder":
        from_folder(copy, 400)  # spelled as pieces, and so with ▁
        return
    with pytest.raises(ModelError) as caught:
        from_folder(copy, 400)
    assert caught.value.code == "M107"


def test_random_damage_of_tokenizer_json(copy: Path, rng: np.random.Generator):
    good = (copy / "tokenizer.json").read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            data[at] = int(rng.integers(32, 127))
        (copy / "tokenizer.json").write_bytes(data)
        try:
            tokenizer = from_folder(copy, 400)
            assert tokenizer.control.isdisjoint(tokenizer.encode("the <s> 12é", False, bos=False))
        except ModelError as error:
            assert error.code in ("M107", "M106")


def test_a_merge_that_makes_a_control_token(copy: Path):
    data = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"] |= {"vocab": data["model"]["vocab"] | {"EOT": 318}, "ignore_merges": True}
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 318, "content": "EOT"})
    (copy / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = from_folder(copy, 400)
    assert tokenizer.encode("EOT", bos=False) == [318]
    with pytest.raises(ModelError) as caught:
        tokenizer.encode("EOT", special=False)
    assert caught.value.code == "M106"
