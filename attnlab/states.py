"""Attention states `(out, lse)` and their merge: the contract all methods share.

`out [B, Tq, Hq, D]`, `lse [B, Tq, Hq]` float32 (float64 for float64 inputs), natural log, of the scaled scores. A row
without keys is `out = 0`, `lse = -inf`. States of disjoint key sets merge into the state of their union, in any order.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import (
    Call,
    Reasons,
    cpu_reasons,
    cuda_alone_reasons,
    kernels,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from .packs import without_autocast
from .reference import states as reference
from .state_checks import (
    FN,
    FP8,
    State,
    check_base,
    check_dtype,
    check_factor,
    check_floats,
    check_indptr,
    check_memory,
    check_out_scale,
    check_target,
    check_values,
    stacked,
)
from .views import folded


def merge_reasons(call: Call) -> list[str]:
    return triton_reasons(call._replace(head_dim=1))  # a row is read in parts, so that any head size will do


def cuda_merge_reasons(call: Call) -> list[str]:
    return cuda_alone_reasons(call._replace(head_dim=1))


BACKENDS: dict[str, Reasons] = {
    "triton": merge_reasons,
    "cuda": cuda_merge_reasons,
    "cpu": cpu_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}
MODULES = {"triton": "states.launch", "cuda": "cuda.states", "cpu": "cpu.states", "portable": "states.portable"}


def cuda_fp8_reasons(call: Call) -> list[str]:
    old = call.device.type == "cuda" and torch.cuda.get_device_capability(call.device) < (8, 9)
    return cuda_merge_reasons(call) + ["float8_e4m3fn results need compute capability 8.9 or later"] * old


FP8_BACKENDS = BACKENDS | {"cuda": cuda_fp8_reasons}


def merge_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    indptr: Tensor | None = None,
    lse_base: str = "e",
    lse_scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    out: State | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: float | Tensor | None = None,
    backend: str = "auto",
) -> State:
    """Merge `N` states over disjoint keys into the state over all of them.

    Nothing is copied where the last dimension is dense, whatever the other strides, but for sequences, which are
    stacked. The same inputs give the same bits on every run.

    Args:
        outs: `[N, ..., D]`, float16, bfloat16, float32 (float64: reference and portable only), or `N` tensors
            `[..., D]`.
        lses: `[N, ...]` float32 (float64 with float64 `outs`), or `N` tensors. `-inf`, and `+inf` as others write it,
            mean no keys; the `out` of such a shard is never read and may be NaN. A NaN makes its row NaN.
        indptr: `[R + 1]` int32 or int64, for `R` states of any number of shards each: row `r` merges entries
            `indptr[r]..indptr[r + 1]` of `outs [nnz, ..., D]`. Values are checked once per tensor (a GPU is
            waited for).
        lse_base: `"e"`, or `"2"` for lses in log2, as FlashInfer has them; both those given and the one returned. No
            value can tell: the wrong one gives weights that are finite, sum to 1, and are wrong.
        lse_scale, temperature: positive numbers, or float tensors with one for each shard, `[N]` (`[nnz]` with
            `indptr`). Shard `n` counts with `lse_scale[n] * temperature[n] * lses[n]`: `temperature` is what its scores
            were divided by, so that the product is in units of undivided ones, and `lse_scale` sharpens or damps
            (adaptive parallel encoding, arXiv 2502.05431, section 4). Empty stays empty, and the lse returned is that
            of the weights used. No gradients to either; values are checked once per tensor.
        out: `(out, lse)` to write to, of any strides but with a dense last dimension. May be a shard of the inputs,
            `(outs[0], lses[0])`, and may share no other memory with them. Not with gradients.
        out_dtype: float32, float16, bfloat16 or float8_e4m3fn (float64 from float64); by default that of the `out`
            given, else of `outs`. 8-bit results have no gradients.
        out_scale: for float8_e4m3fn: a positive number or a float32 tensor of one element, read where it lies. What is
            stored is `out / out_scale`, at most 448 in magnitude.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` (C), `"triton"` or `"cuda"` (C++).

    Returns:
        `out [..., D]` and `lse [...]` (with `indptr` `[R, ..., D]` and `[R, ...]`), those given as `out` if there are
        any; `0` and `-inf` where every shard is empty. Differentiable in `outs` and `lses`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.
    """
    outs, lses = stacked("outs", outs), stacked("lses", lses)
    check_floats(FN, outs=outs, lses=lses)
    if outs.ndim < 2 or lses.shape != outs.shape[:-1] or (outs.shape[0] == 0 and indptr is None) or not outs.shape[-1]:
        raise ValueError(
            f"{FN}: outs must have shape [N, ..., D] with N, D >= 1 and lses [N, ...], "
            f"got {list(outs.shape)} and {list(lses.shape)}"
        )
    if lses.dtype != torch.promote_types(outs.dtype, torch.float32):
        raise TypeError(f"{FN}: lses must be float32 (float64 with float64 outs), got {lses.dtype}")
    if lses.device != outs.device:
        raise ValueError(f"{FN}: lses must be on the device of outs {outs.device}, got {lses.device}")
    base2 = check_base(FN, lse_base)
    rows = check_indptr(indptr, outs)
    number, scales = check_factor("lse_scale", lse_scale, outs)
    other, temperatures = check_factor("temperature", temperature, outs)
    factors, factor = (scales, temperatures), number * other
    graded = torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)
    if out is not None:
        check_target(FN, out, outs.shape[1:] if rows is None else (rows, *outs.shape[1:]), outs, lses.dtype, graded)
    dtype = check_dtype(out_dtype, out, outs, graded)
    out_scale = check_out_scale(out_scale, dtype, outs)
    backends = FP8_BACKENDS if dtype == FP8 else BACKENDS
    name = pick(Call(FN, outs.device, outs.dtype, outs.shape[-1]), backend, backends)
    options = (indptr, *factors, factor, base2)
    if name == "reference":
        check_values(indptr, *factors, len(outs))
        given = dict(indptr=indptr, base2=base2, factors=_factors(*factors, factor, lses))
        found = without_autocast(reference.merge_states)(outs, lses, **given, out_dtype=dtype, out_scale=out_scale)
        if out is None:
            return found
        _check_memory(out, outs, lses, indptr, *factors, out_scale)
        return into(out, found)
    if out is not None:
        _merge_out(outs, lses, *out, *options, out_scale, name)
        return out[0], out[1]
    return _merge(outs, lses, *options, dtype, out_scale, name)


def _factors(lse_scale: Tensor | None, temperature: Tensor | None, factor: float, lses: Tensor) -> Tensor | None:
    """What each lse counts times, `[N]` in the lses' dtype."""
    given = [x for x in (lse_scale, temperature) if x is not None]
    if not given and factor == 1.0:
        return None
    factors = torch.full(lses.shape[:1], factor, dtype=lses.dtype, device=lses.device)
    for x in given:
        factors *= x
    return factors


def into(out: State, found: State) -> State:
    for x, y in zip(out, found, strict=True):
        x.copy_(y)
    return out[0], out[1]


def _check_memory(
    out: State,
    outs: Tensor,
    lses: Tensor,
    indptr: Tensor | None,
    lse_scale: Tensor | None,
    temperature: Tensor | None,
    out_scale: Tensor | None,
) -> None:
    given = dict(outs=outs, lses=lses, indptr=indptr, lse_scale=lse_scale, temperature=temperature, out_scale=out_scale)
    inputs = {name: x for name, x in given.items() if x is not None}
    check_memory(FN, out, inputs, ("outs", "lses") if indptr is None else ())


def _launch(
    outs: Tensor,
    lses: Tensor,
    factors: Tensor | None,
    indptr: Tensor | None,
    base2: bool,
    out: Tensor,
    lse: Tensor,
    out_scale: Tensor | None,
    backend: str,
) -> None:
    if not out.numel():
        return
    merge, outs = kernels(MODULES[backend]).merge, dense(outs)
    if indptr is None:
        for o, x, to, to_x in folded(outs.shape[1:-1], 2, (outs, 1), (lses, 1), (out, 0), (lse, 0)):
            merge(o, x, factors, None, base2, to, to_x, out_scale)
    else:
        for o, x, to, to_x in folded(outs.shape[1:-1], 1, (outs, 1), (lses, 1), (out, 1), (lse, 1)):
            merge(o[:, None], x[:, None], factors, indptr.long(), base2, to, to_x, out_scale)


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("attnlab::merge_states", mutates_args=())
@without_autocast
def _merge(
    outs: Tensor,
    lses: Tensor,
    indptr: Tensor | None,
    lse_scale: Tensor | None,
    temperature: Tensor | None,
    factor: float,
    base2: bool,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_values(indptr, lse_scale, temperature, len(outs))
    out, lse = _results(outs, lses, indptr, dtype)
    _launch(outs, lses, _factors(lse_scale, temperature, factor, lses), indptr, base2, out, lse, out_scale, backend)
    return out, lse


def _results(outs: Tensor, lses: Tensor, indptr: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = outs.shape[1:] if indptr is None else (indptr.shape[0] - 1, *outs.shape[1:])
    return outs.new_empty(shape, dtype=dtype), lses.new_empty(shape[:-1])


@_merge.register_fake
def _(
    outs: Tensor,
    lses: Tensor,
    indptr: Tensor | None,
    lse_scale: Tensor | None,
    temperature: Tensor | None,
    factor: float,
    base2: bool,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _results(outs, lses, indptr, dtype)


@torch.library.custom_op("attnlab::merge_states_out", mutates_args=("out", "lse"))
@without_autocast
def _merge_out(
    outs: Tensor,
    lses: Tensor,
    out: Tensor,
    lse: Tensor,
    indptr: Tensor | None,
    lse_scale: Tensor | None,
    temperature: Tensor | None,
    factor: float,
    base2: bool,
    out_scale: Tensor | None,
    backend: str,
) -> None:
    check_values(indptr, lse_scale, temperature, len(outs))
    _check_memory((out, lse), outs, lses, indptr, lse_scale, temperature, out_scale)
    _launch(outs, lses, _factors(lse_scale, temperature, factor, lses), indptr, base2, out, lse, out_scale, backend)


@_merge_out.register_fake
def _(outs: Tensor, *_: object) -> None:
    return None


@torch.library.custom_op("attnlab::merge_states_backward", mutates_args=())
@without_autocast
def _merge_backward(
    dout: Tensor,
    dlse: Tensor | None,
    outs: Tensor,
    lses: Tensor,
    out: Tensor,
    lse: Tensor,
    indptr: Tensor | None,
    lse_scale: Tensor | None,
    temperature: Tensor | None,
    factor: float,
    base2: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not outs.numel():
        return outs.new_empty(outs.shape), lses.new_empty(lses.shape)
    n, d, rows = outs.shape[0], outs.shape[-1], math.prod(outs.shape[1:-1])
    shape = (rows, 1) if indptr is None else (1, rows)
    result = shape if indptr is None else (indptr.shape[0] - 1, rows)
    douts, dlses = kernels(MODULES["triton" if backend == "triton" else "portable"]).merge_backward(
        dense(dout.reshape(*result, d)), None if dlse is None else dlse.reshape(result),
        dense(outs).reshape(n, *shape, d), lses.reshape(n, *shape), _factors(lse_scale, temperature, factor, lses),
        None if indptr is None else indptr.long(), base2, out.reshape(*result, d), lse.reshape(result),
    )  # fmt: skip
    return douts.view(outs.shape), dlses.view(lses.shape)


@_merge_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _merge_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    outs, lses, *factors, ctx.factor, ctx.base2, _, _, ctx.backend = inputs
    ctx.save_for_backward(outs, lses, *output, *factors)
    ctx.set_materialize_grads(False)


def _merge_autograd(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    outs, lses, out, *rest = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *_merge_backward(dout, dlse, outs, lses, out, *rest, ctx.factor, ctx.base2, ctx.backend), *[None] * 8


_merge.register_autograd(_merge_autograd, setup_context=_merge_setup)
