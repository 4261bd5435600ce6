"""The function transformers calls, on its own: what it hands on, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

import attnlab

pytest.importorskip("transformers")

from attnlab.hf import DECODE_TOKENS, MoBALayer, MoBAPlan, attention


def module(causal=True, **plan):
    values = MoBAPlan(**{"block_size": 4, "topk": 2} | plan).to_dict()
    return SimpleNamespace(config=SimpleNamespace(attnlab_moba=values, num_hidden_layers=1), is_causal=causal)


MODULE = module()


def expected_of(query, keys, values, **options):
    return attnlab.moba_attention(*(x.transpose(1, 2) for x in (query, keys, values)), block_size=4, topk=2, **options)


@pytest.mark.parametrize("tokens", [1, DECODE_TOKENS, DECODE_TOKENS + 1])
@pytest.mark.parametrize(
    "plan", [{}, {"routing": "group"}, {"sink_blocks": 1, "local_blocks": 1}], ids=["head", "group", "sink and local"]
)
def test_steps_run_over_the_block_sums(plan, tokens, monkeypatch):
    calls, decode = [], attention._decode
    monkeypatch.setattr(attention, "_decode", lambda *args: calls.append(args) or decode(*args))
    keys, query = torch.randn(1, 2, 50, 8), torch.randn(1, 4, tokens, 8)
    layer = MoBALayer()
    layer.update(keys[:, :, tokens:], keys[:, :, tokens:])
    held = layer.update(keys[:, :, :tokens], keys[:, :, :tokens])
    sinks = torch.linspace(-1, 1, 4)
    out, _ = attention.moba_forward(module(**plan), query, *held, None, scaling=0.7, s_aux=sinks)
    torch.testing.assert_close(out, expected_of(query, *held, scale=0.7, sinks=sinks, **plan))
    assert len(calls) == (tokens <= DECODE_TOKENS)


def test_the_backend_of_the_plan_is_the_one_asked():
    keys, query = torch.randn(1, 2, 21, 8).double(), torch.randn(1, 4, 21, 8).double()
    asking = module(backend="triton")
    with pytest.raises(attnlab.BackendError, match="moba_attention: backend='triton' cannot serve this call"):
        attention.moba_forward(asking, query, keys, keys, None)
    layer = MoBALayer()
    layer.update(keys[:, :, :20], keys[:, :, :20])
    held = layer.update(keys[:, :, 20:], keys[:, :, 20:])
    with pytest.raises(attnlab.BackendError, match="moba_decode: backend='triton' cannot serve this call"):
        attention.moba_forward(asking, query[:, :, 20:], *held, None)


def test_a_step_uses_the_block_sums_of_its_own_keys_only():
    """Not of keys the cache has grown past, and not where values are narrower than keys: their buffers differ."""
    keys, query = torch.randn(1, 2, 23, 8), torch.randn(1, 4, 1, 8)
    for width in (8, 5):
        layer = MoBALayer()
        layer.update(keys[:, :, :20], keys[:, :, :20, :width])
        held = layer.update(keys[:, :, 20:21], keys[:, :, 20:21, :width])
        for _ in range(2):
            out, _ = attention.moba_forward(MODULE, query, *held, None)
            torch.testing.assert_close(out, expected_of(query, keys[:, :, :21], keys[:, :, :21])[..., :width])
            layer.update(keys[:, :, 21:], keys[:, :, 21:, :width])


def test_a_step_that_needs_gradients_has_them():
    keys, query = torch.randn(1, 2, 21, 8), torch.randn(1, 4, 1, 8, requires_grad=True)
    layer = MoBALayer()
    layer.update(keys[:, :, :20], keys[:, :, :20])
    out, _ = attention.moba_forward(MODULE, query, *layer.update(keys[:, :, 20:], keys[:, :, 20:]), None)
    assert torch.autograd.grad(out.sum(), query)[0].abs().sum() > 0


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_module_says_whether_it_is_causal(causal):
    q, k = torch.randn(1, 4, 21, 8), torch.randn(1, 2, 21, 8)
    expected = expected_of(q, k, k, causal=causal)
    assert torch.equal(attention.moba_forward(module(causal), q, k, k, None)[0], expected)
    assert torch.equal(attention.moba_forward(MODULE, q, k, k, None, is_causal=causal)[0], expected)


def test_autocast_reaches_the_kernels():
    """Rotary embeddings leave queries and keys in float32, values may be half already."""
    q, k = torch.randn(1, 4, 21, 8), torch.randn(1, 2, 21, 8)
    low = [x.bfloat16() for x in (q, k, k)]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention.moba_forward(MODULE, q, k, low[2], None)
    assert torch.equal(out, attention.moba_forward(MODULE, *low, None)[0])


LEFT = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
CU = torch.tensor([0, 4, 10])


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {"sliding_window": 4, "is_causal": False}, "sliding windows need causal attention, SimpleNamespace is"),
        (None, {"output_attentions": True}, "attention weights are never formed"),
        (None, {"dropout": 0.1}, "attention dropout is not supported, got 0.1"),
        (None, {"head_mask": torch.ones(4)}, "head masks are not supported"),
        (None, {"cache": object()}, "continuous batching's paged cache is not supported"),
        (None, {"block_table": CU}, "paged caches are not supported"),
        (LEFT, {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU}, "got both cu_seq_lens_q and a padding mask"),
    ],
)
def test_refused(mask, options, message):
    x = torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        attention.moba_forward(MODULE, x, x, x, mask, **options)
