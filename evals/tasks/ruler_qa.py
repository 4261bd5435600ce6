"""RULER's questions about documents, by its published templates."""

from pathlib import Path
from random import Random

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt

from .generation import GenerationTask, data_file, fitted
from .ruler_data import Asked, hotpotqa, squad

MAX_NEW_TOKENS = 32
RULE = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TEXT = f"{RULE}\n\nThe following are given documents.\n\n{{context}}\n\n{RULE}\n\n"
QUESTION = "Question: {query} Answer:"
DOCUMENT = "Document {i}:\n{document}"
FILES = {"qa_1": ("squad.json", squad), "qa_2": ("hotpotqa.json", hotpotqa)}


class DocumentQuestions(GenerationTask):
    """As published, except that each sample has its own number of documents. Sample `i` asks the `i`-th question."""

    def __init__(self, name: str, data_dir: Path | None) -> None:
        super().__init__(name, "string_match_part")
        file, read = FILES[name]
        self.asked, self.documents = read(data_file(name, data_dir, file))

    def available(self) -> int:
        return len(self.asked)

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        if index >= len(self.asked):
            raise UsageError(f"{self.name}: sample {index} of {len(self.asked)} questions")
        seed, asked = int(rng.integers(2**63)), self.asked[index]
        mine = {*asked.documents, *asked.near}
        others = [i for i in range(len(self.documents)) if i not in mine]

        def make(n: int) -> Prompt:
            rand = Random(seed)
            texts = [self.documents[i] for i in chosen(rand, asked, others, n)]
            rand.shuffle(texts)
            listed = "\n\n".join(DOCUMENT.format(i=i, document=text) for i, text in enumerate(texts, 1))
            question = QUESTION.format(query=asked.question)
            return Prompt(TEXT.format(context=listed), question, tuple(asked.answers), MAX_NEW_TOKENS)

        return fitted(self.name, subject, length, make, len(asked.documents))


def chosen(rand: Random, asked: Asked, others: list[int], n: int) -> list[int]:
    """`n` documents: those that answer, then those near them, then any others; all of them again where `n` is more."""
    total = len(asked.documents) + len(asked.near) + len(others)
    if n >= total:
        return (list(range(total)) * -(-n // total))[:n]
    room = n - len(asked.documents)
    if room > len(asked.near):
        return [*asked.documents, *asked.near, *rand.sample(others, room - len(asked.near))]
    return [*asked.documents, *rand.sample(asked.near, room)]
