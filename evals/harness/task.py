"""What a task is: it builds items, the same for every method, and measures a method on a batch of them."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import UsageError
from .method import Batch, Method, Subject


@dataclass(frozen=True)
class Metric:
    """A number per sample. `percent`: in [0, 1], shown in percent. `binary`: 0 or 1, which Wilson's interval is for."""

    name: str
    percent: bool = True
    binary: bool = False
    higher_is_better: bool = True


@dataclass(frozen=True)
class Prompt:
    """A text and what should follow it. The prompt is `context + question`; each is tokenised on its own.

    Attributes:
        context: what is read before the question, and shared by methods.
        question: ends with the answer's prefix, where the task has one.
        answers: references; the metric says whether all or any of them must be found.
        max_new_tokens: of the answer.
        chunks: the retrieved parts that the context ends with, for methods that reuse them; empty if it has none.
        facts: of the sample, JSON values: depth of the needle, hops, what the record should tell.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    chunks: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Outcome(NamedTuple):
    """One sample under one method."""

    scores: dict[str, float]  # by metric
    output: Any  # what was generated, or None
    budget: float | None
    seconds: float  # of model time


class Task(ABC):
    """A task by name. `metrics[0]` is the one that tables show."""

    name: str
    metrics: tuple[Metric, ...]

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        """UsageError where the model cannot take a length, or data is missing, before anything runs."""
        for length in lengths:
            if not 1 <= length <= subject.max_length:
                raise UsageError(f"{self.name}: length {length}: {subject.name} takes 1 to {subject.max_length} tokens")

    def check_method(self, subject: Subject, method: Method) -> None:  # noqa: B027
        """UsageError where the task cannot measure a method."""

    def available(self) -> int | None:
        """How many samples the task's data has; None where they are made without end."""
        return None

    @abstractmethod
    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Any:
        """Item `index`; it depends on nothing but the arguments. For tasks that generate, a `Prompt`."""

    @abstractmethod
    def run(self, batch: Batch, method: Method) -> list[Outcome]:
        """One outcome per item of the batch."""


def sample_rng(seed: int, task: str, length: int, index: int) -> np.random.Generator:
    """Of sample `index`: it depends on these four alone."""
    return np.random.default_rng((seed, zlib.crc32(task.encode()), length, index))
