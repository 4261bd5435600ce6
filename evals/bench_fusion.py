"""FusionRAG's part of `bench`: its cases, the check against the reference, and one callable per contender."""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import selective_attention
from attnlab.evals.bench_cases import Case, Contenders, Shape, heads_first, make_qkv, sdpa, timeable
from attnlab.evals.demo_model import stdlib_text
from attnlab.evals.measure import peak_memory
from attnlab.fusionrag import ChunkStore, FusionAnswers, FusionRAG, FusionReport, future_share
from attnlab.fusionrag.report import PARTS
from attnlab.testing import assert_accurate

BACKENDS = ("triton", "cpu", "portable")
KINDS = ("selective", "selective_mask", "selective_memory", "ttft_15", "ttft_0")
RATES = {"ttft_15": 0.15, "ttft_0": 0.0}
CPU_SHAPE = Shape(8, 8, 64, "float32")
GPU_SHAPE = Shape(32, 8, 128, "bfloat16")
SHARE = 0.15  # of all tokens are recomputed
CHECKED_TOKENS = 1500
CHUNK = 512
QUESTION = 64
# 31 million parameters over bytes.
MODEL = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Targets: a speed-up over SDPA, dense or masked, or over full prefill; memory in masks of a byte a pair."""
    if quick:
        lengths = {"selective": 4096, "selective_mask": 4096, "selective_memory": 8192, "ttft_15": 2048, "ttft_0": 2048}
        return [Case(kind, n, repeats=3) for kind, n in lengths.items()]
    if device.type == "cuda":
        lengths = {"selective": 32768, "selective_mask": 32768, "selective_memory": 32768, "ttft_15": 16384}
        return [Case(kind, n, repeats=15) for kind, n in lengths.items()] + [Case("ttft_0", 16384)]
    return [
        Case("selective", 32768, target=5.0),
        Case("selective", 8192, target=3.5),
        Case("selective_mask", 32768, target=3.0, repeats=3),
        Case("selective_memory", 32768, target=1.0, repeats=1),
        Case("ttft_15", 16384, target=3.0, repeats=3),
        Case("ttft_0", 16384, target=6.0, repeats=3),
    ]


def serving(shape: Shape, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that can be timed here, and why each other one cannot."""
    q, k, v, positions = inputs(shape, 16, device)
    return timeable(device, BACKENDS, selective_attention, q, k, v, positions)


