"""Generation under `attn_implementation="attnlab_moba"`, with and without the cache of block sums."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
import attnlab.hf as hf

transformers = pytest.importorskip("transformers")

from attnlab.hf import MoBADynamicCache, MoBAPlan  # noqa: E402
from tests.hf_models import CLOSE, MODELS, dense, fresh, generate, inputs, moba, positions_of  # noqa: E402


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cache", ["moba", "plain"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_block_selected_generates_like_dense(kind, padding, cache):
    model = moba(kind, MoBAPlan(block_size=4, topk=20))
    ids, mask = inputs(padding)
    tokens, scores = dense(model, lambda: generate(model, ids, mask))
    found, found_scores = generate(model, ids, mask, fresh(model, cache))
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_scores, scores, **CLOSE)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_oss"])
def test_sparse_generation_equals_recomputing_the_prefix(kind, padding):
    model = moba(kind, MoBAPlan(block_size=4, topk=3, local_blocks=1, full_layers="first:1"))
    ids, mask = inputs(padding)
    tokens, scores = generate(model, ids, mask, MoBADynamicCache(model.config), max_new_tokens=9)
    plain, plain_scores = generate(model, ids, mask, max_new_tokens=9)
    assert torch.equal(tokens, plain)
    torch.testing.assert_close(scores, plain_scores, **CLOSE)
    for step in range(9):
        seen = ids.shape[1] + step
        grown = F.pad(mask, (0, step), value=1)
        logits = model(tokens[:, :seen], attention_mask=grown, position_ids=positions_of(grown), use_cache=False).logits
        torch.testing.assert_close(scores[:, step], logits[:, -1], **CLOSE)


def test_decode_reads_the_chosen_blocks_only():
    """Values of blocks no head chose are NaN; nothing of them comes out."""
    model = moba(plan=MoBAPlan(block_size=4, topk=2), num_hidden_layers=1)
    ids, mask = inputs("left", tokens=41)
    cache = MoBADynamicCache(model.config)
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, position_ids=positions_of(mask)[:, :-1])
    seen = {}

    def spy(module, query, key, *args, **kwargs):
        seen["q"], seen["k"] = query.transpose(1, 2).clone(), key.transpose(1, 2).clone()
        return hf.attention.moba_forward(module, query, key, *args, **kwargs)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register("spy", hf.masks.padding_mask)
    model.set_attn_implementation("spy")
    last = {"attention_mask": mask, "past_key_values": cache, "position_ids": positions_of(mask)[:, -1:]}
    clean = model(ids[:, -1:], **last).logits
    layer, poisoned = cache.layers[0], 0
    for row, start in enumerate((0, 9)):
        chosen = attnlab.moba_select(seen["q"][row : row + 1], seen["k"][row : row + 1, start:], block_size=4, topk=2)
        for block in set(range((41 - start) // 4)) - set(chosen.indices.flatten().tolist()):
            layer.values[row, :, start + 4 * block : start + 4 * block + 4] = torch.nan
            poisoned += 1
    assert poisoned >= 4
    cache.crop(-1)
    torch.testing.assert_close(model(ids[:, -1:], **last).logits, clean, **CLOSE)
    layer.values[:] = torch.nan
    cache.crop(-1)
    assert model(ids[:, -1:], **last).logits.isnan().all()


def test_decode_phases(monkeypatch):
    ids, mask = inputs("left")
    calls = []
    for name in ("moba_attention", "full_attention", "_decode"):
        real = getattr(hf.attention, name)
        monkeypatch.setattr(hf.attention, name, lambda *a, f=real, n=name, **k: (calls.append(n), f(*a, **k))[1])
    for phase, expected in [
        ("both", ["moba_attention", "_decode"]),
        ("prefill", ["moba_attention", "full_attention"]),
        ("decode", ["full_attention", "_decode"]),
    ]:
        calls.clear()
        model = moba(plan=MoBAPlan(block_size=4, topk=2, phase=phase), num_hidden_layers=1)
        generate(model, ids, mask, MoBADynamicCache(model.config), max_new_tokens=2)
        assert calls == expected


def test_static_cache_generates_alike():
    model = moba(plan=MoBAPlan(block_size=4, topk=3))
    for ids, mask in (inputs(), inputs("left")):
        expected = generate(model, ids, mask, MoBADynamicCache(model.config))
        found = generate(model, ids, mask, cache_implementation="static")
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_beam_search_and_assisted_generation_with_the_cache():
    model = moba(plan=MoBAPlan(block_size=4, topk=2))
    ids, mask = inputs("left")
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, ids, mask, **beams)[0]
    assert torch.equal(generate(model, ids, mask, MoBADynamicCache(model.config), **beams)[0], expected)
    one = {"ids": ids[:1], "mask": mask[:1], "max_new_tokens": 20}
    expected = generate(model, **one)[0]
    found = generate(model, cache=MoBADynamicCache(model.config), prompt_lookup_num_tokens=4, **one)[0]
    assert torch.equal(found, expected)
