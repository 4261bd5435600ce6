"""Two runs side by side: differences on the samples whose prompts are the same, and what cannot be compared."""

import pathlib
from collections.abc import Iterator

from attnlab.evals import report

from . import statistics
from .results import Run, load
from .table import difference, paired, tokens

HEAD = ("task", "tokens", "method", "n", "first", "second", "second minus first")
NOTE = """\
Paired over samples with the same prompt (its tokens' hash), 95 % intervals from the paired bootstrap, and where scores
are 0 or 1 the exact McNemar p.
"""


def compare(a: str | pathlib.Path, b: str | pathlib.Path) -> str:
    """Markdown: second run minus first, for every task, length and method that both have.

    Where no method is in both and each run has one, those two are compared. UsageError for a folder that is no run.
    """
    first, second = load(a), load(b)
    methods = _methods(first, second)
    rows, left = [], list(_only_in_one(first, second, methods))
    for task in (t for t in first.metrics if t in second.metrics):
        metric, other = first.metrics[task][0], second.metrics[task][0]
        if metric != other:
            left.append(f"{task}: scored by {metric.name} in the first run, by {other.name} in the second")
            continue
        for length in first.lengths(task):
            for mine, theirs in methods:
                base, ours = first.samples.get((task, length, mine)), second.samples.get((task, length, theirs))
                if base is None or ours is None:
                    continue
                found = paired(ours, base, metric)
                shared = found[0].n if found else 0
                if shared < max(len(base), len(ours)):
                    left.append(f"{task}, {tokens(length)}: {_unpaired(len(base), len(ours), shared)}")
                if found:
                    hashes = {(r["index"], r["prompt"]) for r in base} & {(r["index"], r["prompt"]) for r in ours}
                    means = [_mean(side, hashes, metric.name, metric.percent) for side in (base, ours)]
                    text = difference(*found, metric.percent)
                    rows.append((task, tokens(length), _name(mine, theirs), str(shared), *means, text))
    parts = [f"# {second.path} minus {first.path}\n", *_settings(first, second)]
    parts.append(f"{NOTE}\n{report.table(HEAD, rows)}" if rows else "Nothing in common: no sample can be paired.\n")
    if left:
        parts.append("Not compared:\n" + "".join(f"- {line}\n" for line in dict.fromkeys(left)))
    return "\n".join(parts)


def _methods(first: Run, second: Run) -> list[tuple[str, str]]:
    one, two = first.methods(), second.methods()
    both = [(m, m) for m in one if m in two]
    return both or (list(zip(one, two)) if len(one) == len(two) == 1 else [])


def _only_in_one(first: Run, second: Run, methods: list[tuple[str, str]]) -> Iterator[str]:
    for which, run, other, i in (("first", first, second, 0), ("second", second, first, 1)):
        for method in run.methods():
            if all(method != pair[i] for pair in methods):
                yield f"method {method}: only in the {which} run"
        alone = [task for task in run.metrics if task not in other.metrics]
        if alone:
            yield f"{', '.join(alone)}: only in the {which} run"
        shared = {task: set(run.lengths(task)) - set(other.lengths(task)) for task in run.metrics if task not in alone}
        for length in sorted(set().union(*shared.values())):
            tasks = [task for task, lengths in shared.items() if length in lengths]
            yield f"{tokens(length)} of {', '.join(tasks)}: only in the {which} run"


def _settings(first: Run, second: Run) -> Iterator[str]:
    keys = [key for key in dict.fromkeys((*first.config, *second.config)) if key not in ("methods", "metrics")]
    differing = [key for key in keys if first.config.get(key) != second.config.get(key)]
    if differing:
        rows = [(key, str(first.config.get(key, "")), str(second.config.get(key, ""))) for key in differing]
        yield report.table(("setting", "first", "second"), rows)


def _unpaired(first: int, second: int, shared: int) -> str:
    if not shared:
        return f"no prompts in common ({first} and {second} samples): made with another seed, tokenizer or generator"
    return f"{shared} prompts in common, of {first} and {second} samples"


def _mean(samples: list[dict], hashes: set[tuple[int, str]], metric: str, percent: bool) -> str:
    values = [r["scores"][metric] for r in samples if (r["index"], r["prompt"]) in hashes]
    mean = statistics.mean_interval(values, share=percent).mean
    return f"{100 * mean:.1f}" if percent else f"{mean:.3f}"


def _name(mine: str, theirs: str) -> str:
    return mine if mine == theirs else f"{mine} -> {theirs}"
