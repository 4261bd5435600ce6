"""Turning keys in plain PyTorch: the arithmetic of `attnlab.rope`, and the rows of a pool it is written to."""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_RUN = 16  # tokens from which on a step of their own costs less than it saves


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x [..., H, D]` with its first `2 n` dimensions turned by `cos, sin [..., n]`, in their dtype, rounded once."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotary = x[..., :dim].to(cos.dtype)
    if interleaved:
        a, b = rotary.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], -1)


def turn_into(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, slots: Tensor, pool: Tensor) -> None:
    """Write `turn(x, ...)` of `x [B, T, H, D]` to a pool `[N, H, D]` at `slots [B, T]`; -1 is skipped."""
    each = cos.ndim == x.ndim - 1
    # On a CPU a few rows at a time: what lies between the steps then stays in the cache.
    step = max(1, LEAST_RUN // max(1, x.shape[1]) if x.device.type == "cpu" else len(x))
    for b in range(0, len(x), step):
        rows = slice(b, b + step)
        turned = turn(x[rows], *((cos[rows], sin[rows]) if each else (cos, sin)), interleaved)
        scatter([turned], slots[rows], [pool])


def scatter(rows: Sequence[Tensor], slots: Tensor, pools: Sequence[Tensor]) -> None:
    """Write each of `rows [B, T, ...]` to its pool `[N, ...]` at `slots [B, T]`; -1 is skipped."""
    if (starts := _runs(slots)) is not None:
        for x, pool in zip(rows, pools, strict=True):
            for row, start in zip(x, starts, strict=True):
                pool[start : start + len(row)] = row
        return
    kept = slots >= 0
    at = slots[kept].long()
    for x, pool in zip(rows, pools, strict=True):
        pool.index_put_((at,), x[kept])


def _runs(slots: Tensor) -> list[int] | None:
    """The first slot of each row, where every row is a long run of neighbouring slots, as chunks' are; else None."""
    if slots.device.type != "cpu" or slots.shape[1] < LEAST_RUN or bool((slots.diff(dim=1) != 1).any()):
        return None
    starts = slots[:, 0].tolist()
    return starts if min(starts, default=0) >= 0 else None
