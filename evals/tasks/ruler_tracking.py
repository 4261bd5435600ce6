"""RULER's variable tracking: one chain of assignments in noise, after an example, by its published templates."""

import string
from itertools import pairwise
from random import Random

import numpy as np

from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt

from .generation import GenerationTask, fitted, largest
from .ruler_data import NOISE

MAX_NEW_TOKENS = 30
HOPS = 4
LETTERS = 5
EXAMPLE_TOKENS, EXAMPLE_LETTERS = 500, 3
TEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
QUESTION = (
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)


class VariableTracking(GenerationTask):
    """As published, except that each sample has its own size of haystack, and all names of a chain differ."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "string_match_all")

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        shown, asked = (int(seed) for seed in rng.integers(2**63, size=2))
        example = _example(subject, shown)

        def make(n: int) -> Prompt:
            text, question, names = problem(Random(asked), n)
            return Prompt(example + "\n" + text, question, tuple(names), MAX_NEW_TOKENS, facts={"hops": HOPS})

        return fitted(self.name, subject, length, make, HOPS + 1)


def problem(rand: Random, n: int, letters: int = LETTERS) -> tuple[str, str, list[str]]:
    """The text with `n` lines of noise, the question, and the names of the chain in order."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rand.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rand.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
    lines = [NOISE] * n
    for i, place in enumerate(sorted(rand.sample(range(n), len(chain)))):
        lines.insert(place + i, chain[i])
    question = QUESTION.format(query=value, num_v=len(names))
    return TEXT.format(context="\n".join(lines)), question, names


def _example(subject: Subject, seed: int) -> str:
    """A solved problem of about 500 tokens, names of three letters; never less than a line of noise per variable."""

    def tokens(n: int) -> int:
        text, question, _ = problem(Random(seed), n, EXAMPLE_LETTERS)
        return len(subject.start) + len(subject.ids(text)) + len(subject.ids(question))

    n = largest(tokens, EXAMPLE_TOKENS, HOPS + 1) or HOPS + 1
    text, question, names = problem(Random(seed), n, EXAMPLE_LETTERS)
    return text + question + " " + " ".join(names) + "\n"
