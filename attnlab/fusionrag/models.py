"""Keys and values of chunks, from a transformers model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoder_models import ModelFacts, dense


class KV(NamedTuple):
    """Keys, turned for their positions, and values: `[layers, tokens, Hkv, D]`."""

    k: Tensor
    v: Tensor


def run_behind(model: Any, past: Sequence[KV], ids: Sequence[int]) -> KV:
    """Keys and values of the tokens `ids`, at the positions behind those of `past`, which they attend to.

    One sequence at a time: with others beside it the last bits of a product differ, and a run that was cut short could
    not go on as if nothing had happened.
    """
    from transformers import DynamicCache

    cache, start = DynamicCache(), sum(kv.k.shape[1] for kv in past)
    if start:
        for i, (k, v) in enumerate(zip(*(torch.cat(x, 1).transpose(1, 2) for x in zip(*past)))):
            cache.update(k[None], v[None], i)
    device = model.get_input_embeddings().weight.device
    with dense(model):
        model.base_model(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
    k, v = (
        torch.stack([getattr(layer, name)[0, :, start:].transpose(0, 1) for layer in cache.layers])
        for name in ("keys", "values")
    )
    return KV(k, v)


def system_kv(model: Any, facts: ModelFacts, system: Sequence[int]) -> KV:
    """The system prompt's keys and values, of no tokens where there is no prompt."""
    if system:
        return run_behind(model, (), system)
    none = torch.zeros(facts.layers, 0, facts.kv_heads, facts.head_dim, dtype=model.dtype, device=facts.device)
    return KV(none, none)


def chunk_kv(model: Any, facts: ModelFacts, system: KV, ids: Sequence[int]) -> KV:
    """A chunk's keys and values behind the system prompt alone, as a store holds them. ValueError if it is too long."""
    facts.check_length("chunk_kv", "system prompt and chunk", system.k.shape[1] + len(ids))
    return run_behind(model, (system,), ids)
