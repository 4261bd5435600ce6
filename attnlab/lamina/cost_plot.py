"""A figure of a cost model; matplotlib is imported when one is drawn."""

import os
from collections.abc import Iterable

from .catalogue import check_number
from .cost import CostModel, System

# Okabe and Ito's palette: told apart with any colour vision; markers and labels say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "^", "D", "v")
LENGTHS = tuple(2**i for i in range(9, 18))


def plot(
    cost: CostModel, path: str | os.PathLike[str], *, lengths: Iterable[float] = LENGTHS,
    contexts: Iterable[float] = (2048, 4096, 8192), batches: Iterable[int] = range(10, 301, 10),
) -> None:  # fmt: skip
    """What a dollar buys at each context length, and what the network must carry at each batch.

    Left: million tokens per dollar of `cost` and of the homogeneous system of about its price, each at its full batch.
    Right: required bandwidth in GB/s at each of `contexts` tokens, and what the links reach.

    Needs matplotlib (`pip install attnlab[evals]`). Raises ValueError where no system's price is known.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as e:
        raise ImportError("CostModel.plot needs matplotlib (pip install attnlab[evals])") from e

    spans, sizes = sorted({check_number("plot", "lengths", each) for each in lengths}), sorted(set(batches))
    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    dollars, bandwidth = figure.subplots(1, 2)
    systems: list[System] = [cost, cost.counterpart()]
    for system, colour, marker in zip(systems, COLOURS, MARKERS):
        fitting = [length for length in spans if system.batch_limit(length)]
        values = [system.tokens_per_dollar(length) / 1e6 for length in fitting]
        label = f"{system.name.split(' on ')[-1]}, ${system.price:.2f}/h"
        dollars.plot(fitting, values, color=colour, marker=marker, ms=4, lw=1.6, label=label)
    dollars.set_xscale("log", base=2)
    dollars.set_yscale("log")
    dollars.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K"))
    dollars.set(xlabel="context, tokens", ylabel="million tokens per dollar", title=cost.model.name)
    for context, colour, marker in zip(contexts, COLOURS, MARKERS):
        needed = [cost.required_bandwidth(batch, context) / 1e9 for batch in sizes]
        bandwidth.plot(sizes, needed, color=colour, lw=1.6, label=f"{context / 1024:g}K tokens")
        bandwidth.plot(sizes[-1:], needed[-1:], color=colour, marker=marker, ms=5)
    bandwidth.axhline(cost.link / 1e9, color="#000000", lw=1, ls="--", label="the network")
    bandwidth.set(xlabel="batch", ylabel="required bandwidth, GB/s")
    bandwidth.set_title(f"network at most {cost.alpha:.0%} of computing")
    for axes in (dollars, bandwidth):
        axes.grid(True, which="major", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None} if str(path).endswith(".png") else None)
