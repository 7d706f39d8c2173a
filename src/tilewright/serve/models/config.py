"""Sizes and constants of the models, and what each `model_type` of a config.json means.

A model is a Llama with differences, which are data: `FAMILIES`. Sources: the models of
`transformers` of the same names.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tilewright.errors import ModelError
from tilewright.ops.rope import Rope

Value = int | float | bool | str | np.ndarray | list[str]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed reads of a model's file; null is as absent. A key of another type, or absent without a
    default, raises a ModelError of `code` that names the key, or what `names` has for it."""

    values: Mapping[str, Any]
    where: str = ""
    code: str = "M101"
    names: Mapping[str, str] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value: Any = self.values[key] if self.has(key) else default
        kinds = (int, float) if kind is float else kind
        if isinstance(value, kinds) and isinstance(value, bool) == (kind is bool):
            with suppress(OverflowError):  # an integer that no float holds
                return float(value) if kind is float else value
        name = self.names.get(key, key)
        rule = f"{name} is {short(value)}, not of type {kind.__name__}"
        raise ModelError(self.code, rule, where=self.where or name)

    def refuse(self, key: str, harmless: tuple[Value, ...]) -> None:
        """Raises ModelError[M102] for a key with another value than `harmless` ones."""
        value = self.values[key] if self.has(key) else harmless[0]
        if not isinstance(value, int | float | str) or value not in harmless:
            raise ModelError("M102", f"{key} = {short(value)} is not supported", where=self.where)


def short(value: Any) -> str:
    """A value of a file, for a message."""
    return "missing" if value is None else repr(value)[:60]


