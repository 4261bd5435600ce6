"""`python -m attnlab.evals.lamina_cost`: Lamina against homogeneous devices of about its price, per model and trace.

Estimates from published device figures (`CostModel`), run through the request simulator; nothing is measured here.
Prefill is outside: both sides decode alone, on nodes of their own.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Sequence

from attnlab.evals import report
from attnlab.lamina import Arrival, CostModel, compare, load_hardware, load_model, load_traffic, read_requests
from attnlab.lamina.hardware import hardware_names
from attnlab.lamina.models import model_names
from attnlab.lamina.simulator import SimulationReport
from attnlab.lamina.traffic import traffic_names

# The paper's table 5; any other model takes the larger of the two.
DOPS = {"LLaMA-33B": (1, 2)}
DOP = (2, 4)
HEADER = ("model", "trace", "system", "$/h", "tokens/s", "batch", "ms/token", "p99", "$/M tokens", "tokens per $")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        print(table(options), end="")
        if options.plot:
            _cost(options, options.models[0]).plot(options.plot)
    except (ValueError, ImportError) as e:
        print(f"lamina_cost: {e}", file=sys.stderr)
        return 2
    return 0


def table(options: argparse.Namespace) -> str:
    """Markdown, two rows a model and trace."""
    rows = []
    for model, trace in itertools.product(options.models, [None] if options.file else options.traces):
        cost = _cost(options, model)
        rival = cost.counterpart()
        found = compare(cost, rival, _requests(options, trace))
        where = cost.model.name, trace or pathlib.Path(options.file).name
        rows.append(_row(where, found.first, cost.price, f"{found.per_dollar - 1:+.1%}"))
        rows.append(_row(where, found.second, rival.price, ""))
    return report.table(HEADER, rows)


def _cost(options: argparse.Namespace, model: str) -> CostModel:
    devices = (load_hardware(name, options.hardware) for name in (options.compute, options.memory))
    shape = load_model(model)
    dop = tuple(options.dop) if options.dop else DOPS.get(shape.name, DOP)
    return CostModel(*devices, shape, dop=dop, batches=options.batches)


def _requests(options: argparse.Namespace, trace: str | None) -> list[Arrival]:
    if trace is None:
        return read_requests(options.file)
    return load_traffic(trace).draw(options.requests, rate=options.rate, seed=options.seed)


def _row(where: tuple[str, str], found: SimulationReport, price: float, gain: str) -> tuple[str, ...]:
    times = (f"{seconds * 1e3:.1f}" for seconds in (found.token_time, found.token_time_p99))
    speed, batch, dollars = f"{found.throughput:.0f}", f"{found.mean_batch:.0f}", f"{found.dollars_per_million:.2f}"
    return (*where, found.system.split(" on ")[-1], f"{price:.2f}", speed, batch, *times, dollars, gain)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamina_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=model_names(), metavar="MODEL", help=", ".join(model_names()))
    parser.add_argument(
        "--traces", nargs="+", default=traffic_names(), metavar="TRACE", help=", ".join(traffic_names())
    )
    parser.add_argument("--file", help="a trace's own requests, .csv or .jsonl, instead of --traces")
    parser.add_argument("--requests", type=int, default=4000, help="drawn per trace (default: 4000)")
    parser.add_argument("--rate", type=float, help="Poisson arrivals a second (default: all are there at the start)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compute", default="H100", metavar="DEVICE", help=", ".join(hardware_names()))
    parser.add_argument("--memory", default="H20", metavar="DEVICE")
    parser.add_argument("--hardware", help="a TOML file of devices, instead of the library's")
    parser.add_argument(
        "--dop", nargs=2, type=int, metavar=("COMPUTE", "MEMORY"), help="devices (default: the paper's)"
    )
    parser.add_argument("--batches", type=int, default=2, help="rotated batches (default: 2)")
    parser.add_argument("--plot", type=pathlib.Path, help="a figure of the first model's costs, .png, .pdf or .svg")
    return parser


if __name__ == "__main__":
    sys.exit(main())
