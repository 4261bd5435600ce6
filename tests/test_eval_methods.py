"""Methods as they are written, what they answer, and the budgets they say they used."""

import inspect

import pytest
import torch

from attnlab import moba_select
from attnlab.testing import gaussian

transformers = pytest.importorskip("transformers")

from attnlab.evals.harness.errors import UsageError  # noqa: E402
from attnlab.evals.methods import METHODS, attending, describe, method_hash, parse  # noqa: E402
from attnlab.evals.methods.attending import Rows  # noqa: E402
from attnlab.evals.methods.subject import load  # noqa: E402
from tests.eval_models import batch, of, save  # noqa: E402

ATTENDING = ("full", "attnlab_full", "moba", "wave", "quest", "cluster", "oracle", "random", "streaming", "split")
SPARSE = (
    "moba:block=8+topk=3", "moba:block=8+topk=3+phase=decode", "moba:block=8+topk=3+phase=prefill",
    "moba:block=8+topk=3+full_layers=0/1", "wave:local=8+update_every=16", "quest:local=8", "cluster:local=8",
    "oracle:local=8", "random:local=8", "streaming:window=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load(str(save(tmp_path_factory.mktemp("model"))), "cpu", "float32")


def only(text):
    (method,) = parse(text)
    return method


def test_what_is_written_is_what_is_meant():
    found = parse(" full, moba:block=16 + topk=4+phase=decode ,quest:budget=.5")
    assert [m.spec for m in found] == ["full", "moba:block=16+topk=4+phase=decode", "quest:budget=.5"]
    assert found[1].options == {"block": 16, "topk": 4, "phase": "decode", "full_layers": None}
    assert found[2].options == {"budget": 0.5, "sink": 4, "local": 64, "pages": 0}
    assert only("moba:full_layers=none").options["full_layers"] is None
    assert describe(METHODS["moba"]) == "block=64, topk=8, phase=both (both|prefill|decode), full_layers=none"
    assert all(name == kind.name and inspect.getdoc(kind) for name, kind in METHODS.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no method given, of attnlab_full, cluster"),
        ("full,", "separated by single commas, got 'full,'"),
        ("ful", "unknown method 'ful': did you mean 'full'?"),
        ("moba:blok=3", "unknown option of method 'moba' 'blok': did you mean 'block'"),
        ("full:x=1", "method 'full:x=1': it has no options, got 'x'"),
        ("moba:block", "options are written name=value and joined by '\\+', got 'block'"),
        ("moba:", "options are written name=value and joined by '\\+', got ''"),
        ("moba:block=2+block=2", "option 'block' is given twice"),
        ("moba:block=x", "option 'block' must be a whole number, got 'x'"),
        ("moba:block=1.5", "option 'block' must be a whole number, got '1.5'"),
        ("wave:retrieval=x", "option 'retrieval' must be a number, got 'x'"),
        ("moba:phase=now", "option 'phase' must be one of both, prefill, decode, got 'now'"),
        ("moba:block=0", "method 'moba:block=0': MoBAPlan: block_size must be an int of at least 1, got 0"),
        ("moba:full_layers=top", "full_layers must be 'last:N'"),
        ("wave:retrieval=2", "retrieval_ratio must be in"),
        ("quest:budget=0", "option 'budget' must be in"),
        ("quest:pages=-1", "option 'pages' must not be negative, got -1"),
        ("streaming:window=-1", "local must be"),
        ("split:shards=0", "shards must be"),
        ("moba,full,moba:topk=8", "method 'moba:topk=8' is given twice, first as 'moba'"),
    ],
)
def test_what_is_written_wrong_is_one_line(text, message):
    with pytest.raises(UsageError, match=message) as found:
        parse(text)
    assert "\n" not in str(found.value)


def test_a_default_spelled_out_is_the_same_method():
    one, other, third = (method_hash(only(x)) for x in ("quest", "quest:pages=0+budget=0.125", "quest:pages=1"))
    assert one == other != third and method_hash(only("oracle")) != method_hash(only("random"))


EVERYTHING = [
    "attnlab_full", "moba:topk=99", "moba:topk=99+phase=decode", "moba:topk=99+phase=prefill",
    "moba:topk=1+full_layers=first:4", "wave:retrieval=1+local=8+update_every=16", "quest:budget=1", "quest:pages=99",
    "cluster:budget=1", "oracle:budget=1", "random:budget=1", "streaming:window=999", "split", "split:plan=head",
    "split:plan=request+shards=3", "split:shards=5",
]  # fmt: skip


@pytest.mark.parametrize("text", EVERYTHING)
def test_where_everything_is_read_answers_are_those_of_full(text, subject):
    prompts = batch(subject)
    want = only("full").answer(prompts)
    found = only(text).answer(prompts)
    assert [a.tokens for a in found] == [a.tokens for a in want]
    assert [a.budget for a in found] == pytest.approx([1.0] * 4)
    assert all(a.text == subject.text(a.tokens) and len(a.tokens) == 6 and a.seconds > 0 for a in found)
    assert prompts.prefills == 4


@pytest.mark.parametrize("text", SPARSE)
def test_rows_answered_together_are_as_alone(text, subject):
    method, prompts = only(text), batch(subject)
    together = method.answer(prompts)
    alone = [method.answer(of(subject, [item]))[0] for item in prompts.items]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.budget for a in together] == pytest.approx([a.budget for a in alone], rel=1e-6)
    assert all(0.1 < a.budget < 0.9 for a in together)


def test_full_is_what_transformers_generates(subject):
    prompts = batch(subject)
    for answer, context, question in zip(
        only("full").answer(prompts), prompts.context_ids, prompts.question_ids, strict=True
    ):
        ids = torch.tensor([context + question])
        out = subject.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert answer.tokens == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("text", ["full", "moba:block=8+topk=3", "oracle:local=8"])
