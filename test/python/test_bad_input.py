"""Every mistake raises with a sentence that says what is wrong and what is allowed."""

import numpy as np
import pytest
import torch
from ranks import run_threads

import zigzag_attention as z
from reference import draw
from zigzag_attention import Plan, attention

Q, K, V, _ = draw([16])
PLAN = Plan([0, 16], 1)
CU = torch.tensor([0, 16], dtype=torch.int32)


def drop_in(q=Q, k=K, v=V, cu_q=CU, cu_k=CU, stride=1, **options):
    return z.zigzag_llama3_flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 16, 16, stride, None, causal=True, **options
    )


def contiguous(**options):
    return z.llama3_flash_attn_varlen_func(
        Q, K, V, CU, CU, 16, 16, 1, slice(0, 16), causal=True, **options
    )


def pack_changed():
    """Through memory that autograd does not watch."""
    memory = np.array([0, 16])
    cu = torch.from_numpy(memory)
    out = drop_in(q=Q.clone().requires_grad_(), cu_q=cu, cu_k=cu)
    memory[:] = (0, 0)
    out.sum().backward()


def pack_changed_in_place():
    cu = CU.clone()
    out = drop_in(q=Q.clone().requires_grad_(), cu_q=cu, cu_k=cu)
    cu[0] = 1
    out.sum().backward()


def double_backward():
    q = Q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, K, V, PLAN).square().sum(), q, create_graph=True)
    dq.sum().backward()


