"""Hugging Face models over ranks: loss and gradients equal one rank's and eager attention's."""

import copy

import pytest
import torch
from ranks import run_threads

import zigzag_attention
from zigzag_attention import Plan, collate, hf

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}
LENGTHS = (37, 5, 1, 64)


def make_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **MODELS[name], attn_implementation="eager"
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def make_pack():
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]
    return documents, collate(documents)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def eager_loss(model, documents, count):
    """Document by document, shifted by hand."""
    total = torch.zeros(())
    for ids in documents:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return total / count


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_one_rank(name, size):
    model = make_model(name)
    documents, pack = make_pack()
    loss = eager_loss(model, documents, sum(length - 1 for length in LENGTHS))
    loss.backward()
    expected = gradients(model)
    copies = [copy.deepcopy(model) for _ in range(size)]

    def work(rank, communicator):
        mine = copies[rank]
        mine.zero_grad()
        # Ranks that are threads share transformers' table, so each has a name of its own.
        registration = hf.register(communicator, name=f"zigzag-{name}-{rank}")
        mine.set_attn_implementation(registration.name)
        share = mine(**registration.inputs(pack, Plan(pack.cu_seqlens, size))).loss
        share.backward()
        hf.sum_gradients(mine, communicator)
        return float(share.detach())

    shares = run_threads(size, work)
    assert sum(shares) == pytest.approx(float(loss.detach()), rel=1e-6)
    for rank_model in copies:
        for key, gradient in gradients(rank_model).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_pack_as_a_context_and_checkpointing():
    model = make_model("Llama")
    _, pack = make_pack()
    registration = hf.register()
    model.set_attn_implementation("zigzag")
    inputs = registration.inputs(pack, Plan(pack.cu_seqlens, 1))
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    plan = inputs.pop("zigzag_plan")
    model.gradient_checkpointing_enable()
    with registration.pack(plan):
        model(**inputs).loss.backward()
    assert registration.plan is None
    for key, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[key])


def test_what_is_not_supported_raises():
    model = make_model("Llama")
    _, pack = make_pack()
    registration = hf.register()
    model.set_attn_implementation("zigzag")
    inputs = registration.inputs(pack, Plan(pack.cu_seqlens, 1))
    mask = torch.ones_like(inputs["input_ids"])
    model(**inputs, attention_mask=mask)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padding"):
        model(**inputs, attention_mask=mask)
    plan = inputs.pop("zigzag_plan")
    with pytest.raises(ValueError, match="needs the step's pack"):
        model(**inputs)
    twice = {key: inputs[key].repeat(2, 1) for key in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="2 rows"):
        model(**twice, use_cache=False, zigzag_plan=plan)
    dropping = make_model("Llama")
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.1
    dropping.set_attn_implementation("zigzag")
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        dropping(**inputs, zigzag_plan=plan)


def test_a_plan_for_other_ranks_than_the_group_has():
    """Every rank's loss would be the whole one, and their sum a multiple of it."""
    _, pack = make_pack()
    rows = torch.zeros(1, 2, sum(LENGTHS), 32)

    def work(rank, communicator):
        registration = hf.register(communicator, name=f"zigzag-plan-{rank}")
        for size in (1, 4):
            plan = Plan(pack.cu_seqlens, size)
            sentence = rf"the plan is for {size} ranks and the group .* has 2; make it Plan\("
            with pytest.raises(ValueError, match=sentence):
                registration.inputs(pack, plan)
            with pytest.raises(ValueError, match=sentence):
                registration.attend(torch.nn.Module(), rows, rows, rows, None, zigzag_plan=plan)

    run_threads(2, work)


def test_sum_gradients_takes_part_without_a_gradient():
    def work(rank, communicator):
        layer = torch.nn.Linear(3, 1)
        if rank == 1:
            layer(torch.ones(3)).backward()
        hf.sum_gradients(layer, communicator)
        return layer.weight.grad

    for gradient in run_threads(2, work):
        assert torch.equal(gradient, torch.ones(1, 3))
    assert zigzag_attention.Communicator.self().size == 1
