"""RULER's tasks: the published templates word for word, counts, lengths in several tokenizers, answers in place."""

import json
import re
from collections import Counter
from random import Random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("wonderwords")

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.task import sample_rng
from attnlab.evals.tasks import TASKS, make, ruler_data, ruler_niah, ruler_qa, ruler_tracking, ruler_words
from attnlab.evals.tasks.generation import size
from tests import eval_subjects

# As published in scripts/data/synthetic/constants.py, a template and its answer's prefix.
NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
    "mentioned in the provided text? The special magic {type_needle_v} for {query} mentioned in the provided text are"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {num_v} variables are assigned the value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give "
    "me the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SUBJECTS = {"whitespace": eval_subjects.whitespace, "byt5": eval_subjects.byt5, "bpe": eval_subjects.bpe}
NO_DATA = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
ESSAY = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
ALL = (*NO_DATA, *ESSAY, "qa_1", "qa_2", *(f"{name}@noise" for name in ESSAY))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files of the published forms."""
    folder = tmp_path_factory.mktemp("ruler")
    essay = " ".join(f'Essay {i} says little.\n\nIs it long?  "No," it says; e.g. this is {i}!' for i in range(120))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    articles = []
    for a in range(6):
        paragraphs = []
        for p in range(5):
            asked = {"question": f"What is {a}-{p}?", "is_impossible": False}
            asked["answers"] = [{"text": f"answer {a}-{p}"}, {"text": f"Answer {a}/{p}"}]
            never = {"question": "Why?", "is_impossible": True, "answers": []}
            paragraphs.append({"context": f"Paragraph {a}-{p} has answer {a}-{p}. " + "x " * 20, "qas": [never, asked]})
        articles.append({"title": f"T{a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hops = [
        {
            "question": f"Which {i}?",
            "answer": f"thing {i}",
            "context": [[f"T{i}-{d}", [f"One {d}.", f" Two {i}."]] for d in range(10)],
        }
        for i in range(8)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hops))
    return folder


def built(name, length, index=0, seed=0, subject="whitespace", data=None):
    return make(name, data).build(SUBJECTS[subject](), length, index, sample_rng(seed, name, length, index))


def text(prompt):
    return prompt.context + prompt.question


def singular(template):
    """As niah.py does where one value is asked for."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(old, new)
    return template


def test_all_thirteen_and_substitutes_are_there():
    assert {name for name, entry in TASKS.items() if entry.module == "ruler"} == set(ALL) and len(ALL) == 13 + 5


MAX_NEW = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
BINARY = {"qa_1", "qa_2", *(name for name in ALL if name.startswith(("niah_single", "niah_multikey")))}


@pytest.mark.parametrize("name", ALL)
def test_published_tokens_to_generate_and_metric(name, data):
    task = make(name, data)
    assert built(name, 6000, data=data).max_new_tokens == MAX_NEW.get(name, 128)
    (metric,) = task.metrics
    assert metric.name == ("string_match_part" if name.startswith("qa") else "string_match_all")
    assert metric.binary == (name in BINARY) and task.name == name


# name: haystack, kind of keys, kind of values, num_needle_k, num_needle_v, num_needle_q
PUBLISHED = {
    "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
PUBLISHED |= {f"{name}@noise": ("noise", *PUBLISHED[name][1:]) for name in ESSAY}
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KINDS = {"words": r"[\w'.-]+(?: [\w'.-]+)*?-[\w'.-]+(?: [\w'.-]+)*?", "numbers": "[1-9][0-9]{6}", "uuids": UUID}


def needles_of(context, keys, values):
    """(key, value) in their order."""
    form = rf"One of the special magic {values} for ({KINDS[keys]}) is: ({KINDS[values]})\."
    return re.findall(form, context)


@pytest.mark.parametrize("name", PUBLISHED)
def test_needles_are_published(name, data):
    haystack, keys, values, num_k, num_v, num_q = PUBLISHED[name]
    for index in range(5):
        prompt = built(name, 1500, index, data=data)
        intro, _, rest = prompt.context.partition("\n")
        context = rest.removesuffix("\n")
        found = needles_of(context, keys, values)
        by_key = {}
        for key, value in found:
            by_key.setdefault(key, []).append(value)
        query = re.search("for (.*?) mentioned", prompt.question)[1]
        asked = re.split(", and |, ", query)
        assert query == (asked[0] if num_q == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1])
        one = num_q * num_v == 1
        template, kind = (singular(NIAH), values[:-1]) if one else (NIAH, values)
        assert text(prompt) == template.format(type_needle_v=kind, query=query, context=context)
        assert len(set(asked)) == num_q and len(prompt.answers) == num_q * num_v
        in_order = [value for key in asked for value in by_key[key]]
        assert sorted(in_order) == sorted(prompt.answers) and len(set(prompt.answers)) == len(prompt.answers)
        assert all(context.count(answer) == 1 for answer in prompt.answers)
        lines = context.split("\n")
        if haystack == "needle":
            assert len(lines) == len(found) == len(by_key) > 50
        else:
            assert len(by_key) == max(num_k, num_q) and all(len(v) == num_v for v in by_key.values())
        if haystack == "noise":
            assert Counter(lines)[NOISE] == len(lines) - len(found) > 50
        first = context.index(f"for {asked[0]} is: {prompt.answers[0]}.") + len(intro) + 1
        assert prompt.facts["depth"] == pytest.approx(first / len(prompt.context), abs=0.03)


