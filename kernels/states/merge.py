"""Merge of attention states over disjoint keys, dense or in runs of entries, and its gradient.

A program reads all there is of its rows before it writes their lse, so that results may go where a shard lies. It takes
many rows and their shards one by one, or, where rows are few, several shards of a row at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .tiles import LN2, LOG2E, arch, cdiv, job, processors

MAX_BLOCK_D = 256
PROGRAMS = 4  # for each multiprocessor; with fewer, shards are read together


@triton.jit
def power(x, BASE2: tl.constexpr):
    return tl.exp2(x if BASE2 else x * LOG2E)


@triton.jit
def log(x, BASE2: tl.constexpr):
    return tl.log2(x) if BASE2 else tl.log2(x) * LN2


@triton.jit
def place(rows, BLOCK_M: tl.constexpr):
    """Run and tile of this program. Counts are int32 while `rows` is; from 2**31 rows on a launch passes int64."""
    tiles = (rows - 1) // BLOCK_M + 1
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles


@triton.jit
def finite(b_top):
    """Something to subtract from lses that are all -inf."""
    return tl.where(b_top == float("-inf"), 0.0, b_top)


@triton.jit
def load_lse(lses, offset, valid):
    """+inf, as others write "no keys", is -inf."""
    b_lse = tl.load(lses + offset, mask=valid, other=float("-inf"))
    return tl.where(b_lse == float("inf"), float("-inf"), b_lse)


@triton.jit
def _load_lse(lses, factors, o_n, offset, valid, FACTORS: tl.constexpr):
    b_lse = load_lse(lses, offset, valid)
    if FACTORS:
        b_factor = tl.load(factors + tl.broadcast_to(o_n, offset.shape), mask=valid, other=1.0)
        b_lse = tl.where(b_lse == float("-inf"), b_lse, b_lse * b_factor)
    return b_lse


@triton.jit
def split(o_row, heads):
    """Place and head of rows, int64 as offsets need them; dividing in int64 would cost a call."""
    return (o_row // heads).to(tl.int64), (o_row % heads).to(tl.int64)


@triton.jit
def spread(x, TIMES: tl.constexpr):
    """Each element so many times in a row."""
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], TIMES]), [x.shape[0] * TIMES])


@triton.jit
def e4m3(x):
    """float32 as the byte of the nearest float8_e4m3fn, ties to even; what is too large becomes the largest, 448.

    In integers, for GPUs before sm_89 have no instruction for it.
    """
    bits = x.to(tl.int32, bitcast=True)
    b_abs = tl.minimum(tl.abs(x), 448.0)
    b_bits = b_abs.to(tl.int32, bitcast=True)
    b_code = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 steps are 2**-9, as those of float32 are from 2**14 on.
    b_small = (b_abs + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_abs < 0.015625, b_small, b_code)
    b_code = tl.where(x == x, b_code, 0x7F)
    return (b_code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def merge_kernel(
    outs, lses, factors, indptr, out, lse, out_scale, shards, rows, heads, D, o_n, o_m, o_h, l_n, l_m, l_h,
    t_r, t_m, t_h, x_r, x_m, x_h,
    RAGGED: tl.constexpr, FACTORS: tl.constexpr, BASE2: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_run, i_tile = place(rows, BLOCK_M)
    begin, end = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + shards
    if RAGGED:
        begin, end = tl.load(indptr + i_run), tl.load(indptr + i_run + 1)

    # A lane is a row and every BLOCK_N-th of its shards.
    o_lane = tl.arange(0, BLOCK_M * BLOCK_N)
    o_row, o_shard = i_tile * BLOCK_M + o_lane // BLOCK_N, o_lane % BLOCK_N
    m_row = o_row < rows
    i_m, i_h = split(o_row, heads)
    o_lse = i_m * l_m + i_h * l_h
    b_top = tl.full([BLOCK_M * BLOCK_N], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M * BLOCK_N], tl.float32)
    for n in tl.range(begin, end, BLOCK_N):
        i_n = n + o_shard
        b_lse = _load_lse(lses, factors, i_n, i_n * l_n + o_lse, m_row & (i_n < end), FACTORS)
        b_new = tl.maximum(b_top, b_lse)
        b_sum = b_sum * power(b_top - finite(b_new), BASE2) + power(b_lse - finite(b_new), BASE2)
        b_top = b_new
    b_tops, b_sums = tl.reshape(b_top, [BLOCK_M, BLOCK_N]), tl.reshape(b_sum, [BLOCK_M, BLOCK_N])
    b_most = finite(tl.max(b_tops, 1))
    b_total = tl.sum(b_sums * power(b_tops - b_most[:, None], BASE2), 1)
    b_top = spread(b_most, BLOCK_N)
    b_some = tl.where(b_total == 0.0, 1.0, b_total)
    b_share = 1.0 / spread(b_some, BLOCK_N)

    o_in = i_m * o_m + i_h * o_h
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_out = o_row < rows
    i_m, i_h = split(o_row, heads)
    o_out = i_run.to(tl.int64) * t_r + i_m * t_m + i_h * t_h
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        b_acc = tl.zeros([BLOCK_M * BLOCK_N, BLOCK_D], tl.float32)
        for n in tl.range(begin, end, BLOCK_N):
            i_n = n + o_shard
            b_lse = _load_lse(lses, factors, i_n, i_n * l_n + o_lse, m_row & (i_n < end), FACTORS)
            b_w = power(b_lse - b_top, BASE2) * b_share
            # What has no weight may be NaN.
            p_x = outs + (i_n * o_n + o_in)[:, None] + o_d[None, :]
            b_x = tl.load(p_x, mask=(b_w != 0.0)[:, None] & m_d, other=0.0)
            b_acc += b_w[:, None] * b_x.to(tl.float32)
        if BLOCK_N > 1:
            b_acc = tl.sum(tl.reshape(b_acc, [BLOCK_M, BLOCK_N, BLOCK_D]), 1)
        b_out = e4m3(b_acc / tl.load(out_scale)) if SCALED else b_acc.to(out.dtype.element_ty)
        tl.store(out + o_out[:, None] + o_d[None, :], b_out, mask=m_out[:, None] & m_d)

    tl.debug_barrier()  # no thread reads an lse any more: a shard's may lie where this one goes
    b_lse = tl.where(b_total == 0.0, float("-inf"), b_most + log(b_some, BASE2))
    tl.store(lse + i_run.to(tl.int64) * x_r + i_m * x_m + i_h * x_h, b_lse, mask=m_out)


@triton.jit
def merge_backward_kernel(
    dout, dlse, outs, lses, factors, owners, out, lse, douts, dlses, rows, heads, D, g_r, g_m, g_h, o_n, o_m, o_h,
    l_n, l_m, l_h,
    DLSE: tl.constexpr, RAGGED: tl.constexpr, FACTORS: tl.constexpr, BASE2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`w = exp(lse_n - lse)`: `dout_n = w dout`, `dlse_n = w (dout . (out_n - out) + dlse)`; zero for empty shards."""
    i_n, i_tile = place(rows, BLOCK_M)
    i_n, i_run = i_n.to(tl.int64), tl.zeros([], tl.int64)
    if RAGGED:
        i_run = tl.load(owners + i_n)
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    i_m, i_h = split(o_row, heads)
    o_out, o_in = i_run * rows + o_row, i_n * rows + o_row
    b_lse = _load_lse(lses, factors, i_n, i_n * l_n + i_m * l_m + i_h * l_h, m_row, FACTORS)
    b_w = power(b_lse - finite(tl.load(lse + o_out, mask=m_row, other=0.0)), BASE2)
    b_dot = tl.zeros([BLOCK_M], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        mask = (b_w != 0.0)[:, None] & m_d
        o_dout = i_run * g_r + i_m * g_m + i_h * g_h
        b_dout = tl.load(dout + o_dout[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_out = tl.load(out + (o_out * D)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        p_x = outs + (i_n * o_n + i_m * o_m + i_h * o_h)[:, None] + o_d[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_dout * (b_x - b_out), 1)
        b_douts = tl.where(mask, b_w[:, None] * b_dout, 0.0).to(douts.dtype.element_ty)
        tl.store(douts + (o_in * D)[:, None] + o_d[None, :], b_douts, mask=m_row[:, None] & m_d)
    if BASE2:
        b_dot *= LN2
    if DLSE:
        b_dot += tl.load(dlse + o_out, mask=m_row, other=0.0)
    if FACTORS:
        b_dot *= tl.load(factors + i_n)
    tl.store(dlses + o_in, tl.where(b_w == 0.0, 0.0, b_w * b_dot), mask=m_row)


def _rows_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _places(x: Tensor, indptr: Tensor | None) -> tuple[int, int, int]:
    """Strides of run, row and head of a result: `[M, H, ...]`, or `[R, H, ...]`."""
    return (0, *x.stride()[:2]) if indptr is None else (x.stride(0), 0, x.stride(1))


def tiles(x: Tensor) -> dict[str, int]:
    block_d = min(triton.next_power_of_2(x.shape[-1]), MAX_BLOCK_D)
    return configs.get("states.merge", arch(x), block_d, x.element_size()) | {"BLOCK_D": block_d}


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
    """`outs [N, M, H, D]`, `lses [N, M, H]` float32 into `out [M, H, D]`, `lse [M, H]`; as the portable `merge`."""
    (shards, m, heads, d), runs = outs.shape, 1 if indptr is None else len(out)
    if not out.numel():
        return
    outs, config, to = _rows_last(outs), tiles(outs), out if out_scale is None else out.view(torch.uint8)
    lanes, programs = config["BLOCK_M"], cdiv(runs * m * heads, config["BLOCK_M"])
    together = min(cdiv(PROGRAMS * processors(outs), programs), cdiv(shards, runs), lanes)
    config["BLOCK_N"] = triton.next_power_of_2(max(1, together))
    config["BLOCK_M"] = lanes // config["BLOCK_N"]
    merge_kernel[(runs * cdiv(m * heads, config["BLOCK_M"]),)](
        outs, lses, factors, indptr, to, lse, out_scale, shards, m * heads, heads, d, *outs.stride()[:3],
        *lses.stride(), *_places(out, indptr), *_places(lse, indptr),
        RAGGED=indptr is not None, FACTORS=factors is not None, BASE2=base2, SCALED=out_scale is not None, **config,
    )  # fmt: skip


def merge_backward(
    dout: Tensor,
    dlse: Tensor | None,
    outs: Tensor,
    lses: Tensor,
    factors: Tensor | None,
    indptr: Tensor | None,
    base2: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge` in the shapes of `outs` and `lses`."""
    outs, dout = _rows_last(outs), _rows_last(dout)
    shards, m, heads, d = outs.shape
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    dlses = torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)
    if outs.numel():
        config, owners = tiles(outs), None
        if indptr is not None:
            owners = torch.repeat_interleave(indptr.diff(), output_size=shards)
        merge_backward_kernel[(shards * cdiv(m * heads, config["BLOCK_M"]),)](
            dout, None if dlse is None else dlse.contiguous(), outs, lses, factors, owners, out.contiguous(),
            lse.contiguous(), douts, dlses, m * heads, heads, d, *_places(dout, indptr), *outs.stride()[:3],
            *lses.stride(),
            DLSE=dlse is not None, RAGGED=indptr is not None, FACTORS=factors is not None, BASE2=base2, **config,
        )  # fmt: skip
    return douts, dlses


def production(arch: int, head_dim: int, dtype: str) -> list[dict]:
    """What the public functions launch, for `kernels/compile.py`."""
    x, f = f"*{dtype}", "*fp32"
    types = dict.fromkeys(("dout", "outs", "out", "douts"), x) | dict(indptr="*i64", owners="*i64")
    types |= dict.fromkeys(("dlse", "lses", "lse", "dlses", "factors", "out_scale"), f)
    block_d = min(triton.next_power_of_2(head_dim), MAX_BLOCK_D)
    row = configs.get("states.merge", arch, block_d, 4 if dtype == "fp32" else 2) | {"BLOCK_D": block_d}
    plain = dict(RAGGED=False, FACTORS=False, BASE2=False)
    modes = {
        "": (types, plain | {"SCALED": False}, 1),
        "[together]": (types, plain | {"SCALED": False}, row["BLOCK_M"]),
        "[ragged]": (types, dict(RAGGED=True, FACTORS=True, BASE2=True, SCALED=False), 4),
        "[fp8]": (types | {"out": "*u8"}, plain | {"SCALED": True}, 1),
    }
    jobs = [
        job(f"states.merge{mode}", merge_kernel, made, constants,
            row | {"BLOCK_M": row["BLOCK_M"] // n, "BLOCK_N": n}, dot=False)
        for mode, (made, constants, n) in modes.items()
    ]  # fmt: skip
    more = dict(DLSE=True, FACTORS=True, BASE2=True)
    return jobs + [
        job(f"states.merge_backward{mode}", merge_backward_kernel, types, more | {"RAGGED": ragged}, row, dot=False)
        for mode, ragged in (("", False), ("[ragged]", True))
    ]
