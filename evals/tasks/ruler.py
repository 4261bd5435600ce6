"""RULER's 13 tasks, and substitutes that need no essays: https://github.com/NVIDIA/RULER, `scripts/data/synthetic`."""

from pathlib import Path

from .generation import GenerationTask
from .ruler_niah import RECIPES, Niah
from .ruler_qa import FILES, DocumentQuestions
from .ruler_tracking import VariableTracking
from .ruler_words import CommonWords, FrequentWords


def make(name: str, data_dir: Path | None = None) -> GenerationTask:
    """UsageError where a task needs a file that the folder does not have, or a package that is not installed."""
    if name in RECIPES:
        return Niah(name, data_dir)
    if name in FILES:
        return DocumentQuestions(name, data_dir)
    if name == "cwe":
        return CommonWords(name, data_dir)
    return {"vt": VariableTracking, "fwe": FrequentWords}[name](name)