def test_needles_stand_at_different_places():
    depths = {built("niah_single_1", 4096, index).facts["depth"] for index in range(30)}
    assert len(depths) > 25 and min(depths) < 0.2 and max(depths) > 0.8
    places = [built("niah_multivalue@noise", 1500, i).context.split("\n") for i in range(30)]
    orders = {tuple(line.startswith("One") for line in lines) for lines in places}
    assert len(orders) == 30
    told = [built("niah_multivalue@noise", 1500, i) for i in range(30)]
    ranks = {tuple(sorted(range(4), key=lambda i: p.context.index(p.answers[i]))) for p in told}
    assert len(ranks) > 10  # of 24 orders
    crowded = ruler_niah.prompt(ruler_niah.Recipe("noise", num_v=4), Random(0), 4).context.split("\n")[1:-1]
    assert [line == NOISE for line in crowded] == [False, True] * 4  # one needle before each line


def test_a_needle_prompt_word_for_word(monkeypatch):
    drawn = iter(["red-fox", "1234567", "7654321"])
    monkeypatch.setattr(ruler_niah, "_draw", lambda kind, rand: next(drawn))
    recipe = ruler_niah.Recipe("noise", num_v=2)
    prompt = ruler_niah.prompt(recipe, Random(1), 2)
    lines = prompt.context.split("\n")[1:-1]
    assert sorted(lines) == sorted(
        [
            NOISE,
            NOISE,
            "One of the special magic numbers for red-fox is: 1234567.",
            "One of the special magic numbers for red-fox is: 7654321.",
        ]
    )
    assert text(prompt).replace("\n".join(lines), "***") == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n***\nWhat are all the special magic numbers for red-fox mentioned in the "
        "provided text? The special magic numbers for red-fox mentioned in the provided text are"
    )
    drawn = iter(["red-fox", "0b4b"])
    prompt = ruler_niah.prompt(ruler_niah.Recipe("noise", values="uuids"), Random(1), 1, depth=0.0)
    assert text(prompt) == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        f"uuid afterwards.\nOne of the special magic uuids for red-fox is: 0b4b.\n{NOISE}\nWhat is the special magic "
        "uuid for red-fox mentioned in the provided text? The special magic uuid for red-fox mentioned in the provided "
        "text is"
    )


def test_essays_are_told_in_order_and_again_from_the_start(data):
    essay = re.sub(r"\s+", " ", json.loads((data / "PaulGrahamEssays.json").read_text())["text"])
    for length in (1000, 6000):
        prompt = built("niah_multikey_1", length, data=data)
        context = prompt.context.partition("\n")[2].removesuffix("\n")
        told = re.sub(r"\s+", " ", re.sub(r"One of the special magic numbers for .*? is: \d+\.", " ", context)).strip()
        assert (essay + " " + essay + " " + essay + " " + essay).startswith(told)
        assert (len(told) > len(essay)) == (length == 6000)
        before, _, after = context.partition("One of the special")
        assert before.rstrip()[-1:] in (".", "!", "?", "") or not after.partition(". ")[2]  # after a sentence


