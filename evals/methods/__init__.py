"""Methods under test, by name: ways to answer prompts with a model."""

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Method
from attnlab.evals.methods.full import AttnlabFull, Full
from attnlab.evals.methods.fusion import Fusion, Reuse
from attnlab.evals.methods.moba import MoBA
from attnlab.evals.methods.options import describe, method_hash, parse_method
from attnlab.evals.methods.selection import Cluster, Oracle, Quest, Random, Streaming
from attnlab.evals.methods.split import Split
from attnlab.evals.methods.wave import Wave

CLASSES = (Full, AttnlabFull, MoBA, Wave, Quest, Cluster, Streaming, Oracle, Random, Split, Reuse, Fusion)
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in CLASSES}

__all__ = ["METHODS", "describe", "method_hash", "parse"]


def parse(text: str) -> list[Method]:
    """Methods of a comma-separated list, `"full,moba:block=64+topk=8"`.

    Raises:
        UsageError: one line; an unknown method or option, a value of the wrong type, a method twice, none at all.
    """
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise UsageError(f"no method given, of {', '.join(sorted(METHODS))}")
    if not all(parts):
        raise UsageError(f"methods are separated by single commas, got {text!r}")
    found: dict[str, Method] = {}
    for method in (parse_method(part, METHODS) for part in parts):
        if (same := found.setdefault(method_hash(method), method)) is not method:
            raise UsageError(f"method {method.spec!r} is given twice, first as {same.spec!r}")
    return list(found.values())
