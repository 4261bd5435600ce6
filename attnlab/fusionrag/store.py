"""Chunks' keys and values by what they were computed from, in page-locked memory, in memory and on disk."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..dispatch import check_bool, check_int
from .fingerprint import fingerprint
from .store_disk import Folder
from .store_key import ChunkKey, ChunkKV
from .store_memory import Memory, Tally, copied, place

__all__ = ["ChunkKV", "ChunkKey", "ChunkStore", "StoreStats", "TierStats", "fingerprint"]

LOADERS = 8


@dataclass(frozen=True)
class TierStats:
    """One tier of a `ChunkStore`; a tier it does not have is all zeros.

    Attributes:
        hits, misses: lookups that came to this tier, since the store was opened. Page-locked memory is asked first,
            disk last.
        evictions: chunks that left it for others by this store's calls, to a slower tier or for good.
        entries, bytes: held now; of a folder, whoever put them there.
        budget: in bytes; None: no limit.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0
    budget: int | None = 0


@dataclass(frozen=True)
class StoreStats:
    """What a `ChunkStore` did since it was opened, and holds.

    Attributes:
        pinned, ram, disk: each tier.
        misses: lookups that no tier could serve.
        refused: lookups that met a file which was truncated, altered or another chunk's.
    """

    pinned: TierStats = field(default_factory=TierStats)
    ram: TierStats = field(default_factory=TierStats)
    disk: TierStats = field(default_factory=TierStats)
    misses: int = 0
    refused: int = 0

    @property
    def hits(self) -> int:
        """Lookups that found their chunk in some tier."""
        return self.pinned.hits + self.ram.hits + self.disk.hits