def test_sentences():
    text = 'It is 3.5 m. "Yes," he said. (No.) He did! e.g. this? 12 did. Nature'
    assert ruler_data.sentences(text) == [
        "It is 3.5 m.",
        '"Yes," he said.',
        "(No.)",
        "He did! e.g. this?",
        "12 did.",
        "Nature",
    ]


def test_words_are_adjectives_and_nouns():
    adjectives, nouns = map(ruler_data.word_list, ("adjective", "noun"))
    for seed in range(50):
        word = ruler_niah._draw("words", Random(seed))
        assert any(word.startswith(a + "-") and word.removeprefix(a + "-") in nouns for a in adjectives)
    assert len({ruler_niah._draw("numbers", Random(seed)) for seed in range(50)}) == 50


def chain_of(context):
    """Names in the order of a chain, by following assignments from the value; and the value."""
    assigned = [tuple(line.removeprefix("VAR ").split(" = ")) for line in context.split("\n") if line[:4] == "VAR "]
    names = [assigned[0][0]]
    for name, source in assigned[1:]:
        assert source == f"VAR {names[-1]} "  # with its space, as published
        names.append(name)
    return names, assigned[0][1]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_variable_tracking_is_published(subject):
    for index in range(5):
        prompt = built("vt", 3000, index, subject=subject)
        example, asked = re.fullmatch("(Memorize.*)\n(Memorize.*)", text(prompt), re.S).groups()
        context = asked[asked.index("\n\n") + 2 : asked.index("\nQuestion:")]
        names, value = chain_of(context)
        assert asked == VT.format(context=context, query=value, num_v=5) and prompt.question[:9] == "Question:"
        assert tuple(names) == prompt.answers and len(set(names)) == 5
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names) and 10000 <= int(value) < 99999
        assert set(context.split("\n")) - {NOISE} == {line for line in context.split("\n") if line[:4] == "VAR "}
        shown = example[example.index("\n\n") + 2 : example.index("\nQuestion:")]
        names, value = chain_of(shown)
        assert example == VT.format(context=shown, query=value, num_v=5) + " " + " ".join(names) + "\n"
        assert all(re.fullmatch("[A-Z]{3}", name) for name in names)
        read = len(SUBJECTS[subject]().ids(example.rpartition(":  ")[0]))
        assert 470 < read <= 500 or shown.count(NOISE) == 5


def test_chains_of_tracking_are_all_over_the_text():
    places = []
    for index in range(40):
        context = ruler_tracking.problem(Random(index), 20)[0].split("\n")[2:-1]
        places += [i for i, line in enumerate(context) if line.startswith("VAR")]
        assert len(context) == 25
    assert min(places) == 0 and max(places) >= 23 and 10 < sum(places) / len(places) < 14


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(2000, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))])
def test_common_words_are_published(length, often, seldom, shown):
    for index in range(3):
        prompt = built("cwe", length, index)
        example, asked = re.fullmatch("(Below.*)\n(Below.*)", text(prompt), re.S).groups()
        answers = []
        for part, (commons, rares), n in (
            (example, shown[1:], shown[0]),
            (asked, (often, seldom), prompt.facts["words"]),
        ):
            listed = part.split("\n")[1]
            numbered = re.findall(r"(?:^| )(\d+)\. (.*?)(?= \d+\. |$)", listed)
            assert [int(i) for i, _ in numbered] == list(range(1, len(numbered) + 1))
            counts = Counter(word for _, word in numbered)
            assert sorted(counts.values(), reverse=True) == [commons] * 10 + [rares] * (n - 10)
            answers.append({word for word, count in counts.items() if count == commons})
            assert part.startswith(CWE.format(context=listed))
            assert [word for _, word in numbered][:10] != sorted(answers[-1])
        assert set(prompt.answers) == answers[1] and len(prompt.answers) == 10
        solved = example.removeprefix(CWE.format(context=example.split("\n")[1]))
        assert re.fullmatch(r"( \d+\. .*?)+", solved)
        told = re.findall(r" (\d+)\. (.*?)(?= \d+\. |$)", solved)
        assert [int(i) for i, _ in told] == list(range(1, 11)) and {word for _, word in told} == answers[0]
        assert asked.endswith(prompt.question) and prompt.question.endswith("in the list are:")


