"""FlashInfer's signatures as data: what is used, what is a hint, what is refused."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tilewright.errors import ArgumentError

_INIT = "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False "
_JIT = "backend='auto' !jit_args=None !jit_kwargs=None "
_HEADS = "num_qo_heads num_kv_heads head_dim"
_MASK = "head_dim_vo=None custom_mask=None packed_custom_mask=None causal=False "
_CAP = "window_left=-1 logits_soft_cap=None "
_ROPE = "~rope_scale=None ~rope_theta=None "  # read with ROPE_LLAMA only, which is refused
_MODE = "pos_encoding_mode='NONE' "
_REDUCTION = "~use_fp16_qk_reduction=False "
_DTYPES = "q_data_type='float16' kv_data_type=None o_data_type=None "
_SPLIT = "!fixed_split_size=None !disable_split_kv=False "
_ITEMS = (
    "~non_blocking=True !prefix_len_ptr=None !token_pos_in_items_ptr=None "
    "!token_pos_in_items_len=0 !max_item_len_ptr=None "
)
_OUT = "q_scale=None k_scale=None v_scale=None {}out=None lse=None return_lse=False "
_LSE = "!lse_base='log2' !lse_layout='NH' ~enable_pdl=None "
_LIMITS = "~max_token_per_sequence=None ~max_sequence_kv=None "
_SINGLE = _MODE + "{}sm_scale=None " + _CAP + _ROPE

SIGNATURES = {
    "decode": _INIT + "~use_tensor_cores=False paged_kv_indptr_buffer=None "
    "paged_kv_indices_buffer=None paged_kv_last_page_len_buffer=None " + _JIT,
    "decode.plan": "indptr indices last_page_len " + _HEADS + " page_size " + _MODE + _CAP
    + _DTYPES + "data_type=None sm_scale=None " + _ROPE + "~non_blocking=True "
    "!block_tables=None !seq_lens=None " + _SPLIT + "q_len_per_req=1 !is_causal=None "
    "!use_token_head_sf=False !window_right=0",
    "decode.run": "q paged_kv_cache " + _OUT.format("") + "~enable_pdl=None window_left=None "
    "sinks=None !q_len_per_req=None !skip_softmax_threshold_scale_factor=None !kv_cache_sf=None",
    "decode.forward": "q paged_kv_cache " + _MODE + "q_scale=None k_scale=None v_scale=None "
    + _CAP + "sm_scale=None " + _ROPE + "return_lse=False",
    "prefill": _INIT + "qo_indptr_buf=None paged_kv_indptr_buf=None paged_kv_indices_buf=None "
    "paged_kv_last_page_len_buf=None !custom_mask_buf=None !mask_indptr_buf=None " + _JIT
    + "!variant_owns_mask=False ~max_total_num_rows=None",
    "prefill.plan": "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len " + _HEADS
    + "_qk page_size " + _MASK + _MODE + _REDUCTION + "sm_scale=None " + _CAP + _ROPE + _DTYPES
    + _ITEMS + "!seq_lens=None !seq_lens_q=None !block_tables=None " + _LIMITS + _SPLIT
    + "~uniform_q_len=None !use_token_head_sf=False",
    "prefill.run": "q paged_kv_cache " + _OUT.format("") + _LSE + "window_left=None sinks=None "
    "!kv_cache_sf=None !skip_softmax_threshold_scale_factor=None",
    "prefill.forward": "q paged_kv_cache causal=False " + _MODE + _REDUCTION
    + "k_scale=None v_scale=None " + _CAP + "sm_scale=None " + _ROPE + "return_lse=False",
    "ragged": _INIT + "qo_indptr_buf=None kv_indptr_buf=None !custom_mask_buf=None "
    "!mask_indptr_buf=None " + _JIT + "!variant_owns_mask=False",
    "ragged.plan": "qo_indptr kv_indptr " + _HEADS + "_qk " + _MASK + _MODE + _REDUCTION + _CAP
    + "sm_scale=None " + _ROPE + _DTYPES + _ITEMS + _SPLIT + "!seq_lens=None !seq_lens_q=None "
    + _LIMITS + "!v_indptr=None !o_indptr=None ~qo_indptr_cpu=None ~kv_indptr_cpu=None "
    "~uniform_q_len=None !use_token_head_sf=False",
    "ragged.run": "q k v " + _OUT.format("!o_scale=None ") + _LSE + "!kv_cache_sf=None",
    "ragged.forward": "q k v causal=False " + _MODE + _REDUCTION + _CAP + "sm_scale=None " + _ROPE
    + "return_lse=False",
    "cascade": "num_levels " + _INIT + "qo_indptr_buf_arr=None paged_kv_indptr_buf_arr=None "
    "paged_kv_indices_buf_arr=None paged_kv_last_page_len_buf_arr=None",
    "cascade.plan": "qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr "
    "paged_kv_last_page_len " + _HEADS + " page_size causal=False " + _MODE + _REDUCTION
    + "sm_scale=None " + _CAP + _ROPE + "q_data_type='float16' kv_data_type=None",
    "single_decode": "q k v kv_layout='NHD' " + _MODE + "~use_tensor_cores=False q_scale=None "
    "k_scale=None v_scale=None " + _CAP + "sm_scale=None " + _ROPE + "return_lse=False",
    "single_prefill": "q k v !scale_q=None !scale_k=None !scale_v=None o_dtype=None "
    "custom_mask=None packed_custom_mask=None causal=False kv_layout='NHD' " + _MODE + _REDUCTION
    + "sm_scale=None " + _CAP + _ROPE + "backend='auto' return_lse=False !kv_cache_sf=None "
    "k_scale=None v_scale=None",
    "append": "append_key append_value batch_indices positions paged_kv_cache kv_indices "
    "kv_indptr kv_last_page_len kv_layout='NHD'",
}  # fmt: skip
"""`~name`: a hint how to compute, any value will do; `!name`: it must keep its default."""

_INSTEAD = {
    "jit_args": "write a variant: @tw.variant, tw.Attention(variant=…)",
    "lse_base": "tw.Attention: a state's lse is a natural logarithm",
} | dict.fromkeys(
    ("block_tables", "seq_lens", "seq_lens_q"), "lengths come from indptr and last_page_len"
)


def accepts(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function takes the parameters of a signature, as one namespace.

    Its calls raise ArgumentError[A101] for an unknown or missing name and for a refused value;
    `help()` shows the signature.
    """
    kind, parameters, refused = inspect.Parameter.POSITIONAL_OR_KEYWORD, [], {}
    for word in SIGNATURES[name].split():
        parameter, _, default = word.lstrip("~!").partition("=")
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(parameter, kind, default=value))
        if word.startswith("!"):
            refused[parameter] = value

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first = [p for p in inspect.signature(function).parameters.values() if p.name == "self"]
        signature = inspect.Signature([*first, *parameters])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                hint = f"it takes {signature}"
                raise ArgumentError("A101", f"{function.__name__}: {error}", hint=hint) from None
            bound.apply_defaults()
            values = bound.arguments
            for parameter, default in refused.items():
                _check_default(parameter, values[parameter], default)
            me = [values.pop("self")] if first else []
            return function(*me, SimpleNamespace(**values))

        call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _check_default(name: str, value: Any, default: Any) -> None:
    plain = isinstance(value, (bool, int, float, str))
    if value is default or (plain and value == default):
        return
    text = f"{name}={value if plain else type(value).__name__} is not supported"
    hint = _INSTEAD.get(name, f"leave it at {default!r}")
    raise ArgumentError("A101", text, where=name, hint=hint)
