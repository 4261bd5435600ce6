"""A gate's choice of blocks as users see it, and the checks of one that is handed back to be replayed."""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.moba.spec import Spec, geometry, slots
from .packs import Pack, capturing, remember, unchanged

_CHUNK = 1 << 22  # choices sorted at once


class MoBASelection(NamedTuple):
    """Which blocks each query attends.

    `indices [B, Tq, H, slots]` int32: block numbers local to the sequence, `-1` for an unused slot. Slots hold the own
    block (causal only), the sink blocks, the local blocks, then the gate's choices by falling score; `H` is the query
    heads, or the KV heads under `routing="group"`. `scores`, same shape, float32: `q . centroid`, `+inf` for a block
    chosen by rule, `-inf` for an unused slot.
    """

    indices: Tensor
    scores: Tensor


def check_selection(fn: str, selection: MoBASelection, q: Tensor, k: Tensor, spec: Spec, cu: Pack) -> Tensor:
    """The indices of a selection that fits the call. Reads no values."""
    if not isinstance(selection, MoBASelection):
        raise TypeError(f"{fn}: selection must be a MoBASelection, got {type(selection).__name__}")
    indices = selection.indices
    if not isinstance(indices, Tensor) or indices.dtype != torch.int32:
        got = getattr(indices, "dtype", type(indices).__name__)
        raise TypeError(f"{fn}: selection.indices must be an int32 Tensor, got {got}")
    expected = [*q.shape[:2], k.shape[2] if spec.group else q.shape[2], slots(spec, cu.max_k).total]
    if list(indices.shape) != expected:
        raise ValueError(f"{fn}: selection.indices must have shape {expected}, got {list(indices.shape)}")
    if indices.device != q.device:
        raise ValueError(f"{fn}: selection.indices must be on q's device {q.device}, got {indices.device}")
    return indices


def check_choices(fn: str, indices: Tensor, cu_q: Tensor, cu_k: Tensor, nk: int, spec: Spec, given: bool) -> None:
    """The values of `indices [B, Tq, H, slots]`: kernels would attend a block twice that a row names twice.

    Runs inside the op, after `check_values`, and as often: on a GPU it reads back once per tensor, see there.
    """
    held, facts = (cu_q, cu_k) if given else (), (spec.block_size, spec.causal, len(cu_q), nk)
    if capturing(indices) or unchanged(indices, held, facts):
        return
    rows = indices.flatten(0, 1)
    geo = geometry(cu_q, cu_k, len(rows), nk, spec.block_size)
    # Causal: the own block, which bounds the others. Else: how many blocks there are.
    limit = geo.query_pos // spec.block_size if spec.causal else geo.cu_blocks.diff()[geo.query_seq]
    wrong = torch.empty(rows.shape[:2], dtype=torch.bool, device=rows.device)
    step = max(_CHUNK // max(rows[0].numel(), 1), 1) if len(rows) else 1
    for part in (slice(i, i + step) for i in range(0, len(rows), step)):
        chosen, bound = rows[part], limit[part, None, None]
        ordered = chosen.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        outside = chosen[..., 1 if spec.causal else 0 :] >= bound
        wrong[part] = twice.any(-1) | outside.any(-1)
        if spec.causal:
            wrong[part] |= chosen[..., 0] != bound[..., 0]
    if wrong.any():
        t, head = wrong.nonzero()[0].tolist()
        at, found = [*divmod(t, indices.shape[1]), head], rows[t, head].tolist()
        rule = f"its own block {limit[t]}, then earlier ones" if spec.causal else f"blocks below {limit[t]}"
        raise ValueError(f"{fn}: selection.indices{at} must be {rule}, each once, or -1, got {found}")
    remember(indices, held, facts)