def test_common_words_run_out_and_come_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ruler_words, "all_words", lambda: [f"w{i}" for i in range(60)])
    message = r"^cwe at length 4096 needs english_words.json: put it in a folder and give --data-dir FOLDER$"
    with pytest.raises(UsageError, match=message):
        built("cwe", 4096)
    file = tmp_path / "english_words.json"
    file.write_text(json.dumps({str(i): f"e{i}" for i in range(2000)}))
    prompt = built("cwe", 4096, data=tmp_path)
    assert 60 < prompt.facts["words"] < 2000 and all(answer[0] == "e" for answer in prompt.answers)
    file.write_text(json.dumps({str(i): f"e{i}" for i in range(100)}))
    ruler_data.english_words.cache_clear()
    with pytest.raises(UsageError, match=rf"^cwe: length 4096 takes more than the 100 words of {file}$"):
        built("cwe", 4096, data=tmp_path)


@pytest.mark.parametrize("length", [1000, 4096])
def test_frequent_words_are_published(length):
    zeta = 1.6449340668482264  # of 2
    for index in range(3):
        prompt = built("fwe", length, index)
        context = re.fullmatch(r"Read .*? coded words\. (.*)\n", prompt.context)[1]
        assert text(prompt) == FWE.format(context=context)
        counts = Counter(context.split())
        ranked = counts.most_common()
        n, vocabulary = prompt.facts["words"], (length - 50) // 50
        expected = [int(n / (k * k * zeta)) for k in range(1, vocabulary + 1)]
        assert [count for _, count in ranked] == [count for count in expected if count]
        assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == prompt.answers
        assert all(re.fullmatch("[a-z]{6}", word) for word in prompt.answers) and ranked[3][1] > ranked[4][1]


def test_fewest_frequent_words_can_be_told_apart():
    third, fourth = (lambda n, k=k: int(n / (k * k * ruler_words.ZETA)) for k in (4, 5))
    assert all(third(n) > fourth(n) for n in range(ruler_words.FWE_LEAST, 1000))
    assert third(ruler_words.FWE_LEAST - 1) == fourth(ruler_words.FWE_LEAST - 1)
    with pytest.raises(UsageError, match=r"^fwe: length 299 is too short, it takes 300 tokens or more$"):
        built("fwe", 299)


def documents_of(prompt):
    context = prompt.context.split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
    query = prompt.question.removeprefix("Question: ").removesuffix(" Answer:")
    assert text(prompt) == QA.format(context=context, query=query)
    parts = context.split("\n\n")
    numbers = [int(re.match(r"Document (\d+):\n", part)[1]) for part in parts]
    assert numbers == list(range(1, len(parts) + 1))
    return [part.partition("\n")[2] for part in parts]


def test_questions_of_squad_are_published(data):
    task = make("qa_1", data)
    assert task.available() == 30
    firsts = set()
    for index in range(30):
        a, p = divmod(index, 5)
        prompt = built("qa_1", 400, index, data=data)
        documents = documents_of(prompt)
        assert prompt.question == f"Question: What is {a}-{p}? Answer:"
        assert prompt.answers == (f"answer {a}-{p}", f"Answer {a}/{p}")
        own = [f"Paragraph {a}-{i} " for i in range(5)]
        assert [sum(d.startswith(o) for d in documents) for o in own] == [1] * 5  # near ones before any other
        assert len(documents) > 5 and len(set(documents)) == len(documents)
        firsts.add(documents[0][:14])
    assert len(firsts) > 10
    with pytest.raises(UsageError, match=r"^qa_1: sample 30 of 30 questions$"):
        built("qa_1", 400, 30, data=data)


def test_questions_of_hotpotqa_are_published(data):
    for index in range(8):
        prompt = built("qa_2", 500, index, data=data)
        documents = documents_of(prompt)
        assert prompt.question == f"Question: Which {index}? Answer:" and prompt.answers == (f"thing {index}",)
        own = {f"T{index}-{d}\nOne {d}. Two {index}." for d in range(10)}
        assert own <= set(documents) and len(set(documents)) == len(documents) > 10


