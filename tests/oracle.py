"""MoBA and dense attention as one would write them on a napkin: packs, loops, one masked softmax, float64."""

import math

import torch
from torch import Tensor


def spans(cu_q: Tensor, cu_k: Tensor):
    return zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)


def select(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, spec) -> list[list[list[int]]]:
    """Per query and choosing head the blocks it attends, without holes, in the order of the slots."""
    found = []
    group = q.shape[1] // k.shape[1]
    for a, b, c, d in spans(cu_q, cu_k):
        means = [x.double().mean(0) for x in k[c:d].split(spec.block_size)] if d > c else []
        for i in range(a, b):
            own = (d - c - (b - a) + i - a) // spec.block_size if spec.causal else len(means)
            row = []
            for h in range(k.shape[1] if spec.group else q.shape[1]):
                kv, asking = (h, q[i, h * group : (h + 1) * group].sum(0)) if spec.group else (h // group, q[i, h])
                always = ([own] if spec.causal else []) + list(range(min(spec.sink_blocks, own)))
                always += range(own - 1, max(spec.sink_blocks, own - spec.local_blocks) - 1, -1) if spec.causal else []
                rest = range(spec.sink_blocks, own - spec.local_blocks if spec.causal else own)
                best = sorted(rest, key=lambda j: (-float(asking.double() @ means[j][kv]), j))
                row.append(always + best[: spec.topk - spec.causal])
            found.append(row)
    return found


def mask(chosen, q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, spec) -> Tensor:
    """[Hq, Nq, Nk] which keys a query head sees, of `select`'s result or of indices [Nq, Hr, slots]."""
    seen = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.bool)
    chosen = chosen.tolist() if isinstance(chosen, Tensor) else chosen
    for a, b, c, d in spans(cu_q, cu_k):
        for i in range(a, b):
            stop = d - b + i + 1 if spec.causal else d
            for h in range(q.shape[1]):
                for j in chosen[i][h * len(chosen[i]) // q.shape[1]]:
                    start = c + j * spec.block_size
                    seen[h, i, start : min(start + spec.block_size, stop)] |= j >= 0
    return seen


def dense_mask(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, window: int | None) -> Tensor:
    seen = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.bool)
    for a, b, c, d in spans(cu_q, cu_k):
        for i in range(a, b):
            stop = d - b + i + 1 if causal else d
            seen[:, i, c if window is None else max(c, stop - window) : stop] = True
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [Nq, Hq, D] and lse [Nq, Hq], in the inputs' dtype; gradients flow."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)], -1)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    p = s.softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[0]]
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], -math.inf) if s.shape[-1] else s.new_full(s.shape[:2], -math.inf)
    return torch.einsum("hij,jhd->ihd", p, v), lse.T
