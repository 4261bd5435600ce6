"""Rows of RetroInfer's tests as the portable backend holds them, and the reference's answers for each."""

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.spec import Attended, Query, Spec, Store, allocate, budget, part, places, plan
from attnlab.reference import retroinfer as reference
from attnlab.testing import gaussian

SPEC = Spec(2, 5, 40, 4, 4, False, 0, 12)
LENGTHS = [131, 7, 64, 1, 0, 48]  # several segments, all steady, two segments, ... and a short last one
QUERY = Query(0.25, "sum", False, "ratio", 0, 0.0, True)


class Rows(NamedTuple):
    q: Tensor  # [B, Hq, D]
    k: list[Tensor]  # per row, [t, G, D]
    v: list[Tensor]


def options(spec: Spec) -> reference.Options:
    final = "global" if spec.global_pass else "segment"
    sizes = spec.sink, spec.local, spec.segment, spec.tokens_per_cluster, spec.iterations
    return reference.Options(*sizes, final, spec.max_cluster or None, spec.update_every)


def rows(
    lengths: list[int], group: int = 2, kv_heads: int = 2, d: int = 16, dtype=torch.float64, seed: int = 0
) -> Rows:
    x = gaussian(len(lengths), 1, max(lengths), group * kv_heads, kv_heads, d, dtype=dtype, seed=seed, scale=1.5)
    return Rows(x.q[:, 0], *([y[b, :n] for b, n in enumerate(lengths)] for y in (x.k, x.v)))


def build(x: Rows, spec: Spec = SPEC, room: int = 0, labels: Tensor | None = None, int8: bool = False) -> Store:
    """The store of whole rows, clustered in one call over a ragged source."""
    lengths = [len(k) for k in x.k]
    store = allocate(len(lengths), x.k[0].shape[1], x.q.shape[2], max(lengths) + room, spec, x.q.dtype, "cpu", int8)
    ranges, at = [], 0
    for b, n in enumerate(lengths):
        ranges.append((b, at + min(n, spec.sink), at + max(min(n, spec.sink), n - spec.local)))
        at += n
    k, v = torch.cat(x.k), torch.cat(x.v)
    portable.extend(store, k, v, plan(spec, ranges, [0] * len(lengths)), spec, labels)
    store.lengths.copy_(torch.tensor(lengths))
    for b, (k, v) in enumerate(zip(x.k, x.v, strict=True)):
        t = torch.arange(len(k))
        kept = t[(t < spec.sink) | (t >= spec.sink + store.indexed[b])]
        store.k_steady[b, :, places(kept, spec)] = k[kept].transpose(0, 1)
        store.v_steady[b, :, places(kept, spec)] = v[kept].transpose(0, 1)
    return store


def labels_of(store: Store, b: int, spec: Spec = SPEC) -> Tensor:
    """The slot of each indexed token of a row, `[G, indexed]`."""
    n = int(store.indexed[b])
    slots = torch.arange(store.radius.shape[2])
    found = torch.full((store.k.shape[1], n), -1)
    for g, sizes in enumerate(store.sizes[b].long()):
        found[g, store.tokens[b, g, :n].long() - spec.sink] = slots.repeat_interleave(sizes)
    return found


def index_of(x: Rows, store: Store, b: int, spec: Spec = SPEC) -> reference.Index:
    """The reference's index of a row with the same grouping."""
    return reference.build_index(x.k[b], x.v[b], options(spec), labels_of(store, b, spec))


def ask(x: Rows, store: Store, query: Query = QUERY, ratios=(0.1, 0.3), spec: Spec = SPEC, chosen=None) -> Attended:
    clusters = store.clusters.tolist()
    store.budgets.copy_(torch.tensor([budget(*ratios, query.estimation, n) for n in clusters]))
    most = max(clusters)
    width = most if query.max_error or chosen is not None else part(ratios[0], most)
    return portable.attend(x.q, store, query._replace(k_slots=width), spec, chosen)


def answers(
    x: Rows, store: Store, query: Query = QUERY, ratios=(0.1, 0.3), spec: Spec = SPEC
) -> list[reference.Result]:
    return [
        reference.wave_attention(
            x.q[b], x.k[b], x.v[b], index_of(x, store, b, spec), options(spec), scale=query.scale,
            retrieval_ratio=ratios[0], estimation_ratio=ratios[1], estimation=query.estimation,
            group_reduce=query.reduce, weight_by_size=query.weight_by_size, max_error=query.max_error or None,
        )
        for b in range(len(x.k))
    ]  # fmt: skip


def chosen_mask(got: Attended, b: int, count: int) -> Tensor:
    mask = torch.zeros(got.chosen.shape[1], count + 1, dtype=torch.bool)
    return mask.scatter_(1, got.chosen[b].long() % (count + 1), True)[:, :count]  # -1 falls in the last column


def check(x: Rows, got: Attended, wanted: list[reference.Result], atol: float) -> None:
    for b, result in enumerate(wanted):
        assert torch.equal(chosen_mask(got, b, result.retrieved.shape[1]), result.retrieved)
        for name in ("out", "lse", "lower", "upper"):
            torch.testing.assert_close(getattr(got, name)[b], getattr(result, name), rtol=atol, atol=atol, msg=name)
        chosen = got.chosen[b]
        head = [c[c >= 0] for c in chosen]
        assert all((c.diff() > 0).all() and (row[len(c) :] == -1).all() for c, row in zip(head, chosen, strict=True))


def planted(tokens: int, width: int, d: int = 16, seed: int = 0) -> Tensor:
    """Keys `[tokens, 2, d]` in runs of `width` near well separated directions, so that no rounding moves a label."""
    g = torch.Generator().manual_seed(seed)
    near = torch.linalg.qr(torch.randn(2, d, d, generator=g, dtype=torch.float64)).Q
    run = torch.arange(tokens) // width % d
    return 5 * near[:, run].transpose(0, 1) + 0.02 * torch.randn(tokens, 2, d, generator=g, dtype=torch.float64)
