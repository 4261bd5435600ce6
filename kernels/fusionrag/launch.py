"""FusionRAG's attention on Triton, under the name every backend has: shapes decide the launch, nothing is read back."""

import torch
from torch import Tensor

from .selective import selective
from .spec import Keys


def forward(q: Tensor, keys: Keys, positions: Tensor, cu_q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`out [Nq, Hq, D]` in q's dtype and `lse [Nq, Hq]` float32 of rows that see keys `0..positions[i]`."""
    with torch.cuda.device_of(q):
        k, v, table, *rest, interleaved = keys
        table = table if table is None else _dense(table)
        starts, lengths, cos, sin = (x if x is None else x.contiguous() for x in rest)
        keys = Keys(_dense(k), _dense(v), table, starts, lengths, cos, sin, interleaved)
        return selective(_dense(q), keys, positions.contiguous(), cu_q.contiguous(), scale)


def _dense(x: Tensor) -> Tensor:
    """`x` with its last dimension dense and keys near enough for int32 offsets within a tile."""
    return x if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(-3) < 2**22) else x.contiguous()
