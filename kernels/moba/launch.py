"""MoBA from GPU kernels: centroids, gate, layout and attention, in the order a call needs them.

The functions match `portable.py` and take one more argument: `backend="triton"`, or `"cuda"` for a gate and a layout in
CUDA C++ with the rest in Triton.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backward import backward_stages, preprocess
from .centroids import centroids
from .forward import finish, gathered
from .layout import segment
from .spec import Geometry, Slots, Spec, geometry


def select(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: Spec,
    nslots: Slots,
    backend: str = "triton",
    want_scores: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Indices int32 and, if wanted, scores float32, `[Nq, Hr, slots]`."""
    with torch.cuda.device_of(q):
        geo = geometry(cu_q, cu_k, q.shape[0], k.shape[0], spec.block_size)
        return _choose(_rows(q), _rows(k), geo, spec, nslots, want_scores, backend)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, indices: Tensor | None, cu_q: Tensor, cu_k: Tensor,
    spec: Spec, nslots: Slots, backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`out [Nq, Hq, D]`, `lse [Nq, Hq]` float32 and the indices used: those given, or chosen here."""
    with torch.cuda.device_of(q):
        q, k, v = _rows(q), _rows(k), _rows(v)
        geo = geometry(cu_q, cu_k, q.shape[0], k.shape[0], spec.block_size)
        if indices is None:
            indices, _ = _choose(q, k, geo, spec, nslots, False, backend)
        else:
            indices, nslots = indices.contiguous(), _replayed(indices, nslots)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        layout, hkv = _layout(backend), k.shape[1]
        step = queries_at_once(q, hkv, indices.shape[1], spec, nslots)
        for start in range(0, q.shape[0], step):
            end = min(start + step, q.shape[0])
            rows, part_geo = slice(start, end), segment(geo, start, end)
            if nslots.total > nslots.own:
                pairs, offsets = layout(indices, geo, spec, hkv, start, end)
            else:
                pairs, offsets = indices.new_empty(0), indices.new_zeros(1)
            part, part_lse = gathered(q[rows], k, v, pairs, offsets, part_geo, spec, nslots)
            finish(q[rows], k, v, sinks, indices[rows], part, part_lse, out[rows], lse[rows], part_geo, spec, nslots)
        return out, lse, indices


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor,
    indices: Tensor, cu_q: Tensor, cu_k: Tensor, spec: Spec, nslots: Slots, backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, if there are any, sinks."""
    with torch.cuda.device_of(q):
        q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
        geo = geometry(cu_q, cu_k, q.shape[0], k.shape[0], spec.block_size)
        delta = preprocess(dout, out, dlse)
        nslots = _replayed(indices, nslots)
        dq, dk, dv = backward_stages(dout, delta, q, k, v, lse, indices, geo, spec, nslots, _layout(backend))
        if sinks is None:
            return dq, dk, dv, None
        share = torch.exp(sinks.float() - lse).masked_fill(lse == -torch.inf, 0.0)
        return dq, dk, dv, -(share * delta).sum(0).to(sinks.dtype)


def queries_at_once(q: Tensor, hkv: int, hr: int, spec: Spec, nslots: Slots) -> int:
    """How many queries' partial results and lists fit in `spec.workspace_bytes` and int32; at least one."""
    (nq, hq, dim), places = q.shape, nslots.total - nslots.own
    if not places:
        return max(nq, 1)
    each = hq * places * (dim * q.element_size() + 4) + 4 * (hr * nslots.total + hkv)
    fit = min(spec.workspace_bytes // each, (2**31 - 1) // (hq * nslots.total))
    return max(1, fit if fit < 128 else fit // 128 * 128)


def _choose(
    q: Tensor, k: Tensor, geo: Geometry, spec: Spec, nslots: Slots, scores: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    if backend == "cuda":
        from ..cuda.moba import gate
    else:
        from .gate import gate
    return gate(q, centroids(k, geo, spec), geo, spec, nslots, scores)


def _layout(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "cuda":
        from ..cuda.moba import layout
    else:
        from .layout import layout
    return layout


def _replayed(indices: Tensor, nslots: Slots) -> Slots:
    """Given indices may have any number of slots; only which are own matters from here on."""
    return nslots._replace(picks=indices.shape[2] - nslots.own - nslots.sink - nslots.local)


def _rows(x: Tensor) -> Tensor:
    """`x` with its last dimension dense and rows near enough for int32 offsets within a tile."""
    return x if x.stride(-1) == 1 and max(x.stride()) < 2**22 else x.contiguous()
