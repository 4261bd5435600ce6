"""RetroInfer's part of `bench`: its cases, the check against the reference, and one callable per contender."""

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnlab
from attnlab.evals.bench_cases import (
    DECODE_QUERIES,
    Case,
    Contenders,
    Shape,
    growth_lengths,
    heads_first,
    make_qkv,
    sdpa,
    timeable,
)
from attnlab.kernels.retroinfer import portable
from attnlab.kernels.retroinfer.spec import cdiv, plan
from attnlab.testing import assert_accurate

BACKENDS = ("triton", "portable")
KINDS = ("wave_decode", "wave_build", "wave_faiss", "wave_growth", "wave_memory", "wave_int8")
CPU_SHAPE = Shape(32, 8, 64, "float32")
GPU_SHAPE = Shape(32, 8, 128, "bfloat16")
SHORTER = 4  # dense prefill is measured on a quarter of the tokens, and its time taken 16 times
CHECKED = attnlab.WaveConfig(segment=512)
CHECKED_TOKENS = 1500


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Targets: a speed-up over dense decode, a share of dense prefill, a speed-up over faiss, growth, a share of KV."""
    if quick:
        lengths = {
            "wave_decode": 8192,
            "wave_build": 4096,
            "wave_faiss": 4096,
            "wave_growth": 8192,
            "wave_memory": 8192,
            "wave_int8": 8192,
        }
        return [Case(kind, n, repeats=3) for kind, n in lengths.items()]
    if device.type == "cuda":
        lengths = {"wave_decode": 131072, "wave_build": 32768, "wave_growth": 262144}
        lengths |= dict.fromkeys(("wave_memory", "wave_int8"), 131072)
        return [Case(kind, n, repeats=15 if kind == "wave_decode" else 5) for kind, n in lengths.items()]
    return [
        Case("wave_decode", 131072, target=4.0, repeats=15),
        Case("wave_decode", 65536, target=1.0, repeats=15),
        Case("wave_decode", 32768, target=1.0, repeats=15),
        Case("wave_build", 32768, target=0.06),
        Case("wave_faiss", 32768, target=1.0, repeats=3),
        Case("wave_growth", 262144, target=1.3, repeats=2),
        Case("wave_memory", 131072, target=0.065, repeats=1),
        Case("wave_int8", 131072, target=0.035, repeats=1),
    ]


def make_kv(shape: Shape, length: int, device: torch.device | str) -> list[Tensor]:
    """Gaussian `k, v [1, length, G, D]`, without the queries, which are the larger part."""
    return list(make_qkv(dataclasses.replace(shape, heads=shape.kv_heads), length, device)[1:])


def serving(shape: Shape, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that can be timed here, and why each other one cannot."""
    q, k, v = make_qkv(shape, 16, device)
    index = attnlab.WaveIndex.build(k, v, attnlab.WaveConfig(sink=0, local=4))
    return timeable(device, BACKENDS, attnlab.wave_attention, q[:, -1:], index)


def check(case: Case, shape: Shape, device: torch.device, backend: str) -> None:
    """A build and a step of 1500 tokens and two KV heads in the case's shape; AssertionError where they are wrong.

    The clusters' objective must be that of the reference's to 0.1 %; a step, and one that reads every cluster, may err
    twice as much against float64 as the reference, or plain attention, in the inputs' dtype, plus rounding.
    """
    group = shape.heads // shape.kv_heads
    q, k, v = make_qkv(dataclasses.replace(shape, heads=2 * group, kv_heads=2), CHECKED_TOKENS, device)
    last, double = q[:, -1:], [x.double() for x in (q[:, -1:], k, v)]
    index, theirs = (attnlab.WaveIndex.build(k, v, CHECKED, backend=name) for name in (backend, "reference"))
    mine, wanted = _objective(index), _objective(theirs)
    assert abs(mine / wanted - 1) < 1e-3, f"{case}: the clusters' objective is {mine:.6g}, the reference's {wanted:.6g}"
    exact = copy.copy(index)
    exact.store = type(index.store)(*(x.double() if x.is_floating_point() else x for x in index.store))
    step = functools.partial(attnlab.wave_attention, backend="reference")
    got = attnlab.wave_attention(last, index, backend=backend)
    assert_accurate(got, step(double[0], exact), step(last, index), what="step")
    everything = attnlab.wave_attention(last, index, retrieval_ratio=1.0, backend=backend)
    full = functools.partial(attnlab.full_attention, backend="reference")
    assert_accurate(everything, full(*double), full(last, k, v), what="step over every cluster")