TABLE = {
    # packs
    "pack that is empty": (lambda: Plan([], 1), "empty"),
    "pack that starts at 1": (lambda: Plan([1, 4], 1), "starts at 1; it must start at 0"),
    "pack that decreases": (lambda: Plan([0, 5, 3], 1), "5"),
    "pack of floats": (lambda: Plan(np.array([0.0, 4.0]), 1), "float64.*int32 or int64"),
    "pack of two dimensions": (lambda: Plan(np.zeros((2, 2), int), 1), "one-dimensional"),
    "no ranks": (lambda: Plan([0, 4], 0), "world_size"),
    "rank out of range": (lambda: PLAN.local_tokens(1), "rank"),
    # types, devices, shapes
    "float64": (lambda: attention(Q.double(), K.double(), V.double(), PLAN), "float64"),
    "integers": (lambda: attention(Q.int(), K.int(), V.int(), PLAN), "int32"),
    "mixed types": (lambda: attention(Q, K.half(), V, PLAN), "float16"),
    "two dimensions": (lambda: attention(Q[:, 0], K[:, 0], V[:, 0], PLAN), r"\[16, 32\]"),
    "k and v differ": (lambda: attention(Q, K, V[:, :1], PLAN), "v has shape"),
    "heads that do not divide": (lambda: attention(Q[:, :3], K, V, PLAN), "3 heads.*2"),
    "head_dim differs": (lambda: attention(Q[..., :16], K, V, PLAN), "head_dim|shape"),
    "rows that are not the plan's": (lambda: attention(Q[:9], K[:9], V[:9], PLAN), "9"),
    "last stride is not 1": (
        lambda: attention(Q.transpose(1, 2).contiguous().transpose(1, 2), K, V, PLAN),
        "last stride of q",
    ),
    "sparse": (
        lambda: z.shard(torch.eye(16).to_sparse(), PLAN, 0),
        "cannot be read in place|dense",
    ),
    "foreign byte order": (lambda: z.shard(np.zeros(16, ">f4"), PLAN, 0), "byte order"),
    "sixteen bytes an element": (lambda: z.shard(np.zeros(16, "c16"), PLAN, 0), "16 bytes"),
    "devices that differ": (lambda: attention(Q.to("meta"), K, V, PLAN), "q is on meta, k on cpu"),
    "a layout that is no view": (lambda: attention(Q.to_sparse(), K, V, PLAN), "sparse|dense"),
    "a negative stride": (
        lambda: attention(*(x.numpy()[..., ::-1] for x in (Q, K, V)), PLAN),
        "last stride of q is -1",
    ),
    "a broadcast without rows": (
        lambda: attention(Q[0], K[0], V[0], PLAN),
        r"\[4, 32\]",
    ),
    # options
    "dropout through attention": (
        lambda: attention(Q, K, V, PLAN, dropout=0.1),
        "dropout was given to attention; attention dropout is not supported",
    ),
    "dropout_p through attention": (
        lambda: attention(Q, K, V, PLAN, dropout_p=0.1),
        "dropout_p was given to attention; attention dropout is not supported",
    ),
    "alibi through attention": (
        lambda: attention(Q, K, V, PLAN, alibi_slopes=torch.ones(4)),
        "ALiBi is not supported",
    ),
    "sinks through attention": (
        lambda: attention(Q, K, V, PLAN, sinks=torch.ones(4)),
        "attention sinks are not supported",
    ),
    "a mask through attention": (
        lambda: attention(Q, K, V, PLAN, attn_mask=torch.ones(16, 16)),
        "masks come from the plan's documents",
    ),
    "dropout through NumPy's backward": (
        lambda: z.attention_backward(*(x.numpy() for x in (Q, Q, K, V, Q, Q)), PLAN, dropout=0.1),
        "attention dropout is not supported",
    ),
    "paged keys through a drop-in": (
        lambda: drop_in(block_table=torch.zeros(1, 1)),
        "paged K and V are not supported",
    ),
    "NaN scale": (lambda: attention(Q, K, V, PLAN, softmax_scale=float("nan")), "scale"),
    "negative softcap": (lambda: attention(Q, K, V, PLAN, softcap=-1.0), "softcap"),
    "window of -2": (lambda: attention(Q, K, V, PLAN, window=(-2, 0)), "window"),
    "stage that does not divide": (lambda: attention(Q, K, V, PLAN, kv_heads_per_stage=3), "3"),
    "stage of 0": (lambda: attention(Q, K, V, PLAN, kv_heads_per_stage=0), "kv_heads_per_stage"),
    "unknown kernels": (lambda: z.kernels("quick"), "quick"),
    # groups
    "ranks without a group": (lambda: attention(Q, K, V, Plan([0, 16], 2)), "for 2 ranks"),
    "group of another size": (
        lambda: attention(Q, K, V, Plan([0, 16], 2), z.Communicator.self()),
        "for 2 ranks and the group has 1",
    ),
    # shards
    "shard of other rows": (lambda: z.shard(Q[:4], PLAN, 0), "4"),
    "no parts": (lambda: z.unshard([], PLAN), "no parts"),
    "too many parts": (lambda: z.unshard([Q, Q], PLAN), "2"),
    # drop-ins
    "dropout": (lambda: drop_in(dropout_p=0.1), "dropout_p is 0.1"),
    "alibi": (lambda: drop_in(alibi_slopes=torch.ones(4)), "alibi_slopes"),
    "three chunks": (lambda: drop_in(n_chunks=3), "n_chunks is 3; only 2"),
    "heads_k_stride": (lambda: drop_in(stride=3), "3"),
    "cu_seqlens_q that is another pack": (
        lambda: drop_in(cu_q=torch.tensor([0, 8, 16])),
        r"cu_seqlens_q is \[0, 8, 16\].*\[0, 16\] \(LOCAL\)",
    ),
    "cu_seqlens_k of fewer rows": (
        lambda: drop_in(cu_q=torch.tensor([0, 8]), cu_k=torch.tensor([0, 8])),
        "q has 16 rows",
    ),
    "kv that is not packed": (
        lambda: z.zigzag_llama3_flash_attn_varlen_kvpacked_func(Q, K, CU, CU, 16, 16, 1, None),
        r"\[local_tokens, 2, heads, head_dim\]",
    ),
    "qkv of another count": (
        lambda: z.zigzag_llama3_flash_attn_varlen_qkvpacked_func(
            torch.zeros(16, 2, 4, 32), CU, CU, 16, 16, 1, None
        ),
        r"\[local_tokens, 3, heads, head_dim\]",
    ),
    # helpers
    "extract_local of odd lengths": (
        lambda: z.extract_local(torch.zeros(10), [0, 10], 0, 4),
        "document 0.*10 tokens.*multiples of 2 \\* world_size = 8",
    ),
    "extract_local with LOCAL cu_seqlens": (
        lambda: z.extract_local(torch.zeros(64), [0, 16], 0, 4),
        "16 tokens, as cu_seqlens \\(GLOBAL\\)",
    ),
    "split_q with GLOBAL cu_seqlens": (
        lambda: z.split_q_by_zigzag_chunk_index(torch.zeros(16, 1, 1), [0, 64], 4, 0),
        "LOCAL",
    ),
    "a range that is no prefix": (
        lambda: z.extract_zigzag_kv_slices_for_group(
            torch.zeros(2, 16, 1, 8), [(0, 9, 1)], [0, 16], 2, 1, 8
        ),
        r"seq_ranges\[0\] is \(0, 9, 1\).*tokens 0 to 8",
    ),
    "one buffer instead of K and V": (
        lambda: z.rearrange_kv_from_zigzag_to_contiguous(torch.zeros(1, 16, 1, 8), 2, [0, 16]),
        "must be 2, K and V",
    ),
    # the contiguous drop-ins
    "contiguous dropout": (lambda: contiguous(dropout_p=0.1), "dropout_p is 0.1"),
    "contiguous alibi": (lambda: contiguous(alibi_slopes=torch.ones(4)), "alibi_slopes"),
    "contiguous softcap": (lambda: contiguous(bias=torch.ones(4)), "biases .* are not supported"),
    # autograd
    "a pack changed before the backward": (pack_changed, "changed between forward and backward"),
    "labels of another pack": (lambda: z.shift_labels(torch.zeros(4), [0, 5]), r"must be \[5\]"),
}


