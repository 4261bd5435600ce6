"""Dense attention that returns its state `(out, lse)`."""

import functools

import torch
from torch import Tensor

from .dispatch import (
    Call,
    Reasons,
    check_bool,
    check_int,
    check_qkv,
    check_scale,
    check_sinks,
    kernels,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from .flash import flash_attention, flash_reasons
from .packs import check_values, pack, without_autocast
from .reference import states as reference
from .states import MODULES, State


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | State:
    """Dense softmax attention under the state contract.

    Args:
        q: `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only).
        k, v: `[B, Tk, Hkv, D]`, `Hq % Hkv == 0`; heads are never copied. With `Tq < Tk` queries sit at the end.
        causal: query at position `p` sees keys `0..p`.
        window: sees the last `window` keys up to its own position only; needs `causal=True`.
        scale: multiplies the scores; `D ** -0.5` by default.
        sinks: `[Hq]`, one logit per head that joins the softmax's denominator, and so the lse, without a value.
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32, for `S` sequences packed along `T` with `B == 1`.
        return_lse: also return the `lse`, differentiable.
        backend: `"auto"`, `"reference"`, `"portable"`, `"triton"` or `"flash"` (flash-attn's public functions).

    Returns:
        `out [B, Tq, Hq, D]` in q's dtype, and `lse [B, Tq, Hq]` float32 if asked for.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "full_attention"
    check_qkv(fn, q, k, v)
    check_bool(fn, "causal", causal)
    check_bool(fn, "return_lse", return_lse)
    if window is not None:
        check_int(fn, "window", window, 1)
        if not causal:
            raise ValueError(f"{fn}: window needs causal=True")
    check_sinks(fn, sinks, q)
    scale = check_scale(fn, scale, q.shape[3])
    cu = pack(fn, q, k, cu_seqlens_q, cu_seqlens_k, causal)
    backends: dict[str, Reasons] = {
        "triton": triton_reasons,
        "portable": portable_reasons,
        "reference": reference_reasons,
    }
    lse_gradient = return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    backends["flash"] = functools.partial(flash_reasons, sinks=sinks, empty=k.shape[1] == 0, lse_gradient=lse_gradient)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, backends)
    if name == "flash":
        out, lse = flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, scale)
    elif name == "reference":
        if cu.given:
            check_values(fn, cu.cu_q, cu.cu_k, q.shape[1], k.shape[1], causal)
        given = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        out, lse = without_autocast(reference.full_attention)(
            q, k, v, causal=causal, window=window, scale=scale, sinks=sinks, **given
        )
    else:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = _full(*packed, sinks, cu.cu_q, cu.cu_k, causal, window, scale, cu.given, name)
        out, lse = out.view(q.shape), lse.view(q.shape[:3])
    return (out, lse) if return_lse else out


@torch.library.custom_op("attnlab::full_attention", mutates_args=())
@without_autocast
def _full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    given: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if given:
        check_values("full_attention", cu_q, cu_k, len(q), len(k), causal)
    return kernels(MODULES[backend]).attention(q, k, v, sinks, cu_q, cu_k, causal, window, scale)


@_full.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("attnlab::full_attention_backward", mutates_args=())
@without_autocast
def _full_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dsinks = kernels(MODULES[backend]).attention_backward(
        dout, dlse, q, k, v, sinks, out, lse, cu_q, cu_k, causal, window, scale
    )
    return dq, dk, dv, lse.new_empty(0) if dsinks is None else dsinks


@_full_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    return fake_gradients(q, k, v, sinks, lse)


def _full_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_q, cu_k, *output)
    ctx.set_materialize_grads(False)


def _full_autograd(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, sinks, cu_q, cu_k, out, lse = ctx.saved_tensors
    causal, window, scale, _, backend = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    options = (cu_q, cu_k, causal, window, scale, backend)
    dq, dk, dv, dsinks = _full_backward(dout, dlse, q, k, v, sinks, out, lse, *options)
    return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype), *[None] * 7


_full.register_autograd(_full_autograd, setup_context=_full_setup)


def fake_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), lse.new_empty(0 if sinks is None else sinks.shape[0])
