"""The stories model of llama2.c (260 000 weights, 512 tokens), written as a GGUF file.

llama2.c stores seven int32 sizes and float32 tensors, each kind for all layers, and beside them the
tokens: an int32, then float32 score, int32 length and bytes of each.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

LAYERED = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_down", "ffn_up",
)  # fmt: skip


def tokens(path: Path) -> list[tuple[str, float]]:
    """Text and score of each token, with llama2.c's spaces."""
    data, position, out = path.read_bytes(), 4, []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        out.append((data[position + 8 : position + 8 + length].decode(), score))
        position += 8 + length
    return out


def write(folder: Path, path: Path) -> Path:
    """Writes the GGUF file of the model in `folder` to `path`."""
    data = (folder / "stories260K.bin").read_bytes()
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data)
    kv = dim // heads * kv_heads
    shapes = dict(zip(LAYERED, [(dim,), (dim, dim), (kv, dim), (kv, dim), (dim, dim), (dim,),
                                (ffn, dim), (dim, ffn), (ffn, dim)], strict=True))  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = tokens(folder / "tok512.bin")
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts + [text.replace(" ", "▁") for text, _ in pieces[259:]])
    writer.add_token_scores([score for _, score in pieces])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    numbers = np.frombuffer(data, "<f4", offset=28)
    position = 0

    def add(name: str, shape: tuple[int, ...]) -> None:
        nonlocal position
        size = int(np.prod(shape))
        writer.add_tensor(f"{name}.weight", numbers[position : position + size].reshape(shape))
        position += size

    add("token_embd", (vocab, dim))
    for name, shape in shapes.items():
        for i in range(layers):
            add(f"blk.{i}.{name}", shape)
    add("output_norm", (dim,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
