"""What RetroInfer's budget, estimation and error bound are worth on queries, keys and values of the suite "attn"."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from attnlab import WaveConfig, WaveIndex, wave_attention
from attnlab.evals import figures, report
from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import sample_rng
from attnlab.evals.tasks import make
from attnlab.evals.tasks.attention_metrics import Item, budget

RATIOS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
ESTIMATION = {"none": "not read: dropped", "ratio": "next 23.2 % estimated", "all": "all others estimated"}
SLACK = 1e-4  # of a share: the bound is computed in the keys' dtype


class Point(NamedTuple):
    """Means over items, rows, queries and heads.

    Attributes:
        read: share of the visible keys read exactly.
        error: `|out - full| / |full|`, by estimation.
        unread: share of the mass on the other keys, in truth.
        lower, upper: between which the bound says it lies.
        held: share of the heads where it does.
    """

    read: float
    error: dict[str, float]
    unread: float
    lower: float
    upper: float
    held: float


def items(subject: Subject, task: str, length: int, samples: int, seed: int = 0) -> list[Item]:
    """Samples of a task of the suite "attn", as a run has them."""
    made = make(task)
    made.check(subject, [length])
    return [made.build(subject, length, i, sample_rng(seed, task, length, i)) for i in range(samples)]


def sweep(data: Sequence[Item], ratios: Sequence[float] = RATIOS) -> list[Point]:
    """A point for each retrieval ratio, the other options by default."""
    return [_mean([_point(item, {"retrieval_ratio": ratio}, WaveConfig()) for item in data]) for ratio in ratios]


def adaptive(data: Sequence[Item], errors: Sequence[float]) -> list[Point]:
    """A point for each `max_error` of a budget that grows until the bound is below it."""
    configs = [WaveConfig(budget="adaptive", max_error=error) for error in errors]
    return [_mean([_point(item, {}, config) for item in data]) for config in configs]


def _point(item: Item, options: dict[str, Any], config: WaveConfig) -> Point:
    tokens, total = item.q.shape[1], item.k.shape[1]
    group, first = item.q.shape[2] // item.k.shape[2], total - tokens
    index = WaveIndex.build(item.k[:, :first], item.v[:, :first], config, capacity=total)
    reads, lowers, uppers, errors = [], [], [], {name: [] for name in ESTIMATION}
    for i in range(tokens):
        index.append(*(x[:, first + i : first + i + 1] for x in (item.k, item.v)))
        q, full = item.q[:, i : i + 1], item.dense.out[:, i : i + 1]
        for name, found in errors.items():
            out, bound, read = wave_attention(
                q, index, scale=item.scale, estimation=name, return_error_bound=True, return_read=True, **options
            )  # fmt: skip
            found.append(torch.linalg.vector_norm(out.double() - full, dim=-1) / torch.linalg.vector_norm(full, dim=-1))
        # Neither what is read nor the bound depends on what is estimated.
        reads.append(read[:, None].repeat_interleave(group, 2))
        lowers.append(bound.lower.double())
        uppers.append(bound.upper.double())
    read, lower, upper = torch.cat(reads, 1), torch.cat(lowers, 1), torch.cat(uppers, 1)
    unread = 1 - (item.dense.shares * read).sum(-1)
    held = (lower <= unread + SLACK) & (unread <= upper + SLACK)
    error = {name: torch.cat(x).mean().item() for name, x in errors.items()}
    means = (x.double().mean().item() for x in (unread, lower, upper, held))
    return Point(budget(item, read), error, *means)


def _mean(points: Sequence[Point]) -> Point:
    def over(values: Iterable[float]) -> float:
        return sum(values) / len(points)

    error = {name: over(p.error[name] for p in points) for name in ESTIMATION}
    means = {name: over(getattr(p, name) for p in points) for name in ("read", "unread", "lower", "upper", "held")}
    return Point(error=error, **means)


def table(points: Sequence[Point], label: str, values: Sequence[float]) -> str:
    """Markdown: a row per point, named by its value of `label`."""
    head = (label, "keys read", *(f"error, {name}" for name in ESTIMATION.values()), "mass unread", "bound", "holds")
    lines = [
        (
            f"{value:g}",
            f"{point.read:.1%}",
            *(f"{error:.1%}" for error in point.error.values()),
            f"{point.unread:.1%}",
            f"{point.lower:.1%} to {point.upper:.1%}",
            f"{point.held:.0%}",
        )
        for value, point in zip(values, points, strict=True)
    ]
    return report.table(head, lines)


def error_figure(sweeps: Mapping[str, Sequence[Point]]) -> Any:
    """Output error against keys read, a panel per data set, a line per estimation."""

    def panel(axes: Any, points: Sequence[Point]) -> None:
        for (name, label), colour, marker in zip(ESTIMATION.items(), figures.COLOURS, figures.MARKERS, strict=False):
            errors = [100 * point.error[name] for point in points]
            axes.plot(_read(points), errors, color=colour, marker=marker, ms=4, lw=1.4, label=label)
        axes.set_ylim(bottom=0)

    return _panels(sweeps, panel, "output error, %")


def bound_figure(sweeps: Mapping[str, Sequence[Point]]) -> Any:
    """Mass that was not read, and the bound's interval, against keys read."""

    def panel(axes: Any, points: Sequence[Point]) -> None:
        low, high, true = ([100 * getattr(p, name) for p in points] for name in ("lower", "upper", "unread"))
        axes.fill_between(_read(points), low, high, color=figures.COLOURS[1], alpha=0.2, lw=0, label="the bound")
        axes.plot(_read(points), true, color=figures.COLOURS[0], marker="s", ms=4, lw=1.4, label="in truth")
        axes.set_ylim(0, 100)

    return _panels(sweeps, panel, "attention mass unread, %")


def _read(points: Sequence[Point]) -> list[float]:
    return [100 * point.read for point in points]


def _panels(sweeps: Mapping[str, Sequence[Point]], panel: Callable[[Any, Sequence[Point]], None], what: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for axes, (title, points) in zip(found, sweeps.items(), strict=True):
        panel(axes, points)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("keys read, %")
        axes.grid(True, color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    found[0].set_ylabel(what)
    found[-1].legend(frameon=False, fontsize=8)
    return figure
