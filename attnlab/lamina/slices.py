"""A transformers model cut at every attention into slices: what runs on the model workers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..decoder_models import model_facts

PARTS = ("input_layernorm", "post_attention_layernorm", "mlp", "self_attn")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Rotation(NamedTuple):
    """Cosines and sines `[..., D]` of the positions of a slice's tokens, in the model's dtype."""

    cos: Tensor
    sin: Tensor


class Slices:
    """A model of `L` layers as `L + 1` slices, with an attention between each and the next.

    Slice 0 is `embed`, slice `k > 0` begins with `close` of layer `k - 1`; slice `k < L` goes on with `query` and then
    `key_value` of layer `k`, slice `L` ends with `logits`. q comes first, so that it can be sent while k and v are
    still being computed: nothing they need stands in front of it but the norm that both read.

    Besides q, k and v only the residual stream `[n, hidden]` leaves a slice, and nothing smaller could (the paper's
    minimum cut). The stream is a path from the model's input to its output whose every edge is `hidden` wide, so any
    cut severs `hidden` at least. With the attention taken out, q, k and v lead nowhere and the output projection comes
    from nowhere: there the stream is the only path, and a cut severs it alone. Anywhere else a branch (the norm, the
    MLP) lies beside it and is cut as well. Cosines and sines come from positions, which every rank knows.

    Tokens are any leading dimensions: `[n]` for a batch of rows at different positions, `[T]` for a prompt. Runs the
    model's own modules, under `decoder_models.dense`.

    Raises TypeError and ValueError on what `model_facts` refuses, on layers without the modules of a Llama, on a model
    without a head, and on layers that scale their scores differently.
    """

    def __init__(self, fn: str, model: Any) -> None:
        self.facts = model_facts(fn, model)
        self.base, self.head = model.base_model, model.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{fn}: model must have a language model's head, got {type(model).__name__}")
        self.layers: list[Any] = list(self.base.layers)[: self.facts.layers]
        for i, layer in enumerate(self.layers):
            _check_layer(fn, i, layer, type(model).__name__)
        scales = {float(layer.self_attn.scaling) for layer in self.layers}
        if len(scales) != 1:
            raise ValueError(f"{fn}: model's layers must scale their scores alike, got {sorted(scales)}")
        self.scale = scales.pop()
        self.dtype: torch.dtype = self.base.embed_tokens.weight.dtype
        self.hidden: int = self.base.embed_tokens.weight.shape[1]

    def rotation(self, positions: Tensor) -> Rotation:
        """Of tokens at `positions`, int64 of any shape; layers without rotary positions leave it alone."""
        like = self.base.embed_tokens.weight.new_zeros(())
        cos, sin = self.base.rotary_emb(like, position_ids=positions.reshape(1, -1))
        return Rotation(cos.view(*positions.shape, -1), sin.view(*positions.shape, -1))

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream `[..., hidden]` of tokens `ids [...]`."""
        return self.base.embed_tokens(ids)

    def query(self, layer: int, residual: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`q [..., Hq, D]`, and the normed stream that `key_value` reads."""
        block = self.layers[layer]
        normed = block.input_layernorm(residual)
        return self._turned(layer, self._heads(block.self_attn, "q", normed), rotation), normed

    def key_value(self, layer: int, normed: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`k, v [..., Hkv, D]`."""
        attention = self.layers[layer].self_attn
        return self._turned(layer, self._heads(attention, "k", normed), rotation), self._heads(attention, "v", normed)

    def close(self, layer: int, residual: Tensor, attended: Tensor) -> Tensor:
        """The residual stream behind a layer, from the one in front and `attended [..., Hq, D]` of any float dtype."""
        block = self.layers[layer]
        residual = residual + block.self_attn.o_proj(attended.to(residual.dtype).flatten(-2))
        return residual + block.mlp(block.post_attention_layernorm(residual))

    def logits(self, residual: Tensor) -> Tensor:
        """`[..., vocabulary]`."""
        return self.head(self.base.norm(residual))

    def _heads(self, attention: Any, name: str, normed: Tensor) -> Tensor:
        x = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, self.facts.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return x if norm is None else norm(x)

    def _turned(self, layer: int, x: Tensor, rotation: Rotation) -> Tensor:
        return _turn(x, rotation) if self.facts.rotary[layer] else x


def greedy(logits: Tensor) -> Tensor:
    """The best token of each row of `[n, vocabulary]`."""
    return logits.argmax(-1)


def _turn(x: Tensor, rotation: Rotation) -> Tensor:
    """`x [..., H, D]` turned by its positions, halves paired as in every Llama type."""
    cos, sin = (r.unsqueeze(-2) for r in rotation)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _check_layer(fn: str, index: int, layer: nn.Module, model: str) -> None:
    missing = [name for name in PARTS if not hasattr(layer, name)]
    attention = getattr(layer, "self_attn", None)
    missing += [f"self_attn.{name}" for name in (*PROJECTIONS, "scaling") if not hasattr(attention, name)]
    if missing:
        raise TypeError(f"{fn}: model must have a Llama's modules, layer {index} of {model} has no {missing[0]}")
