"""What the testbed model is trained and asked: generators of a context and questions about it, in its own words.

Each is a twin of a task of RULER or of question answering over documents. `length` counts all of the tokens:
the context and every question with its answer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .vocabulary import (
    ASK,
    ATTRIBUTES,
    BOS,
    DOC,
    DOCUMENTS,
    EOL,
    EQUALS,
    FILLERS,
    FREQUENT,
    IS,
    KEYS,
    NEEDLE,
    NEEDLES,
    NOISE,
    RELATIONS,
    TRACKING,
    VALUES,
    VAR,
)

Rng = np.random.Generator
Tokens = list[int]


class Question(NamedTuple):
    """What is asked, and the answer; the model ends it with `END`."""

    text: Tokens
    answer: Tokens


class Sample(NamedTuple):
    """A context and questions about it."""

    context: Tokens
    questions: list[Question]

    @property
    def size(self) -> int:
        return len(self.context) + sum(len(q.text) + len(q.answer) + 1 for q in self.questions)


def needles(
    rng: Rng,
    length: int,
    *,
    keys: int | None = None,
    values: int | None = None,
    asked: int | None = None,
    depth: float | None = None,
) -> Sample:
    """Key-value pairs in filler text: `<n> k k <is> v v`. A key may have several values; the answer has them in order.

    `keys` may be cut to what fits, and to different ones. `depth`, in [0, 1]: all of them are there in the text.
    """
    if values is None:
        values = 1 if rng.random() < 0.7 else int(rng.integers(2, 5))
    asked = asked or max(1, length // (24 + 8 * values))
    each = 4 + 2 * values + 1
    room = length - 2 - asked * each
    most = max(asked, room // (6 * values))
    if keys is None:
        keys = int(np.exp(rng.uniform(math.log(asked), math.log(most + 0.99))))
    pairs = _pairs(rng, max(asked, min(keys, most)))
    keys = len(pairs)
    values_of = VALUES.draw(rng, keys, values, 2)
    order = rng.permutation(np.repeat(np.arange(keys), values))
    seen = [0] * keys
    items = []
    for i in order.tolist():
        items.append([NEEDLE, *pairs[i], IS, *values_of[i, seen[i]].tolist()])
        seen[i] += 1
    context = [BOS, NEEDLES, *_scatter(rng, _filler(rng, room - 6 * len(items)), items, depth)]
    chosen = rng.permutation(keys)[:asked]
    return Sample(context, [Question([ASK, *pairs[i], IS], values_of[i].reshape(-1).tolist()) for i in chosen])


def tracking(
    rng: Rng, length: int, *, hops: int | None = None, chains: int | None = None, asked: int | None = None
) -> Sample:
    """Variables assigned from one another: `var k = v <eol>`, `var k = k <eol>`. Asked for all that have a value."""
    hops = hops or int(rng.integers(1, 5))
    each = 3 + hops + 2
    if chains is None:
        most = max(1, min(24, int(0.7 * length) // (5 * (hops + 1) + each)))
        chains = int(np.exp(rng.uniform(0, math.log(most + 0.99))))
    names = KEYS.choose(rng, chains * (hops + 1)).reshape(chains, hops + 1).tolist()
    values = VALUES.choose(rng, chains).tolist()
    asked = asked or min(chains, 16)
    items, done = [], [0] * chains
    for c in rng.permutation(np.repeat(np.arange(chains), hops + 1)).tolist():
        source = names[c][done[c] - 1] if done[c] else values[c]
        items.append([VAR, names[c][done[c]], EQUALS, source, EOL])
        done[c] += 1
    room = length - 2 - asked * each
    context = [BOS, TRACKING, *_scatter(rng, _filler(rng, room - 5 * len(items)), items)]
    return Sample(context, [Question([ASK, EQUALS, values[c]], names[c]) for c in rng.permutation(chains)[:asked]])


def frequent(rng: Rng, length: int, *, alpha: float | None = None):
    """Words drawn by Zipf's law of exponent `alpha`, of which the first is noise: the next three are asked for."""
    alpha = rng.uniform(1.5, 2.5) if alpha is None else alpha
    words = FILLERS.start + rng.permutation(64)[: min(64, max(8, length // 25))]
    n = length - 2 - 6
    share = np.arange(1, len(words) + 1) ** -alpha
    counts = np.floor(n * share / share.sum()).astype(int)
    counts[0] += n - counts.sum()
    text = rng.permutation(np.repeat([NOISE, *words[1:]], counts)).tolist()
    return Sample([BOS, FREQUENT, *text], [Question([ASK, IS], words[1:4].tolist())])


def documents(
    rng: Rng,
    length: int,
    *,
    asked: int | None = None,
    hops: int | None = None,
    filler: float | None = None,
    gap: int = 5,
) -> Sample:
    """Documents that name an entity once and then its attributes: `<doc> k k a v v a v v r k k <eol>`.

    A relation `r` has another entity as its value. One hop asks `<q> k k a`; two hops ask for an attribute of the
    entity that a relation leads to, `<q> a k k r`, and the answer says the entity and its attribute on the way. A
    share `filler` of the facts has 1 to `gap` filler words in front. There may be no question of two hops.
    """
    asked = asked or max(1, length // 32)
    room = length - 2 - asked * (7 if hops == 1 else 11)
    filler = rng.random() * 0.5 if filler is None else filler
    entities = _pairs(rng, room // 8 + 4)
    facts: list[dict[int, Tokens]] = []
    text: list[Tokens] = []
    used = 0
    most = min(5, max(1, room // 9))
    for entity in entities:
        named = ATTRIBUTES.choose(rng, int(rng.integers(1, most + 1))).tolist()
        known = {a: VALUES.draw(rng, 2).tolist() for a in named}
        if len(facts) and rng.random() < 0.5:
            known[int(RELATIONS.draw(rng, 1)[0])] = entities[int(rng.integers(len(facts)))]
        document = [DOC, *entity]
        for what in rng.permutation(list(known)).tolist():
            if rng.random() < filler:
                document += FILLERS.draw(rng, int(rng.integers(1, gap + 1))).tolist()
            document += [what, *known[what]]
        document.append(EOL)
        if used + len(document) > room:
            break
        text.append(document)
        facts.append(known)
        used += len(document)
    one = [(e, a) for e, known in enumerate(facts) for a in known if a < RELATIONS.start]
    where = {tuple(entity): e for e, entity in enumerate(entities)}
    links = [
        (e, r, where[tuple(to)]) for e, known in enumerate(facts) for r, to in known.items() if r >= RELATIONS.start
    ]
    two = [(e, r, to, a) for e, r, to in links for a in facts[to] if a < RELATIONS.start]
    order = rng.permutation(len(text))
    context = [t for i in order for t in text[i]]
    context = [BOS, DOCUMENTS, *context, *FILLERS.draw(rng, max(0, room - used)).tolist()]
    questions = []
    for _ in range(asked):
        if (hops == 2 or (hops is None and rng.random() < 0.4)) and two:
            e, r, to, a = two[int(rng.integers(len(two)))]
            questions.append(Question([ASK, a, *entities[e], r], [*entities[to], a, *facts[to][a]]))
        elif one and hops != 2:
            e, a = one[int(rng.integers(len(one)))]
            questions.append(Question([ASK, *entities[e], a], facts[e][a]))
    return Sample(context, questions)


TASKS: dict[str, Callable[..., Sample]] = dict(
    needles=needles, tracking=tracking, frequent=frequent, documents=documents
)


def _pairs(rng: Rng, n: int) -> list[Tokens]:
    """`n` different pairs of keys, or a few less."""
    drawn = rng.permutation(np.unique(KEYS.draw(rng, n, 2), axis=0))
    return drawn.tolist()


def _filler(rng: Rng, n: int) -> Tokens:
    """Words; in three of ten texts a sentence again and again."""
    n = max(0, n)
    if rng.random() < 0.3:
        return np.resize(FILLERS.draw(rng, int(rng.integers(8, 24))), n).tolist()
    return FILLERS.draw(rng, n).tolist()


def _scatter(rng: Rng, text: Sequence[int], items: Iterable[Tokens], depth: float | None = None) -> Tokens:
    """Items at random places of a text, in their order; with a `depth` all at one."""
    items = list(items)
    out: Tokens = []
    begin = 0
    if depth is None:
        places = np.sort(rng.integers(0, len(text) + 1, len(items))).tolist()
    else:
        places = [round(depth * len(text))] * len(items)
    for place, item in zip(places, items, strict=True):
        out += text[begin:place]
        out += item
        begin = place
    return out + list(text[begin:])
