"""Lamina's part of `bench`: its cases, the check against the reference, and one callable per contender."""

import dataclasses
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from attnlab import SplitPlan, merge_states, split_attention, split_decode
from attnlab.evals import lamina
from attnlab.evals.bench_cases import Case, Contenders, Shape, heads_first, make_qkv, sdpa, timeable
from attnlab.lamina import DisaggregatedDecoder, run
from attnlab.states import BACKENDS as MERGE_BACKENDS
from attnlab.testing import assert_accurate

BACKENDS = ("triton", "cpu", "portable")
MERGERS = tuple(name for name in MERGE_BACKENDS if name != "reference")
# What each kind is measured against.
BASES = {
    "split_decode": "sdpa",
    "split_decode_mha": "sdpa",
    "split_head": "one call",
    "split_sequence": "one call",
    "merge_states": "copy",
    "lamina_decode": "one process",
}
KINDS = tuple(BASES)
TWO = "two processes"
CPU_SHAPE = Shape(32, 8, 64, "float32")
GPU_SHAPE = Shape(32, 8, 64, "bfloat16")
WAYS = 8  # shards, and states merged
CHECKED_TOKENS = 1500
REQUESTS = 4
TIMEOUT_S = 240


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Targets: a speed-up over dense decode, over the undivided call, and over a copy that moves as many bytes.

    Lengths are tokens of a row; of `merge_states` MiB of states; of `lamina_decode` tokens of each request.
    """
    cpu = device.type == "cpu"
    if quick:
        lengths = {"split_decode": 8192, "split_decode_mha": 8192, "split_head": 8192, "split_sequence": 8192}
        found = [Case(kind, n, repeats=3) for kind, n in (lengths | {"merge_states": 16}).items()]
        return [*found, Case("lamina_decode", 8, repeats=2)] if cpu else found
    goals = {"split_decode": 1.0, "split_decode_mha": 1.0, "split_head": 0.95, "split_sequence": 0.95}
    found = [Case(kind, 131072, target=goal if cpu else None, repeats=15) for kind, goal in goals.items()]
    # Shorter rows too: with them a record gives CostModel its attention time.
    found += [Case("split_decode", n, repeats=15) for n in (32768, 8192)]
    found.append(Case("merge_states", 256, target=0.3 if cpu else 0.9, repeats=15))
    # Two processes on one GPU are nothing that NCCL does.
    return [*found, Case("lamina_decode", 64, repeats=5)] if cpu else found


def shape_of(case: Case, shape: Shape) -> Shape:
    """The case's heads: without groups for `split_decode_mha`."""
    return dataclasses.replace(shape, heads=shape.kv_heads) if case.kind == "split_decode_mha" else shape


def kv_bytes(shape: Shape) -> int:
    """Bytes of a token's keys and values."""
    return 2 * shape.kv_heads * shape.head_dim * shape.torch_dtype.itemsize


def serving(shape: Shape, device: torch.device) -> tuple[dict[str, list[str]], dict[str, str]]:
    """For each kind the backends that can be timed here, and why each other one cannot."""
    q, k, v = make_qkv(shape, 16, device)
    decoders, why = timeable(device, BACKENDS, split_decode, q[:, -1:], k, v)
    mergers, refused = timeable(device, MERGERS, merge_states, *states(1, shape, device, rows=1))
    found = dict.fromkeys(KINDS, decoders) | {"merge_states": mergers, "lamina_decode": [TWO]}
    found |= dict.fromkeys(("split_head", "split_sequence"), decoders[:1])
    return found, why | {f"merging by {name}": reason for name, reason in refused.items()}


