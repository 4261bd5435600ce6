"""The check before any timing: this library against the float64 reference, on each case at a smaller length."""

import dataclasses

import torch
from torch import Tensor

import attnlab
from attnlab.evals import bench_fusion, bench_lamina, bench_wave
from attnlab.evals.bench_cases import Case, Shape, filled_cache, make_qkv
from attnlab.testing import assert_accurate, assert_same_routing

ROWS = 256
BLOCKS_OVER_TOPK = 4


class Disagreement(RuntimeError):
    """A backend's numbers are not the reference's, so its speed means nothing."""


def check(case: Case, shape: Shape, device: torch.device, backend: str) -> None:
    """Routing, output and (for training) gradients of `case` on `topk + 4.5` blocks; raises Disagreement.

    The library computes the whole sequence; its last rows, which choose among the most blocks, are compared. An error
    against float64 may be twice that of the reference in the inputs' dtype, plus rounding.
    """
    try:
        for part in (bench_wave, bench_fusion, bench_lamina):
            if case.kind in part.KINDS:
                part.check(case, shape, device, backend)
                return
        length = case.block_size * (case.topk + BLOCKS_OVER_TOPK) + case.block_size // 2
        group = shape.heads // shape.kv_heads
        qkv = make_qkv(dataclasses.replace(shape, heads=2 * group, kv_heads=2), length, device)
        _check_decode(case, qkv, backend) if case.kind == "decode" else _check_forward(case, qkv, backend)
    except AssertionError as e:
        raise Disagreement(f"{case} [{backend}]: {e}") from e


def _check_forward(case: Case, qkv: tuple[Tensor, ...], backend: str) -> None:
    rows = min(ROWS, BLOCKS_OVER_TOPK * case.block_size)
    q, k, _ = qkv
    selection = attnlab.moba_select(q, k, **case.routing, backend=backend)
    tail = attnlab.MoBASelection(*(x[:, -rows:] for x in selection))
    assert_same_routing(tail, q[:, -rows:], k, **case.routing)
    got = _run(qkv, case, rows, backend, None)
    truth = _run(tuple(x.double() for x in qkv), case, rows, "reference", tail)
    plain = _run(qkv, case, rows, "reference", tail)
    for name, *triple in zip(("out", "dq", "dk", "dv"), got, truth, plain, strict=False):
        assert_accurate(*triple, what=name)


def _run(
    qkv: tuple[Tensor, ...], case: Case, rows: int, backend: str, selection: attnlab.MoBASelection | None
) -> list[Tensor]:
    training = case.kind == "training"
    q, k, v = (x.detach().requires_grad_(training) for x in qkv)
    queries = q if selection is None else q[:, -rows:]
    out = attnlab.moba_attention(queries, k, v, **case.routing, selection=selection, backend=backend)[:, -rows:]
    if not training:
        return [out]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), weight)
    return [out.detach(), dq[:, -rows:], dk, dv]


def _check_decode(case: Case, qkv: tuple[Tensor, ...], backend: str) -> None:
    q, k, v = qkv
    last = q[:, -1:]
    got = attnlab.moba_decode(last, filled_cache(case, k, v), topk=case.topk, backend=backend)
    selection = attnlab.moba_select(last, k, **case.routing, backend="reference")
    replay = {**case.routing, "selection": selection, "backend": "reference"}
    truth = attnlab.moba_attention(last.double(), k.double(), v.double(), **replay)
    assert_accurate(got, truth, attnlab.moba_attention(last, k, v, **replay), what="out")
