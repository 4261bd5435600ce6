"""Rotary positions: against the definitions in float64, and against what transformers computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CohereConfig, LlamaConfig, StableLmConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.stablelm import modeling_stablelm

from attnlab.reference import rope as reference
from attnlab.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
    apply_rope,
    shift_rope,
)

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn-given": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def llama(name: str, head_dim: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_theta": 500000.0, **SCALINGS[name]},
    )


def true_frequencies(config: RopeConfig, seq_len: int = 0) -> list[float]:
    theta, dim, s = config.theta, config.dim, config.scaling
    if isinstance(s, LinearScaling):
        return reference.linear_frequencies(theta, dim, s.factor)
    if isinstance(s, DynamicScaling):
        return reference.dynamic_frequencies(theta, dim, s.factor, s.max_position_embeddings, seq_len)
    if isinstance(s, YarnScaling):
        length = s.original_max_position_embeddings
        return reference.yarn_frequencies(theta, dim, s.factor, length, s.beta_fast, s.beta_slow, s.truncate)
    if isinstance(s, Llama3Scaling):
        length = s.original_max_position_embeddings
        return reference.llama3_frequencies(theta, dim, s.factor, length, s.low_freq_factor, s.high_freq_factor)
    return reference.default_frequencies(theta, dim)


def heads(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("seq_len", [100, 32768, 100000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, seq_len: int, head_dim: int) -> None:
    theirs = llama(name, head_dim)
    init = ROPE_INIT_FUNCTIONS.get(
        SCALINGS[name]["rope_type"], modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    inverse, factor = init(theirs, device=torch.device("cpu"), seq_len=seq_len)
    ours = RopeConfig.from_transformers(theirs)
    assert torch.equal(ours.inverse_frequencies(seq_len=seq_len), inverse)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_reference(name: str) -> None:
    config = RopeConfig.from_transformers(llama(name))
    ours = config.inverse_frequencies(seq_len=70000, dtype=torch.float64)
    exact = torch.tensor(true_frequencies(config, 70000), dtype=torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, None), (64, 32), (80, 20), (6, 2), (2, None)])
@pytest.mark.parametrize("batched", [False, True])
def test_apply_equals_reference(head_dim: int, rotary_dim: int | None, interleaved: bool, batched: bool) -> None:
    config = RopeConfig(10000.0, head_dim, rotary_dim, interleaved, YarnScaling(4.0, 64))
    x = heads(2, 9, 3, head_dim)
    positions = torch.randint(0, 5000, (2, 9) if batched else (9,), generator=torch.Generator().manual_seed(1))
    truth = reference.apply_rope(x, positions, true_frequencies(config), config.attention_factor, interleaved)
    torch.testing.assert_close(apply_rope(x, positions, config), truth, rtol=1e-9, atol=1e-9)
    assert torch.equal(apply_rope(x, positions, config)[..., config.dim :], x[..., config.dim :])
    # An angle up to 5000 radians carries half a unit in the last place from its product and one from its frequency.
    torch.testing.assert_close(apply_rope(x.float(), positions, config), truth.float(), rtol=0, atol=5000 * 2**-22)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding(dtype: torch.dtype) -> None:
    config = RopeConfig(10000.0, 64)
    x, positions = heads(1, 50, 2, 64, dtype=dtype), torch.arange(50)
    assert torch.equal(apply_rope(x, positions, config), apply_rope(x.float(), positions, config).to(dtype))
    assert torch.equal(shift_rope(x, 7, config), shift_rope(x.float(), 7, config).to(dtype))


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "yarn-tuned", "llama3"])
def test_apply_equals_llama(name: str) -> None:
    theirs = llama(name)
    x, positions = heads(2, 33, 4, 64, dtype=torch.float32), torch.arange(66).view(2, 33) * 991
    cos, sin = modeling_llama.LlamaRotaryEmbedding(theirs)(x, positions)
    expected, _ = modeling_llama.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    ours = apply_rope(x, positions, RopeConfig.from_transformers(theirs))
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_apply_equals_cohere_interleaved() -> None:
    theirs = CohereConfig(hidden_size=256, num_attention_heads=4)
    x, positions = heads(2, 33, 4, 64, dtype=torch.float32), torch.arange(33)[None].expand(2, -1)
    cos, sin = modeling_cohere.CohereRotaryEmbedding(theirs)(x, positions)
    expected, _ = modeling_cohere.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    ours = apply_rope(x, positions, RopeConfig.from_transformers(theirs))
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_apply_equals_stablelm_partial() -> None:
    theirs = StableLmConfig(hidden_size=320, num_attention_heads=4, partial_rotary_factor=0.25)
    config = RopeConfig.from_transformers(theirs)
    assert (config.head_dim, config.dim) == (80, 20)
    x, positions = heads(1, 33, 4, 80, dtype=torch.float32), torch.arange(33)[None]
    cos, sin = modeling_stablelm.StableLmRotaryEmbedding(theirs)(x, positions)
    turned = x[..., :20].transpose(1, 2)
    expected, _ = modeling_stablelm.apply_rotary_pos_emb(turned, turned, cos, sin)
    ours = apply_rope(x, positions, config)[..., :20]
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-6)


@given(
    old=st.integers(0, 100_000),
    new=st.integers(0, 100_000),
    interleaved=st.booleans(),
    name=st.sampled_from(sorted(SCALINGS)),
)
def test_shift_moves_keys(old: int, new: int, interleaved: bool, name: str) -> None:
    config = RopeConfig.from_transformers(llama(name), interleaved=interleaved)
    x = heads(1, 5, 2, 64)
    before, after = old + torch.arange(5), new + torch.arange(5)
    truth = apply_rope(x, after, config, seq_len=100_005)
    rotated = apply_rope(x, before, config, seq_len=100_005)
    for shift in (new - old, after - before, (before, after), (before[None], after)):
        torch.testing.assert_close(shift_rope(rotated, shift, config, seq_len=100_005), truth, rtol=0, atol=1e-9)
    frequencies = true_frequencies(config, 100_005)
    slow = reference.shift_rope(rotated, after - before, frequencies, interleaved)
    torch.testing.assert_close(slow, truth, rtol=0, atol=1e-9)
    single = apply_rope(x.float(), before, config, seq_len=100_005)
    moved = shift_rope(single, (before, after), config, seq_len=100_005)
    torch.testing.assert_close(moved, apply_rope(x.float(), after, config, seq_len=100_005), rtol=0, atol=1e-5)


def test_gradient_is_the_inverse_turn() -> None:
    config = RopeConfig(10000.0, 12, 8, True)
    x = heads(1, 4, 2, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, torch.arange(4), config), (x,))
    assert torch.autograd.gradcheck(lambda x: shift_rope(x, 3, config), (x,))


def test_compiles_as_one_graph() -> None:
    config = RopeConfig(10000.0, 16, 8, scaling=YarnScaling(4.0, 64))
    fn = torch.compile(lambda x, p: apply_rope(x, p, config), fullgraph=True, backend="aot_eager")
    x = heads(1, 6, 2, 16, dtype=torch.float32)
    torch.testing.assert_close(fn(x, torch.arange(6)), apply_rope(x, torch.arange(6), config))


def test_reads_old_and_new_configurations() -> None:
    old = {"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e4, "max_position_embeddings": 4096}
    assert RopeConfig.from_transformers(old) == RopeConfig(1e4, 64)
    linear = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 32}
    assert RopeConfig.from_transformers(linear) == RopeConfig(1e4, 32, scaling=LinearScaling(2.0))
    yarn = {**old, "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}}
    assert RopeConfig.from_transformers(yarn).scaling == YarnScaling(4.0, 1024)
    layers = {
        **old,
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
    }
    assert RopeConfig.from_transformers(layers, layer_type="full_attention").theta == 1e6
    assert RopeConfig.from_transformers({**old, "rope_interleave": True}).interleaved
    assert not RopeConfig.from_transformers({**old, "model_type": "cohere"}, interleaved=False).interleaved


X = torch.zeros(2, 3, 1, 8)
P = torch.arange(3)
OLD = {"hidden_size": 8, "num_attention_heads": 1}
BAD = [
    (lambda: RopeConfig(0.0, 8), ValueError, "theta must be a positive number, got 0.0"),
    (lambda: RopeConfig(1e4, 8.0), TypeError, "head_dim must be a positive int, got 8.0"),
    (lambda: RopeConfig(1e4, 7), ValueError, "rotary_dim must be even and at most head_dim=7, got 7"),
    (lambda: RopeConfig(1e4, 8, 10), ValueError, "rotary_dim must be even and at most head_dim=8, got 10"),
    (lambda: RopeConfig(1e4, 8, scaling="linear"), TypeError, "scaling must be a LinearScaling"),
    (lambda: RopeConfig(1e4, 8, scaling=LinearScaling(-1.0)), ValueError, "factor must be a positive number, got -1.0"),
    (lambda: RopeConfig(1e4, 2, scaling=DynamicScaling(2.0, 64)), ValueError, "dynamic scaling needs rotary_dim > 2"),
    (lambda: RopeConfig(1e4, 8, scaling=Llama3Scaling(8.0, 4.0, 1.0, 64)), ValueError, "0 < low_freq_factor < high"),
    (lambda: apply_rope(X, P, RopeConfig(1e4, 8, scaling=DynamicScaling(2.0, 64))), ValueError, "needs seq_len"),
    (lambda: apply_rope([1.0], P, RopeConfig(1e4, 8)), TypeError, "expected a Tensor .* got list"),
    (lambda: apply_rope(X.int(), P, RopeConfig(1e4, 8)), TypeError, "floating-point Tensor, got torch.int32"),
    (lambda: apply_rope(X[0], P, RopeConfig(1e4, 8)), ValueError, r"shape \[B, T, H, 8\], got \[3, 1, 8\]"),
    (lambda: apply_rope(X, P, RopeConfig(1e4, 16)), ValueError, r"shape \[B, T, H, 16\], got \[2, 3, 1, 8\]"),
    (lambda: apply_rope(X, P.float(), RopeConfig(1e4, 8)), TypeError, "positions must have an integer dtype"),
    (lambda: apply_rope(X, 3, RopeConfig(1e4, 8)), TypeError, "positions must be an integer Tensor, got int"),
    (lambda: apply_rope(X, P[:2], RopeConfig(1e4, 8)), ValueError, r"shape \[3\] or \[2, 3\], got \[2\]"),
    (lambda: apply_rope(X, P.to("meta"), RopeConfig(1e4, 8)), ValueError, "positions must be on cpu, got meta"),
    (lambda: shift_rope(X, 1.5, RopeConfig(1e4, 8)), TypeError, "shift must be an integer Tensor, got float"),
    (lambda: shift_rope(X, (P, P, P), RopeConfig(1e4, 8)), ValueError, "got 3 items"),
    (lambda: shift_rope(X, (P, P[:1]), RopeConfig(1e4, 8)), ValueError, r"to must have shape \[3\]"),
    (lambda: RopeConfig.from_transformers(OLD), ValueError, "has no rope_theta"),
    (
        lambda: RopeConfig.from_transformers({**OLD, "rope_theta": 1e4, "rope_scaling": {"type": "longrope"}}),
        ValueError,
        "rope_type must be default, linear, dynamic, yarn or llama3, got 'longrope'",
    ),
    (
        lambda: RopeConfig.from_transformers({**OLD, "rope_parameters": {"full": {"rope_theta": 1.0}}}),
        ValueError,
        r"give layer_type, one of \['full'\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
