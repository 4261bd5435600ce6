"""What transformers says about padding, packing and mask shapes, carried to the attention as a 2-D mask.

Like flash attention's, the registered mask function never builds `[T, T]`: it hands on `[B, T]`, bool for padding or
negative int32 for packed sequences, with the rest of what it knows (`Pattern`) as an attribute. Mask shapes this
library does not have are refused there and then.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """The shape of a mask apart from padding."""

    causal: bool
    window: int | None
    trivial: bool  # no padding, no packing, no unwritten keys


class Packing(NamedTuple):
    """How the tokens of a call become packed sequences."""

    cu_q: Tensor  # int32 [S+1]
    cu_k: Tensor
    q_index: Tensor | None  # real tokens among the B*Tq flattened ones; None: all of them
    k_index: Tensor | None
    starts: tuple[int, ...] | None  # row b's keys are slots starts[b]..Tk-1; None: not of that form


class Arrivals(NamedTuple):
    """What a call adds to rows that a cache holds without their padding."""

    counts: tuple[int, ...]  # real tokens among each row's new ones,
    totals: tuple[int, ...]  # and among all of the row's
    real: Tensor | None  # [B, Tq] bool; None: all new ones are


_SUPPORTED = "attnlab supports causal, bidirectional and sliding-window masks with padding or packed sequences"


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function registered with transformers: None for a plain causal mask, else `[B, <= kv_length]`."""
    causal, window, packed = _parse(mask_function)
    if packed is not None:
        return _tag(_encode(packed), Pattern(causal, window, False))
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if attention_mask.shape[1] != kv_length or not attention_mask.all():
            return _tag(attention_mask, Pattern(causal, window, False))
    elif causal and (written := int(q_offset + q_length - kv_offset)) < kv_length:
        # A static cache hands over slots that nothing was written to yet.
        ones = torch.ones(batch_size, written, dtype=torch.bool, device=device)
        return _tag(ones, Pattern(causal, window, False))
    if causal and window is None:
        return None
    ones = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return _tag(ones, Pattern(causal, window, True))


def pattern(mask: Tensor | None) -> Pattern | None:
    return getattr(mask, "_attnlab_pattern", None)


def _tag(mask: Tensor, value: Pattern) -> Tensor:
    mask = mask.view(mask.shape)
    mask._attnlab_pattern = value  # type: ignore[attr-defined]
    return mask


def _parse(fn: Callable[..., Any] | None) -> tuple[bool, int | None, Tensor | None]:
    """(causal, window, packed sequence ids) of a transformers mask function, by what it is made of."""
    causal, window, packed = False, None, None
    for name, held in _parts(fn):
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            window = held["sliding_window"]
        elif name == "packed_sequence_mask_function":
            packed = held["packed_sequence_mask"]
        elif name == "sliding_window_bidirectional_overlay":
            raise ValueError("attnlab: sliding windows need a causal mask, this model asks for a bidirectional one")
        elif name != "bidirectional_mask_function":
            raise ValueError(f"attnlab: masks built with {name} are not supported; {_SUPPORTED}")
    return causal, window, packed


def _parts(fn: Any) -> list[tuple[str, dict[str, Any]]]:
    if getattr(fn, "__module__", None) != "transformers.masking_utils":
        return [(getattr(fn, "__qualname__", repr(fn)), {})]
    name = fn.__qualname__.split(".")[0]
    held = dict(zip(fn.__code__.co_freevars, (cell.cell_contents for cell in fn.__closure__ or ()), strict=True))
    if name == "and_masks":
        return [part for inner in held["mask_functions"] for part in _parts(inner)]
    if name == "remap_positions_for_packed_sequence":
        return _parts(held["mask_function"])
    return [(name, held)]


def packing(mask: Tensor | None, position_ids: Any, batch: int, tq: int, tk: int, causal: bool) -> Packing | None:
    """How to pack `batch` rows of `tq` queries and `tk` keys; None where every row is one whole sequence.

    Computed once per forward pass, not per layer: kept on the tensor it was read from.
    """
    if mask is None:
        if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or tq == 1 or tq != tk:
            return None
        source = position_ids
        make: Callable[[Tensor, int, int, bool], Packing | None] = _from_positions
    elif _trivial(mask, batch):
        return None
    else:
        source, make = mask, _from_mask
    return _once(source, "_attnlab_packing", (batch, tq, tk, causal), make)


def arrivals(mask: Tensor | None, batch: int, tq: int, total: int) -> Arrivals:
    """Which of the newest `tq` of `total` columns are real; computed once per forward pass, as `packing`."""
    if mask is None or _trivial(mask, batch):
        return Arrivals((tq,) * batch, (total,) * batch, None)
    return _once(mask, "_attnlab_arrivals", (batch, tq, total), _arrivals)


def appended(new: Arrivals, device: torch.device) -> Packing:
    """The new tokens as queries of packed rows that they end."""
    cu_q, cu_k = (_cumulative(torch.tensor(x, device=device)) for x in (new.counts, new.totals))
    index = None if new.real is None else new.real.flatten().nonzero().squeeze(1)
    return Packing(cu_q, cu_k, index, None, None)