@pytest.mark.parametrize("mistake", TABLE)
def test_raises_a_sentence(mistake):
    call, message = TABLE[mistake]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    text = str(raised.value)
    assert len(text) > 20 and "\n" not in text


# What torch itself says, or says through it.
BY_TORCH = {
    "requires_grad on integers": (
        lambda: attention(Q.int().requires_grad_(), K.int(), V.int(), PLAN),
        "floating point",
    ),
    "a pack changed in place before the backward": (
        pack_changed_in_place,
        "modified by an inplace operation",
    ),
    "a second derivative": (double_backward, "only first derivatives are supported"),
}


@pytest.mark.parametrize("mistake", BY_TORCH)
def test_raises_by_torch(mistake):
    call, message = BY_TORCH[mistake]
    with pytest.raises(RuntimeError, match=message):
        call()


WRONG_KINDS = {
    "an option of another name": (
        lambda: attention(Q, K, V, PLAN, window_size=(3, 0)),
        "attention has no option window_size; window is what it has",
    ),
    "cu_seqlens by name": (
        lambda: attention(Q, K, V, cu_seqlens_k=CU),
        "attention has no option cu_seqlens_k; plan is what it has",
    ),
    "a misspelt option": (
        lambda: attention(Q, K, V, PLAN, casual=True),
        "attention has no option casual; causal is what it has",
    ),
    "an option of nobody": (
        lambda: attention(Q, K, V, PLAN, xyz=1),
        "attention has no option xyz; it takes q, k, v, plan, group, causal",
    ),
    "an option that the drop-ins lack": (
        lambda: drop_in(return_lse=True),
        "has no option return_lse; return_attn_probs is what it has",
    ),
    "a list": (lambda: attention(Q.tolist(), K, V, PLAN), "q is a builtins.list"),
    "NumPy with torch": (lambda: attention(Q, K.numpy(), V, PLAN), "mix NumPy arrays and torch"),
    "cu_seqlens for a plan": (lambda: attention(Q, K, V, CU), "it must be a Plan"),
    "a rank for a group": (lambda: attention(Q, K, V, Plan([0, 16], 2), 1), "group is int"),
    "torch for NumPy's backward": (
        lambda: z.attention_backward(Q, Q, K, V, Q, Q[..., 0], PLAN),
        "torch tensors have autograd",
    ),
}


@pytest.mark.parametrize("mistake", WRONG_KINDS)
def test_wrong_kinds_raise_type_errors(mistake):
    call, message = WRONG_KINDS[mistake]
    with pytest.raises(TypeError, match=message):
        call()


def test_local_cu_seqlens_where_global_is_wanted():
    """Trap 5: with four ranks LOCAL and GLOBAL look alike and are told apart by the rows."""
    q, k, v, _ = draw([64, 64])
    cu_k = torch.tensor([0, 64, 128])

    def call(cu_q, cu_k):
        def work(rank, communicator):
            rows = slice(32 * rank, 32 * rank + 32)
            return z.zigzag_llama3_flash_attn_varlen_func(
                *(x[rows] for x in (q, k, v)), cu_q, cu_k, 16, 64, 1, None, group=communicator
            )

        return run_threads(4, work)

    call(cu_k // 4, cu_k)
    with pytest.raises(ValueError, match="what was given is the GLOBAL one"):
        call(cu_k, cu_k)
    with pytest.raises(ValueError, match="cu_seqlens_q is"):
        call(cu_k // 4, cu_k // 4)


MISMATCHES = {
    "another pack": {"lengths": [30, 34]},
    "another type": {"dtype": torch.float16},
    "other heads": {"heads": 8},
    "another option": {"softcap": 2.0},
    "another mask": {"causal": False},
    "a mistake on one rank": {"softmax_scale": float("inf")},
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_ranks_that_disagree_all_raise(mismatch):
    """Trap 13: an error on every rank, and no hang."""
    from concurrent.futures import ThreadPoolExecutor

    communicators = z.Communicator.threads(3)

    def work(rank):
        mine = dict(MISMATCHES[mismatch]) if rank == 1 else {}
        lengths = mine.pop("lengths", [32, 32])
        q, k, v, _ = draw(lengths, heads=mine.pop("heads", 4))
        dtype = mine.pop("dtype", torch.float32)
        plan = Plan.from_lengths(lengths, 3)
        q, k, v = (z.shard(x.to(dtype), plan, rank) for x in (q, k, v))
        try:
            attention(q, k, v, plan, communicators[rank], **mine)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        messages = list(pool.map(work, range(3)))
    assert all(messages), messages
    assert any("1" in message for message in messages)
