"""The testbed model: what it is asked has one answer, training goes on where it stopped, and what ships retrieves."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.testbed import attention, card, generators, recipe, train
from attnlab.evals.testbed.batches import IGNORED, Batches, flat, skips
from attnlab.evals.testbed.generators import TASKS
from attnlab.evals.testbed.model import seeded
from attnlab.evals.testbed.recipe import PRESETS, Leg, Preset, Sizes, Stage
from attnlab.evals.testbed.vocabulary import (
    ASK,
    ATTRIBUTES,
    DOC,
    END,
    EQUALS,
    IS,
    KEYS,
    NAMES,
    NEEDLE,
    RELATIONS,
    VALUES,
    VAR,
    tokenizer,
)

SMALL = Sizes(64, 4, 2, 1, 96)
TINY = Preset(
    SMALL,
    tokens=256,
    skips=512,
    legs=(
        Leg(1e-3, 1.0, (Stage(3, {64: 1.0}, recipe.RETRIEVAL),)),
        Leg(1e-3, 0.5, (Stage(2, {64: 0.5, 128: 0.5}, recipe.ALL), Stage(2, {128: 1.0}, recipe.LATE))),
    ),
)
LENGTHS = (64, 100, 1024)
DATA = pathlib.Path(train.__file__).parent / "data" / "cpu"


def samples(task, length, n=20, **options):
    return [TASKS[task](np.random.default_rng((1, i)), length, **options) for i in range(n)]


def facts(sample):
    """What the documents of a context say: entity -> attribute or relation -> its two tokens."""
    known, entity, i = {}, None, 0
    text = sample.context
    while i < len(text):
        if text[i] == DOC:
            entity, i = tuple(text[i + 1 : i + 3]), i + 2
            assert known.setdefault(entity, {}) == {}, "an entity has one document"
        elif ATTRIBUTES.start <= text[i] < RELATIONS.stop:
            assert text[i] not in known[entity]
            known[entity][text[i]] = text[i + 1 : i + 3]
            i += 2
        i += 1
    return known


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_sizes(task, length):
    for sample in samples(task, length):
        assert sample.size <= length
        assert sample.questions
        assert sample.size == len(flat(sample)[0])
        if task != "documents":
            assert sample.size == length
        assert all(0 <= t < len(NAMES) for t in flat(sample)[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_is_a_text(task):
    assert samples(task, 200, 3) == samples(task, 200, 3)
    assert len({tuple(s.context) for s in samples(task, 200)}) == 20


@pytest.mark.parametrize("options", [{}, {"keys": 1, "values": 1, "asked": 1}, {"keys": 4, "values": 4, "asked": 2}])
def test_needles_have_the_values_asked_for(options):
    for sample in samples("needles", 400, **options):
        text, found = sample.context, {}
        for i, token in enumerate(text):
            if token == NEEDLE and i > 1:
                assert text[i + 3] == IS
                found.setdefault(tuple(text[i + 1 : i + 3]), []).extend(text[i + 4 : i + 6])
        if "keys" in options:
            assert len(found) <= options["keys"]
        for question in sample.questions:
            assert (question.text[0], question.text[3]) == (ASK, IS)
            assert found[tuple(question.text[1:3])] == question.answer


@pytest.mark.parametrize("options", [{}, {"hops": 4, "chains": 2}])
def test_chains_are_followed(options):
    for sample in samples("tracking", 400, **options):
        text, held, order = sample.context, {}, []
        for i, token in enumerate(text):
            if token == VAR:
                assert text[i + 2] == EQUALS
                source = text[i + 3]
                held[text[i + 1]] = source if VALUES.start <= source < VALUES.stop else held[source]
                order.append(text[i + 1])
        for question in sample.questions:
            value = question.text[2]
            assert question.answer == [name for name in order if held[name] == value]
            assert "hops" not in options or len(question.answer) == 5


@pytest.mark.parametrize("hops", [1, 2, None])
def test_documents_say_what_is_asked(hops):
    kinds = set()
    for sample in samples("documents", 600, hops=hops):
        known = facts(sample)
        for text, answer in sample.questions:
            kinds.add(len(text))
            if len(text) == 4:
                assert known[tuple(text[1:3])][text[3]] == answer
            else:
                attribute, entity, relation = text[1], tuple(text[2:4]), text[4]
                to = known[entity][relation]
                assert answer == [*to, attribute, *known[tuple(to)][attribute]]
    assert kinds == {1: {4}, 2: {5}, None: {4, 5}}[hops]


def test_frequent_words_are_the_next_to_the_noise():
    for sample in samples("frequent", 1024, alpha=2.0):
        counts = np.bincount(sample.context[2:], minlength=len(NAMES))
        best = np.argsort(-counts, kind="stable")
        assert counts[best[0]] > counts[best[1]]
        (question,) = sample.questions
        assert counts[question.answer].tolist() == sorted(counts[best[1:4]], reverse=True)


def test_labels_stand_where_the_answer_is_said_next():
    sample = samples("needles", 128)[0]
    ids, labels = flat(sample)
    said = [ids[i + 1] for i, label in enumerate(labels) if label != IGNORED]
    assert said == [label for label in labels if label != IGNORED]
    assert said == [t for q in sample.questions for t in (*q.answer, END)]


def test_positions_skip_and_rise():
    rng = np.random.default_rng(0)
    drawn = torch.stack([skips(rng, 64, 4096) for _ in range(200)])
    assert (drawn.diff() > 0).all()
    assert int((drawn.diff() > 1).sum(1).max()) <= 3
    assert int(drawn[:, -1].max()) < 4096
    assert int(drawn[:, -1].max()) > 2048
    assert torch.equal(skips(rng, 64, 64), torch.arange(64))


def test_the_words_are_tokens():
    words = tokenizer()
    assert len(NAMES) == len(set(NAMES)) == len(words)
    ids = list(range(len(NAMES)))
    assert words(" ".join(NAMES), add_special_tokens=False).input_ids == ids
    assert words.decode(ids[16:], skip_special_tokens=True) == " ".join(NAMES[16:])
    assert (words.bos_token, words.eos_token) == ("<bos>", "<end>")
    assert RELATIONS.stop == len(NAMES)
    assert KEYS.stop == VALUES.start


def test_heads_of_the_start_attend_to_the_tokens_before():
    model = seeded(Sizes(128, 4, 4, 2, 64), 0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(16, len(NAMES), (1, 200), generator=torch.Generator().manual_seed(0))
    shares = model(input_ids=ids, output_attentions=True).attentions[0][0]
    for head in range(4):
        before = shares[head].diagonal(-head - 1)[50:]
        assert before.mean() > 0.5, head


def test_training_attention_is_dense():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 600, 64, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 600, 64, generator=generator, dtype=torch.float64)
    mine, _ = attention.forward(torch.nn.Identity(), q, k, v, None, 0.125)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    torch.testing.assert_close(mine, theirs.transpose(1, 2))


def test_batches_depend_on_seed_and_step():
    once, again = Batches(TINY, 3), Batches(TINY, 3)
    for step in range(TINY.steps):
        a, b = once[step], again[step]
        assert torch.equal(a.ids, b.ids)
        assert a.ids.numel() == TINY.tokens
        assert not torch.equal(a.ids[:1, :64], Batches(TINY, 4)[step].ids[:1, :64])
        assert len(a.tasks) == len(a.ids)
    assert any(once[i].positions is None for i in range(7))
    assert any(once[i].positions is not None for i in range(7))


def test_stages_follow_one_another():
    found = [TINY.at(step) for step in range(TINY.steps)]
    assert [leg.steps for leg, _, _ in found] == [3] * 3 + [4] * 4
    assert [inside for _, inside, _ in found] == [0, 1, 2, 0, 1, 2, 3]
    assert [max(stage.lengths) for _, _, stage in found] == [64] * 3 + [128] * 4
    for preset in PRESETS.values():
        for leg in preset.legs:
            for stage in leg.stages:
                assert sum(stage.lengths.values()) == pytest.approx(1)
                assert sum(stage.tasks.values()) == pytest.approx(1)
                assert all(preset.tokens % length == 0 for length in stage.lengths)


def test_rate_warms_up_holds_and_falls():
    leg = Leg(1.0, 0.5, (Stage(1000, {64: 1.0}, {}),))
    assert train.rate(leg, 0) == pytest.approx(0.01)
    assert train.rate(leg, 300) == 1.0
    assert train.rate(leg, 750) == pytest.approx(0.5)
    assert train.rate(leg, 999) == pytest.approx(0.02)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setattr(card, "LENGTHS", {128: 2})


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_training_goes_on_where_it_stopped(stop, small, tmp_path, monkeypatch, one_thread):
    whole = train.main("tiny", tmp_path / "whole")
    monkeypatch.setattr(train, "KEEP_S", 0.0)
    step = train.Training.step

    def stopping(run, at, batch):
        if at == stop:
            raise KeyboardInterrupt
        step(run, at, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main("tiny", tmp_path / "parts")
    with pytest.raises(UsageError, match="--resume"):
        train.main("tiny", tmp_path / "parts")
    with pytest.raises(UsageError, match="seed 0"):
        train.main("tiny", tmp_path / "parts", seed=1, resume=True)
    parts = train.main("tiny", tmp_path / "parts", resume=True)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [json.loads((folder / "training.json").read_text())["rows"] for folder in (whole, parts)]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
    assert [row["step"] for row in rows[0]] == [2, 4, 6]


def test_unknown_preset(tmp_path):
    with pytest.raises(UsageError, match="'cpu'"):
        train.main("cpus", tmp_path)


def test_card_counts_what_is_right(monkeypatch):
    """A model that says what it is asked to, on documents alone."""

    class Knowing(torch.nn.Module):
        def model(self, input_ids, use_cache):
            return dataclasses.make_dataclass("Output", ["last_hidden_state"])(input_ids[..., None])

        def lm_head(self, hidden):
            return torch.nn.functional.one_hot(torch.tensor(said), len(NAMES))

    monkeypatch.setattr(card, "LENGTHS", {200: 1})
    monkeypatch.setattr(card, "CHECKS", {"documents": ("documents", {"hops": 1})})
    rng = np.random.default_rng((5 + card.HELD_OUT, 200, 0))
    said = [label for label in flat(generators.documents(rng, 200, hops=1))[1] if label != IGNORED]
    assert card.held_out(Knowing(), 5)[0]["accuracy"] == 1.0
    said[1] = END
    assert card.held_out(Knowing(), 5)[0]["accuracy"] == pytest.approx(1 - 1 / len(said))
