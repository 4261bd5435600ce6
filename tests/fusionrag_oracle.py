"""A Llama-like decoder written out: keys are kept unturned and turned for the place they are read at."""

import copy

import torch

from attnlab.rope import RopeConfig, apply_rope, shift_rope
from tests.hf_models import build


def model_of(kind, dtype=torch.float32, **changes):
    """As `build`, in `dtype` as `from_pretrained(dtype=...)` would make it: rotary frequencies stay float32."""
    model = build(kind, **changes)
    rotary = copy.deepcopy(model.base_model.rotary_emb)
    model.to(dtype)
    model.base_model.rotary_emb = rotary
    return model


class Written:
    """The decoder of a transformers model in `dtype`, one sequence at a time.

    `moves`: keys read somewhere else are not turned anew but moved there, with the roundings of that.
    """

    def __init__(self, model, dtype=torch.float64, moves=False):
        self.model, self.moves = copy.deepcopy(model.base_model).to(dtype), moves
        self.rope = RopeConfig.from_transformers(model.config)
        self.turns = getattr(model.config, "no_rope_layers", [1] * len(self.model.layers))

    def turned(self, k, start, computed=None):
        """Unturned keys `[layers, T, G, D]` for positions from `start`; where moved, from `computed` on."""
        places, far = torch.arange(k.shape[1]), dict(seq_len=1)
        if not self.moves or computed is None:
            turned = apply_rope(k, places + start, self.rope, **far)
        else:
            turned = shift_rope(self.turned(k, computed), (places + computed, places + start), self.rope, **far)
        return torch.stack([new if turns else old for new, old, turns in zip(turned, k, self.turns)])

    def run(self, ids, start, past=()):
        """Unturned keys and values `[layers, T, G, D]` of `ids` from `start`, behind `past`: turned keys and values."""
        x = self.model.embed_tokens(torch.tensor(ids))
        keys, values = [], []
        for i, layer in enumerate(self.model.layers):
            block, h = layer.self_attn, self.norm(layer.input_layernorm, x)
            q, k, v = (p(h).unflatten(-1, (-1, block.head_dim)) for p in (block.q_proj, block.k_proj, block.v_proj))
            if hasattr(block, "q_norm"):
                q, k = self.norm(block.q_norm, q), self.norm(block.k_norm, k)
            keys.append(k)
            values.append(v)
            q, k = (self.turned(x.expand(len(self.turns), *x.shape), start)[i] for x in (q, k))
            k, v = (torch.cat([*(p[j][i] for p in past), new]) for j, new in enumerate((k, v)))
            x = x + block.o_proj(self.attend(q, k, v, block.scaling))
            h = self.norm(layer.post_attention_layernorm, x)
            x = x + layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        return torch.stack(keys), torch.stack(values)

    def attend(self, q, k, v, scale):
        """Queries at the end of the keys."""
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)

    def norm(self, module, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    @torch.no_grad()
    def stored(self, ids, system, neighbours=()):
        """What a store should hold of chunk `ids` with token ids of `neighbours` before it."""
        base = at = len(system)
        before = []
        if system:
            k, v = self.run(system, 0)
            before.append((self.turned(k, 0), v))
        for other in neighbours:
            k, v = self.run(other, base, before[: bool(system)])
            before.append((self.turned(k, at, computed=base), v))
            at += len(other)
        k, v = self.run(ids, at, before)
        return self.turned(k, base, computed=at), v
