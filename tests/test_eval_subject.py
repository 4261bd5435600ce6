"""The model under test: what is said of folders that are none, and what a loaded one knows."""

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

from attnlab.decoder_models import context_length  # noqa: E402
from attnlab.evals.harness import prefill  # noqa: E402
from attnlab.evals.harness.errors import UsageError  # noqa: E402
from attnlab.evals.methods import subject as subjects  # noqa: E402
from attnlab.evals.methods.subject import load  # noqa: E402
from tests.eval_models import batch, save  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def subject(saved):
    return load(str(saved), "cpu", "auto")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(*names):
    def change(folder):
        for path in [path for name in names for path in folder.glob(name)]:
            path.unlink()

    return change


def no_key(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "must be a folder: .* does not exist"),
        (without("config.json"), "has no config.json"),
        (lambda f: edit(f / "config.json", model_type="zebra"), "config.json cannot be read: .*zebra"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: edit(f / "config.json", model_type="t5"), "weights cannot be read"),
        (without("tokenizer*"), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read"),
        (without("*.safetensors"), "its weights cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "its weights cannot be read"),
        (no_key, "its weights lack model.norm.weight and 0 others"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(change, message, folder):
    change(folder)
    with pytest.raises(UsageError, match=message) as found:
        load(str(folder), "cpu", "auto")
    assert "\n" not in str(found.value) and str(folder) in str(found.value)


def test_what_is_wrong_with_the_rest_is_one_line(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "TESTBED", tmp_path / "cpu")
    for options, message in (
        (("testbed", "cpu", "auto"), "'testbed' is not part of this installation: its folder .*cpu does not exist"),
        ((str(saved), "zebra", "auto"), "device 'zebra' is not to be had"),
        ((str(saved), "cpu", "int8"), "dtype must be auto, float32, float16, bfloat16, got 'int8'"),
    ):
        with pytest.raises(UsageError, match=message):
            load(*options)


def test_the_testbed_is_a_folder_like_any_other(saved, monkeypatch, subject):
    monkeypatch.setattr(subjects, "TESTBED", saved)
    found = load("testbed", "cpu", "auto")
    assert (found.name, found.fingerprint, found.max_length) == ("testbed", subject.fingerprint, subject.max_length)


def test_dtypes(saved, subject):
    assert subject.model.dtype == torch.float32
    half = load(str(saved), "cpu", "bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.fingerprint != subject.fingerprint
    assert not half.model.training and not any(p.requires_grad for p in half.model.parameters())


def test_generation_takes_nothing_over_but_the_end(folder):
    edit(folder / "generation_config.json", repetition_penalty=3.0, do_sample=True, temperature=0.1, max_new_tokens=1)
    edit(folder / "generation_config.json", eos_token_id=[4, 9])
    kept = load(str(folder), "cpu", "auto").model.generation_config
    assert kept.eos_token_id == [4, 9] and kept.pad_token_id == 0 and kept.do_sample is False
    assert kept.repetition_penalty in (None, 1.0) and kept.max_new_tokens is None and kept.temperature in (None, 1.0)


def test_the_fingerprint_knows_weights_configuration_and_tokenizer(folder, subject):
    def now():
        return load(str(folder), "cpu", "auto").fingerprint

    assert now() == subject.fingerprint
    found = {now()}
    edit(folder / "config.json", rms_norm_eps=1e-4)
    found.add(now())
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"k000"', '"k999"'))
    found.add(now())
    other = load(str(folder), "cpu", "auto")
    with torch.no_grad():
        other.model.model.layers[3].mlp.up_proj.weight += 1e-3
    found.add(subjects.fingerprint(other.model, other.tokenizer))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (dict(rope_type="default"), 2048),
        (dict(rope_type="linear", factor=4.0), 8192),
        (dict(rope_type="dynamic", factor=4.0), 2048),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 2048),
        (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256), 2048),
    ],
)  # fmt: skip
def test_scaled_positions_stretch_the_length(rope, length):
    config = transformers.LlamaConfig(max_position_embeddings=2048, rope_parameters=dict(rope_theta=1e4, **rope))
    assert context_length(config) == length


def test_lengths_that_a_configuration_does_not_scale_or_say():
    config = transformers.LlamaConfig(max_position_embeddings=2048)
    config.rope_parameters = dict(rope_type="longrope", rope_theta=1e4)
    assert context_length(config) == 2048
    assert context_length(transformers.BloomConfig()) is None


def test_tokens_are_words_of_the_model(subject):
    ids = subject.ids("<n> k001 <is> v002 <end> w003")
    assert len(ids) == 6 and subject.text(ids) == "<n> k001 <is> v002 w003"
    assert subject.ids("") == []
    known = "k001 " * 18
    assert len(subject.ids(known + "zebra cat")) == 20  # a tenth
    with pytest.raises(UsageError, match=r"model '.*' does not know the words of the task's text 'k001 .*3 of 21"):
        subject.ids(known + "zebra cat dog")
    subject.tokenizer.add_tokens(["beyond"])
    try:
        with pytest.raises(UsageError, match=r"816 embeddings, but its tokenizer makes token 816 of .*beyond"):
            subject.ids("k001 beyond")
    finally:
        subject.tokenizer = transformers.AutoTokenizer.from_pretrained(subject.name, local_files_only=True)


def test_contexts_are_prefilled_once_whatever_the_chunks(subject, monkeypatch):
    prompts = batch(subject)
    dense = prompts.dense()
    assert prompts.prefills == 4 and prompts.dense() is dense and prompts.prefills == 4
    for cache, ids in zip(dense, prompts.context_ids, strict=True):
        plain = subject.model(torch.tensor([ids]), use_cache=True).past_key_values
        for x, y in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(x.keys, y.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x.values, y.values, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 21)
    sizes, read = [], prefill.read
    monkeypatch.setattr(prefill, "read", lambda m, ids, c: sizes.append(tuple(ids.shape)) or read(m, ids, c))
    for x, y in zip(batch(subject).dense(), dense, strict=True):
        torch.testing.assert_close(x.layers[3].values, y.layers[3].values, rtol=1e-4, atol=1e-4)
    assert sizes == [(3, 7)] * 12 + [(3, 6)] + [(1, 21)] * 2 + [(1, 19)]


def test_a_kept_rest_is_at_least_as_long(subject, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK_TOKENS", 10)
    for tokens, held in ((30, 10), (17, 0), (37, 20), (38, 20), (27, 10)):
        cache = prefill.prefill(subject.model, [[5] * tokens], keep=17)
        assert cache.get_seq_length() == held


def test_joined_rows_are_copies(subject):
    prompts = batch(subject)
    one, other = prompts.dense()[0], prompts.dense()[1]
    both = prefill.joined([one, other])
    prefill.read(subject.model, torch.tensor([[5], [6]]), both)
    assert both.get_seq_length() == 91 and one.get_seq_length() == 90
    assert torch.equal(both.layers[2].keys[1:, :, :90], other.layers[2].keys)
