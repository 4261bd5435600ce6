"""Scores of a generated answer against references, each in [0, 1]: `(prediction, answers) -> float`."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from attnlab.evals.harness.task import Metric

Score = Callable[[str, Sequence[str]], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER: the share of the references that the prediction contains, in any case of letters."""
    return sum(_contains(prediction, answer) for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER: 1 where the prediction contains any reference."""
    return float(any(_contains(prediction, answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """LongBench: F1 of the normalised words, each counted as often as both have it; the best reference counts."""
    words = normalise(prediction).split()
    return max(_f1(words, normalise(answer).split()) for answer in answers)


def rouge_1(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-1 F1: words are runs of letters and digits in lower case, unstemmed; the best reference counts."""
    words = _WORD.findall(prediction.lower())
    return max(_f1(words, _WORD.findall(answer.lower())) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is a normalised reference."""
    return float(normalise(prediction) in map(normalise, answers))


def normalise(text: str) -> str:
    """As SQuAD and LongBench do: lower case, no punctuation of ASCII, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", text).split())


METRICS: dict[str, tuple[Metric, Score]] = {
    score.__name__: (Metric(score.__name__, binary=binary), score)
    for score, binary in (
        (string_match_all, False),
        (string_match_part, True),
        (f1, False),
        (rouge_1, False),
        (exact_match, True),
    )
}


def _contains(prediction: str, answer: str) -> bool:
    return answer.lower() in prediction.lower()


def _f1(words: Sequence[str], reference: Sequence[str]) -> float:
    same = sum((Counter(words) & Counter(reference)).values())
    return 2 * same / (len(words) + len(reference)) if same else 0.0
