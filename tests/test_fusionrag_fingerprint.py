"""A model's fingerprint: equal for copies of one model, different for any other."""

import copy
from types import SimpleNamespace

import pytest
import torch

from attnlab.fusionrag import fingerprint
from attnlab.fusionrag.fingerprint import SAMPLE
from tests.hf_models import build


@pytest.fixture(scope="module")
def model():
    return build()


def test_copies_of_a_model_have_one_fingerprint(model, tmp_path):
    mark = fingerprint(model)
    assert len(mark) == 64 and mark == fingerprint(model) == fingerprint(build())
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    other.config.use_cache = False
    other.config.pad_token_id = 3
    assert fingerprint(other.train()) == mark
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert fingerprint(again) == mark
    assert fingerprint(torch.compile(again, backend="eager")) == mark
    again.model = torch.compile(again.model, backend="eager")
    assert fingerprint(again) == mark
    rows = copy.deepcopy(model)
    for parameter in rows.parameters():  # the same numbers, laid out otherwise
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
    assert fingerprint(rows) == mark


def test_entries_that_do_not_count_are_left_out_of_inner_configurations_too():
    layer, marks = torch.nn.Linear(2, 2), []
    for inner in ({"dtype": "float32", "size": 3}, {"dtype": None, "size": 3}, {"dtype": None, "size": 4}):
        layer.config = SimpleNamespace(to_dict=lambda inner=inner: {"text_config": inner})
        marks.append(fingerprint(layer))
    assert marks[0] == marks[1] != marks[2]


CHANGES = {
    "dtype": lambda m: m.bfloat16(),
    "class": lambda m: m.model,
    "config": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "nested config": lambda m: m.config.rope_parameters.update(rope_theta=5e5),
    "plan": lambda m: setattr(m.config, "attnlab_moba", {"block_size": 4, "topk": 2}),
    "a trained weight": lambda m: m.model.layers[2].mlp.up_proj.weight.data.mul_(1 + 2**-20),
    "one norm element": lambda m: m.model.layers[1].input_layernorm.weight.data[5].add_(1),
    "a further weight": lambda m: m.model.register_parameter("lora", torch.nn.Parameter(torch.ones(3))),
    "a buffer": lambda m: m.model.register_buffer("scale", torch.ones(3)),
    "order": lambda m: swap(m.model.layers[0].self_attn.k_proj, m.model.layers[0].self_attn.v_proj),
    "shape": lambda m: setattr(m.model.norm, "weight", torch.nn.Parameter(m.model.norm.weight.data[None])),
}


def swap(a, b):
    a.weight, b.weight = b.weight, a.weight


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another(model, change):
    other = copy.deepcopy(model)
    changed = CHANGES[change](other)
    assert fingerprint(changed if isinstance(changed, torch.nn.Module) else other) != fingerprint(model)


def test_the_sample_visits_every_column():
    layer = torch.nn.Linear(256, 4 * SAMPLE, bias=False)
    layer.config = build().config
    mark = fingerprint(layer)
    for column in range(0, 256, 5):
        layer.weight.data[:, column] += 1
        mark, before = fingerprint(layer), mark
        assert mark != before


def test_what_has_no_weights_to_read_is_refused(model):
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        fingerprint(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got LlamaConfig"):
        fingerprint(model.config)
    with pytest.raises(ValueError, match=r"weight model\.embed_tokens\.weight is on the meta device"):
        fingerprint(copy.deepcopy(model).to("meta"))