class ChunkStore:
    """Keys and values of chunks, computed once and shared by requests, processes and restarts (arXiv 2601.12904).

    A chunk is looked for in page-locked memory, then in memory, then on disk, and a chunk found moves to the fastest
    tier whose budget it fits. A tier that is full gives up its longest unused chunk: page-locked memory to memory,
    memory to nobody, for whatever fits the disk was written there by `put`.

    `path` is a folder with one safetensors file for each chunk, named by the key's digest. Processes of one machine may
    share it (locks are POSIX `flock`; network file systems are not promised), with the order of use and, at each `put`,
    the budget in common. A writer that dies leaves nothing half stored; the next store to open the folder sweeps up.
    Chunks in memory belong to their store: what another process puts under the same key or removes is seen once memory
    has dropped its own.

    The tensors that `get` hands out are the store's own: read them, never write them. Those read from disk into memory
    are mapped, not copied: no file of the folder may be changed in place, and an evicted file's space comes back once
    nobody has it mapped. Budgets count what a store holds, not what its callers hold on to. All methods may be called
    from several threads.

    Args:
        path: made if it is missing; None: no disk tier. Needs safetensors (`pip install attnlab[hf]`).
        ram_bytes: budget of keys and values in memory.
        pinned_bytes: the same in page-locked memory, for fast copies to a GPU. PyTorch rounds each tensor there up to a
            power of two, on top of this budget.
        disk_bytes: budget of the folder's files; None: no limit. A chunk that is being written comes on top.
        verify: hold each file that is read against its checksum.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; page-locked memory without CUDA.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ram_bytes: int = 4 << 30,
        pinned_bytes: int = 0,
        disk_bytes: int | None = None,
        verify: bool = True,
    ) -> None:
        fn = "ChunkStore"
        check_int(fn, "ram_bytes", ram_bytes, 0)
        check_int(fn, "pinned_bytes", pinned_bytes, 0)
        check_bool(fn, "verify", verify)
        if disk_bytes is not None:
            check_int(fn, "disk_bytes", disk_bytes, 0)
            if path is None:
                raise ValueError(f"{fn}: disk_bytes={disk_bytes} needs a path, got None")
        if path is None and not ram_bytes and not pinned_bytes:
            raise ValueError(f"{fn}: ram_bytes must be a positive int where there is no other tier, got 0")
        if pinned_bytes and not torch.cuda.is_available():
            raise ValueError(f"{fn}: pinned_bytes must be 0 without CUDA, got {pinned_bytes}")
        budgets = {"pinned": pinned_bytes, "ram": ram_bytes}
        self._memory = {name: Memory(budget, name == "pinned") for name, budget in budgets.items() if budget}
        self._folder = None if path is None else Folder(path, disk_bytes, verify)
        self._disk, self._misses, self._refused = Tally(), 0, 0
        self._lock = threading.Lock()
        self._changes = 0  # so that a load that began before a change does not bring back what was there

    def put(self, kv: ChunkKV) -> None:
        """Store a copy of a chunk, in place of what its key had.

        Raises:
            ValueError: it is over every tier's budget. Nothing has changed then, nor after an OSError.
            OSError: the disk is full, or the folder cannot be written.
        """
        if not isinstance(kv, ChunkKV):
            raise TypeError(f"ChunkStore.put: expected a ChunkKV, got {type(kv).__name__}")
        fits = any(tier.fits(kv.nbytes) for tier in self._memory.values())
        kept = copied(kv, self._pins(kv.nbytes))
        evicted = None if self._folder is None else self._folder.put(kept)
        if evicted is None and not fits:
            raise ValueError(f"ChunkStore.put: a chunk of {kv.nbytes} bytes is over every budget: {self._budgets()}")
        if evicted is None and self._folder is not None:
            self._folder.remove(kv.key.digest)
        with self._lock:
            self._changes += 1
            self._disk.evictions += evicted or 0
            self._forget(kv.key.digest)
            self._keep(kept)

    def get(self, key: ChunkKey) -> ChunkKV | None:
        """The chunk stored under `key`, in host memory, or None.

        Raises:
            ValueError: its file is truncated, altered or another chunk's: `put` replaces it, `remove` deletes it.
        """
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkKV | None]:
        """`get` of each of `keys`, with files read side by side."""
        unique = list(dict.fromkeys(_checked("ChunkStore.get", key) for key in keys))
        with self._lock:
            changes = self._changes
            found = {key: self._recall(key.digest) for key in unique}
        absent = [key for key in unique if found[key] is None]
        if self._folder is not None and absent:
            with ThreadPoolExecutor(min(LOADERS, len(absent), os.cpu_count() or 1)) as pool:
                for key, kv in zip(absent, pool.map(partial(self._read, self._folder), absent)):
                    found[key] = self._loaded(key.digest, kv, changes)
        with self._lock:
            self._misses += sum(kv is None for kv in found.values())
        if self._folder is not None:
            for key in unique:
                self._folder.touch(key.digest)
        return [found[key] for key in keys]

    def __contains__(self, key: ChunkKey) -> bool:
        digest = _checked("ChunkStore", key).digest
        with self._lock:
            held = any(digest in tier.chunks for tier in self._memory.values())
        return held or (self._folder is not None and self._folder.holds(digest))

    def tier(self, key: ChunkKey) -> str | None:
        """The fastest tier that holds a chunk, `"pinned"`, `"ram"` or `"disk"`; None: it is not stored."""
        digest = _checked("ChunkStore.tier", key).digest
        with self._lock:
            held = [name for name, tier in self._memory.items() if digest in tier.chunks]
        if not held and self._folder is not None and self._folder.holds(digest):
            held = ["disk"]
        return held[0] if held else None

    def neighbours(self, key: ChunkKey) -> tuple[str, ...] | None:
        """`get(key).neighbours` without loading the chunk, and None for a file that `get` refuses. Counts as no use."""
        digest = _checked("ChunkStore.neighbours", key).digest
        with self._lock:
            held = [tier.chunks[digest].neighbours for tier in self._memory.values() if digest in tier.chunks]
        if held:
            return held[0]
        return None if self._folder is None else self._folder.neighbours(key)

    def keys(self) -> frozenset[str]:
        """Digests of the chunks held in any tier."""
        with self._lock:
            held = {digest for tier in self._memory.values() for digest in tier.chunks}
        stored = () if self._folder is None else self._folder.stored()
        return frozenset(held.union(s.digest for s in stored))

    def remove(self, key: ChunkKey) -> bool:
        """Drop a chunk from every tier, the shared folder too; whether there was one."""
        digest = _checked("ChunkStore.remove", key).digest
        stored = self._folder is not None and self._folder.remove(digest)
        with self._lock:
            self._changes += 1
            return self._forget(digest) or stored

    def clear(self) -> None:
        """Drop every chunk from every tier, the shared folder too. Counters go on."""
        if self._folder is not None:
            self._folder.clear()
        with self._lock:
            self._changes += 1
            for tier in self._memory.values():
                tier.clear()

    def stats(self) -> StoreStats:
        """Counters and contents; reads the folder."""
        stored = [] if self._folder is None else self._folder.stored()
        disk = None if self._folder is None else self._folder.budget
        with self._lock:
            tiers = {
                name: TierStats(**asdict(tier.tally), entries=len(tier.chunks), bytes=tier.nbytes, budget=tier.budget)
                for name, tier in self._memory.items()
            }
            if self._folder is not None:
                held = sum(s.nbytes for s in stored)
                tiers["disk"] = TierStats(**asdict(self._disk), entries=len(stored), bytes=held, budget=disk)
            return StoreStats(**tiers, misses=self._misses, refused=self._refused)

    def _recall(self, digest: str) -> ChunkKV | None:
        """From memory, moved to the fastest tier that it fits."""
        for tier in self._memory.values():
            kv = tier.get(digest)
            if kv is not None:
                return self._keep(kv)
        return None

    def _keep(self, kv: ChunkKV) -> ChunkKV:
        """Take a chunk into memory, where there is a place for it; the tensors to hand out."""
        self._forget(kv.key.digest)
        moving, kept = [kv], kv
        for tier in self._memory.values():
            moving = [out for one in moving for out in tier.put(one)]
            kept = tier.chunks.get(kv.key.digest, kept)
        return kept

    def _forget(self, digest: str) -> bool:
        return any(tier.discard(digest) for tier in self._memory.values())

    def _read(self, folder: Folder, key: ChunkKey) -> ChunkKV | None:
        try:
            return folder.get(key, self._place)
        except ValueError:
            with self._lock:
                self._refused += 1
            raise

    def _loaded(self, digest: str, kv: ChunkKV | None, changes: int) -> ChunkKV | None:
        """Count what came from the disk and keep it; another thread may have been faster."""
        with self._lock:
            if kv is None:
                self._disk.misses += 1
                return None
            self._disk.hits += 1
            if changes != self._changes:
                return kv
            held = [tier.chunks[digest] for tier in self._memory.values() if digest in tier.chunks]
            return self._keep(held[0] if held else kv)

    def _place(self, x: Tensor) -> Tensor:
        return place(x, True) if self._pins(2 * x.nbytes) else x

    def _pins(self, nbytes: int) -> bool:
        return "pinned" in self._memory and self._memory["pinned"].fits(nbytes)

    def _budgets(self) -> str:
        budgets: dict[str, int | None] = {f"{name}_bytes": tier.budget for name, tier in self._memory.items()}
        if self._folder is not None:
            budgets["disk_bytes"] = self._folder.budget
        return ", ".join(f"{name}={budget}" for name, budget in budgets.items())

    def __repr__(self) -> str:
        return f"ChunkStore({self._folder.path if self._folder else None!r}, {self._budgets()})"


def _checked(fn: str, key: ChunkKey) -> ChunkKey:
    if not isinstance(key, ChunkKey):
        raise TypeError(f"{fn}: expected a ChunkKey, got {type(key).__name__}")
    return key
