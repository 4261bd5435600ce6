"""What a method's attention is worth against dense attention in float64: errors, mass, and the keys it read."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.evals.harness.method import Attended
from attnlab.evals.harness.task import Metric

METRICS = (
    Metric("output_error", percent=False, higher_is_better=False),
    Metric("lse_error", percent=False, higher_is_better=False),
    Metric("mass"),
    Metric("mass_to_oracle"),
    Metric("recall"),
)
NEEDLE_RECALL = Metric("needle_recall")
TIE = 1e-12  # of a share: keys that are alike differ by the order of a product's sums


class Dense(NamedTuple):
    """`out [B, T, Hq, D]`, `lse [B, T, Hq]`, and each key's share of the mass `[B, T, Hq, Tk]`, all float64."""

    out: Tensor
    lse: Tensor
    shares: Tensor


@dataclass
class Item:
    """Queries `q [B, T, Hq, D]` of the last tokens of `k, v [B, Tk, Hkv, D]`.

    `needles [B, T]`: the key each query asks for, -1 for none; None where the data has no needles.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    needles: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def dense(self) -> Dense:
        """The truth, computed once for all methods."""
        group = self.q.shape[2] // self.k.shape[2]
        q = self.q.double()
        k, v = (x.double().repeat_interleave(group, 2) for x in (self.k, self.v))
        scores = torch.einsum("bthd,bshd->bths", q, k) * self.scale
        scores = scores.masked_fill(~self.visible[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        shares = (scores - lse[..., None]).exp()
        return Dense(torch.einsum("bths,bshd->bthd", shares, v), lse, shares)

    @property
    def visible(self) -> Tensor:
        """Bool `[T, Tk]`: the keys up to each query's own."""
        tokens, keys = self.q.shape[1], self.k.shape[1]
        places = torch.arange(keys, device=self.q.device)
        return places <= places[keys - tokens :, None]


def budget(item: Item, read: Tensor) -> float:
    """Mean share of the visible keys that was read."""
    seen = item.visible.sum(-1)[:, None]
    return (read.sum(-1, dtype=torch.float64) / seen).mean().item()


def measured(item: Item, found: Attended) -> dict[str, float]:
    """Means over rows, queries and heads, by metric.

    `output_error`: `|out - full| / |full|`. `lse_error`: absolute. `mass`: the share that the keys read hold.
    `mass_to_oracle`: over the largest that as many keys can hold. `recall`: of as many keys as were read, those of the
    largest shares; keys of equal shares are equally good. `needle_recall`: of the needles that a query can see, heads
    that read them. A query and head that read nothing score 1 in the two ratios.

    Raises:
        ValueError: `found` has another shape, or has read keys that come after the query.
    """
    full, read = item.dense, found.read
    _check(item, found)
    error = torch.linalg.vector_norm(found.out.double() - full.out, dim=-1) / torch.linalg.vector_norm(full.out, dim=-1)
    mass = (full.shares * read).sum(-1).clamp(max=1)
    n = read.sum(-1, keepdim=True)
    best = full.shares.sort(dim=-1, descending=True).values
    last = (n - 1).clamp(min=0)
    most, least = (x.gather(-1, last)[..., 0] for x in (best.cumsum(-1), best))
    hits = (read & (full.shares >= least[..., None] * (1 - TIE))).sum(-1)
    some, count = n[..., 0] > 0, n[..., 0].clamp(min=1)
    one = torch.ones_like(mass)
    scores = {
        "output_error": error.mean(),
        "mass": mass.mean(),
        "mass_to_oracle": torch.where(some, mass / most, one).clamp(max=1).mean(),
        "recall": torch.where(some, hits / count, one).mean(),
    }
    if found.lse is not None:
        scores["lse_error"] = (found.lse.double() - full.lse).abs().mean()
    if item.needles is not None and (item.needles >= 0).any():
        row, query = (item.needles >= 0).nonzero(as_tuple=True)
        scores[NEEDLE_RECALL.name] = read[row, query, :, item.needles[row, query]].double().mean()
    return {metric.name: scores[metric.name].item() for metric in (*METRICS, NEEDLE_RECALL) if metric.name in scores}


def _check(item: Item, found: Attended) -> None:
    full = item.dense
    for name, came, want in (
        ("out", found.out, full.out.shape),
        ("lse", full.lse if found.lse is None else found.lse, full.lse.shape),
        ("read", found.read, full.shares.shape),
    ):
        if came.shape != want:
            raise ValueError(f"attend: {name} must have shape {list(want)}, got {list(came.shape)}")
    if found.read.dtype != torch.bool:
        raise ValueError(f"attend: read must be bool, got {found.read.dtype}")
    if (found.read & ~item.visible[:, None]).any():
        raise ValueError("attend: read must hold no key after the query")
