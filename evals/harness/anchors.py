"""Published figures of other models, to be read beside a run's own: what the methods cost where they were proposed."""

from typing import NamedTuple

NIAH = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
RULER = frozenset((*(f"niah_{kind}" for kind in NIAH), "vt", "cwe", "fwe", "qa_1", "qa_2"))


class Anchor(NamedTuple):
    """Figures as their authors print them."""

    suite: str
    model: str
    what: str
    figures: str
    source: str


ANCHORS = (
    Anchor(
        "ruler", "Llama-8B-1M-MoBA", "RULER at 128K, score", "MoBA .7818, full attention .7849",
        "MoBA, arXiv 2502.13189, table 2",
    ),
    Anchor(
        "ruler", "340M parameters, trained with MoBA", "RULER, accuracy in %", "block size 512: 38.8, 128: 56.0",
        "Optimizing Mixture of Block Attention, arXiv 2511.11571",
    ),
    Anchor(
        "ruler", "Llama3.1-8B, Qwen2.5-7B, Llama3-8B-1M, a fourth", "RULER at 128K, points below full attention",
        "wave index 0.66, 1.50, 1.97, 0.73", "RetroInfer, arXiv 2505.02922",
    ),
    Anchor(
        "ragqa", "Qwen2.5-7B", "TriviaQA, F1",
        "full reuse .722, 15 % recomputed .822, and prepared offline .860, full attention .869",
        "FusionRAG, arXiv 2601.12904",
    ),
)  # fmt: skip


def is_ruler(task: str) -> bool:
    """One of RULER's 13, or its substitute `name@noise`."""
    return task.split("@")[0] in RULER


def suite_of(task: str) -> str | None:
    """The suite of published figures that a task belongs to."""
    return "ruler" if is_ruler(task) else "ragqa" if task.startswith("ragqa") else None


def beside(tasks: list[str]) -> list[Anchor]:
    """Those of the suites that the tasks belong to."""
    suites = {suite_of(task) for task in tasks}
    return [anchor for anchor in ANCHORS if anchor.suite in suites]
