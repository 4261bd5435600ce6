"""The choice of clusters: a radix select in Triton against a sort in Python."""

import math

import pytest
import torch

from attnlab.kernels import configs
from attnlab.kernels.retroinfer import score as scoring
from attnlab.kernels.retroinfer.score import NO_RANK, Scores
from attnlab.kernels.retroinfer.select import select
from attnlab.kernels.retroinfer.spec import Store, allocate
from tests.wave_stores import QUERY, SPEC


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    real = configs.get
    monkeypatch.setattr(configs, "get", lambda *key: real(*key) | {"BLOCK_N": 16})


def store_of(sizes: torch.Tensor, clusters: list[int], budgets: list[list[int]], device) -> Store:
    """A store with these `sizes [B, G, C]` and nothing else."""
    store = allocate(len(sizes), sizes.shape[1], 16, 4 * sizes.shape[2], SPEC, torch.float32, device)
    offsets = torch.nn.functional.pad(sizes, (1, 0)).cumsum(-1).int()
    return store._replace(
        offsets=offsets.to(device), radius=torch.zeros(sizes.shape, device=device),
        clusters=torch.tensor(clusters, dtype=torch.int32, device=device),
        budgets=torch.tensor(budgets, dtype=torch.int32, device=device),
    )  # fmt: skip


@pytest.mark.parametrize("spread", [2, 300, 2**20, 2**31 - 1])
def test_zones_are_the_first_of_a_stable_sort(spread, device):
    """Ranks from all equal to all apart, over tile borders, with empty slots, and budgets past what there is."""
    g = torch.Generator().manual_seed(spread)
    slots, clusters = 45, [45, 17, 0]
    sizes = torch.randint(0, 4, (3, 2, slots), generator=g)
    ranks = torch.randint(-spread, spread, (3, 2, slots), generator=g).int()
    ranks[sizes == 0] = NO_RANK.value
    scored = Scores(None, ranks.to(device), None)
    cases = [(5, 9, 5, "ratio"), (0, 3, 4, "ratio"), (1, 0, 8, "all"), (40, 40, 12, "ratio"), (45, 3, 45, "none")]
    for k, e, width, estimation in cases:
        store = store_of(sizes, clusters, [[k, e], [max(k - 1, 0), e], [0, 0]], device)
        query = QUERY._replace(estimation=estimation, k_slots=width)
        zones = select(scored, store, query, store.budgets[:, :1].expand(-1, 2))
        for b, h in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
            live = [c for c in range(clusters[b]) if sizes[b, h, c]]
            order = sorted(live, key=lambda c: (-int(ranks[b, h, c]), c))
            first = min(int(store.budgets[b, 0]), width)
            more = {"ratio": int(store.budgets[b, 1]), "all": slots, "none": 0}[estimation]
            read, guessed = sorted(order[:first]), sorted(order[first : first + more])
            members = torch.tensor([0, *(int(sizes[b, h, c]) for c in read)]).cumsum(0).tolist()
            pad = width - len(read)
            assert zones.chosen[b, h].tolist() == read + [-1] * pad
            assert zones.ends[b, h].tolist() == members[1:] + members[-1:] * pad
            assert zones.counts[b, h].tolist() == [len(read), members[-1], len(guessed)]
            assert zones.guessed[b, h, : len(guessed)].tolist() == guessed


def test_each_head_reads_as_many_as_it_wants(device):
    sizes = torch.ones(2, 3, 8, dtype=torch.long)
    ranks = torch.arange(8, dtype=torch.int32).expand(2, 3, -1).contiguous().to(device)
    store = store_of(sizes, [8, 8], [[0, 2], [0, 1]], device)
    wanted = torch.tensor([[0, 3, 8], [1, 2, 5]], dtype=torch.int32, device=device)
    zones = select(Scores(None, ranks, None), store, QUERY._replace(k_slots=6), wanted)
    assert zones.counts[..., 0].tolist() == [[0, 3, 6], [1, 2, 5]]
    assert zones.counts[..., 2].tolist() == [[2, 2, 2], [1, 1, 1]]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_ranks_of_special_scores(reduce, device):
    """A NaN of one head ranks first, -0 ties with 0, -inf is above no members at all."""
    store = store_of(torch.tensor([[[1, 1, 1, 1, 1, 0, 1]]]), [7], [[7, 0]], device)
    store.centroids[0, 0, :7, 0] = torch.tensor([2.0, -0.0, math.nan, 0.0, 3.0, 9.0, -math.inf], device=device)
    q, ordered_nan = torch.zeros(1, 3, 16, device=device), 0x7FC00000
    q[0, :, 0] = 1.0
    got = scoring.score(q, store, QUERY._replace(reduce=reduce, scale=1.0))
    scores = got.scores[0, 0, :, :7].cpu()
    assert (scores[:, 5] == -math.inf).all() and scores[:, 2].isnan().all() and (scores[:, 4] == 3).all()
    assert got.total.isnan().all() and (got.ranks[0, 0, :5] == ordered_nan).all()
    store.centroids[0, 0, 2, 0], q[0, 1, 0] = 1.0, math.nan  # a NaN of one head counts in every reduction
    got = scoring.score(q, store, QUERY._replace(reduce=reduce, scale=1.0))
    assert (got.ranks[0, 0, :5] == ordered_nan).all() and got.total[0, 0].isnan().tolist() == [False, True, False]
    store.centroids[0, 0, 2, 0] = 0.0  # one NaN makes all shares of a softmax NaN: without it they can be told apart
    q[0, 1] = 0.0
    ranks = scoring.score(q[:, :1].expand(-1, 3, -1), store, QUERY._replace(reduce=reduce, scale=1.0)).ranks[0, 0, :7]
    assert ranks[1] == ranks[2] == ranks[3]
    assert ranks[4] > ranks[0] > ranks[1] > ranks[6] > ranks[5] == NO_RANK.value
