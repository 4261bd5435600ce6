"""The registry, the base of tasks that generate, the testbed's twins and the needle grid."""

import re
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("transformers")

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch
from attnlab.evals.harness.task import Prompt, sample_rng
from attnlab.evals.tasks import TASKS, make, testbed
from attnlab.evals.tasks.generation import GenerationTask, data_file, fitted, largest, size
from attnlab.evals.testbed import generators
from attnlab.evals.testbed.vocabulary import BOS, EOL, NAMES
from tests import eval_subjects

SUBJECT = eval_subjects.testbed()
LENGTHS = (128, 131, 256, 1000)
SAMPLES = 20


def built(name, length, index=0, seed=0, subject=SUBJECT):
    return make(name).build(subject, length, index, sample_rng(seed, name, length, index))


def words(prompt):
    return prompt.context.split()


def batch(items):
    ids = [SUBJECT.ids(item.question) for item in items]
    return Batch(SUBJECT, items, 0, [SUBJECT.ids(item.context) for item in items], ids)


def test_names_are_known_or_near_ones_are_named():
    assert set(testbed.TWINS) | {"needle"} <= set(TASKS)
    assert all(entry.about and not entry.about.endswith(".") for entry in TASKS.values())
    with pytest.raises(UsageError, match=r"^unknown task 'testbed_singel': did you mean 'testbed_single'"):
        make("testbed_singel")
    with pytest.raises(UsageError, match=r"^unknown task 'niha_single_1': did you mean 'niah_single_1'"):
        make("niha_single_1")


@pytest.mark.parametrize("name", testbed.TWINS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_twin_has_exactly_the_length(name, length):
    for index in range(SAMPLES):
        prompt = built(name, length, index)
        assert size(SUBJECT, prompt) == length
        ids = [*SUBJECT.start, *SUBJECT.ids(prompt.context)]
        assert [NAMES[i] for i in ids] == [NAMES[BOS], *words(prompt)]  # a word is a token
        assert max(len(a.split()) for a in prompt.answers) < prompt.max_new_tokens


@pytest.mark.parametrize("name", [*testbed.TWINS, "needle"])
def test_a_sample_depends_on_its_seed_alone(name):
    prompts = {built(name, 256, index, seed).context for index in range(5) for seed in range(5)}
    assert len(prompts) == 25
    assert built(name, 256, 3, 1) == built(name, 256, 3, 1)


def needles_of(prompt):
    """`<n> k k <is> v v`: values in their order, by key."""
    found, text = {}, words(prompt)
    for i, word in enumerate(text):
        if word == "<n>":
            assert text[i + 3] == "<is>"
            found.setdefault(" ".join(text[i + 1 : i + 3]), []).append(" ".join(text[i + 4 : i + 6]))
    return found


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("testbed_single", (1, 1), 1), ("testbed_multikey", (82, 83), 1), ("testbed_multivalue", (8, 8), 4)],
)
def test_twins_of_needles(name, keys, values):
    for index in range(SAMPLES):
        prompt = built(name, 1000, index)
        found = needles_of(prompt)
        assert keys[0] <= len(found) <= keys[1]
        assert all(len(v) == values for v in found.values())
        ask, *key, mark = prompt.question.split()
        assert (ask, mark) == ("<q>", "<is>")
        assert list(prompt.answers) == found[" ".join(key)]
        place = words(prompt).index("<n>") if keys == (1, 1) else prompt.context.split(f"<n> {' '.join(key)}")[0]
        before = place if isinstance(place, int) else len(place.split())
        assert prompt.facts["depth"] == pytest.approx(before / 1000, abs=0.01)


def test_half_of_the_multikey_twin_is_needles():
    prompt = built("testbed_multikey", 1000)
    assert 6 * words(prompt).count("<n>") == pytest.approx(500, abs=13)


