"""A model cut at its attentions: slices with an attention of the test between them are the model."""

import pytest
import torch
import transformers

from attnlab import full_attention
from attnlab.decoder_models import dense
from attnlab.lamina.slices import Slices, greedy
from attnlab.testing import assert_accurate
from tests.hf_models import VOCAB, build

ROPE = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "rope_theta": 500.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
MODELS = {
    **{kind: (kind, {}) for kind in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "as many KV heads": ("qwen3", {"num_key_value_heads": 4}),
    "eight query heads a KV head": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("qwen2", {"tie_word_embeddings": False}),
    "head size of its own": ("qwen3", {"head_dim": 24}),
    "one layer": ("mistral", {"num_hidden_layers": 1}),
    "no rope at all": ("smollm3", {"no_rope_layers": [0, 0, 0], "attention_bias": False}),
    "more flags than layers": ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}),
    **{f"{name} rope": ("llama", {"rope_parameters": rope}) for name, rope in ROPE.items()},
}


@pytest.fixture(params=MODELS)
def model(request, one_thread):
    kind, changes = MODELS[request.param]
    return build(kind, **changes)


def sliced_prompt(cut, ids):
    """Logits `[T, vocab]` of a prompt `[T]`, and the keys and values of every layer."""
    rotation = cut.rotation(torch.arange(len(ids)))
    residual, cache = cut.embed(ids), []
    for layer in range(cut.facts.layers):
        q, normed = cut.query(layer, residual, rotation)
        k, v = cut.key_value(layer, normed, rotation)
        cache.append((k, v))
        out = full_attention(q[None], k[None], v[None], scale=cut.scale, backend="reference")
        residual = cut.close(layer, residual, out[0])
    return cut.logits(residual), cache


def sliced_token(cut, ids, caches):
    """Logits `[n, vocab]` of one token of each of `n` requests at positions of their own; the caches grow."""
    rotation = cut.rotation(torch.tensor([len(cache[0][0]) for cache in caches]))
    residual = cut.embed(ids)
    for layer in range(cut.facts.layers):
        q, normed = cut.query(layer, residual, rotation)
        new = cut.key_value(layer, normed, rotation)
        out = torch.empty_like(q)
        for row, cache in enumerate(caches):
            k, v = cache[layer] = tuple(torch.cat([old, x[row, None]]) for old, x in zip(cache[layer], new))
            out[row] = full_attention(q[None, row, None], k[None], v[None], scale=cut.scale, backend="reference")[0, 0]
        residual = cut.close(layer, residual, out)
    return cut.logits(residual)


def truths(model, ids):
    """Logits `[T, vocab]` of the model in its own dtype and in float64."""
    with dense(model):
        plain = model(ids[None]).logits[0]
        truth = model.double()(ids[None]).logits[0]
        model.float()
    return plain, truth


def test_prompt_logits_are_the_model_s(model):
    ids = torch.randint(1, VOCAB, (37,), generator=torch.Generator().manual_seed(1))
    with dense(model):
        logits, _ = sliced_prompt(Slices("test", model), ids)
    plain, truth = truths(model, ids)
    assert_accurate(logits, truth, plain)


def test_ragged_rows_have_positions_of_their_own(model):
    g = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, VOCAB, (n,), generator=g) for n in (1, 12, 7)]
    new = torch.randint(1, VOCAB, (3, 3), generator=g)
    with dense(model):
        cut = Slices("test", model)
        caches = [sliced_prompt(cut, ids)[1] for ids in prompts]
        steps = [sliced_token(cut, ids, caches) for ids in new]
    plain, truth = (
        torch.cat([x[-3:] for x in rows])
        for rows in zip(*(truths(model, torch.cat([prompt, new[:, row]])) for row, prompt in enumerate(prompts)))
    )
    assert_accurate(torch.cat([step[row, None] for row in range(3) for step in steps]), truth, plain)


def test_key_value_needs_no_more_than_what_query_hands_on(one_thread):
    """q goes out while k and v are computed, so the order of the two is fixed and nothing else passes between them."""
    model = build()
    cut = Slices("test", model)
    seen = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(cut.layers[0].self_attn, name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    with dense(model):
        rotation = cut.rotation(torch.tensor([5]))
        _, normed = cut.query(0, cut.embed(torch.tensor([3])), rotation)
        assert seen == ["q_proj"]
        cut.key_value(0, normed, rotation)
    assert seen == ["q_proj", "k_proj", "v_proj"]


def test_attention_in_float32_is_taken_in_the_model_s_dtype(one_thread):
    model = build(dtype=torch.bfloat16)
    cut = Slices("test", model)
    with dense(model):
        residual = cut.embed(torch.tensor([3, 4]))
        attended = torch.randn(2, 4, 8)
        assert torch.equal(cut.close(0, residual, attended), cut.close(0, residual, attended.bfloat16()))
        assert cut.close(0, residual, attended).dtype == torch.bfloat16


def test_greedy_takes_the_best_and_the_first_of_equals():
    assert greedy(torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])).tolist() == [1, 0]


def unequal_scales():
    model = build()
    model.model.layers[1].self_attn.scaling = 0.25
    return model


def fused():
    model = build()
    del model.model.layers[2].self_attn.k_proj
    return model


def rounded():
    return build().bfloat16()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "model must be a transformers model, got Linear"),
        (lambda: build("gpt_oss"), ValueError, "must be of type llama, mistral, qwen2, qwen3, smollm3, got 'gpt_oss'"),
        (lambda: transformers.LlamaModel(build().config), ValueError, "language model's head, got LlamaModel"),
        (unequal_scales, ValueError, r"layers must scale their scores alike, got \[0.25, 0.5\]"),
        (fused, TypeError, "layer 2 of LlamaForCausalLM has no self_attn.k_proj"),
        (rounded, ValueError, "rotary frequencies differ from its configuration's"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        Slices("test", make())