def inputs(shape: Shape, length: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`q [1, nnz, H, D]` of a random share of the positions, `k, v`, and the positions, rising, `[1, nnz]`."""
    q, k, v = make_qkv(shape, length, device)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(2))
    positions = order[: max(1, round(SHARE * length))].sort().values.to(device)
    return q[:, positions].contiguous(), k, v, positions[None]


def future(case: Case, shape: Shape) -> float:
    """Share of what a case's rows attend under the field's shortcut that lies ahead of them."""
    return future_share(inputs(dataclasses.replace(shape, heads=1, kv_heads=1), case.length, "cpu")[3], case.length)


def check(case: Case, shape: Shape, device: torch.device, backend: str) -> None:
    """1500 tokens and two KV heads in the case's shape, or a short prompt; AssertionError where results are wrong."""
    if case.kind in RATES:
        return check_ttft(device, backend)
    group = shape.heads // shape.kv_heads
    small = dataclasses.replace(shape, heads=2 * group, kv_heads=2)
    q, k, v, positions = inputs(small, CHECKED_TOKENS, device)
    reference = functools.partial(selective_attention, positions=positions, backend="reference")
    got = selective_attention(q, k, v, positions, backend=backend)
    assert_accurate(got, reference(*(x.double() for x in (q, k, v))), reference(q, k, v), what="out")


def contenders(case: Case, shape: Shape, device: torch.device, backends: list[str]) -> Contenders:
    """The chosen rows by each backend, and by SDPA: every row, or, for `selective_mask`, those under their mask."""
    q, k, v, positions = inputs(shape, case.length, device)
    if case.kind == "selective":
        found: Contenders = {"sdpa": functools.partial(sdpa, *heads_first(*make_qkv(shape, case.length, device)))}
    else:
        found = {"sdpa": functools.partial(masked, *heads_first(q, k, v), seen(positions, case.length))}
    for name in backends:
        found[name] = functools.partial(selective_attention, q, k, v, positions, backend=name)
    return found


def seen(positions: Tensor, length: int) -> Tensor:
    """The mask `[B, 1, nnz, length]` that SDPA takes, true at the keys up to a row's position."""
    return torch.arange(length, device=positions.device) <= positions[:, None, :, None]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA on `[B, H, nnz, D]`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


class Prompts(NamedTuple):
    """A model, its pipeline with every chunk on disk, and what it is asked."""

    model: Any
    rag: FusionRAG
    question: list[int]
    chunks: list[list[int]]

    def answer(self, rate: float, **options: Any) -> FusionAnswers:
        return self.rag.generate(self.question, self.chunks, rate=rate, max_new_tokens=1, **options)

    def contenders(self, rate: float, name: str) -> tuple[Contenders, list[FusionReport]]:
        """Full prefill and the first token of the pipeline, and the list of reports that the latter fills."""
        reports: list[FusionReport] = []
        return {"prefill": self.prefill, name: lambda: reports.append(self.answer(rate).report)}, reports

    def prefill(self) -> Tensor:
        """Logits `[vocabulary]` after all of it, dense."""
        ids = torch.tensor([[*itertools.chain(*self.chunks), *self.question]], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1]


@contextlib.contextmanager
def prompts(length: int, chunk: int, device: torch.device, backend: str) -> Iterator[Prompts]:
    """`length` bytes of real text in chunks of `chunk`, stored on disk alone, and a question of as many more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODEL, max_position_embeddings=2 * length, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    text = stdlib_text(length + QUESTION)[0].tolist()
    parts = [text[i : i + chunk] for i in range(0, length, chunk)]
    with tempfile.TemporaryDirectory() as folder:
        rag = FusionRAG(model, store=ChunkStore(folder, ram_bytes=0), backend=backend)
        rag.preprocess(parts, neighbours=0, progress=False)
        yield Prompts(model, rag, text[length:], parts)


def stages(reports: list[FusionReport]) -> dict[str, float]:
    """Median seconds of each part of the time to first token, and of all, and what was read and recomputed."""
    found = {part: statistics.median(getattr(report, part) for report in reports) for part in (*PARTS, "ttft")}
    counts = {name: reports[0].total(name) for name in ("context", "recomputed")}
    return {**found, **counts, "loaded_bytes": sum(reports[0].loaded_bytes.values())}


def check_ttft(device: torch.device, backend: str) -> None:
    """Everything recomputed, a short prompt's logits are those of its prefill, to the rounding of the model's dtype."""
    with prompts(1024, 128, device, backend) as made:
        answers = made.answer(1.0, return_logits=True)
        wanted = made.prefill().double()
        error = (answers.logits[0][0].double() - wanted).abs().max() / wanted.abs().max()
        eps = torch.finfo(made.model.dtype).eps
    assert error <= 64 * eps, f"logits at rate 1 differ from full prefill's by {error:.1e}"


def selective_peak(length: int, shape: dict[str, Any], device: str, contender: str) -> dict[str, Any]:
    """Peak memory of one call over its inputs, output included. Meant for a fresh process."""
    what = Shape(**shape)

    def call(n: int) -> tuple[Any, int]:
        q, k, v, positions = inputs(what, n, device)
        if contender == "sdpa":
            q, k, v = heads_first(q, k, v)
            return lambda: masked(q, k, v, seen(positions, n)), positions.numel() * n
        return functools.partial(selective_attention, q, k, v, positions, backend=contender), positions.numel() * n

    call(1024)[0]()
    run, pairs = call(length)
    with peak_memory(device) as peak:
        run()
    return {"bytes": peak.bytes, "method": peak.method, "pairs": pairs}
