"""MoBA attention of the newest tokens over a `MoBACache`: decode steps, and prefill in chunks."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .dispatch import (
    Call,
    Reasons,
    check_bool,
    check_int,
    check_scale,
    check_sinks,
    cpu_reasons,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from .kernels.moba.spec import Slots, Spec, slots
from .moba import WORKSPACE_BYTES, moba_attention
from .moba_cache import MoBACache, token_counts
from .packs import without_autocast

DECODE_QUERIES = 16  # up to this many new tokens a row run as rows of the decode kernel, more as a prefill
BACKENDS: dict[str, Reasons] = {
    "triton": triton_reasons,
    "cpu": cpu_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}


def moba_decode(
    q: Tensor,
    cache: MoBACache,
    *,
    topk: int,
    scale: float | None = None,
    routing: str = "head",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    sinks: Tensor | None = None,
    q_lengths: Sequence[int] | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA attention of each row's newest tokens over a cache that already holds their keys and values.

    Routes and computes as those rows of `moba_attention` over the whole sequence would, in any chunking. No gradient.

    Args:
        q: `[B, Tq, Hq, D]` in the cache's dtype: the last `Tq` tokens of each row, `Tq = 1` in a decode step.
        cache: the block size is its own.
        topk, scale, routing, sink_blocks, local_blocks, sinks: as `moba_attention`.
        q_lengths: `B` ints, for a ragged chunk: row `b`'s queries are its first `q_lengths[b]`, as in `append`.
        return_lse: also return the lse.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` or `"triton"`.

    Returns:
        `out [B, Tq, Hq, D]`, and `lse [B, Tq, Hq]` float32 if asked for. Queries past `q_lengths`, or in a row's left
        padding, are rows without keys: out 0, lse -inf (the sink's logit with `sinks`).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; q that requires a gradient.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "moba_decode"
    _check_query(fn, q, cache)
    check_int(fn, "topk", topk, 1)
    if routing not in ("head", "group"):
        raise ValueError(f"{fn}: routing must be 'head' or 'group', got {routing!r}")
    check_int(fn, "sink_blocks", sink_blocks, 0)
    check_int(fn, "local_blocks", local_blocks, 0)
    check_sinks(fn, sinks, q)
    check_bool(fn, "return_lse", return_lse)
    scale = check_scale(fn, scale, q.shape[3])
    counts = None if q_lengths is None else token_counts(fn, "q_lengths", q_lengths, cache.batch, q.shape[1])
    # A compiled decode step must not be traced again for every length: the host's mirror stays out of its graph.
    if not torch.compiler.is_compiling() or q.shape[1] > 1:
        _check_held(fn, q.shape[1], counts, cache)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    if q.shape[1] > DECODE_QUERIES:
        attend = partial(
            moba_attention, block_size=cache.block_size, topk=topk, scale=scale, routing=routing, sinks=sinks,
            sink_blocks=sink_blocks, local_blocks=local_blocks, return_lse=True, backend=backend,
        )  # fmt: skip
        out, lse = _prefill(attend, q, cache, counts, sinks)
    else:
        ragged = None if counts is None else torch.tensor(counts, dtype=torch.int32).to(q.device)
        group = routing == "group"
        out, lse = torch.ops.attnlab.moba_decode(
            q, cache.k_pages, cache.v_pages, cache.table, cache.sums, cache.device_lengths, ragged, cache.starts,
            sinks, cache.block_size, topk, scale, group, sink_blocks, local_blocks, cache.capacity, name,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_query(fn: str, q: Tensor, cache: MoBACache) -> None:
    if not isinstance(cache, MoBACache):
        raise TypeError(f"{fn}: cache must be a MoBACache, got {type(cache).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"{fn}: q must be a Tensor, got {type(q).__name__}")
    heads, dim = cache.k_pages.shape[2:]
    if q.ndim != 4 or q.shape[0] != cache.batch or q.shape[3] != dim:
        raise ValueError(f"{fn}: q must have shape [{cache.batch}, Tq, Hq, {dim}], got {list(q.shape)}")
    if q.shape[2] == 0 or q.shape[2] % heads:
        raise ValueError(f"{fn}: q's heads must be a multiple of the cache's heads {heads}, got {q.shape[2]}")
    if q.dtype != cache.k_pages.dtype:
        raise TypeError(f"{fn}: q must have the cache's dtype {cache.k_pages.dtype}, got {q.dtype}")
    if q.device != cache.k_pages.device:
        raise ValueError(f"{fn}: q must be on the cache's device {cache.k_pages.device}, got {q.device}")
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{fn}: q must not require a gradient: decode under torch.no_grad()")


def _check_held(fn: str, tokens: int, counts: list[int] | None, cache: MoBACache) -> None:
    """Queries are tokens the cache holds; in front of a row's first one only its left padding may be asked about."""
    if counts is not None and cache.starts is not None:
        raise ValueError(f"{fn}: q_lengths needs a cache without starts")
    asked = [tokens] * cache.batch if counts is None else counts
    held = [cache._cursor] * cache.batch if cache.starts is not None else cache._lengths
    for b, (n, have) in enumerate(zip(asked, held, strict=True)):
        if n > have:
            raise ValueError(f"{fn}: q holds {n} tokens of row {b}, the cache {have}: append their keys first")


