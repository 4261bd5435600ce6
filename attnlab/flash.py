"""Dense attention through flash-attn or FlashAttention-4, under the state contract. Optional extra `flash`."""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import Call


@functools.cache
def _library() -> tuple[Callable[..., Any], Callable[..., Any], bool] | None:
    """`(dense, varlen, lse_has_gradient)` of FlashAttention-4 if present, else of flash-attn 2."""
    for module in ("flash_attn.cute", "flash_attn"):
        try:
            found = importlib.import_module(module)
            dense, varlen = found.flash_attn_func, found.flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        return dense, varlen, "return_lse" in inspect.signature(dense).parameters
    return None


def flash_reasons(
    call: Call, *, sinks: Tensor | None = None, empty: bool = False, lse_gradient: bool = False
) -> list[str]:
    """Why flash-attn cannot serve a call of `full_attention`."""
    reasons = []
    if _library() is None:
        reasons.append("flash-attn is not installed (pip install attnlab[flash])")
    elif lse_gradient and not _library()[2]:  # type: ignore[index]
        reasons.append("flash-attn 2 gives no gradient through the lse")
    if call.device.type != "cuda":
        reasons.append(f"tensors are on {call.device.type}, flash-attn needs cuda")
    if call.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {str(call.dtype).removeprefix('torch.')} is not float16 or bfloat16")
    if call.head_dim > 256 or call.head_dim % 8:
        reasons.append(f"head size {call.head_dim} is not a multiple of 8 up to 256")
    if sinks is not None:
        reasons.append("sinks are not supported")
    if empty:
        reasons.append("there are no keys")
    return reasons


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`q [B, Tq, Hq, D]` and so on as in `full_attention`; `cu_q`, `cu_k` for packs."""
    library = _library()
    if library is None:
        raise ImportError("full_attention: flash-attn is not installed (pip install attnlab[flash])")
    dense, varlen, new = library
    options: dict[str, Any] = dict(softmax_scale=scale, causal=causal)
    if window is not None:
        options["window_size"] = (window - 1, 0)
    options["return_lse" if new else "return_attn_probs"] = True
    if cu_q is None or cu_k is None:
        out, lse, *_ = dense(q, k, v, **options)
        lse = lse.transpose(1, 2)
    else:
        options |= dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        options |= dict(max_seqlen_q=int(cu_q.diff().max()), max_seqlen_k=int(cu_k.diff().max()))
        out, lse, *_ = varlen(q[0], k[0], v[0], **options)
        out, lse = out[None], lse.transpose(0, 1)[None]
    # Rows without keys: flash-attn 2 writes +inf, FlashAttention-4 -inf.
    empty = lse.isinf()
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -math.inf)
