"""`python -m attnlab.evals.wave_quality`: what RetroInfer's selectors lose against full attention, by token budget."""

import argparse
import importlib.util
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnlab
from attnlab.evals import report, wave_data
from attnlab.evals.measure import Interval, environment, interval
from attnlab.evals.wave_data import Row
from attnlab.progress import Progress

BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.08)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"selector": "full"},
    "oracle": {"selector": "oracle"},
    "quest": {"selector": "quest"},
    "cluster": {"selector": "cluster"},
    "wave": {"selector": "wave", "estimation": "ratio"},
    "wave, all estimated": {"selector": "wave", "estimation": "all"},
}
DATA: dict[str, Callable[[int, int, int], list[Row]]] = {
    "planted": lambda *sizes: [wave_data.planted(*sizes)],
    "llama": wave_data.llama,
}
NAMES = {"planted": "planted clusters and needles", "llama": "Llama, random weights, real text"}
CUT_BUDGET, CUT, NEVER = 0.02, 2.0, 1.0
ROUNDING = 1e-6
Record = dict[str, Any]


class Loss(NamedTuple):
    """Means over queries and heads."""

    error: float  # |out - full| / |full|
    recall: float  # share of the softmax's mass that lies on tokens read exactly


Losses = dict[tuple[str, float], Loss]


def losses(row: Row) -> Losses:
    """Every method at every budget, over one index of the row. `full` knows no budget and stands under each."""
    index = attnlab.WaveIndex.build(row.k[None], row.v[None], capacity=len(row.k))
    found: dict[tuple[str, float], list[Loss]] = {(name, b): [] for b in BUDGETS for name in METHODS}
    for q in row.q[:, None, None]:
        truth = attnlab.full_attention(q, row.k[None], row.v[None], return_lse=True)
        everything = _loss(q, index, truth, **METHODS["full"])
        for (name, budget), taken in found.items():
            taken.append(everything if name == "full" else _loss(q, index, truth, token_budget=budget, **METHODS[name]))
            # Estimation adds to the lse; the tokens read are those that `cluster` reads.
            if "estimation" in METHODS[name]:
                taken[-1] = taken[-1]._replace(recall=found["cluster", budget][-1].recall)
    return {key: Loss(*map(statistics.fmean, zip(*taken, strict=True))) for key, taken in found.items()}


def _loss(q: Tensor, index: attnlab.WaveIndex, truth: tuple[Tensor, Tensor], **method: Any) -> Loss:
    """The mass is right where nothing is estimated: then the lse is that of the tokens read."""
    out, lse = attnlab.wave_attention(q, index, return_lse=True, **method)
    full, total = truth
    error = torch.linalg.vector_norm(out - full, dim=-1) / torch.linalg.vector_norm(full, dim=-1)
    return Loss(error.mean().item(), (lse - total).exp().mean().item())


def pooled(rows: list[Losses]) -> Losses:
    """The mean over rows, such as the layers of a model."""
    return {key: Loss(*map(statistics.fmean, zip(*(row[key] for row in rows), strict=True))) for key in rows[0]}


def table_rows(data: str, seeds: list[Losses]) -> list[dict[str, Any]]:
    """One row per method and budget: mean and 95 % interval over seeds."""
    rows = []
    for name, budget in seeds[0]:
        row: dict[str, Any] = {"data": data, "selector": name, "budget": budget}
        for what in Loss._fields:
            mean, low, high, n = interval([getattr(seed[name, budget], what) for seed in seeds])
            row |= {what: mean, f"{what}_low": low, f"{what}_high": high, "seeds": n}
        rows.append(row)
    return rows


def claims(data: str, seeds: list[Losses]) -> list[dict[str, Any]]:
    """What estimation promises: the first must hold at the interval's lower end, the second for every seed."""

    def ratio(seed: Losses, over: str, under: str, budget: float) -> float:
        return seed[over, budget].error / seed[under, budget].error

    cut = interval([ratio(seed, "cluster", "wave", CUT_BUDGET) for seed in seeds])
    all_of_them = [ratio(seed, "wave, all estimated", "wave", budget) for seed in seeds for budget in BUDGETS]
    worst = Interval(*[max(all_of_them)] * 3, len(seeds))
    holds = worst.mean <= NEVER + ROUNDING
    return [
        _claim(data, f"error of cluster over that of wave, at {CUT_BUDGET:.0%}", cut, f">= {CUT:g}", cut.low >= CUT),
        _claim(data, "error, all estimated over 23.2 %: the largest ratio", worst, f"<= {NEVER:g}", holds),
    ]


