"""FusionRAG's online part: stitch cached chunks, recompute the tokens that matter, and generate."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder_models import dense, model_facts
from ..dispatch import check_bool, check_int
from .attention import BACKENDS
from .hook import run
from .loading import Filled, Source, fill
from .neighbours import embed
from .pool import Pool, PoolStep
from .preprocess import preprocess
from .report import Clock, FusionReport, RequestReport
from .request import Batch, Request, Text, Tokens, parse
from .selectors import SELECTORS, Selector
from .store import ChunkKey, ChunkStore


@dataclass(frozen=True)
class FusionAnswers:
    """What `FusionRAG.generate` returns, one item per question.

    Attributes:
        texts: the generated text, special tokens left out; None without a tokenizer.
        tokens: the generated ids, an end-of-sequence token included.
        report: see `FusionReport`.
        logits: float `[generated, vocabulary]` that each token was the best of; None unless asked for.
    """

    texts: tuple[str | None, ...]
    tokens: tuple[tuple[int, ...], ...]
    report: FusionReport
    logits: tuple[Tensor, ...] | None

    @property
    def text(self) -> str | None:
        """The text of a single question's answer."""
        if len(self.texts) != 1:
            raise ValueError(f"FusionAnswers.text: there are {len(self.texts)} answers, see texts")
        return self.texts[0]