_LIMITS = {
    "layers": 1 << 10, "dim": 1 << 16, "ffn_dim": 1 << 20, "qo_heads": 1 << 10,
    "kv_heads": 1 << 10, "head_dim": 1 << 8, "vocab": 1 << 21, "context": 1 << 24,
}  # fmt: skip
_SIZES = {  # by the field that has the key of a config.json
    "layers": "num_hidden_layers", "dim": "hidden_size", "qo_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size", "vocab": "vocab_size", "context": "max_position_embeddings",
}  # fmt: skip
_GEMMA = {"post_norms": True, "norm_offset": 1.0, "gelu": True, "scaled_embedding": True}
_ABSENT = {"sliding_window": 4096, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
# By model_type: fields of `ModelConfig`; `full_every`: each how many-th layer has no window where
# the file does not say it (0: none); `absent`: what absent keys of config.json mean (null: off).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"full_every": 0, "gguf": "llama", "absent": {"sliding_window": 4096}},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA | {"full_every": 2, "absent": _ABSENT | {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}},
    "gemma3_text": _GEMMA | {"qk_norm": True, "full_every": 6, "gguf": "gemma3",
        "absent": _ABSENT | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a model.

    `rope_interleaved`: the rotated pairs of a head are elements (2i, 2i + 1), otherwise (i, i +
    head_dim / 2). `context` is the longest sequence in tokens. Layers of `windowed` see the last
    `window` keys, and rotate by `local_rope` if there is one. `norm_offset` is added to the scales
    of normalisations; `post_norms`: also the results of attention and FFN are normalised;
    `scaled_embedding`: by the root of `dim`. `score_cap`, `logit_cap`: soft caps (0: none).
    """

    architecture: str
    gguf: str = ""  # the architecture's name there, where it is another
    layers: int
    dim: int
    ffn_dim: int
    qo_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope: Rope
    rms_eps: float
    tied_embedding: bool
    rope_interleaved: bool
    local_rope: Rope | None = None
    windowed: tuple[bool, ...] = ()
    window: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    gelu: bool = False
    scaled_embedding: bool = False
    sm_scale: float | None = None
    score_cap: float = 0.0
    logit_cap: float = 0.0

    @property
    def has_window(self) -> tuple[bool, ...]:
        """Whether a layer has a sliding window, for each layer."""
        return self.windowed or (False,) * self.layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor the model needs, by canonical name."""
        dim, ffn = self.dim, self.ffn_dim
        q, kv = self.qo_heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_norm", "ffn_norm"), (dim,))
        layer |= {"attn.q": (q, dim), "attn.k": (kv, dim), "attn.v": (kv, dim), "attn.o": (dim, q)}
        layer |= {"ffn.gate": (ffn, dim), "ffn.up": (ffn, dim), "ffn.down": (dim, ffn)}
        if self.qkv_bias:
            layer |= {f"attn.{name}.bias": layer[f"attn.{name}"][:1] for name in "qkv"}
        if self.qk_norm:
            layer |= {f"attn.{name}_norm": (self.head_dim,) for name in "qk"}
        if self.post_norms:
            layer |= {"attn_post_norm": (dim,), "ffn_post_norm": (dim,)}
        layers = {f"layers.{i}.{k}": v for i in range(self.layers) for k, v in layer.items()}
        return {"embed": (self.vocab, dim), **layers, "norm": (dim,), "lm_head": (self.vocab, dim)}

    def check(self, where: str) -> "ModelConfig":
        """The configuration, if it is one. Raises ModelError[M101]."""
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ModelError("M101", f"{name} is {value}, outside 1..{most}", where=where)
        if self.qo_heads % self.kv_heads or self.head_dim % 2:
            heads = f"{self.qo_heads} query heads, {self.kv_heads} KV heads of {self.head_dim}"
            raise ModelError("M101", f"{heads}: groups must be whole, heads even", where=where)
        usable = (
            self.rope.is_usable and (self.local_rope or self.rope).is_usable,
            0 < self.rms_eps < 1 and (self.sm_scale is None or 1e-6 < self.sm_scale < 1e6),
            0 <= self.score_cap < 1e30 and 0 <= self.logit_cap < 1e30,
            not any(self.windowed) or 1 <= self.window < 1 << 31,
        )
        if not all(usable):
            raise ModelError("M101", f"not positive and sensible: {self}"[:600], where=where)
        return self


def read_config(keys: Metadata, has_head: bool, interleaved: bool = False) -> ModelConfig:
    """Reads the keys of a config.json. `has_head`: the file has an output matrix;
    `interleaved`: `rope_interleaved` of the result.

    Raises ModelError: M101 for a value that is missing or of a wrong type, M102 for a model that is
    not supported.
    """
    architecture = keys.get("model_type", str)
    if architecture not in FAMILIES:
        rule, hint = f"model_type {short(architecture)}", f"supported: {', '.join(FAMILIES)}"
        raise ModelError("M102", rule, where=keys.where, hint=hint)
    family = dict(FAMILIES[architecture])
    full_every = family.pop("full_every", 1)
    keys = replace(keys, values=family.pop("absent", {}) | dict(keys.values))
    keys.refuse("quantization_config", ("",))
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        keys.refuse(key, (False,))
    if not keys.has("layer_types"):
        keys.refuse("use_sliding_window", (False,))
    for key in ("hidden_act", "hidden_activation"):
        keys.refuse(key, ("gelu_pytorch_tanh" if family.get("gelu") else "silu",))
    sizes = {name: keys.get(key, int) for name, key in _SIZES.items()}
    dim, heads, query = sizes["dim"], sizes["qo_heads"], keys.get("query_pre_attn_scalar", float, 0)
    windowed = _windows(keys, sizes["layers"], full_every)
    rope, local_rope = _ropes(keys)
    return ModelConfig(
        architecture=architecture, kv_heads=keys.get("num_key_value_heads", int, heads),
        head_dim=keys.get("head_dim", int, dim // heads if heads > 0 else 0), rope=rope,
        rms_eps=keys.get("rms_norm_eps", float),
        tied_embedding=keys.get("tie_word_embeddings", bool, not has_head),
        rope_interleaved=interleaved, local_rope=local_rope, windowed=windowed,
        window=keys.get("sliding_window", int) if any(windowed) else 0,
        sm_scale=query**-0.5 if query > 0 else query or None,
        score_cap=keys.get("attn_logit_softcapping", float, 0.0),
        logit_cap=keys.get("final_logit_softcapping", float, 0.0), **sizes, **family,
    ).check(keys.where)  # fmt: skip


def _windows(keys: Metadata, layers: int, full_every: int) -> tuple[bool, ...]:
    """Which layers have a sliding window: by `layer_types`, or by the rule of the family."""
    names = {"full_attention": False, "sliding_attention": True}
    if keys.has("layer_types"):
        types = keys.get("layer_types", list)
        if len(types) != layers or not all(isinstance(t, str) and t in names for t in types):
            rule = f"layer_types must name {' or '.join(names)} for each of {layers} layers"
            raise ModelError("M102", rule, where=keys.where)
        return tuple(names[t] for t in types)
    if not keys.has("sliding_window") or full_every == 1 or layers > _LIMITS["layers"]:
        return ()
    every = keys.get("sliding_window_pattern", int, full_every)
    return tuple(every <= 0 or (i + 1) % every != 0 for i in range(layers))


def _ropes(keys: Metadata) -> tuple[Rope, Rope | None]:
    """The rotary embedding of layers without a window and, where it is another, of those with one:
    from today's `rope_parameters`, and from the keys of older files what that leaves out."""
    every = keys.get("rope_parameters", dict, keys.get("rope_scaling", dict, {}))
    kinds = [every.get("full_attention") or every, every.get("sliding_attention")]
    if not all(isinstance(kind, dict | None) for kind in kinds):
        raise ModelError("M101", "rope_parameters has no object for a kind", where=keys.where)
    context = keys.get("max_position_embeddings", int)
    theta = keys.get("rope_theta", float, 10000.0)
    full = _rope(Metadata(kinds[0], keys.where), context, theta)
    if kinds[1] is None and not keys.has("rope_local_base_freq"):
        return full, None
    theta = keys.get("rope_local_base_freq", float, theta)
    return full, _rope(Metadata(kinds[1] or {}, keys.where), context, theta)


def _rope(keys: Metadata, context: int, theta: float) -> Rope:
    kind = keys.get("rope_type", str, keys.get("type", str, "default"))
    if kind not in Rope.KINDS:
        rule = f"rotary scaling {short(kind)} is not supported"
        raise ModelError("M102", rule, where=keys.where, hint=f"supported: {', '.join(Rope.KINDS)}")
    for key, value in (("partial_rotary_factor", 1), ("mscale", 0), ("truncate", True)):
        keys.refuse(key, (value,))
    yarn = kind == "yarn"
    return Rope(
        base=keys.get("rope_theta", float, theta), kind=kind, factor=keys.get("factor", float, 1.0),
        low=keys.get("beta_slow" if yarn else "low_freq_factor", float, 1.0),
        high=keys.get("beta_fast" if yarn else "high_freq_factor", float, 32.0 if yarn else 4.0),
        original=keys.get("original_max_position_embeddings", float, context),
        gain=keys.get("attention_factor", float, 0.0),
    )  # fmt: skip
