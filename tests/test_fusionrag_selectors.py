import copy
import itertools

import pytest
import torch

from attnlab.fusionrag import SELECTORS, ChunkStore, FusionRAG
from attnlab.fusionrag.pipeline import choose
from tests.fusionrag_plain import Mixed, attentions, cache_of, full, ids, stitched
from tests.hf_models import CLOSE, build

SYSTEM, QUESTION = ids(5, 0), ids(6, 1)
CHUNKS = [ids(n, 2 + n) for n in (12, 9, 14)]
BOUNDS = [5, 17, 26, 40]
CONTEXT = [*SYSTEM, *(i for c in CHUNKS for i in c)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    model = build()
    model.set_attn_implementation("sdpa")
    return model


def scores(model, selector, questions=QUESTION, chunks=CHUNKS, **options):
    """What a selector says of the first question's context tokens."""
    found = []

    def spy(request):
        found.append(SELECTORS[selector](request))
        return found[0]

    rag = FusionRAG(model, system=SYSTEM)
    rag.generate(questions, chunks, selector=spy, max_new_tokens=1, **{"rate": 0.3, **options})
    return found[0]


def chosen_by(model, selector, rate, questions=QUESTION, chunks=CHUNKS, **options):
    """Positions that are recomputed, for each question."""
    found = []

    def spy(request):
        found.append(request.pool.own)
        request.pool.own = lambda positions: found.append(positions) or found[0](positions)
        return SELECTORS[selector](request)

    rag = FusionRAG(model, system=SYSTEM)
    report = rag.generate(questions, chunks, selector=spy, rate=rate, max_new_tokens=1, **options).report
    rows = [[i for i in row if i >= 0] for row in found[1].tolist()]
    assert [len(row) for row in rows] == [r.recomputed for r in report.requests]
    assert all(row == sorted(set(row)) for row in rows)
    return rows


def restricted(weights, bounds):
    """Softmax weights `[..., keys]` renormalised over each range, 0 elsewhere."""
    out = torch.zeros_like(weights)
    for a, b in itertools.pairwise(bounds):
        out[..., a:b] = weights[..., a:b] / weights[..., a:b].sum(-1, keepdim=True)
    return out


def over_stale_cache(model):
    at = range(len(CONTEXT), len(CONTEXT) + len(QUESTION))
    return attentions(model, Mixed(*stitched(model, SYSTEM, CHUNKS)), QUESTION, list(at))


def deviation(fresh, stale):
    return sum((a - b).square().sum((-1, -2)) for a, b in zip(fresh, stale, strict=True)).sqrt()


@pytest.mark.parametrize("turned", [False, True])
def test_fusionrag_scores_are_the_last_layers_attention_per_chunk(model, turned):
    expected = restricted(over_stale_cache(model)[-1], BOUNDS).sum((0, 1))[:40]
    found = scores(model, "fusionrag", rotate_on_load=turned)[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert [float(found[a:b].sum()) for a, b in itertools.pairwise(BOUNDS)] == pytest.approx([24] * 3)


def test_prophet_scores_are_all_layers_attention_over_the_context(model):
    weights = over_stale_cache(model)
    expected = restricted(weights, [BOUNDS[0], BOUNDS[-1]]).sum((0, 1, 2))[:40]
    found = scores(model, "prophet")[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float(found.sum()) == pytest.approx(3 * 24)


def test_kv_deviation_scores_are_the_second_layers_distance(model):
    fresh, stale = cache_of(model, CONTEXT), stitched(model, SYSTEM, CHUNKS)
    expected = deviation([x[1] for x in fresh], [x[1] for x in stale])
    found = scores(model, "kv_deviation")[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float(found[17:].min()) > 0.1  # far from rounding
    torch.testing.assert_close(found[:17], torch.zeros(17), atol=2e-5, rtol=0)


def test_kv_deviation_needs_two_layers():
    model = build(num_hidden_layers=1)
    with pytest.raises(ValueError, match="reads the second layer, the model has one"):
        FusionRAG(model).generate(QUESTION, CHUNKS, selector="kv_deviation", rate=0.3)


def test_oracle_scores_are_true_attention_times_true_distance(model):
    fresh, stale = cache_of(model, CONTEXT), stitched(model, SYSTEM, CHUNKS)
    at = range(len(CONTEXT), len(CONTEXT) + len(QUESTION))
    weights = restricted(attentions(model, Mixed(*fresh), QUESTION, list(at)), [5, 40])[..., :40].sum((1, 2))
    expected = sum(weights[i] * deviation([x[i] for x in fresh], [x[i] for x in stale]) for i in range(3))
    torch.testing.assert_close(scores(model, "oracle")[0], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("selector", SELECTORS)
def test_all_take_the_same_number_of_stale_tokens(model, selector):
    for rate in (0.1, 0.4, 0.6):
        (row,) = chosen_by(model, selector, rate)
        assert len(row) == min(round(rate * 35), 23)
        assert row[0] >= 17
        assert row[-1] < 40


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_best_are_taken(model, selector):
    found = scores(model, selector)[0]
    best = sorted(range(17, 40), key=lambda i: (-float(found[i]), i))[:10]
    assert chosen_by(model, selector, 10 / 35) == [sorted(best)]


def test_first_k_takes_as_many_of_each_chunk(model):
    chunks = [ids(4, 200), ids(9, 201), ids(3, 202), ids(8, 203)]
    assert chosen_by(model, "first_k", 6 / 24, chunks=chunks) == [[9, 10, 18, 19, 21, 22]]
    assert chosen_by(model, "first_k", 7 / 24, chunks=chunks) == [[9, 10, 11, 18, 19, 21, 22]]
    assert chosen_by(model, "first_k", 11 / 24, chunks=chunks) == [[9, 10, 11, 12, 18, 19, 20, 21, 22, 23, 24]]


def test_random_follows_its_seed_and_not_the_batch(model):
    one = chosen_by(model, "random", 0.3, seed=1)
    assert chosen_by(model, "random", 0.3, seed=1) == one != chosen_by(model, "random", 0.3, seed=2)
    batch = chosen_by(model, "random", 0.3, [ids(9, 300), QUESTION], [[*CHUNKS, CHUNKS[0]], CHUNKS], seed=1)
    assert batch[1] == one[0]
    counts = torch.zeros(40)
    for seed in range(60):
        counts[chosen_by(model, "random", 10 / 35, seed=seed)[0]] += 1
    assert counts[:17].sum() == 0
    assert counts[17:].min() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_where_the_kernels_run(model, selector, device):
    """Only there does a tensor left on the wrong device show."""
    found, want = scores(copy.deepcopy(model).to(device), selector), scores(model, selector)
    torch.testing.assert_close(found[:, 17:].cpu(), want[:, 17:], atol=2e-4, rtol=2e-4)


class Ragged:
    """A request of which only the batch is there: two rows, 2 and 3 chunks, behind 2 tokens of system prompt."""

    class batch:
        offsets = torch.tensor([[2, 5, 9, 9], [2, 4, 6, 11]])
        context = torch.zeros(2, 11, dtype=torch.int64)


@pytest.mark.parametrize(
    ("budgets", "exact", "expected", "counts"),
    [
        ([0, 0], [True, True], [[], []], [0, 0]),
        ([2, 0], [False, False], [[2, 3], [-1, -1]], [2, 0]),
        ([2, 3], [True, False], [[5, 6, -1], [2, 3, 4]], [2, 3]),
        ([9, 9], [True, False], [[5, 6, 7, 8, *[-1] * 5], list(range(2, 11))], [4, 9]),
        ([7, 9], [True, True], [[5, 6, 7, 8, -1, -1, -1], list(range(4, 11))], [4, 7]),
    ],
)
def test_ties_go_to_the_lower_position_and_padding_is_never_chosen(budgets, exact, expected, counts):
    def tied(request):
        found = torch.zeros(2, 11)
        found[0, 9:], found[:, :2] = torch.nan, torch.inf
        return found

    chosen, taken = choose(Ragged, tied, budgets, exact)
    assert chosen.tolist() == expected
    assert taken == counts


def test_higher_scores_win():
    marks = torch.tensor([[9.0, 9, 0, 1, 0, 2, 0, 0, 3, 9, 9], [9.0, 9, 0, 0, 5, 0, 1, 0, 0, 0, 2]])
    chosen, _ = choose(Ragged, lambda _: marks, [3, 2], [False, False])
    assert chosen.tolist() == [[3, 5, 8], [4, 10, -1]]


def test_a_score_of_minus_infinity_is_the_last_of_the_chunks_and_before_all_else():
    marks = torch.full((2, 11), -torch.inf)
    marks[0, 7] = 0
    chosen, _ = choose(Ragged, lambda _: marks, [3, 2], [True, False])
    assert chosen.tolist() == [[5, 6, 7], [2, 3, -1]]


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (torch.zeros(11), r"every context token, \[2, 11\], got \[11\]"),
        (torch.zeros(2, 1), r"every context token, \[2, 11\], got \[2, 1\]"),
        ([[0.0] * 11] * 2, "every context token, .* got list"),
        (torch.full((2, 11), torch.nan), "the chunks' tokens by numbers, got NaN"),
    ],
)
def test_what_a_selector_must_return(found, match):
    with pytest.raises(ValueError, match="FusionRAG: selector must score " + match):
        choose(Ragged, lambda _: found, [3, 2], [True, False])


def test_the_selector_does_not_run_when_nothing_is_to_choose(model):
    def never(request):
        raise AssertionError("ran")

    rag = FusionRAG(model, system=SYSTEM)
    for rate in (0, 1):
        rag.generate(QUESTION, CHUNKS, rate=rate, selector=never, max_new_tokens=1)
    rag.generate(QUESTION, CHUNKS[:1], rate=0.5, selector=never, max_new_tokens=1)


def test_recovery_does_not_fall_as_the_rate_grows(model):
    """Logits' distance to a full prefill, relative, averaged over 6 contexts."""
    rates, seeds = (0, 0.15, 0.3, 0.6, 1), range(6)
    off = {name: torch.zeros(len(rates)) for name in SELECTORS}
    rag = FusionRAG(model, store=ChunkStore(), system=SYSTEM)
    for seed in seeds:
        chunks, question = [ids(16, 1000 + 10 * seed + i) for i in range(4)], ids(6, 1009 + 10 * seed)
        truth = full(model, SYSTEM, chunks, question, 1)[1][0]

        def distance(rate, name="fusionrag", chunks=chunks, question=question, truth=truth):
            options = {"rate": rate, "selector": name, "max_new_tokens": 1, "return_logits": True}
            found = rag.generate(question, chunks, **options).logits[0][0]
            return (found - truth).norm() / truth.norm() / len(seeds)

        ends = distance(0), distance(1)  # whoever selects
        for name, total in off.items():
            total += torch.stack([ends[0], *(distance(rate, name) for rate in rates[1:-1]), ends[1]])
    for name, distances in off.items():
        assert (distances.diff() < 0).all(), (name, distances)
        assert distances[0] > 0.4
        assert distances[-1] < 1e-5
    assert off["fusionrag"][1] < 0.9 * off["random"][1]
