"""Batches of the testbed's training: they depend on the seed and the step alone."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .generators import TASKS, Rng, Sample
from .recipe import Preset
from .vocabulary import END, PAD

IGNORED = -100  # of labels, as in torch's cross entropy
RUNS = 4  # stretches of consecutive positions in a sequence whose positions skip


class TrainingBatch(NamedTuple):
    """`ids, labels int64 [B, T]`; `positions [B, T]` or None; the task of each row."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    tasks: list[str]


class Batches(torch.utils.data.Dataset):
    """Batch `step`, from its index."""

    def __init__(self, preset: Preset, seed: int) -> None:
        self.preset, self.seed = preset, seed

    def __len__(self) -> int:
        return self.preset.steps

    def __getitem__(self, step: int) -> TrainingBatch:
        rng = np.random.default_rng((self.seed, step))
        stage = self.preset.at(step)[2]
        length = int(rng.choice(list(stage.lengths), p=list(stage.lengths.values())))
        rows = self.preset.tokens // length
        tasks = rng.choice(list(stage.tasks), rows, p=list(stage.tasks.values())).tolist()
        ids, labels = torch.full((rows, length), PAD), torch.full((rows, length), IGNORED)
        for row, task in enumerate(tasks):
            text, wanted = flat(TASKS[task](rng, length))
            ids[row, : len(text)] = torch.tensor(text)
            labels[row, : len(text)] = torch.tensor(wanted)
        skipping = rng.random() < 0.5
        positions = torch.stack([skips(rng, length, self.preset.skips) for _ in tasks]) if skipping else None
        return TrainingBatch(ids, labels, positions, tasks)


def flat(sample: Sample) -> tuple[list[int], list[int]]:
    """A sample's tokens with the answers behind their questions, and what each token should say next: answers only."""
    ids = list(sample.context)
    labels = [IGNORED] * len(ids)
    for text, answer in sample.questions:
        wanted = [*answer, END]
        ids += [*text, *wanted]
        labels += [IGNORED] * (len(text) - 1) + wanted + [IGNORED]
    return ids, labels


def skips(rng: Rng, length: int, most: int) -> Tensor:
    """Positions `[T]` that rise with a few gaps, the last one below `most` (PoSE, arXiv 2309.10400)."""
    if most <= length:
        return torch.arange(length)
    last = int(np.exp(rng.uniform(math.log(length + 1), math.log(most))))
    cuts = np.sort(rng.choice(np.arange(1, length), RUNS - 1, replace=False))
    gaps = np.sort(rng.integers(0, last - length + 1, RUNS))
    place = np.arange(length)
    return torch.from_numpy(place + gaps[np.searchsorted(cuts, place, side="right")])
