"""RetroInfer's index: clustering against NumPy loops, what the index holds, and how it grows."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import WaveConfig
from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.spec import plan
from attnlab.reference import retroinfer as wave
from tests.wave_oracle import CLOSE, SMALL, dense, numpy_kmeans, row


@pytest.mark.parametrize("final_pass", ["segment", "global"])
@pytest.mark.parametrize("d", [8, 2])
@pytest.mark.parametrize(
    "tokens, segment, per_cluster, iterations",
    [(80, 40, 4, 1), (80, 40, 4, 2), (93, 40, 4, 10), (41, 40, 7, 3), (30, 100, 1, 3), (5, 8, 16, 2), (1, 8, 4, 3)],
)
def test_kmeans_equals_numpy(final_pass, d, tokens, segment, per_cluster, iterations):
    options = wave.Options(
        segment=segment, tokens_per_cluster=per_cluster, iterations=iterations, final_pass=final_pass
    )
    k = row(tokens, d=d).k[:, 0] + 3.0
    labels, centroids = wave.segmented_kmeans(k, options)
    want, directions = numpy_kmeans(k.numpy(), options)
    assert labels.tolist() == want.tolist()
    assert len(directions) == wave.slots(tokens, options)
    if len(directions) > 1:  # the sum of everything is zero, so a lone cluster's direction is a rounding error
        np.testing.assert_allclose((centroids - k.mean(0)).numpy(), directions, rtol=1e-9, atol=1e-9)


def test_passes_differ_and_segments_do_not_mix():
    k = row(120).k[:, 0]
    own, everywhere = (wave.segmented_kmeans(k, SMALL._replace(final_pass=p))[0] for p in ("segment", "global"))
    segment = torch.arange(120) // 40
    assert torch.equal(own // 10, segment) and not torch.equal(everywhere // 10, segment)


@given(seed=st.integers(0, 1000), shared=st.sampled_from([0.0, 5.0]), copies=st.sampled_from([1, 7]))
def test_objective_never_falls(seed, shared, copies):
    k = row(64, seed=seed).k[::copies, 0].repeat_interleave(copies, 0) + shared
    x, values = k - k.mean(0), []
    for iterations in range(1, 9):
        labels, centroids = wave.segmented_kmeans(k, SMALL._replace(iterations=iterations))
        values.append(float((x * (centroids - k.mean(0))[labels]).sum()))
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0] or copies == 7


@given(seed=st.integers(0, 1000), shared=st.sampled_from([0.0, 5.0]), segment=st.sampled_from([40, 64]))
@settings(max_examples=10)
def test_portable_objective_never_falls(seed, shared, segment):
    k, values = row(64, seed=seed).k + shared, []
    for iterations in (1, 2, 3, 4, 8):
        spec = WaveConfig(segment=segment, tokens_per_cluster=4, update_every=4, iterations=iterations).spec
        labels = portable.kmeans(k, plan(spec, [(0, 0, 64)], [0]), spec).long()
        heads = zip((k - k.mean(0)).unbind(1), labels, strict=True)
        values.append(float(sum(wave.total(x, y, 16).norm(dim=1).sum() for x, y in heads)))
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0]


def test_ties_go_to_the_lowest_and_the_rest_is_empty():
    k, v = torch.ones(40, 1, 4, dtype=torch.float64), row(40, kv_heads=1, d=4).v
    k[20:] = -1
    index = wave.build_index(k, v, SMALL._replace(sink=0, local=0))
    # Ten clusters start from five copies of each of two keys.
    assert index.sizes.tolist() == [[20, 0, 0, 0, 0, 20, 0, 0, 0, 0]] and index.sizes.dtype == torch.int32
    assert torch.equal(index.centroids[0, 1:5], torch.full((4, 4), 0.5, dtype=torch.float64))  # as they started
    assert (index.radius == 0).all() and (index.value_sums[0, 1] == 0).all()
    result = wave.wave_attention(row(1, 2, 1, 4).q, k, v, index, SMALL._replace(sink=0, local=0), estimation="all")
    assert (result.retrieved | result.estimated).sum() == 2  # equal scores: the first one is retrieved
    torch.testing.assert_close(result.lse, dense(row(1, 2, 1, 4).q, k, v)[1], **CLOSE)
    options = SMALL._replace(sink=0, local=0)
    everything = wave.wave_attention(row(1, 2, 1, 4).q, k, v, index, options, retrieval_ratio=1.0)
    assert torch.equal(everything.retrieved, index.sizes > 0)


def test_nothing_left_over_the_mean_stays_put():
    labels, centroids = wave.segmented_kmeans(torch.full((24, 4), 2.0, dtype=torch.float64), SMALL)
    assert (labels == 0).all() and torch.equal(centroids, torch.full((6, 4), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("final_pass", ["segment", "global"])
def test_cap_splits_in_token_order(final_pass):
    k = row(90).k[:, 0]
    k[::4] = k[1]
    options = SMALL._replace(final_pass=final_pass)
    whole, kept = wave.segmented_kmeans(k, options)
    labels, centroids = wave.segmented_kmeans(k, options._replace(max_cluster=4))
    assert int(whole.bincount().max()) > 8 and int(labels.bincount().max()) == 4
    assert len(centroids) == wave.slots(90, options._replace(max_cluster=4)) == len(kept) + 90 // 4
    slot = 0
    for cluster in range(len(kept)):
        members = (whole == cluster).nonzero()[:, 0].tolist()
        for piece in [members[i : i + 4] for i in range(0, len(members), 4)] or [[]]:
            assert (labels == slot).nonzero()[:, 0].tolist() == piece
            assert torch.equal(centroids[slot], kept[cluster])
            slot += 1


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 60, 101])
def test_index_by_hand(tokens):
    _, k, v = row(tokens)
    index = wave.build_index(k, v, SMALL)
    count = max(0, tokens - 7)
    assert index.indexed == count and index.sizes.sum(1).tolist() == [count] * 2
    assert index.sizes.shape[1] == wave.slots(count, SMALL)
    for g in range(2):
        keys, values = k[2 : 2 + count, g], v[2 : 2 + count, g]
        for c in range(index.sizes.shape[1]):
            mine = [t for t in range(count) if int(index.labels[g, t]) == c]
            assert len(mine) == index.sizes[g, c]
            torch.testing.assert_close(index.value_sums[g, c], values[mine].sum(0), **CLOSE)
            if mine:
                torch.testing.assert_close(index.centroids[g, c], keys[mine].mean(0), **CLOSE)
                farthest = max(math.dist(keys[t].tolist(), index.centroids[g, c].tolist()) for t in mine)
                assert float(index.radius[g, c]) == pytest.approx(farthest, abs=1e-12)
        order = index.members()[g].tolist()
        assert order == sorted(range(count), key=lambda t: (int(index.labels[g, t]), t))


def test_clusters_per_head_and_repeatable():
    _, k, v = row(100)
    index, again = (wave.build_index(k.float(), v.float(), SMALL) for _ in range(2))
    assert not torch.equal(index.labels[0], index.labels[1])
    assert all(torch.equal(a, b) for a, b in zip(index, again, strict=True))
    one = wave.build_index(k[:, 1:], v[:, 1:], SMALL)
    both = wave.build_index(k, v, SMALL)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(one, both, strict=True))


@pytest.mark.parametrize("final_pass, cap", [("segment", None), ("global", None), ("segment", 5)])
def test_decoding_equals_building_with_the_same_grouping(final_pass, cap):
    options = SMALL._replace(final_pass=final_pass, max_cluster=cap)
    _, k, v = row(100)
    index, grown = wave.build_index(k[:60], v[:60], options), []
    for tokens in range(61, 101):
        before, index = index, wave.extend_index(index, k[:tokens], v[:tokens], options)
        if index is not before:
            grown.append((tokens, index.indexed - before.indexed, index.sizes.shape[1] - before.sizes.shape[1]))
            assert all(torch.equal(a, b[:, : a.shape[1]]) for a, b in zip(before, index, strict=True))
    clusters = 3 + (12 // cap if cap else 0)
    assert grown == [(72, 12, clusters), (84, 12, clusters), (96, 12, clusters)]
    whole = wave.build_index(k[:96], v[:96], options, labels=index.labels)
    count = whole.sizes.shape[1]
    for name in ("sizes", "value_sums", "radius"):
        a, b = getattr(index, name), getattr(whole, name)
        filled = max(count, a.shape[1])
        a, b = (torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, filled - x.shape[1])) for x in (a, b))
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_new_prompt_part_is_clustered_at_once_and_a_short_one_waits():
    _, k, v = row(160)
    index = wave.build_index(k[:60], v[:60], SMALL)
    assert wave.extend_index(index, k[:71], v[:71], SMALL) is index
    grown = wave.extend_index(index, k, v, SMALL)
    assert grown.indexed == 160 - 7
    part = wave.build_index(k[53:], v[53:], SMALL._replace(sink=2))  # its sinks are the last two already indexed
    assert torch.equal(grown.labels[:, 53:] - index.sizes.shape[1], part.labels)
    assert torch.equal(grown.sizes[:, index.sizes.shape[1] :], part.sizes)
