"""What transformers' mask makers hand to the attention, and how padding and packing become packed sequences."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, masking_utils

from attnlab.hf.masks import Pattern, packing, pattern
from tests.hf_models import COMMON

EMBEDS = torch.zeros(2, 6, COMMON["hidden_size"])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
WINDOW = {"sliding_window": 4}


def made(kind, mask, **config):
    config = LlamaConfig(**COMMON, **config, attn_implementation="attnlab_moba")
    return getattr(masking_utils, f"create_{kind}_mask")(config, EMBEDS, mask, past_key_values=None)


@pytest.mark.parametrize(
    ("kind", "config", "mask", "expected"),
    [
        ("causal", {}, None, None),
        ("causal", {}, torch.ones_like(LEFT), None),
        ("causal", {}, LEFT, Pattern(True, None, False)),
        ("sliding_window_causal", WINDOW, None, Pattern(True, 4, True)),
        ("sliding_window_causal", WINDOW, LEFT, Pattern(True, 4, False)),
    ],
)
def test_masks_stay_two_dimensional_and_say_what_they_are(kind, config, mask, expected):
    found = made(kind, mask, **config)
    assert pattern(found) == expected
    if expected is not None:
        assert torch.equal(found.bool(), (torch.ones_like(LEFT) if expected.trivial else LEFT).bool())


def test_bidirectional_masks():
    bidirectional = {"is_causal": False}
    assert pattern(made("bidirectional", None, **bidirectional)) == Pattern(False, None, True)
    assert pattern(made("bidirectional", LEFT, **bidirectional)) == Pattern(False, None, False)
    with pytest.raises(ValueError, match="sliding windows need a causal mask"):
        made("bidirectional_sliding_window", None, **bidirectional, **WINDOW)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tq", [1, 4, 6])
@pytest.mark.parametrize(
    "rows",
    [[[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], [[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]], [[0, 0, 0, 1, 1, 1]]],
    ids=["left", "holes", "one row for all"],
)
def test_packing_keeps_the_real_tokens(rows, tq, causal, tail):
    """`tail` keys lie behind the mask: a static cache's slots that nothing was written to yet."""
    mask, every = torch.tensor(rows), rows * (2 // len(rows))
    found = packing(mask, None, 2, tq, 6 + tail, causal)
    keys = [b * (6 + tail) + i for b, row in enumerate(every) for i, real in enumerate(row) if real]
    assert found.k_index.tolist() == keys
    assert found.cu_k.tolist() == [0, sum(every[0]), sum(every[0]) + sum(every[1])]
    if not causal:
        assert found.q_index is None and found.cu_q.tolist() == [0, tq, 2 * tq]
        return
    queries = [row[6 - tq :] for row in every]
    assert found.q_index.tolist() == [b * tq + i for b, row in enumerate(queries) for i, real in enumerate(row) if real]
    assert found.cu_q.tolist() == [0, sum(queries[0]), sum(queries[0]) + sum(queries[1])]
    lefts = tuple(6 - sum(row) for row in every)
    assert found.starts == (lefts if not tail and every[1] != [0, 1, 0, 1, 1, 1] else None)


def test_packing_is_read_once_until_the_mask_changes():
    mask = LEFT.clone()
    first = packing(mask, None, 2, 6, 6, True)
    assert packing(mask, None, 2, 6, 6, True) is first and first.starts == (0, 2)
    assert packing(mask, None, 2, 6, 6, False).q_index is None
    assert packing(mask, None, 2, 6, 6, True).starts == (0, 2)
    mask[1, 2] = 0
    assert packing(mask, None, 2, 6, 6, True).starts == (0, 3)


def test_positions_are_read_where_no_cache_precedes_them():
    restart = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    found = packing(None, restart, 2, 6, 6, True)
    assert found.cu_q.tolist() == found.cu_k.tolist() == [0, 3, 6, 11, 12]
    assert packing(None, restart, 2, 6, 9, True) is None
    assert packing(None, torch.arange(6).expand(2, -1), 2, 6, 6, True) is None


@pytest.mark.parametrize(
    ("mask", "tq", "tk", "message"),
    [
        (torch.ones(2, 1, 6, 6), 6, 6, r"custom attention masks are not supported, got one of shape \[2, 1, 6, 6\]"),
        (torch.ones(3, 6), 6, 6, r"custom attention masks are not supported, got one of shape \[3, 6\]"),
        (torch.zeros(2, 6), 6, 6, "additive attention masks are not supported, got one of torch.float32"),
        (LEFT, 2, 5, "the attention mask covers 6 tokens, but there are 2 queries and 5 keys"),
        (LEFT, 7, 8, "the attention mask covers 6 tokens, but there are 7 queries and 8 keys"),
        (-1 - LEFT.int(), 2, 6, "packed sequences over 6 tokens, but there are 2 queries and 6 keys"),
    ],
)
def test_refused(mask, tq, tk, message):
    with pytest.raises(ValueError, match=message):
        packing(mask, None, 2, tq, tk, True)
