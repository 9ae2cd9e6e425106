"""What surrounds attention in a training step: packs, labels, positions and the loss's count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zigzag_attention._arrays import ArrayT, Indices, index_array, is_torch, same_kind
from zigzag_attention.communicator import Group
from zigzag_attention.plan import Plan, check_plan

if TYPE_CHECKING:
    import torch


_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class Pack(NamedTuple):
    """A batch laid end to end, without padding."""

    input_ids: Any
    """`[tokens]`, documents end to end."""
    labels: Any
    """`[tokens]`: the NEXT token of each token, `ignore_index` at the end of each document."""
    cu_seqlens: Any
    """`[documents + 1]` int64, GLOBAL."""


def shift_labels(labels: ArrayT, cu_seqlens: Indices, ignore_index: int = -100) -> ArrayT:
    """Labels for next-token prediction: each token's label is the token after it.

    Shift BEFORE sharding: the neighbour of a local row is not the next token, and a model that
    shifts by itself would compare across chunks. The last token of each document gets
    `ignore_index`, so that no document predicts the next one's start.

    Args:
        labels: `[tokens]` of the whole pack: the tokens themselves, or `ignore_index` where a
            token is not to be predicted.
        cu_seqlens: `[documents + 1]`, GLOBAL.
        ignore_index: the label that the loss leaves out.

    Returns:
        `[tokens]`.

    Raises:
        ValueError: labels of another shape than cu_seqlens says, or of a type that cannot hold
            ignore_index.
    """
    values = index_array(cu_seqlens, "cu_seqlens")
    if labels.ndim != 1 or labels.shape[0] != values[-1]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; cu_seqlens ends at {int(values[-1])}, so it "
            f"must be [{int(values[-1])}]"
        )
    given: Any = labels
    kind = str(given.dtype).removeprefix("torch.")
    if kind in _INTEGERS and not np.iinfo(kind).min <= ignore_index <= np.iinfo(kind).max:
        raise ValueError(
            f"labels have type {kind}, which cannot hold ignore_index {ignore_index}; give int64"
        )
    shifted: Any = given.clone() if is_torch(given) else given.copy()
    shifted[:-1] = labels[1:]
    lengths = np.diff(values)
    for last in values[1:][lengths > 0] - 1:
        shifted[int(last)] = ignore_index
    return shifted  # type: ignore[no-any-return]


def collate(
    documents: Sequence[ArrayT],
    labels: Sequence[ArrayT] | None = None,
    ignore_index: int = -100,
) -> Pack:
    """A batch of documents as one pack, without padding.

    Args:
        documents: token ids `[length]` each; any lengths.
        labels: the tokens to predict, like documents; by default the documents themselves.
        ignore_index: the label that the loss leaves out.

    Returns:
        A `Pack` with shifted labels; shard all of it with one `Plan(pack.cu_seqlens, world_size)`.

    Raises:
        ValueError: no documents, labels of other lengths, or tokens that are not `[length]`
            integers.
        TypeError: documents that are neither NumPy arrays nor torch tensors, or both mixed.
    """
    if len(documents) == 0:
        raise ValueError("collate was given no documents; it needs at least one")
    kind = same_kind(" ".join(f"documents[{i}]" for i in range(len(documents))), *documents)
    inputs: Any = documents
    _check_tokens("documents", inputs)
    lengths = np.array([len(document) for document in inputs], dtype=np.int64)
    targets: Any = documents if labels is None else labels
    if [len(target) for target in targets] != lengths.tolist():
        raise ValueError("labels have other lengths than the documents; they must be equal")
    if labels is not None:
        names = " ".join(f"labels[{i}]" for i in range(len(targets)))
        if same_kind(names, *targets) != kind:
            raise TypeError("documents and labels mix NumPy arrays and torch tensors")
        _check_tokens("labels", targets)
    ends: Any = np.concatenate(([0], np.cumsum(lengths)))
    if kind == "torch":
        import torch

        ends = torch.from_numpy(ends)
        ids: Any = torch.cat(list(inputs))
        wanted: Any = torch.cat(list(targets))
    else:
        ids = np.concatenate(inputs)
        wanted = np.concatenate(targets)
    return Pack(ids, shift_labels(wanted, ends, ignore_index), ends)


def _check_tokens(name: str, arrays: Sequence[Any]) -> None:
    """Token ids are integers; of floats a model would look up something or nothing."""
    for i, array in enumerate(arrays):
        kind = str(array.dtype).removeprefix("torch.")
        if array.ndim != 1 or kind not in _INTEGERS:
            raise ValueError(
                f"{name}[{i}] has shape {list(array.shape)} and type {kind}; tokens must be "
                "one-dimensional, of integers"
            )


def position_ids(plan: Plan, rank: int, device: Any = None) -> torch.Tensor:
    """`plan.position_ids(rank)` as a torch tensor `[1, local_tokens]`, as models take it.

    Positions restart at each document and jump where a rank's late chunk begins.
    """
    import torch

    return torch.from_numpy(plan.position_ids(rank)).to(device)[None]


def token_mean(
    loss_sum: torch.Tensor, tokens: torch.Tensor | int, group: Group = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss's mean over the tokens of all ranks.

    A mean of the ranks' means would weight tokens by how many labels their rank happens to hold.

    Args:
        loss_sum: this rank's SUM of token losses, a scalar with a graph.
        tokens: how many labels this rank counted (those that are not `ignore_index`).
        group: a torch.distributed group, a `Communicator`, or None for the world.

    Returns:
        `(share, mean)`. Call `share.backward()`: loss_sum divided by the tokens of ALL ranks, so
        that gradients SUMMED over the ranks are those of one rank with the whole pack. `mean` is
        the loss to print, without a graph, the same on all ranks. With no token at all both are 0.
    """
    import torch

    from zigzag_attention.communicator import communicator_of

    mine = np.array([float(loss_sum.detach()), float(tokens)], dtype=np.float64)
    everyone = communicator_of(group).all_gather(mine.tobytes())
    sums = np.frombuffer(everyone, dtype=np.float64).reshape(-1, 2).sum(axis=0)
    count = max(float(sums[1]), 1.0)
    mean = torch.tensor(sums[0] / count, dtype=loss_sum.dtype, device=loss_sum.device)
    return loss_sum / count, mean


