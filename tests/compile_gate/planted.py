"""Runs the compile gate over a matrix product with planted faults: `python planted.py FILE JSON FAULT ...`."""

import sys

import triton
import triton.language as tl

from attnlab.kernels import compile as gate

SHAPES = {
    "none": {"BM": 128, "BN": 128, "BK": 64, "PRECISION": "tf32", "num_warps": 8, "num_stages": 3},
    "shared": {"BM": 128, "BN": 256, "BK": 64, "PRECISION": "tf32", "num_warps": 8, "num_stages": 8},
    "spills": {"BM": 256, "BN": 256, "BK": 32, "PRECISION": "tf32", "num_warps": 4, "num_stages": 2},
    "hgmma": {"BM": 32, "BN": 32, "BK": 16, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2},
    "syntax": {"BM": 32, "BN": 31, "BK": 16, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2},
}


@triton.jit
def product(
    a, b, c, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    i_m, i_n, i_k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth, BK):
        b_a = tl.load(a + i_m * depth + (k + i_k)[None, :])
        b_b = tl.load(b + (k + i_k)[:, None] * BN + i_n)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    tl.store(c + i_m * BN + i_n, acc)


def planted(fault: str) -> dict:
    shape = dict(SHAPES[fault])
    options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
    kind = "*fp32" if shape["PRECISION"] == "ieee" else "*bf16"
    signature = {"a": kind, "b": kind, "c": "*fp32", "depth": "i32"} | dict.fromkeys(shape, "constexpr")
    job = {"name": fault, "fn": product, "signature": signature, "constexprs": shape}
    return job | {"options": options, "dot": True, "divisible": ["depth"]}


if __name__ == "__main__":
    file, record, *faults = sys.argv[1:]
    gate.production = lambda *_: [planted(fault) for fault in faults]
    gate.triton_files = lambda: [file]
    gate.cuda_jobs = lambda *_: iter(())
    sys.exit(gate.main([*["--arch", "90", "--head-dim", "128", "--dtype", "bf16", "--jobs", "1", "--json"], record]))
