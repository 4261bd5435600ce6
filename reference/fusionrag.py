"""FusionRAG (arXiv 2601.12904) from its definitions: queries of some tokens over all keys, moved keys, what a question
attends, rows written to slots."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from .rope import shift_rope, turn
from .states import State, accumulation_dtype, masked_attention


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    shift: Tensor | None = None,
    frequencies: Sequence[float] = (),
    interleaved: bool = False,
    scale: float | None = None,
    mask: str = "exact",
) -> State:
    """Row `i` of a request sees its keys `0..positions[i]`; position -1 sees none. Layouts as the public function's.

    With `shift`, key `j` is first moved by `shift[j]` positions, each of which turns its pair `p` by `frequencies[p]`.
    """
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q), device=q.device)
    for rows, row, tokens in _requests(q, k, cu_seqlens_q, cu_seqlens_k, lengths):
        keys, values = (_tokens(x, row, tokens, page_table) for x in (k, v))
        if shift is not None:
            keys = shift_rope(keys, shift[row, tokens], list(frequencies), interleaved)
        at = positions[rows][0]
        if mask == "bottom_right":
            at = _bottom_right(at, keys.shape[1])
        seen = torch.arange(keys.shape[1], device=q.device) <= at[:, None]
        out[rows], lse[rows] = masked_attention(q[rows], keys, values, seen, scale)
    return out, lse


def _requests(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], int, slice]]:
    """Where each request's queries lie in q, and in which row, and at which tokens of it, its keys."""
    if cu_q is not None and cu_k is not None:
        for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False):
            yield (slice(0, 1), slice(a, b)), 0, slice(c, d)
        return
    for b in range(len(q)):
        yield (slice(b, b + 1), slice(None)), b, slice(0, k.shape[1] if lengths is None else int(lengths[b]))


def _tokens(x: Tensor, row: int, tokens: slice, table: Tensor | None) -> Tensor:
    """Those of one request, `[1, j, g, d]`."""
    if table is None:
        return x[row : row + 1, tokens]
    pages = table[row, : -(-tokens.stop // x.shape[1])].long()
    return rearrange(x[pages], "page j g d -> 1 (page j) g d")[:, tokens]


def _bottom_right(positions: Tensor, length: int) -> Tensor:
    """What a causal mask aligned with the last key takes the positions of a shortened query to be."""
    real = positions >= 0
    return torch.where(real, real.cumsum(0) - 1 + length - real.sum(), -1)


def rotate_keys(k: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Move rotated keys `k [b, t, h, d]`: pair `i` turns by `angles [t, i]` or `[b, t, i]` more."""
    return turn(k, angles, 1.0, interleaved)


def scatter(rows: Tensor, slots: Tensor, pool: Tensor) -> None:
    """Write `rows [b, t, ...]` to `pool [n, ...]` at `slots [b, t]`, one by one; -1 is skipped."""
    for row, slot in zip(rows.flatten(0, 1), slots.flatten().tolist(), strict=True):
        if slot >= 0:
            pool[slot] = row


def token_importance(
    q: Tensor, k: Tensor, chunks: Tensor, q_lengths: Tensor, per_chunk: bool, scale: float | None = None
) -> Tensor:
    """How much a question `q [b, i, h, d]` attends each token of its context `k [b, j, g, d]`, over rows and heads.

    The softmax runs over each chunk `chunks[b, c] <= j < chunks[b, c + 1]` or over all of them together; the sum over
    the first `q_lengths[b]` queries and all heads. Tokens outside the chunks get 0.
    """
    dtype = accumulation_dtype(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    found = torch.zeros(k.shape[:2], dtype=dtype, device=k.device)
    keys = repeat(k.to(dtype), "b j g d -> b j (g r) d", r=q.shape[2] // k.shape[2])
    for b, (bounds, rows) in enumerate(zip(chunks.tolist(), q_lengths.tolist(), strict=True)):
        bounds = bounds if per_chunk else [bounds[0], bounds[-1]]
        for start, end in itertools.pairwise(bounds):
            scores = einsum(q[b, :rows].to(dtype), keys[b, start:end], "i h d, j h d -> i h j") * scale
            found[b, start:end] = rearrange(scores.softmax(-1), "i h j -> (i h) j").sum(0)
    return found
