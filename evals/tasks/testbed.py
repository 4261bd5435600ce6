"""The twins of RULER and of questions over documents, in the testbed's own words, of exactly the length asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Method, Subject
from attnlab.evals.harness.task import Outcome, Prompt
from attnlab.evals.testbed.generators import Question, Sample, Tokens, documents, frequent, needles, tracking
from attnlab.evals.testbed.vocabulary import ASK, DOC, DOCUMENTS, NAMES, NEEDLE, NEEDLES

from .generation import GenerationTask

CHUNK = 24
QUERIES = 4
SHORTEST = 128
Rng = np.random.Generator


def _two_hops(rng: Rng, length: int) -> Sample:
    """Facts stand far from their entity's name, as a rule in another chunk."""
    while True:
        sample = documents(rng, length, hops=2, asked=1, filler=0.8, gap=8)
        if sample.questions:
            return sample


def _one_hop(rng: Rng, length: int) -> Sample:
    while True:
        sample = documents(rng, length, hops=1, asked=1)
        if sample.questions:
            return sample


class Twin(NamedTuple):
    """A generator of `length` tokens, and how many words of an answer make one reference, from its end."""

    draw: Callable[[Rng, int], Sample]
    words: int
    references: int


TWINS = {
    "testbed_single": Twin(lambda rng, n: needles(rng, n, keys=1, values=1, asked=1), 2, 1),
    "testbed_multikey": Twin(lambda rng, n: needles(rng, n, keys=n // 12, values=1, asked=1), 2, 1),
    "testbed_multivalue": Twin(lambda rng, n: needles(rng, n, keys=8, values=4, asked=1), 2, 4),
    # The generator has room for each question's answer of 3 tokens, and only one of them follows a prompt.
    "testbed_multiquery": Twin(
        lambda rng, n: needles(rng, n + 3 * (QUERIES - 1), keys=n // 24, values=1, asked=QUERIES), 2, 1
    ),
    "testbed_tracking": Twin(lambda rng, n: tracking(rng, n, hops=4, chains=2, asked=1), 1, 5),
    "testbed_frequent": Twin(lambda rng, n: frequent(rng, n, alpha=2.0), 1, 3),
    "testbed_documents": Twin(_one_hop, 2, 1),
    "testbed_twohop": Twin(_two_hops, 2, 1),
}


class TestbedTask(GenerationTask):
    """A twin; a context is asked one question, or several one after another."""

    __test__ = False  # no test, whatever pytest thinks of its name

    def __init__(self, name: str) -> None:
        self.twin = TWINS[name]
        super().__init__(name, "string_match_all", binary=self.twin.references == 1 and name != "testbed_multiquery")

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        if not speaks(subject):
            raise UsageError(f"{self.name} is written in the testbed's words: {subject.name} has no token for each")
        check_length(self.name, min(lengths))
        super().check(subject, lengths)

    def build(self, subject: Subject, length: int, index: int, rng: Rng) -> Prompt:
        sample = self.twin.draw(rng, length)
        return prompt(sample, self.twin.words, self.twin.references)

    def run(self, batch: Batch, method: Method) -> list[Outcome]:
        """Each question is asked after the context alone; the score of several is the share of them answered."""
        if self.name != "testbed_multiquery":
            return super().run(batch, method)
        items, question_ids = batch.items, batch.question_ids
        turns = []
        try:
            for turn in range(QUERIES):
                batch.items = [_turn(item, turn) for item in items]
                batch.question_ids = [_part(ids, turn) for ids in question_ids]
                turns.append(super().run(batch, method))
        finally:
            batch.items, batch.question_ids = items, question_ids
        return [_together(outcomes) for outcomes in zip(*turns, strict=True)]


def make(name: str, data_dir: Path | None = None) -> TestbedTask:
    return TestbedTask(name)


def speaks(subject: Subject) -> bool:
    """Whether the subject has a token of its own for each of the testbed's words."""
    words = NAMES[ASK:]
    try:
        ids = subject.ids(" ".join(words))
    except UsageError:
        return False
    return len(ids) == len(set(ids)) == len(words)


def check_length(task: str, length: int) -> None:
    if length < SHORTEST:
        raise UsageError(f"{task}: length {length} is too short, it takes {SHORTEST} tokens or more")


def prompt(sample: Sample, words: int, references: int) -> Prompt:
    """The text of a sample; the sequence's first token is the model's to add."""
    context = sample.context[1:]
    questions = [text(question.text) for question in sample.questions]
    chunks: list[str] = []
    facts: dict[str, Any] = {"questions": questions} if len(questions) > 1 else {}
    if context[0] == NEEDLES and not facts:
        facts["depth"] = depth(sample)
    if context[0] == DOCUMENTS:
        facts["apart"] = apart(sample)
        chunks = [text(context[i : i + CHUNK]) for i in range(1, len(context), CHUNK)]
    return Prompt(
        context=text(context),
        question=" ".join(questions),
        answers=tuple(part for question in sample.questions for part in _references(question, words, references)),
        max_new_tokens=max(len(question.answer) for question in sample.questions) + 1,
        chunks=tuple(chunks),
        facts=facts,
    )


def text(tokens: Sequence[int]) -> str:
    return " ".join(NAMES[t] for t in tokens)


def depth(sample: Sample) -> float:
    """The share of the context before the needle that is asked for, its key's first."""
    key = sample.questions[0].text[1:3]
    return round(_find(sample.context, [NEEDLE, *key]) / len(sample.context), 4)


def apart(sample: Sample) -> int:
    """Tokens from an entity's name to the fact that is asked for; of two hops the larger number."""
    asked, answer = sample.questions[0]
    hops = [(asked[1:3], asked[3])] if len(asked) == 4 else [(asked[2:4], asked[4]), (answer[:2], asked[1])]
    distances = []
    for entity, what in hops:
        name = _find(sample.context, [DOC, *entity]) + 1
        distances.append(sample.context.index(what, name) - name)
    return max(distances)


def _find(tokens: Tokens, part: Tokens) -> int:
    return next(i for i in range(len(tokens)) if tokens[i : i + len(part)] == part)


def _references(question: Question, words: int, references: int) -> list[str]:
    wanted = question.answer[-words * references :]
    return [text(wanted[i : i + words]) for i in range(0, len(wanted), words)]


def _turn(item: Prompt, turn: int) -> Prompt:
    return replace(item, question=item.facts["questions"][turn], answers=item.answers[turn : turn + 1])


def _part(ids: list[int], turn: int) -> list[int]:
    """Of several questions' ids, which are equally long."""
    each = len(ids) // QUERIES
    return ids[each * turn : each * (turn + 1)]


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    n = len(outcomes)
    scores = {name: sum(o.scores[name] for o in outcomes) / n for name in outcomes[0].scores}
    budgets = [o.budget for o in outcomes if o.budget is not None]
    budget = sum(budgets) / len(budgets) if budgets else None
    return Outcome(scores, [o.output for o in outcomes], budget, sum(o.seconds for o in outcomes))
