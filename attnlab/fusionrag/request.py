"""A batch of requests as token ids, and what a selector may ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder_models import ModelFacts
from .hook import Watch, run
from .pool import Pool, PoolStep, PrefillStep

Ids = tuple[int, ...]
Text = str | Sequence[int] | Tensor


class Tokens:
    """Turns text into ids, each part of a context on its own.

    A context is the concatenation of its parts' ids: a tokenizer that would merge letters across a border never sees
    the border. Special tokens are left out, but for the one that begins a sequence (`bos`), which stands in front of
    the system prompt if this tokenizer puts it in front of text. Ids are taken as they are, and get none.
    """

    def __init__(self, tokenizer: Any, facts: ModelFacts) -> None:
        self.tokenizer, self.facts = tokenizer, facts

    def ids(self, fn: str, name: str, text: Any) -> Ids:
        """At least one id."""
        found = self._ids(fn, name, text)
        if not found:
            raise ValueError(f"{fn}: {name} must have at least one token, got {text!r}")
        return found

    def system(self, fn: str, text: Any) -> Ids:
        """The ids in front of all chunks; there may be none."""
        found = self._ids(fn, "system", text)
        if isinstance(text, str) and self.tokenizer is not None:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            if bos is not None and bos in self.tokenizer("a")["input_ids"][:1]:
                return (bos, *found)
        return found

    def text(self, ids: Sequence[int]) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)

    def _ids(self, fn: str, name: str, text: Any) -> Ids:
        if not isinstance(text, str):
            return self.facts.check_ids(fn, name, text)
        if self.tokenizer is None and text:
            raise TypeError(f"{fn}: {name} must be token ids, as there is no tokenizer, got a str")
        return (
            self.facts.check_ids(fn, name, self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
        )


@dataclass(frozen=True)
class Batch:
    """Token ids of a batch. Tensors are on the model's device, rows padded with 0 at their ends.

    Attributes:
        system: of every row.
        chunks: of each row, in order.
        questions: of each row.
        context: int64 `[B, T]`, the system prompt and the chunks.
        offsets: int32 `[B, C + 1]`, where in `context` the chunks begin, and the last one's end; rows with fewer
            chunks repeat theirs.
        question: int64 `[B, Q]`.
        question_lengths: int32 `[B]`.
        question_positions: int64 `[B, Q]`, -1 where a row has fewer.
    """

    system: Ids
    chunks: tuple[tuple[Ids, ...], ...]
    questions: tuple[Ids, ...]
    context: Tensor
    offsets: Tensor
    question: Tensor
    question_lengths: Tensor
    question_positions: Tensor

    @classmethod
    def of(
        cls, system: Ids, chunks: Sequence[Sequence[Ids]], questions: Sequence[Ids], device: torch.device
    ) -> "Batch":
        contexts = [[*system, *(i for chunk in row for i in chunk)] for row in chunks]
        width = max(map(len, chunks)) + 1
        offsets = []
        for row in chunks:
            ends = [len(system)]
            for chunk in row:
                ends.append(ends[-1] + len(chunk))
            offsets.append(ends + ends[-1:] * (width - len(ends)))
        lengths = torch.tensor([len(q) for q in questions], device=device)
        question = _padded(questions, device)
        place = torch.arange(question.shape[1], device=device)
        first = torch.tensor([len(c) for c in contexts], device=device)[:, None]
        return cls(
            system,
            tuple(map(tuple, chunks)),
            tuple(questions),
            _padded(contexts, device),
            torch.tensor(offsets, dtype=torch.int32, device=device),
            question,
            lengths.int(),
            torch.where(place < lengths[:, None], first + place, -1),
        )

    @property
    def lengths(self) -> list[int]:
        """Context tokens of each row, the system prompt not counted."""
        return [sum(map(len, row)) for row in self.chunks]

    def starts(self) -> dict[Ids, list[int]]:
        """The distinct chunks, in order, and the distinct positions each begins at."""
        found: dict[Ids, list[int]] = {}
        for row in self.chunks:
            start = len(self.system)
            for chunk in row:
                known = found.setdefault(chunk, [])
                known.extend([start] if start not in known else [])
                start += len(chunk)
        return found


class Request:
    """A batch over its stale cache: what a selector reads to score context tokens.

    Attributes:
        batch: the token ids.
        pool: keys and values as stored, brought to their positions; the question has slots of its own.
        layers, backend, seed: the model's number of layers; the small kernels' backend; the caller's seed.
    """

    def __init__(self, model: Any, batch: Batch, pool: Pool, seed: int) -> None:
        self.model, self.batch, self.pool, self.seed = model, batch, pool, seed
        self.layers, self.backend = pool.k.shape[0], pool.small
        self.slots = pool.table.extend([len(q) for q in batch.questions])

    def ask(self, watch: Watch) -> None:
        """Run the question over the stale cache."""
        positions = self.batch.question_positions
        run(self.model, self.batch.question, positions, PoolStep(self.pool, positions, self.slots, watch))

    def prefill(self, watch: Watch, *, question: bool) -> None:
        """Run the whole context anew, with the question behind it or without, beside the cache."""
        batch = self.batch
        ids = batch.context
        if question:
            rows = zip(batch.chunks, batch.questions, strict=True)
            ids = _padded([[*batch.system, *(i for c in row for i in c), *q] for row, q in rows], ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        run(self.model, ids, positions, PrefillStep(watch))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


def parse(fn: str, tokens: Tokens, questions: Any, chunks: Any) -> tuple[list[list[Ids]], list[Ids]]:
    """The chunks and the question of each row, as ids."""
    asked = [questions] if _is_text(questions) else questions
    if not isinstance(asked, Sequence) or not asked:
        raise ValueError(f"{fn}: questions must be a question or a list of at least one, got {questions!r}")
    if isinstance(chunks, str) or not isinstance(chunks, Sequence) or not chunks:
        raise ValueError(f"{fn}: chunks must be a list of at least one chunk, got {chunks!r}")
    ids = [tokens.ids(fn, f"questions[{i}]", question) for i, question in enumerate(asked)]
    if not any(isinstance(x, Sequence) and len(x) and not _is_text(x) for x in chunks):
        row = [tokens.ids(fn, f"chunks[{i}]", chunk) for i, chunk in enumerate(chunks)]
        return [row] * len(ids), ids
    if len(chunks) != len(ids):
        raise ValueError(f"{fn}: chunks must be one list for all or one per question, {len(ids)}, got {len(chunks)}")
    rows = []
    for b, row in enumerate(chunks):
        if _is_text(row) or not len(row):
            raise ValueError(f"{fn}: chunks[{b}] must be a list of at least one chunk, got {row!r}")
        rows.append([tokens.ids(fn, f"chunks[{b}][{i}]", chunk) for i, chunk in enumerate(row)])
    return rows, ids


def _is_text(x: Any) -> bool:
    """Whether `x` is one piece of text: a str, or token ids."""
    return isinstance(x, str | Tensor) or (isinstance(x, Sequence) and len(x) > 0 and isinstance(x[0], int))
