"""Metrics against cases worked by hand."""

import pytest

from attnlab.evals.tasks import metrics
from attnlab.evals.tasks.metrics import (
    METRICS,
    exact_match,
    f1,
    normalise,
    rouge_1,
    string_match_all,
    string_match_part,
)


@pytest.mark.parametrize(
    ("prediction", "answers", "all_of_them", "any_of_them"),
    [
        ("1234567", ["1234567"], 1, 1),
        ("The numbers are 12, 34 and 56.", ["12", "34", "56", "78"], 3 / 4, 1),
        ("PARIS, of course", ["Paris", "paris, OF"], 1, 1),
        ("Lyon", ["Paris", "Nice"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("12345", ["234"], 1, 1),  # a part of a word counts, as published
        ("k1  k2", ["k1 k2"], 0, 0),  # spaces do, too
        ("one", ["one", "one"], 1, 1),
        ("two", ["one", "two"], 1 / 2, 1),
    ],
)
def test_string_match(prediction, answers, all_of_them, any_of_them):
    assert string_match_all(prediction, answers) == all_of_them
    assert string_match_part(prediction, answers) == any_of_them


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower, in\tParis!", "eiffeltower in paris"),
        ("A an the theatre banana", "theatre banana"),
        ("it's a 'U.S.' thing\n", "its us thing"),
        ("The.", ""),
        ("", ""),
        ("Zürich’s", "zürich’s"),  # what is no ASCII punctuation stays
        ("end—the—end", "end— —end"),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the cat sat", ["cat sat"], 1),  # articles do not count
        ("Cat, sat!", ["a cat sat"], 1),
        ("the cat sat down", ["cat"], 1 / 2),  # precision 1/3, recall 1
        ("cat cat cat", ["cat dog"], 2 / 5),  # one of three, one of two
        ("cat cat", ["cat cat dog"], 4 / 5),  # both of two, two of three
        ("dog", ["cat"], 0),
        ("", ["cat"], 0),
        ("cat", ["the"], 0),
        ("the", ["a"], 0),  # nothing is left of either
        ("red fox", ["blue fox", "a red fox", "red"], 1),
        ("red fox", ["blue fox", "red"], 2 / 3),
        ("red fox", ["red", "blue fox"], 2 / 3),
    ],
)
def test_f1(prediction, answers, score):
    assert f1(prediction, answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the cat sat", ["cat sat"], 4 / 5),  # articles count: 2 of 3, 2 of 2
        ("The-Cat", ["the cat"], 1),  # marks end a word
        ("cats", ["cat"], 0),  # no stemming
        ("the the the", ["the cat"], 2 / 5),
        ("x_1 y", ["x 1 y"], 1),
        ("", ["cat"], 0),
        ("?!", ["cat"], 0),
        ("cat", ["?!"], 0),
        ("a b", ["c d", "b e", "b a"], 1),
    ],
)
def test_rouge_1(prediction, answers, score):
    assert rouge_1(prediction, answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The Cat.", ["cat"], 1),
        ("cat sat", ["cat"], 0),
        ("cat", ["cat sat"], 0),
        ("dog", ["cat", "a dog!"], 1),
        ("", ["cat"], 0),
        ("", ["the"], 1),
    ],
)
def test_exact_match(prediction, answers, score):
    assert exact_match(prediction, answers) == score


def test_metrics_by_name():
    assert set(METRICS) == {"string_match_all", "string_match_part", "f1", "rouge_1", "exact_match"}
    for name, (metric, score) in METRICS.items():
        assert metric.name == name and score is getattr(metrics, name)
        assert metric.percent and metric.higher_is_better
        assert metric.binary == (name in ("string_match_part", "exact_match"))
        assert isinstance(score("a cat", ["cat"]), float)
