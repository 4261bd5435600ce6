"""The Hugging Face cache layer on its own, without a model."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GptOssConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from attnlab.hf import MoBADynamicCache, MoBALayer


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
        (lambda layer: layer.batch_select_indices(torch.tensor([False, True, True])), [1, 2], 21),
        (lambda layer: layer.offload(), [0, 1, 2], 21),
    ],
    ids=["crop", "no crop", "reorder", "repeat", "select", "select by mask", "offload"],
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


@pytest.mark.parametrize("starts", [(0, 2, 3), (1, 1, 1)])
def test_cache_reset_and_other_starts(starts):
    layer = _filled(torch.randn(3, 2, 21, 8))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys = torch.randn(3, 2, 13, 8)
    layer.update(keys, keys)
    for row, start in enumerate(starts):
        sums = keys[row, :, start : start + 8].unflatten(1, (2, 4)).sum(2).transpose(0, 1)
        torch.testing.assert_close(layer.block_sums(4, starts)[row, :2], sums)


def test_crop_takes_minus_the_tokens_to_drop():
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to drop, got 6"):
        _filled(torch.randn(3, 2, 21, 8)).crop(6)


def test_growing_leaves_earlier_graphs_alone():
    layer, keys = MoBALayer(), torch.randn(1, 2, 9, 8, requires_grad=True)
    layer.update(keys[:, :, :7], keys[:, :, :7])
    held, _ = layer.update(keys[:, :, 7:8], keys[:, :, 7:8])
    loss = held.square().sum()
    layer.update(keys[:, :, 8:], keys[:, :, 8:])
    expected = 2 * keys.detach() * (torch.arange(9) < 8)[:, None]
    torch.testing.assert_close(torch.autograd.grad(loss, keys)[0], expected)


def test_only_layers_without_a_window_are_replaced():
    sliding = GptOssConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    window, full = MoBADynamicCache(sliding).layers
    assert isinstance(window, DynamicSlidingWindowLayer) and isinstance(full, MoBALayer)
    cache = MoBADynamicCache()
    keys = torch.randn(1, 2, 3, 8)
    cache.update(keys, keys, 0)
    assert isinstance(cache.layers[0], MoBALayer)
