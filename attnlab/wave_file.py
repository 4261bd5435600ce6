"""A `WaveIndex` in a file: safetensors with a format version and a checksum, written whole or not at all."""

import contextlib
import os
import uuid
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import safe_file
from .kernels.retroinfer.spec import places
from .wave_config import WaveConfig
from .wave_reference import steady_positions

if TYPE_CHECKING:
    from .wave_index import WaveIndex

FORMAT = safe_file.Format("attnlab.WaveIndex", "2", "index")
CLUSTERS, MEMBERS = ("centroids", "value_means", "radius", "steps"), ("tokens", "k", "v")


class Rows(NamedTuple):
    """Counts per row."""

    lengths: list[int]
    indexed: list[int]
    clusters: list[int]


def save(index: "WaveIndex", path: str | os.PathLike[str]) -> None:
    safetensors = safe_file.library()
    rows = Rows(list(index.lengths), list(index.indexed), list(index.clusters))
    tensors = _pack(index, rows)
    facts = {"capacity": index.capacity, "config": asdict(index.config), **rows._asdict()}
    meta = safe_file.metadata(FORMAT, facts, tensors)
    scratch = f"{os.fspath(path)}.{uuid.uuid4().hex}"
    try:
        safetensors.torch.save_file(tensors, scratch, metadata=meta)
        _flush(scratch)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def load(
    cls: type["WaveIndex"],
    path: str | os.PathLike[str],
    capacity: int | None,
    device: torch.device | str | None,
    backend: str,
) -> "WaveIndex":
    tensors, facts = safe_file.read("WaveIndex.load", path, FORMAT, lambda x: x)
    rows = Rows(*(facts[name] for name in Rows._fields))
    capacity = facts["capacity"] if capacity is None else capacity
    if max(rows.lengths) > capacity:
        raise ValueError(f"WaveIndex.load: {path} has rows of {max(rows.lengths)} tokens, over capacity={capacity}")
    k, config = tensors["k"], WaveConfig(**facts["config"])
    index = cls(
        len(rows.lengths), capacity, k.shape[0], k.shape[2], config, dtype=k.dtype, device=device, backend=backend
    )
    _unpack(index, rows, tensors)
    return index


def _pack(index: "WaveIndex", rows: Rows) -> dict[str, Tensor]:
    """What the rows hold and nothing else, row behind row: `[G, all rows' clusters or tokens, ...]`."""
    store = index.store._asdict() | {"sizes": index.store.sizes}

    def joined(name: str, counts: list[int]) -> Tensor:
        return torch.cat([store[name][b, :, :n] for b, n in enumerate(counts)], 1).contiguous().cpu()

    packed = {name: joined(name, rows.clusters) for name in (*CLUSTERS, "sizes")}
    packed |= {name: joined(name, rows.indexed) for name in MEMBERS}
    at = _steady_places(index, rows)
    for name in ("k_steady", "v_steady"):
        packed[name] = torch.cat([store[name][b][:, p] for b, p in enumerate(at)], 1).contiguous().cpu()
    return packed


def _unpack(index: "WaveIndex", rows: Rows, packed: dict[str, Tensor]) -> None:
    store = index.store._asdict()
    for names, counts in ((CLUSTERS, rows.clusters), (MEMBERS, rows.indexed)):
        for name in names:
            for b, part in enumerate(packed[name].split(counts, 1)):
                store[name][b, :, : counts[b]] = part
    for b, sizes in enumerate(packed["sizes"].split(rows.clusters, 1)):
        store["offsets"][b, :, 1 : 1 + rows.clusters[b]] = sizes.cumsum(1)
        store["offsets"][b, :, 1 + rows.clusters[b] :] = rows.indexed[b]
    at = _steady_places(index, rows)
    for name in ("k_steady", "v_steady"):
        for b, part in enumerate(packed[name].split([len(p) for p in at], 1)):
            store[name][b][:, at[b]] = part.to(store[name].device)
    index._restore(*rows)


def _steady_places(index: "WaveIndex", rows: Rows) -> list[Tensor]:
    spec, device = index.config.spec, index.store.k.device
    held = zip(rows.lengths, rows.indexed, strict=True)
    return [places(steady_positions(length, indexed, spec, device), spec) for length, indexed in held]


def _flush(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
