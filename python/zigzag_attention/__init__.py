"""Exact attention over packed documents sharded over ranks.

`Plan` says which rank holds which tokens of a pack, `shard` takes them, `attention` computes over
them: any document lengths, forward and backward, over torch.distributed, MPI or threads. NumPy
arrays and torch tensors go in, and the same kind comes out; importing the package needs no torch.
"""

from zigzag_attention._core import CommunicationError, DeviceError
from zigzag_attention._exit import import_defaults_of_torch
from zigzag_attention.attention import attention, attention_backward
from zigzag_attention.communicator import Communicator
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
from zigzag_attention.kernels import kernels
from zigzag_attention.layout import shard, unshard
from zigzag_attention.packing import (
    Pack,
    collate,
    position_ids,
    shift_labels,
    sum_gradients,
    token_mean,
)
from zigzag_attention.plan import Chunk, Plan
from zigzag_attention.system import components, version

__version__ = version()
import_defaults_of_torch()

__all__ = [
    "Chunk",
    "CommunicationError",
    "Communicator",
    "DeviceError",
    "Pack",
    "Plan",
    "__version__",
    "attention",
    "attention_backward",
    "collate",
    "components",
    "compute_kv_slices_for_groups",
    "extract_local",
    "extract_zigzag_kv_slices_for_group",
    "kernels",
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "position_ids",
    "rearrange_grad_from_contiguous_to_zigzag",
    "rearrange_kv_from_zigzag_to_contiguous",
    "scatter_grad_to_zigzag",
    "shard",
    "shift_labels",
    "split_q_by_zigzag_chunk_index",
    "sum_gradients",
    "token_mean",
    "unshard",
    "version",
    "zigzag_llama3_flash_attn_varlen_func",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func",
]
