"""A cache whose layers keep a `WaveIndex`, so that decoding reads the best clusters of a row and estimates others."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from attnlab.dispatch import check_bool, check_int
from attnlab.retroinfer import check_selector, wave_attention
from attnlab.wave_buffer import WaveBuffer, WaveStats, check_caching
from attnlab.wave_config import WaveConfig
from attnlab.wave_index import WaveIndex

from .caches import taken_over
from .masks import Arrivals
from .plan import check_sparse, named_layers


class Reading(NamedTuple):
    """How a layer's steps read its index."""

    selector: str = "wave"
    token_budget: float | None = None
    seed: int = 0
    track: bool = False


class WaveLayer(CacheLayerMixin):
    """One layer's tokens in a `WaveIndex`, `index`, made when the first ones come, and the index's `buffer`, if any.

    `shares`: of each row's tokens, what each step read, `[B]`, if these are tracked.

    An index holds real tokens only, and which ones are is the mask's business. So `update` returns the new keys alone,
    marked with the layer, and the attention hands them to `take` together with what the mask says.
    """

    is_sliding = False
    index: WaveIndex | None
    buffer: WaveBuffer | None

    def __init__(
        self,
        config: WaveConfig,
        max_length: int,
        backend: str,
        device_budget: float | None = None,
        policy: str = "clock",
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.reading, self.shares = reading or Reading(), list[Tensor]()
        self.config, self.max_length, self.backend = config, max_length, backend
        self.device_budget, self.policy = device_budget, policy
        self.index, self.buffer, self._held, self._new = None, None, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce tokens `[B, Hkv, T, D]`."""
        new = key_states.shape[2]
        if self._new:
            raise ValueError(
                f"WaveCache: {self._new} tokens were announced and never attended to: it needs "
                "attn_implementation='attnlab_wave' in a model that leaves the keys its cache returns as they are"
            )
        if self._held + new > self.max_length:
            raise ValueError(f"WaveCache: {self._held} tokens and {new} more pass max_length={self.max_length}")
        self.lazy_initialization(key_states, value_states)
        self._new = new
        key_states._attnlab_wave = self  # type: ignore[attr-defined]
        return key_states, value_states

    def take(self, k: Tensor, v: Tensor, new: Arrivals) -> WaveIndex:
        """The index after the real ones among the announced tokens `k, v [B, T, G, D]` went in, or as it was."""
        announced, self._new = self._new, 0
        if announced != k.shape[1]:
            raise ValueError(f"WaveCache: {announced} tokens were announced, {k.shape[1]} came")
        index = self._index_for(k)
        for b, (held, count, total) in enumerate(zip(index.lengths, new.counts, new.totals, strict=False)):
            if held + count != total:
                raise ValueError(
                    f"WaveCache: the attention mask shows {total} tokens of row {b}, but {held} are held and {count} "
                    "are new: what was shown once stays shown, and padding stays hidden"
                )
        if new.real is not None:
            order = new.real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
            k, v = (x.gather(1, order.expand(x.shape)) for x in (k, v))
        index.append(k, v, new.counts)
        self._held += announced
        return index

    def take_over(self, keys: Tensor, values: Tensor) -> None:
        """Hold `keys, values [B, Hkv, T, D]`, real tokens all, as if they had been announced and taken."""
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        if k.shape[1] > self.max_length:
            raise ValueError(f"WaveCache: {k.shape[1]} tokens pass max_length={self.max_length}")
        self.lazy_initialization(keys, values)
        self._index_for(k).append(k, v)
        self._held = k.shape[1]

    def attend(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Attention of the newest token `q [B, 1, Hq, D]` and its lse."""
        index, (selector, budget, seed, track) = self.index, self.reading
        assert index is not None  # `take` came first
        found: Any = wave_attention(
            q, index, buffer=self.buffer, scale=scale, selector=selector, token_budget=budget, seed=seed,
            return_lse=True, return_read=track, backend=self.backend,
        )  # fmt: skip
        if track:
            self.shares.append(found[2].sum(-1).float().mean(1) / index.store.lengths.clamp(min=1))
        return found[0], found[1]

    def _index_for(self, k: Tensor) -> WaveIndex:
        batch, _, heads, dim = k.shape
        if self.index is None or (self._held == 0 and not _fits(self.index, k)):
            self.index = self.buffer = None  # frees the old ones first
            self.index = WaveIndex(
                batch, self.max_length, heads, dim, self.config, dtype=k.dtype, device=k.device, backend=self.backend
            )
            if self.device_budget is not None:
                self.buffer = WaveBuffer(self.index, self.device_budget, self.policy)
        return self.index

    def get_seq_length(self) -> int:
        return self._held + self._new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        """Forget all tokens, and what the buffer caches and counts; the storage stays."""
        self._held = self._new = 0
        self.shares = []
        if self.index is not None:
            self.index.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._refuse("take tokens back (assisted generation, crop)")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._refuse("change its rows (beam search: use num_beams=1)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("change its rows (batch_repeat_interleave)")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("change its rows (batch_select_indices)")

    def offload(self) -> None:
        self._refuse("be offloaded")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"WaveCache: a wave index cannot {what}")


class FullLayer(DynamicLayer):
    """A layer of a `WaveCache` that stays dense, and marks its keys so that the attention knows it is meant to."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys._attnlab_wave = False  # type: ignore[attr-defined]
        return keys, values


class WaveCache(DynamicCache):
    """A cache for `attn_implementation="attnlab_wave"`: pass it as `past_key_values`.

    Prompts, whole or in chunks, attend densely. A single new token of each row attends by `wave_attention` over the
    layer's index, which holds the real tokens of each row: rows may be padded anywhere, and differ in length.

    Args:
        config: the model's; its sliding-window and other special layers keep the cache layers transformers gives them.
        wave: how the layers are indexed and read, `WaveConfig()` by default.
        max_length: tokens a row can hold in all, padding counted; reserved when the first ones come. More are a
            ValueError that leaves the cache as it was.
        full_layers: layers that stay dense: `"last:3"`, `"first:2"`, a list of layer indices, or None.
        backend: of `WaveIndex` and `wave_attention`.
        device_budget, policy: of a `WaveBuffer` for each indexed layer, which steps read through: on a CUDA device the
            keys and values in clusters are then kept in host memory. None: no buffers.
        selector, token_budget: of `wave_attention`, to compare methods: what steps read in place of the wave. Random
            tokens differ from layer to layer.
        track_reads: count what steps read, for `read_shares`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Later: beam search, `crop`,
        another attention implementation, a mask that hides tokens which were shown before.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        wave: WaveConfig | None = None,
        *,
        max_length: int,
        full_layers: str | list[int] | tuple[int, ...] | None = None,
        backend: str = "auto",
        device_budget: float | None = None,
        policy: str = "clock",
        selector: str = "wave",
        token_budget: float | None = None,
        track_reads: bool = False,
    ) -> None:
        fn = "WaveCache"
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"{fn}: config must be a transformers config, got {type(config).__name__}")
        if wave is not None and not isinstance(wave, WaveConfig):
            raise TypeError(f"{fn}: wave must be a WaveConfig, got {type(wave).__name__}")
        check_int(fn, "max_length", max_length, 1)
        check_caching(fn, 1 if device_budget is None else device_budget, policy)
        if selector != "wave" or token_budget is not None:
            check_selector(fn, selector, token_budget, None, False)
            if device_budget is not None:
                raise ValueError(f"{fn}: device_budget needs selector='wave' and no token_budget, got {device_budget}")
        check_bool(fn, "track_reads", track_reads)
        super().__init__(config=config)
        dense = named_layers(fn, full_layers, len(self.layers))
        options = (wave or WaveConfig(), max_length, backend, device_budget, policy)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                reading = Reading(selector, token_budget, i, track_reads)
                self.layers[i] = FullLayer() if i in dense else WaveLayer(*options, reading)
        check_sparse(fn, [not isinstance(layer, WaveLayer) for i, layer in enumerate(self.layers) if i not in dense])

    def take_over(self, dense: Any) -> None:
        """Hold the tokens of a dense transformers cache, of rows without padding, as if they had been prefilled here.

        The dense cache stays as it is. ValueError unless this cache is empty, and `dense` one of the same layers, of at
        most `max_length` tokens.
        """
        for i, theirs in taken_over("WaveCache", self, dense):
            if isinstance(self.layers[i], WaveLayer):
                self.layers[i].take_over(theirs.keys, theirs.values)
            elif isinstance(self.layers[i], FullLayer):
                self.layers[i].update(theirs.keys, theirs.values)
            else:
                self.layers[i] = copy.copy(theirs)

    def read_shares(self) -> Tensor:
        """The share of a row's tokens that each step read exactly, `[steps, B]`: the mean over heads of indexed layers.

        Padding is no token. ValueError where `track_reads` is off.
        """
        layers = [layer for layer in self.layers if isinstance(layer, WaveLayer)]
        if not layers[0].reading.track:
            raise ValueError("WaveCache.read_shares: track_reads must be True")
        steps = [torch.stack(shares).mean(0) for shares in zip(*(layer.shares for layer in layers), strict=True)]
        return torch.stack(steps) if steps else torch.zeros(0, 0)

    def stats(self) -> WaveStats:
        """What the buffers did: counters, steps and all bytes summed over layers, the other sizes of one of them.

        Before the first tokens all are 0.

        Raises:
            ValueError: there are no buffers; or a step asked for more pages than a cache holds, see `WaveBuffer.stats`.
        """
        layers = [layer for layer in self.layers if isinstance(layer, WaveLayer)]
        if layers[0].device_budget is None:
            raise ValueError("WaveCache.stats: there are no buffers: device_budget must be in (0, 1], got None")
        found = [layer.buffer.stats() for layer in layers if layer.buffer is not None]
        if not found:
            return WaveStats(0, 0, 0, 0, 0, 0, 0, 0)
        summed = ("hits", "misses", "evictions", "bytes", "steps", "cache_bytes")
        return replace(found[0], **{name: sum(getattr(x, name) for x in found) for name in summed})


def _fits(index: WaveIndex, k: Tensor) -> bool:
    """Whether an index without tokens can take `k [B, T, G, D]`."""
    held = index.store.k
    same = (held.shape[0], held.shape[1], held.shape[3]) == (k.shape[0], k.shape[2], k.shape[3])
    return same and held.dtype == k.dtype and index.device == k.device
