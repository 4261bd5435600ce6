"""States merge, and a new key joins one, by C kernels for CPUs, with the signatures of the portable backend's."""

import torch
from torch import Tensor

from .module import ELEMENTS, call


def merge(
    outs: Tensor,
    lses: Tensor,
    factors: Tensor | None,
    indptr: Tensor | None,
    base2: bool,
    out: Tensor,
    lse: Tensor,
    out_scale: Tensor | None,
) -> None:
    """Merge `outs [N, M, H, D]`, `lses [N, M, H]` into `out`, `lse`; with `indptr` runs of entries, where `M` is 1."""
    o_n, o_m, o_h, _ = outs.stride()
    l_n, l_m, l_h = lses.stride()
    y_m, y_h, _ = out.stride()
    if indptr is not None:
        indptr, o_m, l_m = indptr.contiguous(), 0, 0
    factors = None if factors is None else factors.contiguous()
    call(
        "merge_states", outs, lses, factors, indptr, out, lse, out_scale, ELEMENTS[outs.dtype], ELEMENTS[out.dtype],
        base2, len(outs), *out.shape, o_n, o_m, o_h, l_n, l_m, l_h, y_m, y_h, *lse.stride(), torch.get_num_threads(),
    )  # fmt: skip


def append(
    out_prev: Tensor,
    lse_prev: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    base2: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """The key `k [M, Hkv, D]` of each query and its value join its state `out_prev [M, Hq, D]`, `lse_prev [M, Hq]`."""
    m, hq, d = q.shape
    strides = (x.stride()[:2] for x in (out_prev, lse_prev, q, k, v, out, lse))
    call(
        "append_token", out_prev, lse_prev, q, k, v, out, lse, ELEMENTS[out_prev.dtype], ELEMENTS[q.dtype],
        ELEMENTS[out.dtype], base2, m, hq, k.shape[1], d, *(s for pair in strides for s in pair), float(scale),
        torch.get_num_threads(),
    )  # fmt: skip
