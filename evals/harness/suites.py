"""What runs by name: tasks, lengths, samples and methods that go together."""

from typing import NamedTuple

from .errors import UsageError
from .method import Subject

TESTBED = (
    "testbed_single",
    "testbed_multikey",
    "testbed_multivalue",
    "testbed_multiquery",
    "testbed_tracking",
    "testbed_frequent",
    "testbed_documents",
    "testbed_twohop",
)
RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
# MoBA twice at one budget, 256 tokens: blocks of 16 find what blocks of 128 lose.
SPARSE = (
    "moba:block=16+topk=16+phase=decode,moba:block=128+topk=2+phase=decode,wave,"
    "wave:retrieval=.018+tokens_per_cluster=16,quest,cluster,streaming,oracle,random"
)
EVERY = f"full,attnlab_full,split,moba:block=16+topk=16,{SPARSE},reuse,fusionrag"
SHORTEST, LONGEST = 4096, 131072  # of the lengths that are the model's own


class Suite(NamedTuple):
    """Defaults of a run.

    Attributes:
        lengths: in tokens; empty for those from 4096 up, doubled as far as the model takes them.
        samples: per task and length.
        methods: as on the command line.
    """

    name: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    methods: str
    about: str

    def lengths_for(self, subject: Subject) -> tuple[int, ...]:
        """UsageError where the model takes none."""
        if self.lengths:
            return self.lengths
        top = min(subject.max_length, LONGEST)
        if top < SHORTEST:
            raise UsageError(
                f"suite {self.name} begins at {SHORTEST} tokens, {subject.name} takes {top}: give --lengths"
            )
        return tuple(SHORTEST << i for i in range((top // SHORTEST).bit_length()))


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            ("testbed_multikey", "testbed_tracking", "testbed_documents"),
            (1024,),
            32,
            EVERY,
            "three twins of RULER's tasks on the model that ships, every method: minutes",
        ),
        Suite("testbed", TESTBED, (1024, 2048, 4096, 8192, 16384), 64, EVERY, "all twins, to 16K tokens"),
        Suite("ruler", RULER, (), 100, "full,moba,wave,quest", "RULER's thirteen tasks, lengths by the model"),
        Suite(
            "ragqa",
            ("testbed_documents", "testbed_twohop"),
            (1024,),
            200,
            "full,reuse,fusionrag,fusionrag:selector=first_k,fusionrag:selector=random",
            "questions about chunks; LongBench's and CacheBlend's by --tasks ragqa_... --data-dir --lengths",
        ),
        Suite("needle", ("needle",), (), 44, "full,moba,wave,quest", "one needle, depth by length"),
        Suite(
            "attn",
            ("attn_gaussian", "attn_planted", "attn_drift", "attn_testbed"),
            (1024, 4096),
            8,
            f"full,{SPARSE}",
            "attention alone: error, mass and recall on made and captured q, k, v",
        ),
        Suite("text", ("text_loss",), (1024,), 16, "full,moba", "loss by position on Python's own sources"),
    )
}
