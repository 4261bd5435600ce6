"""Launchers of the CUDA C++ merge of states and of a new key's joining one, with the portable backend's signatures."""

import torch
from torch import Tensor

from .. import configs
from ..moba.spec import cdiv
from . import module

ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Brain", torch.float32: "float", torch.float8_e4m3fn: "E4M3"}
ACCESS = 16  # bytes a thread moves at once at most
LANES = 32  # threads of a row at most
MOST_BATCH = 4
E4M3_ARCH = 89


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
    """Merge `outs [N, M, H, D]`, `lses [N, M, H]` into `out`, `lse`; with `indptr` runs of entries, where `M` is 1.

    Asks the device nothing, so a CUDA graph can hold it. Raises ValueError where the GPU cannot make `out`'s dtype.
    """
    if out.dtype == torch.float8_e4m3fn and (arch := module.arch(out.device)) < E4M3_ARCH:
        raise ValueError(f"merge_states: float8_e4m3fn results need compute capability 8.9 or later, got {arch / 10}")
    rows, heads, dim = out.shape
    if not rows * heads:
        return
    (o_n, o_m, o_h, _), (l_n, l_m, l_h) = outs.stride(), lses.stride()
    states = len(outs)
    if indptr is not None:
        indptr, o_m, l_m, states = indptr.contiguous(), 0, 0, cdiv(len(outs), rows)
    factors = None if factors is None else factors.contiguous()
    unit, lanes = _units(dim, outs, out)
    row = _row(out.device)
    batch = batch_of(outs.dtype, unit, row)
    split = _split(states, batch, rows * heads * lanes, row["THREADS"] // lanes, row["FILL"])
    width = lanes if indptr is not None else min(lanes, _power(states))
    strides = (o_n, o_m, o_h, l_n, l_m, l_h, *out.stride()[:2], *lse.stride())
    arguments = (
        outs, lses, factors, indptr, out, lse, out_scale, len(outs), rows, heads, dim, *strides, base2, lanes, split,
        width,
    )  # fmt: skip
    types = (outs.dtype, outs.dtype, out.dtype)
    _launch("merge_states", rows * heads, lanes * split, arguments, types, unit, out.device)


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
    rows, heads, dim = q.shape
    if not rows * heads:
        return
    unit, lanes = _units(dim, q, k, v, out_prev, out)
    strides = (s for x in (out_prev, lse_prev, q, k, v, out, lse) for s in x.stride()[:2])
    arguments = (
        out_prev, lse_prev, q, k, v, out, lse, rows, heads, k.shape[1], dim, *strides, float(scale), base2, lanes,
    )  # fmt: skip
    types = (q.dtype, out_prev.dtype, out.dtype)
    _launch("append_token", rows * heads, lanes, arguments, types, unit, out.device)


def defines(types: tuple[torch.dtype, torch.dtype, torch.dtype], unit: int, row: configs.Row) -> module.Defines:
    """The macros of states.cu for elements, state and result of these `types`."""
    names = zip(("ELEMENT", "STATE", "RESULT"), types, strict=True)
    batch = batch_of(types[0], unit, row)
    return (*((name, ELEMENTS[x]) for name, x in names), ("UNIT", unit), ("BATCH", batch), ("THREADS", row["THREADS"]))


def batch_of(dtype: torch.dtype, unit: int, row: configs.Row) -> int:
    """States that a thread has asked for at once."""
    return min(MOST_BATCH, row["BYTES"] // (unit * dtype.itemsize))


def widest(*dtypes: torch.dtype) -> int:
    """Elements a thread moves at once: 16 bytes of the narrowest type, several accesses of the others."""
    return ACCESS // min(x.itemsize for x in dtypes)


def _row(device: torch.device) -> configs.Row:
    return configs.get("cuda.states", module.arch(device), 256, 4)


def _launch(
    name: str,
    rows: int,
    threads: int,
    arguments: tuple[module.Argument, ...],
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    unit: int,
    device: torch.device,
) -> None:
    """`threads` of them a row."""
    row = _row(device)
    blocks = cdiv(rows, row["THREADS"] // threads)
    module.launch("states.cu", name, (blocks,), row["THREADS"], arguments, device, defines(types, unit, row))


def _units(dim: int, *tensors: Tensor) -> tuple[int, int]:
    """Elements that a thread moves at once, as far as all addresses allow, and the threads of a row."""
    unit = widest(*(x.dtype for x in tensors))
    while dim % unit or any(_misaligned(x, unit) for x in tensors):
        unit //= 2
    return unit, min(LANES, _power(cdiv(dim, unit)))


def _misaligned(x: Tensor, unit: int) -> bool:
    size = x.element_size()
    steps = (x.data_ptr(), *(s * size for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1))
    return any(step % min(ACCESS, unit * size) for step in steps)


def _split(states: int, batch: int, threads: int, most: int, fill: int) -> int:
    """Groups that share a row's `states`: more than one where rows alone, of `threads`, do not fill the GPU."""
    split = 1
    while 2 * split <= most and split * batch < states and split * threads < fill:
        split *= 2
    return split


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()
