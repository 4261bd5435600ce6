"""Dense attention: the model's own, and this library's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnlab import full_attention
from attnlab.evals.harness.method import Attended, Subject
from attnlab.evals.methods.attending import AttentionMethod, Rows


@dataclass
class Full(AttentionMethod):
    """Dense attention as transformers has it."""

    name: ClassVar[str] = "full"

    def begin(self, subject: Subject, rows: Rows) -> Any:
        return rows.prefix

    def budgets(self, subject: Subject, rows: Rows, cache: Any, lengths: Sequence[int]) -> list[float]:
        return [1.0] * len(lengths)

    def prefill_budget(self, config: Any, tokens: int) -> float:
        """Of one pass over so many tokens."""
        return 1.0

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Attended:
        out, lse = full_attention(q, k, v, scale=scale, return_lse=True)
        return Attended(out, lse, before(q, k))


@dataclass
class AttnlabFull(Full):
    """Dense attention through `attnlab.full_attention`."""

    name: ClassVar[str] = "attnlab_full"
    implementation = "attnlab_full"

    attend = AttentionMethod.attend


def before(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """bool `[B, T, Hq, Tk]`: the keys at or before each query."""
    (batch, new, heads, _), total = q.shape, k.shape[1]
    position = torch.arange(total - new, total, device=q.device)
    seen = torch.arange(total, device=q.device) <= position[:, None]
    return seen[None, :, None].expand(batch, new, heads, total)
