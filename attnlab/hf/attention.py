"""The attention functions transformers calls: `attnlab_moba`, `attnlab_wave`, `attnlab_split`, `attnlab_full`."""

import warnings
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnlab import full_attention, moba_attention
from attnlab.dispatch import Call, check_scale, pick
from attnlab.moba import DENSE
from attnlab.moba_decoding import BACKENDS as DECODERS
from attnlab.moba_decoding import DECODE_QUERIES as DECODE_TOKENS

from .masks import Packing, appended, arrivals, from_kwargs, packing, pattern
from .plan import MoBAPlan, layer_plan
from .split import SplitPlan, module_split, split_step

_REFUSED = {
    "softcap": "attention logit soft-capping is not supported; use attn_implementation='eager'",
    "position_bias": "position biases (T5 and kin) are not supported; use attn_implementation='sdpa'",
    "head_mask": "head masks are not supported; use attn_implementation='eager'",
    "cache": "continuous batching's paged cache is not supported; use model.generate",
    "block_table": "paged caches are not supported; use model.generate",
}
_NO_WAVE_CACHE = (
    "a decoding step needs past_key_values=attnlab.hf.WaveCache(model.config, max_length=...); models that rework the "
    "keys their cache returns, such as DeepSeek's, are not supported"
)


def moba_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """MoBA under the model's plan; layers in `full_layers` and layers with a sliding window are dense.

    `query [B, Hq, Tq, D]`, `key, value [B, Hkv, Tk, D]` -> `[B, Tq, Hq, D]`. Keys are never repeated over heads.
    """
    return _forward("attnlab_moba", layer_plan(module), module, query, key, value, attention_mask, **kwargs), None


def wave_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """RetroInfer for single tokens over a `WaveCache`, dense for all else. Shapes as for `moba_forward`."""
    return _forward("attnlab_wave", None, module, query, key, value, attention_mask, **kwargs), None


def split_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Single tokens over the shards of the model's `SplitPlan`, dense for all else. Shapes as for `moba_forward`."""
    split = module_split(module)
    return _forward("attnlab_split", None, module, query, key, value, attention_mask, split=split, **kwargs), None


def full_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Dense attention through `attnlab.full_attention`: the baseline. Shapes as for `moba_forward`."""
    return _forward("attnlab_full", None, module, query, key, value, attention_mask, **kwargs), None


def _forward(
    fn: str,
    plan: MoBAPlan | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    split: SplitPlan | None = None,
    **kwargs: Any,
) -> Tensor:
    _refuse(fn, dropout, kwargs)
    known = pattern(attention_mask)
    if is_causal is None:
        is_causal = known.causal if known is not None else getattr(module, "is_causal", True)
    window = sliding_window if known is None or known.window is None else known.window
    if window is not None and not is_causal:
        raise ValueError(f"{fn}: sliding windows need causal attention, {type(module).__name__} is bidirectional")
    layer, wave, width = getattr(key, "_attnlab_layer", None), getattr(key, "_attnlab_wave", None), value.shape[-1]
    q, k, v = _uniform(query, key, value)
    packed = from_kwargs(cu_seq_lens_q, cu_seq_lens_k)
    if wave:
        _check_wave(fn, module, is_causal, window, packed)
        return _wave(q, k, v, wave, attention_mask, position_ids, scaling, s_aux)[..., :width]
    if fn == "attnlab_wave" and wave is None and is_causal and window is None and q.shape[1] == 1 < k.shape[1]:
        raise ValueError(f"{fn}: {_NO_WAVE_CACHE}")
    if packed is None:
        packed = packing(attention_mask, position_ids, q.shape[0], q.shape[1], k.shape[1], is_causal)
    elif attention_mask is not None and attention_mask.dtype == torch.bool and not (known and known.trivial):
        raise ValueError(f"{fn}: got both cu_seq_lens_q and a padding mask; pass one of them")
    options = {"scale": scaling, "causal": is_causal, "sinks": s_aux}
    after_cached = is_causal and q.shape[1] < k.shape[1] and (packed is None or packed.q_index is not None)
    decoding = after_cached and q.shape[1] <= DECODE_TOKENS
    if split is not None and window is None and after_cached and q.shape[1] == 1:
        if packed is not None and packed.starts is None:
            raise ValueError(f"{fn}: rows may be padded on the left only, and end with the newest token")
        return split_step(q, k, v, split, None if packed is None else packed.starts, scaling, s_aux)[..., :width]
    if plan is None or window is not None or plan.phase == ("prefill" if decoding else "decode"):
        backend = "auto" if plan is None else DENSE.get(plan.backend, plan.backend)
        out = _packed_call(full_attention, q, k, v, packed, window=window, backend=backend, **options)
    elif decoding and _layer_serves(layer, q, k, v, width, packed):
        out = _decode(q, layer, plan, packed, scaling, s_aux)
    else:
        if decoding and layer is None:
            _warn_plain_cache()
        out = _packed_call(moba_attention, q, k, v, packed, **_options(plan), **options)
    return out[..., :width]


def _refuse(fn: str, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"{fn}: attention dropout is not supported, got {dropout}; set config.attention_dropout = 0")
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{fn}: {why}")
    if kwargs.get("output_attentions"):
        raise ValueError(f"{fn}: attention weights are never formed; use attn_implementation='eager' to see them")


def _uniform(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, H, D]` views of one dtype (autocast's, where it is on) and one head size (latent attention has two)."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype == torch.float32:
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if value.shape[-1] < key.shape[-1]:
        value = nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _packed_call(attention: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packing | None, **options: Any) -> Tensor:
    """`attention` on rows as they are, or on the real tokens packed; padding's own rows are 0."""
    if packed is None:
        return attention(q, k, v, **options)
    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
    q_flat = q_flat if packed.q_index is None else q_flat[packed.q_index]
    if packed.k_index is not None:
        k_flat, v_flat = k_flat[packed.k_index], v_flat[packed.k_index]
    cu = {"cu_seqlens_q": packed.cu_q, "cu_seqlens_k": packed.cu_k}
    out = attention(q_flat[None], k_flat[None], v_flat[None], **cu, **options)[0]
    if packed.q_index is not None:
        out = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, packed.q_index, out)
    return out.view(q.shape)


