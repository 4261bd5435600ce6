"""Generation over a `WaveCache`, and what its layers do with padding, chunks, new turns and misuse."""

import copy

import pytest
import torch
import torch.nn.functional as F

import attnlab.kernels.retroinfer.portable_attend
from attnlab import WaveConfig, WaveIndex, full_attention, wave_attention
from attnlab.testing import assert_accurate

transformers = pytest.importorskip("transformers")

from types import SimpleNamespace  # noqa: E402

from attnlab.hf import MoBADynamicCache, MoBAPlan, WaveCache, attention, set_plan, wave_cache  # noqa: E402
from attnlab.hf.wave_cache import FullLayer, WaveLayer  # noqa: E402
from tests.hf_models import CLOSE as FLOAT32  # noqa: E402
from tests.hf_models import build, dense, generate, inputs, positions_of  # noqa: E402

SMALL = WaveConfig(sink=2, local=4, segment=32, tokens_per_cluster=4, iterations=3, update_every=8)
EVERYTHING = WaveConfig(**SMALL.__dict__ | dict(retrieval_ratio=1.0))
SPARSE = WaveConfig(**SMALL.__dict__ | dict(retrieval_ratio=0.2, estimation_ratio=0.3))
CLOSE = dict(rtol=1e-9, atol=1e-9)
MODULE = SimpleNamespace(is_causal=True, config=None)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def wave(kind="llama", **changes):
    model = build(kind, **changes)
    model.set_attn_implementation("attnlab_wave")
    return model if kind == "gpt_oss" else model.double()  # whose experts have no float64


def cache_of(model, config=EVERYTHING, **options):
    return WaveCache(model.config, config, **dict(max_length=128) | options)


def same(found, expected, kind="llama"):
    """The same tokens and scores; transformers hands the scores out in float32."""
    assert torch.equal(found[0], expected[0])
    close = FLOAT32 if kind == "gpt_oss" else dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], **close)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_oss"])
def test_everything_retrieved_generates_like_dense(kind, padding):
    """Over five updates of the index; gpt_oss has attention sinks, and windows in every other layer."""
    model, (ids, mask) = wave(kind), inputs(padding)
    expected = dense(model, lambda: generate(model, ids, mask, max_new_tokens=48))
    cache = cache_of(model)
    same(generate(model, ids, mask, cache, max_new_tokens=48), expected, kind)
    index = cache.layers[-1 if kind == "llama" else 1].index
    real = mask.sum(1).tolist()
    assert list(index.lengths) == [n + 47 for n in real]
    assert all(i >= n - 6 + 5 * 8 for i, n in zip(index.indexed, real, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 28])
def test_prompts_in_chunks(chunk):
    model, (ids, mask) = wave(), inputs("left")
    expected = dense(model, lambda: generate(model, ids, mask))
    same(generate(model, ids, mask, cache_of(model), prefill_chunk_size=chunk), expected)


def test_a_second_turn_with_padding_between():
    model, (ids, mask), plain = wave(), inputs("left"), transformers.DynamicCache
    more, gap = inputs(tokens=11, seed=2)
    gap[0, :4] = 0
    cache = cache_of(model)
    turns = []
    for kept in (cache, plain(config=model.config)):
        run = (lambda call: call()) if kept is cache else (lambda call: dense(model, call))
        first, _ = run(lambda kept=kept: generate(model, ids, mask, kept, max_new_tokens=20))
        longer, seen = torch.cat([first, more * gap], 1), torch.cat([F.pad(mask, (0, 20), value=1), gap], 1)
        turns.append(run(lambda kept=kept, x=longer, seen=seen: generate(model, x, seen, kept, max_new_tokens=20)))
    same(*turns)
    assert cache.layers[0].index.lengths == (29 + 20 + 7 + 19, 20 + 20 + 11 + 19)


