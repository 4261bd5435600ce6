"""Suite "attn": metrics by hand and in closed form, data makers, captures, dumps and the deviation of chunks."""

import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from attnlab.evals import wave_data
from attnlab.evals.capture import captured
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Attended, Batch, Method
from attnlab.evals.harness.task import sample_rng
from attnlab.evals.methods import parse
from attnlab.evals.methods.subject import load
from attnlab.evals.tasks import TASKS, attention, make
from attnlab.evals.tasks.attention_metrics import Item, budget, measured
from attnlab.evals.testbed import vocabulary
from attnlab.evals.testbed.model import seeded
from attnlab.evals.testbed.recipe import PRESETS

MADE = ("attn_gaussian", "attn_planted", "attn_drift", "attn_testbed")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("testbed")
    seeded(PRESETS["cpu"].sizes, 0).save_pretrained(folder)
    vocabulary.tokenizer().save_pretrained(folder)
    return load(str(folder))


class Reads(Method):
    """Exactly the keys that `choose(scores [B, T, H, Tk], seen)` says; softmax over them in float64."""

    def __init__(self, choose, lse=True):
        self.choose, self.lse, self.spec, self.options = choose, lse, "reads", {}

    def answer(self, batch):
        raise AssertionError("the suite does not generate")

    def attend(self, q, k, v, scale):
        k, v = (x.double().repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bths", q.double(), k) * scale
        tokens, keys = q.shape[1], k.shape[1]
        seen = (torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None])[:, None].expand(scores.shape)
        read = self.choose(scores.masked_fill(~seen, -math.inf), seen)
        kept = scores.masked_fill(~read, -math.inf)
        out = torch.einsum("bths,bshd->bthd", kept.softmax(-1), v)
        return Attended(out, kept.logsumexp(-1) if self.lse else None, read)


def best(n):
    return lambda scores, seen: torch.zeros_like(seen).scatter_(-1, scores.topk(n).indices, True) & seen


def everything(scores, seen):
    return seen.clone()


def first(n):
    return lambda scores, seen: seen & (torch.arange(seen.shape[-1]) < n)


def items(subject, name, length=256, n=2, seed=0):
    task = make(name)
    task.check(subject, [length])
    return task, [task.build(subject, length, i, sample_rng(seed, name, length, i)) for i in range(n)]


def run(subject, name, method, **options):
    task, made = items(subject, name, **options)
    return task.run(Batch(subject, made, 0), method)


def by_hand():
    """One query, four keys of shares 1/2, 1/4, 1/8, 1/8 and unit values."""
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    k = torch.zeros(1, 4, 1, 4, dtype=torch.float64)
    k[0, :, 0, 0] = shares.log()
    q = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 4)
    return Item(q, k, torch.eye(4, dtype=torch.float64).view(1, 4, 1, 4), 1.0)


def test_metrics_by_hand():
    item = by_hand()
    read = torch.tensor([True, False, True, False]).view(1, 1, 1, 4)
    found = Attended(
        torch.tensor([0.8, 0, 0.2, 0], dtype=torch.float64).view(1, 1, 1, 4), torch.tensor([[[-1.0]]]), read
    )
    # |(.3, -.25, .075, -.125)| / |(.5, .25, .125, .125)|; shares sum to 1, so the full lse is 0.
    error = math.sqrt(0.09 + 0.0625 + 0.005625 + 0.015625) / math.sqrt(0.25 + 0.0625 + 2 * 0.015625)
    want = {"output_error": error, "lse_error": 1.0, "mass": 0.625, "mass_to_oracle": 0.625 / 0.75, "recall": 0.5}
    assert measured(item, found) == pytest.approx(want)
    assert budget(item, read) == 0.5


def test_keys_of_equal_shares_are_equally_good():
    item = by_hand()
    for chosen in ([1, 1, 1, 0], [1, 1, 0, 1]):
        read = torch.tensor(chosen).bool().view(1, 1, 1, 4)
        scores = measured(item, Attended(item.dense.out, None, read))
        assert scores["recall"] == scores["mass_to_oracle"] == 1 and scores["mass"] == 0.875
        assert "lse_error" not in scores


