"""Questions, retrieved chunks and answers from LongBench's and CacheBlend's files, and their published prompts."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from attnlab.evals.harness.errors import UsageError

WORDS = 200  # of a piece of a text that is no list of passages, as in LongBench's retrieval
PASSAGE = re.compile(r"^Passage(?: \d+)?:", re.MULTILINE)


class DataSet(NamedTuple):
    """A file `NAME.jsonl` of LongBench or `NAME.json` of CacheBlend, and what a model is asked.

    Attributes:
        prompt: with `{context}` and `{input}` in it.
        limit: tokens of an answer.
        metrics: names in `METRICS`, the main one first.
        first_line: an answer's first line is scored, what follows is not.
        titled: CacheBlend's chunks begin with their titles.
    """

    file: str
    prompt: str
    limit: int
    metrics: tuple[str, ...] = ("f1", "exact_match")
    first_line: bool = False
    titled: bool = True


class Entry(NamedTuple):
    """The chunks are the context, joined."""

    question: str
    chunks: tuple[str, ...]
    answers: tuple[str, ...]


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
DATA_SETS = {
    "narrativeqa": DataSet(
        "narrativeqa.jsonl",
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "qasper": DataSet(
        "qasper.jsonl",
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n"
        " Answer the question based on the above article as concisely as you can, using a single phrase or sentence if "
        "possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide '
        "any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "multifieldqa_en": DataSet(
        "multifieldqa_en.jsonl",
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        64,
    ),
    "hotpotqa": DataSet("hotpotqa.jsonl", _PASSAGES, 32),
    "2wikimqa": DataSet("2wikimqa.jsonl", _PASSAGES, 32),
    "musique": DataSet("musique.jsonl", _PASSAGES, 32),
    "triviaqa": DataSet(
        "triviaqa.jsonl",
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        first_line=True,
    ),
    "musique_s": DataSet(
        "musique_s.json",
        "You will be asked a question after reading several passages. Please directly answer the question based on the "
        "given passages. Do NOT repeat the question. The answer should be within 5 words..\nPassages:\n{context}\n\n"
        "Answer the question directly based on the given passages. Do NOT repeat the question. The answer should be "
        "within 5 words. \nQuestion:{input}\nAnswer:",
        32,
        first_line=True,
    ),
    "wikimqa_s": DataSet(
        "wikimqa_s.json",
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\n{context}\n\n"
        "Answer the question based on the given passages. Answer the question within 5 words. Do NOT repeat the "
        "question or output any other words. Question: {input}\nAnswer:",
        32,
        first_line=True,
    ),
    "samsum": DataSet(
        "samsum.json",
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        ("rouge_1",),
        first_line=True,
        titled=False,
    ),
}


def read(data: DataSet, path: Path) -> list[Entry]:
    """All entries of a file. UsageError, one line that names the file and the entry, for what is not of its form."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from None
    if path.suffix == ".jsonl":
        return [_longbench(where, found) for where, found in _lines(path, text)]
    found = _parsed(str(path), text)
    if not isinstance(found, list):
        raise UsageError(f"{path} must hold a list of entries, got {_what(found)}")
    return [_cacheblend(f"{path}: entry {i}", entry, data) for i, entry in enumerate(found)]


def pieces(text: str) -> tuple[str, ...]:
    """A text cut before each line `Passage 1:`, or after every 200 words where it has fewer than two of these."""
    begins = [found.start() for found in PASSAGE.finditer(text)]
    if len(begins) < 2:
        begins = [found.start() for found in re.finditer(r"\S+", text)][::WORDS]
    cuts = [0, *begins[1:], len(text)]
    return tuple(text[a:b] for a, b in itertools.pairwise(cuts))


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {n}", _parsed(f"{path}, line {n}", line)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise UsageError(f"{where}: this is not JSON: {e}") from None


def _longbench(where: str, entry: Any) -> Entry:
    question, context = _text(where, entry, "input"), _text(where, entry, "context")
    if not context.strip():
        raise UsageError(f"{where}: context must be a text, got an empty one")
    return Entry(question, pieces(context), _answers(where, entry))


def _cacheblend(where: str, entry: Any, data: DataSet) -> Entry:
    question, found = _text(where, entry, "question"), _list(where, entry, "ctxs")
    if not question.strip():
        raise UsageError(f"{where}: question must be a text, got an empty one")
    chunks = []
    for i, chunk in enumerate(found):
        title, text = (_text(f"{where}, ctxs[{i}]", chunk, name) for name in ("title", "text"))
        chunks.append(f"{title}\n\n{text}\n\n" if data.titled else text)
    if not "".join(chunks).strip():
        raise UsageError(f"{where}: ctxs must hold some text, got none")
    if data.titled:
        question = question[0].lower() + question[1:] + "?" * (not question.endswith("?"))
    return Entry(question, tuple(filter(None, chunks)), _answers(where, entry))


def _answers(where: str, entry: Any) -> tuple[str, ...]:
    answers = _list(where, entry, "answers")
    if wrong := [a for a in answers if not isinstance(a, str)]:
        raise UsageError(f"{where}: answers must be texts, got {_what(wrong[0])}")
    return tuple(answers)


def _text(where: str, entry: Any, name: str) -> str:
    found = _field(where, entry, name)
    if not isinstance(found, str):
        raise UsageError(f"{where}: {name} must be a text, got {_what(found)}")
    return found


def _list(where: str, entry: Any, name: str) -> list[Any]:
    found = _field(where, entry, name)
    if not isinstance(found, list) or not found:
        raise UsageError(f"{where}: {name} must be a list of at least one, got {_what(found)}")
    return found


def _field(where: str, entry: Any, name: str) -> Any:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be an object, got {_what(entry)}")
    if name not in entry:
        raise UsageError(f"{where} has no {name}, it has {', '.join(entry) or 'nothing'}")
    return entry[name]


def _what(found: Any) -> str:
    """As JSON calls it."""
    if found is None or isinstance(found, bool):
        return json.dumps(found)
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "an empty list" if found == [] else kinds[type(found)]
