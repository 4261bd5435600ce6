"""What the demo runs: real text as bytes, a Llama from a config, and one timed pass of it."""

import itertools
import pathlib
import sysconfig
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.evals.measure import peak_memory

HEADS, KV_HEADS, HEAD_DIM = 8, 8, 64


class Variant(NamedTuple):
    """One way to run the model's attention; without a block size, dense SDPA."""

    name: str
    block_size: int = 0
    topk: int = 0


class Pass(NamedTuple):
    seconds: float
    peak_bytes: int | None
    logits: Tensor  # [tokens, 256]


def stdlib_text(tokens: int) -> Tensor:
    """The first `tokens` bytes of the running Python's own library sources, by file name: int64 `[1, tokens]`.

    Raises ValueError where the sources are missing or too short.
    """
    folder, taken = pathlib.Path(sysconfig.get_paths()["stdlib"]), bytearray()
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        taken += path.read_bytes()
        if len(taken) >= tokens:
            return torch.frombuffer(taken, dtype=torch.uint8)[:tokens].long()[None]
    raise ValueError(f"Python's library in {folder} holds {len(taken)} bytes of source, {tokens} are needed")


def build(
    layers: int, tokens: int, device: torch.device, heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0
) -> Any:
    """A seeded Llama over bytes, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=heads * HEAD_DIM,
        intermediate_size=2 * heads * HEAD_DIM,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).eval().to(device)


def describe(layers: int) -> str:
    """The model in a few words."""
    return f"Llama of {layers} layers, random weights, {HEADS} heads, {KV_HEADS} KV heads, D={HEAD_DIM}, float32"


def use(model: Any, variant: Variant) -> None:
    """Switch the model's attention in place; weights stay."""
    import attnlab.hf

    if variant.block_size:
        attnlab.hf.register()
        attnlab.hf.set_plan(model, attnlab.hf.MoBAPlan(block_size=variant.block_size, topk=variant.topk))
        model.set_attn_implementation("attnlab_moba")
    else:
        model.set_attn_implementation("sdpa")


def run(model: Any, variant: Variant, ids: Tensor) -> Pass:
    """One pass over `ids [1, tokens]`: its time, its peak memory over what was held before, its logits."""
    use(model, variant)
    with torch.inference_mode(), peak_memory(ids.device) as peak:
        start = time.perf_counter()
        logits = model(input_ids=ids, use_cache=False).logits
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Pass(seconds, peak.bytes, logits[0])


def agreement(dense: Tensor, sparse: Tensor, edges: list[int]) -> dict[str, Any]:
    """How `sparse` logits `[tokens, vocab]` compare with `dense`: overall, and per stretch between position `edges`."""

    def compare(a: Tensor, b: Tensor) -> dict[str, float]:
        same = (a.argmax(-1) == b.argmax(-1)).float().mean()
        return {"top1": same.item(), "error": ((a - b).norm() / a.norm()).item()}

    bounds = itertools.pairwise(edges)
    stretches = [{"start": a, "end": b, **compare(dense[a:b], sparse[a:b])} for a, b in bounds]
    return {**compare(dense, sparse), "stretches": stretches}
