"""Reuse of retrieved chunks: keys and values as each chunk was stored, some of its tokens computed anew."""

import itertools
import time
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Answer, Attended, Batch, Method, Subject
from attnlab.evals.harness.task import Prompt
from attnlab.fusionrag import ChunkStore, FusionRAG

Ids = tuple[int, ...]


class ChunkMethod(Method):
    """A method by the share of the chunks' tokens that it computes anew.

    What a prompt has in front of its chunks is a system prompt, and stands before each of them when it is stored. The
    store is a batch's, for all of its methods. The budget is the share of the chunks' tokens that were computed for the
    question; `seconds` are those of the question, and of what the store lacked.
    """

    rate = 0.0
    selector = "fusionrag"
    neighbours = 0

    def answer(self, batch: Batch) -> list[Answer]:
        # Who a chunk's neighbours are depends on the prompt: such chunks are nobody else's.
        rags: dict[Ids, FusionRAG] = {} if self.neighbours else batch.shared.setdefault("chunks", {})
        found = []
        for prompt, context, question in zip(batch.items, batch.context_ids, batch.question_ids, strict=True):
            start = time.perf_counter()
            self.check_item("the task", prompt)
            system, chunks = cut(batch.subject, prompt, context)
            if system not in rags:
                rags[system] = FusionRAG(batch.subject.model, store=ChunkStore(), system=system)
            seed = zlib.crc32(np.array([*context, *question], "<i8").tobytes(), batch.seed)
            self._fits(batch.subject, rags[system], len(context) + len(question) + prompt.max_new_tokens - 1)
            tokens, budget = self._ask(rags[system], chunks, question, prompt.max_new_tokens, seed)
            found.append(Answer(tokens, batch.subject.text(tokens), budget, time.perf_counter() - start))
        return found

    def check(self, subject: Subject) -> None:
        """By a few tokens."""
        if not subject.tokenizer.is_fast:
            raise UsageError(
                f"method {self.spec!r}: the tokenizer of {subject.name!r} does not tell where tokens stand"
            )
        try:
            self._ask(FusionRAG(subject.model, store=ChunkStore(), system=(0,)), [(0,) * 8, (1,) * 8], [0, 1], 1, 0)
        except (ValueError, TypeError) as e:
            raise UsageError(f"method {self.spec!r} cannot serve model {subject.name!r}: {e}") from None

    def check_item(self, task: str, item: Any) -> None:
        if not isinstance(item, Prompt) or not item.chunks:
            raise UsageError(f"method {self.spec!r} answers questions about retrieved chunks, {task} has none")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        raise UsageError(f"method {self.spec!r} has no attention of its own to measure")

    def _fits(self, subject: Subject, rag: FusionRAG, tokens: int) -> None:
        try:
            rag.facts.check_length(f"method {self.spec!r} on {subject.name!r}", "prompt and answer", tokens)
        except ValueError as e:
            raise UsageError(str(e)) from None

    def _ask(
        self, rag: FusionRAG, chunks: list[Ids], question: list[int], limit: int, seed: int
    ) -> tuple[list[int], float]:
        """The answer's tokens, its end of sequence left out, and the budget."""
        if self.neighbours:
            rag.store.clear()
            distinct = list(dict.fromkeys(chunks))
            rag.preprocess(distinct, alike(rag.model, distinct, self.neighbours), progress=False)
        found = rag.generate(question, chunks, rate=self.rate, selector=self.selector, max_new_tokens=limit, seed=seed)
        (report,), tokens = found.report.requests, list(found.tokens[0])
        ends = rag.model.generation_config.eos_token_id or []
        return tokens[:-1] if tokens[-1] in ends else tokens, report.recomputed / report.context


@dataclass
class Reuse(ChunkMethod):
    """Full reuse: each chunk's keys and values as it was alone behind the system prompt, moved to its place."""

    name: ClassVar[str] = "reuse"


@dataclass
class Fusion(ChunkMethod):
    """FusionRAG (arXiv 2601.12904): reuse, and a share `rate` of the chunks' tokens computed anew, the `selector`'s.

    `neighbours`: a chunk is stored as it is behind so many others of its prompt, those most like it.
    """

    name: ClassVar[str] = "fusionrag"
    rate: float = 0.15
    selector: Literal["fusionrag", "prophet", "kv_deviation", "first_k", "random", "oracle"] = "fusionrag"
    neighbours: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be in [0, 1], got {self.rate}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be 0 or more, got {self.neighbours}")


def cut(subject: Subject, prompt: Prompt, context: list[int]) -> tuple[Ids, list[Ids]]:
    """The tokens of a context before its chunks, and those of each chunk; together they are the context's.

    A chunk goes on until the next one begins. A token on a border belongs to the chunk behind it. ValueError where the
    context does not end with the chunks, in order.
    """
    begins: list[int] = []
    for chunk in reversed(prompt.chunks):
        begins.insert(0, prompt.context.rfind(chunk, 0, begins[0] if begins else len(prompt.context)))
        if begins[0] < 0:
            raise ValueError(f"a prompt's context must end with its chunks, in order: no {chunk[:40]!r}")
    found = subject.tokenizer(prompt.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in found["offset_mapping"]]
    start = len(context) - len(ends)  # tokens that begin a sequence
    places = [start + bisect_right(ends, begin) for begin in begins] + [len(context)]
    parts = [tuple(context[a:b]) for a, b in itertools.pairwise(places)]
    return tuple(context[: places[0]]), [part for part in parts if part]


def alike(model: Any, chunks: list[Ids], count: int) -> list[list[int]]:
    """Of each chunk the `count` others whose tokens' mean embedding points most in the direction of its own."""
    table = model.get_input_embeddings().weight
    means = torch.stack([table[list(chunk)].float().mean(0) for chunk in chunks])
    means = torch.nn.functional.normalize(means, dim=1)
    order = (means @ means.T).fill_diagonal_(-torch.inf).sort(dim=1, descending=True, stable=True).indices
    return order[:, : min(count, len(chunks) - 1)].tolist()
