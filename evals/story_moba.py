"""What notebook 1 shows: how often MoBA's gate hits by block size and top-k, and what the blocks cost in time."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import attnlab
from attnlab.evals import figures, measure, report, theory
from attnlab.evals.harness.statistics import Interval, wilson
from attnlab.evals.theory import Needle


class Point(NamedTuple):
    """A needle's problem, the chance in theory, and the share `moba_select` found."""

    needle: Needle
    theory: float
    found: Interval


class Speed(NamedTuple):
    """Seconds of one causal forward pass; `block_size` and `topk` are None for dense attention."""

    block_size: int | None
    topk: int | None
    seconds: measure.Spread
    speedup: measure.Spread


def sweep(needles: Iterable[Needle], trials: int) -> list[Point]:
    """Each by theory and by `trials` queries of the gate."""
    return [Point(n, theory.hit_probability(n), wilson(theory.gate_hits(n, trials), trials)) for n in needles]


def hits_table(points: Sequence[Point]) -> str:
    rows = [
        (str(p.needle.block_size), str(p.needle.picks), f"{p.needle.snr:.2f}", f"{p.theory:.1%}",
         f"{p.found.mean:.1%} ({p.found.low:.1%}-{p.found.high:.1%})")
        for p in points
    ]  # fmt: skip
    return report.table(("block size", "blocks taken", "SNR", "hits in theory", "moba_select's (95 %)"), rows)


def hits_figure(points: Sequence[Point], x: str, label: str, title: str) -> Any:
    """Hits against the needle's field `x`: theory as lines, the gate's as points, by head size and needles a block."""
    figure, axes = figures.framed()
    kinds = list(dict.fromkeys((p.needle.head_dim, p.needle.needles) for p in points))
    for (dim, needles), colour, marker in zip(kinds, figures.COLOURS, figures.MARKERS, strict=False):
        mine = [p for p in points if (p.needle.head_dim, p.needle.needles) == (dim, needles)]
        at = [getattr(p.needle, x) for p in mine]
        axes.plot(at, [100 * p.theory for p in mine], color=colour, lw=1.4)
        mean, low, high = (np.array([100 * p.found[i] for p in mine]) for i in range(3))
        style = dict(color=colour, marker=marker, ls="", ms=5)
        name = f"d={dim}, {needles} needle{'s' * (needles > 1)}"
        axes.errorbar(at, mean, (mean - low, high - mean), label=name, **style)
    figures.doublings(axes, at, label)
    axes.set(ylabel="needle's block taken, %", ylim=(0, 104), title=title)
    axes.legend(frameon=False)
    return figure


def speed(tokens: int, routings: Sequence[tuple[int, int]], repeats: int) -> list[Speed]:
    """Dense attention and MoBA of each `(block_size, topk)`, interleaved: 4 heads of 64, float32, on the CPU."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 4, 64, generator=g) for _ in range(3))
    calls = {None: lambda: attnlab.full_attention(q, k, v)}
    for block_size, topk in routings:
        calls[block_size, topk] = lambda b=block_size, t=topk: attnlab.moba_attention(q, k, v, block_size=b, topk=t)
    samples = measure.interleave({str(key): call for key, call in calls.items()}, repeats)
    dense = samples[str(None)]
    return [
        Speed(*(key or (None, None)), measure.spread(samples[str(key)]), measure.ratio(dense, samples[str(key)]))
        for key in calls
    ]


def speed_table(rows: Sequence[Speed]) -> str:
    lines = [
        ("dense" if r.block_size is None else f"B={r.block_size} k={r.topk}", f"{1e3 * r.seconds.p50:.0f}",
         "" if r.block_size is None else f"{r.speedup.p50:.1f}x ({r.speedup.p20:.1f}-{r.speedup.p80:.1f})")
        for r in rows
    ]  # fmt: skip
    return report.table(("attention", "ms, median", "against dense (p20-p80)"), lines)


def trade_figure(points: Sequence[Point], rows: Sequence[Speed]) -> Any:
    """Speed-up over dense against hits, at the same block sizes."""
    figure, axes = figures.framed()
    hits = {p.needle.block_size: p.found.mean for p in points}
    shown = [r for r in rows if r.block_size in hits]
    axes.plot([100 * hits[r.block_size] for r in shown], [r.speedup.p50 for r in shown], "o-", color=figures.COLOURS[1])
    for r in shown:
        at = (100 * hits[r.block_size], r.speedup.p50)
        axes.annotate(f"B={r.block_size}", at, textcoords="offset points", xytext=(6, 4))
    axes.margins(0.12)
    axes.set(xlabel="needle's block taken, %", ylabel="times faster than dense")
    return figure
