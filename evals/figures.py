"""Figures from records; matplotlib is imported when one is drawn."""

import pathlib
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette: told apart with any colour vision; markers and labels say the same again.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("s", "o", "^", "D", "v")


def time_against_length(record: dict[str, Any], path: pathlib.Path) -> None:
    """Seconds of one pass against tokens, both logarithmic; a line per variant, a band from p20 to p80."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["variant"] for row in record["rows"]))
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        rows = sorted((row for row in record["rows"] if row["variant"] == name), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        low, high = ([row[key] for row in rows] for key in ("p20_s", "p80_s"))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(tokens, [row["p50_s"] for row in rows], color=colour, marker=marker, ms=5, lw=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["tokens"] for row in record["rows"]})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds per forward pass")
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Software": None})


def framed(size: tuple[float, float] = (6.4, 3.4)) -> tuple[Any, Any]:
    """An empty figure of `size` inches and its axes, for notebooks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def doublings(axes: Any, at: Sequence[int], label: str) -> None:
    """The x axis of numbers that double."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(n) for n in at])
    axes.minorticks_off()
    axes.set_xlabel(label)
