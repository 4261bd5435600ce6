"""Selectors at one budget, and a window: what RetroInfer is compared with."""

from dataclasses import dataclass
from typing import Any, ClassVar

from attnlab import WaveConfig
from attnlab.evals.methods.wave import IndexMethod
from attnlab.kernels.retroinfer.selectors import PAGE

SHARE = 0.125  # of the tokens


@dataclass
class Selection(IndexMethod):
    """Reads a share `budget` of the tokens besides the first `sink` and the last `local` ones."""

    name: ClassVar[str]
    clustered: ClassVar[bool] = False  # whether clusters matter; else they are made of neighbours, which is cheap
    budget: float = SHARE
    sink: int = 4
    local: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"option 'budget' must be in (0, 1], got {self.budget}")
        cheap = {} if self.clustered else {"segment": PAGE, "iterations": 1}
        self.config = WaveConfig(sink=self.sink, local=self.local, update_every=PAGE, **cheap)

    def reading(self, tokens: int) -> dict[str, Any]:
        return {"selector": self.name, "token_budget": self.budget}


@dataclass
class Quest(Selection):
    """Quest (arXiv 2406.10774): pages of 16 tokens, by the largest score their keys' extremes allow.

    `pages`, where not 0, is their number in place of `budget`.
    """

    name: ClassVar[str] = "quest"
    pages: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pages < 0:
            raise ValueError(f"option 'pages' must not be negative, got {self.pages}")

    def reading(self, tokens: int) -> dict[str, Any]:
        budget = min(1.0, self.pages * PAGE / tokens) if self.pages else self.budget
        return {"selector": self.name, "token_budget": budget}


@dataclass
class Cluster(Selection):
    """RetroInfer's clusters by their mean key, without estimation."""

    name: ClassVar[str] = "cluster"
    clustered = True


@dataclass
class Oracle(Selection):
    """Tokens by their true scores: the best that any choice of so many can do."""

    name: ClassVar[str] = "oracle"


@dataclass
class Random(Selection):
    """Tokens by chance."""

    name: ClassVar[str] = "random"


@dataclass
class Streaming(IndexMethod):
    """StreamingLLM (arXiv 2309.17453): the first `sink` and the last `window` tokens, and nothing else."""

    name: ClassVar[str] = "streaming"
    sink: int = 4
    window: int = 256

    def __post_init__(self) -> None:
        # Every token is a cluster of its own at once when it leaves the window, and none is read.
        self.config = WaveConfig(
            sink=self.sink, local=self.window, segment=1, tokens_per_cluster=1, update_every=1, iterations=1,
            retrieval_ratio=0, estimation="none",
        )  # fmt: skip
