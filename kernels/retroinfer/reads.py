"""Which tokens a step reads exactly, and the draws of a step that reads tokens at random."""

import torch
from torch import Tensor

from .spec import Spec, Store

_WORD = 0xFFFFFFFF


def slots_of(store: Store) -> Tensor:
    """The slot `[B, G, N]` int64 of each member; places without one name any."""
    batch, heads, places = store.tokens.shape
    at = torch.arange(places, dtype=torch.int32, device=store.tokens.device).expand(batch, heads, -1).contiguous()
    ends = store.offsets[:, :, 1:].contiguous()
    return torch.searchsorted(ends, at, right=True).clamp(max=max(ends.shape[2] - 1, 0))


def read_slots(chosen: Tensor, store: Store, spec: Spec, width: int) -> Tensor:
    """`tokens_read` where the clusters `chosen [B, G, K]` are read, -1 aside."""
    batch, heads, count = *chosen.shape[:2], store.offsets.shape[2] - 1
    taken = torch.zeros(batch, heads, count + 1, dtype=torch.bool, device=chosen.device)
    taken.scatter_(2, chosen.long().where(chosen >= 0, count), True)
    live = torch.arange(store.tokens.shape[2], device=chosen.device) < store.indexed[:, None, None]
    return tokens_read(taken[..., :count].gather(2, slots_of(store)) & live, store, spec, width)


def tokens_read(members: Tensor, store: Store, spec: Spec, width: int) -> Tensor:
    """bool `[B, G, width]`, by position: the steady zone and the `members [B, G, N]` named. A width of 0: not asked."""
    if not width:
        return members[..., :0].contiguous()
    t, lengths, indexed = torch.arange(width, device=members.device), store.lengths, store.indexed
    lengths, indexed = lengths[:, None, None], indexed[:, None, None]
    steady = ((t < spec.sink) | (t >= spec.sink + indexed)) & (t < lengths)
    found = torch.nn.functional.pad(steady.expand(-1, members.shape[1], -1), (0, 1))
    return found.scatter(2, store.tokens.long().where(members, width), True)[..., :width].contiguous()


def draws(seed: int, heads: int, lengths: Tensor, tokens: int) -> Tensor:
    """`[B, heads, tokens]` int64 in `[0, 2**32)`: a hash of the seed, the head, the row's length and the position."""
    device = lengths.device
    head, token = (torch.arange(n, device=device) for n in (heads, tokens))
    drawn = torch.full((1, 1, 1), seed, device=device)
    for value in (head[:, None], lengths.long()[:, None, None], token):
        drawn = _mix(drawn ^ value)
    return drawn


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words whose every output bit depends on every input bit."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
