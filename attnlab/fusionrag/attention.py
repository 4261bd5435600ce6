"""Exact causal attention of some tokens' queries over a cache of all keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import (
    Call,
    Reasons,
    check_bool,
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
from ..kernels.fusionrag.spec import Keys, request_of
from ..packs import Pack, capturing, check_pages, check_values, pack, remember, unchanged, without_autocast
from ..reference import fusionrag as reference
from ..rope import DynamicScaling, RopeConfig

FN = "selective_attention"
BACKENDS: dict[str, Reasons] = {
    "triton": triton_reasons,
    "cpu": cpu_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}
MODULES = {"triton": "fusionrag.launch", "cpu": "cpu.fusionrag", "portable": "fusionrag.portable"}


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    shift: Tensor | None = None,
    rope: RopeConfig | None = None,
    scale: float | None = None,
    mask: str = "exact",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of gathered query rows: row `i` sees the keys at or before its own position, in one softmax.

    What FusionRAG's recompute asks for (arXiv 2601.12904, online stage): each token at its true position.

    Args:
        q: `[B, nnz, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only). Autocast casts nothing.
        k, v: `[B, Tk, Hkv, D]`, `Hq % Hkv == 0`; heads are never copied. With `page_table`
            `[pages, page_size, Hkv, D]`.
        positions: `[B, nnz]` int32 or int64, in any order, repeats allowed: row `i` sees keys `0..positions[i]`. -1 is
            a row without keys, the padding of ragged batches. Values are checked once per tensor (a GPU is waited for).
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32, for `S` requests packed along `nnz` and `Tk` with `B == 1`.
            Positions count from each request's first key.
        page_table: `[B, N]` int32: key `j` of row `b` lies in page `page_table[b, j // page_size]` at
            `j % page_size`. Pages of one key make it a table of slots. Entries past a row's length are not read.
        lengths: `[B]` int32, how many keys each row has (needed with `page_table`; by default all `Tk`). Others are not
            read and may be NaN.
        shift: `[B, W]` of an integer dtype, `W` at least the longest length (`[1, Tk]` for packs): key `j` is moved by
            `shift[b, j]` positions while it is loaded, as `rope` turns it: one stored chunk serves several places.
        rope: the `RopeConfig` of `shift`, without dynamic scaling.
        scale: multiplies the scores; `D ** -0.5` by default.
        mask: `"exact"`, or `"bottom_right"`, which takes row `i` of `n` to be at position `length - n + i`, as a causal
            mask over the shortened query does: wrong, and here to measure the damage (see `future_share`).
        return_lse: also return the lse, differentiable.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` (C, compiled on first use) or `"triton"`. Gradients are
            the portable backend's, the reference's apart; with a `page_table` there are none.

    Returns:
        `out [B, nnz, Hq, D]` in q's dtype, and `lse [B, nnz, Hq]` float32 if asked for; 0, -inf for rows without keys.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.
    """
    check_qkv(FN, q, k, v, paged=page_table is not None)
    check_bool(FN, "return_lse", return_lse)
    if mask not in ("exact", "bottom_right"):
        raise ValueError(f"{FN}: mask must be 'exact' or 'bottom_right', got {mask!r}")
    scale = check_scale(FN, scale, q.shape[3])
    check_integers(FN, "positions", positions, q, (torch.int32, torch.int64), q.shape[:2])
    cu = pack(FN, q, k, cu_seqlens_q, cu_seqlens_k, False)
    capacity = _check_layout(q, k, v, cu, page_table, lengths)
    width = _check_shift(shift, rope, q, capacity, cu.given, lengths is None)
    name = pick(Call(FN, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    if name == "reference":
        _check_values(positions, cu.cu_q, cu.cu_k, page_table, lengths, len(k), capacity, width, cu.given)
        out, lse = without_autocast(reference.selective_attention)(
            q, k, v, positions, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, page_table=page_table,
            lengths=lengths, shift=shift, scale=scale, mask=mask,
            frequencies=() if rope is None else rope.inverse_frequencies(dtype=torch.float64).tolist(),
            interleaved=rope is not None and rope.interleaved,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    cos, sin = _turns(shift, rope, q.dtype, None if page_table is not None else capacity)
    if page_table is None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    out, lse = _selective(
        q.flatten(0, 1), k, v, positions, cu.cu_q, cu.cu_k, page_table, lengths, cos, sin, capacity, width,
        rope is not None and rope.interleaved, scale, mask == "bottom_right", cu.given, name,
    )  # fmt: skip
    out, lse = out.view(q.shape), lse.view(q.shape[:3])
    return (out, lse) if return_lse else out


def future_share(positions: Tensor, length: int) -> float:
    """The share of what rows attend under `mask="bottom_right"` that lies after their own position.

    `positions [nnz]` or `[B, nnz]`, int32 or int64, -1 for no row, of requests with `length` keys each. Exact; 0 where
    nothing is attended. Raises TypeError and ValueError as `selective_attention` does.
    """
    fn = "future_share"
    if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
        came = getattr(positions, "dtype", type(positions).__name__)
        raise TypeError(f"{fn}: positions must be an int32 or int64 Tensor, got {came}")
    if positions.ndim not in (1, 2):
        raise ValueError(f"{fn}: positions must have shape [nnz] or [B, nnz], got {list(positions.shape)}")
    check_int(fn, "length", length, 0)
    if positions.numel() and not -1 <= int(positions.min()) <= int(positions.max()) < length:
        low, high = int(positions.min()), int(positions.max())
        raise ValueError(f"{fn}: positions must be -1 or in 0..{length - 1}, got values in {low}..{high}")
    rows = (positions if positions.ndim == 2 else positions[None]).long()
    cu_q = torch.arange(len(rows) + 1, device=rows.device) * rows.shape[1]
    taken = _bottom_right(rows.flatten(), cu_q, torch.full_like(cu_q[1:], length))
    pairs = int((taken + 1).sum())
    return int((taken - rows.flatten()).clamp(min=0).sum()) / pairs if pairs else 0.0


def _check_layout(q: Tensor, k: Tensor, v: Tensor, cu: Pack, table: Tensor | None, lengths: Tensor | None) -> int:
    """How many keys a row, or a pack, has room for."""
    for name, x in (("page_table", table), ("lengths", lengths)):
        if cu.given and x is not None:
            raise ValueError(f"{FN}: {name} and cu_seqlens_k exclude each other: packs are contiguous")
    if lengths is not None:
        check_integers(FN, "lengths", lengths, q, (torch.int32,), q.shape[:1])
    if table is None:
        return k.shape[1]
    if lengths is None:
        raise ValueError(f"{FN}: page_table needs lengths, the number of keys of each row")
    wide = table.shape[-1] if isinstance(table, Tensor) and table.ndim else 0
    check_integers(FN, "page_table", table, q, (torch.int32,), torch.Size((q.shape[0], wide)))
    if k.shape[1] == 0:
        raise ValueError(f"{FN}: k must have a page_size of at least 1, got {list(k.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(f"{FN}: with a page_table there are no gradients: call it under torch.no_grad()")
    return wide * k.shape[1]


def _check_shift(shift: Any, rope: Any, q: Tensor, capacity: int, packed: bool, full: bool) -> int:
    """How many keys of a row the shift covers; all of them without one."""
    if (shift is None) != (rope is None):
        raise ValueError(f"{FN}: shift and rope must be given together")
    if shift is None:
        return capacity
    if not isinstance(rope, RopeConfig):
        raise TypeError(f"{FN}: rope must be a RopeConfig, got {type(rope).__name__}")
    if isinstance(rope.scaling, DynamicScaling):
        raise ValueError(f"{FN}: rope must not scale dynamically: its keys' angles change with the length")
    if rope.head_dim != q.shape[3]:
        raise ValueError(f"{FN}: rope must have q's head size {q.shape[3]}, got head_dim={rope.head_dim}")
    wide = shift.shape[-1] if isinstance(shift, Tensor) and shift.ndim else 0
    integers = (torch.int32, torch.int64)
    check_integers(FN, "shift", shift, q, integers, torch.Size((q.shape[0], capacity if packed else wide)))
    if full and wide < capacity:
        raise ValueError(f"{FN}: shift must cover the {capacity} keys of a row, got {list(shift.shape)}")
    return wide


def _check_values(
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    pages: int,
    capacity: int,
    width: int,
    packed: bool,
) -> None:
    """What tensors hold. Runs inside the op, so compiled callers are checked too; once until one of them changes."""
    if packed:
        check_values(FN, cu_q, cu_k, positions.shape[1], capacity, False)
    others = (cu_q, cu_k) if packed else tuple(x for x in (table, lengths) if x is not None)
    facts = (tuple(positions.shape), pages, capacity, width, table is None, lengths is None)
    if capturing(positions) or unchanged(positions, others, facts):
        return
    if lengths is not None and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > capacity:
            raise ValueError(f"{FN}: lengths must be in 0..{capacity} (the room of a row), got {lengths.tolist()}")
        if high > width:
            raise ValueError(f"{FN}: shift must cover the longest row's {high} keys, got {width}")
        if table is not None:
            check_pages(FN, table, lengths, pages, capacity // max(1, table.shape[1]))
    counts = cu_k.diff() if lengths is None else lengths
    flat = positions.flatten()
    bound = counts.repeat_interleave(cu_q.diff().long())
    wrong = (flat < -1) | (flat >= bound)
    if bool(wrong.any()):
        i = int(wrong.int().argmax())
        at = list(divmod(i, positions.shape[1]))
        raise ValueError(
            f"{FN}: positions{at} must be -1 or below its row's length {int(bound[i])}, got {int(flat[i])}"
        )
    remember(positions, others, facts)


def _turns(
    shift: Tensor | None, rope: RopeConfig | None, dtype: torch.dtype, room: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin `[rows, rotary_dim // 2]` of every key's turn, cut or padded to the `room` of a row of keys."""
    if shift is None or rope is None:
        return None, None
    if room is not None:
        shift = F.pad(shift, (0, room - shift.shape[1]))
    dtype = torch.promote_types(dtype, torch.float32)
    angles = shift.flatten().to(dtype)[:, None] * rope.inverse_frequencies(device=shift.device, dtype=dtype)
    return angles.cos(), angles.sin()


def _keys(
    k: Tensor,
    v: Tensor,
    cu_k: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Keys:
    if table is None or lengths is None:
        return Keys(k, v, None, cu_k[:-1].long(), cu_k.diff() if lengths is None else lengths, cos, sin, interleaved)
    wide = 0 if cos is None else len(cos) // max(1, len(table))
    starts = torch.arange(len(table), device=table.device) * wide
    return Keys(k, v, table, starts, lengths, cos, sin, interleaved)


def _rows(positions: Tensor, cu_q: Tensor, lengths: Tensor, shortcut: bool) -> Tensor:
    """Positions as the kernels read them, int32 `[Nq]`."""
    flat = positions.flatten()
    return (_bottom_right(flat, cu_q, lengths) if shortcut else flat).to(torch.int32)


def _bottom_right(positions: Tensor, cu_q: Tensor, lengths: Tensor) -> Tensor:
    """Where a causal mask aligned with the last key takes the rows of each request to be; -1 stays -1."""
    real = positions >= 0
    before = F.pad(real.cumsum(0), (1, 0))
    request = request_of(cu_q, len(positions))
    last = before[cu_q[1:].long()][request]
    return torch.where(real, before[:-1] - last + lengths[request], -1).clamp(min=-1)


@torch.library.custom_op("attnlab::selective_attention", mutates_args=())
@without_autocast
def _selective(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    capacity: int,
    width: int,
    interleaved: bool,
    scale: float,
    shortcut: bool,
    given: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_values(positions, cu_q, cu_k, table, lengths, len(k), capacity, width, given)
    keys = _keys(k, v, cu_k, table, lengths, cos, sin, interleaved)
    return kernels(MODULES[backend]).forward(q, keys, _rows(positions, cu_q, keys.lengths, shortcut), cu_q, scale)


@_selective.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("attnlab::selective_attention_backward", mutates_args=())
@without_autocast
def _selective_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    scale: float,
    shortcut: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = _keys(k, v, cu_k, None, lengths, cos, sin, interleaved)
    rows = _rows(positions, cu_q, keys.lengths, shortcut)
    return kernels(MODULES["portable"]).backward(dout, dlse, q, keys, out, lse, rows, cu_q, scale)


@_selective_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, positions, cu_q, cu_k, _, lengths, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, positions, cu_q, cu_k, lengths, cos, sin)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, *rest = ctx.saved_tensors
    _, _, interleaved, scale, shortcut, _, _ = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    return *_selective_backward(dout, dlse, q, k, v, out, lse, *rest, interleaved, scale, shortcut), *[None] * 14


_selective.register_autograd(_autograd, setup_context=_setup)
