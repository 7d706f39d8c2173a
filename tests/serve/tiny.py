"""A tiny Llama model in a GGUF file, written by the gguf library; tests make it wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tilewright.serve.chat import ChatTemplate
from tilewright.serve.tokenizer import byte_spellings

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "Ġ t", "a n", "an d", "i n", "Ġ Ġ", "l l")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def tokens() -> list[str]:
    made = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIAL, *byte_spellings(), *made]


def metadata() -> dict[str, Any]:
    return {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens()),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (256 + len(MERGES)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors(seed: int = 0) -> dict[str, tuple[str, np.ndarray]]:
    """Name to (kind, float32 values) in the GGUF's own names."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    out: dict[str, tuple[str, np.ndarray]] = {}
    out["token_embd.weight"] = ("q8_0", normal(len(tokens()), 64))
    for i, (attention, ffn) in enumerate((("q4_1", "q4_0"), ("f16", "bf16"))):
        p = f"blk.{i}."
        out[p + "attn_norm.weight"] = ("f32", 1 + normal(64))
        out[p + "attn_q.weight"] = (attention, normal(64, 64))
        out[p + "attn_k.weight"] = (attention, normal(32, 64))
        out[p + "attn_v.weight"] = ("q8_0", normal(32, 64))
        out[p + "attn_output.weight"] = (attention, normal(64, 64))
        out[p + "ffn_norm.weight"] = ("f32", 1 + normal(64))
        out[p + "ffn_gate.weight"] = (ffn, normal(96, 64))
        out[p + "ffn_up.weight"] = (ffn, normal(96, 64))
        out[p + "ffn_down.weight"] = ("q4_1", normal(64, 96))
    out["output_norm.weight"] = ("f32", 1 + normal(64))
    return out


@dataclass
class TinyModel:
    architecture: str = "llama"
    metadata: dict[str, Any] = field(default_factory=metadata)
    tensors: dict[str, tuple[str, np.ndarray]] = field(default_factory=tensors)

    def write(self, path: Path, stored: dict[str, tuple[str, np.ndarray]] | None = None) -> Path:
        """`stored`: type and bytes of the tensors with such a part in their names."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, (kind, values) in self.tensors.items():
            part = name.split(".")[-2]
            if stored and part in stored:
                number = gguf.GGMLQuantizationType[stored[part][0]]
                writer.add_tensor(name, stored[part][1], raw_dtype=number)
                continue
            raw = values if kind == "f32" else gguf.quants.quantize(values, KINDS[kind])
            writer.add_tensor(name, raw, raw_dtype=KINDS[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def render(chat: ChatTemplate, messages: Any, tools: Any = None) -> str:
    """The text of a prompt."""
    return chat._rendered(messages, tools).translate(chat._originals)


def runnable() -> TinyModel:
    """A tiny model of weights that there are kernels for, with an output matrix of its own."""
    made = TinyModel()
    embed = made.tensors["token_embd.weight"][1]
    made.tensors["output.weight"] = ("f16", embed[::-1].copy())
    return made
