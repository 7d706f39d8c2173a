"""Every family of models: logits against transformers, on tiny random weights in float32."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
transformers = pytest.importorskip("transformers", reason="transformers is the reference")
from tests.serve.sequence import Sequence  # noqa: E402

from tilewright.serve.models.config import Metadata, ModelConfig, read_config  # noqa: E402
from tilewright.serve.weights import open_model  # noqa: E402

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 112, "max_position_embeddings": 128, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 7, "rope_parameters": YARN}),
    "qwen2": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 7, "layer_types": KINDS,
    }),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "gemma2": ("Gemma2", {
        "sliding_window": 7, "layer_types": KINDS, "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3": ("Gemma3", {
        "sliding_window": 7, "layer_types": KINDS, "query_pre_attn_scalar": 25,
        "rope_parameters": GEMMA3_ROPE,
    }),
}  # fmt: skip


def made(folder: Path, case: str, dtype: Any = None, **sizes: int) -> Any:
    """The reference model, its files written to `folder`."""
    name, more = CASES[case]
    kind = "Gemma3ForCausalLM" if name == "Gemma3" else f"{name}ForCausalLM"
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        **SIZES | more | sizes
    )
    config._attn_implementation = "eager"
    torch.manual_seed(len(case))
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also biases and norms, which begin as 0 and 1
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(
                torch.randn(parameter.shape) * spread + parameter * (parameter.ndim < 2)
            )
            if dtype is not None:
                parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype or torch.float32).save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str):
    reference = made(tmp_path, case)
    sequence = Sequence(open_model(tmp_path), context=64)
    ids = np.random.default_rng(1).integers(3, 112, 40).tolist()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = reference(torch.tensor([ids])).logits[0].numpy()
    for at in (1, 9, 33):
        sequence.reset()
        np.testing.assert_allclose(sequence.prefill(ids[:at]), wanted[at - 1], rtol=0, atol=2e-4)
    for at in range(33, 40):
        sequence.decode(ids[at])
        np.testing.assert_allclose(sequence.logits(), wanted[at], rtol=0, atol=2e-4)
        assert sequence.greedy() == sequence.logits().argmax()


NEAREST = {"gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig", "mistral": "MistralConfig"}


def both(kind: str, **keys: Any) -> tuple[ModelConfig, Any]:
    """What a config.json with these keys means here, and there."""
    config = SIZES | {"rms_norm_eps": 1e-6, "num_hidden_layers": 12} | keys
    ours = read_config(Metadata({"model_type": kind} | config), has_head=False)
    return ours, getattr(transformers, NEAREST[kind])(**config)


@pytest.mark.parametrize("kind", NEAREST)
def test_keys_that_are_absent_have_the_defaults_of_the_family(kind: str):
    ours, theirs = both(kind)
    caps = (getattr(theirs, f"{x}_logit_softcapping", None) or 0.0 for x in ("attn", "final"))
    assert (ours.score_cap, ours.logit_cap) == tuple(caps)
    assert ours.window == theirs.sliding_window == 4096
    if kind == "mistral":
        assert ours.windowed == (True,) * 12
        return
    assert ours.sm_scale == theirs.query_pre_attn_scalar**-0.5 and ours.tied_embedding
    assert ours.windowed == tuple(t == "sliding_attention" for t in theirs.layer_types)
    ropes = theirs.rope_parameters
    full, local = (ropes.get(x, ropes)["rope_theta"] for x in (KINDS[1], KINDS[0]))
    assert (ours.rope.base, (ours.local_rope or ours.rope).base) == (full, local)


def test_null_is_off_where_absent_is_a_default():
    ours, theirs = both("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert theirs.attn_logit_softcapping is theirs.final_logit_softcapping is None
    assert (ours.score_cap, ours.logit_cap) == (0.0, 0.0)
    ours, theirs = both("mistral", sliding_window=None)
    assert theirs.sliding_window is None and not any(ours.windowed)


def test_the_older_theta_counts_where_rope_parameters_has_none():
    ours, theirs = both("mistral", rope_theta=5e5, rope_parameters={"rope_type": "default"})
    assert ours.rope.base == theirs.rope_parameters["rope_theta"] == 5e5
    linear = {"rope_type": "linear", "factor": 8.0}
    kinds = {"full_attention": linear, "sliding_attention": {"rope_type": "default"}}
    more = {"rope_theta": 7e5, "rope_local_base_freq": 3e4}
    ours, theirs = both("gemma3_text", rope_parameters=copy.deepcopy(kinds), **more)
    assert ours.rope.base == theirs.rope_parameters["full_attention"]["rope_theta"] == 7e5
    assert ours.local_rope and ours.rope.factor == 8.0
    assert ours.local_rope.base == theirs.rope_parameters["sliding_attention"]["rope_theta"] == 3e4
    kinds["full_attention"] = linear | {"rope_theta": 9e5}
    assert both("gemma3_text", rope_parameters=kinds, **more)[0].rope.base == 9e5


def test_nested_nulls_are_absent():
    yarn = YARN | {"attention_factor": None, "beta_fast": None, "truncate": None}
    keys = {"model_type": "mistral"} | SIZES | {"rms_norm_eps": 1e-6}
    with_nulls = read_config(Metadata(keys | {"rope_scaling": yarn}), has_head=True)
    assert with_nulls == read_config(Metadata(keys | {"rope_scaling": YARN}), has_head=True)
