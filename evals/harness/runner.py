"""A run: task by task, length by length, a batch of samples at a time, every method on the same batch."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from attnlab.evals.measure import environment
from attnlab.progress import Progress

from . import prompts, results
from .config import VERSION, Config
from .errors import RunError, UsageError
from .folder import FIELDS, Record, RunFolder, SampleFile
from .method import Batch, Method, Subject
from .task import Outcome, Prompt, Task

BATCH, TOKENS = 8, 65536  # samples of a batch; of long prompts fewer, so that their caches fit in memory


@dataclass(frozen=True)
class Plan:
    """What runs.

    Attributes:
        samples: per task and length; a task's data may have fewer.
        batch: samples at a time; None: 8, of long prompts fewer.
        skips: methods by their texts that are left out of a task, and why; empty before `checked`.
    """

    subject: Subject
    tasks: Sequence[Task]
    lengths: Sequence[int]
    methods: Sequence[Method]
    samples: int
    seed: int
    batch: int | None = None
    skips: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def count(self, task: Task) -> int:
        available = task.available()
        return self.samples if available is None else min(self.samples, available)

    def batches(self, task: Task, length: int) -> list[range]:
        n, size = self.count(task), self.batch or max(1, min(BATCH, TOKENS // length))
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def checked(self, *, skip: bool) -> "Plan":
        """UsageError for what cannot run, and nothing has run then.

        A method that cannot serve the model or a task is left out where `skip` is set, unless it is all there is.
        """
        _some("tasks", [task.name for task in self.tasks])
        _some("lengths", self.lengths)
        _some("methods", [method.spec for method in self.methods])
        for what, number, least in (("samples", self.samples, 1), ("batch", self.batch, 1), ("seed", self.seed, 0)):
            if number is not None and number < least:
                raise UsageError(f"{what} must be at least {least}, got {number}")
        for task in self.tasks:
            task.check(self.subject, self.lengths)
            if self.count(task) < 1:
                raise UsageError(f"{task.name}: its data has no sample")
        unfit = {method.spec: _reason(method.check, self.subject) for method in self.methods}
        skips = {task.name: self._skips(task, unfit) for task in self.tasks}
        reasons = [reason for of_task in skips.values() for reason in of_task.values()]
        if reasons and not (skip and all(len(of_task) < len(self.methods) for of_task in skips.values())):
            raise UsageError(reasons[0])
        return replace(self, skips={name: of_task for name, of_task in skips.items() if of_task})

    def _skips(self, task: Task, unfit: Mapping[str, str]) -> dict[str, str]:
        """Methods that cannot serve a task, or the model at all, and why."""
        [item] = prompts.build(task, self.subject, self.lengths[0], [0], self.seed).items
        found = {}
        for method in self.methods:
            reason = unfit[method.spec] or _reason(method.check_item, task.name, item)
            if reason := reason or _reason(task.check_method, self.subject, method):
                found[method.spec] = reason
        return found


def _reason(check: Callable[..., None], *arguments: Any) -> str:
    """Why a check says no; empty where it does not."""
    try:
        check(*arguments)
    except UsageError as error:
        return str(error)
    return ""


def _some(what: str, given: Sequence[str | int]) -> None:
    if not given or len(set(given)) < len(given):
        raise UsageError(f"{what} must be some that differ, got {', '.join(map(str, given)) or 'none'}")


@dataclass
class Spent:
    """What a session did.

    Attributes:
        prefills: contexts prefilled densely, each for all methods that want it.
        model_s: in the model; `wall_s` is all of the loop.
    """

    samples: int = 0
    prefills: int = 0
    wall_s: float = 0.0
    model_s: float = 0.0


@dataclass
class _Cell:
    """One task and length.

    Attributes:
        files: of samples, with their methods.
        counted: dense prefills that earlier sessions counted, by sample: done again, they are not counted again, so
            that a resumed run tells the number of one that was not interrupted.
    """

    task: Task
    length: int
    batches: list[range]
    files: list[tuple[Method, SampleFile]]
    counted: list[int]

    def __str__(self) -> str:
        return f"{self.task.name}, {self.length} tokens"

    def open(self, indices: range) -> list[tuple[Method, SampleFile]]:
        """Those that do not hold all of a batch."""
        return [(method, file) for method, file in self.files if file.done < indices.stop]

    def cost(self, indices: range) -> int:
        """Of a batch under one method, in tokens."""
        return len(indices) * self.length


def config(plan: Plan, suite: str, data_dir: Path | None) -> Config:
    """What the results depend on, for config.yaml."""
    model = plan.subject.model
    return {
        "schema_version": VERSION,
        "suite": suite,
        "model": plan.subject.name,
        "fingerprint": plan.subject.fingerprint,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data_dir": None if data_dir is None else str(data_dir),
        "seed": plan.seed,
        "samples": plan.samples,
        "lengths": list(plan.lengths),
        "tasks": [task.name for task in plan.tasks],
        "methods": {method.spec: method.options for method in plan.methods},
        "skips": {name: list(specs) for name, specs in plan.skips.items()},
    }


def run(plan: Plan, folder: RunFolder) -> Spent:
    """Run what the folder does not hold yet. RunError where that cannot go on: what was done is kept."""
    start, spent = time.perf_counter(), Spent()
    cells = [_cell(plan, folder, task, length) for task in plan.tasks for length in plan.lengths]
    cells = [cell for cell in cells if any(map(cell.open, cell.batches))]
    work = [(cell, indices) for cell in cells for indices in cell.batches]
    with Progress(sum(cell.cost(indices) * len(cell.open(indices)) for cell, indices in work)) as progress:
        for cell, indices in work:
            batch = prompts.build(cell.task, plan.subject, cell.length, indices, plan.seed)
            hashes = prompts.hashes(batch)
            _unchanged(cell, indices, hashes)
            for method, file in cell.open(indices):
                progress.step(f"{cell}, {method.spec}, samples from {indices.start}", cell.cost(indices))
                records = _answer(cell, method, batch, indices, hashes)
                spent.model_s += sum(record["seconds"] for record in records)
                new = records[file.done - indices.start :]
                folder.append(file, new)
                spent.samples += len(new)
            spent.prefills += batch.prefills
            spent.model_s += batch.seconds
    spent.wall_s = time.perf_counter() - start
    return spent


def finish(plan: Plan, folder: RunFolder, spent: Spent) -> None:
    """Write results.json, the table and the plots, and what the session took into env.json."""
    records = list(folder.records())
    metrics = {task.name: task.metrics for task in plan.tasks}
    prefills = sum(record["prefills"] for record in records)
    folder.write_json("results.json", results.document(records, metrics, prefills, list(folder.config["methods"])))
    with folder.writing(folder.path / "table.md"):
        results.write_reports(folder.path)
    if spent.samples or not (folder.path / "env.json").exists():
        session = {**asdict(spent), "batch": plan.batch}
        folder.write_json("env.json", environment(plan.subject.model.device) | session)


def _cell(plan: Plan, folder: RunFolder, task: Task, length: int) -> _Cell:
    methods = {method.spec: method for method in plan.methods}
    cells = ((spec, (task.name, length, spec)) for spec in folder.config["methods"])
    files = [(methods[spec], folder.files[cell]) for spec, cell in cells if cell in folder.files]
    counted = [sum(file.prefills[i] for _, file in files if i < file.done) for i in range(plan.count(task))]
    return _Cell(task, length, plan.batches(task, length), files, counted)


def _unchanged(cell: _Cell, indices: range, hashes: list[str]) -> None:
    """Samples of earlier sessions must have had the prompts that are built now."""
    for _, file in cell.files:
        for i, now in zip(indices, hashes):
            if i < file.done and file.prompts[i] != now:
                raise UsageError(f"{file.path}: sample {i} had another prompt (other data or code): use another --out")


def _answer(cell: _Cell, method: Method, batch: Batch, indices: range, hashes: list[str]) -> list[Record]:
    """A record per sample of a batch."""
    before = batch.prefills
    try:
        outcomes = cell.task.run(batch, method)
    except torch.OutOfMemoryError as error:
        what = f"{cell}, {method.spec}: out of memory with {len(indices)} samples at a time"
        raise RunError(f"{what}; --resume with a smaller --batch goes on") from error
    each, rest = divmod(batch.prefills - before, len(indices))
    records = []
    for place, (i, outcome) in enumerate(zip(indices, outcomes, strict=True)):
        done = each + (place < rest)
        again = min(done, cell.counted[i])
        cell.counted[i] -= again
        where = {"task": cell.task.name, "length": cell.length, "method": method.spec, "index": i}
        _finite(where, outcome)
        facts = _facts(cell, batch, place)
        record = where | {"prompt": hashes[place]} | facts | outcome._asdict() | {"prefills": done - again}
        records.append({field: record[field] for field in FIELDS})
    return records


def _facts(cell: _Cell, batch: Batch, place: int) -> Record:
    """What a record tells of an item."""
    item = batch.items[place]
    if not isinstance(item, Prompt):
        return {"question": "", "answers": [], "facts": getattr(item, "facts", {}), "tokens": cell.length}
    tokens = len(batch.context_ids[place]) + len(batch.question_ids[place])
    return {"question": item.question, "answers": list(item.answers), "facts": item.facts, "tokens": tokens}


def _finite(where: Record, outcome: Outcome) -> None:
    values = outcome.scores | ({} if outcome.budget is None else {"budget": outcome.budget})
    for name, value in values.items():
        if not math.isfinite(value):
            what = "{task}, length {length}, {method}, sample {index}".format(**where)
            raise RunError(f"{what}: {name} must be a finite number, got {value}")
