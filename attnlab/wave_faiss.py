"""faiss as a second clusterer of a `WaveIndex`: `WaveConfig(clustering="faiss")`."""

from types import ModuleType

import torch
from torch import Tensor

from .kernels.retroinfer import portable_kmeans
from .kernels.retroinfer.spec import Plan, Spec


def kmeans(k: Tensor, plan: Plan, spec: Spec) -> Tensor:
    """As `portable_kmeans.kmeans`, but centroids are faiss's. Raises ValueError where a key is not finite."""
    for _, start, end in plan.ranges:
        if not k[start:end].isfinite().all():
            raise ValueError("WaveIndex: clustering='faiss' needs finite keys")
    return portable_kmeans.kmeans(k, plan, spec, fit)


def fit(x: Tensor, count: int, iterations: int) -> Tensor:
    """Directions `[P, count, D]` after `iterations - 1` rounds of faiss on `x [P, t, D]`, from where ours start.

    faiss works on float32 copies on the host; where it was built for GPUs, `x` on one is clustered on the first.
    """
    faiss, begin = library(), portable_kmeans.start(x, count)
    problems = zip(*(y.float().cpu().numpy() for y in (x, begin)), strict=True)
    options = dict(
        niter=iterations - 1, spherical=True, min_points_per_centroid=1, max_points_per_centroid=x.shape[1],
        check_input_data_for_NaNs=False, gpu=int(x.is_cuda and faiss.get_num_gpus() > 0),
    )  # fmt: skip
    found, threads = torch.empty_like(begin), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())  # imported before torch, it has an OpenMP of its own
    try:
        for target, (keys, first) in zip(found, problems, strict=True):
            means = faiss.Kmeans(x.shape[2], count, **options)
            means.train(keys, init_centroids=first)
            target.copy_(torch.from_numpy(means.centroids))
    finally:
        faiss.omp_set_num_threads(threads)
    return portable_kmeans.normalise(found)  # with a key for each cluster it hands the keys back


def library() -> ModuleType:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "WaveIndex: clustering='faiss' needs faiss (pip install attnlab[faiss-cpu] or attnlab[faiss-gpu])"
        ) from error
    return faiss
