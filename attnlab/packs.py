"""Packed sequences: every backend sees `[N, H, D]` and cumulative lengths; a batch is a pack of equal lengths."""

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pack(NamedTuple):
    """Cumulative lengths of a call."""

    cu_q: Tensor  # int32 [S+1]
    cu_k: Tensor
    max_k: int  # no sequence has more keys
    given: bool  # whether the user passed them, so their values need a check


def pack(fn: str, q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool) -> Pack:
    """Check shapes and dtypes of `cu_seqlens_*`, or make them up for a batch. Reads no values."""
    batch, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    if (cu_q is None) != (cu_k is None):
        raise ValueError(f"{fn}: cu_seqlens_q and cu_seqlens_k must be given together")
    if cu_q is None or cu_k is None:
        if causal and tq > tk:
            raise ValueError(f"{fn}: causal attention needs at least as many keys as queries, got Tq={tq}, Tk={tk}")
        steps = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
        return Pack(steps * tq, steps * tk, tk, False)
    if batch != 1:
        raise ValueError(f"{fn}: packed sequences need a batch size of 1, got {batch}")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
            raise TypeError(f"{fn}: {name} must be an int32 Tensor, got {getattr(cu, 'dtype', type(cu).__name__)}")
        if cu.ndim != 1 or cu.shape[0] < 2:
            raise ValueError(f"{fn}: {name} must have shape [sequences + 1], got {list(cu.shape)}")
        if cu.device != q.device:
            raise ValueError(f"{fn}: {name} must be on q's device {q.device}, got {cu.device}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"{fn}: cu_seqlens_k must have cu_seqlens_q's shape {list(cu_q.shape)}, got {list(cu_k.shape)}"
        )
    return Pack(cu_q, cu_k, tk, True)


def check_values(fn: str, cu_q: Tensor, cu_k: Tensor, nq: int, nk: int, causal: bool) -> None:
    """The values of user-given cumulative lengths. Runs inside the ops, so compiled callers are checked too.

    On a GPU this reads back once per tensor, not once per call (inference tensors, which cannot tell whether they
    changed, every time); under graph capture it is skipped.
    """
    facts = (nq, nk, causal)
    if capturing(cu_q) or unchanged(cu_q, (cu_k,), facts):
        return
    for name, cu, total in (("cu_seqlens_q", cu_q, nq), ("cu_seqlens_k", cu_k, nk)):
        values = cu.tolist()
        if values[0] != 0 or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{fn}: {name} must start at 0 and never fall, got {values}")
        if values[-1] != total:
            raise ValueError(f"{fn}: {name} must end at {total} (the number of tokens), got {values[-1]}")
    if causal and bool((cu_q.diff() > cu_k.diff()).any()):
        lengths = list(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True))
        raise ValueError(
            f"{fn}: causal attention needs at least as many keys as queries in every sequence, got {lengths}"
        )
    remember(cu_q, (cu_k,), facts)


def check_pages(fn: str, table: Tensor, lengths: Tensor, pages: int, size: int) -> None:
    """The entries of `table [B, N]` that rows of `lengths [B]` keys use name pages that exist."""
    used = torch.arange(table.shape[1], device=table.device) * size < lengths[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    if bool(wrong.any()):
        b, n = divmod(int(wrong.flatten().int().argmax()), table.shape[1])
        raise ValueError(f"{fn}: page_table[{b}, {n}] must be in 0..{pages - 1}, got {int(table[b, n])}")


def capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def remember(x: Tensor, others: tuple[Tensor, ...], facts: tuple[Any, ...]) -> None:
    """Note on `x` that its values passed a check against those of `others` and `facts`."""
    if not any(t.is_inference() for t in (x, *others)):
        stamp = tuple(t._version for t in (x, *others)), facts
        x._attnlab_checked = tuple(weakref.ref(t) for t in others), stamp  # type: ignore[attr-defined]


def unchanged(x: Tensor, others: tuple[Tensor, ...], facts: tuple[Any, ...]) -> bool:
    """Whether `remember` noted the same, and none of the tensors changed since (which inference ones cannot tell)."""
    refs, stamp = getattr(x, "_attnlab_checked", ((), None))
    if stamp is None or any(t.is_inference() for t in (x, *others)):
        return False
    same = stamp == (tuple(t._version for t in (x, *others)), facts)
    return same and all(ref() is t for ref, t in zip(refs, others, strict=True))


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(tensor, ...)` with autocast off: its products keep the inputs' dtype, and its sums float32."""

    @functools.wraps(fn)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)

    return call
