"""Figures of a run; matplotlib is imported when one is drawn. The same run gives the same bytes."""

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnlab.evals import figures

from .results import Row, Run
from .table import tokens

# Five as in the other figures, and two more of the same palette; beyond that lines are dashed.
COLOURS = (*figures.COLOURS, "#56B4E9", "#E69F00")
MARKERS = (*figures.MARKERS, "P", "X")
LOSS = re.compile(r"loss@(\d+)-(\d+)$")


def write(run: Run, folder: pathlib.Path) -> list[pathlib.Path]:
    """The figures the run has data for, as PNG."""
    drawn = {
        "accuracy-by-length": accuracy_by_length(run),
        "accuracy-by-budget": accuracy_by_budget(run),
        "needle": needle_grid(run),
        "loss-by-position": loss_by_position(run),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            folder.mkdir(exist_ok=True)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def accuracy_by_length(run: Run) -> Any:
    """A panel per task, a line per method, bars for 95 %; None where no task has two lengths."""
    tasks = [t for t in _accuracies(run) if len(run.lengths(t)) > 1]

    def panel(axes: Any, task: str) -> None:
        rows = _shown(run, task)
        for method in run.methods():
            mine = [rows[method, n] for n in run.lengths(task) if (method, n) in rows]
            _line(axes, run, method, [r["length"] for r in mine], mine)
        _length_axis(axes, run.lengths(task))
        _percent_axis(axes)
        axes.set_xlabel("tokens")

    return _panels(run, tasks, panel, run.methods(), "accuracy, %") if tasks else None


def accuracy_by_budget(run: Run) -> Any:
    """A panel per task, at its longest length: a point per method, bars for 95 %; None without budgets."""
    tasks = [t for t in _accuracies(run) if any(r["budget"] is not None for r in _longest(run, t))]

    def panel(axes: Any, task: str) -> None:
        for row in _longest(run, task):
            if row["budget"] is not None:
                _line(axes, run, row["method"], [100 * row["budget"]], [row])
        axes.set_xscale("symlog", linthresh=1)  # reuse alone recomputes nothing
        axes.set_xticks((0, 1, 10, 100), ("0", "1", "10", "100"))
        axes.set_xlim(-0.1, 130)
        _percent_axis(axes)
        axes.set_title(f"{task}, {tokens(max(run.lengths(task)))}", fontsize=9)
        axes.set_xlabel("keys read or tokens recomputed, %")

    return _panels(run, tasks, panel, run.methods(), "accuracy, %") if tasks else None


def needle_grid(run: Run) -> Any:
    """A heat map per method: where in the context the needle was, against the length; None without such samples."""
    cells = _needles(run)
    if not cells:
        return None
    methods = [m for m in run.methods() if any(key[0] == m for key in cells)]
    lengths, depths = (sorted({key[i] for key in cells}) for i in (1, 2))

    def panel(axes: Any, method: str) -> None:
        grid = [[cells.get((method, n, d), math.nan) for n in lengths] for d in depths]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto", origin="upper")
        axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths])
        for i, row in enumerate(grid):
            for j, x in enumerate(row):
                if not math.isnan(x):
                    axes.text(j, i, f"{x:.0f}", ha="center", va="center", fontsize=6, color="k" if x > 50 else "w")
        axes.set_xlabel("tokens")
        axes.figure.needles = image

    figure = _panels(run, methods, panel, [], "text before the needle, %", grid=False)
    figure.colorbar(figure.needles, ax=figure.axes, label="accuracy, %")
    return figure


def loss_by_position(run: Run) -> Any:
    """A panel per task and length: the loss of each stretch of positions, a line per method; None without any."""
    stretches = {t: [m.name for m in ms if LOSS.match(m.name)] for t, ms in run.metrics.items()}
    panels = {f"{t}, {tokens(n)}": (t, n) for t, names in stretches.items() if names for n in run.lengths(t)}

    def panel(axes: Any, title: str) -> None:
        task, length = panels[title]
        found = {(r["method"], r["metric"]): r for r in run.rows if (r["task"], r["length"]) == (task, length)}
        for method in run.methods():
            mine = [(name, found[method, name]) for name in stretches[task] if (method, name) in found]
            ends = [tuple(map(int, LOSS.match(name).groups())) for name, _ in mine]  # type: ignore[union-attr]
            _line(axes, run, method, [(a + b) / 2 for a, b in ends], [row for _, row in mine])
        axes.set_xlabel("position")
        _frame(axes)

    return _panels(run, list(panels), panel, run.methods(), "loss") if panels else None


def _accuracies(run: Run) -> list[str]:
    return [task for task, (metric, *_) in run.metrics.items() if metric.percent and metric.higher_is_better]


def _shown(run: Run, task: str) -> dict[tuple[str, int], Row]:
    metric = run.metrics[task][0].name
    return {(r["method"], r["length"]): r for r in run.rows if (r["task"], r["metric"]) == (task, metric)}


def _longest(run: Run, task: str) -> list[Row]:
    longest = max(run.lengths(task), default=0)
    return [row for (_, n), row in _shown(run, task).items() if n == longest]


def _needles(run: Run) -> Mapping[tuple[str, int, float], float]:
    """Mean percent by method, length and depth."""
    values: dict[tuple[str, int, float], list[float]] = {}
    for (task, length, method), samples in run.samples.items():
        if task.split("@")[0] != "needle":
            continue
        for r in samples:
            depth = r.get("facts", {}).get("depth")
            if depth is not None:
                score = r["scores"][run.metrics[task][0].name]
                values.setdefault((method, length, round(depth, 2)), []).append(score)
    return {key: 100 * math.fsum(x) / len(x) for key, x in values.items()}


def _panels(
    run: Run, names: Sequence[str], draw: Callable[[Any, str], None], legend: Sequence[str], y: str, grid: bool = True
) -> Any:
    """Small multiples, `draw(axes, name)` each, one legend for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(5.0, 3.0 * columns), 2.6 * rows + 0.3 * -(-len(legend) // 4)), dpi=120)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(name, fontsize=9)
        draw(axes, name)
        axes.tick_params(labelsize=8)
        axes.set_ylabel(y if i % columns == 0 else "", fontsize=9)
        axes.xaxis.label.set_size(9)
    if legend:
        lines = [_style(figure.axes[0], run, method, [], []) for method in legend]
        figure.legend(lines, legend, loc="outside lower center", ncols=min(4, len(legend)), frameon=False, fontsize=8)
    return figure


def _style(axes: Any, run: Run, method: str, x: Sequence[float], y: Sequence[float], **more: Any) -> Any:
    i = run.methods().index(method)
    dash = "-" if i < len(COLOURS) else "--"
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    return axes.errorbar(x, y, color=colour, marker=marker, ls=dash, ms=4.5, lw=1.4, elinewidth=0.8, **more)


def _line(axes: Any, run: Run, method: str, x: Sequence[float], rows: Sequence[Row]) -> None:
    mean = [r["mean"] for r in rows]
    low, high = ([r["mean"] if r[key] is None else r[key] for r in rows] for key in ("ci_lo", "ci_hi"))
    # A bootstrap's bounds may lie on one side of the mean by a rounding.
    bars = [[max(0.0, m - a) for m, a in zip(mean, low)], [max(0.0, b - m) for m, b in zip(mean, high)]]
    _style(axes, run, method, x, mean, yerr=bars)


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(n) for n in lengths])
    axes.minorticks_off()


def _percent_axis(axes: Any) -> None:
    axes.set_ylim(-4, 104)
    _frame(axes)


def _frame(axes: Any) -> None:
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
