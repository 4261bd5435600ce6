"""What arrives: requests with their lengths, drawn from a trace's means or read from a trace's file."""

import csv
import datetime
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..dispatch import check_int
from .catalogue import DATA, check_number, load, read

# Columns of a file, each followed by the names that published traces give it (Azure's CSV, Mooncake's JSONL).
COLUMNS = {
    "arrival": ("arrival", "timestamp"),
    "prompt": ("prompt", "contexttokens", "input_length"),
    "output": ("output", "generatedtokens", "output_length"),
}


class Arrival(NamedTuple):
    """One request: when it reaches the decoding side (seconds), tokens of its prompt, tokens to make (at least 1)."""

    time: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Traffic:
    """A trace's means: tokens of the prompt and of the output of a request, and how many requests it holds.

    Raises ValueError naming the field.
    """

    name: str
    prompt: float
    output: float
    requests: int = 1000
    source: str = ""

    def __post_init__(self) -> None:
        fn = f"Traffic {self.name}"
        check_number(fn, "prompt", self.prompt, zero=True)
        if check_number(fn, "output", self.output) < 1:
            raise ValueError(f"{fn}: output must be at least 1, got {self.output}")
        check_int(fn, "requests", self.requests, 1)

    @property
    def context(self) -> float:
        """Mean tokens that a request's decode step attends, half of its output made."""
        return self.prompt + (self.output + 1) / 2

    def draw(
        self, count: int | None = None, *, rate: float | None = None, lengths: str = "uniform", seed: int = 0
    ) -> list[Arrival]:
        """`count` requests (default: as many as the trace has) in order of arrival.

        Args:
            rate: requests per second, Poisson; None: all are there at second 0.
            lengths: `"uniform"`: up to twice the trace's means, outputs from 1 and prompts from 0, drawn apart, for of
                these traces only the means are published; `"fixed"`: the means, rounded.
            seed: the same seed gives the same requests.

        Raises:
            ValueError: naming the argument.
        """
        fn = "Traffic.draw"
        count = self.requests if count is None else count
        check_int(fn, "count", count, 1)
        if rate is not None:
            check_number(fn, "rate", rate)
        if lengths not in ("uniform", "fixed"):
            raise ValueError(f"{fn}: lengths must be 'uniform' or 'fixed', got {lengths!r}")
        check_int(fn, "seed", seed, 0)
        # One stream a column: another rate leaves the lengths as they are.
        clock, prompts, outputs = (random.Random(f"{seed} {column}") for column in COLUMNS)
        found, now = [], 0.0
        for _ in range(count):
            now += 0.0 if rate is None else clock.expovariate(rate)
            if lengths == "fixed":
                prompt, output = round(self.prompt), round(self.output)
            else:
                prompt = round(prompts.uniform(0, 2 * self.prompt))
                output = 1 + round(outputs.uniform(0, 2 * (self.output - 1)))
            found.append(Arrival(now, prompt, output))
        return found


def load_traffic(name: str, path: str | os.PathLike[str] | None = None) -> Traffic:
    """A trace's means by name, from the library's data or from a TOML file of the same form.

    Raises ValueError on an unknown name, with near matches, and on a file's bad field.
    """
    return load("load_traffic", Traffic, "traffic.toml", name, path)


def traffic_names() -> list[str]:
    """The traces in the library's data."""
    return list(read("traffic_names", DATA / "traffic.toml"))


def read_requests(path: str | os.PathLike[str]) -> list[Arrival]:
    """Requests from a file ending in `.csv` (with a header) or `.jsonl`, in order of arrival.

    Columns: `arrival` (seconds), `prompt`, `output`; or as the Azure traces name them, `TIMESTAMP` (a date and time,
    counted from the earliest), `ContextTokens`, `GeneratedTokens`; or as the Mooncake traces do, `timestamp`
    (milliseconds), `input_length`, `output_length`. Other columns are not read.

    Raises:
        ValueError: naming the line, on a missing column or a bad value, and on a file with no requests.
    """
    file = Path(path)
    if file.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"read_requests: path must end in .csv or .jsonl, got {file}")
    rows: list[tuple[int, float | datetime.datetime, int, int]] = []
    for line, row in _rows(file):
        where = f"read_requests: {file} line {line}"
        found = {column: _pick(where, column, row) for column in COLUMNS}
        prompt, output = (
            _count(where, column, found[column][1], least) for column, least in (("prompt", 0), ("output", 1))
        )
        rows.append((line, _seconds(where, *found["arrival"]), prompt, output))
    if not rows:
        raise ValueError(f"read_requests: {file} holds no requests")
    return sorted((Arrival(*row) for row in _since_first(file, rows)), key=lambda request: request.time)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            if file.suffix == ".csv":
                table = csv.DictReader(text)
                for row in table:
                    yield table.line_num, {str(key).strip().lower(): value for key, value in row.items()}
                return
            for line, each in enumerate(text, 1):
                if each.strip():
                    yield line, _object(file, line, each)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"read_requests: cannot read {file}: {e}") from e


def _object(file: Path, line: int, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"read_requests: {file} line {line}: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"read_requests: {file} line {line} must hold an object, got {type(found).__name__}")
    return {key.lower(): value for key, value in found.items()}


def _pick(where: str, column: str, row: dict[str, Any]) -> tuple[str, Any]:
    for name in COLUMNS[column]:
        if row.get(name) is not None:
            return name, row[name]
    raise ValueError(f"{where} lacks {column}; any of these names will do: {', '.join(COLUMNS[column])}")


def _count(where: str, column: str, value: Any, least: int) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        found = -1
    if found < least or (isinstance(value, bool | float) and value != found):
        raise ValueError(f"{where}: {column} must be an int of {least} or more, got {value!r}")
    return found


def _seconds(where: str, name: str, value: Any) -> float | datetime.datetime:
    """Seconds; a date and time where it is one."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        try:
            # Azure writes seven decimals of a second; `fromisoformat` takes six.
            text = str(value).strip().replace("T", " ")
            return datetime.datetime.fromisoformat(text[:26] if "." in text else text).replace(tzinfo=None)
        except ValueError:
            raise ValueError(f"{where}: arrival must be a number or a date and time, got {value!r}") from None
    if not math.isfinite(found) or found < 0:
        raise ValueError(f"{where}: arrival must be a finite number, 0 or more, got {value!r}")
    return found / 1000 if name == "timestamp" else found


def _since_first(file: Path, rows: list[tuple[int, Any, int, int]]) -> Iterator[tuple[float, int, int]]:
    kinds = {type(row[1]) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"read_requests: {file}: arrival must be a number in every line or a date in every line")
    first = min(row[1] for row in rows)
    for _, arrival, prompt, output in rows:
        yield (arrival - first).total_seconds() if isinstance(arrival, datetime.datetime) else arrival, prompt, output
