"""Caches that take over a dense prefill go on as if it had been theirs; and what a `WaveCache` counts."""

import pytest
import torch

from attnlab import WaveConfig, wave_attention

transformers = pytest.importorskip("transformers")

from attnlab.hf import MoBADynamicCache, MoBAPlan, WaveCache, set_plan, wave_cache  # noqa: E402
from tests.hf_models import build, dense, inputs  # noqa: E402

WAVE = WaveConfig(sink=2, local=4, segment=32, tokens_per_cluster=4, iterations=3, update_every=8, retrieval_ratio=0.2)
PROMPT = 40
IDS = inputs(tokens=PROMPT + 14)[0]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prefilled(model, cache, tokens=PROMPT):
    model(IDS[:, :tokens], past_key_values=cache)
    return cache


def steps(model, cache):
    return torch.stack([model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, PROMPT + 14)])


def models(kind, name):
    model = build(kind)
    model.set_attn_implementation(f"attnlab_{name}")
    model = model if kind == "gpt_oss" else model.double()
    if name == "moba":
        set_plan(model, MoBAPlan(block_size=4, topk=2, phase="decode"))
        return model, lambda **options: MoBADynamicCache(model.config, **options)
    return model, lambda **options: WaveCache(model.config, WAVE, **dict(max_length=64) | options)


@pytest.mark.parametrize("kind", ["llama", "smollm3", "gpt_oss"])
@pytest.mark.parametrize("name", ["moba", "wave"])
def test_goes_on_as_if_it_had_been_prefilled(name, kind):
    model, make = models(kind, name)
    plain = dense(model, lambda: prefilled(model, transformers.DynamicCache(config=model.config)))
    held = [layer.keys.clone() for layer in plain.layers]
    cache = make()
    cache.take_over(plain)
    assert cache.get_seq_length() == PROMPT
    want = steps(model, prefilled(model, make()))
    close = dict(rtol=1e-4, atol=1e-4) if kind == "gpt_oss" else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps(model, cache), want, **close)
    everything = dense(model, lambda: steps(model, prefilled(model, transformers.DynamicCache(config=model.config))))
    assert not torch.allclose(want, everything, **close)  # it was sparse
    assert all(torch.equal(x, layer.keys) for x, layer in zip(held, plain.layers, strict=True))


def test_full_layers_and_what_is_refused():
    model, make = models("llama", "wave")
    plain = dense(model, lambda: prefilled(model, transformers.DynamicCache(config=model.config)))
    cache = make(full_layers=[0])
    cache.take_over(plain)
    torch.testing.assert_close(steps(model, cache), steps(model, prefilled(model, make(full_layers=[0]))))
    for change, message in (
        (lambda: cache.take_over(plain), "this cache must be empty, it holds 54 tokens"),
        (lambda: make(max_length=39).take_over(plain), "40 tokens pass max_length=39"),
        (lambda: make().take_over(transformers.DynamicCache()), "dense must have 3 layers, got 0"),
        (lambda: make().take_over(transformers.DynamicCache(config=model.config)), "layer 0 must be a filled Dynamic"),
        (lambda: make().take_over(prefilled(model, make())), "filled DynamicLayer, got WaveLayer"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    with pytest.raises(TypeError, match="dense must be a transformers DynamicCache, got int"):
        make().take_over(3)


@pytest.mark.parametrize("selector", ["wave", "full", "oracle", "quest", "cluster", "random"])
def test_selectors_and_counts_of_what_they_read(selector, monkeypatch):
    """Against the masks of the reference, on the very queries."""
    model, make = models("llama", "wave")
    asked = dict(selector=selector, token_budget=None if selector in ("wave", "full") else 0.2)
    cache, shares, seeds = make(track_reads=True, **asked), [], set()

    def spy(q, index, **options):
        found = wave_attention(q, index, **options)
        _, _, read = wave_attention(q, index, **options | dict(backend="reference"))
        shares.append(read.sum(-1).double().mean(1) / index.store.lengths)
        assert {name: options[name] for name in asked} == asked
        seeds.add(options["seed"])
        return found

    monkeypatch.setattr(wave_cache, "wave_attention", spy)
    prefilled(model, cache)
    steps(model, cache)
    want = torch.stack(shares).view(14, 3, 2).mean(1)
    torch.testing.assert_close(cache.read_shares().double(), want, rtol=1e-6, atol=0)
    assert (want == 1).all() if selector == "full" else (want < 0.8).all()
    assert seeds == {0, 1, 2}
    cache.reset()
    assert cache.read_shares().numel() == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(selector="quest"), ValueError, "WaveCache: selector='quest' needs token_budget"),
        (dict(selector="best", token_budget=0.1), ValueError, "WaveCache: selector must be one of"),
        (dict(selector="oracle", token_budget=2), ValueError, r"WaveCache: token_budget must be in \(0, 1\], got 2"),
        (dict(selector="full", device_budget=0.5), ValueError, "device_budget needs selector='wave'"),
        (dict(track_reads=1), TypeError, "WaveCache: track_reads must be"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        models("llama", "wave")[1](**options)
    with pytest.raises(ValueError, match="track_reads must be True"):
        models("llama", "wave")[1]().read_shares()
