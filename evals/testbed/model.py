"""The testbed model: a small SmolLM3 of transformers, and the seeded start without which it stays on a plateau."""

from typing import Any

import torch

from .recipe import HEAD_DIM, LONGEST, ROPE_THETA, Sizes
from .vocabulary import BOS, END, NAMES, PAD


def config(sizes: Sizes) -> Any:
    from transformers import SmolLM3Config

    return SmolLM3Config(
        vocab_size=len(NAMES),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=True,
        no_rope_layers=[int(i < sizes.layers // 2) for i in range(sizes.layers)],  # 1: with rotary positions
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=LONGEST,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def seeded(sizes: Sizes, seed: int) -> Any:
    """The model before training, its retrieval circuit laid out.

    Layer 0's heads attend to the tokens 1, 2, ... before, by constant queries and keys (biases) and the phase of the
    rotary positions. Layers without positions match content: queries and keys project alike, and what they copy goes
    back where it came from.
    """
    from transformers import SmolLM3ForCausalLM

    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM(config(sizes))
    generator = torch.Generator().manual_seed(seed + 1)
    group = sizes.heads // sizes.kv_heads
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1 if "embed" in name else weight.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.zero_()
        model.model.norm.weight.fill_(sizes.hidden**-0.5)
        for i, layer in enumerate(model.model.layers):
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                out.weight.mul_((2 * sizes.layers) ** -0.5)
            if i == 0:
                _previous_tokens(layer.self_attn, sizes, group, generator)
            elif not model.config.no_rope_layers[i]:
                _match_content(layer.self_attn, sizes, group, generator)
    return model


def _previous_tokens(attention: Any, sizes: Sizes, group: int, generator: torch.Generator) -> None:
    """Head `h` attends to the token `h + 1` before."""
    half = HEAD_DIM // 2
    frequency = ROPE_THETA ** (-torch.arange(half) / half)
    weight = torch.exp(-torch.arange(half) / (half / 4))
    size = 4.0 * (weight / weight.norm()).sqrt() * half**0.25
    attention.q_proj.weight.mul_(0.2)
    attention.k_proj.weight.mul_(0.2)
    attention.v_proj.weight.copy_(_orthonormal(sizes.kv_heads, sizes.hidden, generator))
    for g in range(sizes.kv_heads):
        attention.k_proj.bias[g * HEAD_DIM :][:half] = size
    for h in range(sizes.heads):
        phase = -frequency * (h + 1)
        attention.q_proj.bias[h * HEAD_DIM :][:HEAD_DIM] = torch.cat([size * phase.cos(), size * phase.sin()])
        turn = torch.linalg.qr(torch.randn(sizes.hidden, sizes.hidden, generator=generator))[0]
        copied = attention.v_proj.weight[h // group * HEAD_DIM :][:HEAD_DIM]
        attention.o_proj.weight[:, h * HEAD_DIM : (h + 1) * HEAD_DIM] = 0.7 * turn @ copied.T


def _match_content(attention: Any, sizes: Sizes, group: int, generator: torch.Generator) -> None:
    keys, values = (_orthonormal(sizes.kv_heads, sizes.hidden, generator) for _ in range(2))
    attention.k_proj.weight.copy_(1.2 * keys)
    attention.v_proj.weight.copy_(values)
    attention.q_proj.weight.copy_(1.2 * keys.view(-1, HEAD_DIM, sizes.hidden).repeat_interleave(group, 0).flatten(0, 1))
    back = values.view(-1, HEAD_DIM, sizes.hidden).repeat_interleave(group, 0).flatten(0, 1).T
    attention.o_proj.weight.copy_(0.5 / group * back)


def _orthonormal(heads: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """`[heads * D, hidden]`, rows orthonormal in each head."""
    return torch.cat([torch.linalg.qr(torch.randn(hidden, HEAD_DIM, generator=generator))[0].T for _ in range(heads)])
