"""RULER's needles in a haystack, by its published templates."""

import uuid
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from attnlab.evals.harness.method import Subject
from attnlab.evals.harness.task import Prompt

from .generation import GenerationTask, data_file, fitted
from .ruler_data import NOISE, check_words, essay_words, sentences, word_list

MAX_NEW_TOKENS = 128
TEXT = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
)
QUESTION = (
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
    " The special magic {type_needle_v} for {query} mentioned in the provided text are"
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
ONE = (("Some", "A"), ("are all", "is"), ("are", "is"))  # where one value is asked for
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()


class Recipe(NamedTuple):
    """As in RULER's synthetic.yaml: what the haystack is, kinds of keys and values, how many of each."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_k: int = 1
    num_v: int = 1
    num_q: int = 1


RECIPES = {
    "niah_single_1": Recipe("noise"),
    "niah_single_2": Recipe("essay"),
    "niah_single_3": Recipe("essay", values="uuids"),
    "niah_multikey_1": Recipe("essay", num_k=4),
    "niah_multikey_2": Recipe("needle"),
    "niah_multikey_3": Recipe("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Recipe("essay", num_v=4),
    "niah_multiquery": Recipe("essay", num_q=4),
}
RECIPES |= {f"{name}@noise": r._replace(haystack="noise") for name, r in RECIPES.items() if r.haystack == "essay"}


class Niah(GenerationTask):
    """As published, except that the keys of a sample all differ, and each sample has its own size of haystack."""

    def __init__(self, name: str, data_dir: Path | None) -> None:
        self.recipe = RECIPES[name]
        super().__init__(name, "string_match_all", binary=self.recipe.num_q * self.recipe.num_v == 1)
        if "words" in (self.recipe.keys, self.recipe.values):
            check_words(name)
        self.essay: list[str] = []
        if self.recipe.haystack == "essay":
            self.essay = essay_words(data_file(name, data_dir, "PaulGrahamEssays.json", f"{name}@noise"))

    def build(self, subject: Subject, length: int, index: int, rng: np.random.Generator) -> Prompt:
        seed = int(rng.integers(2**63))
        r = self.recipe
        least = 1 if self.essay else max(r.num_k, r.num_q) * r.num_v
        return fitted(self.name, subject, length, lambda n: prompt(r, Random(seed), n, self.essay), least)


def prompt(recipe: Recipe, rand: Random, n: int, essay: list[str] | None = None, depth: float | None = None) -> Prompt:
    """A haystack of `n` sentences or needles, or of an essay's words; at a `depth` in [0, 1] if it is of sentences."""
    seen: set[str] = set()
    keys = [_new(recipe.keys, rand, seen) for _ in range(max(recipe.num_k, recipe.num_q))]
    values = [[_draw(recipe.values, rand) for _ in range(recipe.num_v)] for _ in keys]
    needles = [_needle(recipe, key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
    rand.shuffle(needles)
    asked = rand.sample(range(len(keys)), recipe.num_q)
    hay: Callable[[], str] = lambda: NOISE
    if recipe.haystack == "needle":
        hay = lambda: _needle(recipe, _new(recipe.keys, rand, seen), _draw(recipe.values, rand))
    if recipe.haystack == "essay":
        context = _in_essay(needles, rand, n, essay or [])
    else:
        context = _in_lines(needles, rand, [hay() for _ in range(n)], depth)
    first = _needle(recipe, keys[asked[0]], values[asked[0]][0])
    answers = tuple(value for i in asked for value in values[i])
    text, question, kind = TEXT, QUESTION, recipe.values
    if len(answers) == 1:
        kind = kind[:-1]
        for plural, singular in ONE:
            text, question = text.replace(plural, singular), question.replace(plural, singular)
    return Prompt(
        context=text.format(type_needle_v=kind, context=context),
        question=question.format(type_needle_v=kind, query=_listed([keys[i] for i in asked])),
        answers=answers,
        max_new_tokens=MAX_NEW_TOKENS,
        facts={"depth": round(context.index(first) / len(context), 4)},
    )


def _in_lines(needles: list[str], rand: Random, lines: list[str], depth: float | None) -> str:
    """Needles between lines, each at another place."""
    if depth is None:
        places = sorted(rand.sample(range(len(lines)), len(needles)), reverse=True)
    else:
        places = [round(depth * len(lines))] * len(needles)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _in_essay(needles: list[str], rand: Random, n: int, essay: list[str]) -> str:
    """The first `n` words, again from the start where there are less; needles after shares of its sentences."""
    depths = sorted(rand.sample(DEPTHS, len(needles)))
    told = sentences(" ".join((essay * -(-n // len(essay)))[:n]))
    parts, begin = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        place = int(len(told) * (depth / 100))
        parts += [" ".join(told[begin:place]), needle]
        begin = place
    return " ".join([*parts, " ".join(told[begin:])])


def _needle(recipe: Recipe, key: str, value: str) -> str:
    return NEEDLE.format(type_needle_v=recipe.values, key=key, value=value)


def _new(kind: str, rand: Random, seen: set[str]) -> str:
    while (drawn := _draw(kind, rand)) in seen:
        pass
    seen.add(drawn)
    return drawn


def _draw(kind: str, rand: Random) -> str:
    if kind == "numbers":
        return str(rand.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rand.getrandbits(128), version=4))
    return f"{rand.choice(word_list('adjective'))}-{rand.choice(word_list('noun'))}"


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
