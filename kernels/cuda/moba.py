"""Launchers of MoBA's CUDA C++ stages: the gate and the layout, with the signatures of the Triton ones."""

import torch
from torch import Tensor

from .. import configs
from ..moba.spec import Geometry, Slots, Spec, cdiv
from . import module

ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Brain", torch.float32: "float"}
SIDE = 64  # queries and threads of a gate program, as in gate.cu


def gate(
    q: Tensor, centroids: Tensor, geo: Geometry, spec: Spec, nslots: Slots, want_scores: bool
) -> tuple[Tensor, Tensor | None]:
    """Blocks every query attends, and their scores: `[nq, hr, slots]` int32 and float32 (None unless wanted).

    `q [nq, hq, d]` float16, bfloat16 or float32, last stride 1; `centroids [num_blocks, hkv, d]` float32, contiguous.
    """
    nq, hq, dim = q.shape
    hkv = centroids.shape[1]
    heads = hkv if spec.group else hq
    indices = torch.empty(nq, heads, nslots.total, dtype=torch.int32, device=q.device)
    scores = torch.empty_like(indices, dtype=torch.float32) if want_scores else None
    if indices.numel() == 0:
        return indices, scores
    row = configs.get("cuda.gate", module.arch(q.device), dim, q.element_size())
    strides = q.stride(0), q.stride(1)
    q_aligned = all(x % 16 == 0 for x in (q.data_ptr(), *(s * q.element_size() for s in strides)))
    c_aligned = centroids.data_ptr() % 16 == 0 and dim % 4 == 0
    shape = (nq, *strides, heads, hkv, hq // heads, dim, q_aligned, c_aligned)
    tensors = (q, centroids, geo.query_seq, geo.query_pos, geo.cu_blocks, indices, scores)
    module.launch(
        "gate.cu",
        "gate",
        (cdiv(nq, SIDE), heads),
        SIDE,
        (*tensors, *shape, spec.block_size, *nslots),
        q.device,
        (("ELEMENT", ELEMENTS[q.dtype]), *row.items()),
    )
    return indices, scores


def layout(indices: Tensor, geo: Geometry, spec: Spec, hkv: int, q_start: int, q_end: int) -> tuple[Tensor, Tensor]:
    """The pairs that chose each (block, KV head), ascending within it.

    Returns `pairs [p]` and `offsets [num_blocks * hkv + 1]`, int32: key `block * hkv + head` owns
    `pairs[offsets[key]:offsets[key + 1]]`, and what lies past `offsets[-1]` is undefined. A pair is
    `((t - q_start) * hr + h) * slots + slot`. Blocks a query cannot choose (its own or later, or none of its
    sequence's) are left out.
    """
    queries, (_, heads, slots) = q_end - q_start, indices.shape
    keys, device = geo.num_blocks * hkv, indices.device
    pairs = torch.empty(queries * heads * slots, dtype=torch.int32, device=device)
    if pairs.numel() == 0 or keys == 0:
        return pairs, torch.zeros(keys + 1, dtype=torch.int32, device=device)
    row = configs.get("cuda.layout", module.arch(device), 1, 1)
    chunk = min(max(geo.num_blocks, row["CHUNK"]), queries)
    chunks, threads = cdiv(queries, chunk), row["THREADS"]
    table = torch.zeros(keys * chunks + 1, dtype=torch.int32, device=device)
    rows = slice(q_start, q_end)
    sources = (indices[rows].contiguous(), geo.query_seq[rows], geo.query_pos[rows], geo.cu_blocks)
    shape = (queries, heads, hkv, slots, spec.causal, spec.block_size, chunk, chunks)
    module.launch(
        "layout.cu", "layout_count", (cdiv(pairs.numel(), threads),), threads, (*sources, table, *shape), device
    )
    table = torch.cumsum(table, 0, dtype=torch.int32)
    offsets = table[::chunks].clone()
    blocks = cdiv(chunks * hkv, threads // 32)
    module.launch("layout.cu", "layout_place", (blocks,), threads, (*sources, table, pairs, *shape), device)
    return pairs, offsets
