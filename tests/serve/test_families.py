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
