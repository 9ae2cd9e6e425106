"""Names of ring-flash-attention that have no function here: a sentence that says what to call."""

from __future__ import annotations

import difflib
import dis
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

_IMPORT_FROM = dis.opmap["IMPORT_FROM"]

# What a name begins with, and what does its job.
_INSTEAD = (
    (
        r"zigzag_ring_flash_attn_varlen_",
        "its rows are those of zigzag_llama3_flash_attn_varlen_{kind}func, which takes its LOCAL "
        "cu_seqlens as cu_seqlens_q and the whole pack's as cu_seqlens_k",
    ),
    (
        r"zigzag_ring_flash_attn_",
        "flatten the batch: zigzag_attention.attention(q.flatten(0, 1), k.flatten(0, 1), "
        "v.flatten(0, 1), Plan.from_lengths([seqlen] * batch, world_size), group, causal=causal) "
        "takes the same rows, seqlen being that of all ranks together",
    ),
    (
        r"(ring|stripe)_flash_attn_",
        "its layout is not supported; shard by zigzag_attention.shard(x, plan, rank) and call "
        "zigzag_attention.attention(q, k, v, plan, group), or keep equal runs of the pack with "
        "llama3_flash_attn_varlen_{kind}func",
    ),
    (
        r"substitute_hf_flash_attn$",
        "zigzag_attention.hf.register(group) makes attn_implementation='zigzag' for Hugging Face "
        "models",
    ),
    (
        r"update_ring_flash_attn_params$",
        "zigzag_attention.hf.register(group) returns what sets each step's pack: inputs(pack, "
        "plan), or pack(plan) as a context",
    ),
)


def getattr_of(module: str, names: Sequence[str]) -> Callable[[str], NoReturn]:
    """A module's `__getattr__`. `from module import name` says only what an ImportError says, and
    hasattr takes nothing but an AttributeError, so the one or the other is raised."""

    def missing(name: str) -> NoReturn:
        sentence = _sentence(module, name)
        caller = sys._getframe(1)
        if caller.f_lasti >= 0 and caller.f_code.co_code[caller.f_lasti] == _IMPORT_FROM:
            close = difflib.get_close_matches(name, names, 1) if ";" not in sentence else []
            raise ImportError(sentence + "".join(f"; did you mean {x}?" for x in close))
        # Python itself adds the name that is close.
        raise AttributeError(sentence, name=name, obj=sys.modules.get(module))

    return missing


def _sentence(module: str, name: str) -> str:
    for pattern, instead in _INSTEAD:
        if re.match(pattern, name):
            kind = re.search(r"(qkv|kv)packed_", name)
            return f"{module} has no {name}; {instead.format(kind=kind[0] if kind else '')}"
    return f"{module} has no {name}"
