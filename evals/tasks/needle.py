"""One needle at each depth of a text: for maps of depth and length."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt
from attnlab.evals.testbed.generators import needles

from . import ruler_niah, testbed
from .generation import GenerationTask, fitted
from .ruler_data import check_words

DEPTHS = tuple(i / 10 for i in range(11))


class Needle(GenerationTask):
    """Sample `i` is at depth `DEPTHS[i % 11]`: in the testbed's words where the model has them, else in English.

    English is niah_single_1 of RULER with its needle at the depth.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "string_match_all", binary=True)

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        if testbed.speaks(subject):
            testbed.check_length(self.name, min(lengths))
        else:
            check_words(self.name)
        super().check(subject, lengths)

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        depth = DEPTHS[index % len(DEPTHS)]
        if testbed.speaks(subject):
            made = testbed.prompt(needles(rng, length, keys=1, values=1, asked=1, depth=depth), 2, 1)
        else:
            seed, recipe = int(rng.integers(2**63)), ruler_niah.RECIPES["niah_single_1"]
            made = fitted(
                self.name, subject, length, lambda n: ruler_niah.prompt(recipe, Random(seed), n, depth=depth), 1
            )
        return replace(made, facts={"depth": depth, "length": length})


def make(name: str, data_dir: Path | None = None) -> Needle:
    return Needle(name)
