"""A run as Markdown: means with intervals and what was read, differences to full attention, effective lengths."""

import math
from collections.abc import Iterable, Mapping, Sequence

from attnlab.evals import report

from . import anchors, statistics
from .results import Record, Row, Run, scores
from .task import Metric

BASE = "full"
RULER_SCORE = 85.6  # RULER's bar: Llama2-7B's score at 4K
SHARE_OF_SHORTEST = 0.85
NOTES = """\
Means with 95 % intervals: Wilson's where every score is 0 or 1 (or all are alike), else the percentile bootstrap's.
`read` is the budget really used: the share of the keys that full attention would have read, or of the context's tokens
that were recomputed. Differences are paired, method minus full on the same prompts, with the paired bootstrap's 95 %
interval and, where scores are 0 or 1, the exact McNemar p.
"""


def render(run: Run) -> str:
    """The whole run."""
    parts = [_heading(run), NOTES, *(_task(run, task) for task in run.metrics), *_overall(run), _anchors(run)]
    return "\n".join(part for part in parts if part)


def effective_length(task: str, scores: Mapping[int, float], base: Mapping[int, float]) -> int | None:
    """The longest length whose score, in percent, reaches the bar; None if none does.

    RULER's tasks have RULER's bar, the same for all models. Others have 85 % of what `base`, full attention's scores,
    reaches at the shortest length, so that methods are held to one bar too.
    """
    bar = RULER_SCORE if anchors.is_ruler(task) else SHARE_OF_SHORTEST * base[min(base)]
    return max((length for length, score in scores.items() if score >= bar), default=None)


def paired(
    ours: Sequence[Record], base: Sequence[Record], metric: Metric
) -> tuple[statistics.Interval, float | None] | None:
    """Mean difference on the samples whose prompts are equal, in percentage points for shares, and McNemar's p.

    None where there are no such samples, or a side lacks the metric.
    """
    other = {(r["index"], r["prompt"]): r for r in base}
    pairs = [(r, other[key]) for r in ours if (key := (r["index"], r["prompt"])) in other]
    sides = [scores(side, metric.name) for side in zip(*pairs, strict=True)] if pairs else [None]
    if None in sides:
        return None
    x, y = sides
    low_high = statistics.paired_difference(x, y)
    unit = 100 if metric.percent else 1
    found = statistics.Interval(*(None if z is None else unit * z for z in low_high[:3]), low_high.n)
    return found, statistics.mcnemar(x, y) if metric.percent and statistics.is_binary(x, y) else None


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 and length else str(length)


def cell(row: Row, percent: bool) -> str:
    digits = 1 if percent else 3
    bounds = "" if row["ci_lo"] is None else f" ({row['ci_lo']:.{digits}f}-{row['ci_hi']:.{digits}f})"
    return f"{row['mean']:.{digits}f}{bounds}"


def difference(found: statistics.Interval, p: float | None, percent: bool, n: int | None = None) -> str:
    """`-3.1 (-6.2 to -0.4), p = .021`; with the number of pairs where it is not `n`."""
    digits = 1 if percent else 3
    text = _signed(found.mean, digits)
    if found.low is not None:
        text += f" ({_signed(found.low, digits)} to {_signed(found.high, digits)})"
    if p is not None:
        text += f", p {'< .001' if p < 0.001 else '= 1' if p > 0.9995 else f'= {p:.3f}'.replace('0.', '.')}"
    return text if n is None or found.n == n else f"{text}, n = {found.n}"


def _signed(x: float, digits: int) -> str:
    text = f"{x:+.{digits}f}"
    return text if float(text) else text[1:]


def _heading(run: Run) -> str:
    what = [f"suite {run.config['suite']}"] if "suite" in run.config else []
    what += [f"{key} {run.config[key]}" for key in ("model", "seed") if key in run.config]
    if run.prefills is not None:
        what.append(f"{run.prefills} contexts prefilled densely")
    return f"# Accuracy: {', '.join(what)}\n"


