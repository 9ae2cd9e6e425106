import numpy as np
import pytest
import torch
from ranks import run_threads

from zigzag_attention import (
    Plan,
    collate,
    position_ids,
    shard,
    shift_labels,
    sum_gradients,
    token_mean,
)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_labels_are_shifted_inside_documents(kind):
    labels = kind([1, 2, 3, 4, 5, 6])
    shifted = shift_labels(labels, [0, 3, 3, 4, 6])
    assert shifted.tolist() == [2, 3, -100, -100, 6, -100]
    assert labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert type(shifted) is type(labels)


def test_shifting_after_sharding_would_differ():
    """Trap 12: the neighbour of a local row is not the next token."""
    tokens, cu = torch.arange(16), [0, 16]
    plan = Plan(cu, 2)
    right = shard(shift_labels(tokens, cu), plan, 0)
    local = shard(tokens, plan, 0)
    wrong = torch.cat([local[1:], torch.tensor([-100])])
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_collate_lays_documents_end_to_end(kind):
    pack = collate([kind([1, 2, 3]), kind([7]), kind([8, 9])])
    assert pack.input_ids.tolist() == [1, 2, 3, 7, 8, 9]
    assert pack.labels.tolist() == [2, 3, -100, -100, 9, -100]
    assert pack.cu_seqlens.tolist() == [0, 3, 4, 6]
    masked = collate([kind([1, 2, 3])], [kind([-100, -100, 3])])
    assert masked.labels.tolist() == [-100, 3, -100]
    with pytest.raises(ValueError, match="other lengths"):
        collate([kind([1, 2])], [kind([1])])
    with pytest.raises(ValueError, match="no documents"):
        collate([])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_tokens_are_integers(kind):
    for bad in (kind([1.0, 2.0]), kind([[1, 2]]), kind([True])):
        with pytest.raises(ValueError, match=r"documents\[1\] has shape .* of integers"):
            collate([kind([1]), bad])
        with pytest.raises(ValueError, match=r"labels\[0\] has shape .* of integers"):
            collate([kind([1] * len(bad))], [bad])
    with pytest.raises(ValueError, match="type uint8, which cannot hold ignore_index -100"):
        collate([kind(np.array([1, 2], dtype=np.uint8))])
    bytes_ = collate([kind(np.array([1, 2], dtype=np.uint8))], ignore_index=255)
    assert bytes_.labels.tolist() == [2, 255]


def test_documents_and_labels_are_of_one_kind():
    with pytest.raises(TypeError, match="documents and labels mix"):
        collate([np.array([1])], [torch.tensor([1])])


def test_a_plan_for_other_ranks_is_told_before_gradients_are_summed():
    def work(rank, communicator):
        layer = torch.nn.Linear(3, 1)
        layer(torch.ones(3)).backward()
        with pytest.raises(ValueError, match="the plan is for 1 ranks and the group has 2"):
            sum_gradients(layer, communicator, plan=Plan([0, 8], 1))
        sum_gradients(layer, communicator, plan=Plan([0, 8], 2))
        return layer.weight.grad

    for gradient in run_threads(2, work):
        assert torch.equal(gradient, torch.full((1, 3), 2.0))


def test_positions_restart_and_jump():
    plan = Plan([0, 8, 16], 2)
    assert position_ids(plan, 0).tolist() == [[0, 1, 6, 7, 0, 1, 6, 7]]
    assert position_ids(plan, 1).tolist() == [[2, 3, 4, 5, 2, 3, 4, 5]]


def test_mean_over_the_tokens_of_all_ranks():
    """A mean of means would be 2.5; rank 1 holds no label."""
    sums, counts = [6.0, 0.0, 4.0], [2, 0, 4]

    def work(rank, communicator):
        loss = torch.tensor(sums[rank], requires_grad=True)
        share, mean = token_mean(loss, counts[rank], communicator)
        share.backward()
        return float(share.detach()), float(mean), float(loss.grad)

    for rank, (share, mean, gradient) in enumerate(run_threads(3, work)):
        assert mean == pytest.approx(10 / 6)
        assert share == pytest.approx(sums[rank] / 6)
        assert gradient == pytest.approx(1 / 6)
    share, mean = token_mean(torch.tensor(0.0), 0)
    assert float(share) == 0.0 and float(mean) == 0.0
