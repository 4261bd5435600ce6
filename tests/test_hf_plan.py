"""Plans: what they refuse, how they are saved, and what does not fit a model."""

import copy
import json

import pytest
import torch

import attnlab.hf as hf

transformers = pytest.importorskip("transformers")

from attnlab.hf import MoBAPlan, set_plan  # noqa: E402
from attnlab.hf.plan import layer_plan  # noqa: E402
from tests.hf_models import build, inputs, moba  # noqa: E402


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_plan_is_saved_with_the_model(tmp_path):
    plan = MoBAPlan(block_size=4, topk=2, full_layers=[0, 2], routing="group", local_blocks=1)
    model = moba(plan=plan)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnlab_moba")
    assert hf.get_plan(loaded) == plan == MoBAPlan.from_dict(plan.to_dict())
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    for layer in loaded.model.layers:
        layer.self_attn.scaling = 0.5
    assert torch.equal(loaded(inputs()[0]).logits, model(inputs()[0]).logits)
    set_plan(loaded, None)
    assert hf.get_plan(loaded) is None


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
    with pytest.raises(ValueError, match="topk must be given"):
        MoBAPlan.from_dict({"block_size": 4})
    with pytest.raises(ValueError, match=r"full_layers needs PreTrainedConfig\.num_hidden_layers"):
        set_plan(transformers.PreTrainedConfig(), MoBAPlan(block_size=4, topk=2, full_layers="last:1"))


def test_a_plan_reaches_the_copies_of_a_config_that_modules_hold():
    model = build()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(model.config)
    plan = MoBAPlan(block_size=4, topk=2)
    set_plan(model, plan)
    assert layer_plan(attention) == plan
    set_plan(model, None)
    assert hf.get_plan(attention.config) is None


def test_full_layers_need_the_index_of_a_layer():
    attention = moba(plan=MoBAPlan(block_size=4, topk=2, full_layers="last:1")).model.layers[2].self_attn
    assert layer_plan(attention) is None
    attention.layer_idx = None
    with pytest.raises(ValueError, match=r"full_layers needs LlamaAttention\.layer_idx"):
        layer_plan(attention)


def test_a_model_without_a_plan_names_set_plan():
    model = build()
    model.set_attn_implementation("attnlab_moba")
    with pytest.raises(ValueError, match="set_plan"):
        model(inputs()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0, "topk": 2}, "block_size must be an int of at least 1, got 0"),
        ({"block_size": 4, "topk": True}, "topk must be an int of at least 1, got True"),
        ({"block_size": 4, "topk": 2, "sink_blocks": -1}, "sink_blocks must be an int of at least 0, got -1"),
        ({"block_size": 4, "topk": 2, "routing": "token"}, "routing must be one of 'head', 'group', got 'token'"),
        ({"block_size": 4, "topk": 2, "phase": "train"}, "phase must be one of .* got 'train'"),
        ({"block_size": 4, "topk": 2, "backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"block_size": 4, "topk": 2, "full_layers": "last"}, "full_layers must be .* got 'last'"),
        ({"block_size": 4, "topk": 2, "full_layers": [True]}, r"full_layers must be .* got \[True\]"),
        ({"block_size": 4, "topk": 2, "full_layers": [-1]}, r"full_layers must be .* got \[-1\]"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(ValueError, match=f"MoBAPlan: {message}"):
        MoBAPlan(**options)