def test_reset_and_reuse_is_a_fresh_cache():
    model, (ids, mask) = wave(), inputs("left")
    cache = cache_of(model, SPARSE)
    first = generate(model, ids, mask, cache)
    places = [layer.index.store.k.data_ptr() for layer in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = generate(model, ids, mask, cache)
    assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    assert [layer.index.store.k.data_ptr() for layer in cache.layers] == places
    cache.reset()
    alone = generate(model, ids[:1], mask[:1], cache)
    assert all(torch.equal(x, y) for x, y in zip(alone, generate(model, ids[:1], mask[:1], cache_of(model, SPARSE))))


def test_a_copied_prefix_goes_on_alone():
    model, (ids, mask) = wave(), inputs("left")
    prefix = cache_of(model, SPARSE)
    model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions_of(mask)[:, :20], past_key_values=prefix)
    twin = copy.deepcopy(prefix)
    first = generate(model, ids, mask, prefix)
    again = generate(model, ids, mask, twin)
    assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    assert twin.layers[0].index.lengths == prefix.layers[0].index.lengths == (29 + 11, 20 + 11)


@pytest.mark.parametrize("change", [dict(meta_dtype="int8"), dict(clustering="faiss"), dict(max_cluster=5)], ids=str)
def test_options_reach_the_index(change):
    if "clustering" in change:
        pytest.importorskip("faiss")
    model, (ids, mask) = wave(), inputs("left")
    expected = dense(model, lambda: generate(model, ids, mask))
    cache = cache_of(model, WaveConfig(**EVERYTHING.__dict__ | change))
    same(generate(model, ids, mask, cache), expected)
    assert all(layer.index.config == cache.layers[0].config for layer in cache.layers)
    assert (cache.layers[0].index.store.centroids.dtype == torch.int8) == ("meta_dtype" in change)


