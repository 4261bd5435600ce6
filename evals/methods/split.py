"""Attention divided over shards, as Lamina does: it must answer as full attention does."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnlab import SplitPlan
from attnlab.evals.harness.method import Subject
from attnlab.evals.methods.attending import AttentionMethod, Rows, feed_question
from attnlab.evals.methods.full import Full
from attnlab.hf import set_split


@dataclass
class Split(Full):
    """Lamina (arXiv 2405.01814): `shards` attend each to its part of the cache, and their states are joined.

    `plan`: what is divided, KV heads, requests or the tokens of a sequence.
    """

    name: ClassVar[str] = "split"
    implementation = "attnlab_split"
    plan: Literal["head", "request", "sequence"] = "sequence"
    shards: int = 2

    def __post_init__(self) -> None:
        self._plan = SplitPlan(self.plan, self.shards)

    def prepare(self, model: Any) -> None:
        set_split(model, self._plan)

    def restore(self, model: Any) -> None:
        set_split(model, None)

    def begin(self, subject: Subject, rows: Rows) -> Any:
        feed_question(subject, rows, rows.prefix)
        return rows.prefix

    attend = AttentionMethod.attend
