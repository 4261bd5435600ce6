"""What the Triton kernels share: cutting lists of rows into tiles, moving rows in and out, products of rows.

The rows of a tile are (token, head) pairs: row `r` of a list is token `r // HEADS` and head `r % HEADS`, so that the
query heads of one KV head share every key they read and short sequences still fill a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
PART: tl.constexpr = tl.constexpr(16)  # elements of a row that `dot_rows` splits at a time


def cdiv(a, b):
    return (a + b - 1) // b


def cut(counts: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor]:
    """Cut lists of `counts` rows, no more than `rows` together, in tiles of `tile` without asking the device.

    Returns int32 `owner`, each tile's list, as many as `rows` rows can need and `len(counts)` past the last in use; and
    `first [n + 1]`, each list's first tile: tile `i` is number `i - first[owner[i]]` of its list.
    """
    first = counts.new_zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(cdiv(counts, tile), 0, dtype=torch.int32, out=first[1:])
    tiles = torch.arange(min(rows // tile + counts.numel(), rows), dtype=torch.int32, device=counts.device)
    return torch.searchsorted(first[1:], tiles, right=True, out_int32=True), first


def arch(x: Tensor) -> int:
    """Compute capability as 10 * major + minor; the interpreter counts as the oldest GPU."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def head_tile(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU; the interpreter counts as a small one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def shares(x: Tensor, units: int, programs: int) -> int:
    """Shares of `units` units of work for each of `programs` lists: two programs per multiprocessor, a unit each."""
    return max(1, min(units, 2 * processors(x) // max(programs, 1)))


def precision(dtype: torch.dtype) -> str:
    """float32 products go through three tf32 ones, as accurate as float32's rounding and on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def ordered(x):
    """int32 that compares as float32 `x` does, with -0 equal to 0 and every NaN alike, above infinity."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def tile_rows(row, i_h, tokens, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Token, query head and validity of BLOCK rows of KV head `i_h`, from `row` on."""
    o_row = row + tl.arange(0, BLOCK)
    o_i = o_row // HEADS
    return o_i, i_h * HEADS + o_row % HEADS, o_i < tokens


@triton.jit
def load_rows(base, offset, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """`[len(offset), BLOCK_D]` rows of D elements, zeros elsewhere; without MASK every row is taken as valid."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = base + offset[:, None] + o_d[None, :]
    if MASK:
        b_x = tl.load(p_x, mask=valid[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def dot_rows(b_x, b_y, x, o_x, m_x, y, o_y, m_y, D: tl.constexpr, PRECISION: tl.constexpr):
    """`b_x @ b_y.T` of loaded rows, `b_x` those at `x + o_x` and `b_y` those at `y + o_y`.

    tf32x3 splits each operand in two, and registers do not hold both halves of whole rows: it reads the rows again, a
    part at a time.
    """
    if PRECISION == "tf32x3":
        o_d = tl.arange(0, PART)
        p_x, p_y = x + o_x[:, None] + o_d[None, :], y + o_y[:, None] + o_d[None, :]
        b_s = tl.zeros([o_x.shape[0], o_y.shape[0]], tl.float32)
        for d in tl.range(0, D, PART):
            m_d = (d + o_d < D)[None, :]
            b_xd = tl.load(p_x + d, mask=m_x[:, None] & m_d, other=0.0)
            b_yd = tl.load(p_y + d, mask=m_y[:, None] & m_d, other=0.0)
            b_s = tl.dot(b_xd, tl.trans(b_yd), b_s, input_precision=PRECISION)
    else:
        b_s = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    return b_s


@triton.jit
def store_rows(base, offset, valid, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_x = base + offset[:, None] + o_d[None, :]
    tl.store(p_x, b_x.to(base.dtype.element_ty), mask=valid[:, None] & (o_d < D)[None, :])


@triton.jit
def load_lse(lse, offset, valid):
    """A row's lse in log2, +inf where the row has no keys or does not exist: its probabilities come out as zero."""
    b_lse = tl.load(lse + offset, mask=valid, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


def job(name: str, fn, types: dict[str, str], constexprs: dict, config: dict[str, int], dot: bool) -> dict:
    """One configuration for `kernels/compile.py`; others are int32, strides and D multiples of 16."""
    launch = {key: config[key] for key in ("num_warps", "num_stages") if key in config}
    constexprs = constexprs | {key: value for key, value in config.items() if key not in launch}
    signature = {arg: "constexpr" if arg in constexprs else types.get(arg, "i32") for arg in fn.arg_names}
    strides = [arg for arg in fn.arg_names if signature[arg] == "i32" and (arg[1:2] == "_" or arg == "D")]
    return dict(
        name=name, fn=fn, signature=signature, constexprs=constexprs, options=launch, dot=dot, divisible=strides
    )
