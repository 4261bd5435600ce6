"""The way into a transformers model: its own layers run, and the attention inside them is ours for one forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

NAME = "attnlab_fusion"
Watch = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""Called in every layer as `(layer, q [B, T, Hq, D], k, v [B, T, Hkv, D], scale)`, before attention."""


class Enough(Exception):
    """Raised by a watch that has seen all it needs: the rest of the forward is skipped."""


class Step(Protocol):
    """What attention does in one forward."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...


def run(model: Any, ids: Tensor, positions: Tensor, step: Step) -> Tensor:
    """Hidden states `[B, T, hidden]` of tokens `ids [B, T]` at `positions [B, T]` (-1: padding); none after `Enough`.

    No mask is made: the step knows what each row sees. The model's own attention is put back, whatever happens.
    """
    with _hooked(model.config):
        try:
            out = model.base_model(
                input_ids=ids,
                position_ids=positions.clamp(min=0),
                use_cache=False,
                output_attentions=False,
                output_hidden_states=False,
                return_dict=True,
                attnlab_step=step,
            )
        except Enough:
            return ids.new_empty(0)
    return out.last_hidden_state


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attnlab_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query [B, Hq, T, D]`, `key, value [B, Hkv, T, D]` -> `[B, T, Hq, D]`."""
    if attnlab_step is None:
        raise ValueError(f"{NAME}: this attention runs inside FusionRAG only; choose another attn_implementation")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attnlab_step.attend(int(module.layer_idx), q, k, v, scaling), None  # type: ignore[arg-type]


@contextmanager
def _hooked(config: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
