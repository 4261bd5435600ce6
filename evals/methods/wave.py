"""RetroInfer, and what else reads a `WaveIndex`: methods that decode over its cache from a dense prefill."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnlab import WaveConfig, WaveIndex, wave_attention
from attnlab.evals.harness.method import Attended, Subject
from attnlab.evals.methods.attending import AttentionMethod, Rows, feed_question, steps
from attnlab.hf import WaveCache


class IndexMethod(AttentionMethod):
    """Decoding over a `WaveCache`. `config` says how tokens are indexed; the first and last ones are always read."""

    implementation = "attnlab_wave"
    config: WaveConfig

    def reading(self, tokens: int) -> dict[str, Any]:
        """`selector` and `token_budget` for prompts of so many tokens; none: RetroInfer."""
        return {}

    def begin(self, subject: Subject, rows: Rows) -> Any:
        cache = WaveCache(
            subject.model.config,
            self.config,
            max_length=rows.size + rows.limit,
            track_reads=True,
            **self.reading(rows.size),
        )
        cache.take_over(rows.prefix)
        feed_question(subject, rows, cache)
        return cache

    def budgets(self, subject: Subject, rows: Rows, cache: Any, lengths: Sequence[int]) -> list[float]:
        shares = cache.read_shares().double().cpu()
        indexed = sum(not layer.is_sliding for layer in cache.layers) / len(cache.layers)
        found = []
        for row, length in enumerate(lengths):
            count = steps(rows, length)
            held = torch.arange(rows.context + 1, rows.context + count + 1).double()
            share = float((shares[:count, row] * held).sum() / held.sum())
            found.append(1 - indexed * (1 - share))
        return found

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        new, total = q.shape[1], k.shape[1]
        first, group = total - new, q.shape[2] // k.shape[2]
        index = WaveIndex.build(k[:, :first], v[:, :first], self.config, capacity=total)
        options: dict[str, Any] = {"scale": scale, "return_lse": True, "return_read": True, **self.reading(total)}
        found = []
        for i in range(new):
            index.append(*(x[:, first + i : first + i + 1] for x in (k, v)))
            found.append(wave_attention(q[:, i : i + 1], index, **options))
        out, lse, read = zip(*found, strict=True)
        return Attended(torch.cat(out, 1), torch.cat(lse, 1), torch.stack(read, 1).repeat_interleave(group, 2))


@dataclass
class Wave(IndexMethod):
    """RetroInfer (arXiv 2505.02922): the best clusters read, the next ones estimated.

    `retrieval` and `estimation` are shares of the clusters. The paper reads 1.8 % of clusters of 16 tokens: at 120K
    tokens some 135 of them, at 1K tokens one, so by default more and smaller ones are read here. The first `sink` and
    the last `local` tokens are always read, and up to `update_every` that wait to be clustered: few, so that short
    contexts are clustered as well.
    """

    name: ClassVar[str] = "wave"
    retrieval: float = 0.1
    estimation: float = 0.232
    tokens_per_cluster: int = 8
    sink: int = 4
    local: int = 64
    update_every: int = 64
    segment: int = 8192

    def __post_init__(self) -> None:
        self.config = WaveConfig(
            sink=self.sink, local=self.local, segment=self.segment, tokens_per_cluster=self.tokens_per_cluster,
            update_every=self.update_every, retrieval_ratio=self.retrieval, estimation_ratio=self.estimation,
        )  # fmt: skip
