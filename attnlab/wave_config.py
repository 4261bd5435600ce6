"""How a RetroInfer index is built, and what a decode step reads of it by default."""

from dataclasses import dataclass
from typing import Any

from .dispatch import check_bool, check_int
from .kernels.retroinfer.spec import Spec

CHOICES = {
    "final_pass": ("segment", "global"),
    "estimation": ("ratio", "all", "none"),
    "group_reduce": ("sum", "mean", "max"),
    "budget": ("fixed", "adaptive"),
    "clustering": ("native", "faiss"),
    "meta_dtype": (None, "int8"),
}


@dataclass(frozen=True)
class WaveConfig:
    """Options of a `WaveIndex`; the defaults are the paper's (arXiv 2505.02922).

    Attributes:
        sink, local: first and last tokens of a row that are always read exactly.
        segment: tokens clustered together, at least `tokens_per_cluster`.
        tokens_per_cluster: a segment of `t` tokens has `ceil(t / tokens_per_cluster)` clusters.
        iterations: assignments of k-means, the final one included.
        final_pass: `"segment"`, tokens choose among their segment's clusters; `"global"`, among all of the call's.
        max_cluster: larger clusters are split in token order, at least `tokens_per_cluster`; None: no cap.
        update_every: tokens that wait in the exact zone before they are clustered, at least `tokens_per_cluster`.
        retrieval_ratio, estimation_ratio: shares of the clusters, in `[0, 1]`, that are read exactly and estimated.
        estimation: `"ratio"`, as above; `"all"`, every cluster that is not read; `"none"`, none of them.
        group_reduce: how the query heads of a KV head rank clusters together: `"sum"`, `"mean"`, `"max"` of shares.
        weight_by_size: rank by a cluster's share of the mass instead of by its centroid's.
        budget: `"fixed"`; `"adaptive"` reads further clusters until the bound on what is unread is below `max_error`.
        max_error: share of the attention mass, in `(0, 1)`.
        clustering: `"native"`; `"faiss"`, centroids by `faiss.Kmeans(spherical=True)` from the same start, of finite
            keys only (`pip install attnlab[faiss-cpu]` or `attnlab[faiss-gpu]`).
        meta_dtype: `"int8"`: mean keys and values are kept in 8 bits, with a scale each, for the reference and the
            portable backend only; None: in the keys' dtype.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what came.
    """

    sink: int = 4
    local: int = 64
    segment: int = 8192
    tokens_per_cluster: int = 16
    iterations: int = 10
    final_pass: str = "segment"
    max_cluster: int | None = None
    update_every: int = 1024
    retrieval_ratio: float = 0.018
    estimation_ratio: float = 0.232
    estimation: str = "ratio"
    group_reduce: str = "sum"
    weight_by_size: bool = False
    budget: str = "fixed"
    max_error: float = 0.05
    clustering: str = "native"
    meta_dtype: str | None = None

    def __post_init__(self) -> None:
        fn = "WaveConfig"
        for name in ("sink", "local"):
            check_int(fn, name, getattr(self, name), 0)
        for name in ("segment", "tokens_per_cluster", "iterations", "update_every"):
            check_int(fn, name, getattr(self, name), 1)
        if self.max_cluster is not None:
            check_int(fn, "max_cluster", self.max_cluster, 1)
        for name in ("segment", "update_every", "max_cluster"):
            value = getattr(self, name)
            if value is not None and value < self.tokens_per_cluster:
                raise ValueError(
                    f"{fn}: {name} must be at least tokens_per_cluster={self.tokens_per_cluster}, got {value}"
                )
        for name in ("retrieval_ratio", "estimation_ratio"):
            check_share(fn, name, getattr(self, name), zero=True)
        for name in CHOICES:
            check_choice(fn, name, getattr(self, name))
        check_bool(fn, "weight_by_size", self.weight_by_size)
        check_share(fn, "max_error", self.max_error, one=False)

    @property
    def spec(self) -> Spec:
        return Spec(
            self.sink, self.local, self.segment, self.tokens_per_cluster, self.iterations,
            self.final_pass == "global", self.max_cluster or 0, self.update_every,
        )  # fmt: skip


def kernel_reasons(config: WaveConfig) -> list[str]:
    """Why backends other than reference and portable cannot serve an index of this configuration."""
    return [f"meta_dtype={config.meta_dtype!r} is for reference and portable only"] if config.meta_dtype else []


def check_choice(fn: str, name: str, value: Any) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{fn}: {name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")


def check_share(fn: str, name: str, value: Any, *, zero: bool = False, one: bool = True) -> None:
    """A number between 0 and 1; the two ends themselves only where allowed."""
    bounds = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{fn}: {name} must be a number in {bounds}, got {value!r}")
    if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        raise ValueError(f"{fn}: {name} must be in {bounds}, got {value}")
