"""One model for all peers of `bench serve --peers`: the same weights, in each one's own form.

The weights are tensors of torch, by the canonical names of `serve/weights.py`, in memory of the
device: those of a file, or random ones of a named shape.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.errors import ArgumentError
from tilewright.serve.gguf import Weight, dequantize
from tilewright.serve.models.config import Metadata, ModelConfig, read_config
from tilewright.serve.weights import ModelFile, open_model

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_TINY = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 4096,
}  # fmt: skip
_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960,
}  # fmt: skip
# Keys of a config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | _TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "smollm2-135m": _LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "llama-3.1-8b": _LLAMA | _8B | {
        "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-8b": _8B | {
        "model_type": "qwen3", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip

# Our names of the weights of a layer, and those of transformers.
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}  # fmt: skip
_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}


@dataclass(slots=True)
class PeerModel:
    """`keys`: of its config.json; `weights`: on `device`, float32 on a CPU and bfloat16 on a GPU,
    norms too; the halves of a rotated head lie apart. `path`: the file it was read from."""

    name: str
    config: ModelConfig
    keys: dict[str, Any]
    weights: dict[str, Any]
    device: str
    path: Path | None = None

    def ours(self) -> ModelFile:
        """The model as our engine takes it: the file itself, or the random weights."""
        if self.path is not None:
            return open_model(self.path)
        weights = {name: _weight(name, tensor) for name, tensor in self.weights.items()}
        weights.setdefault("lm_head", weights["embed"])
        return ModelFile(_folder_with_a_tokenizer(), self.config, weights, {})

    def of_transformers(self, attention: str) -> Any:
        """The model of transformers, which shares our tensors. `attention`: its name there."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**self.keys, eos_token_id=None, pad_token_id=0)
        config._attn_implementation = attention
        with torch.device(self.device):
            dtype = self.weights["embed"].dtype
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        state = {_name_there(name): tensor for name, tensor in self.weights.items()}
        state.setdefault("lm_head.weight", self.weights["embed"])
        model.load_state_dict(state, strict=True, assign=True)
        return model


def random_model(shape: str, device: str) -> PeerModel:
    """Random weights N(0, 1 / columns) of a shape of `SHAPES`."""
    import torch

    keys = SHAPES[shape]
    config = read_config(Metadata(keys), has_head=True)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    random = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, size in config.shapes().items():
        if len(size) == 1:
            weights[name] = torch.ones(size, dtype=dtype, device=device)
        elif name == "lm_head" and config.tied_embedding:
            continue
        else:
            values = torch.randn(size, dtype=dtype, device=device, generator=random)
            weights[name] = values.mul_(size[1] ** -0.5)
    return PeerModel(shape, config, keys, weights, device)


def read_model(path: Path, device: str) -> PeerModel:
    """A Llama of a GGUF file, its weights dequantised for those peers that do not read the file.
    Raises ArgumentError[A109] for another family."""
    import torch

    file = open_model(path)
    c = file.config
    if c.architecture != "llama" or c.rope.kind != "linear" or c.rope.factor != 1:
        rule = f"{path.name}: the peers take a plain Llama, or a shape: {', '.join(SHAPES)}"
        raise ArgumentError("A109", rule, where="--model")
    keys = _LLAMA | {
        "hidden_size": c.dim, "intermediate_size": c.ffn_dim, "num_hidden_layers": c.layers,
        "num_attention_heads": c.qo_heads, "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim, "vocab_size": c.vocab, "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_eps, "tie_word_embeddings": c.tied_embedding,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope.base},
    }  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    weights = {}
    for name, weight in file.tensors.items():
        if name == "lm_head" and c.tied_embedding:
            continue
        values = torch.from_numpy(dequantize(weight).copy())
        if c.rope_interleaved and name.endswith((".q", ".k")):  # pairs of a head become halves
            pairs = values.view(-1, c.head_dim // 2, 2, c.dim)
            values = pairs.transpose(1, 2).reshape(values.shape)
        weights[name] = values.to(device, dtype)
    return PeerModel(path.stem, c, keys, weights, device, path)


def _name_there(name: str) -> str:
    """The name of a weight in transformers."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    there = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}" if layer else _OUTER[name]
    return f"{there}.weight"


def _weight(name: str, tensor: Any) -> Weight:
    """A tensor as a weight of our engine, which takes matrices of a GPU as they are; norms as
    float32."""
    import torch

    if tensor.ndim == 2 and tensor.is_cuda:
        return Weight(name, "bf16", tuple(tensor.shape), tensor)
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        return Weight(name, "f32", tuple(tensor.shape), tensor.float().cpu().numpy())
    bits = tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    return Weight(name, "bf16", tuple(tensor.shape), bits)


def temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="bench-serve-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _folder_with_a_tokenizer() -> Path:
    """A folder whose tokenizer.json spells a few bytes: random weights have no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:64]
    library = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    folder = temporary_folder()
    library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({}), encoding="utf-8")
    return folder
