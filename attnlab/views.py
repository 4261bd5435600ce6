"""Views of strided tensors: dimensions that fold into one, and memory that two share."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

TRIES = 10_000  # partial sums looked at before a layout counts as too tangled to tell


def folded(shape: Sequence[int], keep: int, *given: tuple[Tensor, int]) -> Iterator[list[Tensor]]:
    """The tensors with their dimensions `shape`, from `start` on in each `(tensor, start)`, seen as `keep` of them.

    Neighbours that every tensor can see as one are folded. Should more than `keep` be left, views come one by one for
    every index of the shortest: nothing is copied.
    """
    n, sizes, last = len(shape), list[int](), list[int]()
    for size, *steps in zip(shape, *(x.stride()[start : start + n] for x, start in given), strict=True):
        if size == 1:
            continue
        if last and all(a == b * size for a, b in zip(last, steps, strict=True)):
            sizes[-1] *= size
        else:
            sizes.append(size)
        last = steps
    sizes += [1] * (keep - len(sizes))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    outer, inner = sorted(order[:-keep]), sorted(order[-keep:])
    views = []
    for x, start in given:
        x = x.view(*x.shape[:start], *sizes, *x.shape[start + n :])
        dims = (*range(start), *(start + i for i in inner), *range(start + len(sizes), x.ndim))
        views.append(x.permute(*(start + i for i in outer), *dims))
    for index in itertools.product(*(range(sizes[i]) for i in outer)):
        yield [x[index] for x in views]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to both. Exact for whatever slicing makes; true where that is too hard to tell."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    # A byte is in both where sum(i * stride of a) - sum(j * stride of b) is the distance of their first bytes.
    spans = {1: [-(b.itemsize - 1), a.itemsize - 1]}
    for x, end in ((b, 0), (a, 1)):
        for size, stride in zip(x.shape, x.stride(), strict=True):
            span = spans.setdefault(stride * x.itemsize, [0, 0])
            span[end] += size - 1 if end else 1 - size
    return _reaches(b.data_ptr() - a.data_ptr(), sorted(spans.items(), reverse=True))


def _reaches(distance: int, spans: list[tuple[int, list[int]]]) -> bool:
    """Whether `distance` is a sum of a number from each span times its step; steps fall."""
    rest = [(0, 0)]
    for step, (low, high) in reversed(spans):
        rest.append((rest[-1][0] + step * low, rest[-1][1] + step * high))
    rest.reverse()
    todo = [(distance, 0)]
    for _ in range(TRIES):
        if not todo:
            return False
        left, i = todo.pop()
        if i == len(spans):
            return True
        step, (low, high) = spans[i]
        below, above = rest[i + 1]
        if step == 0:
            todo.append((left, i + 1))
            continue
        first, last = max(low, -((above - left) // step)), min(high, (left - below) // step)
        todo += [(left - k * step, i + 1) for k in range(first, min(last, first + TRIES) + 1)]
    return True


def same(a: Tensor, b: Tensor) -> bool:
    """Whether both name the same elements, in the same order."""
    if a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)