def _objective(index: attnlab.WaveIndex) -> float:
    """Sum over clusters of the length of their members' sum, keys minus their mean: what spherical k-means raises."""
    store = index.store
    mean = store.k[:, :, : index.indexed[0]].double().mean(2, keepdim=True)
    return (torch.linalg.vector_norm(store.centroids.double() - mean, dim=-1) * store.sizes).sum().item()


def decode_contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """One token against all; queries rotate. Dense gets keys head by head and a group's queries as rows."""
    k, v = make_kv(shape, case.length, device)
    queries = make_qkv(shape, DECODE_QUERIES, device, seed=1)[0].unsqueeze(2).unbind(1)
    grouped = [q.view(1, shape.kv_heads, -1, shape.head_dim) for q in queries]
    dense_k, dense_v = heads_first(k, v)
    index = attnlab.WaveIndex.build(k, v)

    def rotating(fn: Callable[[int], Any]) -> Callable[[], Any]:
        turn = iter(range(1 << 62))
        return lambda: fn(next(turn) % DECODE_QUERIES)

    contenders: Contenders = {"sdpa": rotating(lambda i: sdpa(grouped[i], dense_k, dense_v, causal=False))}
    for name in backends:
        step = functools.partial(attnlab.wave_attention, backend=name)
        contenders[name] = rotating(lambda i, step=step: step(queries[i], index))
    return contenders


def build_contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """An index of the whole length, and dense causal attention of a layer over 1 / `SHORTER` of it."""
    q, k, v = make_qkv(shape, case.length, device)
    short = heads_first(*(x[:, : case.length // SHORTER] for x in (q, k, v)))
    return {"sdpa": functools.partial(sdpa, *short), **_builds(k, v, backends)}


def _builds(k: Tensor, v: Tensor, backends: list[str]) -> Contenders:
    return {name: functools.partial(attnlab.WaveIndex.build, k, v, backend=name) for name in backends}


def growth_contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """Builds named `whole backend length`."""
    contenders: Contenders = {}
    for length in growth_lengths(case):
        k, v = make_kv(shape, length, device)
        contenders |= {f"whole {name} {length}": call for name, call in _builds(k, v, backends).items()}
    return contenders


def no_faiss(device: torch.device) -> str | None:
    """Why faiss is no contender."""
    if device.type != "cpu":
        return "faiss-cpu is compared on a CPU"
    return None if importlib.util.find_spec("faiss") else "not installed (pip install 'attnlab[faiss-cpu]')"


def faiss_contenders(case: Case, shape: Shape) -> Contenders:
    """Labels of all keys by faiss's k-means and by ours: the same segments, starts and number of assignments."""
    import faiss

    spec, tokens = attnlab.WaveConfig().spec, case.length
    k = make_kv(shape, tokens, "cpu")[0][0]
    keys = k.transpose(0, 1) - k.mean(0)[:, None]
    problems = [x.numpy() for part in keys.split(spec.segment, 1) for x in part.contiguous()]
    faiss.omp_set_num_threads(torch.get_num_threads())

    def cluster(x: Any) -> Any:
        count = cdiv(len(x), spec.tokens_per_cluster)
        options = {"niter": spec.iterations - 1, "spherical": True, "min_points_per_centroid": 1}
        kmeans = faiss.Kmeans(x.shape[1], count, max_points_per_centroid=len(x), **options)
        kmeans.train(x, init_centroids=x[[(2 * i + 1) * len(x) // (2 * count) for i in range(count)]])
        return kmeans.index.search(x, 1)[1][:, 0]

    ours = functools.partial(portable.kmeans, k, plan(spec, [(0, 0, tokens)], [0]), spec)
    return {"faiss": lambda: [cluster(x) for x in problems], "portable": ours}


def memory(case: Case, shape: Shape, device: torch.device, backend: str) -> tuple[int, int]:
    """Bytes of the meta index, and of the keys and values; `wave_int8`: one of int8, and these in bfloat16."""
    small = case.kind == "wave_int8"
    k, v = make_kv(dataclasses.replace(shape, dtype="bfloat16") if small else shape, case.length, device)
    config = attnlab.WaveConfig(iterations=1, meta_dtype="int8" if small else None)  # bytes are those of any iterations
    index = attnlab.WaveIndex.build(k, v, config, backend=backend)
    return index.meta_bytes, index.kv_bytes
