"""Sizes and constants of the models, and what each `model_type` of a config.json means.

A model is a Llama with differences, which are data: `FAMILIES`. Sources: the models of
`transformers` of the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tilewright.errors import ModelError
from tilewright.ops.rope import Rope
from tilewright.serve.metadata import Metadata, short

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
_GEMMA = {"post_norms": True, "norm_offset": 1.0, "gelu": True, "scaled_embedding": True}
# By model_type: fields of `ModelConfig`, and `full_every`: each how many-th layer has no window
# where the file does not say it (0: none).
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"full_every": 0},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": _GEMMA | {"full_every": 2},
    "gemma3_text": _GEMMA | {"qk_norm": True, "full_every": 6},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a model.

    `rope_interleaved`: the rotated pairs of a head are elements (2i, 2i + 1), otherwise (i, i +
    head_dim / 2). `context` is the longest sequence in tokens. Layers of `windowed` see the last
    `window` keys, and rotate by `local_rope` if there is one. `norm_offset` is added to the scales
    of normalisations; `post_norms`: also the results of attention and FFN are normalised;
    `scaled_embedding`: by the root of `dim`. Scores and logits are bent into (-cap, cap), 0: not.
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

    def check(self, where: str) -> ModelConfig:
        """The configuration, if it is one. Raises ModelError[M101]."""
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ModelError("M101", f"{name} is {value}, outside 1..{most}", where=where)
        if self.qo_heads % self.kv_heads or self.head_dim % 2:
            heads = f"{self.qo_heads} query heads, {self.kv_heads} KV heads of {self.head_dim}"
            raise ModelError("M101", f"{heads}: groups must be whole, heads even", where=where)
        rules = {
            "the rotary embedding": self.rope.is_usable
            and (self.local_rope or self.rope).is_usable,
            "rms_eps": 0 < self.rms_eps < 1,
            "sm_scale": self.sm_scale is None or 0 < self.sm_scale < math.inf,
            "a cap": all(0 <= cap < 1e30 for cap in (self.score_cap, self.logit_cap)),
            "window": not any(self.windowed) or 1 <= self.window < 1 << 31,
        }
        for name, holds in rules.items():
            if not holds:
                rule = f"{name} must be positive and finite: {self}"
                raise ModelError("M101", rule[:400], where=where)
        return self


def read_config(values: dict[str, Any], where: str, has_head: bool) -> ModelConfig:
    """From a config.json without the keys that are null. `has_head`: the file has an output matrix.

    Raises ModelError: M101 for a value that is missing or of a wrong type, M102 for a model that is
    not supported.
    """
    keys = Metadata(values, where)
    architecture = keys.text("model_type")
    if architecture not in FAMILIES:
        rule, hint = f"model_type {short(architecture)}", f"supported: {', '.join(FAMILIES)}"
        raise ModelError("M102", rule, where=where, hint=hint)
    family = dict(FAMILIES[architecture])
    full_every = family.pop("full_every", 1)
    act = "gelu_pytorch_tanh" if family.get("gelu") else "silu"
    refused = ("attention_bias", "mlp_bias", "use_bidirectional_attention", "use_sliding_window")
    for key in refused[: 3 if "layer_types" in values else 4]:
        keys.refuse(key, (False,))
    keys.refuse("hidden_activation" if "hidden_activation" in values else "hidden_act", (act,))
    keys.refuse("quantization_config", ("",))
    layers, dim = keys.integer("num_hidden_layers"), keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    windowed, window = _windows(keys, layers, full_every), 0
    if any(windowed):
        window = keys.integer("sliding_window")
    query = keys.number("query_pre_attn_scalar", 0.0)
    has_local = "rope_local_base_freq" in values or "sliding_attention" in _rope_values(values)
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        dim=dim,
        ffn_dim=keys.integer("intermediate_size"),
        qo_heads=heads,
        kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", dim // heads if heads > 0 else 0),
        vocab=keys.integer("vocab_size"),
        context=keys.integer("max_position_embeddings"),
        rope=_rope(values, where, local=False),
        rms_eps=keys.number("rms_norm_eps"),
        tied_embedding=keys.flag("tie_word_embeddings", not has_head),
        rope_interleaved=False,
        local_rope=_rope(values, where, local=True) if has_local else None,
        windowed=windowed,
        window=window,
        sm_scale=query**-0.5 if query > 0 else None,
        score_cap=keys.number("attn_logit_softcapping", 0.0),
        logit_cap=keys.number("final_logit_softcapping", 0.0),
        **family,
    ).check(where)


def _windows(keys: Metadata, layers: int, full_every: int) -> tuple[bool, ...]:
    """Which layers have a sliding window: by `layer_types`, or by the rule of the family."""
    names = {"full_attention": False, "sliding_attention": True}
    if "layer_types" in keys.values:
        types = keys.strings("layer_types")
        if len(types) != layers or not all(isinstance(t, str) and t in names for t in types):
            rule = f"layer_types must name {' or '.join(names)} for each of {layers} layers"
            raise ModelError("M102", rule, where=keys.where)
        return tuple(names[t] for t in types)
    if "sliding_window" not in keys.values or full_every == 1 or layers > _LIMITS["layers"]:
        return ()
    every = keys.integer("sliding_window_pattern", full_every)
    return tuple(every <= 0 or (i + 1) % every != 0 for i in range(layers))


def _rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of the rotary embedding: of today's `rope_parameters`, or of older files."""
    found = values.get("rope_parameters")
    if found is None:
        scaling = values.get("rope_scaling", {})
        older = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
        found = older | scaling if isinstance(scaling, dict) else None
    if not isinstance(found, dict):
        raise ModelError("M101", "rope_parameters or rope_scaling is no object")
    return {key: value for key, value in found.items() if value is not None}


def _rope(values: dict[str, Any], where: str, local: bool) -> Rope:
    found = _rope_values(values)
    if "sliding_attention" in found or "full_attention" in found:
        found = found.get("sliding_attention" if local else "full_attention")
        if not isinstance(found, dict):
            raise ModelError("M101", "rope_parameters lacks a kind of layer", where=where)
    elif local:
        found = {"rope_theta": values["rope_local_base_freq"]}
    keys = Metadata(found, where)
    kind = keys.text("rope_type", keys.text("type", "default"))
    if kind not in Rope.KINDS:
        rule = f"rotary scaling {short(kind)} is not supported"
        raise ModelError("M102", rule, where=where, hint=f"supported: {', '.join(Rope.KINDS)}")
    keys.refuse("partial_rotary_factor", (1,))
    keys.refuse("mscale", (0,))
    keys.refuse("truncate", (True,))
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else (
        "beta_slow", "beta_fast",
    )  # fmt: skip
    context = Metadata(values, where).integer("max_position_embeddings")
    return Rope(
        base=keys.number("rope_theta", 10000.0),
        kind=kind,
        factor=keys.number("factor", 1.0),
        low=keys.number(low, 1.0),
        high=keys.number(high, 32.0 if kind == "yarn" else 4.0),
        original=keys.number("original_max_position_embeddings", context),
        gain=keys.number("attention_factor", 0.0),
    )
