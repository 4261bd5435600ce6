"""Question answering over retrieved chunks, on LongBench's and CacheBlend's files in `--data-dir`."""

from functools import cached_property
from pathlib import Path

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt

from .generation import GenerationTask, data_file, size
from .metrics import Score
from .ragqa_data import DATA_SETS, Entry, read

PREFIX = "ragqa_"


class ChunkQA(GenerationTask):
    """Sample `i` is the file's entry `i`; its context is cut in the middle where it is longer than the length."""

    def __init__(self, name: str, data_dir: Path | None) -> None:
        self.data = DATA_SETS[name.removeprefix(PREFIX)]
        super().__init__(name, *self.data.metrics)
        self.path = data_file(name, data_dir, self.data.file)
        if self.data.first_line:
            self.scores = {metric: of_first_line(score) for metric, score in self.scores.items()}

    @cached_property
    def entries(self) -> list[Entry]:
        entries = read(self.data, self.path)
        if not entries:
            raise UsageError(f"{self.path} holds no entries")
        return entries

    def available(self) -> int:
        return len(self.entries)

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        entry = self.entries[index]
        prompt = self._prompt(entry, entry.chunks)
        room = sum(len(subject.ids(chunk)) for chunk in entry.chunks)
        while (over := size(subject, prompt) - length) > 0:
            room -= over
            if room < 1:
                raise UsageError(f"{self.name}: length {length} is too short for entry {index} of {self.path}")
            prompt = self._prompt(entry, middle_cut(subject, entry.chunks, room))
        return prompt

    def _prompt(self, entry: Entry, chunks: tuple[str, ...]) -> Prompt:
        before, _, after = self.data.prompt.partition("{context}")
        return Prompt(
            context=before + "".join(chunks),
            question=after.replace("{input}", entry.question),
            answers=entry.answers,
            max_new_tokens=self.data.limit,
            chunks=chunks,
            facts={"whole": chunks == entry.chunks},
        )


def make(name: str, data_dir: Path | None = None) -> ChunkQA:
    return ChunkQA(name, data_dir)


def of_first_line(score: Score) -> Score:
    """A score of the first line that is not empty."""
    return lambda prediction, answers: score(prediction.lstrip("\n").partition("\n")[0], answers)


def middle_cut(subject: Subject, chunks: tuple[str, ...], room: int) -> tuple[str, ...]:
    """The first and the last `room / 2` tokens of the chunks, as LongBench cuts; those in between are left out."""
    ids = [subject.ids(chunk) for chunk in chunks]
    head = room // 2
    tail = sum(map(len, ids)) - (room - head)  # where the last tokens begin
    kept, at = [], 0
    for chunk, own in zip(chunks, ids, strict=True):
        if at + len(own) <= head or at >= tail:
            kept.append(chunk)
        else:
            parts = own[: max(0, head - at)], own[max(0, tail - at) :]
            kept += [subject.tokenizer.decode(part) for part in parts if part]
        at += len(own)
    return tuple(kept)


def normalised(score: float, reuse: float, full: float) -> float | None:
    """Where a score stands between full reuse's, 0, and full attention's, 1; None where that is no better."""
    return (score - reuse) / (full - reuse) if full > reuse else None