def test_chosen_documents():
    asked = ruler_data.Asked("?", ["a"], [3, 4], [5, 6, 7])
    others = [0, 1, 2, 8, 9]
    rand = Random(0)
    assert ruler_qa.chosen(rand, asked, others, 2) == [3, 4]
    few = ruler_qa.chosen(rand, asked, others, 4)
    assert few[:2] == [3, 4] and set(few[2:]) < {5, 6, 7} and len(set(few)) == 4
    many = ruler_qa.chosen(rand, asked, others, 8)
    assert many[:5] == [3, 4, 5, 6, 7] and set(many[5:]) < set(others) and len(set(many)) == 8
    assert ruler_qa.chosen(rand, asked, others, 10) == list(range(10))  # all, in their order, as published
    assert ruler_qa.chosen(rand, asked, others, 13) == [*range(10), 0, 1, 2]


def unit(name, subject, prompt):
    """Tokens that one step of the haystack adds at most."""
    tokens = lambda text: len(subject.ids(text))
    if name.startswith("niah_multikey_") and not prompt.context.count(NOISE) and "Essay" not in prompt.context:
        return max(tokens(line + "\n") for line in prompt.context.split("\n")) + 12
    if name == "cwe":
        return 3 * max(tokens(f" 12345. {word}") for word in ruler_data.all_words()) + 6
    if name == "fwe":
        return 4 * max(tokens(" " + word) for word in {*prompt.context.split()}) + 2
    if name.startswith("qa"):
        return max(tokens(part + "\n\n") for part in prompt.context.split("\n\n")) + 4
    return tokens("\n" + NOISE) + 1 if NOISE in prompt.context else 20


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", ALL)
def test_prompts_and_answers_fit_the_length_closely(name, subject, data):
    reader = SUBJECTS[subject]()
    for length in (2200, 4096) if name != "cwe" or subject == "whitespace" else (2500, 8000):
        for index in range(2):
            prompt = built(name, length, index, subject=subject, data=data)
            gap = length - size(reader, prompt)
            assert 0 <= gap < unit(name, reader, prompt)


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_prompt(name, data):
    assert built(name, 2200, 1, data=data) == built(name, 2200, 1, data=data)
    others = [built(name, 2200, i, seed, data=data) for i in range(2) for seed in range(3)]
    assert len({text(prompt) for prompt in others}) == 6


@pytest.mark.parametrize("name", ALL)
def test_too_short_a_length_is_one_line(name, data):
    with pytest.raises(UsageError, match=rf"^{name}: length 40 is too short, it takes \d+ tokens or more$"):
        make(name, data).check(eval_subjects.whitespace(), [4096, 40])


FILES = {**dict.fromkeys(ESSAY, "PaulGrahamEssays.json"), "qa_1": "squad.json", "qa_2": "hotpotqa.json"}


@pytest.mark.parametrize(("name", "file"), FILES.items())
def test_missing_data_is_one_line(name, file, tmp_path):
    hint = f"; {name}@noise needs no file" if name in ESSAY else ""
    with pytest.raises(
        UsageError, match=rf"^{name} needs {file}: put it in a folder and give --data-dir FOLDER{hint}$"
    ):
        make(name)
    with pytest.raises(UsageError, match=rf"^{name} needs {file}: there is no {tmp_path / file}{hint}$"):
        make(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "holds"),
    [
        ("niah_single_2", "PaulGrahamEssays.json", "{}"),
        ("niah_single_2", "PaulGrahamEssays.json", '{"text": " "}'),
        ("niah_single_2", "PaulGrahamEssays.json", "[1"),
        ("qa_1", "squad.json", '{"data": [{"paragraphs": [{}]}]}'),
        ("qa_1", "squad.json", "[]"),
        ("qa_2", "hotpotqa.json", '[{"question": "?"}]'),
        ("qa_2", "hotpotqa.json", '[{"question": "?", "answer": "a", "context": [["t"]]}]'),
        ("cwe", "english_words.json", "[]"),
    ],
)
def test_wrong_data_is_one_line(name, file, holds, tmp_path):
    (tmp_path / file).write_text(holds)
    with pytest.raises(UsageError, match=rf"^{tmp_path / file} (must hold|is no JSON)") as caught:
        make(name, tmp_path).check(eval_subjects.whitespace(), [4096])
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(ruler_data.importlib.util, "find_spec", lambda name: None)
    for name in ("niah_single_1", "cwe"):
        with pytest.raises(UsageError, match=rf"^{name} needs wonderwords, which is not installed: pip install"):
            make(name)
    make("vt"), make("fwe"), make("niah_multikey_3")