def test_nothing_read_scores_one_in_the_ratios():
    item = by_hand()
    scores = measured(item, Attended(torch.zeros_like(item.q), None, torch.zeros(1, 1, 1, 4, dtype=torch.bool)))
    assert scores == {"output_error": 1.0, "mass": 0.0, "mass_to_oracle": 1.0, "recall": 1.0}


def test_equal_keys_make_mass_the_share_read():
    k = torch.ones(2, 64, 2, 8)
    item = Item(torch.randn(2, 3, 4, 8), k, torch.randn(2, 64, 2, 8), 0.3)
    found = Reads(first(16)).attend(item.q, item.k, item.v, item.scale)
    scores = measured(item, found)
    share = sum(16 / (62 + i) for i in range(3)) / 3
    assert scores["mass"] == pytest.approx(share) and budget(item, found.read) == pytest.approx(share)
    assert scores["recall"] == scores["mass_to_oracle"] == pytest.approx(1)
    # lse is s + log n, of n keys of score s.
    assert scores["lse_error"] == pytest.approx(sum(math.log((62 + i) / 16) for i in range(3)) / 3, rel=1e-6)


def test_needles_are_counted_where_there_are_any():
    item = by_hand()
    two = Item(item.q.expand(1, 2, 3, 4), item.k, item.v, 1.0, torch.tensor([[2, -1]]))
    read = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    read[0, 0, :2, 2] = True  # two of three heads; the second query has no needle
    out = torch.zeros(1, 2, 3, 4)
    assert measured(two, Attended(out, None, read))["needle_recall"] == pytest.approx(2 / 3)
    two.needles = torch.tensor([[-1, -1]])
    assert "needle_recall" not in measured(two, Attended(out, None, read))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f._replace(out=f.out[:, :, :1]), r"out must have shape \[1, 2, 2, 4\], got \[1, 2, 1, 4\]"),
        (lambda f: f._replace(lse=f.lse[0]), r"lse must have shape \[1, 2, 2\], got \[2, 2\]"),
        (lambda f: f._replace(read=f.read[..., :3]), r"read must have shape \[1, 2, 2, 4\], got \[1, 2, 2, 3\]"),
        (lambda f: f._replace(read=f.read.int()), "read must be bool, got torch.int32"),
        (lambda f: f._replace(read=torch.ones_like(f.read)), "read must hold no key after the query"),
    ],
)
def test_a_method_that_answers_wrongly_is_caught(change, message):
    item = Item(torch.randn(1, 2, 2, 4), torch.randn(1, 4, 2, 4), torch.randn(1, 4, 2, 4), 0.5)
    found = Reads(everything).attend(item.q, item.k, item.v, item.scale)
    with pytest.raises(ValueError, match=message):
        measured(item, change(found))


@pytest.mark.parametrize("name", MADE)
def test_full_is_exact_and_the_oracle_is_the_best(subject, name):
    for method in (*parse("full"), Reads(everything)):
        for outcome in run(subject, name, method):
            assert outcome.budget == 1 and outcome.output is None
            assert outcome.scores["output_error"] < 2e-6 and outcome.scores["lse_error"] < 2e-6
            assert all(outcome.scores[m] == pytest.approx(1) for m in ("mass", "mass_to_oracle", "recall"))
    few, worse = (run(subject, name, Reads(choose)) for choose in (best(16), first(16)))
    for oracle, poor in zip(few, worse, strict=True):
        assert oracle.scores["mass_to_oracle"] == pytest.approx(1) and oracle.scores["recall"] == 1
        assert poor.scores["mass_to_oracle"] < 0.95 and poor.scores["mass"] < oracle.scores["mass"]
        assert 16 / 256 <= oracle.budget < 16 / 240


@pytest.mark.parametrize("name", MADE)
def test_metrics_are_those_declared(subject, name):
    task, _ = items(subject, name, n=0)
    declared = [metric.name for metric in task.metrics]
    for outcome in run(subject, name, Reads(best(8))):
        assert list(outcome.scores) == declared
    assert ("needle_recall" in declared) == (name == "attn_planted")
    assert declared[0] == "output_error" and name in TASKS
    assert not task.metrics[0].percent and not task.metrics[0].higher_is_better
    assert all(metric.percent and metric.higher_is_better for metric in task.metrics[2:])


