"""Which model computed a chunk: a hash of its configuration and of a sample of its weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# They differ between copies of one model, or change what it reports and not what it computes. `dtype` is the wish, the
# weights' dtypes are hashed with them.
IGNORED = frozenset(
    {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict"}
    | {"attn_implementation", "_attn_implementation", "output_attentions", "output_hidden_states"}
    | {"pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type"}
)
SAMPLE = 2048


def fingerprint(model: Any) -> str:
    """64 hexadecimal digits of a transformers model's class, configuration and weights.

    Of each weight and persistent buffer it reads the shape, the dtype and about 2048 elements, evenly spread, so it
    costs a fraction of a second whatever the model's size, and a model trained further differs. Every entry of the
    configuration counts except those that do not change keys and values; device, attention implementation and
    `torch.compile` do not count. It cannot see a change of a few elements that the sample misses, nor one of code:
    hooks, replaced methods, attributes set on modules after they were built.

    Raises:
        TypeError: not a model with a `config` and a `state_dict`.
        ValueError: a weight has no data (the meta device).
    """
    model = getattr(model, "_orig_mod", model)  # what `torch.compile` wrapped
    config: Any = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "to_dict"):
        raise TypeError(f"fingerprint: model must be a transformers model, got {type(model).__name__}")
    facts = [type(model).__name__, _relevant(config.to_dict())]
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, x in model.state_dict().items():
        if x.is_meta:
            raise ValueError(f"fingerprint: weight {name} is on the meta device, so its values cannot be read")
        name = name.replace("_orig_mod.", "")
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(_sample(x).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _relevant(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {str(name): _relevant(value) for name, value in config.items() if name not in IGNORED}


def _sample(x: Tensor) -> Tensor:
    stride = max(1, x.numel() // SAMPLE) | 1  # odd: an even one would visit few columns of a matrix
    return x.detach().reshape(-1)[::stride].contiguous().cpu()
