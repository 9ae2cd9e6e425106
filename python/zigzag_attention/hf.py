"""Hugging Face models: `attn_implementation="zigzag"` through transformers' public interface.

zigzag = zigzag_attention.hf.register(group)
model = AutoModelForCausalLM.from_config(config, attn_implementation="zigzag")
plan = Plan(pack.cu_seqlens, world_size)
loss = model(**zigzag.inputs(pack, plan)).loss
loss.backward()        # then SUM the gradients over the ranks
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zigzag_attention import _torch
from zigzag_attention._arrays import is_torch
from zigzag_attention._checks import tell_group
from zigzag_attention.communicator import Group, communicator_of
from zigzag_attention.layout import shard
from zigzag_attention.packing import Pack, position_ids, sum_gradients
from zigzag_attention.plan import Plan, check_plan

if TYPE_CHECKING:
    import torch

__all__ = ["Registration", "register", "sum_gradients"]

# What models pass along and what changes nothing here.
_IGNORED = {
    "position_ids",
    "use_cache",
    "cache_position",
    "past_key_values",
    "position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
    "shift_labels",
}


class Registration:
    """What `register` returns: the place where each step's pack is set."""

    def __init__(
        self, group: Group, name: str, kv_heads_per_stage: int | None, deterministic: bool
    ) -> None:
        self.name = name
        """The `attn_implementation` that models name."""
        self.group = group
        """The group that the ranks exchange in."""
        self.plan: Plan | None = None
        """The pack of the steps that do not pass `zigzag_plan` themselves."""
        self._kv_heads_per_stage = kv_heads_per_stage
        self._deterministic = deterministic

    @contextmanager
    def pack(self, plan: Plan) -> Generator[None]:
        """Sets the plan for a block; forward AND backward belong inside it when gradients are
        checkpointed."""
        previous, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = previous

    def inputs(self, pack: Pack, plan: Plan, device: Any = None) -> dict[str, Any]:
        """This rank's keyword arguments for a causal language model.

        Args:
            pack: the whole pack, the same on all ranks (`collate` makes it).
            plan: `Plan(pack.cu_seqlens, world_size)`.
            device: where the model is.

        Returns:
            input_ids, position_ids, labels and shift_labels `[1, local_tokens]`, the label count of
            the WHOLE pack, and the plan. The model's loss is then this rank's share of the mean
            over all tokens: sum it, and the gradients, over the ranks.
        """
        import torch

        size = self._check_size(plan)
        if plan.world_size < size:
            warnings.warn(
                f"the plan is for 1 rank and torch.distributed has {size}: each of them computes "
                f"the whole pack, and sum_gradients adds its gradient {size} times; make it "
                f"Plan(cu_seqlens, {size}), or register(Communicator.self()) when that is meant",
                stacklevel=2,
            )
        rank = communicator_of(self.group).rank if plan.world_size > 1 else 0
        ids, labels = (
            x if is_torch(x) else torch.from_numpy(x) for x in (pack.input_ids, pack.labels)
        )
        shifted = shard(labels, plan, rank).to(device)[None]
        return {
            "input_ids": shard(ids, plan, rank).to(device)[None],
            "position_ids": position_ids(plan, rank, device),
            # A model shifts labels itself unless it is told that they are shifted.
            "labels": shifted,
            "shift_labels": shifted,
            "num_items_in_batch": max(int((labels != -100).sum()), 1),
            "use_cache": False,
            "zigzag_plan": plan,
        }

    def _check_size(self, plan: Plan) -> int:
        """The number of ranks that the group has and the plan is for; without a group a plan for
        one rank is for this process alone."""
        check_plan(plan)
        size = _torch.world_size_of(self.group)
        if plan.world_size != size and (self.group is not None or plan.world_size > 1):
            error = ValueError(
                f"the plan is for {plan.world_size} ranks and the group of "
                f"attn_implementation={self.name!r} has {size}; make it Plan(cu_seqlens, {size}), "
                "or register() the group that the plan is for (Communicator.self() for one rank)"
            )
            tell_group(error, self.group)
            raise error
        return size

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        zigzag_plan: Plan | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function of the interface: query `[1, heads, tokens, head_dim]`, key and
        value `[1, kv_heads, tokens, head_dim]`; out `[1, tokens, heads, head_dim]`."""
        plan = zigzag_plan or self.plan
        if plan is None:
            raise ValueError(
                f"attn_implementation={self.name!r} needs the step's pack: pass zigzag_plan=plan "
                "to the model, or set it with registration.pack(plan)"
            )
        self._check_size(plan)
        if attention_mask is not None:
            raise ValueError(
                f"attn_implementation={self.name!r} takes no attention_mask: packs have no padding "
                "(zigzag_attention.collate lays a batch end to end)"
            )
        if query.shape[0] != 1:
            raise ValueError(
                f"the batch has {query.shape[0]} rows; a pack is one row of documents end to end "
                "(zigzag_attention.collate)"
            )
        if dropout:
            raise ValueError(
                f"attention_dropout is {dropout}; attention dropout is not supported, only 0"
            )
        unknown = sorted(
            key for key, given in others.items() if given is not None and key not in _IGNORED
        )
        if unknown:
            raise ValueError(
                f"the model passes {', '.join(unknown)} to attention, which "
                f"attn_implementation={self.name!r} does not support"
            )
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        # A window of n tokens is the query's own and the n - 1 before it.
        left = -1 if sliding_window is None else sliding_window - 1
        right = -1 if causal or sliding_window is None else sliding_window - 1
        options = (
            causal,
            scaling,
            (left, right),
            softcap or 0.0,
            self._kv_heads_per_stage,
            self._deterministic,
        )
        packed = tuple(x[0].transpose(0, 1) for x in (query, key, value))
        out, _ = _torch.attention(
            packed, plan.as_tensor(), None, plan.world_size, self.group, options, ""
        )
        return out[None], None


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **others: Any) -> None:
    """Masks come from the pack; padding has no place in one."""
    del args, others
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "the attention_mask has padding; lay the batch end to end without it "
            "(zigzag_attention.collate)"
        )


def register(
    group: Group = None,
    *,
    name: str = "zigzag",
    kv_heads_per_stage: int | None = None,
    deterministic: bool = False,
) -> Registration:
    """Makes `attn_implementation="zigzag"` available to Hugging Face models.

    Args:
        group: a torch.distributed group, a `Communicator`, or None for the world.
        name: another name, when two groups are wanted in one process.
        kv_heads_per_stage: see `attention`.
        deterministic: see `attention`.

    Returns:
        A `Registration`: pass each step's plan to the model as `zigzag_plan=plan` (its `inputs`
        does), or set it with `registration.pack(plan)`.

    Raises:
        RuntimeError: transformers is not installed, or older than 4.53.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise RuntimeError(
            "zigzag_attention.hf needs transformers 4.53 or newer (pip install transformers)"
        ) from error
    registration = Registration(group, name, kv_heads_per_stage, deterministic)
    AttentionInterface.register(name, registration.attend)
    AttentionMaskInterface.register(name, _no_mask)
    return registration
