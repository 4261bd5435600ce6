"""Independent pieces of CPU work on Python threads: PyTorch's kernels release the interpreter while they run."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


LEAST_ROWS = 512  # fewer queries than this are not worth starting threads for


def workers(pieces: int, q: Tensor) -> int:
    """How many of `pieces` of the work on `q [Nq, ...]` run at a time: as many as PyTorch has threads on the CPU."""
    alone = q.device.type != "cpu" or len(q) < LEAST_ROWS
    return 1 if alone else max(1, min(torch.get_num_threads(), pieces))


def each(work: Callable[[T], None], items: Sequence[T], count: int) -> None:
    """`work(item)` for every item, `count` of them at a time, which share PyTorch's threads among them.

    Kernels over one list of queries are too short to be worth splitting; what surrounds them does not split at all.
    Items must write to disjoint memory, so results do not depend on the number of threads.
    """
    if count < 2:
        for item in items:
            work(item)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def one(item: T) -> None:
        # A thread starts with PyTorch's defaults, whatever the caller's modes are.
        torch.set_num_threads(max(1, threads // count))
        with torch.inference_mode(inference), torch.no_grad():
            work(item)

    try:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(one, items))
    finally:
        torch.set_num_threads(threads)
