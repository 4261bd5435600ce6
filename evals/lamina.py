"""`torchrun --nproc-per-node 3 -m attnlab.evals.lamina`: a Llama whose attention runs in processes of its own.

Rank 0 (and with `--replicas` the next ones) runs the model, every other rank holds its share of keys and values and
attends over them. Tokens are checked against the model in one process.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from attnlab.lamina import DecoderStats, DisaggregatedDecoder, SplitPlan, WorkerError, run

START = "torchrun --nproc-per-node 3 -m attnlab.evals.lamina"
NEAR = 64  # roundings of the largest logit: two tokens this close count as equal


def config(**changes: Any) -> Any:
    """A Llama of about 30M parameters."""
    from transformers import LlamaConfig

    shape = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=8192)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096)
    return LlamaConfig(**{**shape, **heads, "bos_token_id": None, "eos_token_id": None, **changes})


def build(path: str | None = None) -> Any:
    """The model at `path`, or a random one; the same in every process that asks."""
    from transformers import AutoModelForCausalLM

    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config()).eval()


def prompts(vocab: int, requests: int) -> list[list[int]]:
    """Random ids, of different lengths."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (64 + 37 * i % 191,), generator=g).tolist() for i in range(requests)]


def one_process(model: Any, asked: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """What transformers generates for all prompts at once, greedily, and the seconds it took."""
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in asked], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked], device=model.device)
    begun = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    taken = time.perf_counter() - begun
    return out[:, width:].tolist(), taken


def differing(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    """Which of the tokens are not what the model holds best after those before them, near ties aside."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    behind = logits.max(-1).values - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (behind > NEAR * torch.finfo(model.dtype).eps * logits.abs().max()).nonzero().flatten().tolist()


def formula(model: Any) -> float:
    """Bytes that attention of one token needs moved: `(2 + 2/G) e d L`."""
    c = model.config
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    group = c.num_attention_heads / c.num_key_value_heads
    return (2 + 2 / group) * model.dtype.itemsize * width * c.num_hidden_layers


def measure(decoder: DisaggregatedDecoder, requests: int, tokens: int) -> int:
    """Generate, compare, report. Exit status."""
    model = decoder.model
    asked = prompts(model.config.vocab_size, requests)
    decoder.generate(asked[:1], 2)  # the first call of everything
    before = decoder.stats()
    found = decoder.generate(asked, tokens)
    stats = decoder.stats().since(before)
    expected, alone = one_process(model, asked, tokens)
    equal = sum(a == b[: len(a)] for a, b in zip(found, expected, strict=True))
    wrong = {i: bad for i, (p, t) in enumerate(zip(asked, found, strict=True)) if (bad := differing(model, p, t))}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    c, group = model.config, decoder.group
    by = f"split by {group.plan.by}"
    for name, value in (
        ("model", f"{c.model_type}, {size:.1f} M parameters, {c.num_hidden_layers} layers, {str(model.dtype)[6:]}"),
        ("workers", f"{len(group.models)} of the model, {len(group.workers)} of attention, {by}"),
        ("tokens", f"{stats.tokens}, {equal} of {requests} requests the same as in one process"),
        ("tokens/s", f"{stats.tokens / stats.seconds:.1f}, one process: {stats.tokens / alone:.1f}"),
        ("bytes per token", bytes_line(stats, formula(model), group.plan)),
        ("communication", f"{share(stats.communication)} of the time no worker computed"),
        ("overlap", f"{share(stats.overlap)} of k and v came while attention was under way"),
    ):
        print(f"{name:16}{value}")
    if wrong:
        i, bad = next(iter(wrong.items()))
        print(f"lamina: request {i} differs from one process at token {bad[0]}", file=sys.stderr)
    return 1 if wrong else 0


def share(x: float | None) -> str:
    return "none" if x is None else f"{x:.0%}"


def bytes_line(stats: DecoderStats, least: float, plan: SplitPlan) -> str:
    more = ", and every further shard of a sequence gets q and answers a state" if plan.by == "sequence" else ""
    return f"{stats.bytes_per_token:.0f}, (2 + 2/G) e d L = {least:.0f}{more}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lamina", description=__doc__.split("\n\n")[1], usage=f"{START} [options]")
    parser.add_argument("--plan", choices=("head", "request", "sequence"), default="head")
    parser.add_argument("--replicas", type=int, default=1, help="ranks that run the model; the others attend")
    parser.add_argument("--model", metavar="PATH", help="a transformers model instead of a random one")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each request")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds until a silent worker counts as dead")
    options = parser.parse_args(argv)
    for name in ("replicas", "requests", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be a positive int, got {getattr(options, name)}")
    if options.model is not None and not os.path.isdir(options.model):
        parser.error(f"--model must be a folder, {options.model} is none")
    if "WORLD_SIZE" not in os.environ:
        parser.error(f"not started by torchrun: {START}")
    options.shards = int(os.environ["WORLD_SIZE"]) - options.replicas
    if options.shards < 1:
        parser.error(
            f"--replicas {options.replicas} of {os.environ['WORLD_SIZE']} processes leave none for attention: "
            f"--nproc-per-node {options.replicas + 1} or more"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 when tokens differ from one process's or a worker died."""
    options = parse(argv)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    try:
        status = run(
            lambda: build(options.model),
            SplitPlan(options.plan, options.shards),
            lambda decoder: measure(decoder, options.requests, options.tokens),
            replicas=options.replicas,
            timeout=options.timeout,
            trace=True,
        )
    except (ValueError, TypeError, WorkerError) as e:
        print(f"lamina: {e}", file=sys.stderr)
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
