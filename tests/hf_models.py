"""Small transformers models from configs, with random weights, and what the tests ask of them."""

import torch
import transformers

import attnlab.hf as hf
from attnlab.hf import MoBADynamicCache, MoBAPlan, set_plan

hf.register()

VOCAB = 61
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "attention_bias": True}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 9}),
}
PADDING = {"none": (0, 0), "left": (9, 0), "right": (0, 9)}


def build(kind="llama", **changes):
    torch.manual_seed(0)
    name, extra = MODELS[kind]
    config = getattr(transformers, name)(**{**COMMON, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.5  # not the default, so that dropping it shows
    return model


def dense(model, call):
    """`call()` under transformers' own attention, then back to ours."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager" if model.config.model_type == "gpt_oss" else "sdpa")
    result = call()
    model.set_attn_implementation(ours)
    return result


def moba(kind="llama", plan=None, **changes):
    model = build(kind, **changes)
    model.set_attn_implementation("attnlab_moba")
    set_plan(model, plan or MoBAPlan(block_size=4, topk=2))
    return model


def inputs(padding="none", tokens=29, batch=2, seed=1):
    """`batch` rows; the last has the padding named."""
    ids = torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    left, right = PADDING[padding]
    mask[-1, :left] = 0
    mask[-1, tokens - right :] = 0
    return ids * mask, mask


def generate(model, ids, mask, cache=None, **options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        **options,
    )
    return out.sequences, torch.stack(out.scores, 1) if out.scores else None


def fresh(model, kind):
    return MoBADynamicCache(model.config) if kind == "moba" else transformers.DynamicCache(config=model.config)


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)
