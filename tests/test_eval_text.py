"""Suite "text": the split of the sources, loss by position, training of byte models, and what a method's pass reads."""

import math
import pathlib
import sysconfig
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from attnlab.evals import demo_model
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Subject
from attnlab.evals.harness.task import sample_rng
from attnlab.evals.methods import parse
from attnlab.evals.tasks import make, source_text, text
from attnlab.evals.tasks.text import Recipe, TextLoss

SMALL = Recipe(layers=2, heads=1, kv_heads=1, steps=12, bytes=256, rate=3e-3, warm_up=4)
FULL, MOBA = parse("full,moba:block=8+topk=2")


class Words:
    """Knows no word of Python."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 0

    def __call__(self, words, **options):
        return {"input_ids": [0] * len(words.split())}


class Bytes:
    bos_token_id = eos_token_id = unk_token_id = None

    def __call__(self, words, **options):
        return {"input_ids": list(words.encode())}


def llama(layers=2, seed=0):
    model = demo_model.build(layers, 128, torch.device("cpu"), 2, 1, seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    return model.requires_grad_(False)


def subject(tokenizer):
    return Subject("tried", llama(), tokenizer, 128, "")


def built(task, of, n=2, length=64):
    task.check(of, [length])
    made = [task.build(of, length, i, sample_rng(0, task.name, length, i)) for i in range(n)]
    return made, Batch(of, made, 0)


def test_no_file_is_in_both_parts():
    found, folder = source_text.sources(), pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = {name: source_text.is_held_out(name) for name in ("ast.py", "json/decoder.py", "argparse.py", "typing.py")}
    names |= {p.name: source_text.is_held_out(p.name) for p in sorted(folder.glob("*.py"))[:40]}
    assert 0 < sum(names.values()) < len(names) / 3
    for name, held in names.items():
        source = (folder / name).read_bytes()
        assert (source in found.held_out, source in found.training) == (held, not held) or len(source) < 200
    assert len(found.training) > 4 * len(found.held_out) > 0
    for path in [*folder.glob("test/test_a*.py"), *folder.glob("site-packages/*.py")]:
        source = path.read_bytes()
        assert source not in found.training + found.held_out or len(source) < 200


def test_windows_are_of_held_out_text_and_follow_their_seed():
    a, b = (source_text.held_out_bytes(500, np.random.default_rng(seed)) for seed in (0, 1))
    assert len(a) == len(b) == 500 and a != b and a in source_text.sources().held_out
    assert a == source_text.held_out_bytes(500, np.random.default_rng(0))
    with pytest.raises(UsageError, match="bytes of held-out source, 1000000000 are needed"):
        source_text.held_out_bytes(10**9, np.random.default_rng(0))


def test_a_tokenizer_that_makes_too_few_tokens_is_named():
    wide = SimpleNamespace(start=[7], ids=lambda words: [1] * 10, name="wide")
    assert source_text.held_out_tokens(wide, 11, np.random.default_rng(0)) == [7] + [1] * 10
    with pytest.raises(UsageError, match="tokenizer of 'wide' makes 11 tokens of 192 bytes, 12 wanted"):
        source_text.held_out_tokens(wide, 12, np.random.default_rng(0))


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    source_text.sources.cache_clear()
    monkeypatch.setattr(source_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="has too little source: 0 bytes"):
        source_text.sources()
    source_text.sources.cache_clear()


@pytest.mark.parametrize("method", [FULL, MOBA], ids=["full", "moba"])
def test_loss_of_each_token_given_those_before_it(method):
    model, ids = llama(), list(source_text.held_out_bytes(25, np.random.default_rng(0)))
    found = text.by_position(model, method, ids)
    assert found.shape == (24,)
    with torch.no_grad(), method.active(model):
        for i in (0, 1, 7, 8, 23):
            logits = model(torch.tensor([ids[: i + 1]])).logits[0, -1]
            assert found[i].item() == pytest.approx(-logits.log_softmax(-1)[ids[i + 1]].item(), abs=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_knows_nothing_loses_log_256(monkeypatch):
    of = subject(Bytes())
    of.model.lm_head.weight.zero_()
    task = TextLoss(SMALL)
    for outcome in task.run(built(task, of)[1], FULL):
        assert len(outcome.scores) == 17 and outcome.budget == 1 and outcome.output is None
        assert list(outcome.scores.values()) == pytest.approx([math.log(256)] * 17)


def test_the_trailing_loss_is_the_last_sixteenths(monkeypatch):
    task, of = TextLoss(SMALL), subject(Bytes())
    monkeypatch.setattr(text, "by_position", lambda model, method, ids: torch.arange(len(ids) - 1.0))
    made, batch = built(task, of, n=1, length=72)
    scores = task.run(batch, FULL)[0].scores
    # Edges 0, 4, 9, ..., 67, 72: stretches of four and five tokens.
    assert (scores["loss@0-4"], scores["loss@4-9"]) == (1.5, 6.0)
    assert scores["trailing_loss"] == scores["loss@67-72"] == 69.0
    assert [metric.name for metric in task.metrics] == list(scores)
    assert not any(metric.percent or metric.binary or metric.higher_is_better for metric in task.metrics)


def test_metrics_follow_the_lengths():
    task = TextLoss(SMALL)
    task.check(subject(Words()), [32, 64])
    names = [metric.name for metric in task.metrics]
    assert len(names) == len(set(names)) == 33 and {"loss@0-2", "loss@60-64"} < set(names)


def test_a_model_that_reads_python_is_not_trained(monkeypatch):
    monkeypatch.setattr(text, "train", None)
    task, of = TextLoss(SMALL), subject(Bytes())
    made, batch = built(task, of)
    full, moba = (task.run(batch, method) for method in (FULL, MOBA))
    expected = text.by_position(of.model, FULL, made[1].ids)
    assert full[1].scores["trailing_loss"] == pytest.approx(expected[-4:].mean().item())
    assert abs(full[0].scores["trailing_loss"] - moba[0].scores["trailing_loss"]) > 1e-4
    assert made[0].ids == list(source_text.held_out_bytes(16 * 65, sample_rng(0, "text_loss", 64, 0)))[:65]


def test_training_is_seeded_and_learns():
    state = torch.random.get_rng_state()
    first, again, other = (text.train(SMALL, MOBA, 64, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
    held = list(source_text.held_out_bytes(65, np.random.default_rng(0)))
    start = demo_model.build(2, 64, torch.device("cpu"), 1, 1, 0)
    before, after = (text.by_position(model, MOBA, held).mean().item() for model in (start, first))
    assert abs(before - math.log(256)) < 0.3 and after < before - 0.5
    assert first.config._attn_implementation == "sdpa" and not first.training


def test_each_method_trains_with_its_own_attention():
    few = SMALL._replace(steps=2)
    full, moba, all_blocks, hybrid = (
        text.train(few, method, 64, 0, torch.device("cpu")).lm_head.weight
        for method in parse("full,moba:block=8+topk=2,moba:block=8+topk=8,moba:block=8+topk=2+full_layers=0/1")
    )
    torch.testing.assert_close(all_blocks, full, atol=1e-5, rtol=0)
    torch.testing.assert_close(hybrid, full, atol=1e-5, rtol=0)
    assert (moba - full).abs().max() > 1e-4


def test_training_predicts_the_next_byte_of_what_is_not_held_out(monkeypatch):
    fed, wanted = [], []
    build, entropy = demo_model.build, torch.nn.functional.cross_entropy

    def heard(logits, targets):
        wanted.append(targets.view(4, 64))
        return entropy(logits, targets)

    def spied(*args):
        model = build(*args)
        model.register_forward_pre_hook(lambda m, a, options: fed.append(options["input_ids"]), with_kwargs=True)
        return model

    monkeypatch.setattr(text.demo_model, "build", spied)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", heard)
    text.train(SMALL._replace(steps=3), FULL, 64, 0, torch.device("cpu"))
    assert [x.shape for x in fed] == [(4, 64)] * 3
    windows = [bytes(row.tolist()) for x in fed for row in x]
    assert all(window in source_text.sources().training for window in windows)
    assert len(set(windows)) == 12
    for read, next_ones in zip(fed, wanted, strict=True):
        assert torch.equal(read[:, 1:], next_ones[:, :-1])


def test_one_model_for_each_method_and_seed(monkeypatch):
    trained = []

    def train(recipe, method, length, seed, device):
        trained.append((method.spec, length, seed))
        return llama(seed=seed)

    monkeypatch.setattr(text, "train", train)
    task, of = TextLoss(SMALL), subject(Words())
    made, batch = built(task, of)
    assert [len(item.ids) for item in made] == [65, 65] and max(made[0].ids) < 256
    for method in (FULL, MOBA, FULL):
        task.run(batch, method)
    task.run(Batch(of, made, 7), FULL)
    task.run(Batch(of, built(task, of, length=32)[0], 0), FULL)
    assert trained == [("full", 64, 0), (MOBA.spec, 64, 0), ("full", 64, 7), ("full", 32, 0)]


def test_rates_rise_and_fall():
    rates = [text._rate(SMALL, step) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[12] == pytest.approx(0.1)
    assert rates[8] == pytest.approx(0.55) and sorted(rates[4:], reverse=True) == rates[4:]


@pytest.mark.parametrize("spec", ["moba:block=8+topk=3", "moba:block=8+topk=3+full_layers=last:1", "moba:phase=decode"])
def test_a_pass_reads_what_it_says(spec):
    [method] = parse(spec)
    config, tokens = transformers.LlamaConfig(num_hidden_layers=3), 45
    read = sum(min(p // 8, 2) * 8 + p % 8 + 1 for p in range(tokens)) / sum(p + 1 for p in range(tokens))
    expected = {"moba:block=8+topk=3": read, "moba:phase=decode": 1.0}.get(spec, (2 * read + 1) / 3)
    assert method.prefill_budget(config, tokens) == pytest.approx(expected)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    if spec == "moba:block=8+topk=3":
        assert method.prefill_budget(SimpleNamespace(layer_types=kinds, num_hidden_layers=3), tokens) == pytest.approx(
            (2 * read + 1) / 3
        )


@pytest.mark.parametrize("spec", ["wave", "moba:phase=decode", "streaming"])
def test_methods_that_read_no_text_are_refused(spec):
    [method] = parse(spec)
    with pytest.raises(
        UsageError, match=f"text_loss needs a method that reads whole texts, full or moba, got '{spec}'"
    ):
        make("text_loss").check_method(subject(Words()), method)
    for good in parse("full,attnlab_full,moba:phase=prefill"):
        make("text_loss").check_method(subject(Words()), good)


@pytest.mark.parametrize(
    ("tokenizer", "length", "message"),
    [
        (Words(), 15, "text_loss: lengths must be at least 16, got 15"),
        (Words(), 257, "text_loss: lengths must be at most 256, got 257"),
        (Bytes(), 129, "text_loss: length 129: tried takes 1 to 128 tokens"),
    ],
)
def test_lengths_that_do_not_fit(tokenizer, length, message):
    with pytest.raises(UsageError, match=message):
        TextLoss(SMALL).check(subject(tokenizer), [length])