def states(mib: int, shape: Shape, device: torch.device | str, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """`outs [8, rows, H, D]` of `mib` MiB, unless `rows` are given, and `lses [8, rows, H]`, Gaussian."""
    each = WAYS * shape.heads * shape.head_dim * shape.torch_dtype.itemsize
    rows = max(1, mib * 2**20 // each) if rows is None else rows
    generator = torch.Generator().manual_seed(3)
    outs = torch.randn(WAYS, rows, shape.heads, shape.head_dim, generator=generator)
    lses = torch.randn(WAYS, rows, shape.heads, generator=generator)
    return outs.to(device, shape.torch_dtype), lses.to(device)


def check(case: Case, shape: Shape, device: torch.device, backend: str) -> None:
    """1500 tokens and two or eight KV heads, seven merged rows, or a few tokens; AssertionError if wrong."""
    shape = shape_of(case, shape)
    if case.kind == "lamina_decode":
        two_processes(2, 4, 1)
        return
    if case.kind == "merge_states":
        outs, lses = states(1, shape, device, rows=7)
        merge = functools.partial(merge_states, backend="reference")
        got, wanted, plain = (
            merge_states(outs, lses, backend=backend),
            merge(outs.double(), lses.double()),
            merge(outs, lses),
        )
    else:
        heads = WAYS if case.kind == "split_head" else 2
        small = dataclasses.replace(shape, heads=heads * shape.heads // shape.kv_heads, kv_heads=heads)
        q, k, v = make_qkv(small, CHECKED_TOKENS, device)
        last, decode = q[:, -1:], functools.partial(split_decode, backend="reference")
        got = _attend(case, last, k, v, backend)()
        wanted, plain = decode(*(x.double() for x in (last, k, v))), decode(last, k, v)
    for name, *triple in zip(("out", "lse"), got, wanted, plain, strict=True):
        assert_accurate(*triple, what=name)


def _attend(case: Case, q: Tensor, k: Tensor, v: Tensor, backend: str) -> functools.partial[Any]:
    """One call, or eight shards of it, each laid out as the whole is."""
    if not case.kind.startswith("split_decode"):
        plan = SplitPlan(case.kind.removeprefix("split_"), WAYS)
        shards = [shard._replace(k=head_by_head(shard.k), v=head_by_head(shard.v)) for shard in plan.split(k, v)]
        return functools.partial(split_attention, q, shards, plan, backend=backend)
    return functools.partial(split_decode, q, k, v, backend=backend)


def head_by_head(x: Tensor) -> Tensor:
    """`x [B, T, H, D]` of which a head's tokens lie together."""
    return heads_first(x)[0].transpose(1, 2)


def contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """A kind's base, and each backend on the same: KV lies head by head, as in the caches of transformers."""
    shape = shape_of(case, shape)
    if case.kind == "merge_states":
        outs, lses = states(case.length, shape, device)
        moved = sum(x.numel() * x.element_size() for x in (outs, lses)) * (WAYS + 1) // WAYS
        source = torch.ones(moved // 8, dtype=torch.float32, device=device)
        found: Contenders = {"copy": functools.partial(torch.empty_like(source).copy_, source)}
        target = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        return found | {
            name: functools.partial(merge_states, outs, lses, out=target, backend=name) for name in backends
        }
    q, k, v = make_qkv(shape, case.length, device)
    last, k, v = q[:, -1:].contiguous(), head_by_head(k), head_by_head(v)
    if BASES[case.kind] == "sdpa":
        grouped = last.view(1, shape.kv_heads, -1, shape.head_dim)
        found = {"sdpa": functools.partial(sdpa, grouped, k.transpose(1, 2), v.transpose(1, 2), causal=False)}
    else:
        found = {"one call": functools.partial(split_decode, last, k, v, backend=backends[0])}
    return found | {name: _attend(case, last, k, v, name) for name in backends}


def two_processes(requests: int, tokens: int, repeats: int) -> dict[str, Any]:
    """A 30M-parameter Llama with its attention in a second process, one thread each, against one process with both.

    Returns seconds of each run, `"one process"` and `"two processes"`, and of the latter tokens made, the share of the
    time in which neither computed, bytes sent for a token's attention, and the formula's. AssertionError where tokens
    are wrong, RuntimeError where a process fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = os.path.dirname(os.path.dirname(sys.modules["attnlab"].__file__ or ""))
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": paths}
    job = [sys.executable, "-m", __name__, json.dumps([requests, tokens, repeats, torch.get_num_threads()])]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(job, env=os.environ | where | {"RANK": str(rank)}, **options) for rank in range(2)]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (_, complaint) in zip(both, said, strict=True):
        if process.returncode:
            lines = complaint.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RuntimeError(f"lamina_decode failed in a process: {lines[-1]}")
    found = json.loads(said[0][0].strip().splitlines()[-1])
    assert not found.pop("wrong"), "tokens differ from those of one process"
    return found


def _lead(decoder: DisaggregatedDecoder, requests: int, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    model = decoder.model
    asked = lamina.prompts(model.config.vocab_size, requests)
    made = decoder.generate(asked, 2)
    before, seconds = decoder.stats(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        made = decoder.generate(asked, tokens)
        seconds.append(time.perf_counter() - begun)
    stats = decoder.stats().since(before)
    wrong = any(lamina.differing(model, *pair) for pair in zip(asked, made, strict=True))
    decoder.close()
    torch.set_num_threads(threads)
    alone = [lamina.one_process(model, asked, tokens)[1] for _ in range(repeats + 1)][1:]
    about = {"tokens": requests * tokens, "seconds": statistics.median(seconds), "communication": stats.communication}
    about |= {"bytes": stats.bytes_per_token, "formula": lamina.formula(model)}
    return {"one process": alone, TWO: seconds, "wrong": wrong, **about}


def main() -> None:
    """One of the two processes."""
    requests, tokens, repeats, threads = json.loads(sys.argv[1])
    torch.set_num_threads(1)

    def body(decoder: DisaggregatedDecoder) -> dict[str, Any]:
        return _lead(decoder, requests, tokens, repeats, threads)

    if found := run(lamina.build, SplitPlan("head", 1), body, timeout=60.0, trace=True):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
