"""Moving stored keys to new positions, into a tensor of their own or straight into the slots of a pool."""

import torch
from torch import Tensor

from ..dispatch import Call, pick
from ..kernels.fusionrag import portable_keys
from ..reference import fusionrag as reference
from ..rope import RopeConfig, cos_sin, shift_angles
from .slots import check_pool, check_rows, check_slot_values, check_slots, no_gradient, serving


def rotate_keys(
    k: Tensor,
    shift: int | Tensor | tuple[Tensor, Tensor],
    rope: RopeConfig,
    *,
    out: Tensor | None = None,
    slots: Tensor | None = None,
    seq_len: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Move rotated keys to new positions: `attnlab.rope.shift_rope`, fused with the write into a pool.

    RoPE (arXiv 2104.09864) turns pairs by angles that add up, so a stored key serves anywhere.

    Args:
        k: `[B, T, Hkv, D]` keys as the model left them, float16, bfloat16, float32 (float64: reference and portable
            only). A chunk's layers make a batch.
        shift: how far to move: an int, an integer tensor `[T]` or `[B, T]`, or a pair `(from, to)` of such tensors,
            which also undoes the rounding of the old angle and is exact to float32 at any distance.
        rope: the model's positions. The attention factor is in the keys and is not applied again.
        out, slots: a pool `[N, Hkv, D]` of k's dtype with any strides (Triton: the last one 1), and int32 or int64
            `[B, T]`: the moved key `(b, t)` is written to `out[slots[b, t]]`, -1 is skipped, and nothing else changes.
            `out` may be the memory of `k` where each key is written to its own place. Which of several keys with the
            same slot stays is undefined. Values of `slots` are read once per tensor; those a `SlotTable` made, never.
        seq_len: the length at which dynamic scaling reads both positions; needed by it alone.
        backend: `"auto"`, `"reference"`, `"portable"` or `"triton"`.

    Returns:
        A new tensor like `k`, differentiable in `k`; or `out`. Angles are the model's own float32 products, a pair's
        difference exact; all else is float32 too (float64 for float64 keys) and rounded once.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; `out` with gradients to take.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "rotate_keys"
    check_rows(fn, "k", k)
    if not isinstance(rope, RopeConfig):
        raise TypeError(f"{fn}: rope must be a RopeConfig, got {type(rope).__name__}")
    if rope.head_dim != k.shape[3]:
        raise ValueError(f"{fn}: rope must have k's head size {k.shape[3]}, got head_dim={rope.head_dim}")
    angles = shift_angles(fn, k, shift, rope, seq_len)
    if (out is None) != (slots is None):
        raise ValueError(f"{fn}: out and slots must be given together")
    call = Call(fn, k.device, k.dtype, k.shape[3])
    if out is None or slots is None:
        return _turned(k, angles, rope.interleaved, pick(call, backend, serving()))
    check_pool(fn, "out", out, "k", k)
    check_slots(fn, slots, k)
    no_gradient(fn, k=k, out=out)
    _rotate_into(k, angles, slots, out, rope.interleaved, pick(call, backend, serving(out=out)))
    return out


def _turned(k: Tensor, angles: Tensor, interleaved: bool, backend: str) -> Tensor:
    if backend == "triton":
        return _rotate(k, angles, interleaved)
    if backend == "portable":
        return portable_keys.turn(k, *cos_sin(angles, k), interleaved)
    return reference.rotate_keys(k, angles, interleaved)


@torch.library.custom_op("attnlab::rotate_keys", mutates_args=())
def _rotate(k: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    from ..kernels.fusionrag.rotate import rotate

    return rotate(k, *cos_sin(angles, k), interleaved)


@_rotate.register_fake
def _(k: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    return k.new_empty(k.shape)


def _rotate_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, angles, ctx.interleaved = inputs
    ctx.save_for_backward(angles)


def _rotate_autograd(ctx, grad):  # type: ignore[no-untyped-def]
    (angles,) = ctx.saved_tensors
    return _rotate(grad, -angles, ctx.interleaved), None, None


_rotate.register_autograd(_rotate_autograd, setup_context=_rotate_setup)


@torch.library.custom_op("attnlab::rotate_keys_into", mutates_args=("out",))
def _rotate_into(k: Tensor, angles: Tensor, slots: Tensor, out: Tensor, interleaved: bool, backend: str) -> None:
    check_slot_values("rotate_keys", slots, len(out))
    if backend == "triton":
        from ..kernels.fusionrag.rotate import rotate

        rotate(k, *cos_sin(angles, k), interleaved, out, slots)
        return
    if backend == "portable":
        portable_keys.turn_into(k, *cos_sin(angles, k), interleaved, slots, out)
    else:
        reference.scatter(_turned(k, angles, interleaved, backend), slots, out)


@_rotate_into.register_fake
def _(*args: object) -> None:
    return None