def _claim(data: str, what: str, figure: Interval, target: str, met: bool) -> dict[str, Any]:
    mean, low, high, n = figure
    return {
        "data": data,
        "what": what,
        "figure": mean,
        "low": low,
        "high": high,
        "seeds": n,
        "target": target,
        "met": met,
    }


def measure(tokens: int, queries: int, seeds: int) -> Record:
    """The record of all data."""
    rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    progress = Progress(2 * len(DATA) * seeds)
    for data, make in DATA.items():
        found = []
        for seed in range(seeds):
            progress.step(f"{data}, seed {seed}: data")
            made = make(tokens, queries, seed)
            progress.step(f"{data}, seed {seed}: selectors")
            found.append(pooled([losses(row) for row in made]))
        rows += table_rows(data, found)
        verdicts += claims(data, found)
    progress.close()
    sizes = {"tokens": tokens, "queries": queries, "seeds": seeds}
    shape = f"{tokens} tokens, {queries} queries, {seeds} seeds, D={wave_data.HEAD_DIM}, float32"
    return {"environment": environment(), "shape": shape, **sizes, "rows": rows, "claims": verdicts}


NOTES = """\
- Budgets are shares of the row's tokens, read exactly on top of the first 4 and the last 64. `wave` reads what
  `cluster` reads, and estimates the next 23.2 % of the clusters, or all others. ± is half of Student's 95 % interval
  over seeds; a claim about a mean is met where the lower end of its interval meets it.
- The Llama's weights are random: its keys are weakly clustered, and its attention is close to uniform, as the mass that
  the oracle reads shows. The mean of the values is most of what there is to estimate.
"""


def markdown(record: Record) -> str:
    """The machine, errors and mass read by budget, and the claims."""
    parts = [report.machine(record) + "\n"]
    for data in dict.fromkeys(row["data"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["data"] == data and row["selector"] != "full"]
        parts.append(_table(f"output error: {NAMES[data]}", "error", rows))
        exact = [row for row in rows if not row["selector"].startswith("wave")]
        parts.append(_table(f"attention mass read: {NAMES[data]}", "recall", exact))
    lines = [
        (NAMES[c["data"]], c["what"], _range(c), f"{c['target']}: {'met' if c['met'] else 'missed'}")
        for c in record["claims"]
    ]
    parts += [report.table(("data", "claim", "measured", "target"), lines), NOTES]
    return "\n".join(parts)


def _table(title: str, what: str, rows: list[dict[str, Any]]) -> str:
    budgets, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("budget", "selector"))
    cells = {(row["selector"], row["budget"]): _share(row, what) for row in rows}
    lines = [(name, *(cells[name, b] for b in budgets)) for name in names]
    return report.table((title, *(f"{b:.1%}" for b in budgets)), lines)


def _share(row: dict[str, Any], what: str) -> str:
    return f"{row[what]:.1%} ±{100 * (row[f'{what}_high'] - row[what]):.1f}"


def _range(claim: dict[str, Any]) -> str:
    same = claim["low"] == claim["high"]
    return f"{claim['figure']:.2f}" + ("" if same else f" ({claim['low']:.2f}-{claim['high']:.2f})")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wave_quality", description=__doc__)
    parser.add_argument("--tokens", type=int, help="tokens of a row (default 16384; 2048 under --quick)")
    parser.add_argument("--seeds", type=int, help="rows of each kind, 2 to 31 (default 5; 2 under --quick)")
    parser.add_argument("--quick", action="store_true", help="short rows, few queries: seconds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/wave"), help="folder for the record")
    options = parser.parse_args(argv)
    options.queries = 2 if options.quick else 8
    options.tokens = options.tokens or (2048 if options.quick else 16384)
    options.seeds = (2 if options.quick else 5) if options.seeds is None else options.seeds
    if options.tokens < 256:
        parser.error(f"--tokens must be at least 256, got {options.tokens}")
    if not 2 <= options.seeds <= 31:
        parser.error(f"--seeds must be from 2 to 31, got {options.seeds}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, {options.out} is a file")
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed: pip install 'attnlab[hf]'")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; a missed claim is reported, not an error."""
    options = parse(argv)
    record = measure(options.tokens, options.queries, options.seeds)
    print(markdown(record))
    for path in report.write(record, options.out, f"wave-quality-{report.slug(record)}", markdown):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
