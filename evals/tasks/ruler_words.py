"""RULER's common and frequent words, by its published templates and counts."""

import math
import string
from pathlib import Path
from random import Random

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt

from .generation import GenerationTask, data_file, fitted
from .ruler_data import all_words, check_words, english_words

CWE_MAX_NEW_TOKENS = 120
CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
)
CWE_QUESTION = (
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
LONG = 4096  # from here on words come more often
FWE_MAX_NEW_TOKENS = 50
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
FWE_SHORTEST = 300  # tokens: five words are left to tell apart
FWE_LEAST = 53  # words: from here on the fourth count is above the fifth
ALPHA, ZETA = 2, math.pi**2 / 6


class CommonWords(GenerationTask):
    """As published, except that each sample has its own number of words.

    Where wonderwords has too few, all come from RULER's english_words.json in the data folder.
    """

    def __init__(self, name: str, data_dir: Path | None) -> None:
        super().__init__(name, "string_match_all")
        check_words(name)
        self.data_dir = data_dir

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        seed = int(rng.integers(2**63))
        words, more = all_words(), self._more()

        def make(n: int) -> Prompt:
            return common_words(Random(seed), n, words if n <= len(words) else more, length)

        most = max(len(words), len(more))
        made = fitted(self.name, subject, length, make, COMMON + 1, most)
        if made.facts["words"] == most:
            where = data_file(f"{self.name} at length {length}", self.data_dir, "english_words.json")
            raise UsageError(f"{self.name}: length {length} takes more than the {most} words of {where}")
        return made

    def _more(self) -> list[str]:
        path = Path(self.data_dir or ".") / "english_words.json"
        return english_words(path) if self.data_dir and path.is_file() else []


def common_words(rand: Random, n: int, words: list[str], length: int) -> Prompt:
    """`n` different words; in front an example of its own, solved."""
    shown, often, seldom = ((40, 10, 3), 30, 3) if length >= LONG else ((20, 3, 1), 6, 1)
    example, solved = _numbered(rand, rand.sample(all_words(), shown[0]), *shown[1:])
    listed, common = _numbered(rand, rand.sample(words, n), often, seldom)
    answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(solved))
    example = CWE_TEXT.format(context=example) + CWE_QUESTION + " " + answer + "\n"
    return Prompt(
        context=example + CWE_TEXT.format(context=listed),
        question=CWE_QUESTION,
        answers=tuple(common),
        max_new_tokens=CWE_MAX_NEW_TOKENS,
        facts={"words": n},
    )


def _numbered(rand: Random, words: list[str], often: int, seldom: int) -> tuple[str, list[str]]:
    common = words[:COMMON]
    listed = common * often + words[COMMON:] * seldom
    rand.shuffle(listed)
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed)), common


class FrequentWords(GenerationTask):
    """As published, except that the text ends less than a step of one word, not of a 32nd, below the length."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "string_match_all")

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        if length < FWE_SHORTEST:
            raise UsageError(f"{self.name}: length {length} is too short, it takes {FWE_SHORTEST} tokens or more")
        seed = int(rng.integers(2**63))
        vocabulary = (length - FWE_MAX_NEW_TOKENS) // 50
        return fitted(self.name, subject, length, lambda n: frequent_words(Random(seed), n, vocabulary), FWE_LEAST)


def frequent_words(rand: Random, n: int, vocabulary: int) -> Prompt:
    """Word `k` comes `floor(n / (k ** alpha zeta(alpha)))` times: the first is dots, the next three are asked."""
    words: set[str] = set()
    while len(words) < vocabulary:
        words.add("".join(rand.choices(string.ascii_lowercase, k=6)))
    ranked = sorted(words)
    rand.shuffle(ranked)
    ranked[0] = "..."
    text = [word for k, word in enumerate(ranked, 1) for _ in range(int(n / (k**ALPHA * ZETA)))]
    rand.shuffle(text)
    context = FWE_TEXT.format(context=" ".join(text))
    return Prompt(context, FWE_QUESTION, tuple(ranked[1:4]), FWE_MAX_NEW_TOKENS, facts={"words": n})
