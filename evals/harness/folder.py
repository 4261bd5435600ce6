"""A run's folder: `config.yaml`, `env.json`, `samples/*.jsonl`, `results.json`, `table.md`, `plots/`.

Samples are appended a batch at a time, in order; all else is written whole or not at all.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import config as configuration
from .config import Config
from .errors import RunError, UsageError

CONFIG, LOCK, PART = "config.yaml", ".lock", ".part"
NAMES = (CONFIG, "env.json", "samples", "results.json", "table.md", "plots", "lm-eval", "kvpress")
FIELDS = (
    "task",
    "length",
    "method",
    "index",
    "prompt",
    "question",
    "answers",
    "facts",
    "output",
    "scores",
    "budget",
    "tokens",
    "prefills",
    "seconds",
)
Record = dict[str, Any]


def sample_name(task: str, length: int, method: str) -> str:
    """Of the file: what one reads of the method's text, and a hash that tells two apart which read alike."""
    readable = re.sub(r"[^a-zA-Z0-9.]+", "-", method)[:48].strip("-")
    return f"{task}-{length}-{readable}-{hashlib.sha256(method.encode()).hexdigest()[:8]}.jsonl"


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    scratch = path.with_name(path.name + PART)
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


class SampleFile:
    """Samples of one task, length and method: line `i` is sample `i`.

    Attributes:
        prompts, prefills: of the samples it holds.
    """

    def __init__(self, path: Path, cell: Mapping[str, Any], most: int) -> None:
        """Read what is there; a last line that was torn is dropped. UsageError where a line is none of this file's."""
        self.path, self.prompts, self.prefills = path, [], []
        for record in _lines(path, cell, most, mend=True):
            self.prompts.append(record["prompt"])
            self.prefills.append(record["prefills"])

    @property
    def done(self) -> int:
        return len(self.prompts)

    def append(self, records: Iterable[Record]) -> None:
        """OSError leaves the file as it was."""
        records = list(records)
        data = memoryview("".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode())
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            try:
                while data:
                    data = data[os.write(fd, data) :]
            except OSError:
                with contextlib.suppress(OSError):  # what stays is a torn line, which the next session cuts off
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        self.prompts += [r["prompt"] for r in records]
        self.prefills += [r["prefills"] for r in records]


class RunFolder:
    """Held by this process alone while it is open; a context manager.

    Attributes:
        config: with the methods of earlier sessions.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool) -> None:
        """UsageError where the folder is another run's, half written or in use; RunError where it cannot be written."""
        self.path, self.files, self._lock = path, {}, None
        look(path, resume=resume)
        with self.writing(path):
            (path / "samples").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            self._begin(config, resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Config, resume: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path} is in use by another run") from None
        look(self.path, resume=resume)
        held = read_config(self.path) if (self.path / CONFIG).exists() else None
        self.config = config if held is None else configuration.resumed(held, config, str(self.path))
        cells = {sample_name(*cell.values()): cell for cell in _cells(self.config)}
        for found in sorted(p.name for p in (self.path / "samples").iterdir() if not p.name.startswith(".")):
            if found not in cells:
                raise UsageError(f"{self.path}/samples/{found} is no file of this run")
        for name, cell in cells.items():
            file = self.path / "samples" / name
            with self.writing(file):
                self.files[tuple(cell.values())] = SampleFile(file, cell, config["samples"])
        if self.config != held:
            self.write(CONFIG, configuration.dumps(self.config))

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def kept(self) -> int:
        """How many samples the files hold."""
        return sum(file.done for file in self.files.values())

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """An OSError (a full disk, a quota, a folder that is read-only) becomes a RunError that says what was kept."""
        try:
            yield
        except OSError as error:
            kept = f"{self.kept} samples are kept, --resume goes on" if self.kept else "no sample is kept"
            raise RunError(f"cannot write {error.filename or path}: {error.strerror or error}; {kept}") from error

    def append(self, file: SampleFile, records: Iterable[Record]) -> None:
        with self.writing(file.path):
            file.append(records)

    def write(self, name: str, text: str) -> None:
        with self.writing(self.path / name):
            write_whole(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def records(self) -> Iterator[Record]:
        return records(self.path, self.config)


def look(path: Path, *, resume: bool) -> None:
    """UsageError where a run can neither begin in a folder nor go on there."""
    try:
        found = [p.name for p in path.iterdir() if p.name != LOCK]
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise UsageError(f"--out must be a folder, {path} is none: {error.strerror}") from None
    if CONFIG in found:
        if not resume:
            raise UsageError(f"{path} has a run already: --resume goes on with it, another --out begins a new one")
        if foreign := [name for name in found if name.removesuffix(PART) not in NAMES and not name.startswith(".")]:
            raise UsageError(f"{path}/{min(foreign)} is no file of a run")
    elif set(found) - {"samples", CONFIG + PART} or list(path.glob("samples/*")):
        raise UsageError(f"{path} holds files but no {CONFIG}: it is no run's folder, or a broken one")


def read_config(path: Path) -> Config:
    """Of a run's folder; UsageError, one line, where there is none or it is broken."""
    try:
        return configuration.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is no run's folder: it has no {CONFIG}") from None
    except OSError as error:
        raise UsageError(f"{path}/{CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}/{CONFIG} is broken: {error}") from None


def read(path: Path) -> tuple[Config, Iterator[Record]]:
    """Configuration and samples of a run, in the order task, length, method, index; it may be unfinished."""
    config = read_config(path)
    return config, records(path, config)


def records(path: Path, config: Config) -> Iterator[Record]:
    for cell in _cells(config):
        yield from _lines(path / "samples" / sample_name(*cell.values()), cell, config["samples"])


def _cells(config: Config) -> list[dict[str, Any]]:
    return [
        dict(task=task, length=length, method=method)
        for task in config["tasks"]
        for length in config["lengths"]
        for method in config["methods"]
        if method not in config["skips"].get(task, ())
    ]


def _lines(path: Path, cell: Mapping[str, Any], most: int, *, mend: bool = False) -> Iterator[Record]:
    """Whole lines of a file of samples, none where there is no file; `mend` cuts a torn last one off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        os.truncate(path, whole)
    for i, line in enumerate(data[:whole].splitlines()):
        try:
            record = json.loads(line)
            fits = tuple(record) == FIELDS and record["index"] == i < most
        except (ValueError, TypeError):
            fits = False
        if not fits or any(record[key] != value for key, value in cell.items()):
            raise UsageError(f"{path}: line {i + 1} is no sample {i} of this run: move the file away and --resume")
        yield record
