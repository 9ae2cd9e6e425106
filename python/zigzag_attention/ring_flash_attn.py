"""The drop-in names in one module: `import zigzag_attention.ring_flash_attn as ring_flash_attn`."""

from typing import TYPE_CHECKING

from zigzag_attention._replaced import getattr_of
from zigzag_attention.contiguous import (
    llama3_flash_attn_varlen_func,
    llama3_flash_attn_varlen_kvpacked_func,
    llama3_flash_attn_varlen_qkvpacked_func,
)
from zigzag_attention.drop_in import (
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
)
from zigzag_attention.helpers import (
    compute_kv_slices_for_groups,
    extract_local,
    extract_zigzag_kv_slices_for_group,
    llama3_flash_attn_prepare_cu_seqlens,
    rearrange_grad_from_contiguous_to_zigzag,
    rearrange_kv_from_zigzag_to_contiguous,
    scatter_grad_to_zigzag,
    split_q_by_zigzag_chunk_index,
)

__all__ = [
    "compute_kv_slices_for_groups",
    "extract_local",
    "extract_zigzag_kv_slices_for_group",
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "rearrange_grad_from_contiguous_to_zigzag",
    "rearrange_kv_from_zigzag_to_contiguous",
    "scatter_grad_to_zigzag",
    "split_q_by_zigzag_chunk_index",
    "zigzag_llama3_flash_attn_varlen_func",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func",
]

# Type checkers would take any name for one of a module that has __getattr__.
if not TYPE_CHECKING:
    __getattr__ = getattr_of(__name__, __all__)
