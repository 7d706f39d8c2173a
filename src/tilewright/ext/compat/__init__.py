"""FlashInfer's calls over Tilewright's tables, pools and plans: same names, arguments, meanings.

    from tilewright.ext import compat as flashinfer

An option that is not supported is refused, never ignored; `signatures.py` says which are hints.
"""

from __future__ import annotations

from tilewright.ext import needed

needed("torch", __name__)

from tilewright.ext.compat.pages import (  # noqa: E402 - torch is there now
    append_paged_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from tilewright.ext.compat.single import (  # noqa: E402
    MultiLevelCascadeAttentionWrapper,
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from tilewright.ext.compat.wrappers import (  # noqa: E402
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper", "MultiLevelCascadeAttentionWrapper",
    "append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens", "merge_state",
    "merge_state_in_place", "merge_states", "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache", "single_prefill_with_kv_cache_return_lse",
]  # fmt: skip
