"""Loss by position on real text: dense attention, MoBA, and hybrids of both by layer; suite "text".

The text is Python's own library. A model whose tokenizer reads it is measured as it is, under each method's attention:
what a switch costs a model that was trained densely. For any other, such as the testbed with its own words, byte-level
Llamas are trained in the run, each with the attention it is measured with. That is the fair comparison, and the one of
the MoBA report: the gate chooses by mean keys, which only training with it makes tell blocks apart.

Training is seeded, and made anew when a run is resumed and samples of its method are missing: on the same machine and
as many threads it gives the same weights to the last bit, so that a run folder needs no weights in it.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnlab.evals import demo_model
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Method, Subject
from attnlab.evals.harness.task import Metric, Outcome, Task
from attnlab.evals.methods.full import Full
from attnlab.evals.methods.moba import MoBA

from .source_text import held_out_bytes, held_out_tokens, sources

STRETCHES = 16  # of equal positions; the last one's loss is the trailing loss


class Recipe(NamedTuple):
    """How the byte models are trained: 0.7M parameters, 1.2M bytes; some three minutes a method on two cores."""

    layers: int = 4
    heads: int = 2
    kv_heads: int = 2
    steps: int = 300
    bytes: int = 4096  # of a step, in sequences of the length that is measured
    rate: float = 2e-3
    warm_up: int = 30  # steps


@dataclass
class Text:
    """`length + 1` tokens: all but the last are read, all but the first predicted."""

    ids: list[int]


class TextLoss(Task):
    """Nats per token of held-out text (bytes, where models are trained here), over all positions of a stretch.

    `trailing_loss` is over the last sixteenth of the positions, `loss@START-END` over each sixteenth.
    """

    name = "text_loss"
    metrics: tuple[Metric, ...] = (Metric("trailing_loss", percent=False, higher_is_better=False),)

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()
        self.trained: dict[tuple[str, int, int], Any] = {}

    def check(self, subject: Subject, lengths: Sequence[int]) -> None:
        if min(lengths) < STRETCHES:
            raise UsageError(f"{self.name}: lengths must be at least {STRETCHES}, got {min(lengths)}")
        if reads_python(subject):
            super().check(subject, lengths)
        elif max(lengths) > self.recipe.bytes:
            raise UsageError(f"{self.name}: lengths must be at most {self.recipe.bytes}, got {max(lengths)}")
        names = dict.fromkeys(name for length in lengths for name in _stretches(length))
        self.metrics = (TextLoss.metrics[0], *(Metric(name, False, False, False) for name in names))

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Text:
        if reads_python(subject):
            return Text(held_out_tokens(subject, length + 1, rng))
        return Text(list(held_out_bytes(length + 1, rng)))

    def check_method(self, subject: Subject, method: Method) -> None:
        if not isinstance(method, Full | MoBA) or getattr(method, "phase", "both") == "decode":
            raise UsageError(f"{self.name} needs a method that reads whole texts, full or moba, got {method.spec!r}")

    def run(self, batch: Batch, method: Any) -> list[Outcome]:
        model = batch.subject.model if reads_python(batch.subject) else self._model(batch, method)
        return [self._outcome(model, method, item) for item in batch.items]

    def _outcome(self, model: Any, method: Full | MoBA, item: Text) -> Outcome:
        start = time.perf_counter()
        losses = by_position(model, method, item.ids).tolist()
        seconds = time.perf_counter() - start
        scores = {name: float(np.mean(losses[a:b])) for name, (a, b) in _stretches(len(losses)).items()}
        trailing = list(scores.values())[-1]
        budget = method.prefill_budget(model.config.get_text_config(), len(losses))
        return Outcome({self.metrics[0].name: trailing, **scores}, None, budget, seconds)

    def _model(self, batch: Batch, method: Full | MoBA) -> Any:
        length = len(batch.items[0].ids) - 1
        key = (method.spec, length, batch.seed)
        if key not in self.trained:
            self.trained[key] = train(self.recipe, method, length, batch.seed, batch.subject.model.device)
        return self.trained[key]


def reads_python(subject: Subject) -> bool:
    """Whether the model's tokenizer knows the words of Python sources."""
    try:
        subject.ids(sources().held_out[:4096].decode("utf-8", "replace"))
    except UsageError:
        return False
    return True


def by_position(model: Any, method: Full | MoBA, ids: list[int]) -> Tensor:
    """Loss of each token but the first, given those before it: float32 `[len(ids) - 1]`, nats."""
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad(), method.active(model):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="none")


def train(recipe: Recipe, method: Full | MoBA, length: int, seed: int, device: torch.device) -> Any:
    """A Llama over bytes, trained with a method's attention on sources that are not held out."""
    with torch.random.fork_rng(devices=[]):
        model = demo_model.build(recipe.layers, length, device, recipe.heads, recipe.kv_heads, seed)
    text = torch.frombuffer(bytearray(sources().training), dtype=torch.uint8)
    rng = np.random.default_rng((seed, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(recipe, step))
    places = torch.arange(length + 1)
    with method.active(model):
        for _ in range(recipe.steps):
            starts = rng.integers(len(text) - length, size=recipe.bytes // length)
            tokens = text[torch.from_numpy(starts)[:, None] + places].long().to(device)
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False)


def _rate(recipe: Recipe, step: int) -> float:
    """Of the peak: up in a line, then down to a tenth by a cosine."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def _stretches(length: int) -> dict[str, tuple[int, int]]:
    edges = [length * i // STRETCHES for i in range(STRETCHES + 1)]
    return {f"loss@{a}-{b}": (a, b) for a, b in itertools.pairwise(edges)}


def make(name: str, data_dir: Path | None) -> Task:
    """The module's one task."""
    return TextLoss()