def _task(run: Run, task: str) -> str:
    metric = run.metrics[task][0]
    lengths = run.lengths(task)
    rows = {(r["method"], r["length"]): r for r in run.rows if (r["task"], r["metric"]) == (task, metric.name)}
    if not rows:
        return ""
    methods = [m for m in run.methods() if any((m, n) in rows for n in lengths)]
    ranked = metric.percent and metric.higher_is_better and len(lengths) > 1
    means = {m: {n: rows[m, n]["mean"] for n in lengths if (m, n) in rows} for m in methods}
    lines = []
    for method in methods:
        found = [rows.get((method, n)) for n in lengths]
        line = [method, *("" if r is None else cell(r, metric.percent) for r in found)]
        line += ["" if r is None or r["budget"] is None else f"{r['budget']:.1%}" for r in found]
        if ranked:
            line.append(_reached(task, means[method], means.get(BASE, means[method])))
        lines.append(line)
    head = ["method", *map(tokens, lengths), *(f"read, {tokens(n)}" for n in lengths)]
    unit = ", %" if metric.percent else ", lower is better" if not metric.higher_is_better else ""
    title = f"## {task}: {metric.name}{unit} (n = {_range(r['n'] for r in rows.values())})\n"
    rule = f"Effective length: {_rule(task, BASE in means)}.\n" if ranked else ""
    table = report.table(head + ["effective length"] * ranked, lines)
    return "\n".join(part for part in (title, table, rule, _against_full(run, task, metric, methods)) if part)


def _reached(task: str, scores: Mapping[int, float], base: Mapping[int, float]) -> str:
    length = effective_length(task, scores, base)
    return "none" if length is None else tokens(length)


def _rule(task: str, based: bool) -> str:
    if anchors.is_ruler(task):
        return f"the longest with a score of at least {RULER_SCORE}, RULER's bar"
    whose = f"{BASE}'s" if based else "the method's own"
    return f"the longest with at least {SHARE_OF_SHORTEST:.0%} of {whose} score at the shortest length"


def _against_full(run: Run, task: str, metric: Metric, methods: Sequence[str]) -> str:
    lengths = run.lengths(task)
    if BASE not in methods or len(methods) == 1:
        return ""
    lines = []
    for method in (m for m in methods if m != BASE):
        line = [method]
        for n in lengths:
            base, ours = (run.samples.get((task, n, m), []) for m in (BASE, method))
            found = paired(ours, base, metric)
            line.append("" if found is None else difference(*found, metric.percent, len(ours)))
        lines.append(line)
    unit = "points" if metric.percent else metric.name
    return report.table((f"minus {BASE}, {unit}", *map(tokens, lengths)), lines)


def _overall(run: Run) -> Iterable[str]:
    """Means over tasks, for RULER's and for others, where there are several."""
    ours = [task for task, (metric, *_) in run.metrics.items() if metric.percent and metric.higher_is_better]
    for name, tasks in (
        ("RULER's tasks", [t for t in ours if anchors.is_ruler(t)]),
        ("tasks", [t for t in ours if not anchors.is_ruler(t)]),
    ):
        lengths = sorted(set.intersection(*(set(run.lengths(t)) for t in tasks))) if len(tasks) > 1 else []
        if lengths:
            yield _means(run, name, tasks, lengths)


def _means(run: Run, name: str, tasks: Sequence[str], lengths: Sequence[int]) -> str:
    found = {(r["task"], r["length"], r["method"], r["metric"]): r for r in run.rows}
    means: dict[str, dict[int, float]] = {}
    lines = []
    for method in run.methods():
        cells = [[found.get((t, n, method, run.metrics[t][0].name)) for t in tasks] for n in lengths]
        if any(None in column for column in cells):
            continue
        means[method] = {n: math.fsum(r["mean"] for r in c) / len(tasks) for n, c in zip(lengths, cells, strict=True)}
        budgets = [r["budget"] for column in cells for r in column if r["budget"] is not None]
        read = f"{math.fsum(budgets) / len(budgets):.1%}" if budgets else ""
        lines.append([method, *(f"{mean:.1f}" for mean in means[method].values()), read])
    head = ["method", *map(tokens, lengths), "read"]
    if len(lengths) > 1:
        head.append("effective length")
        for line in lines:
            line.append(_reached(tasks[0], means[line[0]], means.get(BASE, means[line[0]])))
    title = f"## Mean of {len(tasks)} {name}, %\n\n{', '.join(tasks)}.\n"
    rule = [f"Effective length: {_rule(tasks[0], BASE in means)}.\n"] if len(lengths) > 1 else []
    return "\n".join((title, report.table(head, lines), *rule)) if lines else ""


def _anchors(run: Run) -> str:
    found = anchors.beside(list(run.metrics))
    if not found:
        return ""
    head = ("model", "what", "figures", "source")
    title = "## Published figures of other models\n\nNot measured here, nor on the model above.\n"
    return f"{title}\n{report.table(head, [anchor[1:] for anchor in found])}"


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