def test_full_layers_stay_dense():
    nothing = WaveConfig(**SMALL.__dict__ | dict(retrieval_ratio=0.0, estimation="none"))
    model, (ids, mask) = wave(), inputs("left")
    expected = dense(model, lambda: generate(model, ids, mask))
    same(generate(model, ids, mask, cache_of(model, nothing, full_layers="first:3")), expected)
    cache = cache_of(model, nothing, full_layers=[0, 2])
    _, scores = generate(model, ids, mask, cache)
    assert [type(layer) for layer in cache.layers] == [FullLayer, WaveLayer, FullLayer]
    assert not torch.allclose(scores[:, 1:2], expected[1][:, 1:2], **CLOSE)
    assert torch.equal(scores[:, 0], generate(model, ids, mask, cache_of(model), max_new_tokens=1)[1][:, 0])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_without_a_cache_it_is_dense(padding):
    model, (ids, mask) = wave(), inputs(padding)
    options = dict(attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    expected = dense(model, lambda: model(ids, **options).logits)
    real = mask.bool()
    torch.testing.assert_close(model(ids, **options).logits[real], expected[real], rtol=1e-6, atol=1e-6)


def test_only_layers_without_a_window_have_an_index():
    kinds = [type(layer).__name__ for layer in cache_of(build("gpt_oss")).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "WaveLayer", "DynamicSlidingWindowLayer"]


def test_a_step_reads_the_chosen_clusters_only():
    """Keys and values of clusters no head chose are NaN; nothing of them comes out."""
    exact = WaveConfig(**SMALL.__dict__ | dict(retrieval_ratio=0.2, estimation="none"))
    model, (ids, mask) = wave(num_hidden_layers=1), inputs("left", tokens=61)
    seen = {"past_key_values": cache_of(model, exact), "position_ids": positions_of(mask)[:, :-1]}
    model(ids[:, :-1], attention_mask=mask[:, :-1], **seen)
    layer = seen["past_key_values"].layers[0]
    asked, portable = {}, attnlab.kernels.retroinfer.portable_attend

    def spy(q, store, query, spec, cache=None):
        asked["found"] = found = portable.attend(q, store, query, spec, cache=cache)
        return found

    def step(cache_layer):
        held = cache_of(model, exact)
        held.layers[0] = cache_layer
        last = {"attention_mask": mask, "past_key_values": held, "position_ids": positions_of(mask)[:, -1:]}
        return model(ids[:, -1:], **last).logits

    twin = cache_of(model, exact)
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=twin, position_ids=seen["position_ids"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlab.retroinfer._attend", lambda backend: spy)
        clean = step(twin.layers[0])
    store, chosen, read = layer.index.store, asked["found"].chosen, 0
    for b in range(2):
        for g in range(2):
            slots = set(range(layer.index.clusters[b])) - set(chosen[b, g].tolist())
            read += len(set(chosen[b, g].tolist()) - {-1})
            for slot in slots:
                part = slice(*store.offsets[b, g, slot : slot + 2].tolist())
                store.k[b, g, part] = store.v[b, g, part] = torch.nan
    assert store.k.isnan().any() and torch.equal(step(layer), clean)
    counts = [max(1, int(0.2 * n + 0.5)) for n in layer.index.clusters]
    assert 0 < read <= 2 * sum(counts) and max(counts) < min(layer.index.clusters) / 2


def rows_of(x, mask):
    """The real tokens of each row of `x [B, H, T, D]`, `[t, H, D]`."""
    return [row.transpose(0, 1)[real.bool()] for row, real in zip(x, mask, strict=True)]


MASKS = {
    "left": lambda m: [m[b, : 9 * b].fill_(0) for b in range(3)],
    "right": lambda m: [m[b, 24 - 6 * b : 24].fill_(0) for b in range(3)],
    "holes": lambda m: [m[0, 30:33].fill_(0), m[1, 5:17].fill_(0), m[2, ::3].fill_(0)],
    "a row that starts late": lambda m: [m[0, :33].fill_(0)],
    "none": lambda m: None,
}


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("padding", MASKS)
def test_each_call_is_what_its_rows_ask_alone(padding, backend, monkeypatch):
    """A prompt, a step, two chunks, then steps over two updates: steps as `wave_attention`, chunks as dense."""
    asked = set()
    for module, name in ((attention, "full_attention"), (wave_cache, "wave_attention")):
        real = getattr(attnlab, name)
        spy = lambda *args, real=real, **options: asked.add(options["backend"]) or real(*args, **options)
        monkeypatch.setattr(module, name, spy)
    sizes = [24, 1, 6, 5] + [1] * 20
    total = sum(sizes)
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(3, h, total, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.ones(3, total, dtype=torch.long)
    MASKS[padding](mask)
    sinks, options = torch.linspace(-1, 1, 4).double(), dict(scale=0.7)
    layer, alone, at = WaveLayer(SPARSE, total, backend), [None] * 3, 0
    for size in sizes:
        now, seen = slice(at, at + size), mask[:, : at + size]
        keys, values = layer.update(k[:, :, now].clone(), v[:, :, now].clone())
        given = None if seen.all() else seen.bool()
        out, _ = attention.wave_forward(MODULE, q[:, :, now], keys, values, given, scaling=0.7, s_aux=sinks)
        at += size
        held = [rows_of(x[:, :, :at], seen) for x in (k, v)]
        for b, queries in enumerate(rows_of(q[:, :, now], mask[:, now])):
            found, new = out[b][mask[b, now].bool()], len(queries)
            if new == 0:
                continue
            parts = [x[b][len(x[b]) - new :][None] for x in held]
            if alone[b] is None:
                alone[b] = WaveIndex(1, total, 2, 8, SPARSE, dtype=torch.float64, backend=backend)
            alone[b].append(*parts)
            if size > 1:
                whole = (x[b][None] for x in held)
                want = full_attention(queries[None], *whole, sinks=sinks, **options)[0]
            else:
                want, lse = wave_attention(queries[None], alone[b], return_lse=True, backend=backend, **options)
                want = (want / (1 + (sinks - lse).exp())[..., None])[0]
            torch.testing.assert_close(found, want, **CLOSE)
        assert layer.get_seq_length() == at and layer.get_mask_sizes(2) == (at + 2, 0)
    assert asked == {backend}
    assert max(alone[0].clusters) < max(alone[0].indexed)
    assert layer.index.lengths == tuple(mask.sum(1).tolist())
    assert all(torch.equal(layer.index.row(b)[0], rows_of(k, mask)[b]) for b in range(3))


@pytest.mark.parametrize("dim, heads, group", [(256, 1, 4), (40, 3, 1), (8, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_and_dtypes(dim, heads, group, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, dim, generator=g).to(dtype) for h in (heads * group, heads, heads))
    layer = WaveLayer(EVERYTHING, 40, "auto")
    for now in (slice(0, 39), slice(39, 40)):
        out, _ = attention.wave_forward(MODULE, q[:, :, now], *layer.update(k[:, :, now], v[:, :, now]), None)
    plain = F.scaled_dot_product_attention(q[:, :, 39:], k, v, enable_gqa=True)
    truth = F.scaled_dot_product_attention(*(x.double() for x in (q[:, :, 39:], k, v)), enable_gqa=True)
    assert_accurate(out, truth.transpose(1, 2), plain.transpose(1, 2))
    assert layer.index.store.k.dtype == dtype


def test_autocast_and_narrow_values():
    """Keys in float32 under autocast go in as bfloat16; values narrower than keys come out as they were."""
    k, v = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 5)
    layer = WaveLayer(EVERYTHING, 20, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        for now in (slice(0, 19), slice(19, 20)):
            out, _ = attention.wave_forward(MODULE, k[:, :, now], *layer.update(k[:, :, now], v[:, :, now]), None)
    assert layer.index.store.k.dtype == out.dtype == torch.bfloat16 and out.shape == (1, 1, 2, 5)
    want = F.scaled_dot_product_attention(k[:, :, 19:], k, v).transpose(1, 2)
    torch.testing.assert_close(out.float(), want, rtol=0.02, atol=0.02)


def test_over_max_length_leaves_the_cache_usable():
    model, (ids, mask) = wave(), inputs("left")
    cache = cache_of(model, max_length=30)
    expected = dense(model, lambda: generate(model, ids, mask, max_new_tokens=2))
    model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    with pytest.raises(ValueError, match="WaveCache: 29 tokens and 2 more pass max_length=30"):
        model(ids[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 29 and cache.get_max_length() == 30
    last = {"attention_mask": F.pad(mask, (0, 1), value=1), "position_ids": mask.sum(1, keepdim=True)}
    logits = model(expected[0][:, 29:30], past_key_values=cache, **last).logits
    torch.testing.assert_close(logits[:, -1].float(), expected[1][:, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c, x: m.generate(x, past_key_values=c, num_beams=2, max_new_tokens=3), "use num_beams=1"),
        (lambda m, c, x: (m(x, past_key_values=c), c.crop(-1)), r"cannot take tokens back \(assisted generation, crop"),
        (lambda m, c, x: c.batch_select_indices(torch.tensor([0])), r"cannot change its rows \(batch_select_indices\)"),
        (lambda m, c, x: c.batch_repeat_interleave(2), r"cannot change its rows \(batch_repeat_interleave\)"),
        (lambda m, c, x: c.layers[0].offload(), "cannot be offloaded"),
        (
            lambda m, c, x: (m(x, past_key_values=c), m(x, attention_mask=F.pad(x > 0, (7, 0)), past_key_values=c)),
            "mask shows 7 tokens of row 0, but 7 are held and 7 are new: what was shown once stays shown",
        ),
        (
            lambda m, c, x: (m(x, past_key_values=c), m(x[:1], past_key_values=c)),
            r"WaveIndex.append: k must have shape \[2, T, 2, 8\], got \[1, 7, 2, 8\]",
        ),
        (
            lambda m, c, x: m(x, past_key_values=c, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]])),
            "holds one sequence a row, got packed sequences",
        ),
        (
            lambda m, c, x: m(x, past_key_values=c, attention_mask=torch.ones(2, 1, 7, 7)),
            "custom attention masks are not supported",
        ),
        (lambda m, c, x: m.generate(x, max_new_tokens=3), "needs past_key_values=attnlab.hf.WaveCache"),
        (
            lambda m, c, x: m.generate(x, past_key_values=MoBADynamicCache(m.config), max_new_tokens=3),
            "needs past_key_values=attnlab.hf.WaveCache",
        ),
    ],
)
def test_misuse(call, message):
    model = wave()
    with pytest.raises(ValueError, match=message):
        call(model, cache_of(model), inputs(tokens=7)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdpa", "7 tokens were announced and never attended to: it needs attn_implementation='attnlab_wave'"),
        ("attnlab_moba", "attnlab_moba: a WaveCache needs attn_implementation='attnlab_wave'"),
        ("attnlab_full", "attnlab_full: a WaveCache needs attn_implementation='attnlab_wave'"),
    ],
)
def test_other_implementations_are_refused(name, message):
    model, (ids, _) = build(), inputs(tokens=7)
    set_plan(model, MoBAPlan(block_size=4, topk=2))
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, past_key_values=cache_of(model), max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sliding_window=4), "needs causal attention without a window in SimpleNamespace"),
        (dict(is_causal=False), "needs causal attention without a window in SimpleNamespace"),
        (dict(cu_seq_lens_q=torch.tensor([0, 5]), cu_seq_lens_k=torch.tensor([0, 5])), "got cu_seq_lens_q"),
        (dict(dropout=0.1), "attention dropout is not supported"),
        (dict(change=3), "5 tokens were announced, 3 came"),
    ],
)
def test_attention_refuses(options, message):
    x = torch.randn(1, 2, 5, 8)
    layer, change = WaveLayer(SMALL, 9, "auto"), options.pop("change", 5)
    keys, values = layer.update(x, x)
    if change != 5:
        keys, values = keys[:, :, :change], values[:, :, :change]
        keys._attnlab_wave = layer
    with pytest.raises(ValueError, match=message):
        attention.wave_forward(MODULE, x[:, :, :change], keys, values, None, **options)


