"""Stage 1: the mean key of every block, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..states.tiles import arch, head_tile, job, load_rows
from .spec import Geometry, Spec


@triton.jit
def centroids_kernel(
    k, out, cu_k, cu_blocks, block_seq, k_t, k_h, num_seqs, block_size,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(block_seq + block)
    real = seq < num_seqs
    begin = tl.load(cu_k + seq, mask=real, other=0)
    end = tl.load(cu_k + seq + 1, mask=real, other=0)
    start = begin + (block - tl.load(cu_blocks + seq, mask=real, other=0)) * block_size
    length = tl.where(real, tl.minimum(block_size, end - start), 0)
    row = tl.arange(0, BLOCK_N)
    k += start.to(tl.int64) * k_t + head.to(tl.int64) * k_h
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for n in range(0, length, BLOCK_N):
        total += load_rows(k, (n + row).to(tl.int64) * k_t, n + row < length, D, BLOCK_D, True).to(tl.float32)
    i_d = tl.arange(0, BLOCK_D)
    mean = tl.sum(total, 0) / tl.maximum(length, 1).to(tl.float32)
    tl.store(out + (block.to(tl.int64) * HKV + head) * D + i_d, mean, mask=i_d < D)


def centroids(k: Tensor, geo: Geometry, spec: Spec) -> Tensor:
    """`[num_blocks, Hkv, D]` float32; a partial last block is the mean of the keys it has, past the last are zeros."""
    heads, dim = k.shape[1], k.shape[2]
    out = torch.empty(geo.num_blocks, heads, dim, dtype=torch.float32, device=k.device)
    if out.numel():
        row = configs.get("moba.centroids", arch(k), dim, k.element_size())
        centroids_kernel[geo.num_blocks, heads](
            k, out, geo.cu_k, geo.cu_blocks, geo.block_seq, k.stride(0), k.stride(1), geo.cu_k.numel() - 1,
            spec.block_size, HKV=heads, D=dim, BLOCK_D=head_tile(dim), **row,
        )  # fmt: skip
    return out


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    row = configs.get("moba.centroids", arch, head_dim, 4 if dtype == "fp32" else 2)
    types = {"k": f"*{dtype}", "out": "*fp32", "cu_k": "*i32", "cu_blocks": "*i32", "block_seq": "*i32"}
    shape = {"HKV": 8, "D": head_dim, "BLOCK_D": head_tile(head_dim)}
    return [job("moba.centroids", centroids_kernel, types, shape, row, dot=False)]
