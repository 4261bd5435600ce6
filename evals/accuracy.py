"""A run's rows as a record with the machine they came from, for the demo and the README.

`python -m attnlab.evals.accuracy` measures the testbed model: all its tasks at 1K and 4K tokens, dense and sparse.
"""

import argparse
import contextlib
import io
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from attnlab.evals import report
from attnlab.evals.harness import plots, results, table
from attnlab.evals.harness.results import Run

CAPTION = "Accuracy against the share of the keys that was read, one panel a task, a point with its interval a method"
LENGTHS = "1024,4096"
METHODS = "full,wave"
Record = dict[str, Any]


def measure(out: pathlib.Path, options: list[str], stem: str = "accuracy") -> Record:
    """Run `attnlab-eval run` with `options` and write `stem-DEVICE.json` and `.png` to `out`.

    The run folder is `out/runs/STEM`; one of an earlier call makes room. Raises RuntimeError when the run fails, which
    has said why.
    """
    from attnlab.evals import cli

    folder = out / "runs" / stem
    if (folder / "config.yaml").exists():
        shutil.rmtree(folder)
    if status := cli.main(["run", *options, "--out", str(folder)]):
        raise RuntimeError(f"attnlab-eval ended with exit status {status}")
    run = results.load(folder)
    found = record(run, options)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{stem}-{report.slug(found)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if (figure := drawn(run)) is not None:
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    return found


def quiet(options: list[str]) -> tuple[Run, Record]:
    """`attnlab-eval run` with `options`, in a folder of its own that is gone afterwards, for notebooks.

    RuntimeError with what it said when it fails.
    """
    from attnlab.evals import cli

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place, "run")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = cli.main(["run", *options, "--out", str(folder)])
        if status:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])
        run = results.load(folder)
        return run, record(run, options)


def record(run: Run, options: list[str]) -> Record:
    """Rows of each task's main metric, and where they come from."""
    return {
        "environment": json.loads((run.path / "env.json").read_text(encoding="utf-8")),
        "shape": f"{run.config['model']}, {run.config['dtype']}",
        "command": f"attnlab-eval run {' '.join(options)}".strip(),
        "prefills": run.prefills,
        "results": [row for row in run.rows if row["metric"] == run.metrics[row["task"]][0].name],
    }


def drawn(run: Run) -> Any:
    """Against length where there are several, else against what was read."""
    return plots.accuracy_by_length(run) or plots.accuracy_by_budget(run)


def markdown(record: Record) -> str:
    """The machine, a row per method, a column per task and length: mean, interval, and what was read."""
    columns = list(dict.fromkeys((row["task"], row["length"]) for row in record["results"]))
    rows = {(row["task"], row["length"], row["method"]): row for row in record["results"]}
    lines = []
    for method in dict.fromkeys(row["method"] for row in record["results"]):
        found = [rows.get((*column, method)) for column in columns]
        lines.append([method, *("" if row is None else table.cell(row, percent=True) for row in found), _read(found)])
    names = [f"{task.removeprefix('testbed_')}, {table.tokens(length)}" for task, length in columns]
    counts = sorted({row["n"] for row in record["results"]})
    env = record["environment"]
    took = f"{env['wall_s']:.0f} s, {env['model_s']:.0f} s of them in the model"
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    head = f"`{record['command']}`: {took}; n = {n}; {record['prefills']} contexts prefilled. {report.machine(record)}"
    return f"{head}\n\n{report.table(['method', *names, 'read'], lines)}"


def _read(found: list[dict[str, Any] | None]) -> str:
    """Mean budget over the columns."""
    budgets = [row["budget"] for row in found if row is not None and row["budget"] is not None]
    return f"{sum(budgets) / len(budgets):.1%}" if budgets else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the run fails."""
    parser = argparse.ArgumentParser(prog="accuracy", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/accuracy"), help="folder for the record")
    parser.add_argument("--samples", type=int, default=24, help="per task and length (default 24)")
    parser.add_argument("--lengths", default=LENGTHS, help=f"in tokens (default {LENGTHS})")
    options = parser.parse_args(argv)
    asked = [
        "--suite",
        "testbed",
        "--methods",
        METHODS,
        "--lengths",
        options.lengths,
        "--samples",
        str(options.samples),
    ]
    try:
        print(markdown(measure(options.out, asked, "testbed")))
    except RuntimeError as e:
        print(f"accuracy: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
