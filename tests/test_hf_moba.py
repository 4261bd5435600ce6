"""`attn_implementation="attnlab_moba"` on real transformers models built from configs: random weights, float32."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
import attnlab.hf as hf

transformers = pytest.importorskip("transformers")

from attnlab.hf import MoBADynamicCache, MoBAPlan, set_plan  # noqa: E402
from tests.hf_models import CLOSE, MODELS, PADDING, VOCAB, dense, inputs, moba, positions_of  # noqa: E402


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", MODELS)
def test_every_block_selected_is_dense_attention(kind, padding):
    model = moba(kind, MoBAPlan(block_size=4, topk=8))
    ids, mask = inputs(padding)
    real = mask.bool()
    expected = dense(model, lambda: model(ids, attention_mask=mask).logits)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected[real], **CLOSE)
    model.set_attn_implementation("attnlab_full")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected[real], **CLOSE)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("routing", ["head", "group"])
def test_sparse_rows_equal_moba_attention_on_the_row_alone(routing, padding, kv_heads):
    """Padding neither shifts blocks nor is seen: each row equals a model that calls `moba_attention` on that row."""
    plan = MoBAPlan(block_size=4, topk=2, routing=routing, sink_blocks=1)
    model = moba(plan=plan, num_key_value_heads=kv_heads)
    ids, mask = inputs(padding, tokens=33)
    logits = model(ids, attention_mask=mask).logits

    def by_hand(module, q, k, v, attention_mask, scaling=None, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"block_size": 4, "topk": 2, "routing": routing, "sink_blocks": 1, "scale": scaling}
        return attnlab.moba_attention(q, k, v, **options), None

    transformers.AttentionInterface.register("by_hand", by_hand)
    model.set_attn_implementation("by_hand")
    for row in range(2):
        real = mask[row].bool()
        torch.testing.assert_close(logits[row, real], model(ids[row, real][None]).logits[0], **CLOSE)
    assert (logits - dense(model, lambda: model(ids, attention_mask=mask).logits)).abs().max() > 0.1


@pytest.mark.parametrize("cuts", [[29], [1, 28], [20, 3, 6], [5, 24], [17, 1, 1, 10]])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_prefill_in_chunks_equals_one_shot(padding, cuts):
    model = moba(plan=MoBAPlan(block_size=3, topk=2))
    ids, mask = inputs(padding)
    positions = positions_of(mask)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, begin, parts = MoBADynamicCache(model.config), 0, []
    for size in cuts:
        end = begin + size
        part = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        )
        parts.append(part.logits)
        begin = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], **CLOSE)


def test_heads_are_not_copied(monkeypatch):
    model = moba(num_key_value_heads=1)
    shapes = []

    def spy(q, k, v, **kwargs):
        shapes.append((k.shape, v.shape, k._is_view()))
        return attnlab.moba_attention(q, k, v, **kwargs)

    monkeypatch.setattr(hf.attention, "moba_attention", spy)
    model(inputs()[0])
    assert shapes == [((2, 29, 1, 8), (2, 29, 1, 8), True)] * 3


def test_full_layers_stay_dense(monkeypatch):
    calls = []
    for name in ("moba_attention", "full_attention"):

        def spy(*args, name=name, **kwargs):
            calls.append(name[:4])
            return getattr(attnlab, name)(*args, **kwargs)

        monkeypatch.setattr(hf.attention, name, spy)
    ids, mask = inputs("left")
    for full, expected in [
        (None, "moba moba moba"),
        ("last:1", "moba moba full"),
        ("first:2", "full full moba"),
        ([1], "moba full moba"),
        ("last:3", "full full full"),
    ]:
        calls.clear()
        moba(plan=MoBAPlan(block_size=4, topk=2, full_layers=full))(ids, attention_mask=mask)
        assert " ".join(calls) == expected
    calls.clear()
    moba("gpt_oss")(ids, attention_mask=mask)
    assert calls == ["full", "moba", "full"]  # layers 0 and 2 have a sliding window


def test_phases():
    ids, mask = inputs("left")
    found = {}
    for phase in ("both", "prefill", "decode"):
        found[phase] = moba(plan=MoBAPlan(block_size=4, topk=2, phase=phase))(ids, attention_mask=mask).logits[:, -1]
    model = moba()
    expected = dense(model, lambda: model(ids, attention_mask=mask).logits[:, -1])
    torch.testing.assert_close(found["decode"], expected, **CLOSE)
    assert torch.equal(found["both"], found["prefill"])
    assert not torch.allclose(found["both"], expected, **CLOSE)


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens", "positions with a cache"])
def test_packed_sequences_stay_apart(how):
    model = moba(plan=MoBAPlan(block_size=4, topk=2))
    lengths = [13, 1, 21]
    ids = inputs(tokens=35, batch=1)[0]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {"position_ids": positions, "use_cache": how.endswith("cache")}
    if how == "cu_seq_lens":
        cu = torch.tensor([0, 13, 14, 35], dtype=torch.int32)
        options |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 21, "max_length_k": 21}
    packed = model(ids, **options).logits[0].split(lengths)
    for part, own in zip(packed, ids[0].split(lengths), strict=True):
        torch.testing.assert_close(part, model(own[None]).logits[0], **CLOSE)


def test_gradients_equal_dense_ones():
    model = moba(plan=MoBAPlan(block_size=4, topk=8)).train()
    ids, mask = inputs("left")

    def gradients():
        model.zero_grad()
        with torch.enable_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            F.cross_entropy(logits[mask.bool()], ids[mask.bool()]).backward()
        return [p.grad.clone() for p in model.parameters()]

    for found, expected in zip(gradients(), dense(model, gradients), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_masks_with_holes_fall_back_to_packing():
    """A second turn behind right padding leaves holes; blocks are then over the real tokens, as in one row alone."""
    model = moba(plan=MoBAPlan(block_size=4, topk=2))
    ids, mask = inputs("right")
    cache = MoBADynamicCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more, grown = inputs(tokens=5, seed=2)[0], F.pad(mask, (0, 5), value=1)
    logits = model(more, attention_mask=grown, past_key_values=cache, position_ids=positions_of(grown)[:, -5:]).logits
    for row in range(2):
        alone = torch.cat([ids[row][mask[row].bool()], more[row]])[None]
        torch.testing.assert_close(logits[row], model(alone).logits[0, -5:], **CLOSE)


def test_encoder_is_bidirectional():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=VOCAB, attention_probs_dropout_prob=0.0, **sizes)
    model = transformers.BertModel(config).eval()
    ids, mask = inputs("right")
    real = mask.bool()
    expected = model(ids, attention_mask=mask).last_hidden_state
    set_plan(model, MoBAPlan(block_size=4, topk=8))
    for implementation in ("attnlab_moba", "attnlab_full"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[real], expected[real], **CLOSE)
    model.set_attn_implementation("attnlab_moba")
    set_plan(model, MoBAPlan(block_size=4, topk=2))
    row = model(ids[1:, :20], attention_mask=mask[1:, :20]).last_hidden_state
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[1:, :20], row, **CLOSE)


def _image_blocks(model, ids):
    from transformers.masking_utils import create_causal_mask

    groups = torch.full(ids.shape, -1)
    groups[:, 2:6] = 0
    embeds = model.get_input_embeddings()(ids)
    create_causal_mask(model.config, embeds, None, None, block_sequence_ids=groups)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, ids: m(ids, attention_mask=torch.ones(2, 1, 29, 29) > 0),
            "custom attention masks are not supported",
        ),
        (lambda m, ids: m(ids, softcap=30.0), "soft-capping is not supported"),
        (lambda m, ids: m(ids, position_bias=torch.zeros(1)), "position biases"),
        (lambda m, ids: m.train()(ids), "attention dropout is not supported, got 0.5"),
        (lambda m, ids: m(ids, cu_seq_lens_q=torch.tensor([0, 29])), "must be given together"),
        (_image_blocks, "masks built with or_masks"),
    ],
    ids=["4-D mask", "softcap", "position bias", "dropout", "cu_seq_lens", "image blocks"],
)
def test_refused(call, message):
    model = moba(attention_dropout=0.5)
    with pytest.raises(ValueError, match=message):
        call(model, inputs()[0])
