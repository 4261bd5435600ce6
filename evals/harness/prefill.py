"""Dense prefills that methods share: rows of one length run together, and caches are copied, taken apart and joined."""

import copy
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

CHUNK_TOKENS = 8192  # of all rows together, in one forward pass


def equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """The places of equal keys, in order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def prefill(model: Any, rows: Sequence[Sequence[int]], cache: Any = None, keep: int = 0) -> Any:
    """A cache that has read `rows`, token ids of one length, but for their last `keep` tokens at least.

    In chunks, under the attention that the model is set to. `cache`: an empty one; transformers' own by default.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    ids = torch.tensor(rows, device=model.get_input_embeddings().weight.device)
    chunk = max(1, CHUNK_TOKENS // len(rows))
    end = ids.shape[1] - keep
    if keep:
        end = end // chunk * chunk  # what is kept goes with the rest of the last chunk
    for begin in range(0, end, chunk):
        read(model, ids[:, begin : min(begin + chunk, end)], cache)
    return cache


def read(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Feed tokens `[B, T]` to a model, for the cache's sake."""
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)


def row_of(cache: Any, row: int) -> Any:
    """A cache of one row of another, which stays as it is."""
    found = _twin(cache)
    found.batch_select_indices(torch.tensor([row]))
    return found


def joined(caches: Sequence[Any]) -> Any:
    """A cache with the rows of several of equal length, which stay as they are."""
    found = _twin(caches[0])
    for i, layer in enumerate(found.layers):
        if len(caches) > 1 and layer.is_initialized:
            layer.keys = torch.cat([cache.layers[i].keys for cache in caches])
            layer.values = torch.cat([cache.layers[i].values for cache in caches])
    return found


def _twin(cache: Any) -> Any:
    """A copy with layers of its own; dynamic layers never write to the tensors they hold, so these are shared."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found
