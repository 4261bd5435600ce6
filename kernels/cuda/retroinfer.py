"""Launcher of RetroInfer's CUDA C++ stage: a step of the wave buffer."""

import math

import torch
from torch import Tensor

from .. import configs
from ..retroinfer.buffer import Cache
from ..retroinfer.spec import Store, cdiv
from . import module

COPY_INTS = 4  # of a Copy, in buffer.cu


def serve(chosen: Tensor, store: Store, cache: Cache) -> None:
    """Bring the pages of the clusters `chosen [B, G, K]` int32 (-1: none) into the cache, in place.

    As `buffer_portable.serve`, with `Store.k, v` in pinned memory, but nothing waits for the host, so a CUDA graph can
    hold the call. A head that asks for more pages than its cache has places raises nothing: its cache stays as it is,
    `Cache.overflow` takes note, and pages whose `slot_map` is -1 have to be read from `Store.k, v`.
    """
    heads, device = chosen.shape[0] * chosen.shape[1], chosen.device
    row = configs.get("cuda.buffer", module.arch(device), 1, 1)
    threads, defines = row["THREADS"], (("THREADS", row["THREADS"]),)
    copies = torch.empty(heads * cache.capacity, COPY_INTS, dtype=torch.int32, device=device)
    counts = torch.empty(heads, dtype=torch.int32, device=device)
    state = (*cache[2:9], copies, counts)
    shape = (chosen.shape[2], store.offsets.shape[2] - 1, cache.slot_map.shape[2], cache.capacity, cache.page)
    policy = (cache.vector_bytes, cache.policy == "lru")
    arguments = (chosen.contiguous(), store.offsets, *state, *shape, *policy)
    module.launch("buffer.cu", "buffer_admit", (heads,), threads, arguments, device, defines)

    tiers = (store.k, store.v, cache.k, cache.v)
    width = cache.vector_bytes // 2
    unit = math.gcd(16, width, *(x.data_ptr() for x in tiers))
    blocks = min(cdiv(row["BLOCKS"], heads), cdiv(cache.capacity, threads // 32))
    arguments = (*tiers, copies, counts, store.k.shape[2], cache.capacity, cache.page, width, unit)
    module.launch("buffer.cu", "buffer_fetch", (heads, blocks), threads, arguments, device, defines)
