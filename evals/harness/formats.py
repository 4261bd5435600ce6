"""A run in the forms of other harnesses, for their tools to read: lm-evaluation-harness 0.4 and kvpress 0.5."""

import csv
import json
import math
import pathlib
import statistics
import urllib.parse
from collections.abc import Callable
from typing import Any

from .errors import unknown
from .results import Record, Run, load

REUSE = ("reuse", "fusionrag")  # their budgets are tokens recomputed: every key is kept


def write(folder: str | pathlib.Path, format: str) -> pathlib.Path:
    """Write the run in `folder` in a `format` of `FORMATS`, into a folder of that name inside it, which is returned.

    UsageError for an unknown format or a folder that is no run.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    run = load(folder)
    out = run.path / format
    for name, text in FORMATS[format](run).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return out


def lm_eval(run: Run) -> dict[str, str]:
    """A results file per method, in a folder of its name, as percent-encoding writes it.

    A task's values are in [0, 1], under the length as in that harness's RULER tasks: `"4096,none"`, and its standard
    error `"4096_stderr,none"`. Metrics after a task's first are `"4096/NAME,none"`.
    """
    return {f"{_quoted(m)}/results_attnlab.json": _json(_lm_eval(run, m)) for m in run.methods()}


def _lm_eval(run: Run, method: str) -> dict[str, Any]:
    groups = {(t, n): samples for (t, n, m), samples in sorted(run.samples.items()) if m == method}
    tasks = [task for task in run.metrics if any(t == task for t, _ in groups)]
    results: dict[str, dict[str, Any]] = {}
    better: dict[str, dict[str, bool]] = {}
    counts = {}
    for task in tasks:
        mine = {n: samples for (t, n), samples in groups.items() if t == task}
        count = sum(map(len, mine.values()))
        results[task], better[task] = {"name": task, "alias": task, "sample_len": count}, {}
        counts[task] = {"original": count, "effective": count}
        for length, samples in mine.items():
            for i, metric in enumerate(run.metrics[task]):
                values = [r["scores"][metric.name] for r in samples if metric.name in r["scores"]]
                if values:
                    name = f"{length}/{metric.name}" if i else str(length)
                    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
                    results[task][f"{name},none"] = math.fsum(values) / len(values)
                    results[task][f"{name}_stderr,none"] = error
                    better[task][name] = metric.higher_is_better
    model, seed = str(run.config.get("model", "")), run.config.get("seed")
    return {
        "results": results,
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task, "metadata": {"method": method}} for task in tasks},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": better,
        "n-samples": counts,
        "config": {"model": "attnlab", "model_args": {"pretrained": model, "method": method}, "random_seed": seed},
        "model_source": "attnlab",
        "model_name": model,
    }


def kvpress(run: Run) -> dict[str, str]:
    """A folder per length and method: `metrics.json` in percent, `predictions.csv` and `config.yaml`.

    `compression_ratio` is the share of the keys that was not read; 0 for methods that recompute tokens and keep all.
    """
    files = {}
    suite, model = run.config.get("suite", "attnlab"), pathlib.PurePath(str(run.config.get("model", "model"))).name
    for length, method in sorted({(n, m) for _, n, m in run.samples}, key=lambda x: (x[0], run.methods().index(x[1]))):
        groups = {t: run.samples[t, length, method] for t in run.metrics if (t, length, method) in run.samples}
        budgets = [ratio for samples in groups.values() for r in samples if (ratio := _compression(r)) is not None]
        ratio = math.fsum(budgets) / len(budgets) if budgets else 0.0
        name = "__".join((str(suite), str(length), model, _quoted(method), f"{ratio:.2f}"))
        metrics = {task: _kvpress_scores(run, task, samples) for task, samples in groups.items()}
        config = {"dataset": suite, "data_dir": str(length), "model": model, "press_name": method}
        config |= {"compression_ratio": round(ratio, 4), "seed": run.config.get("seed")}
        files[f"{name}/metrics.json"] = json.dumps(metrics, indent=4) + "\n"
        files[f"{name}/config.yaml"] = "".join(f"{key}: {json.dumps(x)}\n" for key, x in config.items())
        files[f"{name}/predictions.csv"] = _predictions([r for samples in groups.values() for r in samples])
    return files


def _kvpress_scores(run: Run, task: str, samples: list[Record]) -> dict[str, float]:
    found = {}
    for metric in run.metrics[task]:
        values = [r["scores"][metric.name] for r in samples if metric.name in r["scores"]]
        if values:
            name = "string_match" if metric.name.startswith("string_match") else metric.name
            mean = math.fsum(values) / len(values)
            found[name] = round(100 * mean, 2) if metric.percent else mean
    return found


def _compression(record: Record) -> float | None:
    if record["budget"] is None:
        return None
    return 0.0 if record["method"].split(":")[0] in REUSE else 1 - record["budget"]


def _predictions(records: list[Record]) -> str:
    lines: list[str] = []

    class Lines:
        write = staticmethod(lines.append)

    table = csv.writer(Lines, lineterminator="\n")
    table.writerow(("task", "index", "question", "answer", "predicted_answer", "compression_ratio"))
    for r in records:
        table.writerow((r["task"], r["index"], r["question"], r["answers"], r["output"], _compression(r)))
    return "".join(lines)


def _quoted(method: str) -> str:
    return urllib.parse.quote(method, safe="=+,")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


FORMATS: dict[str, Callable[[Run], dict[str, str]]] = {"lm-eval": lm_eval, "kvpress": kvpress}