def test_an_item_follows_from_its_seed(subject):
    for name in MADE:
        (_, a), (_, b), (_, c) = (items(subject, name, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(a[0].k, b[0].k) and torch.equal(a[0].q, b[0].q)
        assert not torch.equal(a[0].k, a[1].k) and not torch.equal(a[0].k, c[0].k)


def test_needles_are_where_queries_look(subject):
    _, made = items(subject, "attn_planted", length=512, n=4)
    for item in made:
        assert item.needles.shape == (1, attention.QUERIES)
        asked = (item.needles[0] >= 0).nonzero()[:, 0]
        assert 1 <= len(asked) <= attention.QUERIES // 2
        sharpest = item.dense.shares[0, asked, 3::4]
        assert (sharpest.argmax(-1) == item.needles[0, asked, None]).all()
        assert (item.needles[0] <= torch.arange(504, 512)).all()


def test_a_needle_after_its_query_is_none(subject, monkeypatch):
    """Rows without any needle before its query are made anew."""
    made, rows = wave_data.planted, []

    def planted(tokens, queries, seed):
        rows.append(made(tokens, queries, seed))
        late = torch.full((queries,), tokens - 1)
        if len(rows) == 2:
            late[1], late[2] = 3, tokens - 5
        late[-1] = wave_data.NONE
        return rows[-1]._replace(needles=late)

    monkeypatch.setattr(attention.wave_data, "planted", planted)
    item = make("attn_planted").build(subject, 64, 0, np.random.default_rng(0))
    assert item.needles.tolist() == [[-1, 3, -1, -1, -1, -1, -1, -1]]  # the third query is token 58, its needle 59
    assert len(rows) == 2 and torch.equal(item.k[0], rows[1].k) and not torch.equal(rows[0].k, rows[1].k)


def test_drifting_rows_are_what_they_say():
    row = wave_data.drifting(2048, 8, 3)
    assert row.q.shape == (8, 16, 64) and row.k.shape == row.v.shape == (2048, 4, 64)
    assert (row.needles == wave_data.NONE).all()
    scores = torch.einsum("ngrd,tgd->ngrt", row.q.double().unflatten(1, (4, 4)), row.k.double()) / 8
    shares = scores.softmax(-1)
    torch.testing.assert_close(shares[..., :4].sum(-1), torch.full((8, 4, 4), 0.5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scores[..., 4:].std(-1).float(), torch.tensor([1, 1.5, 2, 3.0]).expand(8, 4, 4), rtol=1e-3, atol=0
    )
    assert row.v[:4].norm(dim=-1).mean() < 0.2 * row.v[4:].norm(dim=-1).mean()
    late, any_ = shares[:4, ..., -128:].sum(-1).mean(), shares[4:, ..., -128:].sum(-1).mean()
    assert late > 0.1 > any_  # half of the queries ask for the last topic, an even share of 128 tokens is 0.03
    keys = torch.nn.functional.normalize(row.k[4:, 0] - row.k[4:, 0].mean(0), dim=-1)
    near, far = ((keys[:-gap] * keys[gap:]).sum(-1).mean() for gap in (128, 1280))
    assert near > far + 0.1  # topics drift
    assert torch.equal(row.k, wave_data.drifting(2048, 8, 3).k)
    assert not torch.equal(row.k, wave_data.drifting(2048, 8, 4).k)


def test_captures_are_what_the_layers_see(subject):
    """Attention over the captured tensors, projected, is the layers' own output."""
    model, seen = subject.model, []
    hooks = [layer.self_attn.register_forward_hook(lambda *a: seen.append(a[2][0])) for layer in model.model.layers]
    ids = torch.randint(1, 800, (1, 40), generator=torch.Generator().manual_seed(0))
    layers = captured(model, ids, 3)
    for hook in hooks:
        hook.remove()
    assert len(layers) == len(seen) == 4 and model.config._attn_implementation == "sdpa"
    for block, layer, out in zip(model.model.layers, layers, seen, strict=True):
        assert layer.q.shape == (1, 3, 4, 64) and layer.k.shape == layer.v.shape == (1, 40, 2, 64)
        dense = Item(*layer).dense.out.float().flatten(2)
        torch.testing.assert_close(block.self_attn.o_proj(dense), out[:, -3:], atol=1e-4, rtol=1e-4)
    shifted = captured(model, ids, positions=torch.arange(7, 47)[None])
    assert torch.equal(layers[3].k, captured(model, ids)[3].k) and not torch.allclose(shifted[0].k, layers[0].k)


def test_the_model_is_put_back_after_a_failure(subject, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(subject.model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        captured(subject.model, torch.ones(1, 8, dtype=torch.int64))
    assert subject.model.config._attn_implementation == "sdpa"


def test_the_testbeds_prompts_take_turns(subject):
    _, made = items(subject, "attn_testbed", n=4)
    assert [item.facts["prompt"] for item in made] == ["needles", "tracking", "documents", "needles"]
    for item in made:
        assert item.k.shape[0] == item.facts["layers"] == 4 and 240 <= item.k.shape[1] < 256
        assert item.scale == 0.125 and item.needles is None
    assert made[0].q.shape == (4, 4, 4, 64)  # <q> k k <is>


class Bytes:
    """A tokenizer of bytes that begins with a token of its own."""

    bos_token_id = eos_token_id = unk_token_id = None

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}

    def convert_tokens_to_ids(self, names):
        return [0] * len(names)


def llama(path, **changes):
    sizes = dict(vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes | dict(num_key_value_heads=2, max_position_embeddings=512) | changes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    vocabulary.tokenizer().save_pretrained(path)
    found = load(str(path))
    found.tokenizer = Bytes()
    return found


def test_other_models_read_sources(tmp_path):
    other = llama(tmp_path)
    [item] = items(other, "attn_testbed", n=1)[1]
    assert item.facts["prompt"] == "text" and item.k.shape == (2, 256, 2, 16) and item.q.shape == (2, 8, 4, 16)
    assert measured(item, Reads(everything).attend(item.q, item.k, item.v, item.scale))["output_error"] < 1e-6
    [chunks] = items(other, "attn_deviation", n=1)[1]
    assert chunks.ids[0] == 256 and len(chunks.ids) == 256 and chunks.ends[:3] == [1, 25, 49]


def test_a_length_the_data_cannot_have(subject):
    for name in MADE:
        with pytest.raises(UsageError, match=f"{name}: lengths must be at least 32, got 8"):
            make(name).check(subject, [64, 8])
    with pytest.raises(UsageError, match="attn_testbed: length 70000"):
        make("attn_testbed").check(subject, [70000])
    make("attn_gaussian").check(subject, [70000])  # no model, no limit


def test_deviation_by_hand(subject):
    """Against chunks run alone from position 0 behind the first token, and moved by the rotation's phase."""
    task, [item] = items(subject, "attn_deviation", length=128, n=1)
    assert item.ids[:2] == [vocabulary.BOS, vocabulary.DOCUMENTS] and item.ends[:2] == [2, 26]
    [outcome] = task.run(Batch(subject, [item], 0), Reads(everything))
    context = captured(subject.model, torch.tensor([item.ids]))
    rotary, layers = subject.model.model.rotary_emb, []
    for i in range(4):
        found = []
        for start in item.ends[1:-1]:
            alone = captured(subject.model, torch.tensor([[*item.ids[:2], *item.ids[start : start + 24]]]))[i]
            k, v = alone.k[0, 2:], alone.v[0, 2:]
            if subject.model.config.no_rope_layers[i]:
                cos, sin = (x[0, 0] for x in rotary(k, torch.tensor([[start - 2]])))
                k = k * cos + torch.cat([-k[..., 32:], k[..., :32]], -1) * sin
            true = context[i].k[0, start : start + 24], context[i].v[0, start : start + 24]
            found += [((a - b).norm(dim=-1) / b.norm(dim=-1)).mean() for a, b in zip((k, v), true, strict=True)]
        layers.append(torch.stack(found).mean().item())
    scores = outcome.scores
    assert scores["kv_deviation_layer0"] < 1e-6 < 0.01 < scores["kv_deviation_layer1"]
    assert [scores[f"kv_deviation_layer{i}"] for i in range(4)] == pytest.approx(layers, abs=1e-5)
    assert scores["kv_deviation"] == pytest.approx(sum(layers) / 4, abs=1e-5)
    assert [metric.name for metric in task.metrics] == list(scores)


def dump(path, metadata=None, **shapes):
    g = torch.Generator().manual_seed(1)
    save_file({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, path, metadata)


def test_dumps_are_read_row_by_row(subject, tmp_path):
    dump(tmp_path / "b.safetensors", {"scale": "0.5"}, q=(2, 3, 4, 8), k=(2, 40, 2, 8), v=(2, 40, 2, 8))
    dump(tmp_path / "a.safetensors", q=(1, 5, 2, 16), k=(1, 64, 1, 16), v=(1, 64, 1, 16))
    task = make("attn_dump", tmp_path)
    task.check(subject, [32])
    assert task.available() == 3
    made = [task.build(subject, 32, i, sample_rng(0, "attn_dump", 32, i)) for i in range(3)]
    assert [item.facts for item in made] == [
        {"file": f, "row": r} for f, r in (("a.safetensors", 0), ("b.safetensors", 0), ("b.safetensors", 1))
    ]
    assert [item.scale for item in made] == [0.25, 0.5, 0.5]
    from safetensors.torch import load_file

    held = load_file(tmp_path / "b.safetensors")
    assert torch.equal(made[2].q, held["q"][1:]) and torch.equal(made[2].k, held["k"][1:, 8:])
    assert torch.equal(made[2].v, held["v"][1:, 8:])
    for outcome in task.run(Batch(subject, made, 0), *parse("full")):
        assert outcome.scores["output_error"] < 1e-6


GOOD = dict(q=(1, 3, 4, 8), k=(1, 40, 2, 8), v=(1, 40, 2, 8))


@pytest.mark.parametrize(
    ("shapes", "length", "message"),
    [
        (None, 32, r"folder .*none does not exist: safetensors with q .* go into the folder of --data-dir"),
        ({}, 32, r"has no \*\.safetensors: safetensors with q"),
        (dict(q=(1, 3, 4, 8), k=(1, 40, 2, 8)), 32, "x.safetensors lacks v"),
        (GOOD | dict(v=(1, 39, 2, 8)), 32, r"got \[1, 3, 4, 8\], \[1, 40, 2, 8\], \[1, 39, 2, 8\]"),
        (GOOD | dict(q=(1, 3, 3, 8)), 32, "Hq a multiple of Hkv"),
        (GOOD | dict(q=(1, 41, 4, 8)), 32, "T <= Tk"),
        (GOOD | dict(q=(2, 3, 4, 8)), 32, "must be"),
        (GOOD | dict(q=(3, 4, 8)), 32, "must be"),
        (GOOD, 64, "x.safetensors has 40 keys, a length of 64 needs as many"),
        (GOOD | dict(q=(1, 36, 4, 8)), 32, "x.safetensors has 36 queries, over the length 32"),
    ],
)
def test_dumps_that_are_wrong_give_one_line(subject, tmp_path, shapes, length, message):
    if shapes:
        dump(tmp_path / "x.safetensors", **shapes)
    task = make("attn_dump", tmp_path / "none" if shapes is None else tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        task.check(subject, [length])
    assert "\n" not in str(error.value)


def test_dumps_that_cannot_be_used_give_one_line(subject, tmp_path):
    with pytest.raises(UsageError, match="attn_dump needs --data-dir"):
        make("attn_dump").check(subject, [32])
    (tmp_path / "x.safetensors").write_bytes(b"\x08nonsense")
    task = make("attn_dump", tmp_path)
    with pytest.raises(UsageError, match=r"x\.safetensors cannot be read"):
        task.check(subject, [32])
    dump(tmp_path / "x.safetensors", {"scale": "half"}, **GOOD)
    task.check(subject, [32])
    with pytest.raises(UsageError, match="scale in its metadata must be a number, got 'half'"):
        task.build(subject, 32, 0, np.random.default_rng(0))
    made = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    made["k"][0, 5, 1, 2] = math.nan
    save_file(made, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="k must hold finite floating-point numbers, row 0"):
        task.build(subject, 32, 0, np.random.default_rng(0))


def test_a_method_without_attention_is_refused(subject):
    class Reuse(Reads):
        def attend(self, q, k, v, scale):
            raise UsageError("method 'reuse' has no attention of its own to measure")

    with pytest.raises(UsageError, match="no attention of its own"):
        make("attn_gaussian").check_method(subject, Reuse(everything))
    make("attn_gaussian").check_method(subject, *parse("moba:block=16+topk=2"))