def test_multiquery_twin_asks_four_keys_of_one_context():
    for index in range(SAMPLES):
        prompt = built("testbed_multiquery", 1000, index)
        found = needles_of(prompt)
        assert 41 - 1 <= len(found) <= 41
        questions = prompt.facts["questions"]
        keys = [" ".join(question.split()[1:3]) for question in questions]
        assert len(set(keys)) == 4 and " ".join(questions) == prompt.question
        assert [found[key] for key in keys] == [[answer] for answer in prompt.answers]


def test_multiquery_twin_asks_one_key_after_another():
    task = make("testbed_multiquery")
    items = [built("testbed_multiquery", 256, index) for index in range(3)]
    asked = batch(items)
    before = list(asked.question_ids)

    def says(item, ids):
        """The first two questions of each item are answered; its third gets the first's answer."""
        turn = [SUBJECT.ids(q) for q in item.facts["questions"]].index(ids)
        assert item.question == item.facts["questions"][turn]
        values = needles_of(item)[" ".join(item.question.split()[1:3])]
        return values[0] if turn < 2 else next(iter(needles_of(item).values()))[0] + " k000" if turn == 2 else ""

    method = eval_subjects.Knows(says, budget=0.25)
    outcomes = task.run(asked, method)
    assert len(method.heard) == 4 and all(len(ids) == 4 for turn in method.heard for ids in turn)
    for item, outcome in zip(items, outcomes, strict=True):
        lucky = item.answers[2] == next(iter(needles_of(item).values()))[0]
        assert outcome.scores == {"string_match_all": (2 + lucky) / 4}
        assert outcome.output[:2] == list(item.answers[:2]) and outcome.output[3] == ""
        assert outcome.budget == 0.25 and outcome.seconds == 2.0
    assert asked.items is items and asked.question_ids == before


def test_multiquery_twin_puts_the_batch_back_when_a_method_fails():
    def fails(item, ids):
        raise RuntimeError("on purpose")

    items = [built("testbed_multiquery", 128)]
    asked = batch(items)
    with pytest.raises(RuntimeError, match="on purpose"):
        make("testbed_multiquery").run(asked, eval_subjects.Knows(fails))
    assert asked.items is items and len(asked.question_ids[0]) == 16


def test_twin_of_tracking_has_two_chains_of_four_hops():
    for index in range(SAMPLES):
        prompt = built("testbed_tracking", 500, index)
        text = words(prompt)
        assigned = [(text[i + 1], text[i + 3]) for i, word in enumerate(text) if word == "var"]
        assert len(assigned) == 10
        value = prompt.question.removeprefix("<q> = ")
        chain, source = [], value
        while source in {b for _, b in assigned}:
            source = next(a for a, b in assigned if b == source)
            chain.append(source)
        assert tuple(chain) == prompt.answers and len(chain) == 5
        assert sum(b.startswith("v") for _, b in assigned) == 2


def test_twin_of_frequent_words_counts_by_zipf():
    for index in range(SAMPLES):
        prompt = built("testbed_frequent", 1000, index)
        counts = Counter(words(prompt)[1:])
        (noise, most), *ranked = counts.most_common()
        assert noise == "..." and tuple(word for word, _ in ranked[:3]) == prompt.answers
        share = np.arange(1, 41) ** -2.0
        expected = (992 * share / share.sum()).astype(int)
        assert [n for _, n in ranked[:4]] == expected[1:5].tolist() and ranked[2][1] > ranked[3][1]


def entities_of(prompt):
    """Attributes and relations by entity, and the place of each entity's name and of each fact."""
    found, places, text = {}, {}, words(prompt)
    entity = None
    for i, word in enumerate(text):
        if word == "<doc>":
            entity = " ".join(text[i + 1 : i + 3])
            found[entity], places[entity] = {}, i + 1
        elif word == NAMES[EOL]:
            entity = None
        elif entity and word[0] in "ar":
            found[entity][word] = " ".join(text[i + 1 : i + 3])
            places[entity, word] = i
    return found, places


