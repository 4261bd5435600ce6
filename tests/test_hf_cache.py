"""The Hugging Face cache layer and plans on their own, without a model."""

import pytest
import torch

pytest.importorskip("transformers")

from attnlab.hf import MoBALayer, MoBAPlan


def _filled(keys, chunks=(7, 1, 5, 8)):
    layer, begin = MoBALayer(), 0
    for size in chunks:
        part = keys[:, :, begin : begin + size]
        layer.update(part, 2 * part)
        layer.block_sums(4, (0, 2, 3))
        begin += size
    return layer


@pytest.mark.parametrize(
    ("change", "rows", "length"),
    [
        (lambda layer: layer.crop(-6), [0, 1, 2], 15),
        (lambda layer: layer.crop(0), [0, 1, 2], 21),
        (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0], 21),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], 21),
        (lambda layer: layer.batch_select_indices(torch.tensor([2, 1])), [2, 1], 21),
        (lambda layer: layer.offload(), [0, 1, 2], 21),
    ],
    ids=["crop", "no crop", "reorder", "repeat", "select", "offload"],
)
def test_cache_layer_after(change, rows, length):
    """Keys, values and block sums are those of a layer filled that way at once; and growing goes on from there."""
    keys = torch.randn(3, 2, 21, 8)
    layer = _filled(keys)
    change(layer)
    more = torch.randn(len(rows), 2, 90, 8)
    expected = torch.cat([keys[rows][:, :, :length], more], 2)
    torch.testing.assert_close(layer.keys, expected[:, :, :length])
    assert layer.get_seq_length() == length and layer.get_mask_sizes(3) == (length + 3, 0)
    found = layer.update(more, 2 * more)
    assert torch.equal(found[0], expected) and torch.equal(found[1], 2 * expected)
    starts = tuple((0, 2, 3)[row] for row in rows)
    sums = layer.block_sums(4, starts)
    for row, start in enumerate(starts):
        blocks = expected[row, :, start:].split(4, 1)[: (length + 90 - start) // 4]
        torch.testing.assert_close(sums[row, : len(blocks)], torch.stack([block.sum(1) for block in blocks]))


def test_cache_reset_and_other_starts():
    layer = _filled(torch.randn(3, 2, 21, 8))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys = torch.randn(2, 2, 9, 8)
    layer.update(keys, keys)
    for start in (0, 1):
        torch.testing.assert_close(layer.block_sums(8, (start,) * 2)[:, 0], keys[:, :, start : start + 8].sum(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0, "topk": 2}, "block_size must be an int of at least 1, got 0"),
        ({"block_size": 4, "topk": True}, "topk must be an int of at least 1, got True"),
        ({"block_size": 4, "topk": 2, "sink_blocks": -1}, "sink_blocks must be an int of at least 0, got -1"),
        ({"block_size": 4, "topk": 2, "routing": "token"}, "routing must be one of 'head', 'group', got 'token'"),
        ({"block_size": 4, "topk": 2, "phase": "train"}, "phase must be one of .* got 'train'"),
        ({"block_size": 4, "topk": 2, "backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"block_size": 4, "topk": 2, "full_layers": "last"}, "full_layers must be .* got 'last'"),
        ({"block_size": 4, "topk": 2, "full_layers": [-1]}, r"full_layers must be .* got \[-1\]"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(ValueError, match=f"MoBAPlan: {message}"):
        MoBAPlan(**options)
