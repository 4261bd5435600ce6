"""Attention of new tokens over the keys before them, as states: what each shard of a split attention computes."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    Call,
    Reasons,
    check_int,
    check_integers,
    check_qkv,
    check_scale,
    cpu_reasons,
    kernels,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from ..kernels.lamina.spec import Cache
from ..packs import capturing, check_pages, remember, unchanged, without_autocast
from ..reference import lamina as reference

State = tuple[Tensor, Tensor]

BACKENDS: dict[str, Reasons] = {
    "triton": triton_reasons,
    "cpu": cpu_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}
MODULES = {"triton": "lamina.launch", "cpu": "cpu.lamina", "portable": "lamina.portable"}


def split_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> State:
    """Attention of each row's queries over all keys of its row, which many programs share (flash-decoding).

    The keys are those of tokens before the queries: there is no causal mask. Lamina's attention over previous tokens
    (arXiv 2405.01814); states of disjoint shards of heads, rows or tokens join into the whole with `merge_states`.

    Args:
        q: `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only); few queries a row, as in
            a decode step, are what it is made for. Autocast casts nothing.
        k, v: `[B, Tk, Hkv, D]`, `Hq % Hkv == 0`; heads are never copied. Strides are free as long as the last dimension
            is dense: a `[B, H, T, D]` cache, transposed, is read where it lies. With `page_table`
            `[pages, page_size, Hkv, D]`.
        lengths: `[B]` int32, how many keys each row has (needed with `page_table`; by default all `Tk`). 0 is a row
            without keys. Others are not read and may be NaN. Values are checked once per tensor (a GPU is waited for).
        page_table: `[B, N]` int32: key `j` of row `b` lies in page `page_table[b, j // page_size]` at
            `j % page_size`. Entries past a row's length are not read.
        scale: multiplies the scores; `D ** -0.5` by default.
        splits: how many programs share a row's keys at most. By default the shape decides, never the values.
        out_dtype: q's dtype by default, or float32, which keeps a state exact until it is merged.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` (C) or `"triton"`.

    Returns:
        `out [B, Tq, Hq, D]` in `out_dtype` and `lse [B, Tq, Hq]` float32, natural log; 0, -inf in rows without keys.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; tensors that require a gradient.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "split_decode"
    scale, dtype = check_call(fn, q, k, v, lengths, page_table, scale, splits, out_dtype)
    check_no_gradient(fn, q=q, k=k, v=v)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    if name == "reference":
        check_values(fn, k, lengths, page_table)
        return without_autocast(reference.split_decode)(
            q, k, v, lengths=lengths, page_table=page_table, scale=scale, out_dtype=dtype
        )
    return _decode(q, k, v, lengths, page_table, scale, splits, dtype, name)


def shared_prefix_decode(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> State:
    """`split_decode` where all rows begin with the same tokens, whose keys are read once for all of them (cascade).

    Args:
        k_prefix, v_prefix: `[T, Hkv, D]`, the keys and values every query of every row sees.
        q, k, v, lengths, page_table, scale, splits, out_dtype, backend: as `split_decode`; k and v hold each row's own
            tokens after the prefix. At most `splits` programs share the prefix, and as many a row's own keys.

    Returns:
        `out [B, Tq, Hq, D]` and `lse [B, Tq, Hq]`, as `split_decode` over the prefix and the row's own keys together.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; tensors that require a gradient.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "shared_prefix_decode"
    scale, dtype = check_call(fn, q, k, v, lengths, page_table, scale, splits, out_dtype)
    for name, x in (("k_prefix", k_prefix), ("v_prefix", v_prefix)):
        _check_prefix(fn, name, x, k)
    if k_prefix.shape != v_prefix.shape:
        raise ValueError(
            f"{fn}: v_prefix must have k_prefix's shape {list(k_prefix.shape)}, got {list(v_prefix.shape)}"
        )
    check_no_gradient(fn, q=q, k_prefix=k_prefix, v_prefix=v_prefix, k=k, v=v)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    if name == "reference":
        check_values(fn, k, lengths, page_table)
        return without_autocast(reference.shared_prefix_decode)(
            q, k_prefix, v_prefix, k, v, lengths=lengths, page_table=page_table, scale=scale, out_dtype=dtype
        )
    return _prefix_decode(q, k_prefix, v_prefix, k, v, lengths, page_table, scale, splits, dtype, name)


def check_call(
    fn: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    scale: float | None,
    splits: int | None,
    out_dtype: torch.dtype | None,
) -> tuple[float, torch.dtype]:
    """What both functions take, values of tensors apart. Returns the scale and the dtype of `out`."""
    check_qkv(fn, q, k, v, paged=table is not None)
    if lengths is not None:
        check_integers(fn, "lengths", lengths, q, (torch.int32,), q.shape[:1])
    if table is not None:
        if lengths is None:
            raise ValueError(f"{fn}: page_table needs lengths, the number of keys of each row")
        wide = table.shape[-1] if isinstance(table, Tensor) and table.ndim else 0
        check_integers(fn, "page_table", table, q, (torch.int32,), (q.shape[0], wide))
        if k.shape[1] == 0:
            raise ValueError(f"{fn}: k must have a page_size of at least 1, got {list(k.shape)}")
    if splits is not None:
        check_int(fn, "splits", splits, 1)
    exact = torch.promote_types(q.dtype, torch.float32)
    if out_dtype not in (None, q.dtype, exact):
        kinds = " or ".join(map(str, dict.fromkeys((q.dtype, exact))))
        raise TypeError(f"{fn}: out_dtype must be {kinds} with q of {q.dtype}, got {out_dtype!r}")
    return check_scale(fn, scale, q.shape[3]), out_dtype or q.dtype


def _check_prefix(fn: str, name: str, x: Any, k: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{fn}: {name} must be a Tensor, got {type(x).__name__}")
    if x.ndim != 3 or x.shape[1:] != k.shape[2:]:
        raise ValueError(f"{fn}: {name} must have shape [T, {k.shape[2]}, {k.shape[3]}], got {list(x.shape)}")
    if x.dtype != k.dtype:
        raise TypeError(f"{fn}: {name} must have q's dtype {k.dtype}, got {x.dtype}")
    if x.device != k.device:
        raise ValueError(f"{fn}: {name} must be on q's device {k.device}, got {x.device}")


def check_no_gradient(fn: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{fn}: {name} must not require a gradient: decode under torch.no_grad()")


def check_values(fn: str, k: Tensor, lengths: Tensor | None, table: Tensor | None) -> None:
    """What tensors hold. Runs inside the ops, so compiled callers are checked too; once until one of them changes."""
    if lengths is None:
        return
    others = () if table is None else (table,)
    capacity = k.shape[1] if table is None else table.shape[1] * k.shape[1]
    facts = (capacity, None if table is None else k.shape[0])
    if capturing(lengths) or lengths.numel() == 0 or unchanged(lengths, others, facts):
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > capacity:
        raise ValueError(f"{fn}: lengths must be in 0..{capacity} (the room of a row), got {lengths.tolist()}")
    if table is not None:
        check_pages(fn, table, lengths, k.shape[0], k.shape[1])
    remember(lengths, others, facts)


def cache_of(k: Tensor, v: Tensor, lengths: Tensor | None, table: Tensor | None) -> Cache:
    if lengths is None:
        lengths = torch.full(k.shape[:1], k.shape[1], dtype=torch.int32, device=k.device)
    return Cache(k, v, table, lengths)


def _like(q: Tensor, dtype: torch.dtype) -> State:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape, dtype=dtype), lse


@torch.library.custom_op("attnlab::split_decode", mutates_args=())
@without_autocast
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    scale: float,
    splits: int | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_values("split_decode", k, lengths, table)
    return kernels(MODULES[backend]).decode(q, cache_of(k, v, lengths, table), scale, splits, dtype)


@_decode.register_fake
def _(q: Tensor, *rest: Any) -> State:
    return _like(q, rest[-2])


@torch.library.custom_op("attnlab::shared_prefix_decode", mutates_args=())
@without_autocast
def _prefix_decode(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    scale: float,
    splits: int | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_values("shared_prefix_decode", k, lengths, table)
    cache = cache_of(k, v, lengths, table)
    return kernels(MODULES[backend]).prefix_decode(q, k_prefix, v_prefix, cache, scale, splits, dtype)


@_prefix_decode.register_fake
def _(q: Tensor, *rest: Any) -> State:
    return _like(q, rest[-2])
