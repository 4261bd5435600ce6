"""Chunks' keys and values on their way from the store, or from the model where it lacks them, into a batch's pool."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..decoder_models import ModelFacts
from .models import KV, chunk_kv, system_kv
from .pool import Pool
from .report import Clock
from .request import Batch, Ids
from .store import ChunkKey, ChunkKV, ChunkStore, fingerprint


@dataclass(frozen=True)
class Filled:
    """What came of filling a pool.

    Attributes:
        exact: of each row, whether its first chunk was computed behind the system prompt alone: a true prefix.
        computed: chunks that the store lacked.
        loaded_bytes: of keys and values that the store handed out, by the tier they were in.
    """

    exact: list[bool]
    computed: frozenset[Ids]
    loaded_bytes: dict[str, int]


class Source:
    """Hands out chunks behind one system prompt; what the store lacks is computed, and stored."""

    def __init__(self, model: Any, facts: ModelFacts, store: ChunkStore | None, system: Ids) -> None:
        self.model, self.facts, self.store, self.system = model, facts, store, system
        self.fingerprint = fingerprint(model)
        self._prefix: KV | None = None

    def prefix(self) -> KV:
        """The system prompt's keys and values, run once."""
        if self._prefix is None:
            self._prefix = system_kv(self.model, self.facts, self.system)
        return self._prefix

    def key(self, chunk: Ids) -> ChunkKey:
        return ChunkKey.of(chunk, model=self.fingerprint, rope=self.facts.rope, system=self.system)

    def load(self, chunks: Sequence[Ids]) -> tuple[list[ChunkKV | None], dict[str, int]]:
        """What the store has of them, and how many bytes of it lay in each tier."""
        if self.store is None:
            return [None] * len(chunks), {}
        keys = [self.key(chunk) for chunk in chunks]
        tiers = [self.store.tier(key) for key in keys]
        found, loaded = self.store.get_many(keys), Counter[str]()
        for chunk, key, tier, kv in zip(chunks, keys, tiers, found, strict=True):
            if kv is None:
                continue
            if kv.key.digest != key.digest:
                raise ValueError(
                    f"FusionRAG: the store must hand out chunk {key}, got {kv.key}: of another model, rope, prompt "
                    "or text"
                )
            shape = (self.facts.layers, len(chunk), self.facts.kv_heads, self.facts.head_dim)
            if kv.k.shape != shape or kv.k.dtype != self.model.dtype:
                raise ValueError(
                    f"FusionRAG: the store must hand out chunk {key} as {list(shape)} of {self.model.dtype}, "
                    f"got {list(kv.k.shape)} of {kv.k.dtype}"
                )
            loaded[tier or "ram"] += kv.nbytes
        return found, dict(loaded)

    def compute(self, chunk: Ids) -> ChunkKV:
        made = ChunkKV(self.key(chunk), *chunk_kv(self.model, self.facts, self.prefix(), chunk))
        if self.store is not None:
            self.store.put(made)
        return made


def fill(batch: Batch, pool: Pool, source: Source, clock: Clock) -> Filled:
    """Bring a batch's chunks to the pool, once for every position each is used at, and let the rows share them."""
    base = len(batch.system)
    starts = batch.starts()
    found, loaded = source.load(list(starts))
    clock.lap("load")
    prefix = source.prefix()
    clock.lap("compute")
    system = pool.place(*prefix, 0)
    slots, alone, computed = {}, set(), set()
    for chunk, kv in zip(starts, found, strict=True):
        if kv is None:
            clock.lap("rotate")
            kv = source.compute(chunk)
            computed.add(chunk)
            clock.lap("compute")
        if not kv.neighbours:
            alone.add(chunk)
        for start in starts[chunk] if pool.shift is None else [base]:
            slots[chunk, start] = pool.place(kv.k, kv.v, start - base)
    for row, chunks in enumerate(batch.chunks):
        pool.share(row, system, 0, 0)
        start = base
        for chunk in chunks:
            pool.share(row, slots[chunk, start if pool.shift is None else base], start, start - base)
            start += len(chunk)
    clock.lap("rotate")
    return Filled([row[0] in alone for row in batch.chunks], frozenset(computed), loaded)
