"""What the kernels of Lamina read: a cache of keys and values, all seen by every query of its row. Torch only."""

from typing import NamedTuple

from torch import Tensor


class Cache(NamedTuple):
    """Keys and values of `B` rows; strides are free but for the last dimension, which is dense."""

    k: Tensor  # [B, T, Hkv, D], or [pages, page_size, Hkv, D] behind a table
    v: Tensor
    table: Tensor | None  # int32 [B, N]: where each `page_size` keys of a row lie
    lengths: Tensor  # int32 [B]: keys of each row; others do not exist and may hold NaN
