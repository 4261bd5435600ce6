"""RetroInfer: decode attention that reads the best clusters of a row and estimates others (arXiv 2505.02922)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import wave_reference
from .dispatch import Call, check_bool, check_int, check_scale, missing, pick
from .kernels.retroinfer.buffer import Cache
from .kernels.retroinfer.spec import Attended, Query, Spec, Store, part
from .packs import without_autocast
from .wave_buffer import WaveBuffer
from .wave_config import check_choice, check_share, kernel_reasons
from .wave_index import WaveIndex, serving

SELECTORS = ("wave", "full", "oracle", "quest", "cluster", "random")
_MAX_SEED = 2**32 - 1


class ErrorBound(NamedTuple):
    """Between which shares `lower, upper [B, 1, Hq]` of a head's attention mass lies what was not read exactly.

    The lower one follows from Jensen's inequality (in the paper: accuracy-bounded attention estimation), the upper one
    from the clusters' radii: equation 5 of `reference/retroinfer.py`. Nothing unread: both 0.
    """

    lower: Tensor
    upper: Tensor


def wave_attention(
    q: Tensor,
    index: WaveIndex,
    *,
    buffer: WaveBuffer | None = None,
    scale: float | None = None,
    retrieval_ratio: float | None = None,
    estimation_ratio: float | None = None,
    estimation: str | None = None,
    selector: str = "wave",
    token_budget: float | None = None,
    seed: int = 0,
    return_lse: bool = False,
    return_error_bound: bool = False,
    return_read: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor | ErrorBound, ...]:
    """Attention of each row's newest token over an index that already holds its key and value. No gradient.

    Three zones, merged by their lse: tokens that are not indexed, and those of the best clusters, are read exactly; the
    next clusters count as if each of their keys were the mean key. Clusters rank by the softmax of `q . centroid`,
    reduced over the query heads of a KV head, ties to the lowest; empty ones are never chosen. All clusters read is
    full attention. The choice, and so the zones, are one per KV head. In the paper (arXiv 2505.02922): tripartite
    attention approximation; here equations 3 (ranks) and 4 (estimates) of `reference/retroinfer.py`.

    Args:
        q: `[B, 1, Hq, D]` in the index's dtype.
        index: its configuration says how clusters rank, and whether the budget is fixed or adaptive.
        buffer: of this index; the best clusters are read through its cache, which this changes.
        scale: multiplies the scores, `D ** -0.5` by default.
        retrieval_ratio, estimation_ratio: shares of a row's clusters, in `[0, 1]`, rounded, at least one cluster unless
            0; the configuration's by default.
        estimation: `"ratio"`, `"all"` or `"none"`; the configuration's by default.
        selector, token_budget: to compare methods: of the indexed tokens, read a share `token_budget`, in `(0, 1]`, of
            the row's. `"full"` reads all, `"oracle"` tokens by their own scores, `"quest"` pages of 16 by the largest
            score their keys' extremes allow, `"cluster"` clusters; `"wave"` too, and it estimates the next ones;
            `"random"` tokens by chance. Units are taken whole while they fit, one at least. Meant for quality, not
            speed: every score is computed.
        seed: of `"random"`, whose choice follows from it, the KV head, the row's length and nothing else; in
            `[0, 2**32)`.
        return_lse: also return the lse.
        return_error_bound: also return the `ErrorBound`.
        return_read: also return which tokens each KV head read exactly.
        backend: `"auto"`, `"reference"`, `"portable"` or `"triton"` (without `selector` and `token_budget`).

    Returns:
        `out [B, 1, Hq, D]`, then, if asked for, `lse [B, 1, Hq]` float32 (float64), the natural logarithm of the sum of
        the scaled scores' exponentials, the bound, and bool `[B, Hkv, index.capacity]`, by position, the tokens read.
        A row without tokens: out 0, lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; q that requires a gradient; more
            pages than the buffer holds (see `WaveBuffer`).
        BackendError: an explicit backend cannot serve this call.

    A NaN or an infinity in any indexed key makes the heads that score it NaN, whether its cluster was chosen or not.
    """
    fn = "wave_attention"
    _check_query(fn, q, index)
    config = index.config
    comparing = selector != "wave" or token_budget is not None
    if comparing:
        check_selector(fn, selector, token_budget, retrieval_ratio, return_error_bound)
        retrieval_ratio = 0.0  # what is read follows from token_budget, and the next clusters are estimated
    retrieval = config.retrieval_ratio if retrieval_ratio is None else retrieval_ratio
    estimated = config.estimation_ratio if estimation_ratio is None else estimation_ratio
    check_share(fn, "retrieval_ratio", retrieval, zero=True)
    check_share(fn, "estimation_ratio", estimated, zero=True)
    estimation = config.estimation if estimation is None else estimation
    check_choice(fn, "estimation", estimation)
    _check_buffer(fn, buffer, index, selector, token_budget)
    check_bool(fn, "return_lse", return_lse)
    check_bool(fn, "return_error_bound", return_error_bound)
    check_bool(fn, "return_read", return_read)
    check_int(fn, "seed", seed, 0)
    if seed > _MAX_SEED:
        raise ValueError(f"{fn}: seed must be at most {_MAX_SEED}, got {seed}")
    scale = check_scale(fn, scale, q.shape[3])
    why = kernel_reasons(config) + _more_reasons(q, buffer, comparing)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, serving(why))
    # What a CUDA graph of a step captures must serve after the index has grown.
    most = index.store.radius.shape[2] if name == "triton" else max(index.clusters)
    error = config.max_error if config.budget == "adaptive" else 0.0
    width = most if error else part(retrieval, most)
    query = Query(scale, config.group_reduce, config.weight_by_size, estimation, width, error, return_error_bound)
    store = index.store._replace(budgets=index.budgets(retrieval, estimated, estimation))
    *cache, policy = ("clock",) if buffer is None else buffer.cache
    options = (selector, token_budget, seed, index.capacity if return_read else 0, cache, policy, name)
    out, lse, lower, upper, read = _wave(q[:, 0], *store, *config.spec, *query, *options)
    found: list[Tensor | ErrorBound] = [out[:, None]]
    if return_lse:
        found.append(lse[:, None])
    if return_error_bound:
        found.append(ErrorBound(lower[:, None], upper[:, None]))
    if return_read:
        found.append(read)
    return tuple(found) if len(found) > 1 else out[:, None]


def _check_query(fn: str, q: Tensor, index: WaveIndex) -> None:
    if not isinstance(index, WaveIndex):
        raise TypeError(f"{fn}: index must be a WaveIndex, got {type(index).__name__}")
    if not isinstance(q, Tensor):
        raise TypeError(f"{fn}: q must be a Tensor, got {type(q).__name__}")
    held = index.store.k
    heads, dim = held.shape[1], held.shape[3]
    if q.ndim != 4 or (*q.shape[:2], q.shape[3]) != (index.batch, 1, dim):
        raise ValueError(f"{fn}: q must have shape [{index.batch}, 1, Hq, {dim}], got {list(q.shape)}")
    if q.shape[2] == 0 or q.shape[2] % heads:
        raise ValueError(f"{fn}: q's heads must be a multiple of the index's heads {heads}, got {q.shape[2]}")
    if q.dtype != held.dtype:
        raise TypeError(f"{fn}: q must have the index's dtype {held.dtype}, got {q.dtype}")
    if q.device != index.device:
        raise ValueError(f"{fn}: q must be on the index's device {index.device}, got {q.device}")
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{fn}: q must not require a gradient: decode under torch.no_grad()")


def check_selector(
    fn: str, selector: str, token_budget: float | None, retrieval_ratio: float | None, bound: bool
) -> None:
    if selector not in SELECTORS:
        raise ValueError(f"{fn}: selector must be one of {', '.join(map(repr, SELECTORS))}, got {selector!r}")
    if token_budget is not None:
        check_share(fn, "token_budget", token_budget)
    elif selector != "full":
        raise ValueError(f"{fn}: selector={selector!r} needs token_budget")
    if retrieval_ratio is not None:
        raise ValueError(f"{fn}: retrieval_ratio needs selector='wave' and no token_budget, got {retrieval_ratio}")
    if bound:
        raise ValueError(f"{fn}: return_error_bound needs selector='wave' and no token_budget")


def _check_buffer(
    fn: str, buffer: WaveBuffer | None, index: WaveIndex, selector: str, token_budget: float | None
) -> None:
    if buffer is None:
        if index.store.k.device != index.device:
            raise ValueError(f"{fn}: index keeps its keys and values in host memory: buffer must be one of its buffers")
        return
    if not isinstance(buffer, WaveBuffer):
        raise TypeError(f"{fn}: buffer must be a WaveBuffer or None, got {type(buffer).__name__}")
    if buffer.closed:
        raise ValueError(f"{fn}: buffer is closed")
    if buffer.index is not index:
        raise ValueError(f"{fn}: buffer must be one of index's, got one of {buffer.index}")
    if selector != "wave" or token_budget is not None:
        raise ValueError(f"{fn}: buffer needs selector='wave' and no token_budget")


def _more_reasons(q: Tensor, buffer: WaveBuffer | None, comparing: bool) -> list[str]:
    """Why kernels cannot serve a call."""
    why = ["selector and token_budget are for portable and reference only"] if comparing else []
    return why + (missing("cuda.core", "cuda") if buffer is not None and q.is_cuda else [])


def _attend(backend: str) -> Callable[..., Attended]:
    if backend == "reference":
        return wave_reference.attend
    if backend == "triton":
        from .kernels.retroinfer import launch

        return launch.attend
    from .kernels.retroinfer.portable import attend

    return attend


def _select(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if backend == "reference":
        return wave_reference.select
    from .kernels.retroinfer.selectors import attend

    return attend


def _read(backend: str) -> Callable[[Tensor, Store, Spec, int], Tensor]:
    if backend == "reference":
        return wave_reference.read_slots
    from .kernels.retroinfer.reads import read_slots

    return read_slots


@torch.library.custom_op("attnlab::wave_attention", mutates_args=("cache",))
@without_autocast
def _wave(
    q: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    radius: Tensor,
    steps: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    k: Tensor,
    v: Tensor,
    k_steady: Tensor,
    v_steady: Tensor,
    lengths: Tensor,
    indexed: Tensor,
    clusters: Tensor,
    budgets: Tensor,
    sink: int,
    local: int,
    segment: int,
    tokens_per_cluster: int,
    iterations: int,
    global_pass: bool,
    max_cluster: int,
    update_every: int,
    scale: float,
    reduce: str,
    weight_by_size: bool,
    estimation: str,
    k_slots: int,
    max_error: float,
    bounds: bool,
    selector: str,
    token_budget: float | None,
    seed: int,
    width: int,
    cache: list[Tensor],
    policy: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    store = Store(
        centroids, value_means, radius, steps, offsets, tokens, k, v, k_steady, v_steady, lengths, indexed, clusters,
        budgets,
    )  # fmt: skip
    spec = Spec(sink, local, segment, tokens_per_cluster, iterations, global_pass, max_cluster, update_every)
    query = Query(scale, reduce, weight_by_size, estimation, k_slots, max_error, bounds)
    if selector != "wave" or token_budget is not None:
        out, lse, read = _select(backend)(q, store, query, spec, selector, token_budget or 1.0, seed, width)
        return out, lse, lse.new_empty(0), lse.new_empty(0), read
    found = _attend(backend)(q, store, query, spec, cache=Cache._make([*cache, policy]) if cache else None)
    lower, upper = (found.lse.new_empty(0) if x is None else x for x in (found.lower, found.upper))
    read = _read(backend)(found.chosen, store, spec, width) if width else _nothing(q, k)
    return found.out, found.lse, lower, upper, read


def _nothing(q: Tensor, k: Tensor, width: int = 0) -> Tensor:
    return q.new_zeros(q.shape[0], k.shape[1], width, dtype=torch.bool)


@_wave.register_fake
def _(q, *options):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    bounds, width, k = options[-8], options[-4], options[6]
    read = _nothing(q, k, width)
    return q.new_empty(q.shape), lse, *(lse.new_empty(lse.shape if bounds else 0) for _ in range(2)), read
