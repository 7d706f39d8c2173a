"""Attention of Hugging Face transformers: `hf.register()`, then attn_implementation="tilewright".

For inference. Masks are those of transformers' SDPA: none for what is plainly causal, else read as
bits. Continuous batching of transformers 5 (`generate_batch`) admits no names of others:
`hf.register("paged|eager")` puts this attention in the place of its eager one.
"""

from typing import Any

from tilewright.attention.batch import Attention
from tilewright.errors import ArgumentError, needed_for
from tilewright.ext.torch_ops import Tensor, operator, torch
from tilewright.ext.variants import composed, words

_REFUSED = ("position_bias", "output_attentions", "cache", "block_table")


def register(name: str = "tilewright") -> None:
    """Make `name` an attn_implementation of transformers; "paged|eager" is that of continuous
    batching. Raises MissingExtra[E101]."""
    with needed_for("attention of transformers", "hf"):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    # Not compiled: a graph would hold an operator that its trace made, and not keep it.
    AttentionInterface.register(name, torch.compiler.disable(attend))
    if name != "paged|eager":  # which has masks of its own
        AttentionMaskInterface.register(name, sdpa_mask)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """o (batch, q, heads, head_dim) of `query` (batch, heads, q, head_dim), `key` and `value`
    (batch, kv_heads, kv, …), which are read where they are. `options`: scaling, softcap, s_aux
    (sinks), is_causal; of continuous batching cu_seq_lens_q, cu_seq_lens_k, sliding_window, where a
    batch of 1 has the rows and the keys of all requests, one behind the other. Raises
    ArgumentError: A111 where gradients are recorded, A101 for what else is not supported."""
    if options.get("dropout"):
        hint = "train with another attn_implementation"
        raise ArgumentError("A101", "dropout is not supported", where="dropout", hint=hint)
    for name in _REFUSED:
        if options.get(name) is not None and options[name] is not False:
            raise ArgumentError("A101", f"{name} is not supported", where=name, hint="eager")
    if options.get("cu_seq_lens_q") is not None:
        return _attend_packed(query, key, value, options)
    batch, heads, rows, dim = query.shape
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    causal = causal and attention_mask is None and rows > 1
    if causal:  # the first rows of a cache with room behind them
        key, value = key[:, :, :rows], value[:, :, :rows]
    tensors = {} if attention_mask is None else {"bits": _bits(attention_mask, key.shape[2])}
    if options.get("s_aux") is not None:
        tensors["sinks"] = options["s_aux"].float()
    variant = composed(causal, -1, options.get("softcap") or 0.0, frozenset(tensors))
    attn = Attention(heads, key.shape[1], dim, variant, options.get("scaling"), value.shape[3])
    lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=query.device)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * rows
    q = query.transpose(1, 2).reshape(batch * rows, heads, dim)
    pages = key.transpose(1, 2), value.transpose(1, 2)  # a page for each sequence
    o, _ = operator(attn)(q, *pages, (lengths,), indptr, **tensors)
    return o.reshape(batch, rows, heads, value.shape[3]), None


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, None]:
    """`attend` for continuous batching. Each request is causal, and its last query has the position
    of its last key; rows behind the last request fill a batch up and are 0."""
    _, heads, rows, dim = query.shape
    indptr, starts = (options[f"cu_seq_lens_{n}"].int() for n in "qk")
    used = int(indptr[-1])
    tensors = {} if options.get("s_aux") is None else {"sinks": options["s_aux"].float()}
    window = (options.get("sliding_window") or 0) - 1
    variant = composed(True, window, options.get("softcap") or 0.0, frozenset(tensors))
    attn = Attention(heads, key.shape[1], dim, variant, options.get("scaling"), value.shape[3])
    pages = key[0].transpose(0, 1)[:, None], value[0].transpose(0, 1)[:, None]  # one key each
    table = starts.diff(), starts, torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
    q = query[0].transpose(0, 1)[:used].contiguous()
    o = q.new_zeros(1, rows, heads, value.shape[3])
    o[0, :used] = operator(attn)(q, *pages, table, indptr.cpu(), **tensors)[0]
    return o, None


def _bits(mask: Tensor, kv: int) -> Tensor:
    """The words of a mask (batch, 1, q, kv), bool, or 0 and the lowest number. Kept with the mask:
    every layer has the same."""
    state = kv, -1 if mask.is_inference() else mask._version  # inference tensors count no writes
    if getattr(mask, "_tilewright_words", (None,))[0] == state:
        return mask._tilewright_words[1]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < kv:
        text, where = f"attention_mask has shape {tuple(mask.shape)}", "attention_mask"
        raise ArgumentError("A103", text, where=where, hint=f"(batch, 1, q, {kv})")
    seen = mask if mask.dtype == torch.bool else mask == 0
    lowest = torch.finfo(torch.promote_types(mask.dtype, torch.float16)).min  # also for integers
    if mask.dtype != torch.bool and bool((~seen & (mask > lowest / 2)).any()):
        raise ArgumentError("A102", "attention_mask adds biases", where="attention_mask")
    mask._tilewright_words = state, words(seen[:, 0, :, :kv].reshape(-1, kv))
    return mask._tilewright_words[1]
