"""A testbed model before training, as a folder of transformers, and prompts for it."""

import numpy as np

from attnlab.evals.harness.method import Batch
from attnlab.evals.harness.task import Prompt
from attnlab.evals.testbed.model import seeded
from attnlab.evals.testbed.recipe import Sizes
from attnlab.evals.testbed.vocabulary import KEYS, NAMES, tokenizer

SMALL = Sizes(64, 4, 4, 2, 96)


def save(folder, seed=0):
    seeded(SMALL, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(rng, count):
    return " ".join(NAMES[i] for i in rng.integers(KEYS.start, len(NAMES), count))


def batch(subject, sizes=((90, 5), (90, 5), (61, 3), (90, 4)), limit=6, seed=0):
    """Prompts of random words: `sizes` are tokens of context and question."""
    rng = np.random.default_rng(seed)
    items = [Prompt(words(rng, context), words(rng, question), ("",), limit) for context, question in sizes]
    return of(subject, items)


def of(subject, items):
    contexts, questions = ([subject.ids(x) for x in part] for part in zip(*((p.context, p.question) for p in items)))
    return Batch(subject, items, 0, contexts, questions)
