"""Around MoBA: how well the gate routes on given tensors, and FlashMoBA's convolution over keys."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import check_int, check_qkv, check_scale
from .kernels.moba.spec import Spec, cdiv, slots
from .moba import WORKSPACE_BYTES, MoBASelection, moba_select


@dataclass(frozen=True)
class MoBADiagnostics:
    """How a gate routed. `H` is the query heads, or the KV heads under `routing="group"` (masses: the group's mean).

    Attributes:
        block_size, topk: of the call.
        queries: queries per row that had to choose, with more candidates than picks; `recall` is over these.
        load: `[B, H, blocks]` int64, how many queries the gate sent to each block (own, sink and local blocks aside).
        recall: `[B, H]`, share of the picks that are among the as many candidates with the most true attention mass;
            NaN if no query had to choose.
        mass: `[B, H]`, share of the true attention mass in the selected blocks, over all queries.
        oracle: `[B, H]`, the same had the gate picked the candidates with the most mass.
        snr: `[B, H]` or None, the gate's signal-to-noise ratio over the queries with a needle: the mean lead of the
            needle's block over the other candidates, in deviations of a difference of two blocks. Where keys have
            variance `1 / d` per dimension this estimates `delta_mu * sqrt(d / 2B)` (FlashMoBA, arXiv 2511.11571).
        hits, expected_hits: `[B, H]` or None, share of those queries that chose the needle's block, and
            `hit_probability` at the measured SNR.
    """

    block_size: int
    topk: int
    queries: int
    load: Tensor
    recall: Tensor
    mass: Tensor
    oracle: Tensor
    snr: Tensor | None = None
    hits: Tensor | None = None
    expected_hits: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        q: Tensor,
        k: Tensor,
        *,
        block_size: int,
        topk: int,
        causal: bool = True,
        scale: float | None = None,
        routing: str = "head",
        sink_blocks: int = 0,
        local_blocks: int = 0,
        selection: MoBASelection | None = None,
        needles: Tensor | None = None,
        workspace_bytes: int = 256 << 20,
        backend: str = "auto",
    ) -> "MoBADiagnostics":
        """Compare a selection with dense attention, a chunk of queries at a time.

        Args:
            q, k: `[B, Tq, Hq, D]`, `[B, Tk, Hkv, D]`; other options as `moba_select`.
            selection: what to measure; by default what `moba_select` returns.
            needles: int `[B, Tq]`, position of the key each query should find, or -1. Needles outside a query's
                candidates (its own block, say) do not count.
            workspace_bytes: bound on the attention scores held at once.
        """
        fn = "MoBADiagnostics.measure"
        check_int(fn, "workspace_bytes", workspace_bytes, 1)
        check_qkv(fn, q, k)
        if not q.shape[1] or not k.shape[1]:
            raise ValueError(f"{fn}: needs queries and keys, got Tq={q.shape[1]}, Tk={k.shape[1]}")
        _check_needles(fn, needles, q)
        if selection is None:
            selection = moba_select(
                q, k, block_size=block_size, topk=topk, causal=causal, routing=routing, sink_blocks=sink_blocks,
                local_blocks=local_blocks, backend=backend,
            )  # fmt: skip
        scale = check_scale(fn, scale, q.shape[3])
        spec = Spec(block_size, topk, causal, scale, routing == "group", sink_blocks, local_blocks, WORKSPACE_BYTES)
        tally = _Tally(q.detach(), k.detach(), spec, selection.indices)
        step = max(workspace_bytes // max(16 * q.shape[0] * q.shape[2] * k.shape[1], 1), 1)
        for at in range(0, q.shape[1], step):
            with torch.autocast(q.device.type, enabled=False):
                tally.add(at, min(at + step, q.shape[1]), needles)
        return cls(block_size, topk, *tally.result(needles is not None))

    def __str__(self) -> str:
        batch, _, blocks = self.load.shape
        columns = {"recall": self.recall, "mass": self.mass, "oracle": self.oracle}
        load = self.load.double()
        columns["max load"] = load.amax(-1) / load.mean(-1).clamp(min=1e-9)
        columns["idle"] = (self.load == 0).double().mean(-1)
        columns |= {
            name: x
            for name, x in (("snr", self.snr), ("hits", self.hits), ("expected", self.expected_hits))
            if x is not None
        }
        rows = torch.stack([x.double().nanmean(0) for x in columns.values()], -1)
        lines = [
            f"MoBADiagnostics: {batch} rows, {blocks} blocks of {self.block_size}, topk {self.topk}, "
            f"{self.queries} queries with a choice",
            "  head" + "".join(f"{name:>10}" for name in columns),
        ]
        named = [*((str(h), row) for h, row in enumerate(rows)), ("all", rows.nanmean(0))]
        return "\n".join(lines + [f"{name:>6}" + "".join(f"{x:10.3f}" for x in row.tolist()) for name, row in named])


def _check_needles(fn: str, needles: Tensor | None, q: Tensor) -> None:
    if needles is None:
        return
    ints = (torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(needles, Tensor) or needles.dtype not in ints:
        got = getattr(needles, "dtype", type(needles).__name__)
        raise TypeError(f"{fn}: needles must be a Tensor of ints, got {got}")
    if needles.shape != q.shape[:2]:
        raise ValueError(f"{fn}: needles must have shape {list(q.shape[:2])}, got {list(needles.shape)}")


class _Tally:
    """Sums over queries of what `MoBADiagnostics` reports."""

    def __init__(self, q: Tensor, k: Tensor, spec: Spec, indices: Tensor):
        self.q, self.k, self.spec, self.indices = q, k, spec, indices.long()
        self.n = cdiv(k.shape[1], spec.block_size)
        self.kinds = slots(spec, k.shape[1])
        self.heads = k.shape[2] if spec.group else q.shape[2]
        size = (q.shape[0], self.heads)
        self.load = torch.zeros(*size, self.n, dtype=torch.int64, device=q.device)
        zeros = torch.zeros(8, *size, dtype=torch.float64, device=q.device)
        self.recall, self.mass, self.oracle, self.gap, self.noise, self.degrees, self.hits, self.rivals = zeros
        self.queries = 0
        self.found = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
        self.centroids = F.pad(k.double(), (0, 0, 0, 0, 0, -k.shape[1] % spec.block_size))
        self.centroids = self.centroids.unflatten(1, (self.n, -1)).sum(2) / spec.block_size

    def add(self, begin: int, end: int, needles: Tensor | None) -> None:
        spec, device = self.spec, self.q.device
        position = torch.arange(begin, end, device=device) + self.k.shape[1] - self.q.shape[1]
        block = torch.arange(self.n, device=device)
        candidate = (block >= spec.sink_blocks).expand(len(position), -1)
        if spec.causal:
            candidate = candidate & (block < position[:, None] // spec.block_size - spec.local_blocks)
        share = self._mass(begin, end, position)
        chosen = self._mask(self.indices[:, begin:end])
        picked = self._mask(self.indices[:, begin:end, :, self.kinds.total - self.kinds.picks :])
        self.load += picked.sum(1)
        order = share.masked_fill(~candidate[:, None], -1.0).topk(min(self.kinds.picks, self.n), dim=-1).indices
        best = torch.zeros_like(picked).scatter_(-1, order, True) & candidate[:, None]
        choosing = candidate.sum(-1) > self.kinds.picks
        if self.kinds.picks:
            self.queries += int(choosing.sum())
            self.recall += ((picked & best).sum(-1) * choosing[:, None]).sum(1) / self.kinds.picks
        self.mass += (share * chosen).sum((1, 3))
        self.oracle += (share * ((chosen & ~picked) | best)).sum((1, 3))
        if needles is not None:
            self._needles(begin, end, needles[:, begin:end].to(device), candidate, picked)

    def _mass(self, begin: int, end: int, position: Tensor) -> Tensor:
        """True attention mass of each block, `[B, t, H, n]`, float64."""
        hkv, size = self.k.shape[2], self.spec.block_size
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        q = self.q[:, begin:end].to(dtype).unflatten(2, (hkv, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        scores = torch.matmul(q, self.k.to(dtype).permute(0, 2, 3, 1)) * self.spec.scale
        scores = scores.unflatten(2, (end - begin, -1))
        if self.spec.causal:
            hidden = torch.arange(self.k.shape[1], device=q.device) > position[:, None]
            scores.masked_fill_(hidden[:, None], -math.inf)
        weights = F.pad(scores.softmax(-1), (0, self.n * size - self.k.shape[1]))
        mass = weights.unflatten(-1, (self.n, size)).sum(-1, dtype=torch.float64).transpose(1, 2)  # b t g r n
        return mass.mean(3) if self.spec.group else mass.flatten(2, 3)

    def _mask(self, indices: Tensor) -> Tensor:
        """Which blocks `[B, t, H, n]` are named."""
        mask = torch.zeros(*indices.shape[:3], self.n + 1, dtype=torch.bool, device=indices.device)
        return mask.scatter_(-1, torch.where(indices < 0, self.n, indices), True)[..., : self.n]

    def _needles(self, begin: int, end: int, needles: Tensor, candidate: Tensor, picked: Tensor) -> None:
        q = self.q[:, begin:end].double().unflatten(2, (self.k.shape[2], -1))
        scores = torch.einsum("btgrd,bngd->btgrn", q, self.centroids)
        scores = scores.sum(3) if self.spec.group else scores.flatten(2, 3)
        target = needles // self.spec.block_size
        given = (needles >= 0) & candidate.expand(len(needles), -1, -1).gather(2, target.clamp(min=0)[..., None])[
            ..., 0
        ]
        target = target.clamp(min=0)[:, :, None, None].expand(-1, -1, self.heads, 1)
        others = candidate[:, None].expand_as(scores).scatter(-1, target, False) & given[:, :, None, None]
        count = others.sum(-1)
        given = given[..., None] & (count > 0)
        mean = (scores * others).sum(-1) / count.clamp(min=1)
        self.gap += ((scores.gather(-1, target)[..., 0] - mean) * given).sum(1)
        self.noise += ((scores - mean[..., None]).square() * others).sum((1, 3))
        self.degrees += (count - 1).clamp(min=0).sum(1)
        self.hits += (picked.gather(-1, target)[..., 0] & given).sum(1)
        self.found += given[..., 0].sum(1)
        self.rivals += (count * given).sum(1)

    def result(self, with_needles: bool) -> tuple[Any, ...]:
        tq, nan = self.q.shape[1], torch.full_like(self.recall, math.nan)
        recall = self.recall / self.queries if self.queries else nan
        base = (self.queries, self.load, recall, self.mass / tq, self.oracle / tq)
        if not with_needles:
            return base
        found = self.found[:, None]
        snr = self.gap / found / (2 * self.noise / self.degrees).sqrt()
        rivals = (self.rivals / found).nan_to_num().round().long()
        expected = [
            [hit_probability(float(s), int(n) + 1, self.kinds.picks) for s, n in zip(*row)]
            for row in zip(snr.tolist(), rivals.tolist())
        ]
        return *base, snr, self.hits / found, torch.tensor(expected, dtype=torch.float64, device=snr.device)


def hit_probability(snr: float, blocks: int, picks: int) -> float:
    """Chance that the block of a signal is among the `picks` best of `blocks`.

    Block scores are normal with one variance, the signal's with a mean `snr * sqrt(2)` deviations above the others'
    (so `snr = delta_mu * sqrt(d / 2B)`, FlashMoBA, arXiv 2511.11571): fewer than `picks` of the others may pass it.
    """
    if math.isnan(snr):
        return math.nan
    if picks >= blocks:
        return 1.0
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    above = normal.cdf(-(z + snr * math.sqrt(2))).clamp(1e-300, 1 - 1e-16)[:, None]
    j = torch.arange(picks, dtype=torch.float64)
    n = torch.tensor(float(blocks - 1), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    fewer = (ways + j * above.log() + (n - j) * torch.log1p(-above)).exp().sum(-1)
    return float(torch.trapezoid(fewer * normal.log_prob(z).exp(), z).clamp(0, 1))


class KeyConv(nn.Module):
    """Depthwise causal convolution over keys, SiLU, residual: `k + silu(sum_l weight[l] * k[t - l])` per channel.

    FlashMoBA's key convolution (arXiv 2511.11571): neighbouring keys gather, so that small blocks route well. Weights
    start at 0, where the module is the identity and still learns. Call it on the keys that the gate will see.

    Args:
        kv_heads, head_dim: of the keys.
        width: taps, 3 or 5 in the paper.
    """

    def __init__(self, kv_heads: int, head_dim: int, width: int = 3) -> None:
        super().__init__()
        for name, value in (("kv_heads", kv_heads), ("head_dim", head_dim), ("width", width)):
            check_int("KeyConv", name, value, 1)
        self.kv_heads, self.head_dim, self.width = kv_heads, head_dim, width
        self.weight = nn.Parameter(torch.zeros(width, kv_heads, head_dim))

    def extra_repr(self) -> str:
        return f"kv_heads={self.kv_heads}, head_dim={self.head_dim}, width={self.width}"

    def forward(self, k: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Whole sequences `k [B, T, kv_heads, head_dim]`; `cu_seqlens [S + 1]`: packed, `B == 1`."""
        self._check(k)
        if cu_seqlens is None:
            return self._convolve(F.pad(k, (0, 0, 0, 0, self.width - 1, 0)), k, None)
        if k.shape[0] != 1:
            raise ValueError(f"KeyConv: packed sequences need a batch size of 1, got {k.shape[0]}")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.device != k.device:
            raise TypeError(f"KeyConv: cu_seqlens must be 1-d int32 on {k.device}, got {cu_seqlens.dtype}")
        token = torch.arange(k.shape[1], device=k.device, dtype=torch.int32)
        first = cu_seqlens[torch.bucketize(token, cu_seqlens[1:], right=True)]
        return self._convolve(F.pad(k, (0, 0, 0, 0, self.width - 1, 0)), k, token - first)

    def step(self, k: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens of each row, `(out, state)`: feeding a sequence in any cuts gives what `forward` gives.

        Args:
            k: `[B, T, kv_heads, head_dim]`.
            state: `[B, width - 1, kv_heads, head_dim]`, what the last call returned; None: sequences start here.
            lengths: `[B]` ints, real tokens of each row in a ragged chunk (the first ones); all by default.
        """
        self._check(k)
        if state is None:
            state = k.new_zeros(k.shape[0], self.width - 1, *k.shape[2:])
        if state.shape != (k.shape[0], self.width - 1, *k.shape[2:]):
            expected = [k.shape[0], self.width - 1, *k.shape[2:]]
            raise ValueError(f"KeyConv: state must have shape {expected}, got {list(state.shape)}")
        padded = torch.cat([state, k], 1)
        if lengths is None:
            return self._convolve(padded, k, None), padded[:, k.shape[1] :]
        at = lengths.long()[:, None] + torch.arange(self.width - 1, device=k.device)
        return self._convolve(padded, k, None), padded.gather(1, at[..., None, None].expand(-1, -1, *k.shape[2:]))

    def _check(self, k: Tensor) -> None:
        if k.ndim != 4 or k.shape[2:] != (self.kv_heads, self.head_dim):
            raise ValueError(
                f"KeyConv: k must have shape [B, T, {self.kv_heads}, {self.head_dim}], got {list(k.shape)}"
            )

    def _convolve(self, padded: Tensor, k: Tensor, position: Tensor | None) -> Tensor:
        """Taps in one order whatever the cut, so streaming repeats; `position [T]` in packed sequences."""
        dtype, tokens = torch.promote_types(k.dtype, torch.float32), k.shape[1]
        total = torch.zeros_like(k, dtype=dtype)
        for lag in range(self.width):
            tap = padded[:, self.width - 1 - lag :][:, :tokens].to(dtype) * self.weight[lag].to(dtype)
            total = total + (tap if position is None else tap.masked_fill((position < lag)[:, None, None], 0.0))
        return (k.to(dtype) + F.silu(total)).to(k.dtype)
