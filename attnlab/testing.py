"""Comparisons and inputs for testing attention code: tolerances come from the data, near ties are not failures."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .moba import MoBASelection
from .reference.moba import moba_select as reference_select


class Inputs(NamedTuple):
    """`q [B, Tq, Hq, D]`, `k, v [B, Tk, Hkv, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor


def assert_accurate(
    actual: Tensor, truth: Tensor, plain: Tensor, *, factor: float = 2.0, roundings: float = 1.0, what: str = "result"
) -> None:
    """`actual` may err at most `factor` times as far from the float64 `truth` as `plain`, plus rounding.

    Args:
        actual: result under test, any float dtype.
        truth: the same computation in float64.
        plain: the same computation in PyTorch in the dtype of `actual`.
        factor: how many times the largest error of `plain` is allowed.
        roundings: how many roundings, of the size of the largest value, are allowed on top. Sums that cancel, such as
            gradients over few elements, need more than one: there the error of `plain` may be small by luck.
        what: name for the message.

    Raises:
        AssertionError: over the bound, of another shape, or not finite (or infinite) where `truth` is.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}")
    truth, seen = truth.double(), actual.double()
    special = ~truth.isfinite()
    if not torch.equal(seen[special].nan_to_num(nan=7.0), truth[special].nan_to_num(nan=7.0)):
        raise AssertionError(f"{what}: infinities or NaNs differ from the expected ones")
    if not seen[~special].isfinite().all():
        raise AssertionError(f"{what}: {int((~seen[~special].isfinite()).sum())} values are not finite")
    if not (~special).any():
        return
    scale = truth[~special].abs().max()
    error = (seen - truth)[~special].abs().max()
    allowed = (
        factor * (plain.double() - truth)[~special].abs().max() + roundings * torch.finfo(actual.dtype).eps * scale
    )
    if error > allowed:
        raise AssertionError(f"{what}: error {error:.3e} is over {allowed:.3e} ({factor} x plain PyTorch + rounding)")


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention as one writes it in PyTorch, in the inputs' own dtype: `(out, lse)`.

    `mask` broadcasts to `[B, Hq, Tq, Tk]`, true where a key is seen. Heads are repeated and the scores held whole.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.float().logsumexp(-1) if scores.dtype != torch.float64 else scores.logsumexp(-1)
    return (weights[..., : k.shape[2]] @ v).transpose(1, 2), lse.transpose(1, 2)


def selection_mask(indices: Tensor, heads: int, tk: int, block_size: int, causal: bool) -> Tensor:
    """The keys a selection `[B, Tq, Hr, slots]` lets each query see, as a mask `[B, heads, Tq, Tk]`."""
    key_block = torch.arange(tk, device=indices.device) // block_size
    chosen = (indices[..., None] == key_block).any(-2).repeat_interleave(heads // indices.shape[2], 2)
    mask = chosen.transpose(1, 2)
    if causal:
        tq = indices.shape[1]
        position = torch.arange(tq, device=indices.device) + tk - tq
        mask = mask & (torch.arange(tk, device=indices.device) <= position[:, None])
    return mask


def assert_same_routing(
    actual: MoBASelection,
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    tolerance: float | None = None,
    **options: object,
) -> None:
    """`actual` chose what the float64 reference chooses, up to near ties of the scores.

    Blocks chosen by rule must be equal. Of the gate's choices the float64 scores are compared, rank by rank, not the
    indices: two blocks may swap where their scores differ by less than `tolerance` (by default 64 roundings of
    float32 at the size of the largest score). No block may be chosen twice.
    """
    expected = MoBASelection(*reference_select(q.double(), k.double(), block_size=block_size, topk=topk, **options))  # type: ignore[arg-type]
    if actual.indices.shape != expected.indices.shape:
        raise AssertionError(f"routing: shape {list(actual.indices.shape)}, expected {list(expected.indices.shape)}")
    ruled = expected.scores == math.inf
    if not torch.equal(actual.indices[ruled], expected.indices[ruled]):
        raise AssertionError("routing: blocks chosen by rule differ")
    if not torch.equal(actual.indices < 0, expected.indices < 0):
        raise AssertionError("routing: unused slots differ")
    ordered = actual.indices.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise AssertionError("routing: a block was chosen twice")
    picked = ~ruled & (expected.indices >= 0)
    if not picked.any():
        return
    wanted = expected.scores[picked]
    tolerance = (
        64 * torch.finfo(torch.float32).eps * max(float(wanted.abs().max()), 1e-30) if tolerance is None else tolerance
    )
    error = float((actual.scores.double()[picked] - wanted).abs().max())
    if not error <= tolerance:
        raise AssertionError(f"routing: scores chosen differ by {error:.3e}, over {tolerance:.3e}")


def gaussian(
    batch: int,
    tq: int,
    tk: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Inputs:
    """Independent normal q, k and v; q and k times `scale` (large values saturate the softmax)."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tq, heads, head_dim, generator=g, dtype=torch.float64) * scale
    k, v = (torch.randn(batch, tk, kv_heads, head_dim, generator=g, dtype=torch.float64) for _ in range(2))
    return Inputs(*(x.to(device=device, dtype=dtype) for x in (q, k * scale, v)))


def planted_needle(x: Inputs, block_size: int, *, strength: float = 8.0, seed: int = 0) -> tuple[Inputs, Tensor]:
    """Plants, for each query and KV head, one key like it in an earlier block. Returns the inputs and the block
    `[B, Tq]` (the same for every head; `-1` where the query has no earlier block, with nothing planted)."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (t.clone() for t in x)
    batch, tq, heads, _ = q.shape
    group = heads // k.shape[2]
    block = torch.full((batch, tq), -1)
    for b in range(batch):
        for i in range(tq):
            own = (k.shape[1] - tq + i) // block_size
            if own == 0:
                continue
            block[b, i] = int(torch.randint(own, (1,), generator=g))
            key = int(block[b, i]) * block_size + int(torch.randint(block_size, (1,), generator=g))
            direction = k[b, key] / k[b, key].norm(dim=-1, keepdim=True)
            q[b, i] = strength * direction.repeat_interleave(group, 0)
    return Inputs(q, k, v), block.to(q.device)


def clustered(x: Inputs, block_size: int, *, spread: float = 0.3, seed: int = 0) -> Inputs:
    """Keys of a block share a direction of their own, `spread` apart: routing margins are wide."""
    g = torch.Generator().manual_seed(seed)
    n = math.ceil(x.k.shape[1] / block_size)
    centre = torch.randn(x.k.shape[0], n, *x.k.shape[2:], generator=g, dtype=torch.float64).to(x.k)
    return x._replace(k=centre.repeat_interleave(block_size, 1)[:, : x.k.shape[1]] + spread * x.k)


def tied(x: Inputs, block_size: int, *, period: int = 2) -> Inputs:
    """Every `period`-th block holds the same keys, so scores tie exactly and the lowest index must win.

    q and k are rounded so that centroids and scores are exact, and tie in whatever order a product sums them.
    """
    odd = block_size // (block_size & -block_size)
    k = (x.k[:, : period * block_size] * (8 / odd)).round() * (odd / 8)
    k = k.repeat(1, math.ceil(x.k.shape[1] / (period * block_size)), 1, 1)
    return x._replace(q=(x.q * 8).round() / 8, k=k[:, : x.k.shape[1]].contiguous())


def one_hot(x: Inputs) -> Inputs:
    """Keys are unit vectors and queries small integers: every score is exact in any dtype, and many tie."""
    axis = torch.arange(x.k.shape[1], device=x.k.device) % x.k.shape[3]
    k = torch.nn.functional.one_hot(axis, x.k.shape[3]).to(x.k.dtype)[None, :, None].expand(x.k.shape)
    return x._replace(q=x.q.round().clamp(-3, 3), k=k.contiguous())


def ragged(
    lengths_q: list[int], lengths_k: list[int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """`cu_seqlens_q, cu_seqlens_k` int32 of sequences of these lengths (`lengths_k` defaults to `lengths_q`)."""
    pairs = (lengths_q, lengths_q if lengths_k is None else lengths_k)
    first, second = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in pairs)
    return first, second
