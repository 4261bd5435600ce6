"""MoBA: the best blocks of keys, chosen by their mean key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

import attnlab
from attnlab.evals.harness.method import Attended, Subject
from attnlab.evals.harness.prefill import prefill
from attnlab.evals.methods.attending import AttentionMethod, Rows, feed_question, steps
from attnlab.evals.methods.full import before
from attnlab.hf import DECODE_TOKENS, MoBADynamicCache, MoBAPlan, set_plan


@dataclass
class MoBA(AttentionMethod):
    """MoBA (arXiv 2502.13189): the own block and the `topk - 1` best ones before it.

    `phase`: where it is sparse. "prefill" reads the whole prompt so and generates densely, "decode" starts from a dense
    prefill of the context. `full_layers`: layers that stay dense, `last:N`, `first:N` or indices joined by `/`.
    """

    name: ClassVar[str] = "moba"
    implementation = "attnlab_moba"
    block: int = 64
    topk: int = 8
    phase: Literal["both", "prefill", "decode"] = "both"
    full_layers: str | None = None

    def __post_init__(self) -> None:
        layers: Any = self.full_layers
        if layers is not None and all(part.isdecimal() for part in layers.split("/")):
            layers = [int(part) for part in layers.split("/")]
        self._plan = MoBAPlan(self.block, self.topk, phase=self.phase, full_layers=layers)
        self.sparse_prefill = self.phase != "decode"

    def prepare(self, model: Any) -> None:
        set_plan(model, self._plan)

    def restore(self, model: Any) -> None:
        set_plan(model, None)

    def begin(self, subject: Subject, rows: Rows) -> Any:
        cache = MoBADynamicCache(subject.model.config)
        if self.sparse_prefill:
            # The last part of a prompt must not look like a decode step.
            return prefill(subject.model, rows.ids.tolist(), cache, keep=DECODE_TOKENS + 1)
        cache.take_over(rows.prefix)
        feed_question(subject, rows, cache)
        return cache

    def budgets(self, subject: Subject, rows: Rows, cache: Any, lengths: Sequence[int]) -> list[float]:
        sparse = self._sparse([layer.is_sliding for layer in cache.layers])
        return [1 - sparse * (1 - self._share(*self._positions(rows, n))) for n in lengths]

    def prefill_budget(self, config: Any, tokens: int) -> float:
        """Of one pass over so many tokens, by a model of this text config."""
        if self.phase == "decode":
            return 1.0
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        sparse = self._sparse([kind == "sliding_attention" for kind in kinds])
        return 1 - sparse * (1 - self._share(range(tokens), range(0)))

    def _sparse(self, windows: Sequence[bool]) -> float:
        """The share of the layers that are, by whether each has a window."""
        dense = self._plan.dense_layers(len(windows))
        return sum(i not in dense and not window for i, window in enumerate(windows)) / len(windows)

    def _positions(self, rows: Rows, answer: int) -> tuple[range, range]:
        """Of tokens read sparsely and densely, while the method was in use."""
        end = rows.context + steps(rows, answer)
        if self.phase == "prefill":
            return range(rows.size), range(rows.size, end)
        return range(0 if self.phase == "both" else rows.context, end), range(0)

    def _share(self, sparse: range, dense: range) -> float:
        """Keys read of those at or before each token."""
        full = [p + 1 for p in sparse]
        held = [min(p // self.block, self.topk - 1) * self.block + p % self.block + 1 for p in sparse]
        rest = sum(p + 1 for p in dense)
        return (sum(held) + rest) / (sum(full) + rest)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        plan: dict[str, Any] = {"block_size": self.block, "topk": self.topk}
        chosen = attnlab.moba_select(q, k, **plan)
        out, lse = attnlab.moba_attention(q, k, v, **plan, selection=chosen, scale=scale, return_lse=True)
        return Attended(out, lse, _keys(chosen.indices, q, k, self.block))


def _keys(blocks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, size: int) -> torch.Tensor:
    """bool `[B, T, H, Tk]`: the keys of chosen blocks `[B, T, H, topk]`, -1 aside, at or before each query."""
    count = -(-k.shape[1] // size)
    named = torch.zeros(*blocks.shape[:3], count + 1, dtype=torch.bool, device=q.device)
    named.scatter_(3, blocks.long().where(blocks >= 0, count), True)
    keys = named[..., :count].repeat_interleave(size, 3)[..., : k.shape[1]]
    return keys & before(q, k)
