"""Methods that change a model's attention: what they share, from a dense prefill to the answer and its budget."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import attnlab.hf
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Answer, Attended, Batch, Method, Subject
from attnlab.evals.harness.prefill import equal, joined, read

PROBE = 24  # tokens that `check` feeds


class Rows(NamedTuple):
    """Prompts of equal lengths, answered together."""

    ids: torch.Tensor  # [B, T], contexts and questions
    context: int  # tokens of each context
    limit: int  # tokens of an answer
    prefix: Any  # a dense cache of the contexts, this method's own; None: it prefills for itself

    @property
    def size(self) -> int:
        return self.ids.shape[1]


class AttentionMethod(Method):
    """A method by its attention implementation of transformers and its cache.

    Its budget is the share of the keys a full method reads that it read exactly, over all layers, heads and the tokens
    it was used for; means and extremes that a choice looks at are no keys.
    """

    implementation: str | None = None  # None: what the model was loaded with
    sparse_prefill = False  # contexts are read under the method; else it starts from a dense cache of them

    @abstractmethod
    def begin(self, subject: Subject, rows: Rows) -> Any:
        """A cache from which `generate` goes on with what is left of the prompts. Runs under the implementation."""

    @abstractmethod
    def budgets(self, subject: Subject, rows: Rows, cache: Any, lengths: Sequence[int]) -> list[float]:
        """Of each row, whose answer has so many tokens."""

    def prepare(self, model: Any) -> None:
        """What a model needs before it runs under the implementation."""

    def restore(self, model: Any) -> None:
        """Take back what `prepare` did."""

    def answer(self, batch: Batch) -> list[Answer]:
        prompts = [c + q for c, q in zip(batch.context_ids, batch.question_ids, strict=True)]
        limits = [item.max_new_tokens for item in batch.items]
        found: list[Any] = [None] * len(prompts)
        for group in equal(zip(map(len, batch.context_ids), map(len, batch.question_ids), limits, strict=True)):
            prefix = None if self.sparse_prefill else joined([batch.dense()[i] for i in group])
            ids = _tensor(batch.subject, [prompts[i] for i in group])
            rows = Rows(ids, len(batch.context_ids[group[0]]), limits[group[0]], prefix)
            for i, answer in zip(group, self._answer(batch.subject, rows), strict=True):
                found[i] = answer
        return found

    def check(self, subject: Subject) -> None:
        """By a few tokens."""
        first = subject.tokenizer.bos_token_id or 0
        ids = _tensor(subject, [[first] * PROBE])
        try:
            prefix = None
            if not self.sparse_prefill:
                from transformers import DynamicCache

                prefix = DynamicCache(config=subject.model.config)
                read(subject.model, ids[:, :-2], prefix)
            self._answer(subject, Rows(ids, PROBE - 2, 2, prefix))
        except (ValueError, TypeError, NotImplementedError) as e:
            raise UsageError(f"method {self.spec!r} cannot serve model {subject.name!r}: {e}") from None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        raise UsageError(f"method {self.spec!r} has no attention of its own to measure")

    @torch.no_grad()
    def _answer(self, subject: Subject, rows: Rows) -> list[Answer]:
        start = time.perf_counter()
        with self.active(subject.model):
            cache = self.begin(subject, rows)
            tokens = generate(subject, rows, cache)
        seconds = (time.perf_counter() - start) / len(tokens)
        budgets = self.budgets(subject, rows, cache, [len(t) for t in tokens])
        return [Answer(t, subject.text(t), b, seconds) for t, b in zip(tokens, budgets, strict=True)]

    @contextmanager
    def active(self, model: Any) -> Iterator[None]:
        """The model runs under the method's attention; what was there is put back."""
        attnlab.hf.register()
        before = model.config._attn_implementation
        try:
            self.prepare(model)
            if self.implementation:
                model.set_attn_implementation(self.implementation)
            yield
        finally:
            model.set_attn_implementation(before)
            self.restore(model)


def generate(subject: Subject, rows: Rows, cache: Any) -> list[list[int]]:
    """Greedy answers, up to the first end of sequence."""
    ends = subject.model.generation_config.eos_token_id or []
    out = subject.model.generate(
        rows.ids,
        attention_mask=torch.ones_like(rows.ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=rows.limit,
    )
    return [_until(row, ends) for row in out[:, rows.size :].tolist()]


def feed_question(subject: Subject, rows: Rows, cache: Any) -> None:
    """The questions, token by token but for the last, which `generate` feeds: each is a decode step of the method."""
    for i in range(rows.context, rows.size - 1):
        read(subject.model, rows.ids[:, i : i + 1], cache)


def steps(rows: Rows, answer: int) -> int:
    """Decode steps that belong to an answer of so many tokens: questions are fed token by token, an end ends it."""
    return rows.size - rows.context + min(answer, rows.limit - 1)


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    stop = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
    return tokens[:stop]


def _tensor(subject: Subject, rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, device=subject.model.get_input_embeddings().weight.device)
