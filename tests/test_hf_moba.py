"""`attn_implementation="attnlab_moba"` on real transformers models built from configs: random weights, float32."""

import pytest
import torch
import torch.nn.functional as F

import attnlab
import attnlab.hf as hf

transformers = pytest.importorskip("transformers")

from attnlab.hf import MoBADynamicCache, MoBAPlan, set_plan  # noqa: E402

hf.register()

VOCAB = 61
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 9}),
}
PADDING = {"none": (0, 0), "left": (9, 0), "right": (0, 9)}


def build(kind="llama", **changes):
    torch.manual_seed(0)
    name, extra = MODELS[kind]
    config = getattr(transformers, name)(**{**COMMON, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.5  # not the default, so that dropping it shows
    return model


def dense(model, call):
    """`call()` under transformers' own attention, then back to ours."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager" if model.config.model_type == "gpt_oss" else "sdpa")
    result = call()
    model.set_attn_implementation(ours)
    return result


def moba(kind="llama", plan=None, **changes):
    model = build(kind, **changes)
    model.set_attn_implementation("attnlab_moba")
    set_plan(model, plan or MoBAPlan(block_size=4, topk=2))
    return model


def inputs(padding="none", tokens=29, batch=2, seed=1):
    """`batch` rows; the last has the padding named."""
    ids = torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    left, right = PADDING[padding]
    mask[-1, :left] = 0
    mask[-1, tokens - right :] = 0
    return ids * mask, mask


def generate(model, ids, mask, cache=None, **options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        **options,
    )
    return out.sequences, torch.stack(out.scores, 1) if out.scores else None


def fresh(model, kind):
    return MoBADynamicCache(model.config) if kind == "moba" else transformers.DynamicCache(config=model.config)


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
        logits = model(tokens[:, :seen], attention_mask=grown, position_ids=_positions(grown), use_cache=False).logits
        torch.testing.assert_close(scores[:, step], logits[:, -1], **CLOSE)


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("cuts", [[29], [1, 28], [20, 3, 6], [5, 24], [17, 1, 1, 10]])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_prefill_in_chunks_equals_one_shot(padding, cuts):
    model = moba(plan=MoBAPlan(block_size=3, topk=2))
    ids, mask = inputs(padding)
    positions = _positions(mask)
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


def test_decode_reads_the_chosen_blocks_only():
    """Values of blocks no head chose are NaN; nothing of them comes out."""
    model = moba(plan=MoBAPlan(block_size=4, topk=2), num_hidden_layers=1)
    ids, mask = inputs("left", tokens=41)
    cache = MoBADynamicCache(model.config)
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, position_ids=_positions(mask)[:, :-1])
    seen = {}

    def spy(module, query, key, *args, **kwargs):
        seen["q"], seen["k"] = query.transpose(1, 2).clone(), key.transpose(1, 2).clone()
        return hf.attention.moba_forward(module, query, key, *args, **kwargs)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register("spy", hf.masks.padding_mask)
    model.set_attn_implementation("spy")
    last = {"attention_mask": mask, "past_key_values": cache, "position_ids": _positions(mask)[:, -1:]}
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


def test_masks_with_holes_fall_back_to_packing():
    """A second turn behind right padding leaves holes; blocks are then over the real tokens, as in one row alone."""
    model = moba(plan=MoBAPlan(block_size=4, topk=2))
    ids, mask = inputs("right")
    cache = MoBADynamicCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more, grown = inputs(tokens=5, seed=2)[0], F.pad(mask, (0, 5), value=1)
    logits = model(more, attention_mask=grown, past_key_values=cache, position_ids=_positions(grown)[:, -5:]).logits
    for row in range(2):
        alone = torch.cat([ids[row][mask[row].bool()], more[row]])[None]
        torch.testing.assert_close(logits[row], model(alone).logits[0, -5:], **CLOSE)


def test_plan_is_saved_with_the_model(tmp_path):
    plan = MoBAPlan(block_size=4, topk=2, full_layers=[0, 2], routing="group", local_blocks=1)
    model = moba(plan=plan)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnlab_moba")
    assert hf.get_plan(loaded) == plan == MoBAPlan.from_dict(plan.to_dict())
    for layer in loaded.model.layers:
        layer.self_attn.scaling = 0.5
    assert torch.equal(loaded(inputs()[0]).logits, model(inputs()[0]).logits)
    set_plan(loaded, None)
    assert hf.get_plan(loaded) is None


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


def test_plans_that_do_not_fit():
    model = build()
    with pytest.raises(ValueError, match="full_layers='last:4', but the model has 3 layers"):
        set_plan(model, MoBAPlan(block_size=4, topk=2, full_layers="last:4"))
    with pytest.raises(ValueError, match=r"names layers \[3\], but the model has 3 layers"):
        set_plan(model.config, MoBAPlan(block_size=4, topk=2, full_layers=[0, 3]))
    with pytest.raises(ValueError, match="no layer would be sparse"):
        set_plan(build("mistral", sliding_window=8), MoBAPlan(block_size=4, topk=2))
    with pytest.raises(TypeError, match="plan must be a MoBAPlan"):
        set_plan(model, 4)
    with pytest.raises(TypeError, match="expected a transformers model or config"):
        set_plan(torch.nn.Linear(1, 1), MoBAPlan(block_size=4, topk=2))
    with pytest.raises(ValueError, match="unknown fields"):
        MoBAPlan.from_dict({"block_size": 4, "topk": 2, "blocks": 1})


def test_a_model_without_a_plan_names_set_plan():
    model = build()
    model.set_attn_implementation("attnlab_moba")
    with pytest.raises(ValueError, match="set_plan"):
        model(inputs()[0])


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
