"""RetroInfer's wave index: the tokens of a batch of rows in clusters, kept up to date while the rows grow."""

import importlib
import os
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import wave_faiss, wave_file, wave_reference
from .dispatch import (
    MAX_HEAD_DIM,
    Call,
    Reasons,
    check_int,
    check_ints,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from .kernels.retroinfer.spec import Plan, Spec, Store, allocate, budget, places, plan
from .packs import without_autocast
from .wave_config import WaveConfig, kernel_reasons

if TYPE_CHECKING:
    from .wave_buffer import WaveBuffer

BACKENDS: dict[str, Reasons] = {"triton": triton_reasons, "portable": portable_reasons, "reference": reference_reasons}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def serving(why: list[str]) -> dict[str, Reasons]:
    """The backends, with reasons `why` that kernels cannot serve a call."""

    def also(reasons: Reasons) -> Reasons:
        return lambda call: reasons(call) + why

    return BACKENDS | {name: also(BACKENDS[name]) for name in ("triton",) if why}


class WaveIndex:
    """The keys and values of a batch of rows, each of its own length, most of them grouped in clusters of like keys.

    A row keeps its first `config.sink` and its newest tokens as they came. The others are indexed: each KV head groups
    them by segmented spherical k-means and keeps, beside the tokens, the mean key, mean value, size and radius of each
    cluster (the meta index). The first tokens of an empty row are indexed at once, all but the last `config.local`;
    later ones wait until `config.update_every` of them are neither indexed nor among the last `config.local`, and are
    then clustered together. Older clusters never change. This is the paper's wave index and its update by segmented
    clustering (arXiv 2505.02922); equations 1 and 2 of `reference/retroinfer.py`.

    The capacity is fixed and reserved beforehand: tokens over it are a `ValueError` that leaves the index as it was.

    Args:
        batch: rows.
        capacity: tokens a row can hold in all.
        kv_heads, head_dim: of the keys and values, head sizes up to 256.
        config: see `WaveConfig`.
        dtype: float16, bfloat16, float32 or float64. Radii are float32 (float64).
        device: the default device if None.
        backend: which one clusters, `"auto"`, `"reference"`, `"portable"` or `"triton"` (without
            `config.meta_dtype="int8"`).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve the device, dtype, head size or configuration.
        ModuleNotFoundError: `config.clustering="faiss"` without faiss.

    Attributes:
        store: the tensors, see `kernels/retroinfer/spec.py`. They keep their addresses; a `WaveBuffer` on a CUDA device
            moves `k` and `v` to the host when it is made.
        config, capacity, backend: as given; `backend` after `"auto"` is resolved.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        config: WaveConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in sizes.items():
            check_int("WaveIndex", name, value, 1)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"WaveIndex: head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
        if dtype not in DTYPES:
            raise TypeError(f"WaveIndex: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        config = _check_config(config)
        if config.clustering == "faiss":
            wave_faiss.library()
        device = torch.device(torch.get_default_device() if device is None else device)
        self.backend = pick(Call("WaveIndex", device, dtype, head_dim), backend, serving(kernel_reasons(config)))
        self.config, self.capacity, self._spec = config, capacity, config.spec
        int8 = config.meta_dtype == "int8"
        self.store: Store = allocate(batch, kv_heads, head_dim, capacity, self._spec, dtype, device, int8)
        asked = (config.retrieval_ratio, config.estimation_ratio, config.estimation)
        self._budgets: dict[tuple[float, float, str], Tensor] = {asked: self.store.budgets}
        self._buffers: weakref.WeakSet[WaveBuffer] = weakref.WeakSet()
        self._lengths, self._indexed, self._clusters = [0] * batch, [0] * batch, [0] * batch
        self._count()

    @classmethod
    def build(
        cls,
        k: Tensor,
        v: Tensor,
        config: WaveConfig | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
        starts: Sequence[int] | Tensor | None = None,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> "WaveIndex":
        """An index of prompts `k, v [B, T, G, D]`, keys after their rotary embedding.

        Args:
            lengths: `B` ints, the tokens of each row (all `T` by default).
            starts: `B` ints, for left padding: row `b`'s tokens are `starts[b] .. starts[b] + lengths[b] - 1`.
            capacity: tokens a row can hold in all; by default `T + config.update_every`.
            config, backend: see `WaveIndex`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; more tokens than `capacity`.
            BackendError, ModuleNotFoundError: as `WaveIndex` does.
        """
        fn = "WaveIndex.build"
        _check_tensors(fn, k, v)
        batch, tokens, heads, dim = k.shape
        config = _check_config(config)
        skips = [0] * batch if starts is None else _per_row(fn, "starts", starts, [tokens] * batch)
        room = [tokens - skip for skip in skips]
        counts = room if lengths is None else _per_row(fn, "lengths", lengths, room)
        capacity = tokens + config.update_every if capacity is None else capacity
        index = cls(batch, capacity, heads, dim, config, dtype=k.dtype, device=k.device, backend=backend)
        index._take(fn, k, v, skips, counts)
        return index

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Take further tokens, `k, v [B, T, G, D]`: generated ones, or a new part of a prompt.

        Row `b` takes its first `lengths[b]` tokens (all by default).

        Raises:
            ValueError, TypeError: wrong shapes, dtype or device of `k, v`, wrong `lengths`, or over `capacity`; the
                index is then unchanged.
        """
        fn = "WaveIndex.append"
        _check_tensors(fn, k, v)
        held = self.store.k
        if (k.shape[0], *k.shape[2:]) != (self.batch, held.shape[1], held.shape[3]):
            shape = f"[{self.batch}, T, {held.shape[1]}, {held.shape[3]}]"
            raise ValueError(f"{fn}: k must have shape {shape}, got {list(k.shape)}")
        if k.dtype != held.dtype:
            raise TypeError(f"{fn}: k must have the index's dtype {held.dtype}, got {k.dtype}")
        if k.device != self.device:
            raise ValueError(f"{fn}: k must be on the index's device {self.device}, got {k.device}")
        most = [k.shape[1]] * self.batch
        counts = most if lengths is None else _per_row(fn, "lengths", lengths, most)
        self._take(fn, k, v, [0] * self.batch, counts)

    def row(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of row `b` in the order they came, `[t, G, D]` each: copies.

        Raises:
            ValueError: no such row.
        """
        if isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < self.batch:
            raise ValueError(f"WaveIndex.row: b must be an int in 0..{self.batch - 1}, got {b!r}")
        return wave_reference.in_order(self.store, b, self._lengths[b], self._indexed[b], self._spec)

    def reset(self) -> None:
        """Empty all rows, and the caches of its buffers; storage, capacity and configuration stay."""
        for buffer in self._buffers:
            buffer.reset()
        self.store.offsets.zero_()
        self._restore(*([0] * self.batch for _ in range(3)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file: what the rows hold, the configuration, a version and a checksum.

        The file appears whole, by a rename, or not at all.

        Raises:
            OSError: the file cannot be written.
            ModuleNotFoundError: safetensors is not installed (`pip install attnlab[hf]`).
        """
        wave_file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> "WaveIndex":
        """The index that `save` wrote, which goes on as the saved one would have.

        Args:
            capacity: the saved index's by default.
            device: the default device if None.
            backend: which one clusters from now on.

        Raises:
            ValueError: the file is truncated, was altered, or is of another version or kind; `capacity` is less than
                its longest row.
            OSError: the file cannot be read.
            ModuleNotFoundError: safetensors is not installed (`pip install attnlab[hf]`).
        """
        return wave_file.load(cls, path, capacity, device, backend)

    @property
    def batch(self) -> int:
        return self.store.k.shape[0]

    @property
    def device(self) -> torch.device:
        """Where queries are; a `WaveBuffer` may keep the keys and values in clusters elsewhere."""
        return self.store.offsets.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each row holds."""
        return tuple(self._lengths)

    @property
    def indexed(self) -> tuple[int, ...]:
        """Tokens of each row that are in clusters."""
        return tuple(self._indexed)

    @property
    def clusters(self) -> tuple[int, ...]:
        """Cluster slots of each row, the same for its heads; a slot may be empty."""
        return tuple(self._clusters)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held."""
        _, heads, _, dim = self.store.k.shape
        return sum(self._lengths) * heads * 2 * dim * self.store.k.itemsize

    @property
    def meta_bytes(self) -> int:
        """Bytes of the meta index: mean key, mean value, size and radius of each cluster."""
        per_slot = (getattr(self.store, name) for name in ("centroids", "value_means", "radius", "steps", "offsets"))
        width = sum(x[0, 0, :1].nbytes for x in per_slot)
        return sum(self._clusters) * self.store.k.shape[1] * width

    def __repr__(self) -> str:
        _, heads, _, dim = self.store.k.shape
        return (
            f"WaveIndex({self.batch} rows of {self.capacity}, {heads} heads of {dim}, {self.store.k.dtype}, "
            f"{self.device}, lengths={self._lengths}, clusters={self._clusters})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has no buffers, but those that are copied with it; a copy of pinned memory is not pinned.
        self.__dict__.update(state)
        self._buffers = weakref.WeakSet()
        if self.store.k.device != self.device:
            self.store = self.store._replace(k=self.store.k.pin_memory(), v=self.store.v.pin_memory())

    def budgets(self, retrieval_ratio: float, estimation_ratio: float, estimation: str) -> Tensor:
        """`[B, 2]` int32 on the device, clusters of the two zones, kept up to date at one address for CUDA graphs."""
        key = (retrieval_ratio, estimation_ratio, estimation)
        if key not in self._budgets:
            self._budgets[key] = self._zones(key).to(self.device)
        return self._budgets[key]

    def _zones(self, key: tuple[float, float, str]) -> Tensor:
        return torch.tensor([budget(*key, n) for n in self._clusters], dtype=torch.int32)

    def _take(self, fn: str, k: Tensor, v: Tensor, begins: list[int], counts: list[int]) -> None:
        """Row `b` takes tokens `begins[b] .. begins[b] + counts[b] - 1` of `k, v`, or nothing changes."""
        grown = [n + more for n, more in zip(self._lengths, counts, strict=True)]
        for b, n in enumerate(grown):
            if n > self.capacity:
                raise ValueError(
                    f"{fn}: row {b} holds {self._lengths[b]} tokens, {counts[b]} more pass the index's "
                    f"capacity={self.capacity}"
                )
        spec, k, v = self._spec, k.detach(), v.detach()
        due = {}
        for b, n in enumerate(grown):
            waiting = n - spec.sink - self._indexed[b] - spec.local
            if counts[b] and waiting >= (spec.update_every if self._lengths[b] else 1):
                due[b] = waiting
        if not due and k.shape[1] == 1 and all(n == 1 for n in counts):
            _portable().push(self.store, k[:, 0], v[:, 0], spec)
        else:
            if due:
                self._cluster(due, k, v, begins)
            self._keep(k, v, begins, grown)
            self.store.lengths.copy_(torch.tensor(grown, dtype=torch.int32))
        self._lengths = grown

    def _cluster(self, due: dict[int, int], k: Tensor, v: Tensor, begins: list[int]) -> None:
        """Index the oldest `due[b]` tokens of row `b` that are not: those it keeps in the ring, then new ones."""
        spec, tokens = self._spec, k.shape[1]
        older = {b: max(0, self._lengths[b] - spec.sink - self._indexed[b]) for b in due}
        if any(older.values()):
            parts, ranges, end = [], [], 0
            for b, waiting in due.items():
                held = min(older[b], waiting)
                parts.append(_portable().waiting(self.store, [b], held, spec))
                skip = begins[b] + max(0, spec.sink - self._lengths[b])
                parts.append(tuple(x[b, skip : skip + waiting - held] for x in (k, v)))
                ranges.append((b, end, end + waiting))
                end += waiting
            source_k, source_v = (torch.cat(x) for x in zip(*parts, strict=True))
        else:
            source_k, source_v = k.flatten(0, 1), v.flatten(0, 1)
            firsts = {b: b * tokens + begins[b] + max(0, spec.sink - self._lengths[b]) for b in due}
            ranges = [(b, firsts[b], firsts[b] + waiting) for b, waiting in due.items()]
        call = plan(spec, ranges, self._clusters)
        _extend(source_k, source_v, self.store, call, spec, self.backend, self.config.clustering)
        for (b, start, end), added in zip(ranges, call.slots, strict=True):
            self._indexed[b] += end - start
            self._clusters[b] += added
        self._count()

    def _count(self) -> None:
        """Note how many clusters the zones have now."""
        with torch.inference_mode():  # where some of them may have been made
            for key, held in self._budgets.items():
                held.copy_(self._zones(key))

    def _restore(self, lengths: list[int], indexed: list[int], clusters: list[int]) -> None:
        """Take over the counts of rows whose contents were written to `store`."""
        self._lengths, self._indexed, self._clusters = lengths, indexed, clusters
        for name, counts in (("lengths", lengths), ("indexed", indexed), ("clusters", clusters)):
            getattr(self.store, name).copy_(torch.tensor(counts, dtype=torch.int32))
        self._count()

    def _keep(self, k: Tensor, v: Tensor, begins: list[int], grown: list[int]) -> None:
        """Put the new tokens that are not indexed in the steady zone."""
        for b, (old, new) in enumerate(zip(self._lengths, grown, strict=True)):
            kept = wave_reference.steady_positions(new, self._indexed[b], self._spec, k.device)
            kept = kept[kept >= old]
            at = places(kept, self._spec)
            for x, steady in ((k, self.store.k_steady), (v, self.store.v_steady)):
                steady[b, :, at] = x[b, begins[b] + kept - old].transpose(0, 1)


def _portable() -> ModuleType:
    # Where tensors lie is the same for every backend; the portable one moves them.
    return importlib.import_module("attnlab.kernels.retroinfer.portable")


@without_autocast
def _extend(k: Tensor, v: Tensor, store: Store, call: Plan, spec: Spec, backend: str, clustering: str) -> None:
    labels = _kmeans("faiss" if clustering == "faiss" else backend)(k, call, spec)
    _portable().extend(store, k, v, call, spec, labels)


def _kmeans(name: str) -> Callable[[Tensor, Plan, Spec], Tensor]:
    if name == "faiss":
        return wave_faiss.kmeans
    if name == "reference":
        return wave_reference.kmeans
    if name == "triton":
        from .kernels.retroinfer.launch import kmeans

        return kmeans
    return _portable().kmeans


def _check_config(config: WaveConfig | None) -> WaveConfig:
    if config is not None and not isinstance(config, WaveConfig):
        raise TypeError(f"WaveIndex: config must be a WaveConfig, got {type(config).__name__}")
    return WaveConfig() if config is None else config


def _per_row(fn: str, name: str, values: Sequence[int] | Tensor, most: list[int]) -> list[int]:
    found = check_ints(fn, name, values)
    if len(found) != len(most) or not all(0 <= n <= m for n, m in zip(found, most, strict=True)):
        raise ValueError(f"{fn}: {name} must be {len(most)} ints from 0 to at most {most}, got {found}")
    return found


def _check_tensors(fn: str, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: {name} must be a Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{fn}: {name} must have shape [B, T, G, D], got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{fn}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"{fn}: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if v.dtype != k.dtype:
        raise TypeError(f"{fn}: v must have k's dtype {k.dtype}, got {v.dtype}")
    if v.device != k.device:
        raise ValueError(f"{fn}: v must be on k's device {k.device}, got {v.device}")