def test_masks_of_another_length_or_kind_are_refused():
    x = torch.randn(1, 2, 5, 8)
    for mask, message in (
        (torch.ones(1, 7), "additive attention masks are not supported"),
        (torch.tensor([[0, 1, 1, 1, 1, 1]]), "the attention mask covers 6 tokens, but there are 10"),
        (-torch.ones(1, 10, dtype=torch.int32), "packed sequences cannot go on from a cache"),
    ):
        layer = WaveLayer(SMALL, 10, "auto")
        attention.wave_forward(MODULE, x, *layer.update(x.clone(), x), None)
        with pytest.raises(ValueError, match=message):
            attention.wave_forward(MODULE, x, *layer.update(x.clone(), x), mask)


def test_steps_want_no_gradient():
    x = torch.randn(1, 2, 5, 8)
    layer = WaveLayer(SMALL, 6, "auto")
    attention.wave_forward(MODULE, x, *layer.update(x, x), None)
    with torch.enable_grad(), pytest.raises(ValueError, match="decode under torch\\.no_grad"):
        one = x[:, :, :1].clone()
        attention.wave_forward(MODULE, one.requires_grad_(), *layer.update(one.detach().clone(), one), None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(config=None), TypeError, "config must be a transformers config, got NoneType"),
        (dict(wave={}), TypeError, "wave must be a WaveConfig, got dict"),
        (dict(max_length=0), ValueError, "max_length must be a positive int, got 0"),
        (dict(full_layers="last"), ValueError, "full_layers must be 'last:N'.* got 'last'"),
        (dict(full_layers="last:4"), ValueError, "full_layers='last:4', but the model has 3 layers"),
        (dict(full_layers=[3]), ValueError, r"full_layers names layers \[3\], but the model has 3 layers"),
    ],
)
def test_bad_caches(change, error, message):
    with pytest.raises(error, match=f"WaveCache: {message}"):
        WaveCache(**dict(config=build().config, max_length=9) | change)
    with pytest.raises(ValueError, match="WaveCache: no layer would be sparse"):
        WaveCache(build("mistral", sliding_window=8).config, max_length=9)
