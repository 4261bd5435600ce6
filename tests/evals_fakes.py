"""A model, tasks and methods for the harness's own tests: they answer at once, by what they read."""

import dataclasses
import types
import zlib

import torch

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Answer, Batch, Method, Subject
from attnlab.evals.harness.task import Metric, Outcome, Prompt, Task


class Words(Subject):
    """Tokens are the numbers of words `w7`."""

    start = (1,)

    def ids(self, text):
        return [int(word[1:]) for word in text.split()]

    def text(self, ids):
        return " ".join(f"w{i}" for i in ids)


def subject(fingerprint="f" * 64, max_length=64):
    model = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    return Words("fake", model, None, max_length, fingerprint)


class Recall(Task):
    """The last word of a context of `length` words."""

    metrics = (Metric("hit", binary=True), Metric("size", percent=False))

    def __init__(self, name="recall", samples=None, salt=0):
        self.name, self.samples, self.salt, self.built = name, samples, salt, []

    def available(self):
        return self.samples

    def build(self, subject, length, index, rng):
        self.built.append((length, index))
        words = [f"w{i + self.salt}" for i in rng.integers(10, 90, length - 4)]
        return Prompt(" ".join(words), "w2 w3", (words[-1],), 1, facts={"depth": index / 100})

    def run(self, batch, method):
        return [
            Outcome({"hit": float(a.text in item.answers), "size": len(a.text) / 3}, a.text, a.budget, a.seconds)
            for item, a in zip(batch.items, method.answer(batch), strict=True)
        ]


class Items(Recall):
    """No prompts: arrays."""

    metrics = (Metric("sum", percent=False),)

    def build(self, subject, length, index, rng):
        return {"x": rng.standard_normal(length)}

    def run(self, batch, method):
        return [Outcome({"sum": float(item["x"].sum())}, None, None, 0.0) for item in batch.items]


@dataclasses.dataclass
class Guess(Method):
    """Right for two thirds of the prompts, by their words and its own name; `dense`: from the shared prefill."""

    spec: str
    dense: bool = True
    refuses: str = ""

    def __post_init__(self):
        self.options, self.calls, self.stop_at = {"dense": self.dense}, 0, None

    def check(self, subject):
        if self.refuses == "model":
            raise UsageError(f"method {self.spec!r} cannot serve this model")

    def check_item(self, task, item):
        if self.refuses == task:
            raise UsageError(f"method {self.spec!r} cannot serve {task}")

    def answer(self, batch):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        if self.dense:
            batch.dense()
        found = []
        for ids in batch.context_ids:
            right = zlib.crc32(repr((ids, self.spec)).encode()) % 3 > 0
            found.append(Answer(ids[-1:], batch.subject.text(ids[-1:] if right else [0]), 0.5, 1e-3 * self.calls))
        return found


def dense(batch: Batch):
    """In place of `Batch.dense`: only the count."""
    if batch._dense is None:
        batch._dense = batch.context_ids
        batch.prefills += len(batch.items)
        batch.seconds += 1e-3
    return batch._dense
