"""MTIME and ATIME: what the model and its attention take for one token of a batch, estimated or measured."""

import bisect
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .catalogue import check_number
from .hardware import Hardware
from .models import ModelShape

Time = Callable[[float], float]


class Efficiency(NamedTuple):
    """Shares of a device's published rates that are reached, in (0, 1]; the defaults are round guesses, not fitted.

    `flops` of large products, `bandwidth` of memory reads, `network` of links to devices of the same kind and to
    other machines.
    """

    flops: float = 0.7
    bandwidth: float = 0.8
    network: float = 0.9

    def check(self, fn: str) -> None:
        for name, value in self._asdict().items():
            check_number(fn, f"efficiency.{name}", value, most=1.0)


def model_time(model: ModelShape, hardware: Hardware, devices: int, efficiency: Efficiency) -> Time:
    """MTIME(B), seconds of everything but attention for a token of each of `B` requests, over `devices` in parallel.

    The larger of `2 N B` FLOP and `e (N + 2 B d)` bytes at the rates reached, and two all-reduces of `e B d` bytes a
    layer, each `2 (k - 1) / k` of that over every device's link.
    """
    flops = devices * hardware.flops * efficiency.flops
    bandwidth = devices * hardware.bandwidth * efficiency.bandwidth
    reduced = 2 * model.layers * 2 * (devices - 1) / devices * model.element_bytes * model.hidden
    per_request = reduced / (hardware.interconnect * efficiency.network)

    def seconds(batch: float) -> float:
        moved = model.weights + 2 * model.element_bytes * batch * model.hidden
        return max(2 * model.parameters * batch / flops, moved / bandwidth) + per_request * batch

    return seconds


def attention_time(model: ModelShape, hardware: Hardware, devices: int, efficiency: Efficiency) -> Time:
    """ATIME(B, l) as a function of the `B l` tokens attended, seconds in all layers, evenly over `devices`.

    The larger of reading their keys and values and of `4 d L` FLOP a token.
    """
    read = model.kv_bytes / (devices * hardware.bandwidth * efficiency.bandwidth)
    made = 4 * model.width * model.layers / (devices * hardware.flops * efficiency.flops)
    return lambda tokens: max(read, made) * tokens


@dataclass(frozen=True)
class TimeTable:
    """A measured time: points `(amount, seconds)`, at least two, rising in both; called, it interpolates linearly.

    Below the first point it takes the first one's seconds, beyond the last it goes on along the last two's slope.
    ValueError where the points are not so.
    """

    points: tuple[tuple[float, float], ...]

    def __init__(self, points: Iterable[tuple[float, float]]):
        fn = "TimeTable"
        try:
            found = tuple((float(amount), float(seconds)) for amount, seconds in points)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{fn}: points must be pairs of numbers (amount, seconds): {e}") from e
        for pair in found:
            check_number(fn, "an amount", pair[0], zero=True)
            check_number(fn, "seconds", pair[1])
        if len(found) < 2 or any(a[0] >= b[0] or a[1] > b[1] for a, b in itertools.pairwise(found)):
            raise ValueError(f"{fn}: points must be two or more, amounts rising, seconds not falling, got {found}")
        object.__setattr__(self, "points", found)

    def __call__(self, amount: float) -> float:
        first = self.points[0]
        if amount <= first[0]:
            return first[1]
        at = min(bisect.bisect_left(self.points, (amount, 0.0)), len(self.points) - 1)
        (low, start), (high, end) = self.points[at - 1 : at + 1]
        return start + (end - start) * (amount - low) / (high - low)


def attention_from_benchmarks(
    path: str | os.PathLike[str], model: ModelShape, *, contender: str, kind: str = "split_decode", devices: int = 1
) -> TimeTable:
    """ATIME from a record of `python -m attnlab.evals.bench` (JSON), for `CostModel(atime=...)`.

    Of the record's `rows` those of `kind` and `contender` (`"attnlab cpu"`, say) are read: `length`, tokens attended in
    one call over one layer; `p50`, its median in milliseconds (`unit` must be `"ms"`). The record's `kv_bytes` are
    those of keys and values that such a call reads per token. A call's seconds count `model.kv_bytes / kv_bytes` times
    over, which is exact where reading them is what takes the time, and are divided by `devices`.

    Raises ValueError on a file that is not so, and where fewer than two lengths are found.
    """
    fn = "attention_from_benchmarks"
    check_number(fn, "devices", devices)
    points = {}
    rows, kv_bytes = _record(fn, Path(path))
    for row in rows:
        if row.get("kind") != kind or row.get("contender") != contender:
            continue
        for name in ("length", "p50"):
            check_number(fn, f"{kind} row's {name}", row.get(name))
        if row.get("unit") != "ms":
            raise ValueError(f"{fn}: {kind} row's unit must be 'ms', got {row.get('unit')!r}")
        points[row["length"]] = row["p50"] * 1e-3 * model.kv_bytes / kv_bytes / devices
    if len(points) < 2:
        raise ValueError(f"{fn}: {path} must hold two or more lengths of {kind} by {contender!r}, got {len(points)}")
    return TimeTable(sorted(points.items()))


def _record(fn: str, path: Path) -> tuple[list[dict[str, Any]], float]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows, kv_bytes = record["rows"], record["kv_bytes"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{fn}: {path} must be a benchmark's record with rows and kv_bytes: {e!r}") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{fn}: {path}: rows must be a list of objects")
    return rows, check_number(fn, "kv_bytes", kv_bytes)


def as_time(fn: str, name: str, given: Any, estimate: Time) -> Time:
    """A measured time, from a function or from points, or the estimate."""
    if given is None:
        return estimate
    return given if callable(given) else TimeTable(_iterable(fn, name, given))


def _iterable(fn: str, name: str, given: Any) -> Iterable[tuple[float, float]]:
    if not isinstance(given, Iterable):
        raise TypeError(f"{fn}: {name} must be points (amount, seconds) or a function, got {type(given).__name__}")
    return given
