"""What a batch of requests reused and recomputed, and where the time to its first tokens went."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

PARTS = ("load", "compute", "rotate", "select", "recompute", "first_token")


@dataclass(frozen=True)
class RequestReport:
    """Tokens of one request. `loaded + computed = context` and `reused + recomputed = context`.

    Attributes:
        system, context, question: tokens of the system prompt, of the chunks, of the question.
        loaded, computed: context tokens whose chunks came from the store, and those whose chunks it lacked.
        exact: context tokens that needed no recompute, being a true prefix.
        reused, recomputed: context tokens that are seen as their chunk's cache holds them, and those recomputed.
        generated: tokens, an end-of-sequence token included.
        owned_slots: slots of the pool this request alone reads: what it recomputed, its question, what it generated.
    """

    system: int
    context: int
    question: int
    loaded: int
    computed: int
    exact: int
    reused: int
    recomputed: int
    generated: int
    owned_slots: int


@dataclass(frozen=True)
class FusionReport:
    """One batch. Times are seconds of the batch as a whole; the device is waited for at the end of each part.

    Attributes:
        requests: one report per question.
        load: tokenising, hashing, waiting for other threads' calls, and reading chunks from the store.
        compute: running the chunks that the store lacked, storing them, and the first call's system prompt.
        rotate: bringing the chunks' keys and values to their slots, keys turned on the way.
        select: all that the selector ran, and the choice itself; 0 at rate 0.
        recompute: the forward pass over the chosen tokens and the question; 0 at rate 0.
        first_token: the last row's logits; at rate 0 also the question's pass over the cache.
        decode: all later tokens.
        loaded_bytes: of keys and values that the store handed out, by tier.
        shared_slots: slots written once and read by every request that has the chunk there, the system prompt's too.
        owned_slots: slots that one request alone reads.
    """

    requests: tuple[RequestReport, ...]
    load: float
    compute: float
    rotate: float
    select: float
    recompute: float
    first_token: float
    decode: float
    loaded_bytes: Mapping[str, int]
    shared_slots: int
    owned_slots: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token of every request."""
        return sum(getattr(self, part) for part in PARTS)

    def total(self, name: str) -> int:
        """The sum over requests of one of their counts."""
        if name not in {field.name for field in fields(RequestReport)}:
            raise ValueError(f"FusionReport.total: name must be a field of RequestReport, got {name!r}")
        return sum(getattr(request, name) for request in self.requests)

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {1e3 * getattr(self, part):.1f}" for part in PARTS)
        held = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in self.loaded_bytes.items() if size)
        return (
            f"{len(self.requests)} requests, {self.total('context')} context tokens: {self.total('reused')} reused, "
            f"{self.total('recomputed')} recomputed, {self.total('computed')} missing from the store\n"
            f"first token after {1e3 * self.ttft:.1f} ms ({parts}), decode {1e3 * self.decode:.1f} ms\n"
            f"read: {held or 'nothing'}; slots: {self.shared_slots} shared, {self.owned_slots} owned"
        )


class Clock:
    """Adds the time since the last lap to a part's seconds, once the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys((*PARTS, "decode"), 0.0)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now
