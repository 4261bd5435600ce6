"""Attention alone, no generation: each method's `attend` against dense attention in float64; suite "attn".

`attn_gaussian`: independent keys. `attn_planted`: topics, kinds and needles. `attn_drift`: drifting topics and sinks.
`attn_testbed`: what the subject model computes, every layer, on a prompt it can read. `attn_dump`: the user's own.
`attn_deviation` is of the model alone, and the same under every method: how far keys and values of chunks computed
alone are from those in context, which is what reuse of chunks has to repair.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnlab.evals import wave_data
from attnlab.evals.capture import Layer, captured
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Method, Subject
from attnlab.evals.harness.task import Metric, Outcome, Task
from attnlab.evals.testbed import generators
from attnlab.evals.testbed.vocabulary import NAMES
from attnlab.testing import gaussian

from . import dumps
from .attention_metrics import METRICS, NEEDLE_RECALL, Item, budget, measured
from .source_text import held_out_tokens

QUERIES = 8  # the last tokens of a row, of which each asks
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64
PROMPTS = ("needles", "tracking", "documents")
CHUNK = 24  # tokens, as in the testbed's measurements of reuse


class AttentionTask(Task):
    """Data whose items are of `make(subject, length, index, rng)`."""

    def __init__(self, name: str, make: Callable[[Subject, int, int, np.random.Generator], Item]) -> None:
        self.name, self.make = name, make
        self.metrics = METRICS if name != "attn_planted" else (*METRICS, NEEDLE_RECALL)

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        if self.name == "attn_testbed":
            super().check(subject, lengths)
        if min(lengths) < 4 * QUERIES:
            raise UsageError(f"{self.name}: lengths must be at least {4 * QUERIES}, got {min(lengths)}")

    def check_method(self, subject: Subject, method: Method) -> None:
        """By a few keys: a method without attention of its own raises UsageError."""
        few = gaussian(1, QUERIES, 4 * QUERIES, HEADS, KV_HEADS, HEAD_DIM)
        method.attend(*_placed(subject, *few), HEAD_DIM**-0.5)

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
        return self.make(subject, length, index, rng)

    def run(self, batch: Batch, method: Method) -> list[Outcome]:
        return [_outcome(item, method) for item in batch.items]


def _outcome(item: Item, method: Method) -> Outcome:
    start = time.perf_counter()
    found = method.attend(item.q, item.k, item.v, item.scale)
    if item.q.is_cuda:
        torch.cuda.synchronize(item.q.device)
    seconds = time.perf_counter() - start
    return Outcome(measured(item, found), None, budget(item, found.read), seconds)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _placed(subject: Subject, *tensors: Tensor) -> list[Tensor]:
    """Where the model lives, in its dtype: the truth is that of the rounded numbers."""
    return [x.to(subject.model.device, subject.model.dtype) for x in tensors]


def _gaussian(subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
    made = gaussian(1, QUERIES, length, HEADS, KV_HEADS, HEAD_DIM, seed=_seed(rng))
    return Item(*_placed(subject, *made), HEAD_DIM**-0.5)


def _planted(subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
    """The last tokens ask, so a needle among them may come after its query: then it is none, and one must be left."""
    own, needles = torch.arange(length - QUERIES, length), torch.tensor([wave_data.NONE])
    while (needles == wave_data.NONE).all():
        row = wave_data.planted(length, QUERIES, _seed(rng))
        needles = torch.where(row.needles <= own, row.needles, wave_data.NONE)
    item = _item(subject, row)
    item.needles = needles[None].to(item.q.device)
    return item


def _drift(subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
    return _item(subject, wave_data.drifting(length, QUERIES, _seed(rng)))


def _item(subject: Subject, row: wave_data.Row) -> Item:
    return Item(*_placed(subject, row.q[None], row.k[None], row.v[None]), HEAD_DIM**-0.5)


def _captured(subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
    """Layers as rows of a batch; the queries are the question's tokens, or the last ones of a text."""
    if reads_testbed(subject):
        kind = PROMPTS[index % len(PROMPTS)]
        sample = generators.TASKS[kind](rng, length, asked=1)
        question = sample.questions[0].text
        ids, queries = [*sample.context, *question], len(question)
    else:
        kind, ids, queries = "text", held_out_tokens(subject, length, rng), QUERIES
    layers = captured(subject.model, _ids(subject, ids), queries)
    return Item(*_stacked(layers), layers[0].scale, facts={"prompt": kind, "layers": len(layers)})


def reads_testbed(subject: Subject) -> bool:
    """Whether the tokenizer's words are the testbed's."""
    return subject.tokenizer.convert_tokens_to_ids(list(NAMES)) == list(range(len(NAMES)))


def _ids(subject: Subject, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids], device=subject.model.device)


