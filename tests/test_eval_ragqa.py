"""Questions over chunks from data files: what is read, asked and scored, and one line for a file that is not right."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Answer, Batch, Subject
from attnlab.evals.tasks import TASKS, make
from attnlab.evals.tasks.generation import size
from attnlab.evals.tasks.ragqa import middle_cut, normalised
from attnlab.evals.tasks.ragqa_data import DATA_SETS, pieces

# SHA-256 of prompts as LongBench (config/dataset2prompt.json) and CacheBlend (example/blend_*.py) have them.
PUBLISHED = {
    "narrativeqa": "aada7ed24b06abac",
    "qasper": "0fbdd123fe7f83d6",
    "multifieldqa_en": "20b4666a2de8a1f7",
    "hotpotqa": "9ec4ae308865bd0c",
    "2wikimqa": "9ec4ae308865bd0c",
    "musique": "9ec4ae308865bd0c",
    "triviaqa": "00a802e6377e72fc",
    "musique_s": "a07f6a504cb83193",
    "wikimqa_s": "d6461fa0ab253da3",
    "samsum": "a68d884234907eef",
}
LONGBENCH = {
    "input": "Who sat {input} there?",
    "context": "Passage 1:\nCats\nThe cat {sat}.\n\nPassage 2:\nDogs\nPassage 3: is not here.\nPassage 3:\nMats\n",
    "answers": ["The cat", "cat"],
    "length": 12,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}
CACHEBLEND = {
    "question": "Where did the cat sit",
    "ctxs": [{"title": "Cats", "text": "The cat sat on the mat."}, {"title": "", "text": "Dogs run."}],
    "answers": ["on the mat"],
}


@pytest.fixture(scope="module")
def subject():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    table = SimpleNamespace(weight=SimpleNamespace(shape=(258, 1)))
    return Subject("bytes", SimpleNamespace(get_input_embeddings=lambda: table), fast, 1 << 20, "")


def written(folder, name, entries):
    """A data file; entries that are texts stand in it as they are."""
    file = folder / DATA_SETS[name].file
    texts = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
    file.write_text("\n".join(texts) if file.suffix == ".jsonl" else f"[{','.join(texts)}]", encoding="utf-8")
    return make(f"ragqa_{name}", folder)


def built(task, subject, index=0, length=100_000):
    task.check(subject, [length])
    return task.build(subject, length, index, None)


def test_prompts_are_the_published_ones():
    assert {name: hashlib.sha256(d.prompt.encode()).hexdigest()[:16] for name, d in DATA_SETS.items()} == PUBLISHED
    assert {f"ragqa_{name}" for name in DATA_SETS} == {name for name in TASKS if name.startswith("ragqa")}
    limits = {name: d.limit for name, d in DATA_SETS.items()}
    assert {n for n, limit in limits.items() if limit == 128} == {"narrativeqa", "qasper", "samsum"}
    assert limits.pop("multifieldqa_en") == 64 and set(limits.values()) == {32, 128}


def test_a_file_of_longbench(tmp_path, subject):
    other = LONGBENCH | {"input": "And\u2028then?", "answers": ["x"]}
    task = written(tmp_path, "hotpotqa", [LONGBENCH, "", other, ""])
    found = built(task, subject)
    instruction = (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    )
    assert found.context == f"{instruction}\n\nThe following are given passages.\n{LONGBENCH['context']}"
    assert found.question == f"\n\n{instruction}\n\nQuestion: Who sat {{input}} there?\nAnswer:"
    assert (found.answers, found.max_new_tokens, found.facts) == (("The cat", "cat"), 32, {"whole": True})
    assert found.chunks == (
        "Passage 1:\nCats\nThe cat {sat}.\n\n",
        "Passage 2:\nDogs\n",
        "Passage 3: is not here.\n",
        "Passage 3:\nMats\n",
    )
    assert task.available() == 2
    assert "\u2028" in built(task, subject, 1).question


def test_a_file_of_cacheblend(tmp_path, subject):
    asked = CACHEBLEND | {"question": "Is it so?"}
    task = written(tmp_path, "musique_s", [CACHEBLEND, asked])
    found = built(task, subject)
    assert found.chunks == ("Cats\n\nThe cat sat on the mat.\n\n", "\n\nDogs run.\n\n")
    assert found.context.endswith("within 5 words..\nPassages:\n" + "".join(found.chunks))
    assert found.question.endswith("within 5 words. \nQuestion:where did the cat sit?\nAnswer:")
    assert built(task, subject, 1).question.endswith("Question:is it so?\nAnswer:")
    samsum = built(written(tmp_path, "samsum", [CACHEBLEND]), subject)
    assert samsum.chunks == ("The cat sat on the mat.", "Dogs run.")
    assert samsum.question == "\n\nWhere did the cat sit"


def test_texts_without_passages_are_cut_every_200_words():
    words = [f"w{i}" for i in range(450)]
    text = "  " + "\n ".join(words) + "\n"
    parts = pieces(text)
    assert "".join(parts) == text and [len(part.split()) for part in parts] == [200, 200, 50]
    assert parts[1].startswith("w200\n")
    assert pieces("one Passage 1: x\nPassage 2: y") == ("one Passage 1: x\nPassage 2: y",)
    assert pieces("intro\nPassage 1:\nx\nPassage:\ny") == ("intro\nPassage 1:\nx\n", "Passage:\ny")


@pytest.mark.parametrize("length", [600, 601, 637, 700, 1000])
def test_a_long_context_loses_its_middle(tmp_path, subject, length):
    passages = [f"Passage {i}:\n{chr(97 + i) * 90}\n" for i in range(1, 7)]
    task = written(tmp_path, "hotpotqa", [LONGBENCH | {"context": "".join(passages)}])
    found = built(task, subject, length=length)
    assert size(subject, found) == min(length, size(subject, built(task, subject)))
    left = "".join(found.chunks)
    assert found.context.endswith(left) and found.facts == {"whole": length == 1000 or left == "".join(passages)}
    room, whole = len(left), "".join(passages)
    assert (
        left == whole if room == len(whole) else left == whole[: room // 2] + whole[len(whole) - (room - room // 2) :]
    )
    assert all(any(chunk in passage for passage in passages) for chunk in found.chunks)


def test_what_is_cut_is_the_middle(subject):
    chunks = ("aaaa", "bbbb", "cccc")
    assert middle_cut(subject, chunks, 11) == ("aaaa", "b", "bb", "cccc")
    assert middle_cut(subject, chunks, 8) == ("aaaa", "cccc")
    assert middle_cut(subject, chunks, 5) == ("aa", "ccc")
    assert middle_cut(subject, ("abcdef",), 3) == ("a", "ef")


def test_a_length_without_room_for_the_context(tmp_path, subject):
    task = written(tmp_path, "hotpotqa", [LONGBENCH])
    with pytest.raises(UsageError, match=r"ragqa_hotpotqa: length 300 is too short for entry 0 of .*hotpotqa\.jsonl"):
        task.check(subject, [300, 4000])


class Says:
    """A method that answers as it is told."""

    def __init__(self, *texts):
        self.texts = texts

    def answer(self, batch):
        return [Answer([1], text, 0.5, 0.1) for text in self.texts]


@pytest.mark.parametrize(
    ("name", "metrics", "text", "scores"),
    [
        ("hotpotqa", ["f1", "exact_match"], "the Cat", [1, 1]),
        ("hotpotqa", ["f1", "exact_match"], "cat\nQuestion: dog dog", [0.4, 0]),
        ("triviaqa", ["f1", "exact_match"], "\n\ncat\nPassage: and so on", [1, 1]),
        ("musique_s", ["f1", "exact_match"], "on a mat\nQuestion", [1, 1]),
        ("samsum", ["rouge_1"], "on the Mat.\nand on", [1]),
    ],
)
def test_scores(tmp_path, subject, name, metrics, text, scores):
    task = written(tmp_path, name, [CACHEBLEND if name.endswith("s") or name == "samsum" else LONGBENCH])
    assert [m.name for m in task.metrics] == metrics
    (outcome,) = task.run(Batch(subject, [built(task, subject)], 0), Says(text))
    assert outcome.scores == {metric: pytest.approx(score) for metric, score in zip(metrics, scores, strict=True)}
    assert (outcome.output, outcome.budget) == (text, 0.5)


def without(entry, name):
    return {key: value for key, value in entry.items() if key != name}


BROKEN = [
    ("hotpotqa", [LONGBENCH, "{not json"], r"hotpotqa\.jsonl, line 2: this is not JSON: .*line 1 column 2"),
    ("hotpotqa", [LONGBENCH, "", "[1]"], r"hotpotqa\.jsonl, line 3 must be an object, got a list"),
    ("hotpotqa", ["", ""], r"hotpotqa\.jsonl holds no entries"),
    ("hotpotqa", [without(LONGBENCH, "input")], r"line 1 has no input, it has context, answers, length"),
    ("hotpotqa", ["{}"], "line 1 has no input, it has nothing"),
    ("hotpotqa", [LONGBENCH | {"context": 3}], "line 1: context must be a text, got a number"),
    ("hotpotqa", [LONGBENCH | {"context": " \n"}], "line 1: context must be a text, got an empty one"),
    ("hotpotqa", [LONGBENCH | {"input": None}], "line 1: input must be a text, got null"),
    ("hotpotqa", [LONGBENCH | {"answers": []}], "line 1: answers must be a list of at least one, got an empty list"),
    ("hotpotqa", [LONGBENCH | {"answers": "cat"}], "line 1: answers must be a list of at least one, got a text"),
    ("hotpotqa", [LONGBENCH | {"answers": ["cat", True]}], "line 1: answers must be texts, got true"),
    ("musique_s", [CACHEBLEND, without(CACHEBLEND, "ctxs")], r"musique_s\.json: entry 1 has no ctxs, it has question"),
    ("musique_s", [CACHEBLEND, "7"], "entry 1 must be an object, got a number"),
    ("musique_s", [], r"musique_s\.json holds no entries"),
    ("musique_s", ["{]"], r"musique_s\.json: this is not JSON"),
    ("musique_s", [CACHEBLEND | {"question": ""}], "entry 0: question must be a text, got an empty one"),
    ("musique_s", [CACHEBLEND | {"ctxs": []}], "entry 0: ctxs must be a list of at least one, got an empty list"),
    ("musique_s", [CACHEBLEND | {"ctxs": {"title": ""}}], "ctxs must be a list of at least one, got an object"),
    ("musique_s", [CACHEBLEND | {"ctxs": ["cat"]}], r"entry 0, ctxs\[0\] must be an object, got a text"),
    ("musique_s", [CACHEBLEND | {"ctxs": [{"text": "cat"}]}], r"entry 0, ctxs\[0\] has no title, it has text"),
    ("musique_s", [CACHEBLEND | {"ctxs": [{"title": "", "text": [1]}]}], r"ctxs\[0\]: text must be a text, got a list"),
    ("samsum", [CACHEBLEND | {"ctxs": [{"title": "a", "text": " "}]}], "entry 0: ctxs must hold some text, got none"),
]


@pytest.mark.parametrize(("name", "entries", "message"), BROKEN)
def test_a_broken_file_is_told_in_one_line(tmp_path, subject, name, entries, message):
    task = written(tmp_path, name, entries)
    with pytest.raises(UsageError, match=message) as told:
        task.check(subject, [100_000])
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)


def test_files_that_are_not_there_or_not_text(tmp_path, subject):
    with pytest.raises(UsageError, match=r"^ragqa_musique needs musique\.jsonl: .*--data-dir"):
        make("ragqa_musique")
    with pytest.raises(UsageError, match=rf"^ragqa_wikimqa_s needs wikimqa_s\.json: there is no {tmp_path}"):
        make("ragqa_wikimqa_s", tmp_path)
    (tmp_path / "samsum.json").write_bytes(b"[\xff]")
    with pytest.raises(UsageError, match=r"samsum\.json cannot be read: "):
        make("ragqa_samsum", tmp_path).check(subject, [4096])
    (tmp_path / "samsum.json").write_text("{}")
    with pytest.raises(UsageError, match=r"samsum\.json must hold a list of entries, got an object"):
        make("ragqa_samsum", tmp_path).available()


def test_a_normalised_score():
    assert normalised(0.85, 0.8, 0.9) == pytest.approx(0.5)
    assert normalised(0.8, 0.8, 0.9) == 0 and normalised(0.9, 0.8, 0.9) == 1
    assert normalised(0.7, 0.8, 0.9) == pytest.approx(-1)
    assert normalised(0.5, 0.5, 0.5) is normalised(0.5, 0.6, 0.5) is None
