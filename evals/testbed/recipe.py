"""How the testbed model is trained: presets of sizes, lengths, tasks and rates. Data, not code."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """Of the model; heads are of `HEAD_DIM`."""

    hidden: int
    layers: int  # the first half has rotary positions, the second none
    heads: int
    kv_heads: int
    intermediate: int


class Stage(NamedTuple):
    """`steps` with these shares of sequence lengths and tasks."""

    steps: int
    lengths: dict[int, float]
    tasks: dict[str, float]


class Leg(NamedTuple):
    """Stages under one optimizer: its rate warms up, holds, and from the share `hold` of the steps on falls to 2 %."""

    rate: float
    hold: float
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


class Preset(NamedTuple):
    """A model and its training: `tokens` a step, positions up to `skips` on half of the steps."""

    sizes: Sizes
    tokens: int
    skips: int
    legs: tuple[Leg, ...]

    @property
    def steps(self) -> int:
        return sum(leg.steps for leg in self.legs)

    def at(self, step: int) -> tuple[Leg, int, Stage]:
        """The leg of a step, the step's number in it, and its stage."""
        for leg in self.legs:
            if step < leg.steps:
                break
            step -= leg.steps
        begin = 0
        for stage in leg.stages:
            begin += stage.steps
            if step < begin:
                break
        return leg, step, stage


HEAD_DIM = 64
ROPE_THETA = 1e4
LONGEST = 65536  # positions the model is said to take
RETRIEVAL = {"needles": 0.35, "tracking": 0.4, "documents": 0.25}
ALL = {"needles": 0.3, "tracking": 0.25, "documents": 0.35, "frequent": 0.1}
LATE = {"needles": 0.35, "tracking": 0.15, "documents": 0.35, "frequent": 0.15}

PRESETS = {
    "cpu": Preset(
        Sizes(128, 4, 4, 2, 320),
        tokens=8192,
        skips=16384,
        legs=(
            Leg(
                2e-3,
                1.0,
                (
                    Stage(900, {64: 0.5, 128: 0.3, 256: 0.2}, RETRIEVAL),
                    Stage(1200, {64: 0.1, 128: 0.3, 256: 0.4, 512: 0.2}, RETRIEVAL),
                    Stage(400, {64: 0.1, 128: 0.3, 256: 0.4, 512: 0.2}, ALL),
                ),
            ),
            Leg(
                2e-3,
                0.4,
                (
                    Stage(1800, {128: 0.1, 256: 0.25, 512: 0.3, 1024: 0.25, 2048: 0.1}, LATE),
                    Stage(2200, {256: 0.15, 512: 0.2, 1024: 0.3, 2048: 0.2, 4096: 0.15}, LATE),
                ),
            ),
        ),
    ),
    "h200": Preset(
        Sizes(256, 6, 8, 2, 672),
        tokens=131072,
        skips=65536,
        legs=(
            Leg(
                2e-3,
                1.0,
                (
                    Stage(1500, {64: 0.5, 128: 0.3, 256: 0.2}, RETRIEVAL),
                    Stage(2500, {64: 0.1, 128: 0.3, 256: 0.4, 512: 0.2}, RETRIEVAL),
                    Stage(1000, {64: 0.1, 128: 0.3, 256: 0.4, 512: 0.2}, ALL),
                ),
            ),
            Leg(
                2e-3,
                0.4,
                (
                    Stage(4000, {256: 0.3, 512: 0.3, 1024: 0.25, 2048: 0.15}, LATE),
                    Stage(6000, {512: 0.2, 1024: 0.2, 2048: 0.2, 4096: 0.2, 8192: 0.1, 16384: 0.1}, LATE),
                ),
            ),
        ),
    ),
}
