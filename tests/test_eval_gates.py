"""What the shipped model must show of the methods: n is stated, and where a claim is a difference its interval decides.

Greedy answers at 1024 tokens, all on the same prompts; a difference is paired, with the bootstrap's 95 % interval.
"""

import functools

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attnlab.evals import methods, tasks
from attnlab.evals.harness import prompts, statistics
from attnlab.evals.harness.task import Task
from attnlab.evals.methods import subject

LENGTH, SEED, AT_ONCE = 1024, 0, 16
NEEDLES, CHAINS, DOCUMENTS = "testbed_multikey", "testbed_tracking", "testbed_documents"
SMALL_BLOCKS = "moba:block=16+topk=16+phase=decode"
LARGE_BLOCKS = "moba:block=128+topk=2+phase=decode"


@functools.cache
def model():
    return subject.load("testbed", "cpu", "float32")


@functools.cache
def task(name) -> Task:
    return tasks.make(name, None)


@functools.cache
def batches(name, n):
    """Prompts, built once, whose dense prefill all methods share."""
    return [
        prompts.build(task(name), model(), LENGTH, range(i, min(i + AT_ONCE, n)), SEED) for i in range(0, n, AT_ONCE)
    ]


@functools.cache
def outcomes(name, method, n):
    (made,) = methods.parse(method)
    return [outcome for batch in batches(name, n) for outcome in task(name).run(batch, made)]


def scores(names, method, n):
    """Of `n` samples of each task, one after another."""
    metric = task(names[0]).metrics[0].name
    return [outcome.scores[metric] for name in names for outcome in outcomes(name, method, n)]


def minus(names, ours, base, n):
    """The paired difference in percentage points."""
    found = statistics.paired_difference(scores(names, ours, n), scores(names, base, n))
    return 100 * found.mean, 100 * found.low, 100 * found.high


@pytest.mark.parametrize("name", [NEEDLES, CHAINS, DOCUMENTS])
def test_full_attention_answers(name, one_thread):
    """n = 96."""
    got = scores([name], "full", 96)
    assert sum(got) / len(got) >= 0.95


def test_split_is_full(one_thread):
    """Answer by answer; n = 24 of each task."""
    for name in (NEEDLES, CHAINS, DOCUMENTS):
        want = [outcome.output for outcome in outcomes(name, "full", 24)]
        assert len(set(want)) > 20
        for plan in ("split:plan=head+shards=2", "split:plan=sequence+shards=3", "split:plan=request+shards=2"):
            assert [outcome.output for outcome in outcomes(name, plan, 24)] == want, (name, plan)


def test_small_blocks_find_more_than_large_ones(one_thread):
    """256 tokens either way; n = 32 of each of two tasks."""
    names = [NEEDLES, CHAINS]
    small, large = (outcomes(NEEDLES, spec, 32) for spec in (SMALL_BLOCKS, LARGE_BLOCKS))
    assert sum(x.budget for x in small) <= 1.05 * sum(x.budget for x in large)
    assert minus(names, SMALL_BLOCKS, LARGE_BLOCKS, 32)[1] > 0


def test_the_wave_is_within_five_points(one_thread):
    """At its defaults; n = 64 of each of three tasks."""
    assert minus([NEEDLES, CHAINS, DOCUMENTS], "wave", "full", 64)[1] > -5


def test_the_oracle_is_within_three_points(one_thread):
    """An eighth of the tokens; n = 64 of each of three tasks."""
    assert minus([NEEDLES, CHAINS, DOCUMENTS], "oracle", "full", 64)[1] > -3


def test_a_window_finds_little(one_thread):
    """n = 32 of each of three tasks."""
    assert minus([NEEDLES, CHAINS, DOCUMENTS], "streaming", "full", 32)[2] < -50


def test_recompute_brings_answers_back(one_thread):
    """Full reuse below 15 % recomputed below full attention, and the question's choice above chance; n = 96."""
    names = [DOCUMENTS]
    assert minus(names, "fusionrag:rate=.15", "reuse", 96)[1] > 0
    assert minus(names, "full", "fusionrag:rate=.15", 96)[1] > 0
    assert minus(names, "fusionrag:rate=.15", "fusionrag:rate=.15+selector=random", 96)[1] > 0
