"""What `bench` runs: the cases with their targets, their inputs, and one callable per contender."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.evals.measure import peak_memory

KINDS = ("forward", "training", "decode", "flex", "memory", "growth")
BACKENDS = ("cuda", "triton", "cpu", "portable")  # the targets are for the first that can be timed
DECODE_QUERIES = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads and dtype every case of a machine shares."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} KV heads, D={self.head_dim}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: `target` is a speed-up over dense SDPA, a multiple of q's bytes, or a growth factor.

    Without blocks it is one of `bench_wave`'s, which says what its targets are.
    """

    kind: str
    length: int
    block_size: int | None = None
    topk: int | None = None
    target: float | None = None
    repeats: int = 5

    @property
    def routing(self) -> dict[str, int | None]:
        return {"block_size": self.block_size, "topk": self.topk}

    def __str__(self) -> str:
        blocks = "" if self.block_size is None else f" B={self.block_size} k={self.topk}"
        return f"{self.kind} T={self.length}{blocks}"


CPU_SHAPE = Shape(8, 8, 64, "float32")
GPU_SHAPE = Shape(16, 16, 128, "bfloat16")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Every case for this device. Targets are those of a 2-core CPU; other machines and `quick` have none."""
    if quick:
        lengths = {"forward": 4096, "training": 2048, "decode": 8192, "flex": 2048, "memory": 8192, "growth": 8192}
        routings = {"forward": ((64, 8), (64, 3), (16, 8))}
        return [Case(kind, n, *r, repeats=3) for kind, n in lengths.items() for r in routings.get(kind, ((64, 3),))]
    if device.type == "cuda":
        lengths = {"forward": 131072, "training": 32768, "decode": 131072, "flex": 32768, "memory": 131072}
        every = ((512, 8), (512, 3), (128, 8))
        table = [Case(kind, n, *r, repeats=15) for kind, n in lengths.items() for r in every]
        return [*table, Case("growth", 131072, 512, 3, repeats=15)]
    return [
        Case("forward", 32768, 512, 8, 3.3),
        Case("forward", 32768, 512, 3, 8.5),
        Case("forward", 32768, 128, 8, 9.0),
        Case("training", 16384, 512, 3, 3.5),
        Case("decode", 131072, 512, 8, 8.0, repeats=15),
        Case("flex", 8192, 512, 8, repeats=3),
        Case("flex", 8192, 512, 3, repeats=3),
        Case("flex", 8192, 128, 8, repeats=3),
        Case("memory", 131072, 512, 8, 4.0, repeats=1),
        Case("growth", 131072, 512, 3, 1.6, repeats=3),
    ]


def growth_lengths(case: Case) -> list[int]:
    """Four lengths, each twice the one before, up to the case's own."""
    return [case.length // 8, case.length // 4, case.length // 2, case.length]


def make_qkv(shape: Shape, length: int, device: torch.device | str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian `q, k, v [1, length, H, D]`: routing is as scattered as it gets."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(1, length, h, shape.head_dim, generator=generator) for h in heads)
    return q.to(device, shape.torch_dtype), k.to(device, shape.torch_dtype), v.to(device, shape.torch_dtype)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """`[B, H, T, D]`, contiguous: the layout SDPA and FlexAttention take, made outside the timed call."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Dense attention by PyTorch on `[B, H, T, D]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def serving(shape: Shape, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that can be timed here, and why each other one cannot."""
    q, k, v = make_qkv(shape, 16, device)
    return timeable(device, BACKENDS, attnlab.moba_attention, q, k, v, block_size=8, topk=1)


def timeable(
    device: torch.device, names: Sequence[str], fn: Callable[..., Any], *args: Any, **options: Any
) -> tuple[list[str], dict[str, str]]:
    """Of the backends `names` those that serve a call on the device itself, and why each other one does not."""
    able, refused = [], {}
    for name in names:
        reasons = attnlab.explain(fn, *args, **options, backend=name).reasons[name]
        if not reasons and name == "triton" and device.type == "cpu":
            reasons = ["Triton's interpreter is for tests, not for timing"]
        if reasons:
            refused[name] = "; ".join(reasons)
        else:
            able.append(name)
    return able, refused


Contenders = dict[str, Callable[[], Any]]


def forward_contenders(case: Case, qkv: tuple[Tensor, ...], backends: list[str]) -> Contenders:
    """Causal forward of this library, one per backend."""
    return {name: functools.partial(attnlab.moba_attention, *qkv, **case.routing, backend=name) for name in backends}


def _trained(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])

    def call() -> Tensor:
        return torch.autograd.grad(fn(*leaves), leaves, weight)[0]

    return call


def training_contenders(case: Case, qkv: tuple[Tensor, ...], backends: list[str]) -> Contenders:
    """Forward and backward of dense SDPA and of this library."""
    contenders: Contenders = {"sdpa": _trained(sdpa, tuple(heads_first(*qkv)))}
    for name in backends:
        contenders[name] = _trained(functools.partial(attnlab.moba_attention, **case.routing, backend=name), qkv)
    return contenders


def decode_contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """One token against a full cache; queries rotate, so that the chosen blocks do not stay in the CPU's own cache."""
    _, k, v = make_qkv(shape, case.length, device)
    queries = make_qkv(shape, DECODE_QUERIES, device, seed=1)[0].unsqueeze(2).unbind(1)
    dense_queries = [q.transpose(1, 2).contiguous() for q in queries]
    dense_k, dense_v = heads_first(k, v)
    cache = filled_cache(case, k, v)

    def rotating(fn: Callable[[int], Any]) -> Callable[[], Any]:
        turn = iter(range(1 << 62))
        return lambda: fn(next(turn) % DECODE_QUERIES)

    contenders: Contenders = {"sdpa": rotating(lambda i: sdpa(dense_queries[i], dense_k, dense_v, causal=False))}
    for name in backends:
        step = functools.partial(attnlab.moba_decode, topk=case.topk, backend=name)
        contenders[name] = rotating(lambda i, step=step: step(queries[i], cache))
    return contenders


def filled_cache(case: Case, k: Tensor, v: Tensor) -> "attnlab.MoBACache":
    """A cache that holds `k, v`."""
    options = {"block_size": case.block_size, "dtype": k.dtype, "device": k.device}
    cache = attnlab.MoBACache(k.shape[0], k.shape[1], k.shape[2], k.shape[3], **options)
    cache.append(k, v)
    return cache


def growth_contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """Whole forward, gate alone, and forward with the selection given, named `part backend length`."""
    contenders: Contenders = {}
    for length in growth_lengths(case):
        q, k, v = make_qkv(shape, length, device)
        for name in backends:
            options = {**case.routing, "backend": name}
            chosen = attnlab.moba_select(q, k, **options)
            attend = functools.partial(attnlab.moba_attention, q, k, v, **options)
            contenders[f"whole {name} {length}"] = attend
            contenders[f"gate {name} {length}"] = functools.partial(attnlab.moba_select, q, k, **options)
            contenders[f"rest {name} {length}"] = functools.partial(attend, selection=chosen)
    return contenders


def forward_peak(
    length: int, block_size: int, topk: int, shape: dict[str, Any], device: str, contender: str
) -> dict[str, Any]:
    """Peak memory of one forward over its inputs, output included. Meant for a fresh process."""
    what = Shape(**shape)

    def call(qkv: tuple[Tensor, ...]) -> object:
        if contender == "sdpa":
            return sdpa(*qkv)
        return attnlab.moba_attention(*qkv, block_size=block_size, topk=topk, backend=contender)

    def inputs(n: int) -> tuple[Tensor, ...]:
        qkv = make_qkv(what, n, device)
        return tuple(heads_first(*qkv)) if contender == "sdpa" else qkv

    call(inputs(min(length, 4 * block_size)))
    qkv = inputs(length)
    with peak_memory(device) as peak:
        call(qkv)
    return {"bytes": peak.bytes, "method": peak.method, "q_bytes": qkv[0].numel() * qkv[0].element_size()}
