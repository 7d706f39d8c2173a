"""Tiny random models of transformers: attention of Tilewright against its eager attention."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.ext.oracle import as64, attend

from tilewright.errors import ArgumentError
from tilewright.ext import hf
from tilewright.toolchain import compilers

pytestmark = [
    pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed"),
    pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler"),
    pytest.mark.usefixtures("registered"),
]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 61, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 60, "bos_token_id": 1,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "GptOss": WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(scope="module")
def registered():
    """Importing transformers takes 3 s, which processes that run none of these tests save."""
    hf.register()


@pytest.fixture(params=MODELS)
def model(request, registered):
    import transformers

    config = getattr(transformers, f"{request.param}Config")(**SIZES | MODELS[request.param])
    torch.manual_seed(7)
    made = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    if request.param in ("Gemma2", "GptOss"):
        request.getfixturevalue("interpreted")
    for name, weights in made.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weights)
        elif weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.3)
    return made


def by_both(model, **inputs):
    """Logits of eager attention and of ours."""
    found = []
    for name in ("eager", "tilewright"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(**inputs))
    return found


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_continuous_batching(model, monkeypatch):
    """Tokens of requests that come and go in one packed batch, by transformers' own attention and
    by ours in its place."""
    from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig

    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    how = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=60, pad_token_id=0)
    prompts, calls = [[3, 4, 5, 6, 7, 8, 9], list(range(2, 42)), [11]], []
    eager = AttentionInterface._global_mapping["paged|eager"]

    def tokens() -> list[list[int]]:
        model.set_attn_implementation("paged|eager")
        with torch.no_grad():
            found = model.generate_batch(
                prompts, how, continuous_batching_config=sizes, progress_bar=False
            )
        return sorted(out.generated_tokens for out in found.values())

    wanted = tokens()
    packed = hf._attend_packed
    monkeypatch.setattr(hf, "_attend_packed", lambda *a: calls.append(a) or packed(*a))
    try:
        hf.register("paged|eager")
        assert tokens() == wanted and calls
    finally:
        AttentionInterface.register("paged|eager", eager)


def test_prompts_and_steps_with_a_cache(model, device="cpu"):
    ids = torch.randint(2, 60, (2, 11), device=device)
    eager, ours = by_both(model, input_ids=ids, use_cache=True)
    close(ours.logits, eager.logits)
    name_of = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    assert not torch.allclose(eager.logits[0], eager.logits[1], atol=1e-2)
    # One token, then two at once, each over a cache of its own.
    for token in (ids[:, :1], ids[:, 3:5]):
        step = {}
        for name, cache in (("eager", eager), ("tilewright", ours)):
            model.set_attn_implementation(name)
            with torch.no_grad():
                step[name] = model(token, **{name_of: cache[name_of]}).logits
        close(step["tilewright"], step["eager"])


def test_padding_on_both_sides(model):
    ids = torch.randint(2, 60, (3, 9))
    kept = torch.ones(3, 9, dtype=torch.long)
    kept[0, :4], kept[2, 7:] = 0, 0
    eager, ours = by_both(model, input_ids=ids, attention_mask=kept)
    close(ours.logits[kept.bool()], eager.logits[kept.bool()])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens(model, cache):
    ids = torch.randint(2, 60, (2, 6))
    kept = torch.ones_like(ids)
    kept[0, :2] = 0
    tokens = []
    for name in ("eager", "tilewright"):
        model.set_attn_implementation(name)
        tokens.append(
            model.generate(
                ids, attention_mask=kept, max_new_tokens=5, do_sample=False,
                cache_implementation=cache, disable_compile=True,
            )
        )  # fmt: skip
    assert torch.equal(*tokens)


def test_packed_sequences_do_not_see_each_other(model):
    ids = torch.randint(2, 60, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    eager, ours = by_both(model, input_ids=ids, position_ids=places, use_cache=False)
    close(ours.logits, eager.logits)
    if (
        model.config.model_type == "gpt_oss"
    ):  # transformers lets its packed sequences see each other
        return
    other = torch.cat((torch.randint(2, 60, (1, 4)), ids[:, 4:]), 1)
    ours = by_both(model, input_ids=other, position_ids=places, use_cache=False)[1]
    close(ours.logits[:, 4:], eager.logits[:, 4:])


def test_what_is_not_supported_is_refused():
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    module = SimpleNamespace(is_causal=True)

    def raises(code, mask=None, q=q, **options):
        with pytest.raises(ArgumentError) as caught:
            hf.attend(module, q, k, k, mask, **options)
        assert caught.value.code == code

    raises("A101", dropout=0.1)
    raises("A111", q=q.clone().requires_grad_())
    raises("A111", s_aux=torch.zeros(4, requires_grad=True))
    raises("A101", position_bias=torch.zeros(1))
    raises("A102", torch.full((1, 1, 3, 3), 0.5))
    raises("A103", torch.zeros(1, 4, 3, 3, dtype=torch.bool))
    raises("A102", torch.ones(1, 1, 3, 3, dtype=torch.long))
    additive = torch.zeros(1, 1, 3, 3)
    additive[..., 1] = torch.finfo(torch.float32).min
    o, _ = hf.attend(module, q, k, torch.arange(96.0).reshape(1, 2, 3, 16), additive)
    assert o.shape == (1, 3, 4, 16) and o[0, 0, 0, 0] == 16


def test_a_forward_that_records_gradients_is_refused(model):
    """Inference mode, and weights that are frozen, need no words of the caller's."""
    model.set_attn_implementation("tilewright")
    ids = torch.randint(2, 60, (1, 5))
    with pytest.raises(ArgumentError, match="A111"):
        model(ids)
    with torch.inference_mode():
        wanted = model(ids).logits
    close(model.requires_grad_(False)(ids).logits, wanted)


