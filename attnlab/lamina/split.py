"""Attention over a cache that is divided into shards, and the states of the shards joined."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Call, check_scale, kernels, pick
from ..states import State, merge_states
from .decode import BACKENDS, MODULES, cache_of, check_call, check_no_gradient, check_values, split_decode
from .plan import Shard, SplitPlan

FN = "split_attention"


def split_attention(
    q: Tensor,
    kv_shards: Sequence[Shard | tuple[Any, ...]],
    plan: SplitPlan,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> State:
    """`split_decode` over each shard of a cache, joined as `plan` divides it: the attention over all of it.

    Lamina's partitions (arXiv 2405.01814) in one process: what its workers compute, and how their answers join.

    Args:
        q: `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only).
        kv_shards: one `Shard`, or `(k, v[, lengths[, page_table]])`, for each shard of the plan, as `split_decode`
            takes them; `SplitPlan.split` makes them of a whole cache. Shards may be empty: 0 heads, rows or tokens.
            head: the plan's KV heads, of all rows. request: any rows, in q's order. sequence: all rows and heads; which
            tokens lie where is no matter.
        plan: how the cache is divided.
        scale: multiplies the scores; `D ** -0.5` by default.
        backend: as `split_decode` and `merge_states`.

    Returns:
        `out [B, Tq, Hq, D]` in q's dtype and `lse [B, Tq, Hq]` float32, natural log; 0, -inf in rows without keys.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; shards that do not fit the plan.
        BackendError: an explicit backend cannot serve this call.
    """
    shards = _check(q, kv_shards, plan)
    scale = check_scale(FN, scale, q.shape[3])
    if plan.by == "sequence":
        return _by_sequence(q, shards, scale, backend)
    if plan.by == "head":
        heads = _check_heads(q, shards, plan)
        dim, widths = 2, [n * q.shape[2] // sum(heads) for n in heads]
    else:
        dim, widths = 0, _check_rows(q, shards)
    parts = zip(q.split(widths, dim), shards, strict=True)
    # `split_decode` takes 0 rows and 0 tokens, but not 0 heads.
    some = [(mine, shard) for mine, shard in parts if dim == 0 or shard.k.shape[2]]
    if len(some) == 1:
        return _attend(*some[0], scale, backend)
    queries, held = (list(x) for x in zip(*some, strict=True))
    if (together := _together(queries, held, dim, scale, backend)) is not None:
        return together
    outs, lses = zip(*(_attend(mine, shard, scale, backend) for mine, shard in some), strict=True)
    return torch.cat(outs, dim), torch.cat(lses, dim)


def _by_sequence(q: Tensor, shards: list[Shard], scale: float, backend: str) -> State:
    heads = [shard.k.shape[2] for shard in shards]
    if len(set(heads)) > 1:
        raise ValueError(f"{FN}: kv_shards of a sequence plan must have the same KV heads, got {heads}")
    if len(shards) == 1:
        return _attend(q, shards[0], scale, backend)
    if (together := _together([q] * len(shards), shards, None, scale, backend)) is not None:
        return together
    exact = torch.promote_types(q.dtype, torch.float32)
    outs, lses = zip(*(_attend(q, shard, scale, backend, exact) for shard in shards), strict=True)
    return merge_states(outs, lses, out_dtype=q.dtype, backend=backend)


def _attend(q: Tensor, shard: Shard, scale: float, backend: str, dtype: torch.dtype | None = None) -> State:
    k, v, lengths, table = shard
    return split_decode(q, k, v, lengths=lengths, page_table=table, scale=scale, out_dtype=dtype, backend=backend)


def _together(queries: list[Tensor], shards: list[Shard], dim: int | None, scale: float, backend: str) -> State | None:
    """All shards in one launch, where the backend has that: joined by concatenation along `dim`, or merged (None)."""
    q = queries[0]
    if pick(Call("split_decode", q.device, q.dtype, q.shape[3]), backend, BACKENDS) != "cpu":
        return None
    for mine, shard in zip(queries, shards, strict=True):
        check_call(FN, mine, *shard, scale, None, None)
        check_no_gradient(FN, q=mine, k=shard.k, v=shard.v)
    ks, vs, lengths, tables = (list(x) for x in zip(*shards, strict=True))
    return _shards(queries, ks, vs, lengths, tables, dim, scale)


@torch.library.custom_op("attnlab::split_attention", mutates_args=())
def _shards(
    queries: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    tables: Sequence[Tensor | None],
    dim: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    for k, n, table in zip(ks, lengths, tables, strict=True):
        check_values(FN, k, n, table)
    caches = [cache_of(*shard) for shard in zip(ks, vs, lengths, tables, strict=True)]
    if dim is None:
        return kernels(MODULES["cpu"]).decode_joined(queries, caches, scale, None, queries[0].dtype)
    outs, lses = zip(*kernels(MODULES["cpu"]).decode_apart(queries, caches, scale, None, queries[0].dtype), strict=True)
    return torch.cat(outs, dim), torch.cat(lses, dim)


@_shards.register_fake
def _(queries: Sequence[Tensor], ks: Any, vs: Any, lengths: Any, tables: Any, dim: int | None, scale: float) -> State:
    outs = queries[:1] if dim is None else queries
    lses = [q.new_empty(q.shape[:3], dtype=torch.float32) for q in outs]
    return torch.cat(list(outs), dim or 0).contiguous(), torch.cat(lses, dim or 0)


def _rows(shard: Shard) -> int:
    return (shard.k if shard.page_table is None else shard.page_table).shape[0]


def _check(q: Tensor, kv_shards: Any, plan: SplitPlan) -> list[Shard]:
    if not isinstance(plan, SplitPlan):
        raise TypeError(f"{FN}: plan must be a SplitPlan, got {type(plan).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"{FN}: q must be a Tensor, got {type(q).__name__}")
    if q.ndim != 4:
        raise ValueError(f"{FN}: q must have shape [B, T, H, D], got {list(q.shape)}")
    if not isinstance(kv_shards, Sequence):
        raise TypeError(f"{FN}: kv_shards must be a sequence of shards, got {type(kv_shards).__name__}")
    if len(kv_shards) != plan.shards:
        raise ValueError(f"{FN}: kv_shards must be the plan's {plan.shards} shards, got {len(kv_shards)}")
    shards = []
    for i, x in enumerate(kv_shards):
        if not isinstance(x, tuple) or not 2 <= len(x) <= 4:
            raise TypeError(f"{FN}: kv_shards[{i}] must be a Shard or (k, v[, lengths[, page_table]]), got {_what(x)}")
        shards.append(Shard(*x))
        _check_shard(q, i, shards[i], plan)
    return shards


def _what(x: Any) -> str:
    return f"{len(x)} items" if isinstance(x, tuple) else type(x).__name__


def _check_shard(q: Tensor, i: int, shard: Shard, plan: SplitPlan) -> None:
    """What holds for an empty shard too, which no call of `split_decode` sees."""
    for name, x in (("k", shard.k), ("v", shard.v), ("page_table", shard.page_table)):
        if not isinstance(x, Tensor) and (name != "page_table" or x is not None):
            raise TypeError(f"{FN}: kv_shards[{i}].{name} must be a Tensor, got {type(x).__name__}")
    k, v, _, table = shard
    if k.ndim != 4 or v.shape != k.shape or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{FN}: kv_shards[{i}] must hold k and v of one shape [B, T, Hkv, {q.shape[3]}], "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{FN}: kv_shards[{i}].{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{FN}: kv_shards[{i}].{name} must be on q's device {q.device}, got {x.device}")
    if table is not None and table.ndim != 2:
        raise ValueError(f"{FN}: kv_shards[{i}].page_table must have shape [B, N], got {list(table.shape)}")
    if plan.by != "request" and _rows(shard) != q.shape[0]:
        raise ValueError(f"{FN}: kv_shards[{i}] must have q's batch size {q.shape[0]}, got {_rows(shard)}")


def _check_heads(q: Tensor, shards: list[Shard], plan: SplitPlan) -> list[int]:
    found = [shard.k.shape[2] for shard in shards]
    if not sum(found) or q.shape[2] % sum(found):
        raise ValueError(
            f"{FN}: q's heads must be a multiple of the {sum(found)} KV heads of kv_shards, got {q.shape[2]}"
        )
    planned = list(plan.sizes or (b - a for a, b in plan.head_bounds(sum(found))))
    if found != planned:
        raise ValueError(f"{FN}: kv_shards must hold {planned} KV heads, as the plan says, got {found}")
    return found


def _check_rows(q: Tensor, shards: list[Shard]) -> list[int]:
    found = [_rows(shard) for shard in shards]
    if sum(found) != q.shape[0]:
        raise ValueError(f"{FN}: kv_shards must hold q's {q.shape[0]} rows in all, got {found}")
    return found
