"""What a method is: a way to answer a batch of prompts with a model."""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.prefill import equal, prefill, row_of

UNKNOWN_SHARE = 0.1  # of a text's tokens; a text with more is not in the tokenizer's language


@dataclass
class Subject:
    """The model under test, a transformers causal language model in eval mode, and its tokenizer.

    Attributes:
        name: as given on the command line, `"testbed"` or a path.
        max_length: tokens a sequence may have.
        fingerprint: of weights, configuration and tokenizer: a run is resumed with the same one only.
    """

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    fingerprint: str

    @functools.cached_property
    def start(self) -> list[int]:
        """What begins a sequence: what the tokenizer puts before a text, else its first special token if it has one."""
        plain, whole = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        put = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        first = self.tokenizer.bos_token_id
        return whole[:put] or [first] * (first is not None and first != self.tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without special ones; UsageError when more than a tenth are unknown to the tokenizer."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        unknown = ids.count(self.tokenizer.unk_token_id)
        size = self.model.get_input_embeddings().weight.shape[0]
        start = repr(text[:40] + "..." * (len(text) > 40))
        if unknown > UNKNOWN_SHARE * len(ids):
            raise UsageError(
                f"model {self.name!r} does not know the words of the task's text {start}: {unknown} of {len(ids)} "
                "tokens are unknown to its tokenizer"
            )
        if ids and max(ids) >= size:
            raise UsageError(
                f"model {self.name!r} has {size} embeddings, but its tokenizer makes token {max(ids)} of the task's "
                f"text {start}: they are not of one model"
            )
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass
class Batch:
    """Items of one task and length, the same for all methods; prompts' tokens and their dense prefill are shared.

    Attributes:
        items: what `Task.build` made.
        context_ids, question_ids: of prompts, a list of ids per item; empty for tasks that do not generate. The
            sequence's first special token, where the tokenizer has one, begins the context.
        prefills: how many contexts were prefilled densely so far.
        seconds: that took, which no answer's time has in it.
        shared: what methods leave for one another.
    """

    subject: Subject
    items: list[Any]
    seed: int
    context_ids: list[list[int]] = field(default_factory=list)
    question_ids: list[list[int]] = field(default_factory=list)
    prefills: int = 0
    seconds: float = 0.0
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    _dense: list[Any] | None = field(default=None, repr=False)

    def dense(self) -> list[Any]:
        """A transformers cache per item, its context prefilled with dense attention: computed once, never changed.

        Take copies, by `prefill.joined`.
        """
        if self._dense is None:
            begun = time.perf_counter()
            found: list[Any] = [None] * len(self.items)
            for rows in equal(map(len, self.context_ids)):
                cache = prefill(self.subject.model, [self.context_ids[i] for i in rows])
                for place, i in enumerate(rows):
                    found[i] = row_of(cache, place)
            if self.subject.model.device.type == "cuda":
                torch.cuda.synchronize(self.subject.model.device)
            self._dense, self.prefills = found, self.prefills + len(found)
            self.seconds += time.perf_counter() - begun
        return self._dense


class Answer(NamedTuple):
    """What a method generated for one prompt."""

    tokens: list[int]
    text: str
    budget: float
    seconds: float


class Attended(NamedTuple):
    """What a method's attention gives for queries `[B, T, Hq, D]` at the end of the keys.

    Attributes:
        out: `[B, T, Hq, D]`.
        lse: `[B, T, Hq]`, or None where the method has none.
        read: bool `[B, T, Hq, Tk]`: the keys read exactly.
    """

    out: torch.Tensor
    lse: torch.Tensor | None
    read: torch.Tensor


class Method(ABC):
    """A method with its options. `spec` is the text it was given as on the command line, `options` what it means."""

    spec: str
    options: dict[str, Any]

    @abstractmethod
    def answer(self, batch: Batch) -> list[Answer]:
        """Greedy answers to the prompts of a batch."""

    def check(self, subject: Subject) -> None:  # noqa: B027
        """UsageError where the method cannot serve this model."""

    def check_item(self, task: str, item: Any) -> None:  # noqa: B027
        """UsageError where the method cannot answer items like this one of a task."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        """Attention alone, for the suite "attn": `q [B, T, Hq, D]` are the last tokens of `k, v [B, Tk, Hkv, D]`.

        UsageError where the method is none of attention (reuse of chunks).
        """
        raise NotImplementedError
