"""The transformers models that FusionRAG and Lamina run themselves: what they read of them."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .dispatch import check_ints
from .rope import DynamicScaling, LinearScaling, RopeConfig, YarnScaling

MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_busy: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_busy_lock = threading.Lock()


class Limit(NamedTuple):
    """The most tokens a sequence may have, and why."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class ModelFacts:
    """What a method needs to know of a model.

    Attributes:
        rope: the model's at every length that `limits` allow.
        rotary: of each layer, whether it turns its queries and keys by their positions; SmolLM3 has layers that do not.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope: RopeConfig
    rotary: tuple[bool, ...]
    limits: tuple[Limit, ...]
    device: torch.device

    @property
    def turned(self) -> slice | list[int]:
        """Index of the layers that have rotary positions."""
        return slice(None) if all(self.rotary) else [i for i, turns in enumerate(self.rotary) if turns]

    def check_length(self, fn: str, what: str, tokens: int) -> None:
        """ValueError when a sequence of `tokens` tokens is longer than the model can take."""
        for limit in self.limits:
            if tokens > limit.tokens:
                raise ValueError(f"{fn}: {what}: {tokens} tokens, over {limit.tokens}: {limit.reason}")

    def check_ids(self, fn: str, name: str, ids: Any) -> tuple[int, ...]:
        """Token ids, a sequence of ints or an integer tensor `[T]`, as a tuple. TypeError or ValueError if not."""
        found = tuple(check_ints(fn, name, ids))
        if found and not 0 <= min(found) <= max(found) < self.vocab:
            wrong = next(i for i in found if not 0 <= i < self.vocab)
            raise ValueError(f"{fn}: {name} must hold token ids in [0, {self.vocab}), got {wrong}")
        return found


def model_facts(fn: str, model: Any) -> ModelFacts:
    """Read a transformers model of a type in `MODELS`.

    Raises TypeError on what is no transformers model, and ValueError on another type, on layers that neither see all
    tokens nor a window of them, on rotary positions this library does not have, and on ones that were rounded.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise TypeError(f"{fn}: model must be a transformers model, got {type(model).__name__}")
    if config.model_type not in MODELS:
        raise ValueError(f"{fn}: model must be of type {', '.join(MODELS)}, got {config.model_type!r}")
    if not hasattr(getattr(model, "base_model", None), "rotary_emb"):
        raise TypeError(f"{fn}: model must be a transformers model without adapters, got {type(model).__name__}")
    rope = RopeConfig.from_transformers(config)
    limits = tuple(limit for limit in (_context(config, rope), _window(fn, config)) if limit is not None)
    if isinstance(rope.scaling, DynamicScaling):
        rope = replace(rope, scaling=None)
    weights = model.get_input_embeddings().weight
    if elsewhere := {p.device for p in model.base_model.parameters()} - {weights.device}:
        raise ValueError(f"{fn}: model must be on one device, got {weights.device} and {elsewhere.pop()}")
    _check_frequencies(fn, model.base_model.rotary_emb, rope)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    rotary = (True,) * layers
    if config.model_type == "smollm3":
        rotary = tuple(map(bool, config.no_rope_layers[:layers]))  # 1: with rotary positions
    return ModelFacts(
        layers, heads, config.num_key_value_heads or heads, rope.head_dim, weights.shape[0], rope, rotary, limits,
        weights.device,
    )  # fmt: skip


@contextmanager
def dense(model: Any) -> Iterator[None]:
    """Without gradients, autocast, dropout and sparse attention; what was changed for that is put back.

    One thread at a time has a model so.
    """
    with _busy_lock:
        turn = _busy.setdefault(model.base_model, threading.RLock())
    device = model.get_input_embeddings().weight.device.type
    with turn, torch.no_grad(), torch.autocast(device, enabled=False), _quiet(model):
        yield


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    chosen = model.config._attn_implementation
    sparse = str(chosen).startswith("attnlab_") and chosen != "attnlab_full"
    try:
        for module in training:
            module.training = False
        if sparse:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if sparse:
            model.set_attn_implementation(chosen)
        for module in training:
            module.training = True


def context_length(config: Any) -> int | None:
    """Tokens a sequence of a transformers model may have, from its configuration; None where that does not say.

    Linear and YaRN scaling stretch the length in the configuration; llama3's is what it was stretched to. Under dynamic
    scaling, beyond it cached keys would not fit; under scaling of another kind it is taken as it stands.
    """
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        return None
    try:
        scaling = RopeConfig.from_transformers(config).scaling
    except ValueError:
        return length
    return _stretched(length, scaling)


def _stretched(length: int, scaling: Any) -> int:
    if isinstance(scaling, LinearScaling):
        return int(length * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(length, int(scaling.original_max_position_embeddings * scaling.factor))
    return length


def _context(config: Any, rope: RopeConfig) -> Limit:
    length = config.max_position_embeddings
    if isinstance(rope.scaling, DynamicScaling):
        return Limit(
            length,
            "beyond it dynamic NTK scaling turns all keys anew as the sequence grows, and stored ones do not fit",
        )
    return Limit(_stretched(length, rope.scaling), "the model's context")


def _window(fn: str, config: Any) -> Limit | None:
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{fn}: layer_types must be full_attention or sliding_attention, got {other.pop()!r}")
    window = getattr(config, "sliding_window", None)
    if window is None or "sliding_attention" not in kinds:
        return None
    return Limit(window, "the model's sliding window, behind which recomputed tokens would miss keys")


def _check_frequencies(fn: str, rotary: Any, rope: RopeConfig) -> None:
    """Angles of stored keys are computed from the configuration, so the model must turn its keys by the same ones."""
    # Dynamic scaling replaces `inv_freq` while a sequence is long, and puts the original back for the next.
    held = rotary.original_inv_freq if rotary.rope_type == "dynamic" else rotary.inv_freq
    wanted = rope.inverse_frequencies()
    if held.shape != wanted.shape or not torch.allclose(held.float().cpu(), wanted, rtol=1e-5, atol=0):
        raise ValueError(
            f"{fn}: model's rotary frequencies differ from its configuration's. model.to(dtype), .half() and "
            ".bfloat16() round them: make it in its dtype instead, by from_pretrained(..., dtype=...)"
        )
