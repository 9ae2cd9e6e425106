"""The package itself: import without torch, stubs, names."""

import ast
import inspect
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import zigzag_attention
from zigzag_attention import _core, ring_flash_attn

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
import threading
import numpy as np
import zigzag_attention as z
import zigzag_attention.ring_flash_attn as ring_flash_attn
assert "torch" not in sys.modules
rng = np.random.default_rng(0)
lengths = [17, 0, 30]
q, k, v, dout = (rng.standard_normal((47, h, 16)).astype(np.float32) for h in (4, 2, 2, 4))
one = z.Plan.from_lengths(lengths, 1)
out, lse = z.attention(q, k, v, one, return_lse=True)
grads = z.attention_backward(dout, q, k, v, out, lse, one)
plan = z.Plan.from_lengths(lengths, 2)
parts = [None, None]
def work(rank, group):
    mine = [z.shard(x, plan, rank) for x in (q, k, v, dout)]
    o, l = z.attention(*mine[:3], plan, group, return_lse=True)
    parts[rank] = (o, l, *z.attention_backward(mine[3], *mine[:3], o, l, plan, group))
threads = [threading.Thread(target=work, args=x) for x in enumerate(z.Communicator.threads(2))]
[t.start() for t in threads]; [t.join() for t in threads]
both = [z.unshard(list(x), plan) for x in zip(*parts)]
assert np.array_equal(both[0], out) and np.array_equal(both[1], lse)
assert np.array_equal(both[2], grads[0])
assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(both[3:], grads[1:]))
cu = np.array([0, 47], np.int32)
o = ring_flash_attn.zigzag_llama3_flash_attn_varlen_func(
    q, k, v, cu, cu, 47, 47, 1, None, causal=True, return_attn_probs=True)
assert o[1].shape == (4, 47) and o[2] is None
p = ring_flash_attn.zigzag_llama3_flash_attn_varlen_kvpacked_func(
    q, np.stack([k, v], 1), cu, cu, 47, 47, 1, None, causal=True)
assert np.array_equal(o[0], p)
try:
    import zigzag_attention.hf
except ImportError as error:
    assert "torch" in str(error)
print("done")
"""


def test_numpy_only_use_without_torch():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n" and run.stderr == ""


def test_stub_describes_the_extension():
    stub = ast.parse((Path(zigzag_attention.__file__).parent / "_core.pyi").read_text())

    def names(body):
        found = set()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
        return {name for name in found if not name.startswith("__")}

    assert names(stub.body) == {name for name in dir(_core) if not name.startswith("__")}
    for node in stub.body:
        if isinstance(node, ast.ClassDef) and not issubclass(getattr(_core, node.name), Exception):
            there = {name for name in vars(getattr(_core, node.name)) if not name.startswith("__")}
            assert names(node.body) == there, node.name


@pytest.mark.parametrize("name", zigzag_attention.__all__)
def test_public_names_are_documented(name):
    thing = getattr(zigzag_attention, name)
    if callable(thing):
        assert inspect.getdoc(thing), name


SIGNATURE = [
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride"),
    *("local_k_slice", "dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes"),
    *("deterministic", "return_attn_probs", "group", "n_chunks", "use_triton_kernel"),
    *("use_fused_kernel_forward", "use_fused_kernel_backward"),
]


def test_drop_ins_have_the_replaced_signature():
    for suffix, packed in (("", "q k v"), ("kvpacked_", "q kv"), ("qkvpacked_", "qkv")):
        function = getattr(ring_flash_attn, f"zigzag_llama3_flash_attn_varlen_{suffix}func")
        parameters = inspect.signature(function).parameters
        assert list(parameters) == packed.split() + SIGNATURE
        assert parameters["causal"].default is False
        assert parameters["use_triton_kernel"].default is True


REPLACED = {
    f"{layout}flash_attn_{varlen}{packed}func": f"llama3_flash_attn_varlen_{packed}func"
    for layout in ("ring_", "zigzag_ring_", "stripe_")
    for varlen in ("", "varlen_")
    for packed in ("", "kvpacked_", "qkvpacked_")
    if varlen or layout != "zigzag_ring_"
}
REPLACED |= {
    "substitute_hf_flash_attn": "hf.register",
    "update_ring_flash_attn_params": "hf.register",
    "zigzag_ring_flash_attn_func": "attention(q.flatten(0, 1)",
    "zigzag_ring_flash_attn_kvpacked_func": "attention(q.flatten(0, 1)",
    "zigzag_ring_flash_attn_qkvpacked_func": "attention(q.flatten(0, 1)",
}


@pytest.mark.parametrize("name", REPLACED)
def test_names_without_a_function_say_what_does_their_job(name):
    with pytest.raises(ImportError, match=f"ring_flash_attn has no {name};") as imported:
        exec(f"from zigzag_attention.ring_flash_attn import {name}", {})
    with pytest.raises(AttributeError, match=f"ring_flash_attn has no {name};") as asked:
        getattr(ring_flash_attn, name)
    for raised in (imported, asked):
        assert REPLACED[name] in str(raised.value) and "\n" not in str(raised.value)
    assert not hasattr(ring_flash_attn, name)


def test_other_names_are_missing_as_ever():
    with pytest.raises(ImportError, match=r"has no extract_locall; did you mean extract_local\?"):
        exec("from zigzag_attention.ring_flash_attn import extract_locall", {})
    with pytest.raises(AttributeError, match=r"has no frobnicate$"):
        _ = ring_flash_attn.frobnicate
    assert getattr(ring_flash_attn, "frobnicate", 3) == 3
    assert not hasattr(ring_flash_attn, "__wrapped__")
    for name in ring_flash_attn.__all__:
        function = getattr(ring_flash_attn, name)
        assert name in dir(ring_flash_attn) and pickle.loads(pickle.dumps(function)) is function
    assert set(ring_flash_attn.__all__) <= {
        name for name, _ in inspect.getmembers(ring_flash_attn, callable)
    }
    assert pydoc.render_doc(ring_flash_attn)


def test_a_flattened_batch_has_the_rows_that_are_named():
    """What the sentence for zigzag_ring_flash_attn_func promises."""
    batch, seqlen, size = 3, 16, 2
    x = np.arange(batch * seqlen).reshape(batch, seqlen)
    plan = zigzag_attention.Plan.from_lengths([seqlen] * batch, size)
    for rank in range(size):
        chunks = np.split(x, 2 * size, axis=1)
        local = np.concatenate([chunks[i] for i in plan.chunk_indices(rank)], axis=1)
        assert np.array_equal(local.reshape(-1), zigzag_attention.shard(x.reshape(-1), plan, rank))


def test_versions_agree():
    assert zigzag_attention.__version__ == zigzag_attention.version()
    assert [row[0] for row in zigzag_attention.components()][:2] == ["CPU", "threads"]


def test_kernels_is_a_setter_and_a_context():
    assert _core.default_kernels() == "fused"
    with zigzag_attention.kernels("reference"):
        assert _core.default_kernels() == "reference"
        with zigzag_attention.kernels("fused"):
            assert _core.default_kernels() == "fused"
        assert _core.default_kernels() == "reference"
    assert _core.default_kernels() == "fused"
    zigzag_attention.kernels("reference")
    assert _core.default_kernels() == "reference"