def _check_wave(fn: str, module: nn.Module, causal: bool, window: int | None, packed: Packing | None) -> None:
    if fn != "attnlab_wave":
        raise ValueError(f"{fn}: a WaveCache needs attn_implementation='attnlab_wave'")
    if packed is not None:
        raise ValueError(f"{fn}: a WaveCache holds one sequence a row, got cu_seq_lens_q")
    if not causal or window is not None:
        raise ValueError(f"{fn}: a WaveCache needs causal attention without a window in {type(module).__name__}")


def _wave(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    mask: Tensor | None,
    position_ids: Any,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """New tokens go into the layer's index; one of a row attends over it, several see all held keys."""
    (batch, tokens), total = q.shape[:2], layer.get_seq_length()
    first, packed, backend = tokens == total, None, DENSE.get(layer.backend, layer.backend)
    if first:
        packed = packing(mask, position_ids, batch, tokens, tokens, True)
        if packed is not None and packed.q_index is None:
            raise ValueError("attnlab_wave: a WaveCache holds one sequence a row, got packed sequences")
    new = arrivals(mask, batch, tokens, total)
    index = layer.take(k, v, new)
    if tokens == 1:
        out, lse = layer.attend(q, scale)
        return out if sinks is None else (out * (lse - sinks).sigmoid()[..., None]).to(out.dtype)
    if not first:
        packed = appended(new, q.device)
        k, v = (torch.cat(x)[None] for x in zip(*map(index.row, range(batch)), strict=True))
    return _packed_call(full_attention, q, k, v, packed, scale=scale, sinks=sinks, backend=backend)


def _layer_serves(layer: Any, q: Tensor, k: Tensor, v: Tensor, width: int, packed: Packing | None) -> bool:
    """Whether the cache layer's block sums and buffers describe these very keys."""
    if layer is None or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return False
    buffer = layer.buffers()[0]
    same = buffer.device == q.device and buffer.dtype == q.dtype and layer.get_seq_length() == k.shape[1]
    return same and width == k.shape[3] and (packed is None or packed.starts is not None)


def _decode(
    q: Tensor, layer: Any, plan: MoBAPlan, packed: Packing | None, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """A step over the layer's own buffers: reads block sums, the chosen blocks and the own block."""
    starts = None if packed is None else packed.starts
    k, v = layer.buffers()
    sums = layer.block_sums(plan.block_size, starts)
    lengths, first, table = _rows(q.shape[0], layer.get_seq_length(), starts, q.device)
    asked = "triton" if plan.backend == "cuda" else plan.backend  # decode has no CUDA C++
    backend = pick(Call("moba_decode", q.device, q.dtype, q.shape[3]), asked, DECODERS)
    out, _ = torch.ops.attnlab.moba_decode(
        q, k, v, table, sums, lengths, None, first, sinks, plan.block_size, plan.topk,
        check_scale("attnlab_moba", scale, q.shape[3]), plan.routing == "group", plan.sink_blocks, plan.local_blocks,
        k.shape[1], backend,
    )  # fmt: skip
    return out


@lru_cache(maxsize=8)
def _rows(
    batch: int, length: int, starts: tuple[int, ...] | None, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Real tokens, first slot and page table of each cache row: alike in all layers of a step."""
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    if starts is None:
        return torch.full((batch,), length, dtype=torch.int32, device=device), None, table
    first = torch.tensor(starts, dtype=torch.int32, device=device)
    return length - first, first, table


def _options(plan: MoBAPlan) -> dict[str, Any]:
    names = ("block_size", "topk", "routing", "sink_blocks", "local_blocks", "backend")
    return {name: getattr(plan, name) for name in names}


@cache
def _warn_plain_cache() -> None:
    warnings.warn(
        "attnlab_moba: decoding without block sums, so every step reads all cached keys; pass past_key_values="
        "attnlab.hf.MoBADynamicCache(model.config) to read the chosen blocks only (not possible in models that rework "
        "the keys their cache returns, such as DeepSeek's)",
        stacklevel=2,
    )
