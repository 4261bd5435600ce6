"""Column sums of a softmax in plain PyTorch: whole rows of scores, a bounded number of them at a time."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

SCORE_ELEMENTS = 1 << 20  # most scores held at a time, if one row is not longer: a core's cache holds them


def token_importance(
    q: Sequence[Tensor], k: Sequence[Tensor], chunks: Tensor, q_lengths: Tensor, per_chunk: bool, scale: float
) -> Tensor:
    """`q` of `[B, Tq, Hq, D]` and `k` of `[B, Tk, Hkv, D]`, one per layer; int32 `chunks [B, C + 1]`, `q_lengths [B]`.

    `[B, Tk]` float32 (float64): the softmax over each chunk or over all of them, summed over queries, heads and layers.
    """
    dtype = torch.promote_types(q[0].dtype, torch.float32)
    found = torch.zeros(k[0].shape[:2], dtype=dtype, device=k[0].device)
    for b, (bounds, rows) in enumerate(zip(chunks.tolist(), q_lengths.tolist(), strict=True)):
        bounds = bounds if per_chunk else [bounds[0], bounds[-1]]
        spans = [(i, j) for i, j in itertools.pairwise(bounds) if j > i]
        if rows == 0:
            continue
        for ql, kl in zip(q, k, strict=True):
            hkv = kl.shape[2]
            # [Hkv, rows * group, D]: the query heads of a KV head share its keys.
            asked = (ql[b, :rows].to(dtype) * scale).unflatten(1, (hkv, -1)).transpose(0, 1).flatten(1, 2)
            for i, j in spans:
                _add(found[b, i:j], asked, kl[b, i:j].permute(1, 2, 0))
    return found


def _add(found: Tensor, q: Tensor, k: Tensor) -> None:
    """Add to `found [n]` what `q [G, R, D]` attend of `k [G, D, n]`."""
    (heads, rows, _), n = q.shape, k.shape[2]
    heads_step = max(1, min(heads, SCORE_ELEMENTS // (rows * n)))
    rows_step = max(1, min(rows, SCORE_ELEMENTS // n))
    for g in range(0, heads, heads_step):
        keys = k[g : g + heads_step].to(q.dtype)
        for r in range(0, rows, rows_step):
            scores = q[g : g + heads_step, r : r + rows_step] @ keys
            found += scores.softmax(-1).sum((0, 1))