def _stacked(layers: list[Layer]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = {(tuple(x.q.shape), tuple(x.k.shape), tuple(x.v.shape), x.scale) for x in layers}
    if len(shapes) > 1 or layers[0].k.shape != layers[0].v.shape:
        raise UsageError("attn_testbed: the model's layers must have the same heads, head sizes and scale")
    q, k, v = (torch.cat(x) for x in zip(*((layer.q, layer.k, layer.v) for layer in layers), strict=True))
    return q, k, v


class Dumps(AttentionTask):
    """Rows of the user's own q, k, v; row `i` is sample `i`, whatever the seed."""

    def __init__(self, data_dir: Path | None) -> None:
        super().__init__("attn_dump", self._row)
        self.data_dir = data_dir
        self.rows: list[dumps.Row] = []

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        super().check(subject, lengths)
        self.rows = dumps.rows(self.data_dir)
        for row in self.rows:
            if row.keys < max(lengths):
                raise UsageError(f"attn_dump: {row.path} has {row.keys} keys, a length of {max(lengths)} needs as many")
            if row.queries > min(lengths):
                raise UsageError(f"attn_dump: {row.path} has {row.queries} queries, over the length {min(lengths)}")

    def available(self) -> int | None:
        return len(dumps.rows(self.data_dir))

    def _row(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Item:
        """The last `length` keys."""
        q, k, v, scale = dumps.read(self.rows[index])
        q, k, v = _placed(subject, q, k[:, -length:], v[:, -length:])
        return Item(q, k, v, scale, facts={"file": self.rows[index].path.name, "row": self.rows[index].row})


@dataclass
class Chunks:
    """An item of `attn_deviation`: a sequence; chunk `i` is `ids[ends[i]:ends[i + 1]]`, `ids[:ends[0]]` begins it."""

    ids: list[int]
    ends: list[int]


class Deviation(Task):
    """`kv_deviation`: the mean over layers, then each layer's.

    A layer's is the mean of keys' and values' relative deviations `|alone - in context| / |in context|`, each over the
    tokens and heads of all chunks but the first, which is the same alone. A chunk alone stands behind what begins the
    sequence, and is moved to its place, as it is when it comes from a store.
    """

    def __init__(self) -> None:
        self.name = "attn_deviation"
        self.metrics: tuple[Metric, ...] = (_deviation(""),)

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        super().check(subject, lengths)
        if min(lengths) < 4 * CHUNK:
            raise UsageError(f"{self.name}: lengths must be at least {4 * CHUNK}, got {min(lengths)}")
        layers = subject.model.config.get_text_config().num_hidden_layers
        self.metrics = (_deviation(""), *(_deviation(f"_layer{i}") for i in range(layers)))

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Chunks:
        if reads_testbed(subject):
            ids, begin = generators.documents(rng, length, asked=1).context, 2  # <bos> <documents>
        else:
            ids, begin = held_out_tokens(subject, length, rng), len(subject.start)
        return Chunks(ids, list(range(begin, len(ids) + 1, CHUNK)))

    def run(self, batch: Batch, method: Method) -> list[Outcome]:
        names = [metric.name for metric in self.metrics]
        outcomes = []
        for item in batch.items:
            start = time.perf_counter()
            found = kv_deviation(batch.subject, item)
            values = [float(np.mean(found)), *found]
            seconds = time.perf_counter() - start
            outcomes.append(Outcome(dict(zip(names, values, strict=True)), None, None, seconds))
        return outcomes


def _deviation(where: str) -> Metric:
    return Metric("kv_deviation" + where, percent=False, higher_is_better=False)


def kv_deviation(subject: Subject, item: Chunks) -> list[float]:
    """Of each layer, see `Deviation`."""
    starts, before = item.ends[1:-1], item.ends[0]
    tokens = [[*item.ids[:before], *item.ids[start : start + CHUNK]] for start in starts]
    places = torch.tensor(starts)[:, None] + torch.arange(-before, CHUNK)
    ids, places = (torch.as_tensor(x, device=subject.model.device) for x in (tokens, places))
    context = captured(subject.model, _ids(subject, item.ids), queries=1)
    alone = captured(subject.model, ids, queries=1, positions=places)
    rows = places[:, before:]
    return [
        (_relative(mine.k[:, before:], true.k[0, rows]) + _relative(mine.v[:, before:], true.v[0, rows])) / 2
        for mine, true in zip(alone, context, strict=True)
    ]


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (torch.linalg.vector_norm(a - b, dim=-1) / torch.linalg.vector_norm(b, dim=-1)).mean().item()


def make(name: str, data_dir: Path | None) -> Task:
    """A task of this module by its name."""
    makers = {
        "attn_gaussian": _gaussian,
        "attn_planted": _planted,
        "attn_drift": _drift,
        "attn_testbed": _captured,
    }
    if name == "attn_dump":
        return Dumps(data_dir)
    return Deviation() if name == "attn_deviation" else AttentionTask(name, makers[name])
