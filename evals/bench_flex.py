"""FlexAttention as a contender: dense causal, and with the blocks MoBA chose as a BlockMask."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnlab
from attnlab.evals.bench_cases import Case, heads_first

QUERY_TILE = 128


def flex_contenders(case: Case, qkv: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Compiled FlexAttention on `qkv [1, T, H, D]`; masks and compilation are made here, outside the timed calls.

    Raises whatever torch.compile raises where it cannot run (no C++ compiler, no OpenMP).
    """
    from torch.nn.attention.flex_attention import flex_attention

    q, k, _ = qkv
    attend = torch.compile(flex_attention, dynamic=False)
    inputs = heads_first(*qkv)
    gqa = q.shape[2] != k.shape[2]
    contenders = {}
    for name, mask in (("flex dense", causal_mask(q.shape[1], q.device)), ("flex same blocks", moba_mask(case, q, k))):
        contenders[name] = functools.partial(attend, *inputs, block_mask=mask, enable_gqa=gqa)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in contenders.values():
            call()
    return contenders


def causal_mask(length: int, device: torch.device) -> Any:
    """Dense causal: tiles below the diagonal skip the mask."""
    block = torch.arange(-(-length // QUERY_TILE), device=device)
    full, diagonal = block[:, None] > block, block[:, None] == block
    return _block_mask(diagonal[None], full[None], QUERY_TILE, lambda b, h, i, j: i >= j)


def moba_mask(case: Case, q: Tensor, k: Tensor) -> Any:
    """The routing of every query and head, in a table the mask looks up; tiles that no query chose are skipped."""
    size = case.block_size
    indices = attnlab.moba_select(q, k, **case.routing).indices[0].transpose(0, 1).long()
    heads, length, _ = indices.shape
    blocks = -(-length // size)
    table = torch.zeros(heads, length, blocks + 1, dtype=torch.bool, device=q.device)
    table.scatter_(2, indices.masked_fill(indices < 0, blocks), True)
    table = table[..., :blocks].contiguous()
    tiles = table.unflatten(1, (-1, QUERY_TILE))
    own = torch.arange(0, length, QUERY_TILE, device=q.device) // size
    full = tiles.all(2) & (own[:, None] > torch.arange(blocks, device=q.device))
    partial = tiles.any(2) & ~full
    return _block_mask(partial, full, size, lambda b, h, i, j: table[h, i, j // size] & (i >= j))


def _block_mask(partial: Tensor, full: Tensor, kv_block: int, mask_mod: Callable[..., Tensor]) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return tiles.sum(-1, dtype=torch.int32)[None], order.int()[None]

    size = (QUERY_TILE, kv_block)
    return BlockMask.from_kv_blocks(*ordered(partial), *ordered(full), BLOCK_SIZE=size, mask_mod=mask_mod)