def test_twin_of_documents():
    for index in range(SAMPLES):
        prompt = built("testbed_documents", 500, index)
        found, places = entities_of(prompt)
        ask, a, b, what = prompt.question.split()
        assert ask == "<q>" and prompt.answers == (found[f"{a} {b}"][what],)
        assert prompt.facts["apart"] == places[f"{a} {b}", what] - places[f"{a} {b}"]


def test_twin_of_two_hops_needs_both_and_facts_in_other_chunks():
    across = 0
    for index in range(50):
        prompt = built("testbed_twohop", 500, index)
        found, places = entities_of(prompt)
        ask, what, a, b, relation = prompt.question.split()
        via = found[f"{a} {b}"][relation]
        assert ask == "<q>" and relation[0] == "r" and prompt.answers == (found[via][what],)
        hops = [(f"{a} {b}", relation), (via, what)]
        distances = [places[e, w] - places[e] for e, w in hops]
        assert prompt.facts["apart"] == max(distances)
        chunk = lambda place: (place - 1) // testbed.CHUNK
        across += any(chunk(places[e, w]) != chunk(places[e]) for e, w in hops)
        assert via not in prompt.question
    assert across > 30  # of 50


@pytest.mark.parametrize("name", ["testbed_documents", "testbed_twohop"])
def test_the_context_ends_with_its_chunks(name):
    prompt = built(name, 500)
    assert prompt.context == " ".join(["<documents>", *prompt.chunks])
    sizes = [len(chunk.split()) for chunk in prompt.chunks]
    assert set(sizes[:-1]) == {24} and 0 < sizes[-1] <= 24


def test_other_twins_have_no_chunks():
    assert not any(built(n, 256).chunks for n in testbed.TWINS if n not in ("testbed_documents", "testbed_twohop"))


@pytest.mark.parametrize("name", testbed.TWINS)
def test_the_right_answer_scores_one_and_none_scores_nothing(name):
    task = make(name)
    items = [built(name, 256, index) for index in range(4)]

    def right(item, ids):
        return " ".join(item.answers)

    outcomes = task.run(batch(items), eval_subjects.Knows(right))
    assert [outcome.scores for outcome in outcomes] == [{"string_match_all": 1.0}] * 4
    outcomes = task.run(batch(items), eval_subjects.Knows(lambda item, ids: "k000 k000"))
    assert all(outcome.scores["string_match_all"] == 0 for outcome in outcomes)
    (metric,) = task.metrics
    one = {"testbed_single", "testbed_multikey", "testbed_documents", "testbed_twohop"}
    assert metric.name == "string_match_all" and metric.percent and metric.binary == (name in one)


@pytest.mark.parametrize("name", testbed.TWINS)
def test_twins_refuse_other_words_and_short_texts(name):
    task = make(name)
    task.check(SUBJECT, [128, 1000])
    with pytest.raises(UsageError, match=f"^{name} is written in the testbed's words: byt5 has no token for each$"):
        task.check(eval_subjects.byt5(), [1024])
    with pytest.raises(UsageError, match=f"^{name}: length 127 is too short, it takes 128 tokens or more$"):
        task.check(SUBJECT, [1024, 127])


def test_the_needle_grid_goes_through_the_depths():
    for index in range(22):
        prompt = built("needle", 500, index)
        depth = index % 11 / 10
        assert prompt.facts == {"depth": depth, "length": 500} and size(SUBJECT, prompt) == 500
        filler = [word for word in words(prompt) if word[0] == "w"]
        assert words(prompt).index("<n>") == 1 + round(depth * len(filler)) and len(filler) == 500 - 2 - 6 - 7
    assert make("needle").metrics[0].binary