def sum_gradients(model: torch.nn.Module, group: Group = None, *, plan: Plan | None = None) -> None:
    """Adds the parameters' gradients of all ranks, in place, in float32 and in rank order: every
    rank then holds the gradients of the whole pack, bit for bit the same.

    One exchange of world_size x the model's size, for models that fit; DistributedDataParallel
    takes the ranks' MEAN instead, so multiply the loss by the number of ranks there.

    Args:
        model: its parameters with requires_grad take part, the same on all ranks.
        group: a torch.distributed group, a `Communicator`, or None for the world.
        plan: the step's plan, to be told when it is not for the ranks that are summed over.

    Raises:
        ValueError: the plan is for another number of ranks than the group has.
    """
    import torch

    from zigzag_attention.attention import check_group
    from zigzag_attention.communicator import communicator_of

    communicator = communicator_of(group)
    if plan is not None:
        check_plan(plan)
        check_group(communicator, plan.world_size)
    parameters = [x for x in model.parameters() if x.requires_grad]
    if communicator.size == 1 or not parameters:
        return
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:  # a rank without tokens of its own still takes part
                parameter.grad = torch.zeros_like(parameter)
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        mine = torch.cat([gradient.float().flatten().cpu() for gradient in gradients])
        everyone = communicator.all_gather(mine.numpy().tobytes())
        parts = np.frombuffer(everyone, dtype=np.float32).reshape(communicator.size, -1)
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        sizes = [gradient.numel() for gradient in gradients]
        summed = torch.split(torch.from_numpy(total), sizes)
        for gradient, whole in zip(gradients, summed, strict=True):
            gradient.copy_(whole.view_as(gradient))
