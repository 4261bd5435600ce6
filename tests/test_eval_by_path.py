"""A transformers Llama from a config, by path, runs every suite: nothing is special to the model that ships."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attnlab.evals import cli
from attnlab.evals.harness.suites import SUITES
from attnlab.evals.testbed.vocabulary import NAMES, tokenizer

NO_DATA = "niah_single_1,niah_multikey_2,niah_multikey_3,vt,fwe"
METHODS = "full,split,moba:block=16+topk=3,wave,quest,streaming"
SMALL = {
    "quick": ["--lengths", "256"],
    "testbed": ["--lengths", "256", "--methods", METHODS],
    "ragqa": ["--lengths", "256"],
    "needle": ["--lengths", "1024", "--methods", METHODS],
    "ruler": ["--lengths", "2048", "--tasks", NO_DATA, "--methods", "full,wave"],
    "attn": ["--lengths", "256"],
    "text": ["--lengths", "256"],
}


def llama(folder, vocab):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=4096)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One whose tokenizer has the testbed's words, one that reads bytes."""
    from transformers import ByT5Tokenizer

    words, letters = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("bytes")
    llama(words, len(NAMES))
    tokenizer().save_pretrained(words)
    llama(letters, 384)
    ByT5Tokenizer().save_pretrained(letters)
    return {"words": words, "bytes": letters}


@pytest.mark.parametrize("suite", SUITES)
def test_a_llama_by_path(suite, folders, tmp_path, capsys, one_thread):
    reads = "words" if suite in ("quick", "testbed", "ragqa", "attn") else "bytes"
    out = tmp_path / "run"
    asked = ["--suite", suite, "--model", str(folders[reads]), "--samples", "2", "--out", str(out), *SMALL[suite]]
    assert cli.main(["run", *asked]) == 0, capsys.readouterr().err
    found = json.loads((out / "results.json").read_text())["results"]
    tasks = SMALL[suite][SMALL[suite].index("--tasks") + 1].split(",") if "--tasks" in SMALL[suite] else None
    assert {row["task"] for row in found} == set(tasks or SUITES[suite].tasks)
    assert {row["n"] for row in found} == {2}
    assert (out / "table.md").read_text() in capsys.readouterr().out + "\n"


def test_the_other_tokenizer_is_one_line(folders, tmp_path, capsys):
    status = cli.main(["run", "--suite", "quick", "--model", str(folders["bytes"]), "--out", str(tmp_path / "run")])
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "testbed's words" in line