def test_the_needle_grid_in_english():
    pytest.importorskip("wonderwords")
    subject = eval_subjects.bpe()
    task = make("needle")
    task.check(subject, [1500])
    for index in range(11):
        prompt = built("needle", 1500, index, subject=subject)
        lines = prompt.context.splitlines()[1:]
        (place,) = (i for i, line in enumerate(lines) if line.startswith("One of the special magic numbers"))
        assert place == round(index / 10 * (len(lines) - 1)) and prompt.answers[0] in lines[place]
        assert prompt.facts == {"depth": index / 10, "length": 1500} and size(subject, prompt) <= 1500


def test_needles_of_the_generator_stand_at_a_depth():
    for depth in (0.0, 0.25, 1.0):
        sample = generators.needles(np.random.default_rng(0), 200, keys=2, values=1, asked=1, depth=depth)
        place = sample.context.index(generators.NEEDLE)
        assert place == 2 + round(depth * (200 - 2 - 7 - 12)) and sample.size == 200


@pytest.mark.parametrize("gap", [1, 5, 20])
def test_facts_have_up_to_a_gap_of_filler_in_front(gap):
    runs = set()
    for seed in range(20):
        sample = generators.documents(np.random.default_rng(seed), 400, hops=1, asked=1, filler=1.0, gap=gap)
        for document in " ".join(NAMES[t] for t in sample.context).split("<doc>")[1:]:
            kinds = "".join(word[0] for word in document.split("<eol>")[0].split())
            runs |= {len(run) for run in re.findall("w+", kinds)}
    assert runs == set(range(1, gap + 1))


class Counted(GenerationTask):
    def build(self, subject, length, index, rng):
        return fitted(self.name, subject, length, lambda n: Prompt("w000 " * n, "<q>", ("w001", "w002"), 7), 3)


def test_a_text_fills_the_length_counted_in_tokens():
    task = Counted("counted", "string_match_all")
    for length in (12, 13, 500):
        prompt = task.build(SUBJECT, length, 0, None)
        assert len(SUBJECT.ids(prompt.context)) == length - 7 - 1 - 1  # answer, question, the sequence's start
    with pytest.raises(UsageError, match=r"^counted: length 11 is too short, it takes 12 tokens or more$"):
        task.check(SUBJECT, [500, 11])


def test_outcomes_have_every_metric():
    task = Counted("counted", "f1", "string_match_all", binary=True)
    assert [(m.name, m.binary) for m in task.metrics] == [("f1", True), ("string_match_all", True)]
    item = task.build(SUBJECT, 20, 0, None)
    (outcome,) = task.run(batch([item]), eval_subjects.Knows(lambda item, ids: "W001 x", budget=0.5))
    assert outcome == ({"f1": pytest.approx(2 / 3), "string_match_all": 0.5}, "W001 x", 0.5, 0.5)
    assert not Counted("counted", "string_match_all").metrics[0].binary


@pytest.mark.parametrize("seed", range(40))
def test_largest_against_every_size(seed):
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, [1, 4, 40, 400][seed % 4] + 1, 3000)
    counts = 20 + np.cumsum(steps)
    least, most = int(rng.integers(0, 30)), None if seed % 3 else int(rng.integers(40, 3000))
    limit = int(rng.integers(counts[least] - 2, counts[-400]))
    tried = []

    def count(n):
        tried.append(n)
        return int(counts[n]) if n < len(counts) else int(counts[-1]) + n * 400

    fitting = [n for n in range(least, min(len(counts), (most or 10**9) + 1)) if counts[n] <= limit]
    assert largest(count, limit, least, most) == (max(fitting) if fitting else None)
    assert len(tried) <= 30 and (most is None or max(tried) <= most)


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^t needs x.json: put it in a folder and give --data-dir FOLDER$"):
        data_file("t", None, "x.json")
    with pytest.raises(UsageError, match=rf"^t needs x.json: there is no {tmp_path}/x.json; t@noise needs no file$"):
        data_file("t", tmp_path, "x.json", "t@noise")
    (tmp_path / "x.json").write_text("{}")
    assert data_file("t", tmp_path, "x.json") == tmp_path / "x.json"
