"""Decoding with attention on devices of its own: the leader."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..decoder_models import dense
from ..dispatch import check_int, check_ints
from .attention_worker import AttentionWorker
from .group import Group, WorkerError
from .model_worker import ModelWorker, Replica, Sample
from .plan import SplitPlan
from .requests import Admission, Request, Requests, Room
from .stats import DecoderStats

FN = "DisaggregatedDecoder"


class DisaggregatedDecoder:
    """Generates with a transformers model whose attention runs on the attention workers of a group.

    `R` replicas of the model and `R + 1` batches take turns: while attention of one batch is under way, the replicas
    run slices of the others. Requests join and leave between steps. A request starts, in the order of `submit`, as
    soon as the workers have room for all tokens that it may come to have.

    Nobody else may run the model during a step, see `decoder_models.dense`.

    Args:
        group: of all ranks; this is rank 0. Ranks below `replicas` run `ModelWorker(...).serve()`, the others
            `AttentionWorker(...).serve()`.
        model: a transformers causal language model of Llama, Mistral, Qwen2, Qwen3 or SmolLM3 type.
        eos: ids that end a request, an int or ints. None: those of the model's generation config.
        capacity: tokens that each attention worker may hold, in whole pages; None: what the workers say themselves.
        sample: maps logits `[n, vocabulary]` to the next ids int64 `[n]`; None takes the best. Replicas need it too.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came: a model that `Slices` refuses, a
            plan with more head shards than KV heads, replicas of another model.
        WorkerError: from any method that talks to the others, when one is gone. Its `requests` are all that were under
            way, with every token made so far; a new decoder takes them up by `submit(r.tokens, r.remaining)`.
    """

    def __init__(
        self,
        group: Group,
        model: Any,
        *,
        eos: int | Sequence[int] | None = None,
        capacity: int | None = None,
        sample: Sample | None = None,
    ) -> None:
        if group.rank != 0:
            raise ValueError(f"{FN}: group must be joined as rank 0, got {group.rank}")
        if capacity is not None:
            check_int(FN, "capacity", capacity, 1)
        if sample is not None and not callable(sample):
            raise TypeError(f"{FN}: sample must be callable or None, got {type(sample).__name__}")
        self.group, self.model = group, model
        self._replica = Replica(FN, group, model, sample)
        self._facts = self._replica.cut.facts
        self._ends = _ends(self._facts, model, eos)
        self._failed: BaseException | None = None
        self._closed = False
        self._tokens = self._decoded = 0
        self._seconds = 0.0
        group.command({"op": "model", **self._replica.description})
        rooms = self._rooms(capacity, sample is not None)
        self._requests = Requests(group.plan, rooms, len(group.models) + 1)

    def submit(self, prompt: Sequence[int] | Tensor, max_new_tokens: int) -> int:
        """Queue a prompt of at least one token id. Returns the request's id.

        Raises ValueError or TypeError on ids that are none of the vocabulary's, a sequence longer than the model can
        take, and one that the attention workers could not hold even if it were alone.
        """
        fn = f"{FN}.submit"
        self._check_open(fn)
        check_int(fn, "max_new_tokens", max_new_tokens, 1)
        ids = self._facts.check_ids(fn, "prompt", prompt)
        if not ids:
            raise ValueError(f"{fn}: prompt must have at least one token, got {prompt!r}")
        self._facts.check_length(fn, "prompt and all new tokens but the last", len(ids) + max_new_tokens - 1)
        return self._requests.submit(fn, ids, max_new_tokens)

    def remove(self, id: int) -> None:
        """Cancel a request, waiting or running. ValueError when there is none of this id."""
        self._check_open(f"{FN}.remove")
        self._requests.remove(f"{FN}.remove", id)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests under way: running ones, then those that wait for room."""
        return self._requests.snapshot()

    def step(self) -> list[tuple[int, int]]:
        """One token of every running request, and the first of each that starts now, as `(id, token)`."""
        self._check_open(f"{FN}.step")
        begun = time.monotonic()
        with self._watched(), dense(self.model):
            found = self._round(self._requests.batches()) if self._requests.running else []
            if self._requests.any_ended and (self._requests.fits_next() or not self._requests.running):
                self._round([[]] * (len(self.group.models) + 1))  # the room is free once the workers know
            found += self._start(self._requests.admit())
        self._seconds += time.monotonic() - begun
        return found

    def generate(self, prompts: Iterable[Sequence[int] | Tensor], max_new_tokens: int) -> list[list[int]]:
        """The tokens generated for each prompt, an end-of-sequence token included.

        Raises what `submit` and `step` do, and ValueError while there are other requests.
        """
        self._check_open(f"{FN}.generate")
        if self.requests:
            raise ValueError(f"{FN}.generate: there must be no other requests, got {[r.id for r in self.requests]}")
        found: dict[int, list[int]] = {}
        try:
            for prompt in prompts:
                found[self.submit(prompt, max_new_tokens)] = []
        except (ValueError, TypeError):
            for id in found:
                self.remove(id)
            raise
        while self.requests:
            for id, token in self.step():
                found[id].append(token)
        return list(found.values())

    def stats(self) -> DecoderStats:
        """What all ranks have done so far. Asks them, so between steps only."""
        self._check_open(f"{FN}.stats")
        with self._watched():
            self.group.command({"op": "stats"})
            reports = [self.group.report(), *self.group.replies()]
        return DecoderStats.of(reports, len(self.group.models), self._tokens, self._decoded, self._seconds)

    def close(self) -> None:
        """Let the others' `serve` return. Safe to repeat, and after a WorkerError."""
        if not self._closed and self._failed is None:
            self.group.command({"op": "close"})
        self._closed = True

    def __enter__(self) -> "DisaggregatedDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """What breaks off in here leaves the ranks out of step: nothing goes on after it."""
        try:
            yield
        except BaseException as e:
            self._failed = e
            if isinstance(e, WorkerError):
                e.requests = self.requests
            raise

    def _check_open(self, fn: str) -> None:
        if isinstance(self._failed, WorkerError):
            raise self._failed
        if self._failed is not None:
            raise RuntimeError(f"{fn}: a step was broken off: {self._failed!r}") from self._failed
        if self._closed:
            raise RuntimeError(f"{fn}: the decoder is closed")

    def _rooms(self, capacity: int | None, sampled: bool) -> list[Room]:
        """Of each attention worker; and a look at whether the replicas run this model."""
        # A replica may be loading its model for as long as that takes.
        replies = self.group.replies(limit=False)
        ours = self._replica.description | {"sampled": sampled}
        for rank, reply in enumerate(replies[: len(self.group.models) - 1], 1):
            if wrong := [name for name, value in ours.items() if reply[name] != value]:
                name = wrong[0]
                raise ValueError(
                    f"{FN}: replica {rank} must run the leader's model, got {name} {reply[name]!r} for {ours[name]!r}"
                )
        rooms = []
        for reply in replies[len(self.group.models) - 1 :]:
            limits = [n for n in (capacity, reply["capacity"]) if n is not None]
            rooms.append(Room(reply["page_size"], min(limits, default=None)))
        return rooms

    def _round(self, batches: list[list[int]]) -> list[tuple[int, int]]:
        tokens = [[self._requests.last_token(id) for id in ids] for ids in batches]
        message = {"op": "round", "drop": self._requests.ended(), "batches": batches, "tokens": tokens}
        self.group.command(message)
        found = self._replica.round(message)
        for j, ids in enumerate(batches):
            if ids and j not in found:
                source = self._replica.ends_at(j)
                found[j] = self.group.link.receive((len(ids),), torch.int64, source, "token").wait()
        new = [(id, token) for j, ids in enumerate(batches) if ids for id, token in zip(ids, found[j].tolist())]
        self._decoded += len(new)
        self._take(new)
        return new

    def _start(self, admitted: list[Admission]) -> list[tuple[int, int]]:
        """Run prompts, spread over the replicas by their lengths."""
        load = [0] * len(self.group.models)
        mine, theirs = [], []
        for id, tokens, shard in admitted:
            replica = load.index(min(load))
            load[replica] += len(tokens)
            message = {"op": "prefill", "id": id, "length": len(tokens), "replica": replica, "shard": shard}
            self.group.command(message)
            self._replica.placement.admit(id, len(tokens), shard)
            ids = torch.tensor(tokens, device=self._facts.device)
            if replica == 0:
                mine.append((message, ids))
            else:
                self.group.link.send(ids, replica, "token")
                theirs.append((id, self.group.link.receive((1,), torch.int64, replica, "token")))
        first = {message["id"]: self._replica.prefill(message, ids) for message, ids in mine}
        first |= {id: incoming.wait() for id, incoming in theirs}
        found = [(admission.id, int(first[admission.id])) for admission in admitted]
        self._take(found)
        return found

    def _take(self, found: list[tuple[int, int]]) -> None:
        self._tokens += len(found)
        for id, token in found:
            self._requests.take(id, token, self._ends)


def run(
    model: Callable[[], Any],
    plan: SplitPlan,
    body: Callable[[DisaggregatedDecoder], Any],
    *,
    replicas: int = 1,
    timeout: float = 10.0,
    device: torch.device | str | None = None,
    trace: bool = False,
    eos: int | Sequence[int] | None = None,
    capacity: int | None = None,
    sample: Sample | None = None,
    page_size: int = 64,
    backend: str = "auto",
) -> Any:
    """The same call on every rank of a torchrun: rank 0 runs `body(decoder)`, the others serve it.

    Args:
        model: makes the model; called on ranks below `replicas` only.
        plan, replicas, timeout, device, trace: see `Group`.
        body: what to do with the decoder, on rank 0.
        eos, capacity, sample: see `DisaggregatedDecoder`.
        page_size, backend: see `AttentionWorker`.

    Returns:
        What `body` returns, on rank 0; None on the others.
    """
    with Group(plan, replicas=replicas, timeout=timeout, device=device, trace=trace) as group:
        if group.role == "attention":
            AttentionWorker(group, page_size=page_size, capacity=capacity, backend=backend).serve()
        elif group.rank:
            ModelWorker(group, model(), sample=sample).serve()
        else:
            with DisaggregatedDecoder(group, model(), eos=eos, capacity=capacity, sample=sample) as decoder:
                return body(decoder)
    return None


def _ends(facts: Any, model: Any, eos: Any) -> frozenset[int]:
    if eos is None:
        eos = getattr(getattr(model, "generation_config", None) or model.config, "eos_token_id", None)
        eos = () if eos is None else eos
    if isinstance(eos, int) and not isinstance(eos, bool):
        eos = [eos]
    return frozenset(check_ints(FN, "eos", eos))
