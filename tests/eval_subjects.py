"""Subjects without a model: tokenizers to count with, and a method that knows the answers."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from attnlab.evals.harness.method import Answer, Batch, Method
from attnlab.evals.testbed import vocabulary


class Reader:
    """What a task needs of a subject."""

    def __init__(self, name: str, ids: Callable[[str], list[int]], start: Sequence[int] = (), max_length=1 << 20):
        self.name, self.ids, self.start, self.max_length = name, ids, list(start), max_length


@cache
def testbed() -> Reader:
    words = vocabulary.tokenizer()
    return Reader("testbed", lambda text: words(text, add_special_tokens=False)["input_ids"], [vocabulary.BOS])


@cache
def whitespace() -> Reader:
    seen: dict[str, int] = {}
    return Reader("whitespace", lambda text: [seen.setdefault(word, len(seen)) for word in text.split()], [0])


@cache
def byt5() -> Reader:
    from transformers import ByT5Tokenizer

    letters = ByT5Tokenizer()
    return Reader("byt5", lambda text: letters(text, add_special_tokens=False, verbose=False)["input_ids"])


@cache
def bpe() -> Reader:
    """A small byte-level BPE, made of a source file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, show_progress=False)
    pairs.train_from_iterator([Path(vocabulary.__file__).read_text()], trainer)
    return Reader("bpe", lambda text: pairs.encode(text).ids, [1])


class Knows(Method):
    """Answers from a function of (item, its question's ids); remembers what it was asked."""

    spec, options = "knows", {}

    def __init__(self, says: Callable[[object, list[int]], str], budget: float = 1.0):
        self.says, self.budget, self.heard = says, budget, []

    def answer(self, batch: Batch) -> list[Answer]:
        self.heard.append([list(ids) for ids in batch.question_ids])
        texts = [self.says(item, ids) for item, ids in zip(batch.items, batch.question_ids, strict=True)]
        return [Answer([], text, self.budget, 0.5) for text in texts]
