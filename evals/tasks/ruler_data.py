"""What RULER's tasks are made of: word lists, haystacks, questions about documents. Nothing is downloaded."""

import importlib.util
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from attnlab.evals.harness.errors import UsageError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"([.!?][\"')\]]*)\s+(?=[\"'(\[]*[A-Z0-9])")


def check_words(task: str) -> None:
    """UsageError where wonderwords, the extra `ruler`, is missing."""
    if importlib.util.find_spec("wonderwords") is None:
        raise UsageError(f"{task} needs wonderwords, which is not installed: pip install 'attnlab[ruler]'")


@cache
def word_list(kind: str) -> list[str]:
    """`noun`, `adjective` or `verb`: wonderwords', sorted, each once."""
    listed = files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text("utf-8")
    return sorted({word.rstrip() for word in listed.splitlines()})


@cache
def all_words() -> list[str]:
    return sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)})


def sentences(text: str) -> list[str]:
    """A sentence ends at `.`, `!` or `?`, closing marks included, before a space and a capital or a digit.

    RULER uses NLTK's trained model, which is a download; the difference is where a needle may stand.
    """
    return _SENTENCE_END.sub(r"\1\n", text.strip()).split("\n")


@cache
def essay_words(path: Path) -> list[str]:
    """Words of `{"text": ...}`."""
    text = _json(path)
    if not isinstance(text, dict) or not isinstance(text.get("text"), str) or not text["text"].strip():
        raise UsageError(f'{path} must hold {{"text": the essays, one after another}}')
    return text["text"].split()


@cache
def english_words(path: Path) -> list[str]:
    """The values of an object of words."""
    words = _json(path)
    if not isinstance(words, dict):
        raise UsageError(f"{path} must hold an object whose values are words")
    return list(words.values())


class Asked(NamedTuple):
    """A question, with the documents that answer it and those near it as places in the list of all."""

    question: str
    answers: list[str]
    documents: list[int]
    near: list[int]


@cache
def squad(path: Path) -> tuple[list[Asked], list[str]]:
    """Questions that have an answer, and all paragraphs; those of the same article are near."""
    try:
        return _squad(_json(path)["data"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} must hold SQuAD 2.0 as published: {error!r}") from error


def _squad(articles: list[Any]) -> tuple[list[Asked], list[str]]:
    documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    place = {text: i for i, text in enumerate(documents)}
    asked = []
    for article in articles:
        here = [place[p["context"]] for p in article["paragraphs"]]
        for p in article["paragraphs"]:
            own = place[p["context"]]
            near = [i for i in here if i != own]
            for q in p["qas"]:
                if not q.get("is_impossible", False):
                    asked.append(Asked(q["question"], [a["text"] for a in q["answers"]], [own], near))
    return asked, documents


@cache
def hotpotqa(path: Path) -> tuple[list[Asked], list[str]]:
    """Questions with the ten documents of each, and all documents."""
    try:
        questions = _json(path)
        own = [[f"{title}\n{''.join(parts)}" for title, parts in q["context"]] for q in questions]
        documents = sorted({text for texts in own for text in texts})
        place = {text: i for i, text in enumerate(documents)}
        pairs = zip(questions, own, strict=True)
        return [Asked(q["question"], [q["answer"]], [place[t] for t in texts], []) for q, texts in pairs], documents
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} must hold HotpotQA's distractor set as published: {error!r}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
