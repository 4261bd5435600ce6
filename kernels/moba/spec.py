"""What one MoBA call computes, and how its sequences, blocks and slots are numbered.

Every backend works on packed tensors: `q [Nq, Hq, D]`, `k, v [Nk, Hkv, D]` and int32 `cu_q, cu_k [S+1]`.
A batch is a pack of equal lengths. Torch only: the portable and the GPU backends share this page.

A query's choice is a row of slots, `indices [Nq, Hr, slots]` int32, holding block numbers local to its sequence:

    causal:      own | sink_blocks | local_blocks | topk - 1 best candidates, by falling score
    not causal:        sink_blocks |               topk     best candidates, by falling score

A slot that names no block, or a block another slot already names, holds -1. Scores there are -inf; blocks chosen by
rule instead of by score hold +inf. `Hr` is `Hq` (each query head chooses) or `Hkv` (one choice per group).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """The options of a call, after validation."""

    block_size: int
    topk: int
    causal: bool
    scale: float
    group: bool
    sink_blocks: int
    local_blocks: int
    workspace_bytes: int


class Slots(NamedTuple):
    """How many slots of each kind a query has."""

    own: int
    sink: int
    local: int
    picks: int

    @property
    def total(self) -> int:
        return self.own + self.sink + self.local + self.picks


class Geometry(NamedTuple):
    """Where sequences and blocks lie in a pack. Tensors are int32 on the inputs' device; building it never syncs."""

    cu_q: Tensor  # [S+1]
    cu_k: Tensor  # [S+1]
    cu_blocks: Tensor  # [S+1] first global block of each sequence
    query_seq: Tensor  # [Nq] sequence of a query
    query_pos: Tensor  # [Nq] its position among its sequence's keys; meaningless when not causal
    block_seq: Tensor  # [num_blocks] sequence of a global block, S past the last real one
    num_blocks: int  # upper bound of the number of blocks, from the shapes alone


def cdiv(a, b):
    return (a + b - 1) // b


def slots(spec: Spec, max_k: int) -> Slots:
    """Slots of a query whose sequence has at most `max_k` keys. Causal rows always keep their own slot."""
    n = cdiv(max_k, spec.block_size)
    if not spec.causal:
        sink = min(spec.sink_blocks, n)
        return Slots(0, sink, 0, max(min(spec.topk, n - sink), 1 - min(sink, 1)))
    before = max(n - 1, 0)
    sink = min(spec.sink_blocks, before)
    local = min(spec.local_blocks, before - sink)
    return Slots(1, sink, local, min(spec.topk - 1, before - sink - local))


def geometry(cu_q: Tensor, cu_k: Tensor, nq: int, nk: int, block_size: int) -> Geometry:
    """Number the sequences and blocks of a pack of `nq` queries and `nk` keys."""
    seqs = cu_q.numel() - 1
    len_q, len_k = cu_q.diff(), cu_k.diff()
    cu_blocks = torch.zeros_like(cu_k)
    cu_blocks[1:] = torch.cumsum(cdiv(len_k, block_size), 0)
    # A partial block per sequence at most, and none in an empty pack.
    num_blocks = min(nk // block_size + seqs, nk)
    tokens = torch.arange(nq, device=cu_q.device, dtype=torch.int32)
    query_seq = torch.bucketize(tokens, cu_q[1:], right=True).int()
    query_pos = (tokens - cu_q[query_seq] + (len_k - len_q)[query_seq]).int()
    blocks = torch.arange(num_blocks, device=cu_q.device, dtype=torch.int32)
    block_seq = torch.bucketize(blocks, cu_blocks[1:], right=True).int()
    return Geometry(cu_q, cu_k, cu_blocks, query_seq, query_pos, block_seq, num_blocks)