@pytest.mark.usefixtures("interpreted")
def test_a_mask_is_read_anew_for_other_keys_and_when_it_changes():
    """Its bits are kept with it; a layer with a longer cache must not get those of a shorter."""
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 4, 70, 16)
    mask, module = torch.rand(1, 1, 2, 70) < 0.7, SimpleNamespace(is_causal=True)

    def check(keys):
        x, seen = k[:, :, :keys], mask[..., :keys]
        wanted = torch.nn.functional.scaled_dot_product_attention(q, x, x, seen)
        close(hf.attend(module, q, x, x, mask)[0], wanted.transpose(1, 2))

    mask[..., 0] = True
    for keys in (9, 70, 40):
        check(keys)
    mask[..., 3:] ^= True
    check(40)


@pytest.mark.usefixtures("interpreted", "registered")
def test_a_model_that_torch_compiles_calls_it_between_graphs():
    q, k, mask = torch.randn(1, 4, 2, 16), torch.randn(1, 4, 9, 16), torch.ones(1, 1, 2, 9) < 2
    from transformers import AttentionInterface

    module, ours = SimpleNamespace(is_causal=True), AttentionInterface._global_mapping["tilewright"]
    layer = torch.compile(lambda q: ours(module, q * 2, k, k, mask)[0] + 1, backend="eager")
    close(layer(q), hf.attend(module, q * 2, k, k, mask)[0] + 1)


@pytest.mark.gpu
def test_models_on_a_gpu(model):
    test_prompts_and_steps_with_a_cache(model.cuda(), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6])
def test_half_precision_on_a_gpu(rows):
    """bfloat16 with sinks: causal, and with padding on the left."""
    torch.manual_seed(3)
    q = torch.randn(2, 8, rows, 64, device="cuda").bfloat16()
    k, v = torch.randn(2, 2, 2, 40, 64, device="cuda").bfloat16()
    k, v = k[:, :, : 34 + rows], v[:, :, : 34 + rows]
    sinks = torch.randn(8, device="cuda")
    place = torch.arange(34 + rows, device="cuda")
    seen = place <= torch.arange(34, 34 + rows, device="cuda")[:, None]
    mask = (seen & (place >= torch.tensor([5, 0], device="cuda")[:, None, None]))[:, None]
    module = SimpleNamespace(is_causal=True)
    o, _ = hf.attend(module, q, k, v, mask, s_aux=sinks)
    for b in range(2):
        parts = (as64(x[b].transpose(0, 1)) for x in (q, k, v))
        expected, _ = attend(*parts, mask=mask[b, 0].cpu().numpy(), sinks=as64(sinks))
        np.testing.assert_allclose(as64(o[b]), expected, rtol=2e-2, atol=2e-2)
