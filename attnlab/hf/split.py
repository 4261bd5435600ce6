"""Which shard attends to what when a model decodes under `attn_implementation="attnlab_split"`."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnlab.lamina.plan import SplitPlan
from attnlab.lamina.split import split_attention

from .plan import text_configs

KEY = "attnlab_split"


def set_split(model: Any, plan: SplitPlan | None) -> None:
    """Give a `SplitPlan` to a transformers model or config; None takes it away.

    The plan is kept as a plain dict in the text config, `config.attnlab_split`, and not in a cache: any dynamic cache
    serves, its rows may be reordered and cropped, and each step divides the keys it holds anew. Raises TypeError on
    what is no plan, ValueError when it cannot divide the model's KV heads.
    """
    if plan is not None and not isinstance(plan, SplitPlan):
        raise TypeError(f"set_split: plan must be a SplitPlan or None, got {type(plan).__name__}")
    configs = text_configs("set_split", model)
    heads = getattr(configs[0], "num_key_value_heads", None) or getattr(configs[0], "num_attention_heads", None)
    if plan is not None and plan.by == "head" and heads is not None:
        plan.head_bounds(heads)
    for config in configs:
        if plan is not None:
            sizes = None if plan.sizes is None else list(plan.sizes)
            setattr(config, KEY, {"by": plan.by, "shards": plan.shards, "sizes": sizes, "block": plan.block})
        elif hasattr(config, KEY):
            delattr(config, KEY)


def get_split(model: Any) -> SplitPlan | None:
    """The plan of a transformers model or config, or None."""
    return _plan(text_configs("get_split", model)[0])


def module_split(module: Any) -> SplitPlan:
    """The plan an attention module decodes under."""
    plan = _plan(getattr(module, "config", None))
    if plan is None:
        raise ValueError(
            f"attnlab_split: {type(module).__name__} has no plan. Give it one: "
            'attnlab.hf.set_split(model, attnlab.SplitPlan("sequence", 2))'
        )
    return plan


def split_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SplitPlan,
    starts: tuple[int, ...] | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of `q [B, 1, Hq, D]` over the shards of `k, v [B, T, Hkv, D]`; row `b`'s keys begin at `starts[b]`."""
    lengths = None
    if starts is not None:
        first = torch.tensor(starts, device=q.device)
        at = (first[:, None] + torch.arange(k.shape[1], device=q.device)).clamp(max=k.shape[1] - 1)
        k, v = (x.gather(1, at[..., None, None].expand(x.shape)) for x in (k, v))
        lengths = (k.shape[1] - first).int()
    out, lse = split_attention(q, plan.split(k, v, lengths), plan, scale=scale)
    return out if sinks is None else (out * (lse - sinks).sigmoid()[..., None]).to(out.dtype)


def _plan(config: Any) -> SplitPlan | None:
    values = getattr(config, KEY, None)
    if values is None:
        return None
    sizes = values["sizes"]
    return _parse(values["by"], values["shards"], None if sizes is None else tuple(sizes), values["block"])


@lru_cache(maxsize=64)
def _parse(by: str, shards: int, sizes: tuple[int, ...] | None, block: int) -> SplitPlan:
    return SplitPlan(by, shards, sizes, block)
