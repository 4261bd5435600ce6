"""The base of tasks whose answers are generated, and how long a text may be."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Method, Subject
from attnlab.evals.harness.task import Outcome, Prompt, Task, sample_rng

from .metrics import METRICS


class GenerationTask(Task):
    """Prompts, greedy answers and metrics. A sample is a context with one question: samples are independent."""

    def __init__(self, name: str, *metrics: str, binary: bool = False) -> None:
        """`metrics` are names in METRICS; `binary` where they are 0 or 1 because there is one reference."""
        self.name = name
        self.scores = {metric: METRICS[metric][1] for metric in metrics}
        described = [METRICS[metric][0] for metric in metrics]
        self.metrics = tuple(replace(m, binary=m.binary or binary) for m in described)

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        super().check(subject, lengths)
        self.build(subject, min(lengths), 0, sample_rng(0, self.name, min(lengths), 0))

    @abstractmethod
    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        """UsageError where the length is too short for the task."""

    def run(self, batch: Batch, method: Method) -> list[Outcome]:
        outcomes = []
        for prompt, answer in zip(batch.items, method.answer(batch), strict=True):
            scores = {name: score(answer.text, prompt.answers) for name, score in self.scores.items()}
            outcomes.append(Outcome(scores, answer.text, answer.budget, answer.seconds))
        return outcomes


def size(subject: Subject, prompt: Prompt) -> int:
    """Tokens of the prompt, the sequence's start included, and of the longest answer."""
    read = len(subject.start) + len(subject.ids(prompt.context)) + len(subject.ids(prompt.question))
    return read + prompt.max_new_tokens


def fitted(
    task: str, subject: Subject, length: int, make: Callable[[int], Prompt], least: int, most: int | None = None
) -> Prompt:
    """`make(n)` for the largest `n` in `[least, most]` that fits `length` tokens, sizes growing with `n`.

    UsageError for none. `n + 1` does not fit: the gap is below what one step of the haystack adds.
    """
    made: dict[int, Prompt] = {}

    def count(n: int) -> int:
        made[n] = make(n)
        return size(subject, made[n])

    n = largest(count, length, least, most)
    if n is None:
        raise UsageError(f"{task}: length {length} is too short, it takes {size(subject, made[least])} tokens or more")
    return made[n]


def largest(count: Callable[[int], int], limit: int, least: int, most: int | None = None) -> int | None:
    """The largest `n` in `[least, most]` of `count(n) <= limit`, or None; `count` grows with `n`, about as a line does.

    Where it falls on the way, `n` still fits and `n + 1`, unless past `most`, does not. Steps go where the line says,
    and halve the range every other time.
    """
    low, at_low = least, count(least)
    if at_low > limit:
        return None
    if least == most:
        return least
    high = least + 1
    while (at_high := count(high)) <= limit:
        if high == most:
            return high
        slope = max(1e-9, (at_high - at_low) / (high - low))
        low, at_low = high, at_high
        high += min(max(1, round((limit - at_high) / slope)), 3 * high)
        high = high if most is None else min(high, most)
    straight = True
    while high - low > 1:
        line = low + round((limit - at_low) * (high - low) / (at_high - at_low))
        n = min(max(line, low + 1), high - 1) if straight else (low + high) // 2
        straight = not straight
        at = count(n)
        if at <= limit:
            low, at_low = n, at
        else:
            high, at_high = n, at
    return low


def data_file(task: str, data_dir: Path | None, name: str, substitute: str = "") -> Path:
    """A data file that a task needs; UsageError where it is missing, which names a task that does without."""
    hint = f"; {substitute} needs no file" if substitute else ""
    if data_dir is None:
        raise UsageError(f"{task} needs {name}: put it in a folder and give --data-dir FOLDER{hint}")
    path = Path(data_dir) / name
    if not path.is_file():
        raise UsageError(f"{task} needs {name}: there is no {path}{hint}")
    return path
