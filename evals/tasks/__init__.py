"""The tasks by name. A module of this folder is imported when one of its tasks is made."""

import importlib
from pathlib import Path
from typing import NamedTuple

from attnlab.evals.harness.errors import unknown
from attnlab.evals.harness.task import Task


class Entry(NamedTuple):
    """`module.make(name, data_dir)` makes the task."""

    module: str
    about: str


_MODULES = {
    "testbed": {
        "testbed_single": "one needle in filler words",
        "testbed_multikey": "one of many needles; half of the text is needles",
        "testbed_multivalue": "all four values of one of eight keys",
        "testbed_multiquery": "four of many keys, asked one after another",
        "testbed_tracking": "the five variables of one of two chains of assignments",
        "testbed_frequent": "the three most frequent words, counts by Zipf's law",
        "testbed_documents": "an attribute of an entity, in chunks of 24 tokens",
        "testbed_twohop": "an attribute of the entity that a relation leads to, facts far from their entity",
    },
    "needle": {"needle": "one needle at each depth of a text: eleven depths, index by index"},
    "ruler": {
        "niah_single_1": "a number by a word, in a sentence again and again",
        "niah_single_2": "a number by a word, in essays",
        "niah_single_3": "a uuid by a word, in essays",
        "niah_multikey_1": "a number by one of four words, in essays",
        "niah_multikey_2": "a number by one of many words; all of the text is needles",
        "niah_multikey_3": "a uuid by one of many uuids; all of the text is needles",
        "niah_multivalue": "four numbers by a word, in essays",
        "niah_multiquery": "four numbers by four words, in essays",
        "vt": "variable tracking: one chain of five variables, after an example",
        "cwe": "the ten common words of a numbered list, after an example",
        "fwe": "the three most frequent of coded words, counts by Zipf's law",
        "qa_1": "questions about SQuAD's paragraphs",
        "qa_2": "questions about HotpotQA's documents",
        "niah_single_2@noise": "niah_single_2 with a sentence again and again for essays",
        "niah_single_3@noise": "niah_single_3 with a sentence again and again for essays",
        "niah_multikey_1@noise": "niah_multikey_1 with a sentence again and again for essays",
        "niah_multivalue@noise": "niah_multivalue with a sentence again and again for essays",
        "niah_multiquery@noise": "niah_multiquery with a sentence again and again for essays",
    },
    "ragqa": {
        "ragqa_narrativeqa": "LongBench: questions about a story",
        "ragqa_qasper": "LongBench: questions about a scientific article",
        "ragqa_multifieldqa_en": "LongBench: questions about texts of many fields",
        "ragqa_hotpotqa": "LongBench: questions of two hops about passages",
        "ragqa_2wikimqa": "LongBench: questions of several hops about passages",
        "ragqa_musique": "LongBench: questions of up to four hops about passages",
        "ragqa_triviaqa": "LongBench: a question about a passage, after examples",
        "ragqa_musique_s": "CacheBlend: MuSiQue, ten passages",
        "ragqa_wikimqa_s": "CacheBlend: 2WikiMQA, passages",
        "ragqa_samsum": "CacheBlend: a dialogue's summary, after examples",
    },
    "attention": {
        "attn_gaussian": "attention alone, on independent keys",
        "attn_planted": "attention alone, on topics and needles",
        "attn_drift": "attention alone, on drifting topics and sinks",
        "attn_testbed": "attention alone, in every layer of the model on a prompt it can read",
        "attn_dump": "attention alone, on q, k, v from safetensors files",
        "attn_deviation": "how far keys and values of chunks alone are from those in context, by layer",
    },
    "text": {"text_loss": "loss by position on Python's sources, of the model or of byte models trained for it"},
}
TASKS = {name: Entry(module, about) for module, tasks in _MODULES.items() for name, about in tasks.items()}


def make(name: str, data_dir: Path | None = None) -> Task:
    """The task; UsageError for a name that is none, and for a data file that is not there."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return importlib.import_module(f".{TASKS[name].module}", __package__).make(name, data_dir)
