"""The offline step: each chunk's keys and values, computed with its neighbours before it, and stored once."""

import contextlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab.dispatch import check_bool, check_int, check_ints
from attnlab.progress import Progress

from ..decoder_models import ModelFacts, model_facts
from .models import KV, chunk_kv, run_behind, system_kv
from .neighbours import matrix, search
from .rotate import rotate_keys
from .store import ChunkKey, ChunkKV, ChunkStore, fingerprint


def preprocess(
    model: Any,
    store: ChunkStore,
    chunks: Sequence[Sequence[int] | Tensor],
    neighbours: int | Sequence[Sequence[int]] = 10,
    *,
    system: Sequence[int] | Tensor = (),
    embeddings: Any = None,
    scratch: ChunkStore | None = None,
    progress: bool = True,
) -> list[ChunkKey]:
    """Compute and store the keys and values of `chunks` (arXiv 2601.12904, offline stage).

    A chunk is run behind the system prompt and its neighbours, whose own keys and values were computed behind the
    prompt alone and moved to their places; then its keys are moved back to right behind the prompt. Chunks of the same
    tokens are one chunk.

    What the store holds with the same neighbours is not computed again, so a run that was cut short goes on where it
    stopped, and on the same machine stores to the last bit what it would have. A chunk that is a neighbour is stored at
    once as it is behind the prompt alone, and replaced when its own turn comes. Where others still wait for it,
    `scratch` keeps the first form; what `scratch` lost, or a new run's lacks, is computed again.

    Args:
        model: a transformers model of a type in `MODELS`. Its mode and attention implementation are as before
            afterwards; sparse ones of this library give way to dense attention meanwhile.
        store: where to.
        chunks: token ids of each, ints or an integer tensor `[T]`.
        neighbours: how many of the other chunks, the most alike by `embeddings`, fewer where there are not as many;
            0: none. Or a list for each chunk, of indices into `chunks`. They stand in this order, the nearest or first
            right behind the prompt.
        system: token ids of the system prompt.
        embeddings: `[N, E]` Tensor or array for each chunk, needed where `neighbours` is a number; see `nearest` and
            `embed`.
        scratch: default: 4 GiB of memory. With a folder of its own it outlives the run, and can outgrow memory.
        progress: on stderr: a bar on a terminal, a line now and then elsewhere.

    Returns:
        The key of each chunk, in order.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came: token ids out of range, an empty
            chunk, one that with its neighbours is over the model's context or window, neighbours that are no others.
        ModuleNotFoundError: neighbours by embeddings without faiss.
    """
    fn = "preprocess"
    facts = model_facts(fn, model)
    check_bool(fn, "progress", progress)
    for name, value in (("store", store), ("scratch", store if scratch is None else scratch)):
        if not isinstance(value, ChunkStore):
            raise TypeError(f"{fn}: {name} must be a ChunkStore, got {type(value).__name__}")
    if scratch is not None and _one_place(store, scratch):
        raise ValueError(f"{fn}: scratch must be another store than store")
    prompt = facts.check_ids(fn, "system", system)
    tokens = _check_chunks(fn, facts, chunks)
    seen: dict[tuple[int, ...], int] = {}
    for i, ids in enumerate(tokens):
        seen.setdefault(ids, i)
    distinct, first = list(seen), list(seen.values())
    place = {ids: i for i, ids in enumerate(distinct)}
    before = _neighbours(fn, neighbours, embeddings, [place[ids] for ids in tokens], first)
    for i, ids in enumerate(distinct):
        total = len(prompt) + sum(len(distinct[j]) for j in before[i]) + len(ids)
        facts.check_length(fn, f"chunks[{first[i]}] behind the system prompt and {len(before[i])} neighbours", total)
    of = fingerprint(model)
    keys = [ChunkKey.of(ids, model=of, rope=facts.rope, system=prompt) for ids in distinct]
    run = _Run(model, facts, store, ChunkStore() if scratch is None else scratch, prompt, distinct, keys, before)
    run.all(progress)
    if lost := sum(key not in store for key in keys):
        warnings.warn(f"{fn}: store's budget is too small: it dropped {lost} of {len(keys)} chunks", stacklevel=2)
    return [keys[place[ids]] for ids in tokens]