class FusionRAG:
    """Retrieval-augmented generation over cached chunks (arXiv 2601.12904), on a transformers model.

    Keys and values of chunks come from the store, are moved to where each request has the chunk, and are recomputed
    for the few tokens that the question attends to most. A request's context is the concatenation of the token ids of
    its system prompt, its chunks and its question, each tokenised on its own, without special tokens but for the one
    that begins a sequence: it stands in front of the system prompt where the tokenizer puts it in front of text. Put
    separators and chat markup into the parts themselves. Parts may also be given as token ids, which are used as
    they are.

    The model is left as it was found. Its attention is replaced for the length of each forward, so calls of several
    threads take turns, and nobody else may run it meanwhile. Weights must not change while a `FusionRAG` lives, since
    it takes the model's fingerprint once. Autocast is off.

    Args:
        model: a transformers causal language model of Llama, Mistral, Qwen2, Qwen3 or SmolLM3 type.
        tokenizer: of the model; None if all parts are given as token ids.
        store: where chunks are looked up, and stored when they are missing; None computes them for every call.
        system: the prompt in front of all chunks; part of every chunk's key.
        backend: of `selective_attention`; `rotate_keys`, `token_importance` and `scatter_kv` run it too where they
            have it, else `"auto"`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        store: ChunkStore | None = None,
        *,
        system: Text = "",
        backend: str = "auto",
    ) -> None:
        fn = "FusionRAG"
        self.facts = model_facts(fn, model)
        if model.get_output_embeddings() is None:
            raise ValueError(f"{fn}: model must have a language model's head, got {type(model).__name__}")
        if store is not None and not isinstance(store, ChunkStore):
            raise TypeError(f"{fn}: store must be a ChunkStore or None, got {type(store).__name__}")
        if backend not in (names := ("auto", *BACKENDS)):
            raise ValueError(f"{fn}: backend must be one of {', '.join(map(repr, names))}, got {backend!r}")
        self.model, self.store, self.backend = model, store, backend
        self._tokens = Tokens(tokenizer, self.facts)
        self.system = self._tokens.system(fn, system)
        self._source = Source(model, self.facts, store, self.system)

    def preprocess(
        self,
        chunks: Sequence[Text],
        neighbours: int | Sequence[Sequence[int]] = 10,
        *,
        embeddings: Any = None,
        scratch: ChunkStore | None = None,
        progress: bool = True,
    ) -> list[ChunkKey]:
        """Store chunks as they are behind their nearest neighbours: `attnlab.fusionrag.preprocess` on this model.

        Without `embeddings`, texts are embedded by the sentence model of the extra `embed`. Raises what `preprocess`
        does, and ValueError without a store.
        """
        fn = "FusionRAG.preprocess"
        if self.store is None:
            raise ValueError(f"{fn}: there is no store to put chunks in: FusionRAG(model, tokenizer, store)")
        if not isinstance(chunks, Sequence) or isinstance(chunks, str):
            raise TypeError(f"{fn}: chunks must be a sequence of str or token ids, got {type(chunks).__name__}")
        ids = [self._tokens.ids(fn, f"chunks[{i}]", chunk) for i, chunk in enumerate(chunks)]
        if embeddings is None and neighbours and isinstance(neighbours, int):
            if any(not isinstance(chunk, str) for chunk in chunks):
                raise ValueError(f"{fn}: embeddings must be given for chunks of token ids")
            embeddings = embed([chunk for chunk in chunks if isinstance(chunk, str)])
        return preprocess(
            self.model,
            self.store,
            ids,
            neighbours,
            system=self.system,
            embeddings=embeddings,
            scratch=scratch,
            progress=progress,
        )

    def generate(
        self,
        questions: Text | Sequence[Text],
        chunks: Sequence[Any],
        *,
        rate: float = 0.15,
        selector: str | Selector = "fusionrag",
        max_new_tokens: int = 32,
        seed: int = 0,
        rotate_on_load: bool = False,
        return_logits: bool = False,
    ) -> FusionAnswers:
        """Answer questions over chunks, greedily.

        Args:
            questions: one, or a batch of them, each a str or token ids.
            chunks: str or token ids, shared by all questions; or a list of such lists, one per question. In the order
                in which the model shall read them.
            rate: share of the context tokens to recompute, in `[0, 1]`: `round(rate * context)`, at most those that
                are stale. The system prompt is exact, and so is a first chunk stored without neighbours. 0 reuses
                everything, 1 is a full prefill.
            selector: a name in `SELECTORS`, or a function like those.
            max_new_tokens: at most; generation ends with an end-of-sequence token, the model's or, where it names
                none, the tokenizer's.
            seed: of `selector="random"`.
            rotate_on_load: hold each chunk once and turn its keys inside attention, instead of a turned copy for each
                position a chunk is used at.
            return_logits: keep the logits of every step.

        Returns:
            texts, tokens and a report, see `FusionAnswers`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came: among others no chunks, an
                empty chunk or question, a context longer than the model's positions, a chunk whose stored keys are
                of another model, one the store lacks and has no room for.
        """
        fn = "FusionRAG.generate"
        score = _check(fn, rate, selector, max_new_tokens, seed, rotate_on_load, return_logits)
        clock = Clock(self.facts.device)
        batch = Batch.of(self.system, *parse(fn, self._tokens, questions, chunks), self.facts.device)
        self._check_length(fn, batch, max_new_tokens)
        budgets = [round(rate * length) for length in batch.lengths]
        with dense(self.model):
            pool = self._pool(batch, budgets, max_new_tokens - 1, rotate_on_load)
            filled = fill(batch, pool, self._source, clock)
            request = Request(self.model, batch, pool, seed)
            chosen, counts = choose(request, score, budgets, filled.exact)
            if any(counts):
                clock.lap("select")
            hidden = recompute(request, chosen)
            if any(counts):
                clock.lap("recompute")
            tokens, logits = self._decode(pool, hidden, max_new_tokens, return_logits, clock)
        report = _report(batch, pool, filled, counts, tokens, clock)
        texts = tuple(self._tokens.text(row) for row in tokens)
        return FusionAnswers(texts, tuple(map(tuple, tokens)), report, logits)

    def _pool(self, batch: Batch, budgets: list[int], later: int, turning: bool) -> Pool:
        """Room for a batch of which each row recomputes its budget, and appends its question and `later` tokens."""
        base = len(batch.system)
        shared = base + sum(len(c) * (1 if turning else len(starts)) for c, starts in batch.starts().items())
        asked = list(map(len, batch.questions))
        owned = sum(budgets) + sum(asked) + later * len(asked)
        width = base + max(map(sum, zip(batch.lengths, asked, strict=True))) + later
        return Pool(
            self.facts, self.model.dtype, shared + owned, len(asked), width, turning=turning, backend=self.backend
        )

    def _check_length(self, fn: str, batch: Batch, max_new_tokens: int) -> None:
        for row, (length, question) in enumerate(zip(batch.lengths, batch.questions, strict=True)):
            what = f"system prompt, chunks, question {row} and all new tokens but the last"
            self.facts.check_length(fn, what, len(batch.system) + length + len(question) + max_new_tokens - 1)

    def _decode(
        self, pool: Pool, hidden: Tensor, limit: int, keep: bool, clock: Clock
    ) -> tuple[list[list[int]], tuple[Tensor, ...] | None]:
        """Greedy tokens of each row, from the hidden states `[B, hidden]` of the last rows on, and their logits."""
        ends, head = self._ends(), self.model.get_output_embeddings()
        tokens: list[list[int]] = [[] for _ in hidden]
        kept: list[list[Tensor]] = [[] for _ in hidden]
        live = [True] * len(hidden)
        logits = head(hidden)
        for step in range(limit):
            best = logits.argmax(-1)
            for row, token in enumerate(best.tolist()):
                if live[row]:
                    tokens[row].append(token)
                    kept[row].extend([logits[row]] if keep else [])
                    live[row] = token not in ends
            if step == 0:
                clock.lap("first_token")
            if step == limit - 1 or not any(live):
                break
            slots = pool.table.extend([int(alive) for alive in live])
            positions = torch.where(slots < 0, -1, pool.table.lengths[:, None] - 1)
            logits = head(run(self.model, best[:, None], positions, PoolStep(pool, positions, slots))[:, 0])
        clock.lap("decode")
        return tokens, tuple(map(torch.stack, kept)) if keep else None

    def _ends(self) -> frozenset[int]:
        ends = getattr(self.model.generation_config or self.model.config, "eos_token_id", None)
        if ends is None:
            ends = getattr(self._tokens.tokenizer, "eos_token_id", None)
        if ends is None:
            return frozenset()
        return frozenset([ends] if isinstance(ends, int) else ends)


def choose(request: Request, score: Selector, budgets: list[int], exact: list[bool]) -> tuple[Tensor, list[int]]:
    """Positions `[B, n]` of the tokens to recompute, rising, -1 behind a row's last one, and how many each row has.

    Candidates are chunk tokens, but for those of an exact first chunk. The selector does not run when there is nothing
    to choose between.
    """
    batch = request.batch
    ends = batch.offsets.tolist()
    begins = [row[1] if true else row[0] for row, true in zip(ends, exact, strict=True)]
    stale = [row[-1] - begin for row, begin in zip(ends, begins, strict=True)]
    counts = [min(pair) for pair in zip(budgets, stale, strict=True)]
    device = batch.context.device
    width, most = batch.context.shape[1], max(counts)
    place = torch.arange(width, device=device)
    first, last, taken = (torch.tensor(x, device=device)[:, None] for x in (begins, [row[-1] for row in ends], counts))
    candidate = (place >= first) & (place < last)
    undecided = any(0 < count < all_ for count, all_ in zip(counts, stale, strict=True))
    scores = _scored(score(request), candidate) if undecided else torch.zeros(batch.context.shape, device=device)
    order = torch.where(candidate, scores, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :most]
    chosen = torch.where(place[:most] < taken, order, width).sort(1).values
    return torch.where(chosen < width, chosen, -1), counts


def _scored(scores: Any, candidate: Tensor) -> Tensor:
    """A selector's scores, -inf made finite: candidates come before what is none."""
    if not isinstance(scores, Tensor) or scores.shape != candidate.shape:
        came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"FusionRAG: selector must score every context token, {list(candidate.shape)}, got {came}")
    if bool((scores.isnan() & candidate).any()):
        raise ValueError("FusionRAG: selector must score the chunks' tokens by numbers, got NaN")
    return torch.nan_to_num(scores)


