"""`attn_implementation="attnlab_split"`: a cache divided by any plan answers as a whole one."""

import json

import pytest
import torch

from attnlab import SplitPlan

transformers = pytest.importorskip("transformers")

from attnlab.hf import attention, get_split, set_split  # noqa: E402
from tests.hf_models import CLOSE, build, dense, generate, inputs  # noqa: E402

PLANS = [
    SplitPlan("head", 2),
    SplitPlan("head", 3, sizes=(2, 0, 0)),
    SplitPlan("request", 3),
    SplitPlan("sequence", 2, block=4),
    SplitPlan("sequence", 3, sizes=(3, 0, 1), block=1),
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def split(plan, kind="llama", **changes):
    model = build(kind, **changes)
    model.set_attn_implementation("attnlab_split")
    set_split(model, plan)
    return model


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_generates_like_dense(plan, padding, monkeypatch):
    calls = []
    step = attention.split_step
    monkeypatch.setattr(attention, "split_step", lambda *args: calls.append(args) or step(*args))
    model, (ids, mask) = split(plan), inputs(padding)
    expected = dense(model, lambda: generate(model, ids, mask))
    assert not calls
    found = generate(model, ids, mask)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    assert len(calls) == 3 * 11  # all layers, all tokens but the prompt's
    assert all(args[3] == plan and args[4] == (None if padding == "none" else (0, 9)) for args in calls)


@pytest.mark.parametrize("kind", ["smollm3", "gpt_oss"])
def test_layers_without_positions_with_windows_and_sinks(kind):
    model, (ids, mask) = split(PLANS[3], kind), inputs("left")
    expected = dense(model, lambda: generate(model, ids, mask))
    found = generate(model, ids, mask)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_beams_reorder_and_chunks_come_in():
    model, (ids, mask) = split(PLANS[4]), inputs("left")
    for options in (dict(num_beams=3), dict(prefill_chunk_size=7)):
        expected = dense(model, lambda options=options: generate(model, ids, mask, **options))
        assert torch.equal(generate(model, ids, mask, **options)[0], expected[0])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_is_kept_as_json(plan):
    model = split(plan)
    kept = json.loads(json.dumps(model.config.attnlab_split))
    model.config.attnlab_split = kept
    assert get_split(model) == plan
    set_split(model, None)
    assert get_split(model) is None and not hasattr(model.config, "attnlab_split")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: set_split(m, "head"), TypeError, "plan must be a SplitPlan or None, got str"),
        (lambda m: set_split(7, PLANS[0]), TypeError, "set_split: expected a transformers model or config, got int"),
        (lambda m: set_split(m, SplitPlan("head", 3)), ValueError, "shards must be at most the 2 KV heads, got 3"),
        (lambda m: (set_split(m, None), m(inputs()[0])), ValueError, r"attnlab_split: \w+ has no plan. Give it one"),
        (lambda m: generate(m, *inputs("right")), ValueError, "rows may be padded on the left only"),
    ],
)
def test_misuse(call, error, message):
    with pytest.raises(error, match=message):
        call(split(PLANS[0]))
