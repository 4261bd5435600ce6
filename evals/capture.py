"""What a transformers model hands to its attention function, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "attnlab_capture"


class Layer(NamedTuple):
    """`q [B, Tq, Hq, D]`, `k, v [B, T, Hkv, D]` after rotary embedding; `q` are the last tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def captured(model: Any, ids: Tensor, queries: int | None = None, positions: Tensor | None = None) -> list[Layer]:
    """Each layer's attention inputs in one pass over `ids [B, T]`, itself dense.

    Args:
        queries: how many of the last queries to keep; all by default.
        positions: of the tokens, `[B, T]`; 0, 1, ... by default.
    """
    taken: list[Layer] = []
    with torch.no_grad(), _capturing(model, taken, queries or ids.shape[1]):
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return taken


@contextmanager
def _capturing(model: Any, taken: list[Layer], queries: int) -> Iterator[None]:
    """The model's own attention is put back, whatever happens."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (query[:, :, -queries:], key, value))
        scale = options.get("scaling")
        taken.append(Layer(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, capture)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