class _Run:
    """Distinct chunks: their token `ids`, `keys`, and which others stand `before` each."""

    def __init__(
        self,
        model: Any,
        facts: ModelFacts,
        store: ChunkStore,
        scratch: ChunkStore,
        prompt: tuple[int, ...],
        ids: list[tuple[int, ...]],
        keys: list[ChunkKey],
        before: list[list[int]],
    ) -> None:
        self.model, self.facts, self.store, self.scratch = model, facts, store, scratch
        self.prompt, self.ids, self.keys, self.before = prompt, ids, keys, before
        self.digests = [tuple(keys[j].digest for j in others) for others in before]
        held = [store.neighbours(key) for key in keys]
        todo = [i for i, digests in enumerate(self.digests) if held[i] != digests]
        self.waiting = Counter(j for i in todo for j in before[i])
        self.plain = [i for i, stored in enumerate(held) if stored is None and (self.waiting[i] or not before[i])]
        self.rest = [i for i in todo if before[i] or held[i] is not None]

    def all(self, progress: bool) -> None:
        for i, key in enumerate(self.keys):
            if not self.waiting[i]:  # of a run that was cut short
                self.scratch.remove(key)
        if not self.plain and not self.rest:
            return
        self.system = system_kv(self.model, self.facts, self.prompt)
        bar = Progress(len(self.plain) + len(self.rest)) if progress else None
        steps = [(i, self.store_plain, "alone") for i in self.plain]
        steps += [(i, self.store_final, f"behind {len(self.before[i])} neighbours") for i in self.rest]
        for i, step, how in steps:
            if bar is not None:
                bar.step(f"chunk {i + 1} of {len(self.keys)} {how}")
            step(i)
        if bar is not None:
            bar.close()

    def store_plain(self, i: int) -> None:
        self.store.put(ChunkKV(self.keys[i], *chunk_kv(self.model, self.facts, self.system, self.ids[i])))

    def store_final(self, i: int) -> None:
        if self.waiting[i]:
            self.keep(i, self.plain_of(i))
        kv = self.behind_neighbours(i) if self.before[i] else self.plain_of(i)
        self.store.put(ChunkKV(self.keys[i], *kv, self.digests[i]))
        for j in self.before[i]:
            self.waiting[j] -= 1
            if not self.waiting[j]:
                self.scratch.remove(self.keys[j])

    def plain_of(self, i: int) -> KV:
        """The chunk behind the prompt alone."""
        for store in (self.scratch, self.store):
            with contextlib.suppress(ValueError):  # a damaged file is as good as none
                held = store.get(self.keys[i])
                if held is not None and not held.neighbours:
                    return KV(held.k.to(self.facts.device), held.v.to(self.facts.device))
        kv = chunk_kv(self.model, self.facts, self.system, self.ids[i])
        if self.waiting[i]:
            self.keep(i, kv)
        return kv

    def keep(self, i: int, kv: KV) -> None:
        with contextlib.suppress(ValueError):  # over the budget: it is computed again
            self.scratch.put(ChunkKV(self.keys[i], *kv))

    def behind_neighbours(self, i: int) -> KV:
        base = len(self.prompt)
        past, at = [self.system], base
        for j in self.before[i]:
            k, v = self.plain_of(j)
            past.append(KV(moved(k, base, at, self.facts), v))
            at += len(self.ids[j])
        k, v = run_behind(self.model, past, self.ids[i])
        return KV(moved(k, at, base, self.facts), v)


def moved(k: Tensor, old: int, new: int, facts: ModelFacts) -> Tensor:
    """Keys `[layers, T, Hkv, D]` of positions `old, old + 1, ...` for `new, new + 1, ...`."""
    if old == new:
        return k
    places = torch.arange(k.shape[1], device=k.device)
    out = k.clone()
    out[facts.turned] = rotate_keys(k[facts.turned], (places + old, places + new), facts.rope)
    return out


def _one_place(a: ChunkStore, b: ChunkStore) -> bool:
    """Whether what one removes is gone from the other."""
    if a is b or a._folder is None or b._folder is None:
        return a is b
    return os.path.samefile(a._folder.path, b._folder.path)


def _check_chunks(fn: str, facts: ModelFacts, chunks: Any) -> list[tuple[int, ...]]:
    if not isinstance(chunks, Sequence) or isinstance(chunks, str):
        raise TypeError(f"{fn}: chunks must be a sequence of token id sequences, got {type(chunks).__name__}")
    tokens = [facts.check_ids(fn, f"chunks[{i}]", ids) for i, ids in enumerate(chunks)]
    if not tokens:
        raise ValueError(f"{fn}: chunks must hold at least one chunk, got none")
    if () in tokens:
        raise ValueError(f"{fn}: chunks must hold at least one token each, got an empty one at {tokens.index(())}")
    return tokens


def _neighbours(fn: str, neighbours: Any, embeddings: Any, place: list[int], first: list[int]) -> list[list[int]]:
    """Of each distinct chunk those that go before it. `place`: which of them a chunk is; `first`: who was it first."""
    if isinstance(neighbours, int):
        check_int(fn, "neighbours", neighbours, 0)
        if neighbours == 0:
            return [[] for _ in first]
        if embeddings is None:
            raise ValueError(f"{fn}: embeddings must be given to find {neighbours} neighbours of each chunk, got None")
        x = matrix(fn, embeddings)
        if len(x) != len(place):
            raise ValueError(f"{fn}: embeddings must have {len(place)} rows, one per chunk, got {len(x)}")
        return search(fn, x[first], neighbours)
    if not isinstance(neighbours, Sequence) or isinstance(neighbours, str):
        raise TypeError(f"{fn}: neighbours must be an int or a list for each chunk, got {type(neighbours).__name__}")
    if embeddings is not None:
        raise ValueError(f"{fn}: embeddings find neighbours where they are a number, got lists of them too")
    if len(neighbours) != len(place):
        raise ValueError(f"{fn}: neighbours must be {len(place)} lists, one per chunk, got {len(neighbours)}")
    lists = [_places(fn, i, others, place) for i, others in enumerate(neighbours)]
    for i, others in enumerate(lists):
        if others != lists[first[place[i]]]:
            raise ValueError(f"{fn}: neighbours[{i}] must be as neighbours[{first[place[i]]}], of the same tokens")
    return [lists[i] for i in first]


def _places(fn: str, i: int, others: Any, place: list[int]) -> list[int]:
    found = check_ints(fn, f"neighbours[{i}]", others)
    if outside := [j for j in found if not 0 <= j < len(place)]:
        raise ValueError(f"{fn}: neighbours[{i}] must be chunks in [0, {len(place)}), got {outside[0]}")
    places = [place[j] for j in found]
    if place[i] in places:
        raise ValueError(f"{fn}: neighbours[{i}] must be other chunks, got {found[places.index(place[i])]}, the same")
    if len(set(places)) < len(places):
        raise ValueError(f"{fn}: neighbours[{i}] must not repeat a chunk, got {found}")
    return places