def _prefill(
    attend: Callable[..., Any], q: Tensor, cache: MoBACache, counts: list[int] | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many new tokens: `moba_attention` on the cached keys, as a batch where rows are alike, else as a pack."""
    lengths, tokens = cache.lengths, q.shape[1]
    if cache.page_size is None and cache.starts is None and counts is None and len(set(lengths)) == 1:
        return attend(q, *(x[:, : lengths[0]] for x in (cache.k_pages, cache.v_pages)))
    used = [min(n, have) for n, have in zip(counts or [tokens] * cache.batch, lengths, strict=True)]
    # Right-padded chunks begin with their queries, left-padded ones end with them.
    begin = [0 if counts is not None else tokens - n for n in used]
    parts = [slice(i, i + n) for i, n in zip(begin, used, strict=True)]
    k, v = (torch.cat([read(b) for b in range(cache.batch)])[None] for read in (cache.keys, cache.values))
    cu_q, cu_k = (torch.tensor([0, *accumulate(x)], dtype=torch.int32).to(q.device) for x in (used, lengths))
    packed = torch.cat([q[b, part] for b, part in enumerate(parts)])[None]
    some, some_lse = attend(packed, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    out, lse = torch.zeros_like(q), some_lse.new_full(q.shape[:3], -torch.inf)
    if sinks is not None:
        lse[:] = sinks
    for b, (o, s) in enumerate(zip(some[0].split(used), some_lse[0].split(used), strict=True)):
        out[b, parts[b]], lse[b, parts[b]] = o, s
    return out, lse


def _kernel(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    if backend == "reference":
        return _reference
    if backend == "portable":
        from .kernels.moba.decode_portable import decode as portable

        return portable
    if backend == "cpu":
        from .kernels.cpu.moba import decode as native

        return native
    from .kernels.moba.decode import decode

    return decode


@torch.library.custom_op("attnlab::moba_decode", mutates_args=())
@without_autocast
def _decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    sums: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    starts: Tensor | None,
    sinks: Tensor | None,
    block_size: int,
    topk: int,
    scale: float,
    group: bool,
    sink_blocks: int,
    local_blocks: int,
    capacity: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens = q.shape[:2]
    spec = Spec(block_size, topk, True, scale, group, sink_blocks, local_blocks, WORKSPACE_BYTES)
    rows = torch.arange(batch, device=q.device, dtype=torch.int32)
    if tokens != 1 or q_lengths is not None:
        step = torch.arange(tokens, device=q.device, dtype=torch.int32)
        count = torch.full_like(lengths, tokens) if q_lengths is None else q_lengths
        lengths = (lengths - count)[:, None] + step + 1
        lengths = lengths.masked_fill(step >= count[:, None], 0).clamp(min=0).flatten()
        rows = rows.repeat_interleave(tokens)
    args = (k_pages, v_pages, table, sums, rows, lengths, starts, sinks, spec, slots(spec, capacity))
    out, lse = _kernel(backend)(q.flatten(0, 1), *args)[:2]
    return out.view(q.shape), lse.view(q.shape[:3])


@_decode.register_fake
def _(q: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    sums: Tensor,
    rows: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    spec: Spec,
    nslots: Slots,
) -> tuple[Tensor, Tensor]:
    """Each query by the reference over its row's keys; the sums stay unread, so they are tested too."""
    from .reference.moba import moba_attention

    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    lse += -torch.inf if sinks is None else sinks
    attend = partial(
        moba_attention, block_size=spec.block_size, topk=spec.topk, scale=spec.scale, sinks=sinks,
        routing="group" if spec.group else "head", sink_blocks=spec.sink_blocks, local_blocks=spec.local_blocks,
    )  # fmt: skip
    for r, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length:
            first = 0 if starts is None else int(starts[row])
            k, v = (x[table[row].long()].flatten(0, 1)[None, first : first + length] for x in (k_pages, v_pages))
            o, s = attend(q[r][None, None], k, v)
            out[r], lse[r] = o[0, 0], s[0, 0]
    return out, lse