def _trivial(mask: Tensor, batch: int) -> bool:
    """Whether a mask hides nothing; ones of any other shape than `[B, T]` are refused."""
    if mask.ndim != 2 or mask.shape[0] not in (1, batch):
        shape = list(mask.shape)
        raise ValueError(f"attnlab: custom attention masks are not supported, got one of shape {shape}; {_SUPPORTED}")
    return (known := pattern(mask)) is not None and known.trivial


def _once(source: Tensor, name: str, key: tuple[Any, ...], make: Callable[..., Any]) -> Any:
    """`make(source, *key[1:])` for `key[0]` rows, kept on `source` until it changes."""
    key = (0 if source.is_inference() else source._version, *key)
    kept = getattr(source, name, None)
    if kept is None or kept[0] != key:
        kept = (key, make(source.expand(key[1], -1), *key[2:]))
        setattr(source, name, kept)
    return kept[1]


def from_kwargs(cu_q: Any, cu_k: Any) -> Packing | None:
    """The `cu_seq_lens_q`, `cu_seq_lens_k` that transformers passes along for flash attention."""
    if cu_q is None and cu_k is None:
        return None
    if not isinstance(cu_q, Tensor) or not isinstance(cu_k, Tensor):
        raise ValueError("attnlab: cu_seq_lens_q and cu_seq_lens_k must be given together, as Tensors")
    return Packing(cu_q.to(torch.int32), cu_k.to(torch.int32), None, None, None)


def _encode(segments: Tensor) -> Tensor:
    """Negative, so that no 0/1 padding mask looks like it even where the attribute is lost."""
    return (-1 - segments).to(torch.int32)


def _from_mask(mask: Tensor, tq: int, tk: int, causal: bool) -> Packing:
    return _from_segments(mask, tq, tk) if _encoded(mask) else _from_padding(mask.bool(), tq, tk, causal)


def _arrivals(mask: Tensor, tq: int, total: int) -> Arrivals:
    if _encoded(mask):
        raise ValueError("attnlab: packed sequences cannot go on from a cache that holds one sequence a row")
    if mask.shape[1] != total:
        raise ValueError(f"attnlab: the attention mask covers {mask.shape[1]} tokens, but there are {total}")
    real = mask[:, total - tq :].bool()
    counts, totals = torch.stack([real.sum(1), mask.bool().sum(1)]).tolist()
    return Arrivals(tuple(counts), tuple(totals), None if min(counts) == tq else real)


def _encoded(mask: Tensor) -> bool:
    """Whether a mask is of packed sequences, see `_encode`."""
    if mask.dtype.is_floating_point:
        raise ValueError(f"attnlab: additive attention masks are not supported, got one of {mask.dtype}; {_SUPPORTED}")
    return mask.dtype == torch.int32 and bool((mask < 0).all())


def _from_padding(mask: Tensor, tq: int, tk: int, causal: bool) -> Packing:
    """Queries are the last `tq` columns; without causality they may be other tokens, so all of them count."""
    batch, width = mask.shape
    if width > tk or (causal and width < tq):
        raise ValueError(f"attnlab: the attention mask covers {width} tokens, but there are {tq} queries and {tk} keys")
    keys = torch.nn.functional.pad(mask, (0, tk - width))
    cu_k = _cumulative(mask.sum(1))
    k_index = keys.flatten().nonzero().squeeze(1)
    if not causal:
        steps = torch.arange(batch + 1, device=mask.device, dtype=torch.int32)
        return Packing(steps * tq, cu_k, None, k_index, None)
    queries = mask[:, width - tq :]
    q_index = queries.flatten().nonzero().squeeze(1)
    lengths = mask.sum(1)
    suffix = torch.arange(width, device=mask.device) >= (width - lengths)[:, None]
    left = width == tk and bool((suffix == mask).all())
    starts = tuple((width - lengths).tolist()) if left else None
    return Packing(_cumulative(queries.sum(1)), cu_k, q_index, k_index, starts)


def _from_segments(segments: Tensor, tq: int, tk: int) -> Packing:
    batch, width = segments.shape
    if not width == tq == tk:
        raise ValueError(f"attnlab: packed sequences over {width} tokens, but there are {tq} queries and {tk} keys")
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    cu = torch.nn.functional.pad(first.flatten().nonzero().squeeze(1), (0, 1), value=batch * width).to(torch.int32)
    return Packing(cu, cu, None, None, None)


def _from_positions(position_ids: Tensor, tq: int, tk: int, causal: bool) -> Packing | None:
    """A position that is not its predecessor's plus one starts a sequence: transformers' own rule."""
    if position_ids.shape[1] != tq:
        return None
    breaks = position_ids.diff(dim=1) != 1
    if not breaks.any():
        return None
    return _from_segments(torch.nn.functional.pad(breaks.cumsum(1), (1, 0)), tq, tk)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