def test_answers_end_before_the_end_of_sequence(text, subject, monkeypatch):
    """The row that ends goes on being fed; its budget counts what it was asked alone."""
    prompts, method = batch(subject), only(text)
    whole = method.answer(prompts)
    stop = whole[1].tokens[2]
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", [stop])
    found = method.answer(prompts)
    for a, b in zip(found, whole, strict=True):
        end = b.tokens.index(stop) if stop in b.tokens else 6
        assert a.tokens == b.tokens[:end]
    alone = [method.answer(of(subject, [item]))[0].budget for item in prompts.items]
    assert [a.budget for a in found] == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("phase", ["both", "prefill", "decode"])
def test_mobas_budget_is_a_count_of_blocks(phase, subject):
    """Against the gate's own choices, token by token; two of four layers stay dense."""
    method = only(f"moba:block=8+topk=3+phase={phase}+full_layers=first:2")
    context, question, answer, limit = 90, 5, 4, 6
    end = context + question + answer
    q, k, _ = gaussian(1, end, end, 1, 1, 8)
    blocks = moba_select(q, k, block_size=8, topk=3).indices[0, :, 0].tolist()
    keys = [len({t for b in row if b >= 0 for t in range(8 * b, 8 * b + 8) if t <= i}) for i, row in enumerate(blocks)]
    full = list(range(1, end + 1))
    start = context if phase == "decode" else 0
    if phase == "prefill":
        keys[context + question :] = full[context + question :]
    want = (sum(keys[start:]) + sum(full[start:])) / (2 * sum(full[start:]))
    rows = Rows(torch.zeros(1, context + question, dtype=torch.long), context, limit, None)
    cache = transformers.DynamicCache(config=subject.model.config)
    assert method.budgets(subject, rows, cache, [answer]) == pytest.approx([want])


def test_budgets_of_a_window_and_of_tokens_by_share(subject):
    prompts = batch(subject, sizes=((90, 5),))
    held = range(91, 101)  # keys at each token of the question and of the answer but its last
    (window,) = only("streaming:window=16").answer(prompts)
    assert window.budget == pytest.approx(20 * 10 / sum(held))
    (oracle,) = only("oracle:local=8+budget=.125").answer(prompts)
    count, indexed = 0, 90 - 4 - 8
    for n in held:
        indexed += 16 * (n - 4 - 8 - indexed >= 16)
        count += n - indexed + int(0.125 * n + 0.5)
    assert oracle.budget == pytest.approx(count / sum(held))


def test_questions_are_read_under_the_method(subject, monkeypatch):
    """Token by token, so that a window too small for the context already misses it there."""
    sizes = []
    read = attending.read
    monkeypatch.setattr(
        attending, "read", lambda model, ids, cache: sizes.append(ids.shape[1]) or read(model, ids, cache)
    )
    for text, fed in (("streaming:window=16", 4), ("moba:phase=decode", 4), ("split", 4), ("full", 0)):
        sizes.clear()
        only(text).answer(batch(subject, sizes=((90, 5),)))
        assert sizes == [1] * fed, text


def test_models_are_left_as_they_were(subject, monkeypatch):
    before, prompts = subject.model.config.to_dict(), batch(subject)
    implementation = subject.model.config._attn_implementation
    held = [layer.keys.clone() for layer in prompts.dense()[0].layers]
    for text in ("full", *SPARSE, "split", "attnlab_full"):
        only(text).answer(prompts)
    assert all(torch.equal(x, layer.keys) for x, layer in zip(held, prompts.dense()[0].layers, strict=True))

    def broken(*args):
        raise RuntimeError("stop")

    monkeypatch.setattr(attending, "generate", broken)
    for text in ("moba", "split"):
        with pytest.raises(RuntimeError, match="stop"):
            only(text).answer(prompts)
    assert subject.model.config.to_dict() == before and subject.model.config._attn_implementation == implementation


def test_check_says_why_a_model_cannot_be_served(subject):
    for text in ATTENDING:
        only(text).check(subject)
    for text, message in (
        (
            "moba:full_layers=last:9",
            "cannot serve model .*full_layers='last:9', but the model has 4 layers",
        ),
        ("split:plan=head+shards=3", "cannot serve model .*shards must be at most the 2 KV heads"),
    ):
        with pytest.raises(UsageError, match=message):
            only(text).check(subject)


@pytest.mark.parametrize(
    "text",
    ["full", "moba:block=8+topk=3", "wave:estimation=0+retrieval=.2+local=8+update_every=16", "quest:local=8",
     "quest:pages=2+local=8", "cluster:local=8", "oracle:local=8", "random:local=8", "streaming:window=16"],
)  # fmt: skip
def test_attention_alone_is_over_the_keys_it_names(text):
    q, k, v = gaussian(2, 5, 80, 4, 2, 8, dtype=torch.float64)
    out, lse, read = only(text).attend(q, k, v, 0.4)
    assert read.shape == (2, 5, 4, 80) and read.dtype == torch.bool
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * 0.4
    scores = scores.masked_fill(~read, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v), rtol=1e-9, atol=1e-9)
    for i in range(5):
        assert read[:, i, :, 75 + i].all() and not read[:, i, :, 76 + i :].any()
    assert bool(read[:, 4].all()) == (text == "full")


def test_others_have_no_attention_alone():
    x = gaussian(1, 1, 8, 2, 2, 8)
    for text in ("split", "attnlab_full", "reuse", "fusionrag"):
        with pytest.raises(UsageError, match=f"method '{text}' has no attention of its own"):
            only(text).attend(*x, 1.0)
