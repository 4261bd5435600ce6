"""What notebook 3 shows: answers over reused chunks by rate, selector and chunk size, and what a wrong mask does."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

import attnlab.fusionrag.pool
from attnlab.evals import figures, report
from attnlab.evals.harness import prompts
from attnlab.evals.harness.method import Batch, Subject
from attnlab.evals.harness.statistics import Interval, paired_difference, wilson
from attnlab.evals.methods import parse
from attnlab.evals.tasks import make
from attnlab.fusionrag import future_share, selective_attention

TASK, LENGTH, BATCH = "testbed_documents", 1024, 8


class Result(NamedTuple):
    """A method's answers: 1 or 0 for each prompt, and the share of the chunks' tokens it computed anew."""

    right: list[float]
    budget: float

    @property
    def mean(self) -> Interval:
        return wilson(sum(self.right), len(self.right))


def answers(subject: Subject, methods: Sequence[str], samples: int, chunk: int = 24) -> dict[str, Result]:
    """Each method on the same questions about documents of 1024 tokens, in chunks of `chunk` tokens."""
    task = make(TASK)
    found: dict[str, list[Any]] = {spec: [] for spec in methods}
    for batch in _batches(subject, task, samples, chunk):
        for spec in methods:
            found[spec] += task.run(batch, *parse(spec))
    return {
        spec: Result([o.scores["string_match_all"] for o in all_], float(np.mean([o.budget for o in all_])))
        for spec, all_ in found.items()
    }


def answers_table(results: dict[str, Result], methods: Sequence[str], base: str) -> str:
    """Shares answered, and how many points more than `base` on the same questions."""
    rows = []
    for spec in methods:
        result = results[spec]
        more = ""
        if spec != base:
            points = (100 * x for x in paired_difference(result.right, results[base].right)[:3])
            more = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)
        rows.append((spec, f"{result.budget:.1%}", _percent(result.mean), more))
    return report.table(("method", "computed anew", "answered, % (95 %)", f"more than {base}"), rows)


def rates_figure(results: dict[str, Result], methods: Sequence[str], full: str) -> Any:
    """Answers of some methods against the share computed anew, those of `full` as a line."""
    figure, axes = figures.framed()
    points = sorted((results[spec] for spec in methods), key=lambda result: result.budget)
    at = [100 * p.budget for p in points]
    mean, low, high = (np.array([100 * p.mean[i] for p in points]) for i in range(3))
    axes.errorbar(at, mean, (mean - low, high - mean), color=figures.COLOURS[1], marker="o", ms=5, label="fusionrag")
    axes.axhline(100 * results[full].mean.mean, color=figures.COLOURS[0], lw=1, ls="--", label="full attention")
    axes.set(xlabel="tokens computed anew, % of the chunks'", ylabel="answered, %")
    axes.legend(frameon=False, loc="lower right")
    return figure


def chunks_figure(by_size: dict[int, dict[str, Result]]) -> Any:
    """Answers against the chunks' size, a line for each method."""
    figure, axes = figures.framed()
    sizes = sorted(by_size)
    for spec, colour, marker in zip(by_size[sizes[0]], figures.COLOURS, figures.MARKERS, strict=False):
        shares = [100 * by_size[size][spec].mean.mean for size in sizes]
        axes.plot(sizes, shares, color=colour, marker=marker, ms=5, label=spec)
    figures.doublings(axes, sizes, "tokens of a chunk")
    axes.set(ylabel="answered, %")
    axes.legend(frameon=False, loc="lower right")
    return figure


class Masked(NamedTuple):
    """Answers under a mask, and the share of what computed tokens attend that lies behind them in the text."""

    result: Result
    future: float


def masks(subject: Subject, method: str, samples: int) -> dict[str, Masked]:
    """The exact mask, and the one that takes gathered rows to be the last ones of their context."""
    found = {}
    for mask in ("exact", "bottom_right"):
        with _mask(mask) as seen:
            found[mask] = Masked(answers(subject, [method], samples)[method], float(np.mean(seen)))
    return found


def masks_table(found: dict[str, Masked]) -> str:
    rows = []
    for mask, (result, future) in found.items():
        rows.append((mask, f"{future:.1%}", _percent(result.mean)))
    return report.table(("mask", "attended in the future", "answered, % (95 %)"), rows)


def future_table(rates: Iterable[float], length: int) -> str:
    """Tokens spread evenly over a context: what a bottom-right causal mask lets them see of their future."""
    rows = []
    for rate in rates:
        count = round(rate * length)
        positions = ((torch.arange(count) + 0.5) * length / count).long()
        rows.append((f"{rate:.0%}", f"{future_share(positions[None], length):.1%}"))
    return report.table(("tokens computed anew", "attended in the future"), rows)


def _percent(found: Interval) -> str:
    mean, low, high, _ = (100 * x for x in found)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _batches(subject: Subject, task: Any, samples: int, chunk: int) -> Iterator[Batch]:
    for first in range(0, samples, BATCH):
        batch = prompts.build(task, subject, LENGTH, range(first, min(first + BATCH, samples)), 0)
        batch.items = [_cut(item, chunk) for item in batch.items]
        yield batch


def _cut(prompt: Any, chunk: int) -> Any:
    """The same context in chunks of another size; its first word is the kind of text."""
    words = prompt.context.split(" ")
    return replace(prompt, chunks=tuple(" ".join(words[i : i + chunk]) for i in range(1, len(words), chunk)))


@contextmanager
def _mask(mask: str) -> Iterator[list[float]]:
    """FusionRAG's attention under a mask, for which it has no option, and should have none.

    Yields what each call that gathers tokens attends in their future.
    """
    seen: list[float] = []

    def attend(q: Any, k: Any, v: Any, positions: Any, *, lengths: Any, **options: Any) -> Any:
        (length,) = lengths.tolist()
        if length - int(positions.min()) > positions.shape[1]:  # others are the context's last tokens
            seen.append(future_share(positions, length) if mask == "bottom_right" else 0.0)
        return selective_attention(q, k, v, positions, lengths=lengths, mask=mask, **options)

    with mock.patch.object(attnlab.fusionrag.pool, "selective_attention", attend):
        yield seen
