"""A growing cache whose layers keep block sums, so that a decode step reads those and the chosen blocks only."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class BlockSums:
    """Sum of the keys of each complete block; row `b`'s blocks begin at slot `starts[b]`."""

    def __init__(self, block_size: int, starts: tuple[int, ...], keys: Tensor) -> None:
        self.block_size, self.starts = block_size, starts
        self.done = [0] * len(starts)
        self.values = keys.new_zeros(
            len(starts), 0, *keys.shape[2:], dtype=torch.promote_types(keys.dtype, torch.float32)
        )

    def extend(self, keys: Tensor, length: int) -> None:
        """Sum the blocks of `keys [B, capacity, Hkv, D]` that filled up since the last call, at `length` tokens."""
        todo = self._complete(length)
        if todo == self.done:
            return
        blocks = -(-keys.shape[1] // self.block_size)
        if self.values.shape[1] < blocks:
            grown = self.values.new_zeros(keys.shape[0], blocks, *keys.shape[2:])
            grown[:, : self.values.shape[1]] = self.values
            self.values = grown
        alike = len(set(self.starts)) == 1
        for rows in [slice(None)] if alike else [slice(b, b + 1) for b in range(len(todo))]:
            begin, end, start = self.done[rows][0], todo[rows][0], self.starts[rows][0]
            if end > begin:
                new = keys[rows, start + begin * self.block_size : start + end * self.block_size]
                self.values[rows, begin:end] = new.unflatten(1, (-1, self.block_size)).sum(2, dtype=self.values.dtype)
        self.done = todo

    def crop(self, length: int) -> None:
        self.done = [min(done, whole) for done, whole in zip(self.done, self._complete(length), strict=True)]

    def select(self, rows: Tensor) -> None:
        order = rows.tolist()
        self.starts, self.done = tuple(self.starts[i] for i in order), [self.done[i] for i in order]
        self.values = self.values.index_select(0, rows)

    def _complete(self, length: int) -> list[int]:
        return [max(length - start, 0) // self.block_size for start in self.starts]


class MoBALayer(DynamicLayer):
    """One layer's keys and values, stored `[B, capacity, Hkv, D]`; `keys` and `values` are `[B, Hkv, T, D]` views.

    The buffers grow by half. `update` marks the keys it returns with the layer they came from, and the attention asks
    it for `block_sums`, extended only when a block fills up. A row's blocks start at its first real token, so under
    left padding the sums depend on the mask and are first made when the attention asks.
    """

    keys: Tensor | None
    values: Tensor | None
    _k: Tensor
    _v: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._len = 0
        self._sums: BlockSums | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._k, self._v = (x[:, :, :0].transpose(1, 2).detach() for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, T, D]`; the keys and values so far, `[B, Hkv, T_all, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self._len == 0
        k, v = self._append(self._k, key_states), self._append(self._v, value_states)
        self._hold(k, v, self._len + key_states.shape[2])
        # The mark goes on a tensor the layer does not hold, so there is no reference cycle.
        keys, values = (key_states, value_states) if first else (x[:, : self._len].transpose(1, 2) for x in (k, v))
        keys._attnlab_layer = self  # type: ignore[attr-defined]
        return keys, values

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values as allocated, `[B, capacity, Hkv, D]`."""
        return self._k, self._v

    @torch.no_grad()
    def block_sums(self, block_size: int, starts: tuple[int, ...] | None) -> Tensor:
        """Sum of the keys of each complete block, `[B, blocks, Hkv, D]` float32; row `b`'s begin at `starts[b]`."""
        starts = starts or (0,) * self._k.shape[0]
        if self._sums is None or (self._sums.block_size, self._sums.starts) != (block_size, starts):
            self._sums = BlockSums(block_size, starts, self._k)
        self._sums.extend(self._k, self._len)
        return self._sums.values

    def get_seq_length(self) -> int:
        return self._len

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"MoBALayer: crop takes minus the number of tokens to drop, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self._hold(self._k, self._v, max(self._len + tokens_to_remove, 0))
        if self._sums is not None:
            self._sums.crop(self._len)

    def reset(self) -> None:
        self._len, self._sums = 0, None
        self._k = self._v = torch.zeros(0)
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._len:
            self.batch_select_indices(torch.arange(self._k.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows `indices` (or where a bool mask is true), in that order."""
        if not self._len:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        rows = indices.to(self._k.device)
        self._hold(self._k.index_select(0, rows), self._v.index_select(0, rows), self._len)
        if self._sums is not None:
            self._sums.select(rows)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized and self._k.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            k, v = (x.to(device, non_blocking=True) for x in (self._k, self._v))
            self._hold(k, v, self._len)
            if self._sums is not None:
                self._sums.values = self._sums.values.to(device, non_blocking=True)

    def _append(self, buffer: Tensor, states: Tensor) -> Tensor:
        """The buffer with `states [B, H, T, D]` behind its first `_len` tokens, in place where they fit."""
        new, kept = states.transpose(1, 2), buffer[:, : self._len]
        total = self._len + new.shape[1]
        if torch.is_grad_enabled() and (new.requires_grad or kept.requires_grad):
            return torch.cat([kept, new], 1)  # an earlier step's graph may hold the buffer
        if buffer.shape[1] < total:
            batch, _, heads, dim = new.shape
            buffer = new.new_empty(batch, max(total + 64, self._len * 3 // 2), heads, dim)
            buffer[:, : self._len] = kept
        buffer[:, self._len : total] = new
        return buffer

    def _hold(self, k: Tensor, v: Tensor, length: int) -> None:
        self._k, self._v, self._len = k, v, length
        self.keys, self.values = (x[:, :length].transpose(1, 2) for x in (k, v))


class MoBADynamicCache(DynamicCache):
    """`DynamicCache` for `attn_implementation="attnlab_moba"`: pass it as `past_key_values` to make decoding sparse.

    `config`: the model's; its sliding-window and other special layers keep the cache layers transformers gives them.
    With a plain `DynamicCache` the results are the same, but each step reads and sums all cached keys anew.
    """

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(self, config: Any = None, offloading: bool = False, offload_only_non_sliding: bool = False) -> None:
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = MoBALayer
        self.layers = [MoBALayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    def take_over(self, dense: Any) -> None:
        """Hold the tokens of a dense transformers cache, of rows without padding, as if they had been prefilled here.

        The dense cache stays as it is. ValueError unless this cache is empty and `dense` one of the same layers.
        """
        for i, theirs in taken_over("MoBADynamicCache", self, dense):
            if isinstance(self.layers[i], MoBALayer):
                self.layers[i].update(theirs.keys, theirs.values)
            else:
                self.layers[i] = copy.copy(theirs)


def taken_over(fn: str, cache: Any, dense: Any) -> Iterator[tuple[int, Any]]:
    """The numbered layers of a dense cache that an empty one takes over; special layers are of one type in both."""
    layers = getattr(dense, "layers", None)
    if layers is None:
        raise TypeError(f"{fn}.take_over: dense must be a transformers DynamicCache, got {type(dense).__name__}")
    if cache.get_seq_length():
        raise ValueError(f"{fn}.take_over: this cache must be empty, it holds {cache.get_seq_length()} tokens")
    if len(layers) != len(cache.layers):
        raise ValueError(f"{fn}.take_over: dense must have {len(cache.layers)} layers, got {len(layers)}")
    for i, (mine, theirs) in enumerate(zip(cache.layers, layers, strict=True)):
        wanted = type(mine) if mine.is_sliding else DynamicLayer
        if type(theirs) is not wanted or not theirs.is_initialized:
            what = "an empty layer" if type(theirs) is wanted else type(theirs).__name__
            raise ValueError(f"{fn}.take_over: dense's layer {i} must be a filled {wanted.__name__}, got {what}")
    yield from enumerate(layers)
