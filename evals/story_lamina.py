"""What notebook 4 shows: who holds what under each partition, that merging is exact, and what a dollar buys."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

import attnlab
from attnlab.evals import figures, report
from attnlab.lamina import CostModel, SplitPlan, compare, load_model, load_traffic, split_attention
from attnlab.lamina.plan import WAYS


class Error(NamedTuple):
    """Largest error of an output against float64, over its largest value, in units of float32's rounding."""

    by: str
    shards: int
    roundings: float


def holdings(shards: int, kv_heads: int, requests: int, tokens: int) -> str:
    """What each shard holds of a cache `[requests, tokens, kv_heads, D]` under each way to divide it."""
    found = {
        "head": [f"KV heads {a}-{b - 1}" for a, b in SplitPlan("head", shards).head_bounds(kv_heads)],
        "request": [f"requests {a}-{b - 1}" for a, b in SplitPlan("request", shards).request_bounds(requests)],
        "sequence": [f"{n} tokens of each" for n in SplitPlan("sequence", shards).count(tokens)],
    }
    return report.table(("divided by", *(f"shard {i}" for i in range(shards))), [(by, *found[by]) for by in WAYS])


def merging(shards: Sequence[int], tokens: int, kv_heads: int = 8, group: int = 4, head_dim: int = 64) -> list[Error]:
    """Attention over a cache in one piece, and in shards joined again, of 16 requests of one query each."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(16, 1, kv_heads * group, head_dim, generator=g)
    k, v = (torch.randn(16, tokens, kv_heads, head_dim, generator=g) for _ in range(2))
    exact = attnlab.full_attention(q.double(), k.double(), v.double())

    def error(out: torch.Tensor) -> float:
        return ((out - exact).abs().max() / exact.abs().max() / torch.finfo(torch.float32).eps).item()

    found = [Error("one piece", 1, error(attnlab.full_attention(q, k, v)))]
    for by in WAYS:
        for n in shards:
            plan = SplitPlan(by, n)
            found.append(Error(by, n, error(split_attention(q, plan.split(k, v), plan)[0])))
    return found


def merging_figure(errors: Sequence[Error]) -> Any:
    """A line per way, and one piece's error to compare with."""
    figure, axes = figures.framed()
    axes.axhline(errors[0].roundings, color=figures.COLOURS[0], ls="--", lw=1.2, label="one piece")
    for by, colour, marker in zip(WAYS, figures.COLOURS[1:], figures.MARKERS[1:], strict=False):
        mine = [e for e in errors if e.by == by]
        at = [e.shards for e in mine]
        axes.plot(at, [e.roundings for e in mine], color=colour, marker=marker, ms=5, lw=1.4, label=f"by {by}")
    figures.doublings(axes, at, "shards")
    axes.set(ylabel="largest error, roundings of float32", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def traffic_table(models: Iterable[str], shards: int) -> str:
    """KiB that a token sends between the model and attention, and the keys and values that stay where they are.

    A sequence's further shards get q and answer an output and a float32 lse per head, as the first does.
    """
    rows = []
    for shape in map(load_model, models):
        state = (2 * shape.element_bytes * shape.width + 4 * shape.heads) * shape.layers
        sequence = shape.sent_bytes + 4 * shape.heads * shape.layers + (shards - 1) * state
        sizes = (shape.sent_bytes, sequence, 8192 * shape.kv_bytes)
        rows.append((shape.name, str(shape.group), *(f"{size / 1024:,.0f}" for size in sizes)))
    head = ("model", "G", "sent, by head or request", f"sent, by sequence over {shards}", "held at 8K tokens")
    return report.table(head, rows)


def gains(models: Sequence[str], traces: Sequence[str], requests: int) -> list[tuple[str, str, float]]:
    """Tokens per dollar of 2 H100 and 4 H20 over that of as many H100 as cost about the same, less 1, simulated."""
    found = []
    for model in models:
        cost = CostModel("H100", "H20", model, dop=(2, 4))
        for trace in traces:
            both = compare(cost, cost.counterpart(), load_traffic(trace).draw(requests, seed=0))
            found.append((model, trace, both.per_dollar - 1))
    return found


def gains_figure(found: Sequence[tuple[str, str, float]]) -> Any:
    """Bars by trace, a colour per model."""
    figure, axes = figures.framed()
    models, traces = (list(dict.fromkeys(row[i] for row in found)) for i in (0, 1))
    width = 0.8 / len(models)
    for i, (model, colour) in enumerate(zip(models, figures.COLOURS[1:], strict=False)):
        values = {trace: 100 * gain for name, trace, gain in found if name == model}
        at = [j + width * i for j in range(len(traces))]
        axes.bar(at, [values[trace] for trace in traces], width, color=colour, label=model)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks([j + width * (len(models) - 1) / 2 for j in range(len(traces))], traces)
    axes.set(ylabel="more tokens per dollar, %")
    axes.legend(frameon=False)
    return figure


def cost_png(cost: CostModel) -> bytes:
    """`CostModel.plot` as PNG."""
    held = io.BytesIO()
    cost.plot(held)  # type: ignore[arg-type]
    return held.getvalue()
