"""The keys and values of one batch: chunks in shared slots, and what requests recompute in slots of their own."""

from typing import Any

import torch
from torch import Tensor

from ..decoder_models import ModelFacts
from ..full import full_attention
from .attention import selective_attention
from .hook import Watch
from .rotate import rotate_keys
from .slots import SlotTable, scatter_kv

SMALL_BACKENDS = ("reference", "portable", "triton")


class Pool:
    """Slots of all layers, and the copy-on-write view of them that a batch of requests reads.

    Args:
        facts, dtype: of the model.
        slots: in each layer.
        rows, width: of the view.
        turning: shared keys keep the position they were stored at, and attention turns them (`rotate_on_load`).
        backend: `selective_attention`'s; the other kernels run it too where they have it, else `"auto"`.

    Attributes:
        k, v: `[layers, slots, Hkv, D]`.
        table: the `SlotTable`.
        shift: int32 `[rows, width]`, how far the key at each place is to be turned; None without `turning`.
        shared: slots filled by `place`.
    """

    def __init__(
        self,
        facts: ModelFacts,
        dtype: torch.dtype,
        slots: int,
        rows: int,
        width: int,
        *,
        turning: bool = False,
        backend: str = "auto",
    ) -> None:
        size, device = (facts.layers, slots, facts.kv_heads, facts.head_dim), facts.device
        self.k, self.v = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        self.table = SlotTable(rows, width, slots, device=device)
        self.shift = torch.zeros(rows, width, dtype=torch.int32, device=device) if turning else None
        self.facts, self.shared, self.backend = facts, 0, backend
        self.small = backend if backend in SMALL_BACKENDS else "auto"

    def place(self, k: Tensor, v: Tensor, shift: int) -> Tensor:
        """Fill fresh shared slots with `k, v [layers, T, Hkv, D]`, keys moved by `shift` positions; the slots."""
        layers, slots, *head = self.k.shape
        first, new = self.table.slots - self.table.free, self.table.reserve(k.shape[1])
        self.shared += k.shape[1]
        here = slice(first, first + k.shape[1])
        self.v[:, here] = v
        if shift:
            turned, all_k = self.facts.turned, self.k.view(layers * slots, *head)
            rows = new.long() + torch.arange(layers, device=new.device)[turned, None] * slots
            k_turned = k[turned].to(all_k.device)
            rotate_keys(k_turned, shift, self.facts.rope, out=all_k, slots=rows, backend=self.small)
        for layer, turns in enumerate(self.facts.rotary):
            if not (turns and shift):
                self.k[layer, here] = k[layer]
        return new

    def share(self, row: int, slots: Tensor, start: int, shift: int) -> None:
        """Append shared slots to a row, at position `start`; with `turning`, keys that are `shift` positions off."""
        self.table.share(row, slots)
        if self.shift is not None:
            self.shift[row, start : start + len(slots)] = shift

    def own(self, positions: Tensor) -> Tensor:
        """Slots `[rows, n]` for tokens at `positions` (-1: none) that are about to be recomputed."""
        if self.shift is not None:
            # Padding clears position 0, which is clear: what begins a context was stored for that place.
            self.shift.scatter_(1, positions.clamp(min=0).long(), 0)
        return self.table.own(positions)

    def keys(self, layer: int, width: int) -> Tensor:
        """The keys `[rows, width, Hkv, D]` of one layer as requests see them; anything behind a row's end."""
        k = self._gather(self.k[layer], width)
        shift = self.shift_of(layer)
        if shift is None:
            return k
        return rotate_keys(k, shift[:, :width].contiguous(), self.facts.rope, backend=self.small)

    def values(self, layer: int, width: int) -> Tensor:
        """The values, as `keys`."""
        return self._gather(self.v[layer], width)

    def shift_of(self, layer: int) -> Tensor | None:
        """`shift` where the layer's keys are to be turned, else None."""
        return self.shift if self.facts.rotary[layer] else None

    def _gather(self, held: Tensor, width: int) -> Tensor:
        return held[self.table.table[:, :width].clamp(min=0).long()]


class PoolStep:
    """Attention of one forward over the pool: rows at `positions [rows, T]` (-1: padding), written to `slots` first."""

    def __init__(self, pool: Pool, positions: Tensor, slots: Tensor, watch: Watch | None = None) -> None:
        self.pool, self.positions, self.slots, self.watch = pool, positions, slots, watch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        pool = self.pool
        shift = pool.shift_of(layer)
        scatter_kv(k, v, pool.k[layer], pool.v[layer], self.slots, backend=pool.small)
        if self.watch is not None:
            self.watch(layer, q, k, v, scale)
        out: Any = selective_attention(
            q,
            pool.k[layer].unsqueeze(1),
            pool.v[layer].unsqueeze(1),
            self.positions,
            page_table=pool.table.table,
            lengths=pool.table.lengths,
            shift=shift,
            rope=None if shift is None else pool.facts.rope,
            scale=scale,
            backend=pool.backend,
        )
        return out


class PrefillStep:
    """Dense causal attention over the tokens of one forward, which start at position 0; rows padded at their ends."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.watch(layer, q, k, v, scale)
        out: Any = full_attention(q, k, v, scale=scale)
        return out
