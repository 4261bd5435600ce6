"""Hugging Face transformers: `attn_implementation="attnlab_moba"`, per-layer plans, and a cache for sparse decoding.

    attnlab.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attnlab_moba")
    attnlab.hf.set_plan(model, attnlab.hf.MoBAPlan(block_size=512, topk=8, full_layers="last:3"))
    model.generate(**inputs, past_key_values=attnlab.hf.MoBADynamicCache(model.config))

RetroInfer decodes over a `WaveCache`, whose layers hold a `WaveIndex` each:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attnlab_wave")
    cache = attnlab.hf.WaveCache(model.config, attnlab.WaveConfig(), max_length=131072)
    model.generate(**inputs, past_key_values=cache)

Methods are compared over it by `WaveCache(..., selector="quest", token_budget=0.1)`. Lamina's division of the cache is
a plan as well, under which the answers stay the same:

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attnlab_split")
    attnlab.hf.set_split(model, attnlab.SplitPlan("head", 2))

`attn_implementation="attnlab_full"` is dense attention through this library, as a baseline.
"""

from typing import TYPE_CHECKING, Any

from .plan import MoBAPlan, get_plan, set_plan
from .split import get_split, set_split

if TYPE_CHECKING:
    from .attention import DECODE_TOKENS
    from .caches import MoBADynamicCache, MoBALayer
    from .wave_cache import WaveCache

__all__ = [
    "DECODE_TOKENS",
    "MoBADynamicCache",
    "MoBALayer",
    "MoBAPlan",
    "WaveCache",
    "get_plan",
    "get_split",
    "register",
    "set_plan",
    "set_split",
]

_LAZY = {
    "DECODE_TOKENS": "attention",
    "MoBADynamicCache": "caches",
    "MoBALayer": "caches",
    "WaveCache": "wave_cache",
}


def register() -> None:
    """Make `attnlab_moba`, `attnlab_wave`, `attnlab_split` and `attnlab_full` known to transformers.

    Safe to repeat.

    Supported: padding on either side, packed sequences (`cu_seq_lens_*` or restarting `position_ids`), grouped heads,
    `scaling`, attention sinks, sliding windows (dense inside the window), encoders, latent attention's two head sizes,
    dynamic caches, static ones outside `torch.compile`, and `torch.compile` with graph breaks (not `fullgraph=True`).
    Refused with a ValueError: dropout, soft-capping, custom and additive masks, position biases, attention weights,
    continuous batching.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as e:
        raise ImportError("attnlab.hf needs transformers (pip install attnlab[hf])") from e
    from .attention import full_forward, moba_forward, split_forward, wave_forward
    from .masks import padding_mask

    for forward in (full_forward, moba_forward, split_forward, wave_forward):
        name = f"attnlab_{forward.__name__.removesuffix('_forward')}"
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, padding_mask)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