def recompute(request: Request, chosen: Tensor) -> Tensor:
    """Run the chosen tokens and the question, at their positions; hidden states `[B, hidden]` of the last tokens."""
    batch, pool = request.batch, request.pool
    ids = torch.cat([batch.context.gather(1, chosen.clamp(min=0)), batch.question], 1)
    positions = torch.cat([chosen, batch.question_positions], 1)
    slots = torch.cat([pool.own(chosen), request.slots], 1)
    states = run(request.model, ids, positions, PoolStep(pool, positions, slots))
    last = chosen.shape[1] + batch.question_lengths.long() - 1
    return states[torch.arange(len(last), device=last.device), last]


def _check(
    fn: str, rate: Any, selector: Any, max_new_tokens: Any, seed: Any, rotate_on_load: Any, return_logits: Any
) -> Selector:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"{fn}: rate must be a number in [0, 1], got {rate!r}")
    check_int(fn, "max_new_tokens", max_new_tokens, 1)
    check_int(fn, "seed", seed, 0)
    check_bool(fn, "rotate_on_load", rotate_on_load)
    check_bool(fn, "return_logits", return_logits)
    if callable(selector):
        return selector
    if not isinstance(selector, str) or selector not in SELECTORS:
        near = difflib.get_close_matches(str(selector), SELECTORS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{fn}: selector must be one of {', '.join(map(repr, SELECTORS))}, got {selector!r}{hint}")
    return SELECTORS[selector]


def _report(
    batch: Batch, pool: Pool, filled: Filled, counts: list[int], tokens: list[list[int]], clock: Clock
) -> FusionReport:
    requests = []
    for row, chunks in enumerate(batch.chunks):
        context, question = batch.lengths[row], len(batch.questions[row])
        computed = sum(len(chunk) for chunk in chunks if chunk in filled.computed)
        requests.append(
            RequestReport(
                system=len(batch.system),
                context=context,
                question=question,
                loaded=context - computed,
                computed=computed,
                exact=len(chunks[0]) if filled.exact[row] else 0,
                reused=context - counts[row],
                recomputed=counts[row],
                generated=len(tokens[row]),
                owned_slots=counts[row] + question + len(tokens[row]) - 1,
            )
        )
    return FusionReport(
        tuple(requests),
        **clock.seconds,
        loaded_bytes=filled.loaded_bytes,
        shared_slots=pool.shared,
        owned_slots=sum(r.owned_slots for r in requests),
    )
