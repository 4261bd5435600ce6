"""From the samples of a run to its rows, and from the rows to a table and figures."""

import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import statistics
from .errors import UsageError
from .task import Metric

SCHEMA_VERSION = 1
Record = dict[str, Any]
Row = dict[str, Any]
Metrics = Mapping[str, Sequence[Metric]]
Key = tuple[str, int, str]


@dataclass(frozen=True)
class Run:
    """A run folder read back.

    Attributes:
        path: of the folder.
        config: of config.yaml; empty where it is missing.
        rows: of results.json.
        metrics: of every task, in the order of the run.
        samples: records by task, length and method, each in the order of their indices.
        prefills: contexts prefilled densely.
    """

    path: pathlib.Path
    config: dict[str, Any]
    rows: list[Row]
    metrics: dict[str, tuple[Metric, ...]]
    samples: dict[Key, list[Record]]
    prefills: int | None

    def lengths(self, task: str) -> list[int]:
        return sorted({row["length"] for row in self.rows if row["task"] == task})

    def methods(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row["method"] for row in self.rows))


def summarise(records: Iterable[Record], metrics: Metrics, methods: Sequence[str] | None = None) -> list[Row]:
    """A row per task, length, method and metric: the mean with its 95 % interval, samples, and the mean budget.

    Means are in percent for metrics that are shares. An interval whose bounds one sample does not tell, and the budget
    of samples that have none, are None. Rows come in the order of `metrics`, by length, and by `methods`, which are
    "full" and then the others by name where it is not given; that of the records does not matter. ValueError for a
    record of another task, one that is there twice, or one that lacks a score the others have.
    """
    groups = grouped(records, metrics)
    order = list(methods) if methods is not None else sorted({m for _, _, m in groups}, key=lambda m: (m != "full", m))
    tasks = list(metrics)
    rows = []
    for key in sorted(groups, key=lambda k: (tasks.index(k[0]), k[1], order.index(k[2]))):
        samples = groups[key]
        budgets = [r["budget"] for r in samples if r["budget"] is not None]
        budget = math.fsum(budgets) / len(budgets) if budgets else None
        for metric in metrics[key[0]]:
            values = scores(samples, metric.name)
            if values is None:
                continue
            found = statistics.mean_interval(values, share=metric.percent)
            unit = 100 if metric.percent else 1
            mean, low, high = (None if x is None else unit * x for x in found[:3])
            where = dict(zip(("task", "length", "method"), key, strict=True))
            numbers = dict(mean=mean, ci_lo=low, ci_hi=high, n=found.n, budget=budget)
            rows.append({**where, "metric": metric.name, **numbers})
    return rows


def grouped(records: Iterable[Record], metrics: Metrics) -> dict[Key, list[Record]]:
    """Records by task, length and method, sorted by index."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record["task"] not in metrics:
            raise ValueError(f"summarise: metrics must name every task, got a record of {record['task']!r}")
        groups.setdefault((record["task"], record["length"], record["method"]), []).append(record)
    for (task, length, method), samples in groups.items():
        samples.sort(key=lambda r: r["index"])
        indices = [r["index"] for r in samples]
        if twice := [i for i, j in itertools.pairwise(indices) if i == j]:
            where = f"{task}, length {length}, {method}"
            raise ValueError(f"summarise: records must differ in index, got {twice[0]} twice ({where})")
    return groups


def scores(samples: Sequence[Record], metric: str) -> list[float] | None:
    """Of one group, or None where the method has none of this metric."""
    having = [r["scores"][metric] for r in samples if metric in r["scores"]]
    if having and len(having) < len(samples):
        lacking = next(r for r in samples if metric not in r["scores"])
        where = f"{lacking['task']}, length {lacking['length']}, {lacking['method']}, index {lacking['index']}"
        raise ValueError(f"summarise: every record must have the score {metric!r}, one has not ({where})")
    return having or None


def document(
    records: Iterable[Record], metrics: Metrics, prefills: int, methods: Sequence[str] | None = None
) -> dict[str, Any]:
    """What results.json holds; `metrics` go with it, so that the folder can be read without the tasks or their data."""
    described = {task: [asdict(metric) for metric in of_task] for task, of_task in metrics.items()}
    rows = summarise(records, metrics, methods)
    return {"schema_version": SCHEMA_VERSION, "results": rows, "prefills": prefills, "metrics": described}


def load(folder: str | pathlib.Path) -> Run:
    """A finished run; UsageError, in one line, for a folder that is none, is half-written or of another version."""
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: a run folder holds results.json and samples/")
    if not (path / "results.json").is_file():
        begun = (path / "samples").is_dir()
        why = "the run is not finished, continue it with --resume" if begun else "it is no run folder"
        raise UsageError(f"{path} holds no results.json: {why}")
    found = _json(path / "results.json", _text(path / "results.json"))
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        version = found.get("schema_version") if isinstance(found, dict) else None
        raise UsageError(f"{path / 'results.json'} has schema_version {version!r}, this attnlab reads {SCHEMA_VERSION}")
    try:
        metrics = {task: tuple(Metric(**m) for m in of_task) for task, of_task in found["metrics"].items()}
        samples = grouped(_samples(path / "samples"), metrics)
        return Run(path, _config(path / "config.yaml"), found["results"], metrics, samples, found.get("prefills"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} is no run folder of this attnlab: {error}") from error


def report(folder: str | pathlib.Path) -> str:
    """The table of a run, in Markdown."""
    from . import table

    return table.render(load(folder))


def write_reports(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """`table.md` and `plots/*.png` of a run folder, the same bytes each time."""
    from . import plots, table

    run = load(folder)
    text = run.path / "table.md"
    text.write_text(table.render(run), encoding="utf-8")
    return [text, *plots.write(run, run.path / "plots")]


def _samples(folder: pathlib.Path) -> Iterable[Record]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in _text(path).splitlines():
            yield _json(path, line)


def _config(path: pathlib.Path) -> dict[str, Any]:
    """Flat `key: value` lines, values in JSON."""
    if not path.is_file():
        return {}
    pairs = (line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
    return {key.strip(): _json(path, value) for key, value in pairs}


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def _json(path: pathlib.Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
